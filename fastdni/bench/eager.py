"""Decoupled neural interfaces in plain eager PyTorch: the equations, and the baseline to beat.

An interface stands between two parts of a network. The part below hands up a *message* h; the
part above would send back the gradient g = dL/dh. Instead of waiting for g, the interface sends
down a *synthetic gradient*, which a *synthesizer* M predicts from a *trigger* (here h itself)
and an optional *context* c, such as the labels (Jaderberg et al. 2016, arXiv 1608.05343,
sections 2 and 2.1):

    g^ = M(h, c)                       sent to the part below at once, in the forward pass
    L_M = ||g^ - g||^2 / B             M's loss, when g arrives in the backward pass
    dL_M / dg^ = (2 / B) (g^ - g)      B = size(0), not divided by the number of features

Synthetic messages work alike in the other direction (section 2.3, complete unlock).

Everything here takes the context as an argument and runs its synthesizer twice a step: once for
the synthetic gradient and once for the graph that L_M is differentiated through. With
``shared_forward=True`` the graph of one evaluation serves both, with the same result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EagerSynthesizer(nn.Module):
    """An MLP that predicts a message from a trigger and a context.

    With n = ``n_hidden`` layers above the input:

        a_0 = W_h h + b_h (+ W_c c + b_c);   a_i = W_i relu(a_{i-1}) + b_i;   M(h, c) = a_n

    The last layer's weight starts at zero, so the first synthetic gradients are its bias.
    Parameter names and the order of random draws are those of ``fastdni.BasicSynthesizer``.

    Args:
        output_dim: number of features of the predicted message.
        n_hidden: number of layers above the input layer.
        hidden_dim: width of the hidden layers; ``output_dim`` by default.
        trigger_dim: number of features of the trigger; ``output_dim`` by default.
        context_dim: number of features of the context; None when there is none.
    """

    def __init__(
        self,
        output_dim: int,
        n_hidden: int = 0,
        hidden_dim: int | None = None,
        trigger_dim: int | None = None,
        context_dim: int | None = None,
    ):
        super().__init__()
        hidden_dim = output_dim if hidden_dim is None else hidden_dim
        trigger_dim = output_dim if trigger_dim is None else trigger_dim
        widths = [hidden_dim] * n_hidden + [output_dim]

        self.input_trigger = nn.Linear(trigger_dim, widths[0])
        self.input_context = None if context_dim is None else nn.Linear(context_dim, widths[0])
        self.layers = nn.ModuleList(
            nn.Linear(below, above) for below, above in zip(widths, widths[1:], strict=False)
        )

        last = [self.layers[-1]] if n_hidden else [self.input_trigger, self.input_context]
        for layer in last:
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Predicts the message (..., output_dim) from trigger (..., trigger_dim) and context."""
        a = self.input_trigger(trigger)
        if self.input_context is not None:
            a = a + self.input_context(context)
        for layer in self.layers:
            a = layer(F.relu(a))
        return a


class _InterceptGradient(torch.autograd.Function):
    """h -> h; in the backward pass g -> (g, dL_M/dg^ = (2 / B) (g^ - g))."""

    @staticmethod
    def forward(ctx, trigger, synthetic_gradient):
        ctx.save_for_backward(synthetic_gradient)
        # A copy: an in-place activation above must not change what the synthesizer has read.
        return trigger.clone()

    @staticmethod
    def backward(ctx, gradient):
        (synthetic_gradient,) = ctx.saved_tensors
        return gradient, 2 / len(gradient) * (synthetic_gradient - gradient)


