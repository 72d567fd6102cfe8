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
