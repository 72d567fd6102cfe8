"""Whether decoupled stages pay on given links: what the real schedule does in simulation, beside
schedules that backpropagate.

    python -m fastdni.distributed.plan --stages 8 --stage-ms 5 --latency-ms 20 \\
        [--bandwidth-gbit 10] [--frame-mb 4] [--microbatches 8] [--fail-every 1h] [--out plan.png]

The others are published formulas, with links added: a batch of M microbatches takes a stage t
(forward and backward pass), c = t / M each, and a frame h = latency + transfer from stage to stage.

    GPipe            (M + S - 1) c + 2 (S - 1) h                Huang et al. 2019, arXiv 1811.06965
    1F1B             at most S microbatches in flight:          Narayanan et al. 2021, 2104.04473
                     M max(c, (S c + 2 (S - 1) h) / S) + (S - 1) (c + 2 h)
    zero bubble      M c + (S - 1) c / 3 + 2 (S - 1) h  (ZB-H1)      Qi et al. 2023, 2401.10241
    best synchronous the smallest GPipe over M = 1 .. 64
    PipeDream-2BW    max(t, transfer), two versions of weights  Narayanan et al. 2021, 2006.09503
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from fastdni.bench.report import table
from fastdni.distributed.simulation import Link, Setting, simulate

_RESTART = 10.0  # seconds until training goes on after a failure
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Case(NamedTuple):
    """What is planned for, in seconds and bytes.

    Attributes:
        stages: how many; `stage`: seconds of a stage's forward and backward pass of a batch.
        latency: one way; `transfer`: for which a frame occupies a link; `frame`: its bytes.
        microbatches: of the schedules that have them.
        synthesizer: share of a stage's time that its synthesizer takes.
    """

    stages: int
    stage: float
    latency: float
    transfer: float
    frame: float
    microbatches: int
    synthesizer: float


class Row(NamedTuple):
    """A schedule: seconds a batch, staleness of its gradients, bytes in flight at an edge."""

    name: str
    seconds: float
    staleness: int
    memory: float


def staleness_for(case: Case) -> int:
    """The staleness that hides a link: a round trip, and two messages more."""
    own = max(case.stage * (1 + case.synthesizer), case.transfer)
    return math.ceil(2 * (case.latency + case.transfer) / own) + 2


def decoupled(case: Case, staleness: int) -> Row:
    """By the schedule itself, on virtual time."""
    counted = max(2 * staleness, 30)
    setting = Setting(
        [case.stage] * case.stages,
        [Link(case.latency, transfer=case.transfer)] * (case.stages - 1),
        2 * counted,
        staleness=staleness,
        apply=case.stage * case.synthesizer,
    )
    last = simulate(setting).finished[-1]
    seconds = (last[-1] - last[counted - 1]) / counted
    return Row("decoupled", seconds, staleness, (staleness + 1) * 2 * case.frame)


def synchronous(case: Case) -> list[Row]:
    """The schedules that backpropagate."""
    s, t, m, hop = case.stages, case.stage, case.microbatches, case.latency

    def gpipe(m: int) -> float:
        c, h = t / m, hop + case.transfer / m
        return (m + s - 1) * max(c, case.transfer / m) + 2 * (s - 1) * h

    c, h = t / m, hop + case.transfer / m
    flight = (s * c + 2 * (s - 1) * h) / s
    best = min(range(1, 65), key=gpipe)
    frame = case.frame / m
    return [
        Row(f"GPipe, {m} microbatches", gpipe(m), 0, m * frame),
        Row(f"1F1B, {m}", m * max(c, flight) + (s - 1) * (c + 2 * h), 0, s * frame),
        Row(f"zero bubble, {m}", t + (s - 1) * c / 3 + 2 * (s - 1) * h, 0, s * frame),
        Row(f"best synchronous, {best}", gpipe(best), 0, case.frame),
        Row("PipeDream-2BW", max(t, case.transfer), 1, 2 * case.frame),
    ]


def verdict(case: Case, rows: list[Row]) -> str:
    """One sentence."""
    own = rows[0]
    best = min((row for row in rows[1:] if row.staleness == 0), key=lambda row: row.seconds)
    ratio = best.seconds / own.seconds
    share = case.stage / own.seconds
    if ratio >= 1.2:
        return (
            f"Decoupling pays here: {ratio:.1f} times the batches of the best synchronous "
            f"schedule, at {100 * share:.0f} % of what the stages alone could do; its gradients are"
            f" up to {own.staleness} batches late."
        )
    return (
        f"Decoupling does not pay here: {ratio:.2f} times the batches of {best.name}, whose "
        "gradients are exact."
    )


def _duration(text: str) -> float:
    unit = _UNITS.get(text[-1:])
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 30m or 1h, got {text!r}")
    return value


def _number(least: float, above: bool = False):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or value == math.inf:
            rule = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"must be a number {rule} {least:g}, got {text!r}")
        return value

    return parse


def _whole(least: int):
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} on, got {text!r}")
        return int(text)

    return parse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m fastdni.distributed.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--stages", type=_whole(2), required=True, help="processes in a row")
    add("--stage-ms", type=_number(0, True), required=True, help="of a stage, for a batch")
    add("--latency-ms", type=_number(0), required=True, help="of a link, one way")
    add("--bandwidth-gbit", type=_number(0, True), default=10.0, help="of a link (10)")
    add("--frame-mb", type=_number(0), default=1.0, help="an activation of a batch (1)")
    add("--microbatches", type=_whole(1), default=8, help="of the others' batches (8)")
    add("--synthesizer", type=_number(0), default=0.15, help="its share of a stage's time (0.15)")
    add("--staleness", type=_whole(0), help="messages (what hides the link)")
    add("--fail-every", type=_duration, metavar="TIME", help="between failures: 90s, 30m, 1h")
    add("--save-every", type=_whole(1), default=100, help="messages between checkpoints (100)")
    add("--out", type=Path, metavar="PNG", help="draw batches a second over latencies")
    options = parser.parse_args(arguments)
    if options.out is not None and (options.out.suffix != ".png" or options.out.is_dir()):
        parser.error(f"argument --out: must name a .png file, got {options.out}")
    return options


def _case(options: argparse.Namespace, latency: float) -> Case:
    frame = options.frame_mb * 1e6
    transfer = frame * 8 / (options.bandwidth_gbit * 1e9)
    return Case(
        options.stages, options.stage_ms / 1e3, latency, transfer, frame, options.microbatches,
        options.synthesizer,
    )  # fmt: skip


def _rows(options: argparse.Namespace, latency: float) -> list[Row]:
    case = _case(options, latency)
    staleness = staleness_for(case) if options.staleness is None else options.staleness
    return [decoupled(case, staleness), *synchronous(case)]


def _draw(options: argparse.Namespace) -> None:
    import matplotlib  # an optional dependency

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stage = options.stage_ms / 1e3
    latencies = [stage * factor for factor in (0, 0.1, 0.33, 0.67, 1.33, 2.67, 4, 8)]
    found = [_rows(options, latency) for latency in latencies]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for rows in zip(*found, strict=True):
        name = "best synchronous" if rows[0].name.startswith("best") else rows[0].name
        axes.plot([1e3 * x for x in latencies], [1 / row.seconds for row in rows], "o-",
                  label=name, markersize=3)  # fmt: skip
    axes.axvline(options.latency_ms, color="0.7", linestyle=":")
    axes.set_xlabel("latency of a link, one way, milliseconds")
    axes.set_ylabel("batches a second")
    axes.set_yscale("log")
    axes.set_title(f"{options.stages} stages of {options.stage_ms:g} ms")
    axes.legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    case = _case(options, options.latency_ms / 1e3)
    rows = _rows(options, case.latency)
    share = 1.0
    if options.fail_every is not None:
        # What is lost: the restart, and half of what lies between two checkpoints.
        lost = _RESTART + options.save_every * rows[0].seconds / 2
        share = max(0.0, 1 - lost / options.fail_every)
    cells = [
        [
            row.name,
            f"{1e3 * row.seconds:.2f}",
            f"{1 / row.seconds:.1f}",
            f"{100 * max(0.0, 1 - case.stage / row.seconds):.0f} %",
            str(row.staleness),
            f"{row.memory / 1e6:.1f}",
        ]
        for row in rows
    ]
    headers = ["schedule", "ms a batch", "batches a second", "idle", "staleness", "MB in flight"]
    print(table(cells, headers))
    if options.fail_every is not None:
        print(
            f"with a failure every {options.fail_every:g} s and a checkpoint every "
            f"{options.save_every} messages decoupled stages keep {100 * share:.1f} % of that"
        )
    print("\n" + verdict(case, rows))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        _draw(options)
        print(f"\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
