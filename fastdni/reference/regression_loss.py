"""The loss a synthesizer is trained on."""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that errors and losses are kept in: float32 for bfloat16, else the dtype itself."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def reduction_divisor(error: Tensor, reduction: str) -> int:
    """What sum(e^2) is divided by; 1 for an empty batch, so that its loss is 0 and not NaN."""
    batch = error.shape[0] if error.dim() else 1
    return max(batch if reduction == "batchmean" else error.numel(), 1)


def regression_loss(
    prediction: Tensor, target: Tensor, reduction: str = "batchmean"
) -> tuple[Tensor, Tensor]:
    """e = prediction - target;  loss = sum(e^2) / divisor  (Jaderberg et al. 2016, section 2.1).

    bfloat16 inputs give a float32 loss and error.
    """
    wide = accumulate_dtype(prediction.dtype)
    error = prediction.to(wide) - target.to(wide)
    return error.square().sum() / reduction_divisor(error, reduction), error
