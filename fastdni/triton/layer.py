"""A layer of a stage or of a synthesizer: a product, and what is made of it at once.

The formulas and letters are those of `fastdni.reference.sweep`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from fastdni.triton.tile import (
    Tile,
    accumulate,
    activated,
    differentiated,
    operand,
    positions,
    tile_for,
)


@triton.jit
def layer_kernel(
    a, weight, bias, second_bias, context, context_weight, other, out, second_out, partials,
    rows, columns, depth, context_width, column_stride, depth_stride, scale,
    FINISH: tl.constexpr, ACTIVATION: tl.constexpr, LABELS: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of c = a w^T + ctx Q^T (without a weight c = a), and of what FINISH makes of it:

    "activate"       out = phi(c + b + q)
    "synthesize"     out = g^ = c + b + q, second_out = g^ phi'(u) with phi(u) = other
    "differentiate"  out = c phi'(u) with phi(u) = other
    "regress"        e = other - c; out = scale e; the sum of e^2 to partials
    """
    first, r, c = positions(ROWS, COLUMNS, rows, columns)
    own = r < rows - first
    inside = own[:, None] & (c < columns)[None, :]
    at = r[:, None] * columns + c[None, :]
    start = first * columns
    out += start
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if weight is None:
        sums += tl.load(a + start + at, mask=inside, other=0.0).to(tl.float32)
    else:
        sums = accumulate(
            sums, a, first, r, rows, weight, column_stride, depth_stride, c, columns, depth,
            PRODUCTS, DEPTH,
        )  # fmt: skip
    if context is not None:
        if LABELS:  # a one-hot context picks a column of its weight
            label = tl.load(context + first + r, mask=own, other=-1)
            known = (label >= 0) & (label < context_width)
            picked = context_weight + c[None, :] * context_width + label[:, None]
            found = tl.load(picked, mask=known[:, None] & (c < columns)[None, :], other=0.0)
            sums += operand(found, PRODUCTS).to(tl.float32)
        else:
            sums = accumulate(
                sums, context, first, r, rows, context_weight, context_width, 1, c, columns,
                context_width, PRODUCTS, DEPTH,
            )  # fmt: skip
    if bias is not None:
        sums += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    if second_bias is not None:
        sums += tl.load(second_bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    kind = out.dtype.element_ty
    if FINISH == "activate":
        tl.store(out + at, activated(sums, ACTIVATION).to(kind), mask=inside)
    else:
        beside = tl.load(other + start + at, mask=inside, other=0.0).to(tl.float32)
        if FINISH == "synthesize":
            tl.store(out + at, sums.to(kind), mask=inside)
            second = differentiated(sums, beside, ACTIVATION)
            tl.store(second_out + start + at, second, mask=inside)
        elif FINISH == "differentiate":
            tl.store(out + at, differentiated(sums, beside, ACTIVATION).to(kind), mask=inside)
        else:
            error = tl.where(inside, beside - sums, 0.0)
            tl.store(out + at, (scale * error).to(kind), mask=inside)
            tl.store(partials + tl.program_id(0), tl.sum(error * error))


def layer(
    a: Tensor,
    weight: Tensor | None,
    products: str,
    finish: str = "activate",
    activation: str = "identity",
    transposed: bool = False,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    context: Tensor | None = None,
    context_weight: Tensor | None = None,
    other: Tensor | None = None,
    scale: float = 1.0,
    partials: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `layer_kernel`.

    Args:
        a: (B, K), contiguous.
        weight: (N, K); (K, N) where it is `transposed`; None: N is K.
        context: (B, C), or labels (B,); with `context_weight` (N, C).
        other: (B, N).
        partials: `layer_tile(...).count(B, N)` of them, where FINISH is "regress".

    Returns:
        out, (B, N); and second_out where FINISH is "synthesize".
    """
    rows, depth = a.shape
    columns = depth
    if weight is not None:
        columns = weight.shape[1] if transposed else weight.shape[0]
    tile = layer_tile(rows, columns, depth, products)
    out = (a if other is None else other).new_empty(rows, columns)
    second = torch.empty_like(out) if finish == "synthesize" else None
    if out.numel() == 0:
        return out if second is None else (out, second)
    strides = (1, columns) if transposed else (depth, 1)
    width = 0 if context is None else context_weight.shape[1]
    wrap_triton(layer_kernel)[(tile.count(rows, columns),)](
        a, weight, *biases, context, context_weight, other, out, second, partials,
        rows, columns, depth, width, *strides, scale,
        finish, activation, context is not None and context.dim() == 1, products,
        tile.rows, tile.columns, tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out if second is None else (out, second)


def layer_tile(rows: int, columns: int, depth: int, products: str) -> Tile:
    """How a layer's result is cut up."""
    return tile_for("layer", rows, columns, depth, products)
