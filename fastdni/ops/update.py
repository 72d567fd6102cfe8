"""update: parameters by their gradients, all of them in one call: all are updated, or none.

The equations are those of `fastdni.reference.optimizer_update`.
"""

import itertools

import torch
from torch import Tensor

from fastdni import backend, reference
from fastdni.reference import RULES, OptimizerSettings

_DEVICES = backend.kernel_devices("update_")
_update = torch.ops.fastdni.update_.default
_GRADIENT = RULES.index("gradient")  # the last rule that leaves the parameter itself alone
_WIDTH = len(OptimizerSettings._fields)
_library = torch.library.Library("fastdni", "IMPL")
_library.impl("update_", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdni::update_")
def _(caller, parameters, gradients, state, groups, settings):
    return None


def update_is_compiled(parameters: list[Tensor]) -> bool:
    """Whether a compiled kernel updates these parameters: of one dtype, on the CPU."""
    kinds = {(p.dtype, p.device.type) for p in parameters}
    return len(kinds) == 1 and backend.has_cpu_kernel(parameters[0], _DEVICES)


def update_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    caller: str = "update",
) -> None:
    """Updates parameters and what their optimizers keep, in place.

    Args:
        parameters: of one dtype; `gradients`: theirs.
        state, groups, settings: who updates which parameter: see `reference.assigned`.
        caller: whom error messages name.

    Raises:
        RuntimeError: a shape, dtype or state does not fit; nothing has been written then.
    """
    if not update_is_compiled(parameters):
        return reference.update_(parameters, gradients, state, groups, settings)
    _update(caller, parameters, gradients, state, groups, settings)
    mark_updated(parameters, state, groups, settings)


def mark_updated(
    parameters: list[Tensor], state: list[Tensor], groups: list[int], settings: list[float]
) -> None:
    """Raises the counters that autograd, and others, look at: a raw in-place op leaves them."""
    written = [g >= 0 and settings[g * _WIDTH] > _GRADIENT for g in groups]
    torch._C._increment_version([*state, *itertools.compress(parameters, written)])
