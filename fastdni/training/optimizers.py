"""torch.optim optimizers as the fused step sees them.

The step reads `param_groups` and reads and writes `state` of the user's own optimizers, so that
checkpoints, schedulers and training without fusion go on from it.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import Parameter, signature

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastdni import _C
from fastdni.reference import OptimizerSettings
from fastdni.training.kept import ON_DEVICE_OPTIONS, Kept
from fastdni.training.watch import Watch, can_be_watched, has_hooks, watch_optimizers

WIDTH = len(OptimizerSettings._fields)  # of a row of settings
# Options that ask for another update than the fused step makes.
_UNFUSED_OPTIONS = ("amsgrad", "maximize", "differentiable")


def _is_on_device(lr) -> bool:
    # To look at it would be to wait for the GPU.
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _step_of(kind: type) -> Callable:
    # Where an optimizer is made, torch puts a function around its class's step that calls hooks.
    return kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step


# What the classes do, as long as nobody patches them.
_STEPS = {kind: _step_of(kind) for kind in (SGD, Adam, AdamW)}


def _tensor_numbers(group: dict) -> bool:
    """Whether any of a group's numbers but the learning rate is a tensor."""
    names = ("weight_decay", "momentum", "dampening", "eps")
    numbers = [group.get(name) for name in names] + list(group.get("betas", ()))
    return any(isinstance(number, Tensor) for number in numbers)


@cache
def _needs_closure(kind: type) -> bool:
    closure = signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _instead(caller: str, how: str) -> str:
    """What to call instead, for gradients without an update; a schedule has no such call."""
    net = caller.removesuffix(".step")
    return "" if net == "schedule" else f"; call {net}.backward(...) {how}"


def _check_step(caller: str, optimizer: Optimizer) -> None:
    """Refuses optimizers whose own step could not be taken."""
    name = type(optimizer).__name__
    if _needs_closure(type(optimizer)):
        raise ValueError(
            f"{caller}: optimizer must need no closure, got {name}{_instead(caller, 'in one')}"
        )
    for group in optimizer.param_groups:
        if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
            raise ValueError(
                f"{caller}: optimizer must not be capturable for parameters on the CPU, got {name}"
            )


def _reason_unfused(optimizer: Optimizer) -> str | None:
    name = type(optimizer).__name__
    if type(optimizer) not in _STEPS:
        return f"the optimizer {name} is not torch.optim's SGD, Adam or AdamW"
    if has_hooks(optimizer):
        return f"the step of {name} has hooks"
    own_step = vars(optimizer).get("step")  # schedulers put one there, which only counts calls
    replaced = own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched")
    if replaced or _step_of(type(optimizer)) is not _STEPS[type(optimizer)]:
        return f"the step of {name} was replaced"
    for group in optimizer.param_groups:
        if any(map(group.get, _UNFUSED_OPTIONS)):
            return f"{name} has {next(o for o in _UNFUSED_OPTIONS if group.get(o))}=True"
        if _tensor_numbers(group):
            return f"{name} has a tensor among its numbers"
        if type(optimizer) is not SGD and _rounds(group):
            return f"the steps of {name} are rounded to its learning rate's {group['lr'].dtype}"
    return None


def _rounds(group: dict) -> bool:
    """Whether a learning rate is a tensor of a dtype in which Adam's steps, that are worked out in
    it, lose digits."""
    lr = group["lr"]
    if not isinstance(lr, Tensor) or lr.dtype == torch.float64:
        return False
    exact = lr.dtype == torch.float32 and all(p.dtype != torch.float64 for p in group["params"])
    return not exact


def _call_if_alive(method: weakref.WeakMethod, _) -> None:
    if (alive := method()) is not None:
        alive()


