"""torch.optim optimizers as the fused step sees them.

The step reads `param_groups` and reads and writes `state` of the user's own optimizers, so that
checkpoints, schedulers and training without fusion go on from it.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from inspect import Parameter, signature

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _torch_optimizer

from fastdni.ops import flat
from fastdni.reference import RULES, OptimizerSettings
from fastdni.training.watch import Watch, has_hooks, watch_optimizers

_WIDTH = 7  # of a row of settings: see `fastdni.reference.OptimizerSettings`
# What a rule keeps of a parameter, in the order of the sweep.
_KEPT = {
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
}
# Options that ask for another update than the fused step makes, and those that say where Adam's
# step count lives.
_UNFUSED_OPTIONS = ("amsgrad", "maximize", "differentiable")
_ON_DEVICE_OPTIONS = ("capturable", "fused")
_SGD, _SGD_MOMENTUM, _ADAM, _ADAMW = map(float, map(RULES.index, _KEPT))


def _rate(lr) -> float:
    """A learning rate as a number; NaN for one that is in a GPU's memory, handed over as state."""
    if type(lr) is float:
        return lr
    return math.nan if _is_on_device(lr) else float(lr)


def _is_on_device(lr) -> bool:
    # To look at it would be to wait for the GPU.
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _sgd_settings(group: dict) -> tuple[float, ...]:
    momentum = float(group["momentum"])
    rule = _SGD if momentum == 0 else _SGD_MOMENTUM
    decay, dampening = float(group["weight_decay"]), float(group["dampening"])
    nesterov = float(group["nesterov"])
    return rule, _rate(group["lr"]), decay, momentum, dampening, 0.0, nesterov


def _adam_settings(group: dict) -> tuple[float, ...]:
    rule = _ADAMW if group["decoupled_weight_decay"] else _ADAM
    beta1, beta2 = group["betas"]
    decay, eps = float(group["weight_decay"]), float(group["eps"])
    return rule, _rate(group["lr"]), decay, float(beta1), float(beta2), eps, 0.0


_SETTINGS = {SGD: _sgd_settings, Adam: _adam_settings, AdamW: _adam_settings}


def _step_of(kind: type) -> Callable:
    # Where an optimizer is made, torch puts a function around its class's step that calls hooks.
    return kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step


# What the classes do, as long as nobody patches them.
_STEPS = {kind: _step_of(kind) for kind in _SETTINGS}


def _tensor_numbers(group: dict) -> bool:
    """Whether any of a group's numbers but the learning rate is a tensor."""
    names = ("weight_decay", "momentum", "dampening", "eps")
    numbers = [group.get(name) for name in names] + list(group.get("betas", ()))
    return any(isinstance(number, Tensor) for number in numbers)


@cache
def _needs_closure(kind: type) -> bool:
    closure = signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is Parameter.empty


def _gradients_of(caller: str) -> str:
    """What to call for gradients without an update."""
    return f"{caller.removesuffix('.step')}.backward(...)"


def _check_step(caller: str, optimizer: Optimizer) -> None:
    """Refuses optimizers whose own step could not be taken."""
    name = type(optimizer).__name__
    if _needs_closure(type(optimizer)):
        raise ValueError(
            f"{caller}: optimizer must need no closure, got {name}; call {_gradients_of(caller)} in"
            " one"
        )
    for group in optimizer.param_groups:
        if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
            raise ValueError(
                f"{caller}: optimizer must not be capturable for parameters on the CPU, got {name}"
            )


def _reason_unfused(optimizer: Optimizer) -> str | None:
    name = type(optimizer).__name__
    if type(optimizer) not in _SETTINGS:
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
    return None


