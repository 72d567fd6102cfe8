"""BatchNorm1d over the batch's own statistics: a program owns columns, over all rows, however many:
the sums of a few rows are joined in float64.

The formulas and letters are those of `fastdni.reference.sweep`.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastdni.reference import SweepNorm
from fastdni.triton.op import launched
from fastdni.triton.tile import activated

# A sector of memory wide, so that there are enough programs; not measured.
_ROWS, _COLUMNS = 128, 8


@triton.jit
def norm_kernel(
    z, gamma, beta, running_mean, running_variance, count, normalized, h, inverse_out,
    rows, columns, momentum, eps,
    ACTIVATION: tl.constexpr, AVERAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z~ = (z - mean) / sqrt(variance + eps), h = phi(gamma z~ + beta), and the running statistics;
    AVERAGES: these are plain averages over `count` batches, this one included."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS).to(tl.int64)
    inside = c < columns
    total = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        n = start + r
        here = (n < rows)[:, None] & inside[None, :]
        found = tl.load(z + n[:, None] * columns + c[None, :], mask=here, other=0.0)
        total += tl.sum(found, 0).to(tl.float64)
    mean = (total / rows).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        n = start + r
        here = (n < rows)[:, None] & inside[None, :]
        off = tl.load(z + n[:, None] * columns + c[None, :], mask=here, other=0.0) - mean[None, :]
        total += tl.sum(tl.where(here, off * off, 0.0), 0).to(tl.float64)
    squares = total.to(tl.float32)
    inverse = 1.0 / tl.sqrt(squares / rows + eps)
    tl.store(inverse_out + c, inverse, mask=inside)
    if running_mean is not None:
        if AVERAGES:
            momentum = 1.0 / tl.load(count).to(tl.float32)
        old = tl.load(running_mean + c, mask=inside)
        tl.store(running_mean + c, old + momentum * (mean - old), mask=inside)
        old = tl.load(running_variance + c, mask=inside)
        variance = squares / (rows - 1)
        tl.store(running_variance + c, old + momentum * (variance - old), mask=inside)
    if gamma is not None:
        scale = tl.load(gamma + c, mask=inside, other=0.0)
        shift = tl.load(beta + c, mask=inside, other=0.0)
    for start in range(0, rows, ROWS):
        n = start + r
        here = (n < rows)[:, None] & inside[None, :]
        at = n[:, None] * columns + c[None, :]
        u = (tl.load(z + at, mask=here, other=0.0) - mean[None, :]) * inverse[None, :]
        tl.store(normalized + at, u, mask=here)
        if gamma is not None:
            u = u * scale[None, :] + shift[None, :]
        tl.store(h + at, activated(u, ACTIVATION), mask=here)


@triton.jit
def norm_gradient_kernel(
    du, normalized, inverse, gamma, dz, of_gamma, of_beta, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgamma = sum du z~, dbeta = sum du, and dz from them."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, ROWS).to(tl.int64)
    inside = c < columns
    total = tl.zeros((COLUMNS,), tl.float64)
    total_dots = tl.zeros((COLUMNS,), tl.float64)
    for start in range(0, rows, ROWS):
        n = start + r
        here = (n < rows)[:, None] & inside[None, :]
        at = n[:, None] * columns + c[None, :]
        gradient = tl.load(du + at, mask=here, other=0.0)
        product = gradient * tl.load(normalized + at, mask=here, other=0.0)
        total += tl.sum(gradient, 0).to(tl.float64)
        total_dots += tl.sum(product, 0).to(tl.float64)
    sums, dots = total.to(tl.float32), total_dots.to(tl.float32)
    tl.store(of_gamma + c, dots, mask=inside)
    tl.store(of_beta + c, sums, mask=inside)
    scale = tl.load(inverse + c, mask=inside, other=0.0)
    if gamma is not None:
        scale *= tl.load(gamma + c, mask=inside, other=0.0)
    for start in range(0, rows, ROWS):
        n = start + r
        here = (n < rows)[:, None] & inside[None, :]
        at = n[:, None] * columns + c[None, :]
        part = tl.load(normalized + at, mask=here, other=0.0) * (dots / rows)[None, :]
        gradient = tl.load(du + at, mask=here, other=0.0) - (sums / rows)[None, :] - part
        tl.store(dz + at, scale[None, :] * gradient, mask=here)


def norm(z: Tensor, of: SweepNorm, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """h, z~ and 1 / sqrt(variance + eps); moves the running statistics."""
    rows, columns = z.shape
    h, normalized, inverse = z.new_empty(z.shape), z.new_empty(z.shape), z.new_empty(columns)
    mean, variance, count = of.running or (None, None, None)
    if count is not None:
        count.add_(1)
    launched(norm_kernel)[(triton.cdiv(columns, _COLUMNS),)](
        z, of.weight, of.bias, mean, variance, count, normalized, h, inverse,
        rows, columns, of.momentum or 0.0, of.eps, activation, of.momentum is None, _ROWS, _COLUMNS,
    )  # fmt: skip
    return h, normalized, inverse


def norm_gradient(
    du: Tensor, normalized: Tensor, inverse: Tensor, of: SweepNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """dz, dgamma and dbeta."""
    rows, columns = du.shape
    dz, of_gamma, of_beta = du.new_empty(du.shape), du.new_empty(columns), du.new_empty(columns)
    launched(norm_gradient_kernel)[(triton.cdiv(columns, _COLUMNS),)](
        du, normalized, inverse, of.weight, dz, of_gamma, of_beta, rows, columns, _ROWS, _COLUMNS
    )
    return dz, of_gamma, of_beta
