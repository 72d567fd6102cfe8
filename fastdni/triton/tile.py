"""What the kernels are made of: a product's tile, an activation, and the sizes of tiles.

Every sum has an order that follows from the shapes: no atomics, no program that waits for another.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Under Triton's interpreter arithmetic in bfloat16 is wrong: there operands that were rounded to it
# are multiplied as float32, which is what a tensor core does.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(tile, DTYPE: tl.constexpr):
    """A tile in another dtype, rounded to the nearest and to even between two."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # where .to() only cuts off
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        rounded = bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        rounded = tile.to(DTYPE)
    return rounded


@triton.jit
def operand(tile, PRECISION: tl.constexpr):
    """A tile as a product reads it."""
    if PRECISION == "bfloat16":
        narrow = cast(tile, tl.bfloat16)
    elif PRECISION == "float16":
        narrow = tile.to(tl.float16)
    else:
        narrow = tile.to(tl.float32)
    return narrow.to(tl.float32) if INTERPRETED else narrow


@triton.jit
def add_product(x, y, sums, PRECISION: tl.constexpr):
    """sums + x y, summed in float32."""
    of_float32: tl.constexpr = PRECISION if PRECISION == "tf32" or PRECISION == "tf32x3" else "ieee"
    return tl.dot(operand(x, PRECISION), operand(y, PRECISION), sums, input_precision=of_float32)


@triton.jit
def accumulate(
    sums, a, first, r, rows, b, column_stride, depth_stride, column, c, columns, depth,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sums + (rows first + r of a) (columns column + c of b), over the whole depth; a is (rows,
    depth) in memory."""
    k = tl.arange(0, DEPTH)
    a += first * depth + r[:, None] * depth + k[None, :]
    b += column * column_stride + k[:, None] * depth_stride + c[None, :] * column_stride
    for start in range(0, depth, DEPTH):
        left = k < depth - start
        x = tl.load(a, mask=(r < rows - first)[:, None] & left[None, :], other=0.0)
        y = tl.load(b, mask=left[:, None] & (c < columns - column)[None, :], other=0.0)
        sums = add_product(x, y, sums, PRECISION)
        a += DEPTH
        b += DEPTH * depth_stride
    return sums


@triton.jit
def accumulate_described(
    sums, a, first, b, column, depth,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`accumulate` by tensor descriptors, whose copies leave out what is outside."""
    for start in range(0, depth, DEPTH):
        x = a.load([first, start])
        y = b.load([start, column]) if TRANSPOSED else b.load([column, start]).T
        sums = add_product(x, y, sums, PRECISION)
    return sums


@triton.jit
def positions(number, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns):
    """The first row of a tile and its rows from there on, the first column and its columns from
    there on. Only what is first needs 64 bits. Neighbours share what they read."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    row_tile, column_tile = tl.swizzle2d(
        number // column_tiles, number % column_tiles, row_tiles, column_tiles, 8
    )
    first, column = row_tile.to(tl.int64) * ROWS, column_tile.to(tl.int64) * COLUMNS
    return first, tl.arange(0, ROWS), column, tl.arange(0, COLUMNS)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


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
    """How a result is cut up, and the warps and pipeline stages of a program.

    `parts`: of its columns, that an epilogue takes one after the other. `described`: whether
    operands come by tensor descriptors (see `has_descriptors`), to programs that stay, as many as
    there are multiprocessors.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    described: bool = False

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a result."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)

    def programs(self, like: Tensor, rows: int, columns: int) -> int:
        """Programs of a launch on a tensor's device."""
        tiles = self.count(rows, columns)
        return min(tiles, multiprocessors(like.device)) if self.described else tiles


# From the largest on, each such that nothing spills. A result is cut into the first of which there
# are enough to occupy a GPU, or into the last: larger tiles read less, small results are to make
# many programs. Counted, not measured.
TILES = {
    "tensor cores": (
        Tile(128, 128, 32, 8, 3, parts=4), Tile(64, 64, 32, 8, 3, parts=2), Tile(32, 32, 32, 4, 2),
    ),
    # Three products in place of one, or rows that begin anywhere: what that takes in registers.
    "crowded": (
        Tile(128, 64, 32, 8, 3, parts=2), Tile(64, 64, 32, 8, 3, parts=2), Tile(32, 32, 32, 4, 2),
    ),
    "exact": (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 3)),
    # A head, the weight of a label context, a few rows: what is copied for a product counts there,
    # not the product.
    "few columns": (Tile(32, 16, 64, 4, 3),),
    "few rows": (Tile(16, 32, 64, 4, 3),),
}  # fmt: skip
# Where operands come by descriptors: tiles of bfloat16, whose rows must begin at 16 bytes.
DESCRIBED = {
    "layer": (Tile(128, 256, 64, 8, 3, 4, True), Tile(128, 128, 64, 8, 3, 2, True)),
    "synthesize": (Tile(128, 128, 64, 8, 3, 4, True),),
    "update": (Tile(128, 256, 64, 8, 3, 8, True), Tile(128, 128, 64, 8, 3, 4, True)),
}
_FEW = 16
_ENOUGH = 120  # about the multiprocessors of the GPUs that they are for
_DESCRIBED_FROM = 1 << 30  # multiply-adds


