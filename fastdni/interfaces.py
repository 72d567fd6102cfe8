"""Interfaces between the decoupled parts of a network: drop-in for those of dni-pytorch.

An interface passes a message between two parts of a network that do not wait for each other: an
activation (ForwardInterface), a gradient (BackwardInterface) or both. The receiver gets a synthetic
message at once, predicted by a synthesizer from a trigger that both parts know; when the true one
comes, the synthesizer is trained on it. Gradients accumulate in `p.grad`; the optimizer is yours.

Where they differ from dni-pytorch, on purpose: `make_trigger` lets no gradient of the synthesizer
leak into its trigger; `synthesizer_context` is left properly when an exception passes through; the
state of contexts and deferral is the thread's own; a `BasicSynthesizer` is evaluated once a step
instead of twice (so an optimizer that steps inside the backward pass of `send` changes what is
received from the next step on) and gives its context no gradient; a synthesizer whose optimizer has
stepped before the true gradient comes is evaluated again; a message must have the prediction's
shape instead of being broadcast to it; frozen synthesizers and disabled gradients are refused
before anything is written.

In a segment under `torch.utils.checkpoint`, which is run twice, every gradient is sent once. A
context must be entered inside the segment: its second run comes when those around are left.

Source: Jaderberg et al. 2016, "Decoupled Neural Interfaces using Synthetic Gradients" (arXiv
1608.05343), sections 2 and 3.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdni.checkpoint import is_first_run, is_second_run, sends_in_this_run
from fastdni.scopes import (
    backward,
    current_context,
    is_deferred,
    outside_compiled_graphs,
    send_gradient,
    sends_by_autograd,
    sends_with_backward_pass,
)
from fastdni.synthesizers import plain_parameters
from fastdni.training.boundary import TRUE, Boundary, Prediction, check_shape, mixed
from fastdni.training.synthesis import graph_is_kept

_STEPS = {"send", "receive", "backward", "make_trigger"}


class _Catch(torch.autograd.Function):
    """A copy of a tensor, where the gradient that arrives is the target of a prediction. `learning`
    are the tensors that get the loss's gradients."""

    @staticmethod
    def forward(ctx, carrier, prediction, scale, send, *learning):
        ctx.prediction, ctx.scale, ctx.send = prediction, scale, send
        ctx.set_materialize_grads(False)
        return carrier.clone()  # what comes next may well change it in place

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # only under create_graph; the decorator is not for nothing
            return _regress_once_differentiable(ctx, gradient)
        return _regress(ctx, gradient)


