"""What optimizers keep of their parameters, as the sweep wants it: looked for once, and again when
something else is there."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer

from fastdni.reference import RULES
from fastdni.training.watch import Watch, layouts

# Options that say where Adam's step count lives.
ON_DEVICE_OPTIONS = ("capturable", "fused")
# What a rule keeps of a parameter, in the order of the sweep.
_KEYS = {
    "sgd": (),
    "sgd_momentum": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "step"),
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
}


class Entry(NamedTuple):
    """What is kept of one parameter.

    Attributes:
        state: the optimizer's whole state, in which it has its place.
        group: that of the parameter.
        keys: of its tensors, in the sweep's order.
        tensors: these; none where the optimizer's first step would make them.
        further: a learning rate in a GPU's memory, which goes along.
        misfit: why no step can be taken with it; `reason`: why no fused one can.
    """

    state: dict
    group: dict
    keys: tuple[str, ...]
    tensors: list[Tensor]
    further: list[Tensor]
    misfit: str | None
    reason: str | None

    @property
    def is_missing(self) -> bool:
        """Whether it has to be made."""
        return bool(self.keys) and not self.tensors and self.misfit is None

    def made(self, parameter: Tensor) -> dict[str, Tensor]:
        """What the optimizer's own first step would make of it, before it is taken."""
        zeros = {key: torch.zeros_like(parameter).detach() for key in self.keys if key != "step"}
        if "step" not in self.keys:
            return zeros
        dtype = _torch_optimizer._get_scalar_dtype(self.group.get("fused"))
        on_device = any(map(self.group.get, ON_DEVICE_OPTIONS))
        device = parameter.device if on_device else "cpu"
        return {"step": torch.zeros((), dtype=dtype, device=device)} | zeros


class Kept:
    """Of every parameter that optimizers hold what they keep: true while `watch` is unchanged.

    Args:
        optimizers: an `Optimizers` whose updates can be fused.

    Attributes:
        of: the entries, by the parameters' ids.
        reason: why no fused step can be taken, or None.
        updates: what `updates_of` has made of it.
    """

    def __init__(self, optimizers):
        self.of: dict[int, Entry] = {}
        self.updates: dict = {}
        self._tensors: list[Tensor] = []
        self.watch = Watch()
        places: list[int] = []
        for number, parameter in optimizers.held:
            state = optimizers.owner_of[number]().state
            keys = _KEYS[RULES[int(optimizers.rules[number])]]
            rate = optimizers.rates[number]
            further = [] if rate is None else [rate]
            # `get`: a look into a defaultdict must not leave an entry behind.
            kept = (state.get(parameter) or {}) if keys else {}
            tensors, misfit, reason = _found(parameter, keys, kept)
            entry = Entry(state, optimizers.groups[number], keys, tensors, further, misfit, reason)
            self.of[id(parameter)] = entry
            self._tensors += tensors
            places += [tensor.data_ptr() for tensor in tensors if tensor.numel() > 0]
            if keys:
                self.watch.items(state, (parameter,))
                if parameter in state:
                    self.watch.items(state[parameter], keys)
        shared = len(set(places)) < len(places)
        self.reason = "parameters have optimizer state in common" if shared else None
        self.watch.done()
        self._layouts = layouts(self._tensors)

    def is_current(self) -> bool:
        """Whether it is so, and no tensor was given other data of another form."""
        return self.watch.unchanged() and layouts(self._tensors) == self._layouts


def _found(parameter: Tensor, keys: tuple, kept: dict) -> tuple[list, str | None, str | None]:
    """The tensors, why no step can be taken with them, why no fused one can."""
    missing = not kept or (keys == ("momentum_buffer",) and kept.get("momentum_buffer") is None)
    if not keys or missing:
        return [], None, None
    if not all(isinstance(kept.get(key), Tensor) for key in keys):
        return [], f"optimizer state must hold {', '.join(keys)}, got {', '.join(kept)}", None
    reason = None
    for key in keys:
        tensor = kept[key]
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
            misfit = (
                f"a parameter's optimizer state {key} must be {parameter.dtype} "
                f"{tuple(parameter.shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
            return [], misfit, None
        if not fits:
            reason = f"a parameter's optimizer state {key} is not contiguous in its dtype"
    return [kept[key] for key in keys], None, reason
