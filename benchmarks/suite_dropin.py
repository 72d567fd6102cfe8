"""Step time of the drop-in modules against plain PyTorch and against backpropagation.

    python -m benchmarks.suite_dropin [--quick] [--cases NAME ...] [--output FOLDER]

A step is zero_grad, forward, loss, backward, optimizer.step, in the network and the variants of
`fastdni.bench.dropin`, with one thread and with two:

* eager / fastdni: the interface in plain PyTorch as dni-pytorch writes it, Adam as it comes on both
  sides: what changing the import buys;
* easy / fastdni: plain PyTorch with one synthesizer evaluation a step and `Adam(fused=True)` on
  both sides: what is left against the easy improvements;
* backprop / fastdni, with Adam(fused=True): below 1, what decoupling costs.
"""

import itertools
import sys
from functools import partial

import torch

from benchmarks import suite
from fastdni.bench import cores, dropin, table
from fastdni.bench.network import Result
from fastdni.bench.plots import bars
from fastdni.bench.report import microseconds

BATCHES, WIDTHS = (64, 256), (64, 256)


def run(
    scheme: str, width: int, batch: int, threads: int, *, compile: bool = True, **limits: float
) -> list[Result]:
    """Measures a case, under both optimizers."""
    torch.set_num_threads(threads)
    results = dropin.measure(scheme, (784, width, width, 10), batch, **limits)
    for result in results:
        result.case["threads"] = threads
    return results


def tables(results: list[Result], markdown: bool) -> str:
    """A line for each scheme, size and number of threads."""
    rows = []
    for plain, fused in zip(results[::2], results[1::2], strict=True):
        shown = [plain.ratios["eager"], fused.ratios["easy"], fused.ratios["backprop"]]
        quotients = [f"{r.value:.2f} [{r.low:.2f} {r.high:.2f}]" for r in shown]
        times = [microseconds(r.seconds["fastdni"].median) for r in (plain, fused)]
        case = plain.case
        rows.append(
            [case["scheme"], case["net"], case["batch"], case["threads"], *quotients, *times]
        )
    headers = ["scheme", "net", "batch", "threads", "eager / fastdni", "easy / fastdni"]
    headers += ["backprop / fastdni", "us, Adam", "us, fused Adam"]
    return table(rows, headers, markdown)


def draw(results, info, path) -> None:
    """The cases of one thread at the largest size, under the fused optimizer."""
    largest = f"784-{WIDTHS[-1]}-{WIDTHS[-1]}-10"
    shown = [
        r for r in results
        if r.case["optimizer"] == "fused Adam" and r.case["threads"] == 1
        and r.case["net"] == largest and r.case["batch"] == BATCHES[-1]
    ]  # fmt: skip
    bars(shown or results[:1], info, path)


SUITE = suite.Suite(
    name="dropin",
    doc=__doc__,
    cases={
        f"{scheme}-{width}-{batch}-{threads}": partial(run, scheme, width, batch, threads)
        for threads, scheme, width, batch in itertools.product(
            sorted({1, min(2, cores())}), dropin.SCHEMES, WIDTHS, BATCHES
        )
    },
    seconds=(4.0, 0.6),
    tables=tables,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(suite.main(SUITE))
