"""Matrix products by the libraries that torch has, the faster one for each shape."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastdni.bench.cases import Case
from fastdni.bench.timing import graphed, interleave, repeat

# Of a layer with inputs x (B, K), weight w (N, K) and gradient dz (B, N):
# x w^T + b,  dz^T x,  dz w.
PRODUCTS = ("forward", "weight", "input")


def onednn_linear() -> Callable | None:
    """oneDNN's x w^T + b as f(x, w, b), or None where this torch has no such operator."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return lambda x, w, b: linear(x, w, b, "none", [], "")


def product_calls(
    batch: int,
    product: str,
    inputs: int,
    outputs: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Callable[[], Tensor]]:
    """`library` -> one product of a layer, with tensors of its own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, w, dz = random(batch, inputs), random(outputs, inputs), random(batch, outputs)
    b = random(outputs) if product == "forward" else None
    left, right = {"forward": (x, w.t()), "weight": (dz.t(), x), "input": (dz, w)}[product]
    out = left @ right
    blas = "MKL" if device == "cpu" else "cuBLAS"
    found: dict[str, Callable[[], Tensor]]
    if b is None:
        turned = out.t().contiguous()
        found = {
            blas: lambda: torch.mm(left, right, out=out),
            f"{blas} transposed": lambda: torch.mm(right.t(), left.t(), out=turned).t(),
        }
    else:
        found = {blas: lambda: torch.addmm(b, left, right, out=out)}
    linear = onednn_linear() if device == "cpu" else None
    if linear is not None:
        try:
            linear(left, right.t(), b)
        except RuntimeError:  # without AVX-512 it has no product in bfloat16
            return found
        found["oneDNN"] = lambda: linear(left, right.t(), b)
    return found


def time_calls(
    calls: dict[str, Callable], operations: int, seconds: float, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of one call of each, measured in loops: a clock is no part of it."""
    times = max(1, min(100, 10_000_000 // operations))
    loops = {name: partial(repeat, call, times) for name, call in calls.items()}
    timings = interleave(loops, seconds=seconds, device=device)
    return {name: timing.median / times for name, timing in timings.items()}


def step_products(case: Case) -> list[tuple[str, int, int]]:
    """(product, inputs, outputs) of all products of a decoupled step: a one-hot context needs none,
    nor does the lowest stage's input gradient."""
    shapes = []
    for number, (inputs, outputs) in enumerate(zip(case.widths, case.widths[1:], strict=False)):
        shapes += [("forward", inputs, outputs), ("weight", inputs, outputs)]
        shapes += [("input", inputs, outputs)] if number > 0 else []
        if number == len(case.widths) - 2:
            continue
        layers = [outputs, *case.hidden, outputs]
        for depth, (k, n) in enumerate(zip(layers, layers[1:], strict=False)):
            shapes += [("forward", k, n), ("weight", k, n)]
            shapes += [("input", k, n)] if depth > 0 else []
    return shapes


def products(case: Case, seconds: float = 0.02) -> Callable[[], None]:
    """All matrix products of a decoupled step, in turn, each by the library that a short look of so
    many seconds finds faster; on a GPU in a graph."""
    dtypes = [torch.float32] + [torch.bfloat16] * (case.precision == "bf16")
    faster: dict[tuple, tuple] = {}
    chosen = []
    for shape in step_products(case):
        calls = {
            (dtype, name): call
            for dtype in dtypes
            for name, call in product_calls(case.batch, *shape, dtype, case.device).items()
        }
        if shape not in faster:
            taken = time_calls(calls, case.batch * shape[1] * shape[2], seconds, case.device)
            faster[shape] = min(taken, key=taken.__getitem__)
        chosen.append(calls[faster[shape]])

    def run() -> None:
        for call in chosen:
            call()

    return graphed(run) if case.device == "cuda" else run
