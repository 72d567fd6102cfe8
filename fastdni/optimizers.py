"""torch.optim optimizers as the fused step sees them.

The step reads `param_groups` and reads and writes `state` of the user's own optimizers, so that
checkpoints, schedulers and training without fusion go on from it.
"""

import math
from collections.abc import Sequence
from inspect import Parameter, signature
from operator import is_, itemgetter

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _torch_optimizer

from fastdni.reference import RULES
from fastdni.watch import OptimizerWatch, StateWatch, has_hooks

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
_NUMBERS = {
    SGD: itemgetter("lr", "weight_decay", "momentum", "dampening", "nesterov"),
    Adam: itemgetter("lr", "weight_decay", "betas", "eps", "decoupled_weight_decay"),
    AdamW: itemgetter("lr", "weight_decay", "betas", "eps", "decoupled_weight_decay"),
}


def _rule(optimizer: Optimizer, group: dict) -> str:
    if type(optimizer) is SGD:
        return "sgd_momentum" if group["momentum"] != 0 else "sgd"
    return "adamw" if group["decoupled_weight_decay"] else "adam"


def _settings(rule: str, group: dict) -> list[float]:
    """A row of the sweep's `settings`: see `fastdni.reference.OptimizerSettings`."""
    lr, decay = group["lr"], float(group["weight_decay"])
    lr = math.nan if isinstance(lr, Tensor) else float(lr)  # a tensor is handed over as state
    if rule in ("adam", "adamw"):
        beta1, beta2 = group["betas"]
        rest = [float(beta1), float(beta2), float(group["eps"]), 0.0]
    else:
        rest = [float(group["momentum"]), float(group["dampening"]), 0.0, float(group["nesterov"])]
    return [float(RULES.index(rule)), lr, decay, *rest]


def _numbers(group: dict) -> list:
    """A group's numbers but the learning rate, of any of the optimizers."""
    names = ("weight_decay", "momentum", "dampening", "eps")
    return [group.get(name) for name in names] + list(group.get("betas", ()))


def _check_step(optimizer: Optimizer) -> None:
    """Refuses optimizers whose own step could not be taken."""
    name = type(optimizer).__name__
    closure = signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(
            f"net.step: optimizer must need no closure, got {name}; call net.backward(...) in one"
        )
    for group in optimizer.param_groups:
        if group.get("capturable") and any(p.device.type == "cpu" for p in group["params"]):
            raise ValueError(
                f"net.step: optimizer must not be capturable for parameters on the CPU, got {name}"
            )


def _reason_unfused(optimizer: Optimizer) -> str | None:
    name = type(optimizer).__name__
    if type(optimizer) not in _NUMBERS:
        return f"the optimizer {name} is not torch.optim's SGD, Adam or AdamW"
    if has_hooks(optimizer):
        return f"the step of {name} has hooks"
    own_step = vars(optimizer).get("step")  # schedulers put one there, which only counts calls
    if own_step is not None and not hasattr(own_step, "_wrapped_by_lr_sched"):
        return f"the step of {name} was replaced"
    for group in optimizer.param_groups:
        if any(map(group.get, _UNFUSED_OPTIONS)):
            return f"{name} has {next(o for o in _UNFUSED_OPTIONS if group.get(o))}=True"
        if any(isinstance(number, Tensor) for number in _numbers(group)):
            return f"{name} has a tensor among its numbers"
    return None


def _as_list(given: Optimizer | Sequence[Optimizer]) -> list:
    return list(given) if isinstance(given, list | tuple) else [given]


