"""Who updates which parameter in a step: the optimizers, or nobody, and gradients go to p.grad."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer

from fastdni.ops import flat
from fastdni.reference import RULES, OptimizerSettings
from fastdni.training.optimizers import ON_DEVICE_OPTIONS, WIDTH, Optimizers
from fastdni.training.watch import Watch

# What a rule keeps of a parameter, in the order of the sweep.
_KEPT = {
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
}


class Updates:
    """Which optimizer group updates which parameter, and what the optimizers keep of these.

    Args:
        optimizers: whose.
        parameters: those of a sweep, in its order.
        updated: for each of them whether a mask lets it be updated.

    Attributes:
        parameters: those that are updated.
        state: what is kept of them, in the sweep's order.
        groups: of every parameter its row of the settings, or -1.
        reason: why the fused step cannot make these updates; None: it can.
    """

    def __init__(
        self,
        optimizers: Optimizers,
        parameters: list[Tensor],
        updated: Iterable[bool] | None = None,
    ):
        self._optimizers = optimizers
        free = parameters if updated is None else itertools.compress(parameters, updated)
        learning = {id(p) for p in free if p.requires_grad}
        self.groups = groups = [
            optimizers.group_of.get(id(p), -1) if id(p) in learning else -1 for p in parameters
        ]
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
            on_device = any(map(group.get, ON_DEVICE_OPTIONS))
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
                # torch adds a gradient to momentum in another dtype, not to Adam's averages.
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
        fresh = [g >= 0 and id(next(chosen)) in self._fresh for g in self.groups]
        groups = [g + rows if own else g for g, own in zip(self.groups, fresh, strict=True)]
        undamped = [0.0 if i % WIDTH == 4 else x for i, x in enumerate(settings)]
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

    def __init__(self, parameters: list[Tensor], updated: Iterable[bool] | None = None):
        self.parameters: list[Tensor] = []  # not changed themselves
        self.groups, self.state = [], []
        self._pending: list[tuple[Tensor, Tensor]] = []
        free = parameters if updated is None else itertools.compress(parameters, updated)
        learning = {id(p) for p in free if p.requires_grad}
        for parameter in parameters:
            if id(parameter) not in learning:
                self.groups.append(-1)
                continue
            grad = parameter.grad
            adds = grad is not None and grad.layout == torch.strided and grad.is_contiguous()
            adds = adds and grad.dtype == parameter.dtype
            if not adds:
                grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
                self._pending.append((parameter, grad))
            self.groups.append(int(adds))
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
            before = parameter.grad
            if before is not None and before.layout == torch.strided:
                before += grad
            else:
                parameter.grad = grad if before is None else before + grad
