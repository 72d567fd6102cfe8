"""Notices what changed between two steps: modules, hooks, parameters, optimizers."""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter

import torch.nn.modules.module as _module
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizer

from fastdni import _C

_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_MODULE_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_OPTIMIZER_HOOKS = (
    _optimizer._global_optimizer_pre_hooks,
    _optimizer._global_optimizer_post_hooks,
)
# What a step may find changed of a parameter; `grad` is None between steps.
_marks = attrgetter("grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_layout = attrgetter("dtype", "device", "shape")


class _Watch:
    """Whether containers hold the same objects: those at given keys, and as many as there were."""

    def __init__(self, entries: list[tuple[dict | list, object]], sized: Iterable[dict | list]):
        items = [
            (box, key, box.get(key) if isinstance(box, dict) else box[key]) for box, key in entries
        ]
        sizes = [(box, len(box)) for box in sized]
        self._kept = items, sizes  # the compiled watch holds no references of its own
        self.unchanged = _C.Watch(items, sizes).unchanged


class ModuleWatch:
    """Modules, down to their parameters, as they were when this was made."""

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        entries: list[tuple[dict | list, object]] = []
        sized = list(_GLOBAL_MODULE_HOOKS)
        for module in modules:
            own = vars(module)
            entries.append((own, "forward"))
            if isinstance(module, nn.BatchNorm1d):
                entries += [(own, name) for name in ("training", "momentum", "eps")]
            for kind in ("_modules", "_parameters", "_buffers"):
                entries += [(own[kind], name) for name in own[kind]]
            sized += [own["_modules"], *(own[name] for name in _MODULE_HOOKS)]
        self.unchanged = _Watch(entries, sized).unchanged
        self.parameters = list(
            {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
        )
        self._marks = [(None, *_marks(p)[1:]) for p in self.parameters]
        self._layouts = self._layouts_now()
        self.has_gradients = False

    def parameters_unchanged(self) -> bool:
        """Whether no parameter was frozen, thawed or hooked; also sets `has_gradients`."""
        marks = [*map(_marks, self.parameters)]
        self.has_gradients = marks != self._marks
        return not self.has_gradients or [m[1:] for m in marks] == [m[1:] for m in self._marks]

    def layouts_unchanged(self) -> bool:
        """Whether all parameters have the dtype, device and shape they had (a slower look, for when
        something has failed)."""
        return self._layouts_now() == self._layouts

    def _layouts_now(self) -> list:
        tensors = self.parameters
        return [*map(_layout, tensors), *map(Tensor.is_contiguous, tensors)]


class OptimizerWatch:
    """Optimizers: their groups, the parameters in them, hooks and options named.

    Args:
        optimizers: to be watched.
        options: keys of the groups.
    """

    def __init__(self, optimizers: list[Optimizer], options: tuple[str, ...]):
        entries: list[tuple[dict | list, object]] = []
        sized = list(GLOBAL_OPTIMIZER_HOOKS)
        for optimizer in optimizers:
            own, groups = vars(optimizer), optimizer.param_groups
            entries += [(own, name) for name in ("param_groups", "step", *OPTIMIZER_HOOKS)]
            sized += [groups, *(own[name] for name in OPTIMIZER_HOOKS)]
            entries += [(groups, i) for i in range(len(groups))]
            for group in groups:
                entries += [(group, name) for name in ("params", *options)]
                entries += [(group["params"], i) for i in range(len(group["params"]))]
                sized.append(group["params"])
        self.unchanged = _Watch(entries, sized).unchanged


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step calls hooks."""
    own = [getattr(optimizer, name) for name in OPTIMIZER_HOOKS]
    return any(chain(own, GLOBAL_OPTIMIZER_HOOKS))
