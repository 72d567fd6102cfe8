"""The pictures of the MNIST example."""

from pathlib import Path

import matplotlib
from methods import RECIPES

from fastdni.bench import Timing

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

COLOURS = {method: f"C{i}" for i, method in enumerate(RECIPES)}
SHADES = {"": 1.0, "drop-in": 0.55, "plain": 0.25}
KINDS = {"": "net.step", "drop-in": "drop-in modules", "plain": "plain PyTorch"}


def draw(
    errors: dict[str, list[float]], timings: dict[str, Timing], title: str, path: Path
) -> None:
    """Test-error curves and step times, side by side, into a PNG."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
    for method, curve in errors.items():
        curves.plot(
            range(1, len(curve) + 1),
            curve,
            label=f"{RECIPES[method].name}: {curve[-1]:.2f} %",
            color=COLOURS[method],
            marker="." if len(curve) == 1 else None,
        )
    curves.set(title="Test error")
    _error_axes(curves)
    curves.legend()

    names, middle, spread, shades = [], [], [], []
    for name, timing in timings.items():
        kind, _, method = name.rpartition(" ")
        label = "" if method == "backprop" else f"\n{KINDS[kind]}"
        names.append(RECIPES[method].name + label)
        middle.append(1e3 * timing.median)
        spread.append((1e3 * (timing.median - timing.p20), 1e3 * (timing.p80 - timing.median)))
        shades.append((COLOURS[method], SHADES[kind]))
    drawn = bars.barh(names, middle, xerr=list(zip(*spread, strict=True)), color=shades, capsize=3)
    bars.bar_label(drawn, labels=[f"{value:.2f} ms" for value in middle], padding=6)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(xlabel="milliseconds per training step", title="Step time (median, 20-80 %)")
    _save(figure, title, path)


def draw_table(
    curves: dict[int, dict[str, dict[str, list[float]]]],
    paper: dict[int, dict[str, float]],
    title: str,
    path: Path,
) -> None:
    """Test-error curves (mean and range over seeds), a panel for each depth, with the paper's
    errors as marks at the right edge."""
    figure, panels = plt.subplots(
        1, len(curves), figsize=(4 * len(curves), 5), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for panel, (layers, of_layers) in zip(panels[0], curves.items(), strict=True):
        for method, of_method in of_layers.items():
            by_epoch = list(zip(*of_method.values(), strict=True))
            epochs = range(1, len(by_epoch) + 1)
            mean = [sum(errors) / len(errors) for errors in by_epoch]
            colour, label = COLOURS[method], f"{RECIPES[method].name}: {mean[-1]:.2f} %"
            panel.plot(epochs, mean, color=colour, label=label)
            panel.fill_between(
                epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=colour, alpha=0.2
            )
            if method in paper.get(layers, {}):
                panel.plot(len(by_epoch) * 1.04, paper[layers][method], "<", color=colour)
        panel.set(title=f"{layers} layers (mean of {len(next(iter(of_layers.values())))} seeds)")
        _error_axes(panel)
        panel.legend(title="triangles: the paper's" if layers in paper else None)
    _save(figure, title, path)


def _error_axes(axes) -> None:
    axes.set(xlabel="epoch", ylabel="test error (%)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")


def _save(figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