class Optimizers:
    """What a step is given as its optimizer: one, or a sequence of them.

    Holds what was found out about them, for as long as `is_current` says that it is so, and no
    reference to them.

    Args:
        caller: whom messages name.
        given: a torch.optim optimizer, or a list or tuple of them.
        parameters: all of the network's.
        forget: called when one of them is gone.

    Attributes:
        reason: why the fused step cannot make their updates; None: it can.
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
        forget: Callable[[], None],
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
        self._optimizers = [weakref.ref(o, lambda _: forget()) for o in every]
        self.groups = [group for o in every for group in o.param_groups]
        held = [(number, p) for number, group in enumerate(self.groups) for p in group["params"]]
        known = {id(p) for p in parameters}
        foreign = sum(id(p) not in known for _, p in held)
        if foreign:
            raise ValueError(
                f"{caller}: optimizer must hold parameters of the network alone, got {foreign} that"
                f" are not; call {_gradients_of(caller)} and the optimizers' own step()"
            )
        for optimizer in every:
            _check_step(caller, optimizer)
        self.reason = next(filter(None, map(_reason_unfused, every)), None)
        self.order = {id(p): position for position, (_, p) in enumerate(held)}
        self.group_of = {id(p): number for number, p in held}
        if len(self.group_of) < len(held):
            self.reason = "two optimizers hold the same parameter"
        self.owner_of = [ref for ref, o in zip(self._optimizers, every) for _ in o.param_groups]
        self._read = [_SETTINGS.get(type(o)) for o in every for _ in o.param_groups]
        self.caller = caller
        self.rates = [g["lr"] if _is_on_device(g["lr"]) else None for g in self.groups]
        self._on_device = [rate is not None for rate in self.rates]
        self._watch: Watch | None = None
        self._check_rates()
        if self.reason is None:
            options = (*_UNFUSED_OPTIONS, *_ON_DEVICE_OPTIONS)
            self._watch = watch_optimizers(every, options)
            self.rules = self.settings()[::_WIDTH]

    @staticmethod
    def _listed(given: Optimizer | Sequence[Optimizer]) -> list:
        return list(given) if isinstance(given, list | tuple) else [given]

    def is_current(self, given: Optimizer | Sequence[Optimizer]) -> bool:
        """Whether it is these that are given, they hold the same parameters in the same way, and
        their updates are fused."""
        if self._watch is None:
            return False
        if len(self._optimizers) == 1 and self._optimizers[0]() is given:
            return self._watch.unchanged()
        given = self._listed(given)
        same = len(given) == len(self._optimizers)
        same = same and all(ref() is o for ref, o in zip(self._optimizers, given, strict=True))
        return same and self._watch.unchanged()

    def settings(self) -> list[float]:
        """The groups' numbers as they are now, in rows.

        Raises:
            ValueError: a learning rate is not finite.
        """
        rows = [x for read, group in zip(self._read, self.groups) for x in read(group)]  # noqa: B905
        for rate in rows[1::_WIDTH]:
            if rate - rate != 0:  # NaN or infinity
                self._check_rates()
        return rows

    def _check_rates(self) -> None:
        for group in self.groups:
            lr = group["lr"]
            try:
                finite = _is_on_device(lr) or math.isfinite(lr)
            except (TypeError, ValueError, RuntimeError):  # no number
                finite = False
            if not finite:
                raise ValueError(
                    f"{self.caller}: optimizer must have finite learning rates, got {lr}"
                )

    def are_alike(self, settings: list[float]) -> bool:
        """Whether settings ask for the same rules as when this was made, with learning rates on
        the same side."""
        on_device = [rate != rate for rate in settings[1::_WIDTH]]
        return settings[::_WIDTH] == self.rules and on_device == self._on_device

    def have_tensors(self) -> bool:
        """Whether any of the groups' numbers but the learning rate is a tensor."""
        return any(map(_tensor_numbers, self.groups))

    def step(self) -> None:
        """Their own steps, on p.grad."""
        for ref in self._optimizers:
            ref().step()

    def mark_called(self) -> None:
        """What their own steps would leave for schedulers to see."""
        for ref in self._optimizers:
            ref()._opt_called = True

    def updates(self, parameters: list[Tensor], updated: Sequence[bool]) -> "Updates":
        """Which group updates which parameter of a sweep; `updated`: whether a mask lets it."""
        groups = [
            self.group_of.get(id(p), -1) if free and p.requires_grad else -1
            for p, free in zip(parameters, updated, strict=True)
        ]
        return Updates(self, parameters, groups)


