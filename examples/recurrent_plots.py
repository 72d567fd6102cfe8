"""The pictures of the recurrent examples."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw_lengths(
    solved: dict[str, list[list[tuple[float, int, int]]]], seconds: float, title: str, path: Path
) -> None:
    """The longest sequence solved over processor seconds, a line for each seed, into a PNG."""
    figure, axes = plt.subplots(figsize=(8, 5.4), layout="constrained")
    for number, (name, of_seeds) in enumerate(solved.items()):
        longest = [found[-1][2] if found else 0 for found in of_seeds]
        label = f"{name}: {', '.join(map(str, longest))}"
        for found in of_seeds:
            times = [0.0, *(second for second, _, _ in found), seconds]
            lengths = [0, *(length for _, _, length in found)]
            axes.step(
                times, [*lengths, lengths[-1]], where="post", color=f"C{number}", label=label,
                alpha=0.85,
            )  # fmt: skip
            label = None
    axes.set(xlabel="processor seconds", ylabel="longest sequence solved (symbols)")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(title="by seed")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_bits(
    curves: dict[str, list[list[tuple[float, int, float]]]], title: str, path: Path
) -> None:
    """Bits per character over windows and over processor seconds, side by side, into a PNG."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for number, (name, of_seeds) in enumerate(curves.items()):
        label = f"{name}: {sum(c[-1][2] for c in of_seeds) / len(of_seeds):.3f}"
        for curve in of_seeds:
            bits = [bit for _, _, bit in curve]
            for panel, place in ((panels[0], 1), (panels[1], 0)):
                panel.plot([look[place] for look in curve], bits, color=f"C{number}", label=label)
            label = None
    panels[0].set(xlabel="windows", ylabel="bits per character (validation)")
    panels[1].set(xlabel="processor seconds")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