class Optimizers:
    """What is given to `net.step` as its optimizer: one, or a sequence of them.

    Holds what was found out about them, for as long as `is_current` says that it is so.

    Args:
        given: a torch.optim optimizer, or a list or tuple of them.
        parameters: all of the network's.

    Raises:
        TypeError: something else was given.
        ValueError: an optimizer holds parameters that are not the network's.
    """

    def __init__(self, given: Optimizer | Sequence[Optimizer], parameters: list[Tensor]):
        self.all = _as_list(given)
        if not self.all or not all(isinstance(o, Optimizer) for o in self.all):
            raise TypeError(
                "net.step: optimizer must be a torch.optim optimizer or a sequence of them, got "
                f"{type(given).__name__}"
            )
        self.groups = [(o, group) for o in self.all for group in o.param_groups]
        held = [(number, p) for number, (_, g) in enumerate(self.groups) for p in g["params"]]
        known = {id(p) for p in parameters}
        foreign = sum(id(p) not in known for _, p in held)
        if foreign:
            raise ValueError(
                "net.step: optimizer must hold parameters of the network alone, got "
                f"{foreign} that are not; call net.backward(...) and the optimizers' own step()"
            )
        for optimizer in self.all:
            _check_step(optimizer)
        self.reason = next(filter(None, map(_reason_unfused, self.all)), None)
        self.order = {id(p): position for position, (_, p) in enumerate(held)}
        self.group_of = {id(p): number for number, p in held}
        if len(self.group_of) < len(held):
            self.reason = "two optimizers hold the same parameter"
        self._watch = OptimizerWatch(self.all, (*_UNFUSED_OPTIONS, *_ON_DEVICE_OPTIONS, "betas"))
        self.unchanged = self._watch.unchanged
        self._numbers = [_NUMBERS.get(type(o)) for o, _ in self.groups]
        self._said: list | None = None
        self._kinds: list[type] = []
        self.settings: list[float] = []
        self.rules: list[str] = []

    def is_current(self, given: Optimizer | Sequence[Optimizer]) -> bool:
        """Whether it is these that are given, and they hold the same parameters in the same way."""
        given = _as_list(given)
        same = len(given) == len(self.all) and all(map(is_, given, self.all))
        return same and self.unchanged()

    def read(self) -> None:
        """Reads the groups' numbers into `settings` and `rules`.

        Raises:
            ValueError: a learning rate is not finite.
        """
        said = [read(group) for read, (_, group) in zip(self._numbers, self.groups)]  # noqa: B905
        kinds = [type(numbers[0]) for numbers in said]  # a tensor may well equal a float
        if kinds == self._kinds and said == self._said:
            return
        self.check()
        rules = [_rule(*group) for group in self.groups]
        self.settings = [
            x for rule, (_, g) in zip(rules, self.groups, strict=True) for x in _settings(rule, g)
        ]
        changed, self._said, self._kinds = kinds != self._kinds, said, kinds
        if any(isinstance(n, Tensor) for _, group in self.groups for n in _numbers(group)):
            # Which may change without being another.
            self.reason = "there is a tensor among the optimizer's numbers"
        if rules != self.rules or changed:  # the same list as long as nothing else is said
            self.rules = rules

    def check(self) -> None:
        """Refuses learning rates that are not finite."""
        for _, group in self.groups:
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                continue  # to look would be to wait for the GPU
            if not isinstance(lr, float | int | Tensor) or not math.isfinite(lr):
                raise ValueError(f"net.step: optimizer must have finite learning rates, got {lr}")

    def step(self) -> None:
        """Their own steps, on p.grad."""
        for optimizer in self.all:
            optimizer.step()

    def mark_called(self) -> None:
        """What their own steps would leave for schedulers to see."""
        for optimizer in self.all:
            optimizer._opt_called = True


def _undamped(settings: list[float], rows: int) -> list[float]:
    """The same rows with a dampening of zero."""
    width = len(settings) // rows
    return [0.0 if i % width == 4 else x for i, x in enumerate(settings)]


def _further(group: dict) -> list[Tensor]:
    """What the sweep is handed over besides a parameter's state."""
    return [group["lr"]] if isinstance(group["lr"], Tensor) else []


