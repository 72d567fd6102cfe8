"""Parameters and what their optimizers keep, updated by gradients."""

import torch
from torch import Tensor

from fastdni.reference.optimizer import OptimizerSettings, assigned, optimizer_update
from fastdni.reference.regression_loss import accumulate_dtype


@torch.no_grad()
def update_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
) -> None:
    """See `fastdni.ops.update_`."""
    found = dict(zip(map(id, parameters), gradients, strict=True))
    for parameter, row, kept in assigned(parameters, state, groups, settings):
        _wide_update(row, parameter, found[id(parameter)], kept)


def _wide_update(
    settings: OptimizerSettings, parameter: Tensor, gradient: Tensor, state: list[Tensor]
) -> None:
    """`optimizer_update`, of bfloat16 parameters in float32 with one rounding at the end."""
    wide = accumulate_dtype(parameter.dtype)
    if wide == parameter.dtype:
        return optimizer_update(settings, parameter, gradient, state)
    narrow = [parameter, *(kept for kept in state if kept.dtype == parameter.dtype)]
    widened = {id(tensor): tensor.to(wide) for tensor in narrow}
    own = [widened.get(id(kept), kept) for kept in state]
    optimizer_update(settings, widened[id(parameter)], gradient.to(wide), own)
    for tensor in narrow:
        tensor.copy_(widened[id(tensor)])
