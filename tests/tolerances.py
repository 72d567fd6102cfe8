"""How far a result may be from the truth, for each dtype, and why.

The truth (oracle) is `fastdni.reference`, or a formula written out in the test, in float64 on the
same rounded inputs. Low precision is measured against the error that the same formula in plain
PyTorch makes in that dtype:

    |actual - oracle|  <=  times * max |plain - oracle|  +  units * eps * max |oracle|
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    times: float  # of the largest error of plain PyTorch
    units: float  # of the dtype's eps, relative to the oracle's largest value


TOLERANCES = {
    # The oracle is float64 too: no error to measure against. The longest chain of additions is a
    # chunk of 4096 terms (csrc/cpu/kernels/regression_loss.h); where all are equal, as with an
    # expanded tensor, its roundings of half a unit add up and do not cancel.
    torch.float64: Tolerance(times=0, units=4096 / 2),
    # 3 is the promise made for training, too. The units are for short sums, where plain PyTorch may
    # happen to make no error at all and ours a few roundings.
    torch.float32: Tolerance(times=3, units=4),
    # The result is rounded to 8 bits (half a unit), and so is each of the two or three values that
    # it is made from; plain PyTorch may be exact where ours is not.
    torch.bfloat16: Tolerance(times=3, units=2),
    # By the reference, and by Triton, which keeps its sums in float32.
    torch.float16: Tolerance(times=3, units=2),
}


def assert_near(
    actual: Tensor | Sequence[Tensor], oracle: Tensor | Sequence[Tensor], plain=None
) -> None:
    """Asserts that tensors are within tolerance of the float64 oracle.

    Args:
        actual: a tensor, or a list or tuple of them.
        oracle: the same in float64.
        plain: the same computed by plain PyTorch in the dtypes of `actual`. It says which dtypes
            are right, and what is infinite or NaN (the oracle may have more range). By default the
            oracle rounded to actual's dtypes.
    """
    if isinstance(actual, Tensor):
        actual, oracle, plain = [actual], [oracle], None if plain is None else [plain]
    plain = [o.to(a) for a, o in zip(actual, oracle, strict=True)] if plain is None else plain
    for number, (a, o, p) in enumerate(zip(actual, oracle, plain, strict=True)):
        name = f"tensor {number} of {len(actual)}, {a.dtype} {tuple(a.shape)}"
        assert (a.dtype, a.shape, a.device) == (p.dtype, p.shape, p.device), name
        assert (o.dtype, o.shape) == (torch.float64, a.shape), name
        finite = p.isfinite()
        assert torch.equal(finite, a.isfinite()), f"{name}: finite elsewhere than in plain PyTorch"
        torch.testing.assert_close(a[~finite], p[~finite], rtol=0, atol=0, equal_nan=True)
        if not finite.any():
            continue
        a, o, p = a[finite].double(), o[finite], p[finite].double()
        times, units = TOLERANCES[actual[number].dtype]
        error, plain_error = (a - o).abs().max(), (p - o).abs().max()
        bound = times * plain_error + units * torch.finfo(actual[number].dtype).eps * o.abs().max()
        assert error <= bound, (
            f"{name}: off by {error:.3g}, allowed {bound:.3g}; plain PyTorch is off by "
            f"{plain_error:.3g}, the largest value is {o.abs().max():.3g}"
        )