def _precision_here(precision: str) -> str:
    """That of products on this GPU: few of AMD's have TF32, which have float32 in its place."""
    return "exact" if torch.version.hip and precision.startswith("tf32") else precision


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether tensor cores take what tensor descriptors copy: those of sm_90 and sm_100. (sm_120's
    want operands in registers, as older ones do, and then tiles of this size spill.)"""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _first(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile | None:
    return next((tile for tile in tiles if tile.count(rows, columns) >= _ENOUGH), None)


def _aligned(*sizes: int) -> bool:
    """Whether Triton sees that rows begin at whole vectors; else it addresses each element."""
    return all(size % 16 == 0 for size in sizes)


def tile_for(rows: int, columns: int, depth: int, precision: str) -> Tile:
    """The tile of a result of that size, of sums over that depth."""
    kind = "tensor cores"
    if precision == "exact":
        kind = precision
    elif columns <= _FEW:
        kind = "few columns"
    elif rows <= _FEW:
        kind = "few rows"
    elif precision == "tf32x3" or not _aligned(rows, columns, depth):
        kind = "crowded"
    return _first(TILES[kind], rows, columns) or TILES[kind][-1]


class Precision:
    """That of a step's products, and what it has rounded already.

    Attributes:
        name: as `SweepPlan` has it.
    """

    def __init__(self, name: str):
        self.name = _precision_here(name)
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}

    def tile(self, kind: str, rows: int, columns: int, depth: int, like: Tensor) -> Tile:
        """That of a product: of a "layer", one to "synthesize" or an "update"; `like` is an
        operand."""
        large = rows * columns * depth >= _DESCRIBED_FROM and self.name == "bfloat16"
        # Who traces an op does not see what is written beside descriptors.
        traced = type(like) not in (Tensor, torch.nn.Parameter)
        described = None
        if large and _aligned(rows, columns, depth) and not traced and has_descriptors(like.device):
            described = _first(DESCRIBED[kind], rows, columns)
        return described or tile_for(rows, columns, depth, self.name)

    def rounded(self, tensor: Tensor) -> Tensor:
        """A copy in bfloat16, made once: nothing that is multiplied changes during a step."""
        if id(tensor) not in self._rounded:
            rounded = tensor.to(torch.bfloat16)
            if rounded.data_ptr() % 16:  # a part of another one, say
                rounded = rounded.clone()
            # The tensor is kept, too: its id must not become another's.
            self._rounded[id(tensor)] = tensor, rounded
        return self._rounded[id(tensor)][1]

    def keep(self, tensor: Tensor, rounded: Tensor) -> None:
        """For a tensor that a kernel has rounded as it made it."""
        self._rounded[id(tensor)] = tensor, rounded
