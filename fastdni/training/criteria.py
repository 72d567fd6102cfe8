"""Which losses are the fused ones: "cross_entropy" and "mse", torch's own, and their names."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdni import reference
from fastdni.training.watch import MODULE_HOOKS, Watch

FUNCTIONS = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
IGNORED = -100  # the label of rows that do not count
_NAMES = {function: name for name, function in FUNCTIONS.items()}
# Of torch's modules their names, what they compute as long as nobody patches them, and by what.
_MODULES = {nn.CrossEntropyLoss: "cross_entropy", nn.MSELoss: "mse"}
_FORWARDS = {kind: kind.forward for kind in _MODULES}
_OPTIONS = {
    nn.CrossEntropyLoss: ("reduction", "ignore_index", "label_smoothing", "weight"),
    nn.MSELoss: ("reduction",),
}


class Known(NamedTuple):
    """The name of the fused criterion that a loss is, or None, and the label that it ignores."""

    name: str | None
    ignored: int = IGNORED


def known(criterion) -> Known:
    """Which fused criterion a name, a function or a module is."""
    if isinstance(criterion, str):
        return Known(criterion)
    if not isinstance(criterion, nn.Module):
        try:
            return Known(_NAMES.get(criterion))
        except TypeError:  # not hashable
            return Known(None)
    kind = type(criterion)
    if kind not in _MODULES or kind.forward is not _FORWARDS[kind]:
        return Known(None)
    if "forward" in vars(criterion) or any(getattr(criterion, hooks) for hooks in MODULE_HOOKS):
        return Known(None)
    if criterion.reduction != "mean":
        return Known(None)
    if kind is nn.MSELoss:
        return Known("mse")
    if criterion.weight is not None or criterion.label_smoothing != 0:
        return Known(None)
    return Known("cross_entropy", criterion.ignore_index)


def takes(name: str, target, x: Tensor) -> bool:
    """Whether the fused criterion takes a target that torch's loss of this name may well take:
    probabilities, another dtype, a shape that is broadcast."""
    if not isinstance(target, Tensor):
        return False
    if name == "cross_entropy":
        return not target.is_floating_point() and target.dim() == 1
    return target.dtype == x.dtype and target.dim() == 2


def watch_criterion(watch: Watch, criterion) -> None:
    """Adds to a watch what tells which criterion a module is."""
    if not isinstance(criterion, nn.Module):
        return
    own, kind = vars(criterion), type(criterion)
    watch.kind(criterion)
    watch.attributes(kind, ("forward",))
    watch.items(own, ("forward", "_buffers", *MODULE_HOOKS))
    watch.items(own["_buffers"], ("weight",))
    watch.items(own, _OPTIONS[kind])
    for name in MODULE_HOOKS:
        watch.size(own[name])


class Labels:
    """Labels as the sweep takes them: int64, with -100 for rows that do not count. Contexts are
    made of those that were given.

    Args:
        ignored: the label of such rows.
        like: of the context's dtype and device.
        width: of the context to be made where none is given; None: that is for the sweep to do.
    """

    def __init__(self, ignored: int, like: Tensor, width: int | None):
        self._ignored, self._width = ignored, width
        self._dtype, self._device = like.dtype, like.device

    def __call__(self, target: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if target.dtype == torch.uint8:
            target = target.long()
        if self._ignored == IGNORED or target.dtype != torch.int64:
            return target, context
        if context is None and self._width is not None:
            like = torch.empty(0, dtype=self._dtype, device=self._device)
            context = reference.one_hot(target, self._width, like)
        return target.masked_fill(target == self._ignored, IGNORED), context