class Binding:
    """Which optimizer group updates which parameter of a sweep, under one mask.

    Args:
        optimizers: what is given; its `rules` are up to date.
        parameters: those of the sweep, in its order.
        updated: for each, whether the mask lets it be updated.
    """

    def __init__(self, optimizers: Optimizers, parameters: list[Tensor], updated: list[bool]):
        self.groups = [
            optimizers.group_of.get(id(p), -1) if free and p.requires_grad else -1
            for p, free in zip(parameters, updated, strict=True)
        ]
        chosen = [(p, g) for p, g in zip(parameters, self.groups, strict=True) if g >= 0]
        self.parameters = [p for p, _ in chosen]
        self._optimizers = optimizers
        self._chosen = [(*optimizers.groups[g], p, _KEPT[optimizers.rules[g]]) for p, g in chosen]
        self._keeps = [
            (optimizer, p, keys, _further(group))
            for optimizer, group, p, keys in self._chosen
            if keys or _further(group)
        ]
        self._found: StateWatch | None = None  # what they kept when it was last looked for

    def state(self) -> tuple[list[Tensor], list[tuple], list[int], list[float]]:
        """The optimizer state of the parameters, found or made.

        Returns:
            The tensors; what `commit` has to put in place once the step is done; groups and
            settings.
        """
        if self._found is None or not self._found.unchanged():
            # `get`: a look into a defaultdict must not leave an entry behind.
            entries = [(o.state.get(p) or {}, keys) for o, p, keys, _ in self._keeps if keys]
            if any(kept.get(key) is None for kept, keys in entries for key in keys):
                return self._made()
            self._found = StateWatch(self._keeps)
        return self._found.tensors, [], self.groups, self._optimizers.settings

    def _made(self) -> tuple[list[Tensor], list[tuple], list[int], list[float]]:
        tensors, pending, fresh = [], [], set()
        for optimizer, group, parameter, keys in self._chosen:
            kept = optimizer.state.get(parameter) or {}
            made = {}
            if keys == ("momentum_buffer",) and kept.get("momentum_buffer") is None:
                made = {"momentum_buffer": torch.zeros_like(parameter)}
                fresh.add(id(parameter))
            elif keys and not kept:
                dtype = _torch_optimizer._get_scalar_dtype(group.get("fused"))
                on_device = any(map(group.get, _ON_DEVICE_OPTIONS))
                device = parameter.device if on_device else "cpu"
                made = {"step": torch.zeros((), dtype=dtype, device=device)}
                made |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            if made:
                pending.append((optimizer, parameter, made))
            found = made or kept
            if not all(key in found for key in keys):
                raise RuntimeError(
                    f"net.step: optimizer state must hold {', '.join(keys)}, got "
                    f"{', '.join(kept) or 'nothing'}"
                )
            tensors += [*(found[key] for key in keys), *_further(group)]
        order = self._optimizers.order
        pending.sort(key=lambda entry: order[id(entry[1])])  # as their own step would add them
        # A new momentum buffer is the gradient itself, undamped: from rows of their own.
        rows = len(self._optimizers.groups)
        settings = self._optimizers.settings
        chosen = iter(self.parameters)
        groups = [g + rows if g >= 0 and id(next(chosen)) in fresh else g for g in self.groups]
        return tensors, pending, groups, settings + (_undamped(settings, rows) if fresh else [])

    def check(self, tensors: list[Tensor], caller: str) -> None:
        """Refuses state of another shape or dtype than the parameter's."""
        left = iter(tensors)
        for _, group, parameter, keys in self._chosen:
            for key in (*keys, *(["lr"] if _further(group) else [])):
                tensor = next(left)
                fits = tensor.shape == parameter.shape and tensor.dtype == parameter.dtype
                if tensor.numel() != 1 if key in ("step", "lr") else not fits:
                    raise RuntimeError(
                        f"{caller}: a parameter's optimizer state {key} must be {parameter.dtype} "
                        f"{tuple(parameter.shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
                    )

    @staticmethod
    def commit(pending: list[tuple[Optimizer, Tensor, dict]]) -> None:
        """Puts the state that was made where the optimizers look for it."""
        for optimizer, parameter, made in pending:
            optimizer.state[parameter].update(made)
