"""The pictures of measurements; what they were made on stands under each."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fastdni.bench import forms
from fastdni.bench.network import Result
from fastdni.bench.report import header, microseconds

matplotlib.rcParams["svg.hashsalt"] = "fastdni"


def _colour(form: str) -> str:
    if form.startswith("fastdni"):
        return "tab:red"
    if form in forms.BACKPROP:
        return "tab:gray"
    return "tab:olive" if form == "products" else "tab:blue"


def bars(results: Sequence[Result], hardware: Mapping, path: Path) -> None:
    """Step times, a panel for each result: medians with 20th and 80th percentiles, the quotient to
    fastdni's beside them, the limit as a line."""
    rows = max(len(result.seconds) for result in results)
    figure = Figure(figsize=(9, len(results) * (1.2 + 0.36 * rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for panel, result in zip(panels, results, strict=True):
        timings = result.seconds
        middle = [1e6 * t.median for t in timings.values()]
        spread = [
            [1e6 * (t.median - t.p20) for t in timings.values()],
            [1e6 * (t.p80 - t.median) for t in timings.values()],
        ]
        drawn = panel.barh(
            list(timings), middle, xerr=spread, capsize=3, color=[_colour(form) for form in timings]
        )
        labels = []
        for form in timings:
            ratio = result.ratios.get(form)
            labels.append(
                microseconds(timings[form].median)
                + " us"
                + (f"  ({ratio.value:.2f}x)" if ratio else "")
            )
        panel.bar_label(drawn, labels=labels, padding=8, fontsize=9)
        if result.limit is not None:
            panel.axvline(
                1e6 * result.limit.seconds, color="black", linestyle=":", linewidth=1, zorder=0
            )
            panel.annotate(
                "limit",
                (1e6 * result.limit.seconds, 1.01),
                fontsize=8,
                ha="center",
                va="bottom",
                xycoords=("data", "axes fraction"),
            )
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_xlim(left=0)
        panel.set_title(title(result.case), fontsize=9, pad=14)
        panel.xaxis.set_major_formatter(FuncFormatter(_in_words))
        panel.set_xlabel("time per training step")
    _save(figure, hardware, path)


def roofline(results: Sequence[Result], hardware: Mapping, path: Path) -> None:
    """Arithmetic reached against FLOP for each byte, for fastdni and the strongest decoupled form
    of PyTorch, under the roofs that each case's limit was measured with."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    for number, result in enumerate(r for r in results if r.limit is not None):
        limit, colour = result.limit, f"C{number}"
        intensity = limit.flop / limit.bytes
        knee = limit.flop_per_second / limit.bytes_per_second
        across = [min(intensity, knee) / 8, knee, max(intensity, knee) * 8]
        roof = [min(x * limit.bytes_per_second, limit.flop_per_second) for x in across]
        axes.plot(across, roof, color=colour, linewidth=0.8, alpha=0.6)
        ours = next(iter(result.seconds))
        for form, marker in ((ours, "o"), (result.strongest(forms.DECOUPLED), "x")):
            if form is None:
                continue
            reached = limit.flop / result.seconds[form].median
            name = f"{result.case.get('size', result.case['case'])}: {form}"
            axes.plot([intensity], [reached], marker, color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="FLOP for each byte that must move", ylabel="FLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    _save(figure, hardware, path)


def title(case: Mapping[str, object]) -> str:
    """A case in words, numbers with their names, in lines that fit."""
    parts = [str(v) if isinstance(v, str) else f"{key} {v}" for key, v in case.items()]
    return "\n".join(textwrap.wrap(", ".join(parts), 100))


def lines(
    panels: Mapping[str, Sequence[tuple[float, Result]]], title: str, hardware: Mapping, path: Path
) -> None:
    """Step times against a size, a panel for each size that was varied.

    Args:
        panels: what was varied -> (its value, the result) of each point.
        title: what was not.
        hardware, path: what to write under the picture, and where it goes.
    """
    figure = Figure(figsize=(5.2 * len(panels) + 1, 5.6), layout="constrained")
    for panel, (varied, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, form in enumerate(max((r.seconds for _, r in points), key=len)):
            there = [(value, r.seconds[form]) for value, r in points if form in r.seconds]
            values = [value for value, _ in there]
            style = "-" if form.startswith("fastdni") else "--" if form in forms.BACKPROP else "-."
            line = panel.plot(
                values,
                [1e6 * t.median for _, t in there],
                style,
                marker="o",
                markersize=3,
                linewidth=2.2 if number == 0 else 1.2,
                label=form,
            )
            low, high = ([1e6 * getattr(t, p) for _, t in there] for p in ("p20", "p80"))
            panel.fill_between(values, low, high, alpha=0.15, color=line[0].get_color())
        limits = [(v, 1e6 * r.limit.seconds) for v, r in points if r.limit is not None]
        if limits:
            panel.plot(*zip(*limits, strict=True), "k:", linewidth=1, label="limit")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([value for value, _ in points])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(_in_words))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set(xlabel=varied, ylabel="time per training step")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, hardware, path)


def _in_words(microseconds: float, _position: int) -> str:
    return f"{microseconds / 1e3:g} ms" if microseconds >= 1e3 else f"{microseconds:g} us"


def _save(figure: Figure, hardware: Mapping, path: Path) -> None:
    caption = "\n".join(textwrap.wrap(header(hardware), int(11 * figure.get_figwidth())))
    figure.supxlabel(caption, fontsize=8, color="dimgray")
    figure.savefig(path, dpi=130)
