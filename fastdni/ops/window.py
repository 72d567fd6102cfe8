"""window: what stands around the recurrence in a decoupled window: a call before its backward pass,
and one after it.

    window_fwd       the head's output, its loss and gradients; what M sends at the window's end
    window_update_   M's regression at the window's start, and every parameter's update

Equations are those of `fastdni.reference.window`.
"""

import torch
from torch import Tensor

from fastdni import backend, reference
from fastdni.ops.update import mark_updated
from fastdni.reference import SynthesizerParameters

_DEVICES = backend.kernel_devices("window_fwd")
_forward = torch.ops.fastdni.window_fwd.default._op
_update = torch.ops.fastdni.window_update_.default._op
_step = torch.ops.fastdni.window_step_.default._op
# Nothing here is differentiable: autograd looks past the ops, which saves a `no_grad`.
_library = torch.library.Library("fastdni", "IMPL")
for _op in ("window_fwd", "window_update_", "window_step_"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdni::window_fwd")
def _(
    caller, output, target, criterion, weight, head_weight, head_bias, state, predicted, context,
    parameters, layers, bias, factor, ended,
):  # fmt: skip
    rows = output.numel() // output.shape[-1]
    head = [head_weight] if head_bias is None else [head_weight, head_bias]
    sent = [] if factor == 0 else [*map(torch.empty_like, state)]
    prediction = output.new_empty(rows, len(head_weight))
    of_head = [] if target is None else [*map(torch.empty_like, head)]
    grad_output = output.new_empty(0) if target is None else torch.empty_like(output)
    return prediction, output.new_empty(()), grad_output, of_head, sent


@torch.library.register_fake("fastdni::window_update_")
def _(caller, start, grad_start, predicted, context, parameters, layers, bias, learns, row_unit,
      clip, target_scale, scale, rows, others, gradients, state, groups, settings):  # fmt: skip
    return others[0].new_empty(()), others[0].new_empty(())


@torch.library.register_fake("fastdni::window_step_")
def _(caller, cell, x, start, weights, cell_bias, target, criterion, weight, head_weight,
      head_bias, predicted, start_context, end_context, parameters, layers, bias, learns, factor,
      row_unit, clip, target_scale, scale, rows, ended, state, groups, settings):  # fmt: skip
    prediction = x.new_empty(len(x) * x.shape[1], len(head_weight))
    after = [*map(torch.empty_like, start)]
    return prediction, x.new_empty(()), after, x.new_empty(()), x.new_empty(())


def window_is_compiled(output: Tensor) -> bool:
    """Whether compiled kernels stand around a recurrence with this output."""
    return backend.has_cpu_kernel(output, _DEVICES)


def window_fwd(
    output: Tensor,
    target: Tensor | None,
    criterion: str,
    weight: float,
    head: list[Tensor],
    state: list[Tensor],
    predicted: int,
    context: Tensor | None,
    parameters: SynthesizerParameters,
    factor: float,
    ended: Tensor | None = None,
    caller: str = "window",
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """A linear head on the output of a recurrence, and the synthesizer at the window's end.

    Args:
        output: (..., H), of the recurrence.
        target: labels (R,) int64 of the R rows of output for "cross_entropy" (-100: rows that do
            not count), (R, N) for "mse"; None: there is no loss.
        criterion: mean over all rows that count, or over all elements.
        weight: what the loss is multiplied by.
        head: its weight (N, H) and, where there is one, bias (N,).
        state: at the window's end, tensors (L, B, F) or (B, F).
        predicted: how many of them M predicts for, side by side as (B, S).
        context: (B, C), or None.
        parameters: of M.
        factor: what M says is multiplied by; 0: it is not asked.
        ended: (B,) booleans, rows that are sent nothing.
        caller: whom error messages name.

    Returns:
        The head's output (R, N), the loss (), its gradients with respect to the output and to the
        head (empty, and none, without a target), and the gradients sent into the state (none for a
        factor of 0).

    Raises:
        RuntimeError: a shape, dtype, device or label does not fit.
    """
    if not window_is_compiled(output):
        return reference.window_fwd(
            output, target, criterion, weight, head, state, predicted, context, parameters,
            factor, ended,
        )  # fmt: skip
    head_weight, bias = head if len(head) == 2 else (*head, None)
    return _forward(
        caller, output, target, criterion, weight, head_weight, bias, state, predicted, context,
        parameters.tensors(), len(parameters.weights), len(parameters.biases) > 0, factor, ended,
    )  # fmt: skip


def window_update_(
    start: list[Tensor],
    grad_start: list[Tensor],
    predicted: int,
    context: Tensor | None,
    parameters: SynthesizerParameters,
    learns: bool,
    units: tuple[float, float, float, float],
    rows: Tensor | None,
    others: list[Tensor],
    gradients: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    caller: str = "window",
) -> tuple[Tensor, Tensor]:
    """The synthesizer's regression at a window's start, and every update, in place.

    Args:
        start: the state there; `grad_start`: the loss's gradients, bootstrapped.
        predicted, context, parameters: see `window_fwd`.
        learns: whether M does; its parameters are then the first of those that are updated.
        units: row_unit, clip (0: none), target_scale, scale: M learns
            target_scale clip(row_unit G), each row's norm clipped, by a loss of scale / 2 sum(e^2).
        rows: (B,) booleans, those that count; None: all.
        others: all other parameters; `gradients`: theirs.
        state, groups, settings: who updates which parameter: see `reference.assigned`.
        caller: whom error messages name.

    Returns:
        The synthesis loss, and that of a prediction of zero; 0 where M does not learn.

    Raises:
        RuntimeError: a shape, dtype or state does not fit; nothing has been written then.
    """
    how = (*units, rows, others, gradients, state, groups, settings)
    if not window_is_compiled(others[0]):
        return reference.window_update_(
            start, grad_start, predicted, context, parameters, learns, *how
        )
    own = parameters.tensors()
    results = _update(
        caller, start, grad_start, predicted, context, own, len(parameters.weights),
        len(parameters.biases) > 0, learns, *how,
    )  # fmt: skip
    mark_updated([*own, *others] if learns else others, state, groups, settings)
    return results


def window_step_(
    cell: str,
    x: Tensor,
    start: list[Tensor],
    weights: list[Tensor],
    cell_bias: bool,
    target: Tensor | None,
    criterion: str,
    weight: float,
    head: list[Tensor],
    predicted: int,
    contexts: tuple[Tensor | None, Tensor | None],
    parameters: SynthesizerParameters,
    learns: bool,
    factor: float,
    units: tuple[float, float, float, float],
    rows: Tensor | None,
    ended: Tensor | None,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    caller: str = "window",
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """A whole decoupled window in one call: `ops.recurrence` and its backward pass, with
    `window_fwd` and `window_update_` around it. For compiled kernels alone.

    Args:
        cell, x, start, weights, cell_bias: see `ops.recurrence`.
        contexts: at the window's start, and at its end.
        Others as `window_fwd` and `window_update_`, whose `others` are `weights` and, where there
        is a target, `head`.

    Returns:
        The head's output (R, N), the loss, the state after the window, the synthesis loss, and that
        of a prediction of zero.

    Raises:
        As `window_update_`.
    """
    head_weight, bias = head if len(head) == 2 else (*head, None)
    own, others = parameters.tensors(), weights if target is None else [*weights, *head]
    results = _step(
        caller, cell, x, start, weights, cell_bias, target, criterion, weight, head_weight, bias,
        predicted, *contexts, own, len(parameters.weights), len(parameters.biases) > 0, learns,
        factor, *units, rows, ended, state, groups, settings,
    )  # fmt: skip
    mark_updated([*own, *others] if learns else others, state, groups, settings)
    return results
