"""Step time of the drop-in modules against plain PyTorch and against backpropagation.

    python -m benchmarks.dropin [--quick] [--json out.json] [--markdown]

A step is zero_grad, forward, loss, backward, optimizer.step. What is compared:

* eager / fastdni: the interface in plain PyTorch as dni-pytorch writes it, default Adam on both
  sides: what changing the import buys;
* easy / fastdni: plain PyTorch with one synthesizer evaluation a step and `Adam(fused=True)` on
  both sides: what is left against the easy improvements;
* fastdni / backprop, with each Adam: what decoupling costs.

The gradients of all variants are compared before anything is timed.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import CLASSES, INPUTS, SCHEMES, build, train_step
from fastdni import bench

BATCHES, WIDTHS = (64, 256), (64, 256)
# Column -> (variant, Adam's `fused`); None is Adam's default, which is not the fused form.
STEPS = {
    "backprop": ("backprop", None),
    "eager": ("eager", None),
    "fastdni": ("fastdni", None),
    "backprop fused": ("backprop", True),
    "easy fused": ("easy", True),
    "fastdni fused": ("fastdni", True),
}
RATIOS = {
    "eager/fastdni": ("eager", "fastdni"),
    "easy/fastdni": ("easy fused", "fastdni fused"),
    "fastdni/backprop": ("fastdni", "backprop"),
    "fastdni/backprop fused": ("fastdni fused", "backprop fused"),
}
# Agreement in float64, relative to a gradient's largest element; and in float32, as what is timed,
# an error of at most so many times the error that eager PyTorch itself makes against float64.
FLOAT64_TOLERANCE, FLOAT32_FACTOR = 1e-10, 3


def data(batch: int) -> tuple[Tensor, Tensor]:
    """A random batch: inputs (B, 784) and labels (B,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, INPUTS, generator=generator)
    return x, torch.randint(CLASSES, (batch,), generator=generator)


def gradients(
    variant: str, scheme: str, width: int, batch: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The loss and every parameter's gradient after one step of a variant."""
    network = build(variant, scheme, width)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            # The zero start would hide the synthesizer from the layers below.
            if not parameter.any():
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    network.to(dtype)
    x, y = data(batch)
    # A learning rate of zero: the gradients stay those of the common parameters.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    loss = train_step(network, optimizer, x.to(dtype), y)
    return {"loss": loss.detach()} | {n: p.grad for n, p in network.named_parameters()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    """The largest difference of the named tensors, each relative to its largest element."""
    return max(
        ((found[n].double() - expected[n]).abs().max() / expected[n].abs().max()).item()
        for n in names
    )


def check(scheme: str, width: int, batch: int) -> None:
    """Raises AssertionError unless the variants agree on the loss and on every gradient."""
    oracle = gradients("eager", scheme, width, batch, torch.float64)
    eager = gradients("eager", scheme, width, batch, torch.float32)
    for variant in ("easy", "fastdni", "backprop"):
        names = list(oracle)
        if variant == "backprop":
            if scheme == "unlock":
                continue  # It sends true messages up, so nothing is common.
            names = [n for n in oracle if n.startswith(("loss", "linear3", "bn3"))]
        bounds = {
            torch.float64: FLOAT64_TOLERANCE,
            torch.float32: FLOAT32_FACTOR * error(eager, oracle, names),
        }
        for dtype, bound in bounds.items():
            found = gradients(variant, scheme, width, batch, dtype)
            off = error(found, oracle, names)
            # Written so that NaN fails too.
            if not off <= bound:
                case = f"{variant}, {scheme}, width {width}, batch {batch}, {dtype}"
                raise AssertionError(f"{case}: off by {off:.1e}, allowed {bound:.1e}")


def measure(scheme: str, width: int, batch: int, **limits: float) -> dict[str, bench.Timing]:
    """Times one training step of every entry of STEPS, in turn."""
    x, y = data(batch)
    steps = {}
    for column, (variant, fused) in STEPS.items():
        network = build(variant, scheme, width)
        optimizer = torch.optim.Adam(network.parameters(), fused=fused)
        steps[column] = partial(train_step, network, optimizer, x, y)
    return bench.interleave(steps, burst=bench.BURST, **limits)


def ratios(timings: dict[str, bench.Timing]) -> dict[str, float]:
    """The quotients of medians that RATIOS names."""
    return {name: timings[a].median / timings[b].median for name, (a, b) in RATIOS.items()}


def rounds(timings: dict[str, bench.Timing]) -> int:
    """How often each step was measured."""
    return next(iter(timings.values())).count


def row(case: dict[str, str | int], timings: dict[str, bench.Timing]) -> list[str]:
    """One line of the table; times in microseconds as `median [p20 p80]`."""
    times = [
        f"{1e6 * t.median:.0f} [{1e6 * t.p20:.0f} {1e6 * t.p80:.0f}]" for t in timings.values()
    ]
    quotients = [f"{value:.2f}" for value in ratios(timings).values()]
    return [*map(str, case.values()), *quotients, *times, str(rounds(timings))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropin", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under 40 seconds")
    parser.add_argument("--rounds", type=int, help="timed rounds a line, instead of a time limit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")

    for scheme, width, batch in itertools.product(SCHEMES, WIDTHS, BATCHES):
        check(scheme, width, batch)

    limits = {"seconds": 0.6 if options.quick else 8.0}
    if options.rounds is not None:
        limits = {"rounds": options.rounds}
    info = bench.hardware()
    print(bench.header(info))
    print("times in microseconds: median [20th 80th percentile]; ratios are of medians\n")

    rows, results = [], []
    cases = itertools.product(sorted({1, min(2, bench.cores())}), SCHEMES, BATCHES, WIDTHS)
    for threads, scheme, batch, width in cases:
        torch.set_num_threads(threads)
        case = {"scheme": scheme, "B": batch, "W": width, "threads": threads}
        print(
            f"\r{scheme} B={batch} W={width} threads={threads}   ",
            end="",
            file=sys.stderr,
            flush=True,
        )
        timings = measure(scheme, width, batch, **limits)
        found = ratios(timings)
        rows.append(row(case, timings))
        seconds = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        results.append({"case": case, "ratios": found, "seconds": seconds})
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    headers = [*results[0]["case"], *RATIOS, *STEPS, "rounds"]
    print(bench.table(rows, headers, options.markdown))

    print(f"\nmedians of the ratios over the {len(rows)} lines:")
    for name in RATIOS:
        print(f"  {name}: {statistics.median(r['ratios'][name] for r in results):.2f}")
    if options.json:
        options.json.write_text(json.dumps({"hardware": info, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
