"""A case measured in every form, and what came out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import fastdni as dni
from fastdni.bench import forms
from fastdni.bench.cases import Case
from fastdni.bench.limits import Limit, limit, rates
from fastdni.bench.products import products
from fastdni.bench.progress import Line
from fastdni.bench.report import microseconds, table
from fastdni.bench.timing import BURST, Ratio, Timing, interleave

# Steps this long do not find caches cold because others ran in between.
_LONG = 3e-3
LEAST_ROUNDS = 8  # a band of fewer would be a guess


@dataclass
class Result:
    """Times of a case's forms.

    Attributes:
        case: what was measured, in words, and further keys such as "threads".
        seconds: form -> Timing.
        ratios: form -> its time over that of the first form.
        limit: of a decoupled step, where it was measured.
        left_out: form -> why there is no time for it.
    """

    case: dict[str, object]
    seconds: dict[str, Timing]
    limit: Limit | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(init=False)

    def __post_init__(self):
        ours, *others = self.seconds
        self.ratios = {f: Ratio.of(self.seconds[f], self.seconds[ours]) for f in others}

    def strongest(self, family: Sequence[str]) -> str | None:
        """The fastest form of a family of baselines."""
        there = [form for form in family if form in self.seconds]
        return min(there, key=lambda form: self.seconds[form].median, default=None)

    def stored(self) -> dict:
        """As JSON takes it."""
        found = {
            "case": self.case,
            "seconds": {form: timing.numbers() for form, timing in self.seconds.items()},
            "ratios": {form: vars(ratio) for form, ratio in self.ratios.items()},
        }
        if self.limit is not None:
            found["limit"] = {**self.limit._asdict(), "seconds": self.limit.seconds}
        return found | ({"left_out": self.left_out} if self.left_out else {})


def backends_for(device: str) -> list[str]:
    """The available backends that serve a device, the fastest one first."""
    serving = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}[device]
    available = dni.backends()
    return [name for name in serving if available[name] == "available"]


def forms_for(device: str, backends: Sequence[str] = ("auto",), compile: bool = True) -> list[str]:
    """The forms that can be measured on a device, fastdni's first."""
    found = ["fastdni" if name == "auto" else f"fastdni {name}" for name in backends]
    found += [f"fastdni {name} graphed" for name in ("cuda", "triton") if name in backends]
    found += [form for form in forms.DECOUPLED if form != "easy"]  # of the drop-in modules
    found += [*forms.BACKPROP, "products"]
    left_out = (() if device == "cuda" else forms.GRAPHED) + (() if compile else forms.COMPILED)
    return [form for form in found if form not in left_out]


def measure(
    case: Case,
    names: Sequence[str],
    *,
    with_limit: bool = False,
    progress: bool = False,
    labels: dict[str, object] | None = None,
    **limits: float,
) -> Result:
    """Checks a case's forms against each other, and then times their steps in turn.

    Args:
        case: what to measure.
        names: of forms; fastdni's first one that can be measured is what ratios are taken to.
        with_limit: whether to measure the machine's rates, too, in turn with the steps.
        progress: show how far it is, see `progress.Line`.
        labels: what the result's `case` says; None: the case in words.
        limits: `rounds` or `seconds`, for `interleave`.

    A form that cannot be measured, or is not the same step, is left out, as long as the first one
    or another of fastdni's stays.

    Raises:
        ArithmeticError: the first form is not the same step, and none of fastdni's is.
    """
    torch.compiler.reset()  # nothing compiled for another case is kept
    check = forms.Check(case)
    steps: dict[str, Callable] = {}
    failed: dict[str, Exception] = {}
    with Line() as line:
        for name in names:
            if progress:
                line.show(f"preparing and checking {name}")
            try:
                steps[name] = products(case) if name == "products" else _checked(name, case, check)
            except Exception as reason:  # whatever a compiler or a driver raises
                failed[name] = reason
    if names[0] in failed and not any(name.startswith("fastdni") for name in steps):
        raise failed[names[0]]
    left_out = {
        name: (str(reason).strip() or repr(reason)).partition("\n")[0]
        for name, reason in failed.items()
    }
    # What ratios are taken to: the first of fastdni's, or of all.
    ours = min(steps, key=lambda name: not name.startswith("fastdni"))
    steps |= rates(case) if with_limit else {}
    short = interleave(steps, rounds=1, warmup=1, device=case.device)
    burst = 2 if short[ours].median > _LONG else BURST
    timings = interleave(
        steps, burst=burst, warmup=1, least=LEAST_ROUNDS, device=case.device, progress=progress,
        **limits,
    )  # fmt: skip
    ordered = {name: timings[name] for name in (ours, *names) if name in timings}
    found = limit(case, timings) if with_limit else None
    return Result(labels or {"case": str(case)}, ordered, found, left_out)


def _checked(form: str, case: Case, check: forms.Check) -> Callable[[], object]:
    """The step of a form, which has been compared with the others."""
    candidate = forms.prepare(form, case)
    check(form, candidate)
    return candidate.step


def report(result: Result, markdown: bool = False) -> str:
    """A result as a table, with the strongest baselines and the limit."""
    ours = next(iter(result.seconds))
    rows = []
    for form, timing in result.seconds.items():
        times = [*map(microseconds, (timing.median, timing.p20, timing.p80))]
        ratio = result.ratios.get(form)
        quotient = "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f} {ratio.high:.2f}]"
        reached = []
        if result.limit is not None:
            share = 100 * result.limit.seconds / timing.median
            reached = ["" if form in forms.BACKPROP else f"{share:.1f} %"]
        rows.append([form, f"{times[0]} [{times[1]} {times[2]}]", quotient, *reached])
    headers = ["form", "us [20 80 %]", f"/ {ours}"]
    lines = [table(rows, headers + ["limit / time"] * (result.limit is not None), markdown), ""]
    for name, family in (("PyTorch's DNI", forms.DECOUPLED), ("backprop", forms.BACKPROP)):
        best = result.strongest(family)
        if best is not None:
            lines.append(f"strongest form of {name}: {best}; {_verdict(result.ratios[best], ours)}")
    if result.limit is not None:
        lines.append(f"limit of a decoupled step: {result.limit}")
    lines += [f"{form}: not measured: {reason}" for form, reason in result.left_out.items()]
    return "\n".join(lines)


def _verdict(ratio: Ratio, ours: str) -> str:
    if ratio.low <= 1 <= ratio.high:
        return f"{ours} takes the same time, within the band"
    if ratio.value > 1:
        return f"{ours} is {ratio.value:.2f} [{ratio.low:.2f} {ratio.high:.2f}] times as fast"
    slower = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    return f"{ours} takes {slower.value:.2f} [{slower.low:.2f} {slower.high:.2f}] times as long"