class EagerBackwardInterface(nn.Module):
    """Sends a synthetic gradient down in the forward pass: update unlock, section 2.1.

    In the forward pass h receives factor * g^ and is detached; in the backward pass the true
    gradient g trains the synthesizer, dL_M / dg^ = (2 / B) (g^ - g). ``factor`` does not scale
    the target. In evaluation mode the trigger itself comes back and nothing is sent.

    Args:
        synthesizer: module taking (trigger, context).
        shared_forward: evaluate the synthesizer once a step instead of twice.
    """

    def __init__(self, synthesizer: nn.Module, shared_forward: bool = False):
        super().__init__()
        self.synthesizer = synthesizer
        self.shared_forward = shared_forward

    def forward(self, trigger: Tensor, context: Tensor | None = None, factor: float = 1) -> Tensor:
        """Sends factor * g^ down from the trigger; returns a trigger of the part above."""
        if not self.training:
            return trigger
        if not self.shared_forward:
            self.backward(trigger, context, factor)
            return self.make_trigger(trigger, context)
        h = trigger.detach()
        synthetic_gradient = self.synthesizer(h, context)
        trigger.backward(synthetic_gradient.detach() * factor)
        return _InterceptGradient.apply(h, synthetic_gradient)

    def backward(self, trigger: Tensor, context: Tensor | None = None, factor: float = 1) -> None:
        """Backpropagates factor * g^ from the trigger into the part below."""
        if self.training:
            synthetic_gradient = self.synthesizer(trigger, context).detach()
            trigger.backward(synthetic_gradient * factor)

    def make_trigger(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the detached trigger, where the gradient that arrives trains the synthesizer."""
        if not self.training:
            return trigger
        h = trigger.detach()
        return _InterceptGradient.apply(h, self.synthesizer(h, context))


class EagerForwardInterface(nn.Module):
    """Hands a synthetic message up in the forward pass: forward unlock, section 2.3.

    h^ = M(x, c) stands in for the message h; M is trained on the message that was really made,
    with a loss that is the MEAN over all elements, sum((h^ - h)^2) / (B * features). Gradients
    do not pass. In evaluation mode the message itself comes back.

    Args:
        synthesizer: module taking (trigger, context).
        shared_forward: evaluate the synthesizer once a step instead of twice.
    """

    def __init__(self, synthesizer: nn.Module, shared_forward: bool = False):
        super().__init__()
        self.synthesizer = synthesizer
        self.shared_forward = shared_forward

    def forward(self, message: Tensor, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Trains the synthesizer on the message; returns the synthetic one, detached."""
        if not self.training:
            return message
        synthetic_message = self.send(message, trigger, context)
        return synthetic_message if self.shared_forward else self.receive(trigger, context)

    def receive(self, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the synthetic message h^ = M(x, c), detached."""
        return self.synthesizer(trigger, context).detach()

    def send(self, message: Tensor, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Adds the gradient of mean((h^ - h)^2) to the synthesizer; returns h^, detached."""
        synthetic_message = self.synthesizer(trigger.detach(), context)
        F.mse_loss(synthetic_message, message.detach()).backward()
        return synthetic_message.detach()


class EagerBidirectionalInterface(nn.Module):
    """Synthetic messages up and synthetic gradients down: complete unlock, section 2.3.

    The message h receives M_b(h, c) as its gradient and trains the forward synthesizer M_f; the
    part above works on h^ = M_f(x, c), where its gradient trains M_b. The two evaluations of M_b
    are at h and at h^, so only those of M_f can be shared. In evaluation mode the message itself
    comes back.

    Args:
        forward_synthesizer: module taking (trigger, context), predicts messages.
        backward_synthesizer: module taking (message, context), predicts their gradients.
        shared_forward: evaluate the forward synthesizer once a step instead of twice.
    """

    def __init__(
        self,
        forward_synthesizer: nn.Module,
        backward_synthesizer: nn.Module,
        shared_forward: bool = False,
    ):
        super().__init__()
        self.forward_interface = EagerForwardInterface(forward_synthesizer, shared_forward)
        self.backward_interface = EagerBackwardInterface(backward_synthesizer, shared_forward)

    def forward(self, message: Tensor, trigger: Tensor, context: Tensor | None = None) -> Tensor:
        """Sends both ways; returns the synthetic message as a trigger of the part above."""
        if not self.training:
            return message
        self.backward_interface.backward(message, context)
        synthetic_message = self.forward_interface(message, trigger, context)
        return self.backward_interface.make_trigger(synthetic_message, context)
