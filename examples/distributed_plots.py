"""The picture of the distributed example: what each stage did, message by message."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from torch import Tensor  # noqa: E402

MOST = 100  # actions of a stage
COLORS = {"compute": "#3b75af", "apply": "#7fb77e", "save": "#b39ddb", "wait": "#e0e0e0"}
NAMES = {"compute": "own step", "apply": "regression", "save": "saving", "wait": "waiting"}


def draw(lines: list[Tensor], kinds: list[str], title: str, path: Path) -> None:
    """Draws timelines.

    Args:
        lines: of each stage rows (1 + kind, message, begin, end) in seconds; kind 0: none.
    """
    figure, axes = plt.subplots(figsize=(12, 1.2 + 0.8 * len(lines)), layout="constrained")
    rows = [[row for row in line.tolist() if row[0] > 0] for line in lines]
    # What all of them were at together.
    begin = max(min(row[2] for row in of) for of in rows)
    end = min(max(row[3] for row in of) for of in rows)
    shown = set()
    for stage, of_stage in enumerate(rows):
        for kind, number, first, last in of_stage:
            if last < begin or first > end:
                continue
            name = kinds[int(kind) - 1]
            axes.broken_barh(
                [(1e3 * (first - begin), 1e3 * (last - first))], (stage - 0.4, 0.8),
                facecolors=COLORS[name], label=None if name in shown else NAMES[name],
            )  # fmt: skip
            shown.add(name)
            if name == "compute":
                middle = 1e3 * ((first + last) / 2 - begin)
                axes.text(middle, stage, str(int(number)), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"stage {n}" for n in range(len(rows))])
    axes.set_xlim(0, max(1e3 * (end - begin), 1e-3))
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
