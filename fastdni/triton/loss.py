"""The criterion, and what becomes of partial sums."""

import triton
import triton.language as tl
from torch import Tensor

from fastdni.triton.op import launched
from fastdni.triton.tile import differentiated

_ROWS, _COLUMNS, _SUMS = 8, 128, 1024
_IGNORED = tl.constexpr(-100)


@triton.jit
def cross_entropy_kernel(
    h, labels, counted, out, partials, rows, columns,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """du = phi'(u) (softmax(h) - one-hot label) / counted, and the sum of the rows' losses. Rows of
    label -100 do not count; a label that is none makes its row and the loss NaN."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    label = tl.load(labels + r, mask=r < rows, other=_IGNORED)
    ignored = label == _IGNORED
    known = (label >= 0) & (label < columns)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        here = (r < rows)[:, None] & (start + k < columns)[None, :]
        at = r[:, None] * columns + (start + k)[None, :]
        v = tl.load(h + at, mask=here, other=0.0)
        v = tl.where((start + k < columns)[None, :], v, float("-inf"))
        larger = tl.maximum(largest, tl.max(v, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # not inf - inf
        sums = sums * tl.exp(largest - shift) + tl.sum(tl.exp(v - shift[:, None]), 1)
        largest = larger
    count = tl.load(counted).to(tl.float32)
    scale = 1.0 / tl.where(count > 1.0, count, 1.0)
    for start in range(0, columns, COLUMNS):
        here = (r < rows)[:, None] & (start + k < columns)[None, :]
        at = r[:, None] * columns + (start + k)[None, :]
        v = tl.load(h + at, mask=here, other=0.0)
        gradient = tl.exp(v - largest[:, None]) / sums[:, None]
        gradient = (gradient - (label[:, None] == (start + k)[None, :]).to(tl.float32)) * scale
        gradient = tl.where(known[:, None], gradient, float("nan"))
        gradient = tl.where(ignored[:, None], 0.0, gradient)
        tl.store(out + at, differentiated(gradient, v, ACTIVATION), mask=here)
    own = tl.load(h + r * columns + label, mask=known & (r < rows), other=float("nan"))
    loss = tl.where(ignored, 0.0, largest + tl.log(sums) - own)
    tl.store(partials + tl.program_id(0), tl.sum(loss))


@triton.jit
def mse_kernel(
    h, target, out, partials, rows, columns, scale,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """du = scale phi'(u) (h - target), and the sum of squares."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        here = (r < rows)[:, None] & (start + k < columns)[None, :]
        at = r[:, None] * columns + (start + k)[None, :]
        v = tl.load(h + at, mask=here, other=0.0)
        error = v - tl.load(target + at, mask=here, other=0.0)
        squares += tl.sum(error * error, 1)
        tl.store(out + at, differentiated(scale * error, v, ACTIVATION), mask=here)
    tl.store(partials + tl.program_id(0), tl.sum(squares))


@triton.jit
def sum_kernel(partials, count, divisor, divisor_at, out, COUNT: tl.constexpr):
    """out = the sum of partial sums, however many, over a divisor, which may be on the device."""
    k = tl.arange(0, COUNT)
    sums = tl.zeros((COUNT,), tl.float64)
    for start in range(0, count, COUNT):
        sums += tl.load(partials + start + k, mask=start + k < count, other=0.0).to(tl.float64)
    if divisor_at is not None:
        divisor = tl.load(divisor_at).to(tl.float32)
    tl.store(out, (tl.sum(sums) / divisor).to(tl.float32))


def criterion(h: Tensor, target: Tensor, name: str, activation: str) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient with respect to u where h = phi(u)."""
    rows, columns = h.shape
    programs = triton.cdiv(rows, _ROWS)
    out, partials = h.new_empty(h.shape), h.new_empty(programs)
    sizes = (activation, _ROWS, _COLUMNS)
    if name == "mse":
        scale = 2 / (rows * columns)
        launched(mse_kernel)[(programs,)](h, target, out, partials, rows, columns, scale, *sizes)
        return total(partials, rows * columns), out
    counted = (target != _IGNORED.value).sum()
    launched(cross_entropy_kernel)[(programs,)](
        h, target, counted, out, partials, rows, columns, *sizes
    )
    return total(partials, counted), out


def total(partials: Tensor, divisor: float | Tensor) -> Tensor:
    """Their sum over a divisor, 0-d, in an order that follows from their number."""
    out = partials.new_empty(())
    at = divisor if isinstance(divisor, Tensor) else None
    number = 0.0 if at is not None else float(divisor)
    launched(sum_kernel)[(1,)](partials, partials.numel(), number, at, out, _SUMS)
    return out
