"""What the kernels are made of: a product's tile, an activation, and the sizes of tiles.

Every sum has an order that follows from the shapes: no atomics, no program that waits for another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Under Triton's interpreter arithmetic in bfloat16 is wrong: there operands are rounded to it and
# multiplied as float32, which is what a tensor core does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def operand(tile, PRODUCTS: tl.constexpr):
    """A tile as a product reads it."""
    if PRODUCTS == "bfloat16":
        if INTERPRETED:  # to the nearest, and to even between two; there .to() only cuts off
            bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            narrow = bits.to(tl.float32, bitcast=True)
        else:
            narrow = tile.to(tl.bfloat16)
    elif PRODUCTS == "float16":
        narrow = tile.to(tl.float16)
    else:
        narrow = tile.to(tl.float32)
    return narrow.to(tl.float32) if INTERPRETED else narrow


@triton.jit
def add_product(x, y, sums, PRODUCTS: tl.constexpr):
    """sums + x y, summed in float32."""
    precision: tl.constexpr = PRODUCTS if PRODUCTS == "tf32" or PRODUCTS == "tf32x3" else "ieee"
    return tl.dot(operand(x, PRODUCTS), operand(y, PRODUCTS), sums, input_precision=precision)


@triton.jit
def accumulate(
    sums, a, first, r, rows, b, column_stride, depth_stride, c, columns, depth,
    PRODUCTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sums + (rows first + r of a) (columns c of b), over the whole depth; a is (rows, depth) in
    memory."""
    k = tl.arange(0, DEPTH)
    a += first * depth + r[:, None] * depth + k[None, :]
    b += k[:, None] * depth_stride + c[None, :] * column_stride
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        x = tl.load(a, mask=(r < rows - first)[:, None] & left[None, :], other=0.0)
        y = tl.load(b, mask=left[:, None] & (c < columns)[None, :], other=0.0)
        sums = add_product(x, y, sums, PRODUCTS)
        a += DEPTH
        b += DEPTH * depth_stride
    return sums


@triton.jit
def positions(ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns):
    """The first row of this program's tile, its rows from there on, and its columns. Only the
    first needs 64 bits. Neighbours share what they read."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    number = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        number // column_tiles, number % column_tiles, row_tiles, column_tiles, 8
    )
    c = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    return row_tile.to(tl.int64) * ROWS, tl.arange(0, ROWS), c


@triton.jit
def tanh(u):
    """Near zero a polynomial (that of the Cephes library), where 1 - e^-2|u| would lose digits."""
    z = u * u
    small = -5.70498872745e-3
    small = small * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(u))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(u) < 0.625, u + u * z * small, tl.where(u < 0, -large, large))


@triton.jit
def activated(u, ACTIVATION: tl.constexpr):
    """phi(u); NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "tanh":
        return tanh(u)
    elif ACTIVATION == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-u))
    else:
        return u


@triton.jit
def differentiated(gradient, h, ACTIVATION: tl.constexpr):
    """gradient * phi'(u), from h = phi(u)."""
    if ACTIVATION == "relu":
        return tl.where(h <= 0, 0.0, gradient)
    elif ACTIVATION == "tanh":
        return gradient * (1.0 - h * h)
    elif ACTIVATION == "sigmoid":
        return gradient * (h * (1.0 - h))
    else:
        return gradient


class Tile(NamedTuple):
    """How a result is cut up, and the warps and pipeline stages of a program."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a result."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


# From so many multiply-adds on the tile after them, chosen so that nothing spills (an optimizer
# holds more than a layer does; exact float32 is not for tensor cores) and small results make many
# programs. Counted, not measured.
_SMALL = (0, Tile(32, 32, 32, 4, 2))
CLASSES = {
    "layer": ((1 << 30, Tile(128, 128, 32, 8, 3)), (1 << 24, Tile(64, 64, 32, 4, 3)), _SMALL),
    "tf32 layer": ((1 << 30, Tile(128, 64, 32, 8, 3)), (1 << 24, Tile(64, 64, 32, 4, 3)), _SMALL),
    "update": ((1 << 30, Tile(128, 64, 32, 8, 3)), (1 << 24, Tile(64, 64, 32, 8, 3)), _SMALL),
    "exact": ((1 << 26, Tile(64, 64, 16, 4, 2)), (0, Tile(32, 32, 16, 4, 2))),
}


def arithmetic(products: str) -> str:
    """That of products on this GPU: AMD's have no three products of TF32 in place of one."""
    return "exact" if torch.version.hip and products == "tf32x3" else products


def tile_for(kind: str, rows: int, columns: int, depth: int, products: str) -> Tile:
    """The tile of a product of that size, of a "layer" or an "update"."""
    narrow = products in ("bfloat16", "float16")
    if products == "exact":
        kind = products
    elif kind == "layer" and not narrow:
        kind = "tf32 layer"
    of = CLASSES[kind]
    return next(tile for least, tile in of if rows * columns * depth >= least)
