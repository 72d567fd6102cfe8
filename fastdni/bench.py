"""The timing loop of the project: callables measured in turn, and tables of what came out.

Machines drift: clocks change, neighbours come and go. Timing A to its end and then B charges
that drift to one of them, so :func:`interleave` runs A B C, B C A, C A B, ... and reports medians
with the 20th and 80th percentiles.
"""

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

BURST = 8  # training steps of one candidate in a row: see `interleave`


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile in seconds over `count` samples."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarises samples in seconds, with linear interpolation between neighbours."""
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        values = torch.tensor(samples, dtype=torch.float64).quantile(quantiles)
        return cls(*values.tolist(), count=len(samples))


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    burst: int = 1,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Timing]:
    """Times callables in turn, the order rotated from round to round.

    A training loop repeats one step; in turn with five others it would find its code and its
    parameters gone from the caches every time. With a burst above one, each turn is one call that
    is not timed and then `burst` calls that are.

    Args:
        steps: name -> callable without arguments.
        rounds: number of timed rounds.
        seconds: instead of `rounds`: no new round starts after this time (one always does).
        burst: timed calls a turn.
        warmup: rounds that run first and are not timed.
        device: where the callables work; a CUDA device is synchronised around each call.
        progress: show the share done on standard error.

    Returns:
        name -> Timing, in the order of `steps`.

    Raises:
        ValueError: when not exactly one of `rounds` and `seconds` is given, or one is not
            positive, or `burst` is below one, or `warmup` is negative.
    """
    if (rounds is None) == (seconds is None):
        raise ValueError("interleave: give either rounds or seconds")
    limit = seconds if rounds is None else rounds
    if not limit > 0:
        raise ValueError(f"interleave: rounds or seconds must be positive, got {limit}")
    if burst < 1:
        raise ValueError(f"interleave: burst must be at least 1, got {burst}")
    if warmup < 0:
        raise ValueError(f"interleave: warmup must not be negative, got {warmup}")

    on_cuda = torch.device(device).type == "cuda"
    synchronize = (lambda: torch.cuda.synchronize(device)) if on_cuda else (lambda: None)
    for _ in range(warmup):
        for step in steps.values():
            step()

    order = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in order}
    start = perf_counter()
    done, shown = 0, -1
    while done < limit:
        for name in order:
            if burst > 1:
                steps[name]()
            for _ in range(burst):
                synchronize()
                begin = perf_counter()
                steps[name]()
                synchronize()
                samples[name].append(perf_counter() - begin)
        order.append(order.pop(0))
        done = done + 1 if seconds is None else perf_counter() - start
        percent = min(100, int(100 * done / limit))
        if progress and percent > shown:
            shown = percent
            print(f"\rtiming {percent:3d} %", end="", file=sys.stderr, flush=True)
    if progress:
        print("\r" + " " * 12 + "\r", end="", file=sys.stderr, flush=True)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def cores() -> int:
    """Number of CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> dict[str, str | int]:
    """What a measurement was made on: CPU, instruction set, threads, load, torch, date, commit.

    `load` is the machine's load average of the last minute: above zero, others were at work.
    `gpu` is present where CUDA is available, `commit` where this file belongs to a git checkout;
    it ends in `-dirty` when tracked files differ from the commit.
    """
    info: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    commit = _commit()
    if commit is not None:
        info["commit"] = commit
    return info


def header(info: Mapping[str, str | int]) -> str:
    """The result of :func:`hardware` in one line."""
    parts = [f"{info['cpu']}, {info['isa']}, {info['cores']} cores, {info['threads']} threads"]
    parts += [f"load {info['load']}"]
    parts += [str(info["gpu"])] if "gpu" in info else []
    parts += [f"torch {info['torch']}", str(info["date"])]
    parts += [f"commit {info['commit']}"] if "commit" in info else []
    return " | ".join(parts)


def table(
    rows: Sequence[Sequence[object]], headers: Sequence[object], markdown: bool = False
) -> str:
    """Renders rows as an aligned text or Markdown table, all but the first column to the right."""
    lines = [[str(cell) for cell in line] for line in [headers, *rows]]
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    if markdown:
        rule = [rule[0]] + [dashes[:-1] + ":" for dashes in rule[1:]]
    lines.insert(1, rule)
    left, between, right = ("| ", " | ", " |") if markdown else ("", "  ", "")

    def render(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return left + between.join(cells) + right

    return "\n".join(map(render, lines))


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside another project's checkout: that commit is not ours.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
