"""Step time of decoupled networks against plain PyTorch, backpropagation and bare products.

    python -m benchmarks.suite_network [--quick] [--cases NAME ...] [--output FOLDER]

One training step, forward to update, on one thread, in the forms of `fastdni.bench.forms`.
Synthesizers are linear and take one-hot labels as context, but in `talk`. Ratios are to fastdni's
time: above 1 where fastdni is the faster one.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks import suite
from fastdni.bench import forms, table
from fastdni.bench.cases import Case
from fastdni.bench.network import Result, forms_for, measure
from fastdni.bench.plots import bars
from fastdni.bench.report import microseconds
from fastdni.bench.timing import repeat

CASES = {
    "talk": Case((24, 128, 64, 12), 10, "sgd", "sigmoid", context=False),
    "small": Case((64, 64, 64, 10), 32),
    "paper3": Case((784, 256, 256, 10), 256),
    "paper3-bn": Case((784, 256, 256, 10), 256, norm=True),
    "paper6": Case((784, *[256] * 5, 10), 256),
    "paper6-bn": Case((784, *[256] * 5, 10), 256, norm=True),
    "wide": Case((784, 1024, 1024, 10), 256),
}
MEMORY_STEPS = 200


def run(name: str, *, compile: bool = True, **limits: float) -> list[Result]:
    """Measures a case."""
    torch.set_num_threads(1)
    ours, *others = forms_for("cpu", compile=compile)
    labels = {"size": name, "case": str(CASES[name]), "threads": 1}
    names = [ours, *others, "fastdni bf16"]
    return [measure(CASES[name], names, with_limit=True, labels=labels, **limits)]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory() -> dict[str, object]:
    """Workspace of a plan, and growth of the process over MEMORY_STEPS steps after as many."""
    case = CASES["paper3"]
    candidate = forms.prepare("fastdni", case)
    repeat(candidate.step, MEMORY_STEPS)
    before = resident_bytes()
    repeat(candidate.step, MEMORY_STEPS)
    growth = resident_bytes() - before
    ((part,),) = candidate.net._trainer._parts.values()
    of_plan = part.plan(case.batch).workspace_bytes
    return {"memory": {"steps": MEMORY_STEPS, "growth_bytes": growth, "workspace_bytes": of_plan}}


def tables(results: list[Result], markdown: bool) -> str:
    """Ratios with their bands, and the share of the limit; then times in microseconds."""
    names = list(max(results, key=lambda result: len(result.seconds)).seconds)
    ours, *others = names
    ratios, times = [], []
    for result in results:
        quotients = [result.ratios.get(form) for form in others]
        cells = [f"{r.value:.2f} [{r.low:.2f} {r.high:.2f}]" if r else "-" for r in quotients]
        share = result.limit.seconds / next(iter(result.seconds.values())).median
        ratios.append([result.case["size"], *cells, f"{100 * share:.0f} %"])
        found = [result.seconds.get(form) for form in names]
        spans = [t and [*map(microseconds, (t.median, t.p20, t.p80))] for t in found]
        times.append([result.case["size"], *("{} [{} {}]".format(*s) if s else "-" for s in spans)])
    over = [f"{form} / {ours}" for form in others]
    return "\n\n".join(
        [
            table(ratios, ["size", *over, "limit / time"], markdown),
            "Microseconds: median [20th 80th percentile].",
            table(times, ["size", *names], markdown),
            *(
                f"{r.case['size']}: {form}: {why}"
                for r in results
                for form, why in r.left_out.items()
            ),
        ]
    )


SUITE = suite.Suite(
    name="network",
    doc=__doc__,
    cases={name: partial(run, name) for name in CASES},
    seconds=(6.0, 1.0),
    tables=tables,
    draw=bars,
    extra=memory,
)

if __name__ == "__main__":
    sys.exit(suite.main(SUITE))
