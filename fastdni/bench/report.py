"""What a result says of itself: the machine it was made on, tables."""

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_MEASURED = (":/", ":(top,exclude)benchmarks/results")


def cores() -> int:
    """Number of CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> dict[str, str | int]:
    """What a measurement was made on: CPU, instruction set, threads, load, torch, date, commit.

    `load` is the machine's load average of the last minute: above zero, others were at work.
    `gpu` is present where CUDA is available, `commit` where this file belongs to a git checkout;
    it ends in `-dirty` when tracked files differ from the commit. Of a copy without git it is what
    the environment variable FASTDNI_COMMIT says.
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
    parts = [f"{info['cpu']}, {info['isa']}, {info['cores']} cores"]
    parts[0] += f", {info['threads']} threads" if "threads" in info else ""
    parts += [f"load {info['load']}"]
    parts += [str(info["gpu"])] if "gpu" in info else []
    parts += [f"torch {info['torch']}", str(info["date"])]
    parts += [f"commit {info['commit']}"] if "commit" in info else []
    return " | ".join(parts)


def microseconds(seconds: float) -> str:
    """A time to three digits or more: `7.31`, `208`, `12040`."""
    value = 1e6 * seconds
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


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
        commit = git("describe", "--always", "--exclude=*")
        # Results that are being written change nothing that they measure.
        return commit + "-dirty" * bool(git("diff", "HEAD", "--stat", "--", *_MEASURED))
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTDNI_COMMIT")
