"""A synthesizer at a boundary by Triton kernels: prediction, regression and update.

The formulas and letters are those of `fastdni.reference.boundary_`.
"""

from torch import Tensor

from fastdni.reference import SynthesizerParameters, accumulate_dtype
from fastdni.triton.op import op
from fastdni.triton.sweep import update
from fastdni.triton.synthesizer import Evaluation, matrix
from fastdni.triton.tile import Precision


@op("triton_boundary_", mutates_args=("parameters", "state"))
def boundary_(
    trigger: Tensor,
    context: Tensor | None,
    target: Tensor,
    parameters: list[Tensor],
    layers: int,
    bias: bool,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    scale: float,
    prediction: Tensor | None,
    hidden: list[Tensor],
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction (empty where it is given) and error; see `fastdni.ops.boundary_`."""
    # Kernels write one element after the other: where they lie otherwise, to a copy.
    own = [tensor.contiguous() for tensor in parameters]
    kept = [tensor.contiguous() for tensor in state]
    of = SynthesizerParameters.of(own, layers, bias)
    beside = None if context is None else matrix(context)
    rows, of_products = matrix(trigger), Precision(precision)
    if prediction is None:
        made = Evaluation(of, rows, beside, of_products)
    else:
        known = list(map(matrix, hidden))
        made = Evaluation.of(
            matrix(prediction), known, of, of.weights, rows, beside, of_products
        )  # fmt: skip
    loss, gradients = made.regress(matrix(target), divisor=2 / scale)
    message = made.prediction.reshape(*trigger.shape[:-1], of.weights[-1].shape[0])
    wide = accumulate_dtype(trigger.dtype)
    error = message.to(wide) - target.to(wide)
    update(gradients, own, kept, groups, settings, of_products)
    for tensor, written in zip([*parameters, *state], [*own, *kept], strict=True):
        if written is not tensor:
            tensor.copy_(written)
    returned = message if prediction is None else trigger.new_empty(0)
    return loss.to(wide), returned, error