def _regress(ctx, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    prediction = ctx.prediction
    if prediction is None:
        raise RuntimeError(
            "Trying to backward through an interface a second time; specify retain_graph=True the "
            "first time"
        )
    if gradient is None:  # something downstream says that there is none: it is zero
        gradient = torch.zeros_like(prediction.message)
    grads = ()
    if len(ctx.needs_input_grad) > 4:
        _, grads = prediction.gradients(gradient, ctx.scale)
    if not graph_is_kept():
        ctx.prediction = None
    return mixed(ctx.send, gradient, prediction.message), None, None, None, *grads


_regress_once_differentiable = once_differentiable(_regress)


def _catch(
    carrier: Tensor,
    prediction: Prediction,
    scale: float | None = None,
    send: tuple[float, float] = TRUE,
) -> Tensor:
    """A copy of carrier that makes the gradient arriving at it the prediction's target, and sends
    on what `Prediction.regress` does."""
    prediction.check(carrier)
    return _Catch.apply(carrier, prediction, scale, send, *prediction.learning)


def _train(prediction: Prediction, message: Tensor) -> None:
    """Regresses a prediction on a true message, by the mean over all elements."""
    if not sends_in_this_run():
        return
    scale = 2 / max(message.numel(), 1)
    if sends_by_autograd():
        # A copy of the message, which is then handed the message as the gradient that arrives.
        backward(_catch(message, prediction, scale), message)
    else:
        prediction.regress(message, scale)


class _Interface(nn.Module):
    # A subclass of the user's that replaces one of the steps: `forward` then goes by the steps.
    _by_steps = False

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if cls.__module__ != __name__ and not _STEPS.isdisjoint(vars(cls)):
            cls._by_steps = True


class UnidirectionalInterface(_Interface):
    """Messages in one direction, sent and received by hand.

    Args:
        synthesizer: any module taking (trigger, context); a `BasicSynthesizer` runs fused.
    """

    def __init__(self, synthesizer: nn.Module):
        super().__init__()
        self.synthesizer = synthesizer

    def _predict(self, trigger: Tensor, learn: bool = True) -> Prediction:
        return Boundary(self.synthesizer).predict(trigger, current_context(), learn)

    def _again(self, prediction: Prediction, trigger: Tensor, learn: bool = True) -> Prediction:
        """Another prediction at a trigger. A module that draws random numbers draws them anew, as
        in dni-pytorch; a BasicSynthesizer has none to draw."""
        return prediction if prediction.is_fused else self._predict(trigger, learn)

    def _check_gradients_enabled(self, method: str) -> None:
        if not torch.is_grad_enabled() and not is_first_run():
            raise RuntimeError(
                f"{type(self).__name__}.{method}: training needs gradients, which are disabled "
                "here (torch.no_grad or torch.inference_mode); call eval() to pass messages through"
            )

    def receive(self, trigger: Tensor) -> Tensor:
        """The synthetic message for a trigger; in any mode.

        Args:
            trigger: (..., K).

        Returns:
            The message, (..., N), detached.

        Raises:
            RuntimeError: a shape, dtype or device does not fit, or the context is missing.
        """
        return self._predict(trigger, learn=False).message

    @outside_compiled_graphs
    def send(self, message: Tensor, trigger: Tensor) -> None:
        """Trains the synthesizer on a true message; in any mode.

        Adds the gradients of mean((M(trigger, ctx) - message)^2), over all elements, to the
        synthesizer's `p.grad`. No gradient goes to the message or the trigger.

        Args:
            message: (..., N).
            trigger: (..., K).

        Raises:
            ValueError: no parameter of the synthesizer requires grad.
            RuntimeError: gradients are disabled, or the message's shape is not the prediction's.
        """
        self._check_gradients_enabled("send")
        _train(self._predict(trigger), message.detach())


class ForwardInterface(UnidirectionalInterface):
    """Synthetic activations in the forward pass: the forward unlock.

    No gradient passes through it; `BidirectionalInterface` adds synthetic gradients.
    """

    @outside_compiled_graphs
    def forward(self, message: Tensor, trigger: Tensor) -> Tensor:
        """Trains the synthesizer on the true message and returns the synthetic one.

        Args:
            message: (..., N), the true activation.
            trigger: (..., K), what it is predicted from.

        Returns:
            The synthetic message, (..., N), detached. In eval mode: `message` itself.

        Raises:
            As `send`.
        """
        if not self.training:
            return message
        self._check_gradients_enabled("forward")
        if self._by_steps:
            self.send(message, trigger)
            return self.receive(trigger)
        # It serves both: the synthesizer's parameters do not change in between.
        prediction = self._predict(trigger)
        _train(prediction, message.detach())
        received = self._again(prediction, trigger, learn=False).message
        # A deferred regression still needs the prediction, which the caller may change in place.
        return received.clone() if is_deferred() else received


class BackwardInterface(UnidirectionalInterface):
    """Synthetic gradients in the backward pass: the update unlock.

    Put it where the network is to be decoupled, `x = interface(x)`. What lies before gets the
    synthetic gradient during the forward pass and need not wait; when `loss.backward()` brings the
    true gradient to this place, the synthesizer is trained on it:

        loss_synthesizer = sum((M(h, ctx) - dL/dh)^2) / size(0)

    so for a hidden state (layers, B, H) the sum over batch and units is divided by the layers.

    Args:
        synthesizer: any module taking (trigger, context); a `BasicSynthesizer` runs fused.
        learn: False for one that is trained already, and may be frozen: its gradients are sent, the
            true ones change nothing.

    Note:
        In a graph compiled with `torch.compile`, in a segment under `torch.utils.checkpoint`, and
        in the forward pass of a network wrapped in `DistributedDataParallel` (outside
        `defer_backward`), the synthetic gradient takes the true one's place in the backward pass:
        every gradient has the same value, but those before the interface come with
        `loss.backward()` too, twice if that is called twice, not at all if it is not. In a compiled
        graph the errors below arrive inside the compiler's own. While one thread is in a
        DistributedDataParallel forward, the interfaces of other threads do the same.
        (torch.compile goes around the other interfaces, and around `backward`: no whole graph.)
    """

    learn = True

    def __init__(self, synthesizer: nn.Module, learn: bool = True):
        super().__init__(synthesizer)
        self.learn = learn

    def forward(self, trigger: Tensor, factor: float = 1) -> Tensor:
        """Sends the synthetic gradient back from the trigger and catches the true one there.

        Args:
            trigger: h, (..., N), the activation at the interface; it must require grad.
            factor: scales the synthetic gradient that is sent, never the synthesizer's target.

        Returns:
            A copy of the trigger, detached from what lies before it. In eval mode: `trigger`
            itself.

        Raises:
            ValueError: no parameter of the synthesizer requires grad.
            RuntimeError: gradients are disabled, the trigger does not require grad, or a shape,
                dtype or device does not fit. Nothing has been written then.
        """
        if not self.training:
            return trigger
        self._check_trigger(trigger, "forward")
        if self._by_steps:
            self.backward(trigger, factor)
            return self.make_trigger(trigger.detach())
        if sends_with_backward_pass():
            return self._caught(trigger, (0.0, factor))
        sent = self._predict(trigger, self.learn)
        # The copy first: it refuses a frozen synthesizer while no gradient has been written.
        triggered = self._copied(sent.trigger, self._again(sent, trigger, self.learn))
        if torch.is_grad_enabled():  # or it is the first of a checkpoint's two runs
            send_gradient(trigger, mixed((0.0, factor), trigger, sent.message))
        return triggered

    @outside_compiled_graphs
    def backward(self, trigger: Tensor, factor: float = 1) -> None:
        """Sends `factor` times the synthetic gradient back from the trigger; eval mode: nothing.

        Args:
            trigger: h, (..., N); it must require grad.
            factor: scales the synthetic gradient.

        Raises:
            RuntimeError: gradients are disabled, the trigger does not require grad, or a shape,
                dtype or device does not fit.
        """
        if not self.training:
            return
        gradient = self._synthetic_gradient(trigger, factor)
        if sends_in_this_run():
            backward(trigger, gradient)

    def make_trigger(self, trigger: Tensor) -> Tensor:
        """A copy of the trigger where the true gradient trains the synthesizer as it passes.

        The true gradient goes on to `trigger` unchanged; the synthesizer adds none to it.

        Args:
            trigger: h, (..., N).

        Returns:
            The copy, which requires grad. In eval mode: `trigger` itself.

        Raises:
            ValueError: no parameter of the synthesizer requires grad.
            RuntimeError: gradients are disabled, or a shape, dtype or device does not fit.
        """
        if not self.training:
            return trigger
        self._check_gradients_enabled("make_trigger")
        return self._caught(trigger)

    def _caught(self, trigger: Tensor, send: tuple[float, float] = TRUE) -> Tensor:
        """A copy of the trigger, where the synthesizer learns from the gradient that arrives."""
        if is_second_run() and plain_parameters(self.synthesizer) is not None:
            # For what autograd saves, alone, and maybe with the context left.
            return trigger.detach().requires_grad_().clone()
        return self._copied(trigger, self._predict(trigger, self.learn), send)

    def _copied(
        self, trigger: Tensor, prediction: Prediction, send: tuple[float, float] = TRUE
    ) -> Tensor:
        if self.learn:
            return _catch(trigger, prediction, send=send)
        check_shape(prediction.message, trigger)
        if not trigger.requires_grad:
            trigger = trigger.detach().requires_grad_()
        return _Catch.apply(trigger, prediction, None, send)

    def _check_trigger(self, trigger: Tensor, method: str) -> None:
        self._check_gradients_enabled(method)
        if not trigger.requires_grad and not is_first_run():
            raise RuntimeError(
                f"{type(self).__name__}.{method}: trigger must require grad, or nothing before the "
                "interface could receive the synthetic gradient"
            )

    def _synthetic_gradient(self, trigger: Tensor, factor: float = 1) -> Tensor:
        self._check_trigger(trigger, "backward")
        prediction = self._predict(trigger, learn=False).message
        check_shape(prediction, trigger)
        return mixed((0.0, factor), trigger, prediction)


class BidirectionalInterface(_Interface):
    """Synthetic activations and synthetic gradients: the complete unlock.

    Args:
        forward_synthesizer: predicts the message, (..., K) -> (..., N).
        backward_synthesizer: predicts the gradient with respect to it, (..., N) -> (..., N).
    """

    def __init__(self, forward_synthesizer: nn.Module, backward_synthesizer: nn.Module):
        super().__init__()
        self.forward_interface = ForwardInterface(forward_synthesizer)
        self.backward_interface = BackwardInterface(backward_synthesizer)

    @outside_compiled_graphs
    def forward(self, message: Tensor, trigger: Tensor) -> Tensor:
        """`send` and `receive` with one trigger.

        Args:
            message: (..., N), the true activation; it must require grad.
            trigger: (..., K), what it is predicted from.

        Returns:
            The synthetic message, (..., N), where the true gradient trains the backward
            synthesizer. In eval mode: `message` itself.

        Raises:
            As `ForwardInterface.send` and `BackwardInterface.backward`.
        """
        if not self.training:
            return message
        if self._by_steps:
            self.send(message, trigger)
            return self.receive(trigger)
        there, back = self.forward_interface, self.backward_interface
        back._check_gradients_enabled("forward")
        # In the order of send and receive, but nothing is written before all of it is known to fit.
        prediction = there._predict(trigger)
        prediction.check(message)
        gradient = back._synthetic_gradient(message) if back.training else None
        received = there._again(prediction, trigger, learn=False)
        synthetic = back.make_trigger(received.message)
        _train(prediction, message.detach())
        if gradient is not None and sends_in_this_run():
            backward(message, gradient)
        return synthetic

    def receive(self, trigger: Tensor) -> Tensor:
        """The synthetic message for a trigger, ready to catch the gradient that comes back.

        Args:
            trigger: (..., K).

        Returns:
            The message, (..., N), where the gradient trains the backward synthesizer; in eval mode
            without that.

        Raises:
            As `UnidirectionalInterface.receive` and `BackwardInterface.make_trigger`.
        """
        return self.backward_interface.make_trigger(self.forward_interface.receive(trigger))

    @outside_compiled_graphs
    def send(self, message: Tensor, trigger: Tensor) -> None:
        """Trains the forward synthesizer and, in training mode, sends the synthetic gradient back
        from the message.

        Args:
            message: (..., N); in training mode it must require grad.
            trigger: (..., K).

        Raises:
            As `UnidirectionalInterface.send` and `BackwardInterface.backward`.
        """
        back = self.backward_interface
        gradient = back._synthetic_gradient(message) if back.training else None
        self.forward_interface.send(message, trigger)
        if gradient is not None and sends_in_this_run():
            backward(message, gradient)
