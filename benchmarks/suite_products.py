"""Which library should make a product of a given size: MKL or oneDNN?

    python -m benchmarks.suite_products [--quick] [--markdown]

For a layer with inputs x (B, K), weight w (N, K) and gradient dz (B, N) it times

    forward  x w^T + b        weight  dz^T x        input  dz w

through `torch.addmm` / `torch.mm` (MKL where torch has it) and through oneDNN's linear, a private
operator of torch that may be missing. The size threshold of the CPU kernels is read off here.
Each sample is a loop of calls, so that the clock is not what is measured; a call from Python
adds about a microsecond to both sides.
"""

import argparse
import sys

import torch

from fastdni import bench
from fastdni.bench.products import PRODUCTS, onednn_linear, product_calls, time_calls

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
# Largest difference of two libraries, relative to the largest element: rounding to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def measure(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """`product library` -> median seconds a call."""
    batch, inputs, outputs = shape
    calls = {}
    for product in PRODUCTS:
        made = product_calls(batch, product, inputs, outputs, dtype)
        want = made["MKL"]().float()
        for library, call in made.items():
            error = ((call().float() - want).abs().max() / want.abs().max()).item()
            if not error <= TOLERANCE[dtype]:
                raise ArithmeticError(f"{product} {library} {shape} {dtype}: off by {error:.1e}")
            calls[f"{product} {library}"] = call
    return time_calls(calls, batch * inputs * outputs, seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite_products", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a shorter look at every shape")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)

    print(bench.header(bench.hardware()))
    libraries = ["MKL", "MKL transposed", "oneDNN"]
    if onednn_linear() is None:
        libraries.remove("oneDNN")
        print("oneDNN: this torch has no mkldnn::_linear_pointwise, so only MKL is measured")
    columns = [
        f"{product} {library}"
        for product in PRODUCTS
        for library in libraries
        if (product, library) != ("forward", "MKL transposed")
    ]
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
