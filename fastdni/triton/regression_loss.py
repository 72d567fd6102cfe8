"""regression_loss: the squared error and the error itself, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdni.reference import accumulate_dtype, reduction_divisor
from fastdni.triton.loss import total
from fastdni.triton.op import launched, op

_COUNT = 1024


@triton.jit
def regression_loss_kernel(prediction, target, error, partials, count, COUNT: tl.constexpr):
    """e = prediction - target; the sum of e^2 over a block to partials."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    inside = at < count
    p = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32)
    e = p - tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(error + at, e.to(error.dtype.element_ty), mask=inside)
    tl.store(partials + tl.program_id(0), tl.sum(e * e))


@op("triton_regression_loss")
def regression_loss(prediction: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """See `fastdni.ops.regression_loss`."""
    prediction, target = prediction.contiguous(), target.contiguous()
    wide = accumulate_dtype(prediction.dtype)
    error = torch.empty_like(prediction, dtype=wide)
    count = error.numel()
    programs = triton.cdiv(count, _COUNT)
    partials = error.new_empty(programs, dtype=torch.float32)
    if count > 0:
        launched(regression_loss_kernel)[(programs,)](
            prediction, target, error, partials, count, _COUNT
        )
    return total(partials, reduction_divisor(error, reduction)).to(wide), error
