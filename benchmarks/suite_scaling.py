"""How a step's time grows with width, depth, batch and threads.

    python -m benchmarks.suite_scaling [--quick] [--cases NAME ...] [--output FOLDER]

One thread but where threads are varied; three layers of width 256 at batch 256 but where those are.
Nothing is compiled here; benchmarks.suite_network holds single sizes against compiled forms.
"""

import sys
from collections import defaultdict
from functools import partial

import torch

from benchmarks import suite
from fastdni.bench import cores
from fastdni.bench.cases import Case
from fastdni.bench.command import sweep_table
from fastdni.bench.network import Result, measure
from fastdni.bench.plots import lines

FORMS = ("fastdni", "eager fused", "backprop", "products")
POINTS = {
    "width": [(n, Case((n, n, n, 10)), 1) for n in (16, 32, 64, 128, 256, 512, 1024)],
    "layers": [(n, Case((256,) * n + (10,)), 1) for n in (2, 4, 8, 16)],
    "batch": [(n, Case((256, 256, 256, 10), n), 1) for n in (8, 32, 128, 512, 2048)],
    "threads": [(n, Case((256, 256, 256, 10)), n) for n in range(1, cores() + 1)],
}


def run(
    varied: str, value: int, case: Case, threads: int, *, compile: bool = True, **limits: float
) -> list[Result]:
    """Measures a point."""
    torch.set_num_threads(threads)
    labels = {"varied": varied, "value": value, "case": str(case), "threads": threads}
    return [measure(case, FORMS, with_limit=True, labels=labels, **limits)]


def _by_size(results: list[Result]) -> dict[str, list[tuple[int, Result]]]:
    points = defaultdict(list)
    for result in results:
        points[result.case["varied"]].append((result.case["value"], result))
    return points


def tables(results: list[Result], markdown: bool) -> str:
    """Microseconds against each size."""
    return "\n\n".join(
        sweep_table(varied, *map(list, zip(*points, strict=True)), markdown)
        for varied, points in _by_size(results).items()
    )


def draw(results, info, path) -> None:
    """A panel for each size."""
    title = (
        "three layers of 256, batch 256, one thread, adam, linear synthesizers with label context"
    )
    lines(_by_size(results), f"{title}, but for what is varied", info, path)


SUITE = suite.Suite(
    name="scaling",
    doc=__doc__,
    cases={
        f"{varied}-{value}": partial(run, varied, value, case, threads)
        for varied, points in POINTS.items()
        for value, case, threads in points
    },
    seconds=(3.0, 0.5),
    tables=tables,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(suite.main(SUITE))
