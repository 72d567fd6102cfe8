"""Notices what changed between two steps: modules, hooks, parameters, optimizers.

A watch is a list of facts, "this container holds that", from what the caller hands in down to what
hangs below it. It is looked through in that order, so that nothing is read that the facts before
have not found alive; `csrc/watch.h` does it in a microsecond.

A watch must not keep alive what it looks at from outside: the network and the optimizers, and what
could refer to them. Their own dictionaries are therefore borrowed (`owned=False`): whoever asks has
them in his hands.
"""

from collections.abc import Iterable
from operator import attrgetter

import torch.nn.modules.module as _module
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizer

from fastdni import _C

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
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
# What modules compute by, besides parameters and buffers; and those that compute the same whatever
# their mode.
_OPTIONS = {
    nn.BatchNorm1d: ("momentum", "eps", "track_running_stats", "num_features"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Dropout: ("p", "inplace"),
    nn.RNNBase: ("dropout", "mode"),
}
_FIXED_MODE = (nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Sequential)
_PARAMETER_MARKS = ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_form = attrgetter("dtype", "device", "shape")


def layouts(tensors: list[Tensor]) -> list:
    """Of each tensor what `tensor.data = other` may change, and a sweep must know."""
    return [*map(_form, tensors), *map(Tensor.is_contiguous, tensors)]


class Watch:
    """Facts, and whether they still hold: `unchanged()`."""

    def __init__(self):
        self._facts: list[tuple] = []
        self._owned: list = []
        self.unchanged = None

    def items(self, container: dict | list, keys: Iterable, owned: bool = True) -> None:
        """What a dict holds at keys (nothing counts as None), or a list at indices."""
        for key in keys:
            found = container.get(key) if isinstance(container, dict) else container[key]
            self._facts.append(("item", container, key, found))
            self._owned += [key, found]
        if owned:
            self._owned.append(container)

    def attributes(self, thing: object, names: Iterable[str]) -> None:
        """What an object's attributes are."""
        for name in names:
            found = getattr(thing, name)
            self._facts.append(("attribute", thing, name, found))
            self._owned += [thing, found]

    def size(self, container: dict | list) -> None:
        """How many things a container holds."""
        self._facts.append(("size", container, None, len(container)))

    def kind(self, thing: object, owned: bool = True) -> None:
        """What class an object is of."""
        self._facts.append(("type", thing, None, type(thing)))
        self._owned += [thing, type(thing)] if owned else [type(thing)]

    def tensor(self, tensor: Tensor) -> None:
        """Where an object's tensor is: torch.utils.swap_tensors puts another one into it."""
        self._facts.append(("tensor", tensor, None, tensor._cdata))
        self._owned.append(tensor)

    def none(self, things: Iterable, name: str) -> None:
        """That an attribute of objects is None."""
        for thing in things:
            self._facts.append(("attribute", thing, name, None))
            self._owned.append(thing)

    def done(self, *before: "Watch") -> "Watch":
        """From here on the watch can be asked, for the facts of others before its own."""
        self._compiled = _C.Watch(self._facts)
        if before:
            watches = [*before, self]
            self._owned.append(watches[:-1])
            self._compiled = _C.Watch.joined([each._compiled for each in watches])
        self.unchanged = self._compiled.unchanged
        # The compiled watch holds no references: a cycle through it would never be collected.
        self._facts = []
        return self


def watch_modules(root: nn.Module, options: Iterable[str]) -> Watch:
    """Modules, from a network down to its parameters.

    Args:
        root: the network; borrowed.
        options: attributes of the network that its steps depend on.
    """
    watch = Watch()
    for hooks in _GLOBAL_MODULE_HOOKS:
        watch.size(hooks)
    watch.items(vars(root), (*options, "_modules"), owned=False)
    children = vars(root)["_modules"]
    watch.items(children, children)
    watch.size(children)
    parameters: dict[int, Tensor] = {}
    classes: set[type] = set()
    for child in filter(None, children.values()):
        for module in child.modules():
            watch.kind(module)
            if not isinstance(vars(module).get("_modules"), dict):  # a scripted module
                continue
            _watch_module(watch, module)
            classes.add(type(module))
            parameters |= {id(p): p for p in module._parameters.values() if p is not None}
    for kind in classes:
        watch.attributes(kind, ("forward",))
    for parameter in parameters.values():
        watch.attributes(parameter, _PARAMETER_MARKS)
        for name in _PARAMETER_MARKS[1:]:
            if (hooks := getattr(parameter, name)) is not None:
                watch.size(hooks)
    return watch.done()


def _watch_module(watch: Watch, module: nn.Module) -> None:
    own = vars(module)
    for kind in ("_modules", "_parameters", "_buffers"):
        if own[kind]:
            watch.items(own, (kind,))
            watch.items(own[kind], own[kind])
        watch.size(own[kind])
    if type(module) is nn.ModuleList:  # which nobody calls
        return
    watch.items(own, ("forward", *MODULE_HOOKS))
    for name in MODULE_HOOKS:
        watch.size(own[name])
    if not isinstance(module, _FIXED_MODE):
        watch.items(own, ("training",))
    for kind, options in _OPTIONS.items():
        if isinstance(module, kind):
            watch.items(own, options)


def watch_optimizers(optimizers: list[Optimizer], options: Iterable[str]) -> Watch:
    """Optimizers, borrowed: their hooks, state, groups, the parameters and options in these.

    Args:
        optimizers: each `can_be_watched`.
        options: keys of the groups; a learning rate that is a tensor is watched besides.
    """
    watch = Watch()
    for hooks in GLOBAL_OPTIMIZER_HOOKS:
        watch.size(hooks)
    for optimizer in optimizers:
        own = vars(optimizer)
        watch.kind(optimizer, owned=False)
        watch.attributes(type(optimizer), ("step",))
        # What stands for `step` may refer to the optimizer: it is not to be held.
        watch._facts.append(("item", own, "step", own.get("step")))
        watch.items(own, ("param_groups", "state", *OPTIMIZER_HOOKS), owned=False)
        for name in OPTIMIZER_HOOKS:
            watch.size(own[name])
        groups = own["param_groups"]
        watch.items(groups, range(len(groups)))
        watch.size(groups)
        for group in groups:
            of_tensors = ("lr",) if isinstance(group.get("lr"), Tensor) else ()
            watch.items(group, ("params", *options, *of_tensors))
            if isinstance(group["params"], list):
                watch.items(group["params"], range(len(group["params"])))
                watch.size(group["params"])
    return watch.done()


def can_be_watched(optimizer: Optimizer) -> bool:
    """Whether what an optimizer works with is its own: a wrapper may take it from another."""
    own = vars(optimizer)
    ordinary = all(name in own for name in ("param_groups", "state", *OPTIMIZER_HOOKS))
    return ordinary and isinstance(own["param_groups"], list)


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step calls hooks."""
    own = [getattr(optimizer, name, None) for name in OPTIMIZER_HOOKS]
    return any((*own, *GLOBAL_OPTIMIZER_HOOKS))
