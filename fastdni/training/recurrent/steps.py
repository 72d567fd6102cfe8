"""A whole step of a recurrent network: a window, its loss, its backward pass and every update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastdni.training.criteria import FUNCTIONS
from fastdni.training.optimizers import Optimizers
from fastdni.training.recurrent.layouts import State, tensors_of
from fastdni.training.running import gradients_apart

Criterion = str | Callable
CALLER = "rnn.step"


def take_step(
    net: Any, x: Any, target: Any, state: State | None, head: nn.Module, optimizer: Any,
    criterion: Criterion, *about: Any,
) -> tuple[Tensor, Tensor, Tensor, State, Tensor]:  # fmt: skip
    """See `DecoupledRNN.step`.

    Args:
        net: runs windows when it is called, and has `close` and `abandon`.
        about: what else it is called with.

    Returns:
        Loss, output, synthesis loss, state, relative synthesis loss.
    """
    if not net.training:
        raise RuntimeError(f"{CALLER}: the network must be in training mode; call rnn.train()")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{CALLER}: training is not possible in torch.inference_mode()")
    if not isinstance(head, nn.Module):
        raise TypeError(f"{CALLER}: head must be a module, got {type(head).__name__}")
    if criterion not in FUNCTIONS if isinstance(criterion, str) else not callable(criterion):
        raise ValueError(
            f'{CALLER}: criterion must be "cross_entropy", "mse" or a callable, got {criterion!r}'
        )
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
            loss = loss_of(output, target, criterion)
            if loss.dim() or not loss.requires_grad:
                raise RuntimeError(
                    f"{CALLER}: criterion must return one number that depends on the output, got "
                    f"{tuple(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
                )
        except BaseException:
            net.abandon()
            raise
        synthesis_loss, energy = net.close(loss)
        optimizers.step()
    return loss.detach(), output.detach(), synthesis_loss, after, synthesis_loss / energy


def loss_of(output: Tensor, target: Any, criterion: Criterion) -> Tensor:
    """The criterion's loss: of every step of every row alike."""
    if not isinstance(criterion, str):
        return criterion(output, target)
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