class Updates:
    """Which optimizer group updates which parameter, and what the optimizers keep of these.

    Attributes:
        parameters: those that are updated.
        state: what is kept of them, in the sweep's order.
        groups: of every parameter its row of the settings, or -1.
        reason: why the fused step cannot make these updates; None: it can.
    """

    def __init__(self, optimizers: Optimizers, parameters: list[Tensor], groups: list[int]):
        self._optimizers = optimizers
        self.groups = groups
        self._chosen = [(p, g) for p, g in zip(parameters, groups, strict=True) if g >= 0]
        self.parameters = [p for p, _ in self._chosen]
        self.state: list[Tensor] = []
        self._made: list[tuple] = []  # (the entry's place, parameter, state made for it)
        self._fresh: set[int] = set()  # parameters with a new momentum buffer
        self.reason: str | None = None
        self._find()

    def _find(self) -> None:
        optimizers, places = self._optimizers, []
        for parameter, number in self._chosen:
            group, owner = optimizers.groups[number], optimizers.owner_of[number]()
            keys = _KEPT[RULES[int(optimizers.rules[number])]]
            # `get`: a look into a defaultdict must not leave an entry behind.
            kept = owner.state.get(parameter) or {}
            made = self._missing(parameter, group, keys, kept)
            if made:
                self._made.append((owner.state, parameter, made))
            found = made or kept
            if not all(isinstance(found.get(key), Tensor) for key in keys):
                raise RuntimeError(
                    f"{optimizers.caller}: optimizer state must hold {', '.join(keys)}, got "
                    f"{', '.join(kept) or 'nothing'}"
                )
            own = [found[key] for key in keys]
            self._check(parameter, keys, own)
            self.state += own
            places += [tensor.data_ptr() for tensor in own if tensor.numel() > 0]
            if optimizers.rates[number] is not None:
                self.state.append(optimizers.rates[number])
        if len(set(places)) < len(places):
            self.reason = "parameters have optimizer state in common"
        # As their own step would add them.
        self._made.sort(key=lambda entry: optimizers.order[id(entry[1])])

    def _missing(self, parameter: Tensor, group: dict, keys: tuple, kept: dict) -> dict:
        """What an optimizer's first step would make."""
        if keys == ("momentum_buffer",) and kept.get("momentum_buffer") is None:
            self._fresh.add(id(parameter))
            return {"momentum_buffer": _zeros(parameter)}
        if keys and not kept:
            dtype = _torch_optimizer._get_scalar_dtype(group.get("fused"))
            on_device = any(map(group.get, _ON_DEVICE_OPTIONS))
            device = parameter.device if on_device else "cpu"
            made = {"step": torch.zeros((), dtype=dtype, device=device)}
            return made | {key: _zeros(parameter) for key in ("exp_avg", "exp_avg_sq")}
        return {}

    def _check(self, parameter: Tensor, keys: tuple, own: list[Tensor]) -> None:
        for key, tensor in zip(keys, own, strict=True):
            if key == "step":
                right = tensor.numel() == 1
                fits = tensor.dtype in (torch.float32, torch.float64)
            else:
                fits = tensor.dtype == parameter.dtype
                # torch adds a gradient to momentum in another dtype, and nothing to Adam's averages.
                right = fits or (key == "momentum_buffer" and tensor.is_floating_point())
                right = right and tensor.shape == parameter.shape
                fits = fits and tensor.device == parameter.device and tensor.is_contiguous()
            if not right:
                raise RuntimeError(
                    f"{self._optimizers.caller}: a parameter's optimizer state {key} must be "
                    f"{parameter.dtype} {tuple(parameter.shape)}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            if not fits:
                self.reason = f"a parameter's optimizer state {key} is not contiguous in its dtype"

    def watch(self, watch: Watch) -> None:
        """Adds to a watch that the optimizers keep these tensors."""
        optimizers = self._optimizers
        for parameter, number in self._chosen:
            keys = _KEPT[RULES[int(optimizers.rules[number])]]
            if not keys:
                continue
            entries = optimizers.owner_of[number]().state
            watch.items(entries, (parameter,))
            watch.items(entries[parameter], keys)

    def settings(self) -> tuple[list[int], list[float]]:
        """Groups and settings of this step. A new momentum buffer is the gradient itself, undamped:
        from rows of their own."""
        settings = self._optimizers.settings()
        if not self._fresh:
            return self.groups, settings
        rows, chosen = len(self._optimizers.groups), iter(self.parameters)
        groups = [g + rows if g >= 0 and id(next(chosen)) in self._fresh else g for g in self.groups]
        undamped = [0.0 if i % _WIDTH == 4 else x for i, x in enumerate(settings)]
        return groups, settings + undamped

    @property
    def first(self) -> bool:
        """Whether some state is made for this step."""
        return bool(self._made)

    def put_in_place(self) -> None:
        """Hands the optimizers the state that is made for this step."""
        for entries, parameter, made in self._made:
            entries[parameter].update(made)

    def take_back(self) -> None:
        """Undoes that, for a step that was not taken."""
        for entries, parameter, made in self._made:
            kept = entries.get(parameter)
            for key in made if kept is not None else ():
                if kept.get(key) is made[key]:
                    del kept[key]
            if kept is not None and not kept:
                del entries[parameter]


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()


class Gradients:
    """In the place of `Updates`: every parameter's gradient goes to its `p.grad`."""

    _SETTINGS = flat([OptimizerSettings("gradient", a=a) for a in (0.0, 1.0)])  # write, add
    reason, first = None, False

    def __init__(self, parameters: list[Tensor], updated: Sequence[bool]):
        self.parameters: list[Tensor] = []  # not changed themselves
        self.groups, self.state = [], []
        self._pending: list[tuple[Tensor, Tensor]] = []
        for parameter, free in zip(parameters, updated, strict=True):
            if not (free and parameter.requires_grad):
                self.groups.append(-1)
                continue
            grad = parameter.grad
            if grad is not None and grad.is_contiguous() and grad.dtype == parameter.dtype:
                self.groups.append(1)
            else:
                self.groups.append(0)
                grad = torch.empty_like(parameter)
                self._pending.append((parameter, grad))
            self.state.append(grad)

    def settings(self) -> tuple[list[int], list[float]]:
        """Groups and settings of this step."""
        return self.groups, self._SETTINGS

    def put_in_place(self) -> None:
        """Gradients are put in place when they are made."""

    take_back = put_in_place

    def finish(self) -> None:
        """Hands over what could not be added where it belongs."""
        for parameter, grad in self._pending:
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad
