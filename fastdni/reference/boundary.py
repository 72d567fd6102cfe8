"""A synthesizer at a boundary: its prediction, the regression on what arrives, and the update."""

import torch
from torch import Tensor

from fastdni.reference.optimizer import OptimizerSettings, assigned, optimizer_update
from fastdni.reference.regression_loss import accumulate_dtype
from fastdni.reference.synthesizer import (
    Product,
    SynthesizerParameters,
    synthesizer_bwd,
    synthesizer_fwd,
)


@torch.no_grad()
def boundary_(
    parameters: SynthesizerParameters,
    trigger: Tensor,
    context: Tensor | None,
    target: Tensor,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    scale: float,
    prediction: Tensor | None = None,
    hidden: list[Tensor] | None = None,
    product: Product = torch.matmul,
) -> tuple[Tensor, Tensor, Tensor]:
    """g^ = M(h, ctx);  e = g^ - target;  loss = scale / 2 sum(e^2);  M's update by its gradients.

    Every gradient is taken with the parameters as they were.

    Args:
        parameters: of M.
        trigger: h, (..., K).
        context: ctx, (..., C), or None.
        target: what arrived, (..., N).
        state, groups, settings: who updates which parameter: see `assigned`.
        scale: of the error's gradient, scale e.
        prediction, hidden: the results of `synthesizer_fwd` with these parameters, if they are
            known.
        product: of two matrices, as in `synthesizer_fwd`.

    Returns:
        The loss (0-d), g^ (..., N) and e (..., N).
    """
    if prediction is None:
        prediction, hidden = synthesizer_fwd(trigger, context, *parameters, product)
    wide = accumulate_dtype(prediction.dtype)
    error = prediction.to(wide) - target.to(wide)
    loss, gradients = synthesizer_bwd(
        target, prediction, hidden, trigger, context, parameters.weights,
        len(parameters.biases) > 0, "batchmean", product, scale,
    )  # fmt: skip
    tensors = parameters.tensors()
    found = dict(zip(map(id, tensors), gradients, strict=True))
    for parameter, row, own in assigned(tensors, state, groups, settings):
        wide_update(row, parameter, found[id(parameter)], own)
    return loss, prediction, error


def wide_update(
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
