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
_NORM_OPTIONS = ("training", "momentum", "eps", "track_running_stats")
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
_PARAMETER_MARKS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_layout = attrgetter("dtype", "device", "shape")


class _Watch:
    """Whether dicts, lists and other objects hold given objects at keys, indices and attributes,
    and containers as many as there were.

    Args:
        items: (container, key, what it holds).
        sized: containers.
    """

    def __init__(self, items: list[tuple], sized: Iterable[dict | list] = ()):
        sizes = [(container, len(container)) for container in sized]
        self._kept = items, sizes  # the compiled watch holds no references of its own
        self.unchanged = _C.Watch(items, sizes).unchanged


def _now(container: object, key: object) -> tuple:
    """An item of a watch: what the container holds at the moment."""
    if isinstance(container, dict):
        return container, key, container.get(key)
    return (
        container,
        key,
        container[key] if isinstance(container, list) else getattr(container, key),
    )


class ModuleWatch:
    """Modules, down to their parameters, as they were when this was made.

    Attributes:
        unchanged: () -> whether modules, hooks, buffers and parameters are the same, and no
            parameter was frozen, thawed or hooked.
        no_gradients: () -> whether every `p.grad` is None.
    """

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        entries: list[tuple[object, object]] = [(vars(root), n) for n in ("bp_lambda", "training")]
        sized = list(_GLOBAL_MODULE_HOOKS)
        for module in modules:
            own = vars(module)
            if not isinstance(own.get("_modules"), dict):  # a scripted module
                continue
            entries.append((own, "forward"))
            if isinstance(module, nn.BatchNorm1d):
                entries += [(own, name) for name in _NORM_OPTIONS]
            for kind in ("_modules", "_parameters", "_buffers"):
                entries += [(own[kind], name) for name in own[kind]]
            sized += [own["_modules"], *(own[name] for name in _MODULE_HOOKS)]
        self.parameters = list({id(p): p for p in root.parameters()}.values())
        entries += [(p, name) for p in self.parameters for name in _PARAMETER_MARKS]
        hooks = [getattr(p, name) for p in self.parameters for name in _PARAMETER_MARKS[1:]]
        sized += [found for found in hooks if found is not None]
        self._watch = _Watch([_now(*entry) for entry in entries], sized)
        self.unchanged = self._watch.unchanged
        self._no_gradients = _Watch([(p, "grad", None) for p in self.parameters])
        self.no_gradients = self._no_gradients.unchanged
        self._layouts = self._layouts_now()

    def layouts_unchanged(self) -> bool:
        """Whether all parameters have the dtype, device and shape they had (a slower look, for when
        something has failed)."""
        return self._layouts_now() == self._layouts

    def _layouts_now(self) -> list:
        tensors = self.parameters
        return [*map(_layout, tensors), *map(Tensor.is_contiguous, tensors)]


class OptimizerWatch:
    """Optimizers: their groups, the parameters in them, hooks and options named.

    Attributes:
        unchanged: () -> whether all that is the same.

    Args:
        optimizers: to be watched.
        options: keys of the groups; a learning rate that is a tensor is watched besides.
    """

    def __init__(self, optimizers: list[Optimizer], options: tuple[str, ...]):
        entries: list[tuple[object, object]] = []
        sized = list(GLOBAL_OPTIMIZER_HOOKS)
        for optimizer in optimizers:
            own, groups = vars(optimizer), optimizer.param_groups
            entries += [(own, name) for name in ("param_groups", "step", *OPTIMIZER_HOOKS)]
            sized += [groups, *(own[name] for name in OPTIMIZER_HOOKS)]
            entries += [(groups, i) for i in range(len(groups))]
            for group in groups:
                of_tensors = [n for n in ("lr",) if isinstance(group.get(n), Tensor)]
                entries += [(group, name) for name in ("params", *options, *of_tensors)]
                if isinstance(group["params"], list):
                    entries += [(group["params"], i) for i in range(len(group["params"]))]
                    sized.append(group["params"])
        self._watch = _Watch([_now(*entry) for entry in entries], sized)
        self.unchanged = self._watch.unchanged


class StateWatch:
    """What optimizers keep of parameters.

    Args:
        kept: (optimizer, parameter, keys of its state, further tensors).

    Attributes:
        tensors: the state, in that order.
        unchanged: () -> whether it is still these tensors that the optimizers keep.
    """

    def __init__(self, kept: list[tuple[Optimizer, Tensor, tuple[str, ...], list]]):
        items = []
        for optimizer, parameter, keys, _ in kept:
            if not keys:
                continue
            entry = optimizer.state[parameter]
            items += [(vars(optimizer), "state", optimizer.state)]
            items += [(optimizer.state, parameter, entry)]
            items += [(entry, key, entry[key]) for key in keys]
        self.tensors = []
        for optimizer, parameter, keys, further in kept:
            self.tensors += [*(optimizer.state[parameter][key] for key in keys), *further]
        self._watch = _Watch(items)
        self.unchanged = self._watch.unchanged


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step calls hooks."""
    own = [getattr(optimizer, name) for name in OPTIMIZER_HOOKS]
    return any(chain(own, GLOBAL_OPTIMIZER_HOOKS))
