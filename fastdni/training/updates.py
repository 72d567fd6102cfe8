"""Who updates which parameter in a step: the optimizers, or nobody, and gradients go to p.grad."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastdni.ops import flat
from fastdni.reference import OptimizerSettings
from fastdni.training.optimizers import WIDTH, Optimizers

_MAX_KNOWN = 16  # parts, batch sizes and masks
_DAMPENING = OptimizerSettings._fields.index("b")


class Updates:
    """Which optimizer group updates which parameter, and what the optimizers keep of these.

    Args:
        optimizers: whose; their updates can be fused.
        parameters: those of a sweep or of a synthesizer, in its order.
        updated: for each of them whether a mask lets it be updated; by default all are.

    Attributes:
        parameters: those that are updated.
        state: what is kept of them, in the sweep's order.
        groups: of every parameter its row of the settings, or -1.
        reason: why the fused step cannot make these updates; None: it can.

    Raises:
        RuntimeError: what an optimizer keeps of one of them fits no step.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        parameters: list[Tensor],
        updated: Iterable[bool] | None = None,
    ):
        self._optimizers = weakref.ref(optimizers)  # which keep this: see `updates_of`
        kept = optimizers.kept()
        self.groups: list[int] = []
        self.parameters: list[Tensor] = []
        self.state: list[Tensor] = []
        self.reason: str | None = kept.reason
        self._made: list[tuple[dict, Tensor, dict]] = []  # place, parameter, state made for it
        rows = len(optimizers.groups)
        for parameter, free in zip(parameters, _flags(updated, parameters), strict=True):
            group = optimizers.group_of.get(id(parameter), -1) if free else -1
            if group < 0 or not parameter.requires_grad:
                self.groups.append(-1)
                continue
            entry = kept.of[id(parameter)]
            if entry.misfit is not None:
                raise RuntimeError(f"{optimizers.caller}: {entry.misfit}")
            self.reason = self.reason or entry.reason
            tensors = entry.tensors
            if entry.is_missing:
                made = entry.made(parameter)
                tensors = [made[key] for key in entry.keys]
                self._made.append((entry.state, parameter, made))
                if "momentum_buffer" in made:
                    group += rows
            self.parameters.append(parameter)
            self.groups.append(group)
            self.state += tensors
            self.state += entry.further
        # As their own step would add them.
        self._made.sort(key=lambda made: optimizers.order[id(made[1])])

    def settings(self) -> tuple[list[int], list[float]]:
        """Groups and settings of this step. A new momentum buffer is the gradient itself, undamped:
        from further rows."""
        optimizers = self._optimizers()
        settings = optimizers.settings()
        if max(self.groups, default=-1) < len(optimizers.groups):
            return self.groups, settings
        undamped = [0.0 if i % WIDTH == _DAMPENING else x for i, x in enumerate(settings)]
        return self.groups, settings + undamped

    @property
    def first(self) -> bool:
        """Whether some state is made for this step."""
        return bool(self._made)

    def put_in_place(self) -> None:
        """Hands the optimizers the state that is made for this step."""
        for state, parameter, made in self._made:
            state[parameter].update(made)

    def take_back(self) -> None:
        """Undoes that, for a step that was not taken."""
        for state, parameter, made in self._made:
            kept = state.get(parameter)
            for key in made if kept is not None else ():
                if kept.get(key) is made[key]:
                    del kept[key]
            if kept is not None and not kept:
                del state[parameter]

    def run(self, op: Callable) -> Any:
        """Has an op make them, all of them in one call: `op(state, groups, settings)`.

        What arrives from outside before the op leaves no state behind, and what arrives after it
        takes none away.
        """
        groups, settings = self.settings()
        try:
            self.put_in_place()
            return op(self.state, groups, settings)
        except BaseException:
            if not any(tensor.any() for *_, made in self._made for tensor in made.values()):
                self.take_back()  # it says nothing yet
            raise

    @property
    def written(self) -> list[Tensor]:
        """What the sweep writes."""
        return [*self.parameters, *self.state]

    def finish(self) -> None:
        """What is left to do when the sweep has run."""
        self.put_in_place()


def updates_of(
    optimizers: Optimizers, owner, parameters: list[Tensor], updated: tuple[bool, ...] | None = None
) -> Updates:
    """`Updates`, made once for as long as the optimizers keep the same tensors.

    Args:
        owner: whose parameters these are, always the same.
        Others as `Updates`.
    """
    known = optimizers.kept().updates
    key = (owner, updated)
    found = known.get(key)
    if found is None:
        found = Updates(optimizers, parameters, updated)
        if not found.first:  # what is made is made for one step
            if len(known) >= _MAX_KNOWN:
                known.clear()
            known[key] = found
    return found


def _flags(updated: Iterable[bool] | None, parameters: list[Tensor]) -> Iterable[bool]:
    """For each parameter whether it may be updated: all, where nothing is said."""
    return [True] * len(parameters) if updated is None else updated


class Gradients:
    """In the place of `Updates`: every parameter's gradient goes to its `p.grad`."""

    _SETTINGS = flat([OptimizerSettings("gradient", a=a) for a in (0.0, 1.0)])  # write, add
    reason, first = None, False

    def __init__(self, parameters: list[Tensor], updated: Iterable[bool] | None = None):
        self.parameters: list[Tensor] = []  # not changed themselves
        self.groups, self.state = [], []
        self._pending: list[tuple[Tensor, Tensor]] = []
        for parameter, free in zip(parameters, _flags(updated, parameters), strict=True):
            if not (free and parameter.requires_grad):
                self.groups.append(-1)
                continue
            grad = parameter.grad
            adds = grad is not None and grad.layout == torch.strided and grad.is_contiguous()
            adds = adds and grad.dtype == parameter.dtype
            if not adds:
                grad = torch.empty_like(parameter)
                grad = grad if grad.is_contiguous() else grad.contiguous()
                self._pending.append((parameter, grad))
            self.groups.append(int(adds))
            self.state.append(grad)

    def settings(self) -> tuple[list[int], list[float]]:
        """Groups and settings of this step."""
        return self.groups, self._SETTINGS

    def put_in_place(self) -> None:
        """Gradients are put in place when they are made."""

    take_back = put_in_place

    @property
    def written(self) -> list[Tensor]:
        """What the sweep writes."""
        return self.state

    def finish(self) -> None:
        """Hands over what could not be added where it belongs."""
        for parameter, grad in self._pending:
            before = parameter.grad
            if before is not None and before.layout == torch.strided:
                before += grad
            else:
                parameter.grad = grad if before is None else before + grad
