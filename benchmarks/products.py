"""Which library should make a product of a given size: MKL or oneDNN?

    python -m benchmarks.products [--quick] [--markdown]

For a layer with inputs x (B, K), weight w (N, K) and gradient dz (B, N) it times

    forward  x w^T + b        weight  dz^T x        input  dz w

through `torch.addmm` / `torch.mm` (MKL where torch has it) and through oneDNN's linear, a private
operator of torch that may be missing. The size threshold of the CPU kernels is read off here.
Each sample is a loop of calls, so that the clock is not what is measured; a call from Python
adds about a microsecond to both sides.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from fastdni import bench

SHAPES = (
    (10, 24, 128),
    (32, 64, 64),
    (64, 64, 64),
    (64, 128, 128),
    (64, 256, 256),
    (64, 784, 256),
    (256, 10, 256),
    (256, 64, 64),
    (256, 128, 128),
    (256, 256, 256),
    (256, 784, 256),
    (256, 1024, 1024),
)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = ("forward", "weight", "input")
# Largest difference of the two libraries, relative to the largest element: rounding to `dtype`.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def onednn_linear() -> Callable | None:
    """oneDNN's x w^T + b as f(x, w, b), or None where this torch has no such operator."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None
    return lambda x, w, b: linear(x, w, b, "none", [], "")


def _can(linear: Callable, x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether oneDNN has this product for the dtype: without AVX-512 it has none in bfloat16."""
    try:
        linear(x, w, None)
    except RuntimeError:
        return False
    return True


def calls(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable]:
    """`product library` -> callable, for the libraries there are."""
    batch, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    x, w, b, dz = (
        random(batch, inputs),
        random(outputs, inputs),
        random(outputs),
        random(batch, outputs),
    )
    found = {
        "forward MKL": lambda: torch.addmm(b, x, w.t()),
        "weight MKL": lambda: torch.mm(dz.t(), x),
        "input MKL": lambda: torch.mm(dz, w),
    }
    linear = onednn_linear()
    if linear is not None and _can(linear, x, w):
        found |= {
            "forward oneDNN": lambda: linear(x, w, b),
            "weight oneDNN": lambda: linear(dz.t(), x.t(), None),
            "input oneDNN": lambda: linear(dz, w.t(), None),
        }
        for product in PRODUCTS:
            want, got = found[f"{product} MKL"]().float(), found[f"{product} oneDNN"]().float()
            error = ((got - want).abs().max() / want.abs().max()).item()
            assert error <= TOLERANCE[dtype], f"{product} {shape} {dtype}: differs by {error:.1e}"
    return found


def repeat(call: Callable, times: int) -> None:
    """Calls `call` so many times."""
    for _ in range(times):
        call()


def measure(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """`product library` -> median seconds a call."""
    batch, inputs, outputs = shape
    times = max(1, min(100, 10_000_000 // (batch * inputs * outputs)))
    loops = {name: partial(repeat, call, times) for name, call in calls(shape, dtype).items()}
    timings = bench.interleave(loops, seconds=seconds)
    return {name: timing.median / times for name, timing in timings.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a shorter look at every shape")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)

    print(bench.header(bench.hardware()))
    libraries = ["MKL", "oneDNN"] if onednn_linear() is not None else ["MKL"]
    if len(libraries) == 1:
        print("oneDNN: this torch has no mkldnn::_linear_pointwise, so only MKL is measured")
    columns = [f"{product} {library}" for product in PRODUCTS for library in libraries]
    rows = []
    for threads in sorted({1, min(2, bench.cores())}):
        torch.set_num_threads(threads)
        for name, dtype in DTYPES.items():
            for shape in SHAPES:
                taken = measure(shape, dtype, seconds=0.1 if options.quick else 0.5)
                times = [f"{1e6 * taken[c]:.1f}" if c in taken else "-" for c in columns]
                rows.append([name, threads, ", ".join(map(str, shape)), *times])
    print("median microseconds a call\n")
    print(bench.table(rows, ["dtype", "threads", "B, K, N", *columns], options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
