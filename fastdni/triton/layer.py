"""A layer of a stage or of a synthesizer: a product, and what is made of it at once.

The formulas and letters are those of `fastdni.reference.sweep`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdni.triton.op import launched
from fastdni.triton.tile import (
    Precision,
    accumulate,
    accumulate_described,
    activated,
    cast,
    differentiated,
    halves,
    operand,
    positions,
    tile_for,
)


@triton.jit
def finish(
    sums, first, column, place, given,
    FINISH: tl.constexpr, ACTIVATION: tl.constexpr, LABELS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `layer_kernel` makes of a tile's sums: of a part of its columns after the other, so that
    what is beside them is never in registers for all. `place` is the first part's number."""
    if PARTS > 1:
        left, right = halves(sums, ROWS, COLUMNS)
        finish(
            left, first, column, place, given,
            FINISH, ACTIVATION, LABELS, PRECISION, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
        finish(
            right, first, column + COLUMNS // 2, place + PARTS // 2, given,
            FINISH, ACTIVATION, LABELS, PRECISION, ROWS, COLUMNS // 2, PARTS // 2,
        )  # fmt: skip
    else:
        (
            bias, second_bias, context, context_weight, other, out, second_out, rounded, squares,
            sums_out, rows, columns, context_width, scale,
        ) = given  # fmt: skip
        r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        own, of_columns = r < rows - first, c < columns - column
        inside = own[:, None] & of_columns[None, :]
        at = r[:, None] * columns + c[None, :]
        start = first * columns + column
        if LABELS:  # a one-hot context picks a column of its weight
            label = tl.load(context + first + r, mask=own, other=-1)
            known = (label >= 0) & (label < context_width)
            label = tl.where(known, label, 0).to(tl.int32)
            at_label = c[None, :] * context_width + label[:, None]
            picked = context_weight + column * context_width
            found = tl.load(picked + at_label, mask=known[:, None] & of_columns[None, :], other=0.0)
            sums += operand(found, PRECISION).to(tl.float32)
        if bias is not None:
            sums += tl.load(bias + column + c, mask=of_columns, other=0.0).to(tl.float32)[None, :]
        if second_bias is not None:
            q = tl.load(second_bias + column + c, mask=of_columns, other=0.0)
            sums += q.to(tl.float32)[None, :]
        kind = out.dtype.element_ty
        if FINISH == "activate":
            result = activated(sums, ACTIVATION)
            tl.store(out + start + at, cast(result, kind), mask=inside)
        else:
            if FINISH == "synthesize":
                tl.store(out + start + at, cast(sums, kind), mask=inside)
                out = second_out
            beside = tl.load(other + start + at, mask=inside, other=0.0).to(tl.float32)
            if FINISH == "regress":
                error = tl.where(inside, beside - sums, 0.0)
                tl.store(squares + place, tl.sum(error * error))
                result = scale * error
                of_rows = result
            else:
                result = differentiated(sums, beside, ACTIVATION)
                of_rows = tl.where(own[:, None], result, 0.0)
            sums_out += first // ROWS * columns + column
            tl.store(sums_out + c, tl.sum(of_rows, 0), mask=of_columns)
            tl.store(out + start + at, cast(result, kind), mask=inside)
        if rounded is not None:
            tl.store(rounded + start + at, cast(result, tl.bfloat16), mask=inside)


@triton.jit
def layer_tile(
    number, a, weight, context, context_weight, rows, columns, depth, context_width,
    column_stride, depth_stride, given,
    FINISH: tl.constexpr, ACTIVATION: tl.constexpr, LABELS: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of `layer_kernel`."""
    first, r, column, c = positions(number, ROWS, COLUMNS, rows, columns)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if weight is None:
        inside = (r < rows - first)[:, None] & (c < columns - column)[None, :]
        at = first * columns + column + r[:, None] * columns + c[None, :]
        sums += tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    elif DESCRIBED:
        sums = accumulate_described(
            sums, a, first.to(tl.int32), weight, column.to(tl.int32), depth,
            TRANSPOSED, PRECISION, DEPTH,
        )  # fmt: skip
    else:
        sums = accumulate(
            sums, a, first, r, rows, weight, column_stride, depth_stride, column, c, columns,
            depth, PRECISION, DEPTH,
        )  # fmt: skip
    if context is not None and not LABELS:
        sums = accumulate(
            sums, context, first, r, rows, context_weight, context_width, 1, column, c, columns,
            context_width, PRECISION, 16,
        )  # fmt: skip
    finish(
        sums, first, column, number * PARTS, given,
        FINISH, ACTIVATION, LABELS, PRECISION, ROWS, COLUMNS, PARTS,
    )  # fmt: skip


@triton.jit
def layer_kernel(
    a, weight, bias, second_bias, context, context_weight, other, out, second_out, rounded,
    squares, sums_out, rows, columns, depth, context_width, column_stride, depth_stride, scale,
    FINISH: tl.constexpr, ACTIVATION: tl.constexpr, LABELS: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles of c = a w^T + ctx Q^T (without a weight c = a), and of what FINISH makes of it:

    "activate"       out = phi(c + b + q)
    "synthesize"     out = g^ = c + b + q, second_out = g^ phi'(u) with phi(u) = other
    "differentiate"  out = c phi'(u) with phi(u) = other
    "regress"        e = other - c; out = scale e; the sum of e^2 to squares

    The last of these goes to `rounded` as well, where that is given, and where it is a gradient its
    column sums over a tile's rows go to sums_out, a row for each row of tiles. DESCRIBED: a and
    weight are tensor descriptors, and programs stay for several tiles.
    """
    given = (
        bias, second_bias, context, context_weight, other, out, second_out, rounded, squares,
        sums_out, rows, columns, context_width, scale,
    )  # fmt: skip
    if DESCRIBED:  # the loop costs registers, which plain tiles want for more programs
        tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
        for number in range(tl.program_id(0), tiles, tl.num_programs(0)):
            layer_tile(
                number, a, weight, context, context_weight, rows, columns, depth, context_width,
                column_stride, depth_stride, given,
                FINISH, ACTIVATION, LABELS, TRANSPOSED, PRECISION, DESCRIBED,
                ROWS, COLUMNS, DEPTH, PARTS,
            )  # fmt: skip
    else:
        layer_tile(
            tl.program_id(0), a, weight, context, context_weight, rows, columns, depth,
            context_width, column_stride, depth_stride, given,
            FINISH, ACTIVATION, LABELS, TRANSPOSED, PRECISION, DESCRIBED,
            ROWS, COLUMNS, DEPTH, PARTS,
        )  # fmt: skip


class Layer(NamedTuple):
    """What `layer` has made, each (B, N) but for partial sums; FINISH says what of it."""

    out: Tensor
    second_out: Tensor | None
    squares: Tensor | None
    sums: Tensor | None  # (P, N): their column sums are those of the gradient made last


def layer(
    a: Tensor,
    weight: Tensor | None,
    precision: Precision,
    finish: str = "activate",
    activation: str = "identity",
    transposed: bool = False,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    context: Tensor | None = None,
    context_weight: Tensor | None = None,
    other: Tensor | None = None,
    scale: float = 1.0,
) -> Layer:
    """See `layer_kernel`.

    Args:
        a: (B, K), contiguous.
        weight: (N, K); (K, N) where it is `transposed`; None: N is K.
        context: (B, C), or labels (B,); with `context_weight` (N, C).
        other: (B, N).
    """
    rows, depth = a.shape
    columns = depth
    if weight is not None:
        columns = weight.shape[1] if transposed else weight.shape[0]
    kind = "synthesize" if finish == "synthesize" else "layer"
    if weight is None:
        tile = tile_for(rows, columns, depth, precision.name)
    else:
        tile = precision.tile(kind, rows, columns, depth, a)
    out = (a if other is None else other).new_empty(rows, columns)
    second = torch.empty_like(out) if finish == "synthesize" else None
    squares, sums = None, None
    if finish == "regress":
        squares = a.new_empty(tile.count(rows, columns) * tile.parts, dtype=torch.float32)
    if finish != "activate":
        sums = a.new_empty(triton.cdiv(rows, tile.rows), columns, dtype=torch.float32)
    made = Layer(out, second, squares, sums)
    if out.numel() == 0:
        return made
    rounded, operands = None, (a, weight)
    if tile.described:
        rounded = torch.empty_like(out, dtype=torch.bfloat16)
        block = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
        operands = (
            TensorDescriptor.from_tensor(precision.rounded(a), [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(precision.rounded(weight), block),
        )
        precision.keep(out if second is None else second, rounded)
    strides = (1, columns) if transposed else (depth, 1)
    width = 0 if context is None else context_weight.shape[1]
    launched(layer_kernel)[(tile.programs(a, rows, columns),)](
        *operands, *biases, context, context_weight, other, out, second, rounded, squares, sums,
        rows, columns, depth, width, *strides, scale,
        finish, activation, context is not None and context.dim() == 1, transposed,
        precision.name, tile.described, tile.rows, tile.columns, tile.depth, tile.parts,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made
