"""What `net.step` would do with each stage, and why."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from fastdni.network import Criterion, DecoupledSequential

_COLUMNS = ("stage", "fused", "backend", "kernel", "reason")


class Explanation:
    """A printable table.

    Attributes:
        rows: one dict a stage: `stage` (its layers), `fused`, `backend`, `kernel`, and the `reason`
            why it is not fused (or why its update is not), or "".
    """

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __str__(self) -> str:
        shown = [[str(row[name]) for name in _COLUMNS] for row in self.rows]
        shown = [list(_COLUMNS), *([str(i), *cells] for i, cells in enumerate(shown))]
        shown[0] = ["", *_COLUMNS]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in shown
        )

    __repr__ = __str__


def explain(
    net: DecoupledSequential,
    x: Tensor,
    optimizer: Optimizer | Sequence[Optimizer],
    criterion: Criterion = "cross_entropy",
) -> Explanation:
    """Tells for each stage whether `net.step` runs it fused, on which backend, and if not why.

    Args:
        net: the network.
        x: an input, (B, ...); it is taken through the network once, without gradients and in eval
            mode.
        optimizer: as for `net.step`.
        criterion: as for `net.step`.

    Returns:
        A table to print; `.rows` for programs.

    Example:
        >>> print(fastdni.explain(net, x, optimizer))
    """
    return Explanation(net._trainer.explain(x, optimizer, criterion))
