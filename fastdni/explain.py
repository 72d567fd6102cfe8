"""What `net.step` would do with each stage, and why."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdni import backend
from fastdni.network import Criterion, DecoupledSequential
from fastdni.recurrent import DecoupledRNN
from fastdni.training.arguments import autocast_dtype
from fastdni.training.criteria import known
from fastdni.training.parts import FusedPart, LocalPart
from fastdni.training.recurrent.fused import Unfused
from fastdni.training.recurrent.steps import made
from fastdni.training.stages import layers_of
from fastdni.training.structure import Structure
from fastdni.training.updates import updates_of

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
    net: DecoupledSequential | DecoupledRNN,
    x: Tensor,
    optimizer: Optimizer | Sequence[Optimizer],
    criterion: Criterion = "cross_entropy",
    head: nn.Module | None = None,
) -> Explanation:
    """Tells for each stage whether `net.step` runs it fused, on which backend, and if not why.

    Args:
        net: the network; of a recurrent one the stages are the recurrence, and head and boundary.
        x: an input, (B, ...); it is taken through the network once, without gradients and in eval
            mode.
        optimizer: as for `net.step`.
        criterion: as for `net.step`.
        head: of a recurrent network's step.

    Returns:
        A table to print; `.rows` for programs.

    Example:
        >>> print(fastdni.explain(net, x, optimizer))
    """
    if isinstance(net, DecoupledRNN):
        return Explanation(_of_windows(net, x, optimizer, criterion, head))
    with net._trainer.lock:  # a look changes modes for a moment
        return Explanation(_rows(net, x, optimizer, criterion))


def _of_windows(net: DecoupledRNN, x, optimizer, criterion: Criterion, head) -> list[dict]:
    engine = net.engine()
    reason = engine.unroller.why_no_kernel(x)
    rows = [_row(type(net.rnn).__name__, reason, "recurrence", "the module's own")]
    if head is None:
        reason = "explain was given no head"
    else:
        try:
            made(net, engine, head, optimizer, criterion)
            reason = None
        except Unfused as why:
            reason = str(why)
    name = f"{type(head).__name__ if head is not None else 'head'}, boundary, updates"
    kernel = "window" if rows[0]["fused"] else "window, a call before the recurrence and one behind"
    return [*rows, _row(name, reason, kernel, "autograd, boundary_")]


def _row(stage: str, reason: str | None, kernel: str, otherwise: str) -> dict:
    fused = reason is None
    return {
        "stage": stage,
        "fused": fused,
        "backend": "cpu" if fused else "torch",
        "kernel": kernel if fused else otherwise,
        "reason": reason or "",
    }


def _rows(net: DecoupledSequential, x: Tensor, optimizer, criterion: Criterion) -> list[dict]:
    structure = net._trainer.structure(net, "explain")
    optimizers = net._trainer.optimizers(structure, "explain", optimizer)
    of_updates = optimizers.reason
    if of_updates is None:
        of_updates = updates_of(optimizers, structure, structure.parameters).reason
    name, autocast = known(criterion).name, autocast_dtype(x)
    inputs = _inputs(net, x)
    rows = []
    for part in structure.parts(name, autocast, len(x)):
        taken = part.fused and part.takes(inputs[part.first], x)
        for number in part.numbers:
            row = {"stage": " -> ".join(type(m).__name__ for m in layers_of(net.stages[number]))}
            if taken:
                row |= _of_sweep(part, structure, number, len(x), of_updates)
            else:
                row |= _of_autograd(part, structure, number, autocast, len(x))
            rows.append(row)
    return rows


def _inputs(net: DecoupledSequential, x: Tensor) -> list[Tensor]:
    """Each stage's input."""
    modes = [(module, module.training) for module in net.modules()]
    inputs = []
    try:
        net.eval()
        with torch.no_grad():
            for stage in net.stages:
                inputs.append(x)
                x = stage(x)
    finally:
        for module, training in modes:
            module.training = training
    return inputs


def _of_sweep(
    part: FusedPart, structure: Structure, number: int, batch: int, of_updates: str | None
) -> dict:
    served_by, reason = part.backend(batch), ""
    kernel = f"sweep: {part.plan(batch).launches}" if served_by in ("cuda", "triton") else "sweep"
    if served_by == "triton" and backend.choice() == "auto":
        reason = backend.why_triton(part.precision)
    elif served_by == "reference":
        reason = backend.why_reference(structure.parsed[number].sweep.weight)
    elif of_updates is not None:
        reason = f"its gradients; the update is the optimizer's own: {of_updates}"
    fused = served_by != "reference"
    return {"fused": fused, "backend": served_by, "kernel": kernel, "reason": reason}


def _of_autograd(
    part: FusedPart | LocalPart,
    structure: Structure,
    number: int,
    autocast: torch.dtype | None,
    batch: int,
) -> dict:
    reason = structure.reasons[number]
    if reason is None and part.fused:
        reason = "the input of these stages is not (B, K)"
    elif reason is None and autocast not in (None, torch.bfloat16):
        reason = f"autocast to {autocast}"
    elif reason is None and not structure.takes_dropout(number, autocast, batch):
        reason = "no kernels of its backend have Dropout"
    elif reason is None:
        reason = "the criterion is a callable"
    kernel = "autograd of the stage"
    return {"fused": False, "backend": "torch", "kernel": kernel, "reason": reason}
