"""A whole step of a recurrent network: a window, its loss, its backward pass and every update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastdni.training.criteria import FUNCTIONS
from fastdni.training.optimizers import Optimizers
from fastdni.training.recurrent.arguments import checked, context_pair
from fastdni.training.recurrent.engine import Engine
from fastdni.training.recurrent.fused import FusedWindows, Given, Unfused
from fastdni.training.recurrent.layouts import State, tensors_of
from fastdni.training.running import gradients_apart

Criterion = str | Callable
CALLER = "rnn.step"


class RecurrentResult(NamedTuple):
    """What a window found out: fresh tensors, detached.

    Attributes:
        loss: the criterion's, ().
        output: of the head, in the form of the recurrent module's output.
        synthesis_loss: of the synthesizers at the window's start, (); 0 where they did not learn.
        state: at the window's end, for the next one.
        target_loss: what synthesis_loss would be of predictions of zero, ().
    """

    loss: Tensor
    output: Tensor
    synthesis_loss: Tensor
    state: State
    target_loss: Tensor

    @property
    def relative_synthesis_loss(self) -> Tensor:
        """How much of their target the synthesizers do not explain: 1 for a prediction of zero; NaN
        where there is none."""
        return self.synthesis_loss / self.target_loss


def take_step(
    net: Any, x: Any, target: Any, state: State | None, head: nn.Module, optimizer: Any,
    criterion: Criterion, done: Tensor | None, context: Any, lengths: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, State, Tensor]:  # fmt: skip
    """See `DecoupledRNN.step`.

    Args:
        net: a network of windows: runs one when it is called, and has `engine`, `passed_at`,
            `hand_on`, `close`, `abandon`, `traces`, and `fused`, a place for what steps have found.

    Returns:
        Loss, output, synthesis loss, state, and the synthesis loss of predictions of zero.
    """
    if not net.training:
        raise RuntimeError(f"{CALLER}: the network must be in training mode; call rnn.train()")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{CALLER}: training is not possible in torch.inference_mode()")
    engine = net.engine()
    fused = known_or_new(net, engine, head, optimizer, criterion)
    if fused is not None:
        passed = net.passed_at(state)
        checks = not fused.is_like_last(x, state, passed, done, lengths)
        ended = checked(engine.unroller, x, state, done, lengths) if checks else None
        given = Given(x, target, state, passed, ended, context_pair(context), lengths, weight)
        if fused.takes(given):
            return _fused_step(net, fused, given)
    return _step_by_autograd(
        net, x, target, state, head, optimizer, criterion, weight, done, context, lengths
    )


def known_or_new(
    net: Any, engine: Engine, head: nn.Module, optimizer: Any, criterion: Criterion
) -> FusedWindows | None:
    """Who runs fused windows with this head, optimizer and criterion; None: autograd does.

    Raises:
        TypeError, ValueError: one of them is none; see `DecoupledRNN.step`.
    """
    known = net.fused
    if known is not None and known.still_serve(engine, head, criterion, optimizer):
        return known
    net.fused = None
    try:
        net.fused = made(net, engine, head, optimizer, criterion)
    except Unfused:
        return None
    return net.fused


def made(
    net: Any, engine: Engine, head: nn.Module, optimizer: Any, criterion: Criterion
) -> FusedWindows:
    """The same; raises Unfused with the reason why autograd does."""
    _check(head, criterion)
    parameters = [*{id(p): p for p in (*net.parameters(), *head.parameters())}.values()]
    try:
        optimizers = Optimizers(CALLER, optimizer, parameters)
    except ValueError as error:  # a learned initial state is not among them, say
        raise Unfused(str(error)) from error
    return FusedWindows(CALLER, engine, head, criterion, optimizers)


def _fused_step(net: Any, fused: FusedWindows, given: Given) -> tuple:
    settings = fused.engine.settings
    trace = None
    if settings.trace_lambda is not None:

        def trace(kept, left):
            return net.traces.add(fused.engine, kept, given.passed, left, 1.0, None)

    found = fused.run(given, trace)
    net.hand_on(given.passed, found.state, found.passed)
    return found.loss, found.output, found.synthesis_loss, found.state, found.energy


def _step_by_autograd(
    net: Any, x: Any, target: Any, state: State | None, head: nn.Module, optimizer: Any,
    criterion: Criterion, weight: float, *about: Any,
) -> tuple[Tensor, Tensor, Tensor, State, Tensor]:  # fmt: skip
    _check(head, criterion)
    given = [] if state is None else tensors_of(state)
    learned = [t for t in given if t.requires_grad and t.is_leaf]
    parameters = [*{id(p): p for p in (*net.parameters(), *head.parameters(), *learned)}.values()]
    optimizers = Optimizers(CALLER, optimizer, parameters)
    with gradients_apart(parameters), torch.enable_grad():
        try:
            found, after = net(x, state, *about)
            packed = isinstance(found, PackedSequence)
            output = head(found.data if packed else found)
            target = target.data if isinstance(target, PackedSequence) else target
            loss = None if target is None else loss_of(output, target, criterion) * weight
            if loss is not None and (loss.dim() or not loss.requires_grad):
                raise RuntimeError(
                    f"{CALLER}: criterion must return one number that depends on the output, got "
                    f"{tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
                )
        except BaseException:
            net.abandon()
            raise
        synthesis_loss, energy = net.close(loss)
        optimizers.step()
    loss = output.new_zeros(()) if loss is None else loss
    return loss.detach(), output.detach(), synthesis_loss, after, energy


def _check(head: Any, criterion: Criterion) -> None:
    if not isinstance(head, nn.Module):
        raise TypeError(f"{CALLER}: head must be a module, got {type(head).__name__}")
    if criterion not in FUNCTIONS if isinstance(criterion, str) else not callable(criterion):
        raise ValueError(
            f'{CALLER}: criterion must be "cross_entropy", "mse" or a callable, got {criterion!r}'
        )


def loss_of(output: Tensor, target: Any, criterion: Criterion) -> Tensor:
    """The criterion's loss: of every step of every row alike."""
    if not isinstance(criterion, str):
        return criterion(output, target)
    if not isinstance(target, Tensor):
        raise RuntimeError(f"{CALLER}: target must be a tensor, got {type(target).__name__}")
    if criterion == "mse":
        if target.shape != output.shape:
            raise RuntimeError(
                f"{CALLER}: target must have the output's shape {tuple(output.shape)}, got "
                f"{tuple(target.shape)}"
            )
        return F.mse_loss(output, target)
    wanted = tuple(output.shape[:-1])
    if target.is_floating_point() or tuple(target.shape) != wanted:
        raise RuntimeError(
            f"{CALLER}: target must be labels of shape {wanted}, got {target.dtype} "
            f"{tuple(target.shape)}"
        )
    return F.cross_entropy(output.flatten(0, -2), target.flatten().long())