class Optimizers:
    """What a step is given as its optimizer: one, or a sequence of them.

    Holds what was found out about them, for as long as `is_current` says that it is so, and no
    reference to them.

    Args:
        caller: whom messages name.
        given: a torch.optim optimizer, or a list or tuple of them.
        parameters: all of the network's.
        forget: a method to call when one of them is gone.

    Attributes:
        reason: why the fused step cannot make their updates; None: it can.
        groups: all of theirs; `held`: (number of the group, parameter), in their order.
        rules: of each group, its place in `reference.RULES`, when this was made.

    Raises:
        TypeError: something else was given.
        ValueError: an optimizer holds parameters that are not the network's, or has a learning
            rate that is not finite.
    """

    def __init__(
        self,
        caller: str,
        given: Optimizer | Sequence[Optimizer],
        parameters: list[Tensor],
        forget: Callable[[], None] | None = None,
    ):
        every = self._listed(given)
        if not every or not all(isinstance(o, Optimizer) for o in every):
            raise TypeError(
                f"{caller}: optimizer must be a torch.optim optimizer or a sequence of them, got "
                f"{type(given).__name__}"
            )
        for optimizer in every:
            if not hasattr(optimizer, "param_groups"):
                raise TypeError(
                    f"{caller}: optimizer must have param_groups, got {type(optimizer).__name__}"
                )
        # The callback must not hold whose method it is: that holds this.
        gone = None if forget is None else weakref.WeakMethod(forget)
        self._optimizers = [weakref.ref(o, gone and partial(_call_if_alive, gone)) for o in every]
        self.groups = [group for o in every for group in o.param_groups]
        self.held = held = [(n, p) for n, group in enumerate(self.groups) for p in group["params"]]
        known = {id(p) for p in parameters}
        foreign = sum(id(p) not in known for _, p in held)
        if foreign:
            instead = _instead(caller, "and the optimizers' own step()")
            raise ValueError(
                f"{caller}: optimizer must hold parameters of the network alone, got {foreign} that"
                f" are not{instead}"
            )
        for optimizer in every:
            _check_step(caller, optimizer)
        self.reason = next(filter(None, map(_reason_unfused, every)), None)
        self.order = {id(p): position for position, (_, p) in enumerate(held)}
        self.group_of = {id(p): number for number, p in held}
        if len(self.group_of) < len(held):
            self.reason = "two optimizers hold the same parameter"
        self.owner_of = [weakref.ref(o) for o in every for _ in o.param_groups]
        self.caller = caller
        self.rates = [g["lr"] if _is_on_device(g["lr"]) else None for g in self.groups]
        self.watch: Watch | None = None
        self._kept: Kept | None = None
        self._check_rates()
        if all(map(can_be_watched, every)):
            self.watch = watch_optimizers(every, (*_UNFUSED_OPTIONS, *ON_DEVICE_OPTIONS))
        if self.reason is None:
            named = [(type(o).__name__, group) for o in every for group in o.param_groups]
            self._numbers = _C.OptimizerNumbers(named)
            self.rules = self.settings()[::WIDTH]

    @staticmethod
    def _listed(given: Optimizer | Sequence[Optimizer]) -> list:
        return list(given) if isinstance(given, list | tuple) else [given]

    def still_serve(self, given: Optimizer | Sequence[Optimizer]) -> bool:
        """Whether it is these that are given, and all that is known of them is so.

        Raises:
            ValueError: a learning rate is not finite.
        """
        if self.watch is None or not (self.are(given) and self.watch.unchanged()):
            return False
        if any(map(_tensor_numbers, self.groups)):
            return False
        if self.reason is None:
            if self._kept is not None and not self._kept.is_current():
                self._kept = None
            return self.settings_if_alike() is not None
        self._check_rates()
        return True

    def are(self, given: Optimizer | Sequence[Optimizer]) -> bool:
        """Whether it is these that are given."""
        if len(self._optimizers) == 1 and self._optimizers[0]() is given:
            return True
        given = self._listed(given)
        same = len(given) == len(self._optimizers)
        return same and all(ref() is o for ref, o in zip(self._optimizers, given, strict=True))

    def settings(self) -> list[float]:
        """The groups' numbers as they are now, in rows.

        Raises:
            ValueError: a learning rate is not finite.
        """
        try:
            return self._numbers.rows()
        except (TypeError, ValueError, RuntimeError):
            self._check_rates()
            raise

    def settings_if_alike(self) -> list[float] | None:
        """The same; None where they ask for other rules than when this was made, or learning rates
        are of other kinds."""
        try:
            return self._numbers.rows_if_alike()
        except (TypeError, ValueError, RuntimeError):
            self._check_rates()
            raise

    def _check_rates(self) -> None:
        for group in self.groups:
            lr = group["lr"]
            try:
                finite = _is_on_device(lr) or (not isinstance(lr, str) and math.isfinite(lr))
            except (TypeError, ValueError, RuntimeError):  # no number
                finite = False
            if not finite:
                raise ValueError(
                    f"{self.caller}: optimizer must have finite learning rates, got {lr}"
                )

    def kept(self) -> Kept:
        """What they keep of the parameters, where their updates can be fused."""
        if self._kept is None or not self._kept.watch.unchanged():
            self._kept = Kept(self)
        return self._kept

    def step(self) -> None:
        """Their own steps, on p.grad."""
        for ref in self._optimizers:
            ref().step()

    def mark_called(self) -> None:
        """What their own steps would leave for schedulers to see."""
        for ref in self._optimizers:
            ref()._opt_called = True
