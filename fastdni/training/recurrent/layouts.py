"""How a recurrent state lies before its synthesizers.

A state is a tensor, or a tuple of tensors, whose last dimensions are rows and features: (L, B, H)
for the layers of torch's modules, (B, H) for a cell. A layout joins them into triggers, one for
each synthesizer, and splits what the synthesizers say into gradients of those tensors.
"""

import abc
from collections.abc import Iterator

import torch
from torch import Tensor

State = Tensor | tuple | list
NAMES = ("joined", "shared", "layers", "hidden")


def tensors_of(state: State) -> list[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in tensors_of(part)]


def first_of(state: State) -> Tensor | None:
    """The first tensor of a state, or whatever was given in its place."""
    while isinstance(state, tuple | list):
        state = state[0] if state else None
    return state


def rebuilt(like: State, tensors: Iterator[Tensor]) -> State:
    """A state of the same form, of other tensors."""
    if isinstance(like, Tensor):
        return next(tensors)
    parts = [rebuilt(part, tensors) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def rows_of(tensors: list[Tensor]) -> int:
    """B."""
    return tensors[0].shape[-2]


def are_zero(tensors: list[Tensor]) -> Tensor:
    """Which rows of a state are zero, (B, 1)."""
    found = None
    for tensor in tensors:
        used = (tensor != 0).any(-1, keepdim=True)
        if used.dim() == 3:
            used = used.any(0)
        found = used if found is None else found | used
    return ~found


def zeroed(state: State, rows: Tensor) -> State:
    """A state that is zero in some rows, (B, 1)."""
    return rebuilt(state, iter([torch.where(rows, 0, t) for t in tensors_of(state)]))


class Layout(abc.ABC):
    """A way to lay a state before its synthesizers."""

    @abc.abstractmethod
    def join(self, tensors: list[Tensor]) -> list[Tensor]:
        """The triggers, (..., B, K) each, in memory of their own."""

    @abc.abstractmethod
    def split(self, messages: list[Tensor], like: list[Tensor]) -> list[Tensor | None]:
        """Of each tensor of a state the gradient that messages, one a trigger, are of it; None for
        one that no synthesizer predicts for."""

    @abc.abstractmethod
    def widths(self, shapes: list[tuple[int, int]]) -> list[int]:
        """K of each trigger, for tensors of so many layers and features."""


class Joined(Layout):
    """All layers side by side, (B, S): h_1 .. h_L, then c_1 .. c_L.

    Args:
        count: of how many of the state's tensors; None for all.
    """

    def __init__(self, count: int | None = None):
        self.count = count

    def join(self, tensors):
        rows = [t if t.dim() == 2 else t.transpose(0, 1).flatten(1) for t in tensors[: self.count]]
        return [torch.cat(rows, 1)]

    def split(self, messages, like):
        (message,) = messages
        parts = message.split([t.numel() // t.shape[-2] for t in like[: self.count]], 1)
        found = [
            part if t.dim() == 2 else part.unflatten(1, (t.shape[0], -1)).transpose(0, 1)
            for part, t in zip(parts, like, strict=False)
        ]
        return found + [None] * (len(like) - len(found))

    def widths(self, shapes):
        return [sum(layers * features for layers, features in shapes[: self.count])]


class Shared(Layout):
    """h and c of a layer side by side, and the layers one after the other, (L, B, 2 H): the same
    synthesizer for all of them."""

    def join(self, tensors):
        return [torch.cat(tensors, -1)]

    def split(self, messages, like):
        (message,) = messages
        return list(message.split([t.shape[-1] for t in like], -1))

    def widths(self, shapes):
        return [sum(features for _, features in shapes)]


class Layers(Layout):
    """h and c of a layer side by side, (B, 2 H): a synthesizer for each layer."""

    def join(self, tensors):
        if tensors[0].dim() == 2:
            return [torch.cat(tensors, 1)]
        return [torch.cat(layer, 1) for layer in zip(*tensors, strict=True)]

    def split(self, messages, like):
        widths = [t.shape[-1] for t in like]
        of_layers = [message.split(widths, 1) for message in messages]
        if like[0].dim() == 2:
            return list(of_layers[0])
        return [torch.stack(of_tensor) for of_tensor in zip(*of_layers, strict=True)]

    def widths(self, shapes):
        return [sum(features for _, features in shapes)] * shapes[0][0]


def layout_named(name: str) -> Layout:
    """Raises ValueError for a name that is none."""
    if name == "joined":
        return Joined()
    if name == "hidden":
        return Joined(count=1)
    if name in NAMES:
        return Shared() if name == "shared" else Layers()
    raise ValueError(f"DecoupledRNN: layout must be one of {', '.join(NAMES)}, got {name!r}")
