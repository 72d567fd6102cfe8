"""A boundary: where two parts of a network meet, and do not wait for each other.

Both parts know a trigger h (and a context). A synthesizer M predicts from it what the one will get
from the other, a message or a gradient, and learns from the true one when that arrives:

    p = Boundary(M).predict(h, ctx)
    p.message                        g^ = M(h, ctx), at once
    loss, sent = p.regress(g)        now or many steps later, predictions in any order

M is regressed at the h and ctx of the prediction, as it is then: evaluated again if its parameters
have changed since. What is sent on is a g + b g^ for `send=(a, b)`, with the g^ that was predicted:

    (1, 0)  the true one itself          (l, 1 - l)  a mixture: `bp_lambda`
    (0, f)  f times the prediction       (1, 1)      their sum: pytorch-dni's lambda of -1

Source: Jaderberg et al. 2016 (arXiv 1608.05343), section 2.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdni import reference
from fastdni.training.optimizers import Optimizers
from fastdni.training.synthesis import (
    FusedSynthesis,
    ModuleSynthesis,
    squared_error,
    synthesize,
)

TRUE = (1.0, 0.0)  # what is sent by default


class Boundary:
    """A boundary with its synthesizer.

    Args:
        synthesizer: a module M(h, ctx). A `BasicSynthesizer` runs fused, any other module by its
            own autograd.
    """

    def __init__(self, synthesizer: nn.Module):
        self.synthesizer = synthesizer

    def predict(self, h: Tensor, ctx: Any = None, learn: bool = True) -> "Prediction":
        """M at (h, ctx), now; no gradient goes to either.

        Args:
            h: (..., K).
            ctx: (..., C), or None; a module that is no BasicSynthesizer gets it as it is.
            learn: whether M may learn from what arrives: a module is then called with gradients
                enabled.

        Returns:
            The prediction. Any number of them may be open.

        Raises:
            RuntimeError: a shape, dtype or device does not fit, or the context is missing.
        """
        return Prediction(synthesize(self.synthesizer, h.detach(), ctx, learn))


class Prediction:
    """What a synthesizer predicted at a trigger, to be regressed on the true one.

    Attributes:
        trigger: h, detached.
        message: g^, (..., N), detached.
        is_fused: whether M is a BasicSynthesizer; another module may be random, and is called once
            more by whoever wants to predict twice.
    """

    def __init__(self, made: FusedSynthesis | ModuleSynthesis):
        self._made = made
        self.trigger, self.message, self.is_fused = made.trigger, made.message, made.is_fused

    @property
    def learning(self) -> list[Tensor]:
        """The tensors that `gradients` gives the gradients of."""
        return self._made.learning

    def check(self, true: Tensor) -> None:
        """Refuses a synthesizer that cannot learn, and a true message that is none for it.

        Raises:
            ValueError: no parameter of M requires grad.
            RuntimeError: the shapes differ.
        """
        self._made.check_learns()
        check_shape(self.message, true)

    def regress(
        self,
        target: Tensor,
        scale: float | None = None,
        send: tuple[float, float] = TRUE,
        optimizers: Optimizers | None = None,
        learn: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """e = M(h, ctx) - g;  loss = scale / 2 sum(e^2), from which M learns.

        Args:
            target: g, what arrived, of the message's shape.
            scale: that of the error's gradient, scale e; by default 2 / size(0).
            send: (a, b): what is sent on is a g + b g^.
            optimizers: who update M in the same call. By default the gradients are added to
                `p.grad`.
            learn: False leaves M as it is; the loss is then the message's own.

        Returns:
            The loss, 0-d, and what is sent on, both detached.

        Raises:
            As `check`, and ValueError where the optimizers' updates cannot be fused; nothing has
            been written then.
        """
        target = target.detach()
        if learn:
            self.check(target)
            loss = self._made.learn(target, scale, optimizers)
        else:
            check_shape(self.message, target)
            loss, _ = squared_error(self.message, target, scale)
        return loss, mixed(send, target, self.message)

    def gradients(
        self, target: Tensor, scale: float | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradients with respect to `learning`: for an autograd node."""
        return self._made.gradients(target, scale)


def check_shape(prediction: Tensor, like: Tensor) -> None:
    """Refuses a prediction that cannot stand for the message, or the trigger's gradient, `like`."""
    if prediction.shape != like.shape:
        raise RuntimeError(
            f"synthesizer: the prediction must have the shape {tuple(like.shape)} of the message "
            f"(or of the trigger, whose gradient it is), got {tuple(prediction.shape)}"
        )


def mixed(send: tuple[float, float], true: Tensor, message: Tensor) -> Tensor:
    """What is sent on, a g + b g^ in g's dtype; nothing is computed, or copied, without need."""
    a, b = send
    if send is TRUE or _is(b, 0):
        return true if _is(a, 1) else true * a
    part = message if _is(b, 1) else message * b
    part = part if part.dtype == true.dtype else part.to(true.dtype)
    if _is(a, 0):
        return part
    return (true if _is(a, 1) else true * a) + part


def _is(number: float | Tensor, value: int) -> bool:
    # To look into a tensor may be to wait for a GPU.
    return isinstance(number, int | float) and number == value


def learns(synthesizer: nn.Module) -> bool:
    """Whether a synthesizer has parameters that are not frozen."""
    return any(parameter.requires_grad for parameter in synthesizer.parameters())


def context_for(synthesizer: nn.Module, context: Any, labels: Any, like: Tensor) -> Any:
    """A synthesizer's context: what the user gave, or one-hot labels.

    Args:
        synthesizer: makes labels its context by saying a `context_dim`, their number.
        context: what the user gave; None for nothing.
        labels: (B,), integers; anything else makes no context.
        like: of the device, and of the dtype where the synthesizer has no parameters.
    """
    width = getattr(synthesizer, "context_dim", None)
    integers = isinstance(labels, Tensor) and labels.dim() == 1 and _is_integral(labels)
    if context is not None or width is None or not integers:
        return context
    own = next((p for p in synthesizer.parameters() if p.is_floating_point()), like)
    return reference.one_hot(labels.to(like.device), width, own)


def _is_integral(labels: Tensor) -> bool:
    kind = labels.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
