"""A synthesizer at a boundary: its prediction, the regression on what arrives, and the update."""

import torch
from torch import Tensor

from fastdni.reference.regression_loss import accumulate_dtype
from fastdni.reference.synthesizer import (
    Product,
    SynthesizerParameters,
    synthesizer_bwd,
    synthesizer_fwd,
)
from fastdni.reference.update import update_


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
    update_(parameters.tensors(), gradients, state, groups, settings)
    return loss, prediction, error
