"""What a window's arguments must be: checked before anything is written."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdni.training.recurrent.layouts import State
from fastdni.training.recurrent.unroll import Unroller


def as_module(synthesizer: Any) -> nn.Module:
    """The synthesizer, or several as one module."""
    given = synthesizer if isinstance(synthesizer, list | tuple) else [synthesizer]
    for each in given:
        if not isinstance(each, nn.Module):
            raise TypeError(
                f"DecoupledRNN: synthesizer must be a module M(s, ctx), got {type(each).__name__}"
            )
    return nn.ModuleList(given) if given is synthesizer else synthesizer


def backpropagate(variables: list[Tensor], gradients: list[Tensor | None]) -> None:
    """The backward pass of windows.

    Raises:
        RuntimeError: there was one.
    """
    try:
        torch.autograd.backward(variables, gradients)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "DecoupledRNN: a window's backward pass must be its only one: call rnn.backward(loss)"
            " in the place of loss.backward()"
        ) from error


def context_pair(context: Any) -> tuple[Any, Any]:
    """The contexts at a window's start and at its end."""
    pair = tuple(context) if isinstance(context, tuple | list) else (context, context)
    if len(pair) != 2:
        raise RuntimeError(
            f"DecoupledRNN: context must be a tensor or a pair of them, got {len(pair)}"
        )
    return pair


def checked(
    unrolled: Unroller, x: Any, state: State | None, done: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """`done` as (T, B) booleans, or (1, B) for the last step alone.

    Raises:
        RuntimeError: see `DecoupledRNN.forward`.
    """
    steps, rows = unrolled.size(x)
    if state is not None:
        unrolled.check_state(state, rows)
    packed = not isinstance(x, Tensor)
    if lengths is not None:
        _check_lengths(lengths, steps, rows, packed)
    if done is None:
        return None
    whole = packed or lengths is not None
    shapes = [(rows,)] if whole else [(steps, rows), (rows,)]
    if not isinstance(done, Tensor) or tuple(done.shape) not in shapes:
        got = tuple(done.shape) if isinstance(done, Tensor) else type(done).__name__
        wanted = " or ".join(map(str, shapes))
        raise RuntimeError(f"DecoupledRNN: done must be of shape {wanted}, got {got}")
    done = done.to(torch.bool, copy=True)  # the caller may use his for the next window
    return done if done.dim() == 2 else done.unsqueeze(0)


def _check_lengths(lengths: Tensor, steps: int, rows: int, packed: bool) -> None:
    fits = isinstance(lengths, Tensor) and tuple(lengths.shape) == (rows,)
    if packed or not fits or lengths.is_floating_point():
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise RuntimeError(
            f"DecoupledRNN: lengths must be {rows} integers beside padded rows, got {got}"
            + (" beside a packed sequence" if packed else "")
        )
    if bool(((lengths < 1) | (lengths > steps)).any()):
        raise RuntimeError(
            f"DecoupledRNN: lengths must be from 1 to {steps}, got {lengths.min().item()} to "
            f"{lengths.max().item()}"
        )
