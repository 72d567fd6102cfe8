"""regression_loss: the loss a synthesizer is trained on, and the error behind it."""

import torch
from torch import Tensor

from fastdni import backend, reference

_DEVICES = backend.kernel_devices("regression_loss_fwd")


@torch.library.register_fake("fastdni::regression_loss_fwd")
def _(prediction, target, reduction):
    wide = reference.accumulate_dtype(prediction.dtype)
    return prediction.new_empty((), dtype=wide), prediction.new_empty(prediction.shape, dtype=wide)


@torch.library.register_fake("fastdni::regression_loss_check")
def _(prediction, target, reduction):
    return None


class _RegressionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prediction, target, reduction, how):
        if how == "triton":
            loss, error = torch.ops.fastdni.triton_regression_loss(prediction, target, reduction)
        else:
            loss, error = torch.ops.fastdni.regression_loss_fwd(prediction, target, reduction)
        ctx.save_for_backward(error)
        ctx.scale = 2 / reference.reduction_divisor(error, reduction)
        ctx.dtype = prediction.dtype
        return loss, error

    @staticmethod
    def backward(ctx, grad_loss, grad_error):
        (error,) = ctx.saved_tensors
        # Plain torch: differentiable again, and on every device.
        grad = (error * (ctx.scale * grad_loss) + grad_error).to(ctx.dtype)
        return grad, -grad, None, None


def regression_loss(
    prediction: Tensor, target: Tensor, reduction: str = "batchmean"
) -> tuple[Tensor, Tensor]:
    """The squared error of a prediction, and the error itself, in one pass.

        e = prediction - target;   loss = sum(e^2) / B   ("batchmean")   or   mean(e^2)   ("mean")

    Args:
        prediction: (B, ...), float32, float64 or bfloat16; float16 by Triton or the reference.
        target: the same shape, dtype and device.
        reduction: `"batchmean"` divides by the size B of the first dimension, `"mean"` by the
            number of elements. An empty batch has loss 0.

    Returns:
        The loss, 0-d, and e, with prediction's shape; both float32 for bfloat16 inputs.

    Raises:
        RuntimeError: shapes, dtypes or devices differ, or the reduction is unknown.

    Note:
        Sums are formed in a fixed order: the same inputs give the same bits, whatever the number
        of threads. Differentiable in prediction and target, twice.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 2.1: the synthesizer's objective.

    Example:
        >>> loss, e = fastdni.regression_loss(torch.ones(2, 3), torch.zeros(2, 3))
        >>> loss
        tensor(3.)
    """
    if target.device != prediction.device:
        # Looked at here because the dispatcher picks a kernel by the devices before any rule runs.
        raise RuntimeError(
            f"regression_loss: target must be on prediction's device {prediction.device}, "
            f"got {target.device}"
        )
    server = backend.server(prediction, _DEVICES)
    if server not in ("cpu", "cuda"):  # these look for themselves
        torch.ops.fastdni.regression_loss_check(prediction, target, reduction)
    if server != "reference":
        return _RegressionLoss.apply(prediction, target, reduction, server)
    return reference.regression_loss(prediction, target, reduction)
