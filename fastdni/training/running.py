"""How a prepared step runs: as one sweep, as that sweep once more, or part by part."""

from collections.abc import Callable
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

from fastdni import backend, ops
from fastdni.reference import accumulate_dtype
from fastdni.training import arguments
from fastdni.training.criteria import watch_criterion
from fastdni.training.optimizers import Optimizers
from fastdni.training.parts import FusedPart
from fastdni.training.step import Step
from fastdni.training.structure import Structure
from fastdni.training.updates import Gradients, Updates, updates_of
from fastdni.training.watch import Watch

Results = tuple[Tensor, Tensor, Tensor]  # loss, output, synthesis losses

_increment_version = torch._C._increment_version
_grad = attrgetter("grad")
_kind = attrgetter("shape", "dtype", "device", "layout")


def _drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _traced() -> bool:
    """Whether somebody records what ops do. A repeated step does not say what it writes."""
    return _dispatch_modes() > 0 or _transform() is not None


_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


class Surroundings:
    """What besides its arguments says how a step is taken, as it was when this was made.

    Attributes:
        is_cast: whether autocast was on.
    """

    def __init__(self, device: torch.device):
        self._device, self._kind = device, device.type
        self._choice, self._cuda = backend.choice(), device.type == "cuda"
        self.is_cast, self._autocast = self._cast_now()
        self._precision = backend.precision(device, self._autocast)

    def _cast_now(self) -> tuple[bool, torch.dtype | None]:
        cast = torch.is_autocast_enabled(self._kind)
        return cast, torch.get_autocast_dtype(self._kind) if cast else None

    def are_same(self) -> bool:
        """Whether it is so now, and nobody records or forbids what happens."""
        return (
            backend.choice() == self._choice
            and torch.is_autocast_enabled(self._kind) is self.is_cast
            and (not self.is_cast or torch.get_autocast_dtype(self._kind) is self._autocast)
            # On a CPU it follows from autocast.
            and not (self._cuda and self._has_another_precision())
            and not torch.is_inference_mode_enabled()
            and not _traced()
        )

    def _has_another_precision(self) -> bool:
        return backend.precision(self._device, self._autocast) != self._precision


@contextmanager
def gradients_apart(parameters: list[Tensor]):
    """`p.grad` for the step alone: what was there before is no part of it, and is back if the step
    fails."""
    before = [*map(_grad, parameters)]
    _drop_gradients(parameters)
    try:
        yield
    except BaseException:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        raise
    _drop_gradients(parameters)


# ---- one sweep is all of the step ----


def run_whole(
    structure: Structure, part: FusedPart, step: Step
) -> tuple[Results, "Repetition | None"]:
    """The step as one sweep; and what the next one like it may be."""
    optimizers = step.optimizers
    if optimizers is None:
        return _sweep(structure, part, step, part.updates(step, None), False), None
    updates = part.updates(step, optimizers) if optimizers.reason is None else None
    if updates is None or updates.reason is not None:
        with gradients_apart(structure.parameters):
            results = _sweep(structure, part, step, part.updates(step, None), False)
            optimizers.step()
        return results, None
    repeatable = part.plan(len(step.x)).compiled and not updates.first and not _traced()
    results = _sweep(structure, part, step, updates, repeatable)
    optimizers.mark_called()
    _drop_gradients(structure.parameters)
    return results, Repetition(structure, part, step, updates) if repeatable else None


def _sweep(
    structure: Structure, part: FusedPart, step: Step, updates: Updates | Gradients,
    repeatable: bool,
) -> Results:  # fmt: skip
    plan = part.plan(len(step.x))
    if not plan.compiled:  # which keeps its data apart itself
        arguments.keep_apart(step, [*structure.written, *updates.state])
    groups, settings = updates.settings()
    taken = plan.steps
    try:
        updates.put_in_place()
        output, loss, synthesis_loss = ops.sweep_(
            plan, part.input(step.x), step.target, step.context, updates.state, groups, settings,
            part.active(step), step.caller, repeatable, part.noise(len(step.x)),
        )  # fmt: skip
    except BaseException:
        if plan.steps == taken:
            updates.take_back()
        raise
    _increment_version([*updates.written, *plan.statistics])
    updates.finish()
    return loss, output, synthesis_loss


class Repetition:
    """The last step, where one sweep with its optimizers was all of it, to be taken again.

    At small sizes the checks in front of a step take as long as the step. While modules, optimizers
    and surroundings are those of the last step, only values of its data can be wrong, and the sweep
    refuses those before it writes.

    Args:
        structure, part, step, updates: of that step; neither its data nor its optimizers are kept.
    """

    def __init__(self, structure: Structure, part: FusedPart, step: Step, updates: Updates):
        self._part, self._prepares = part, part.prepares(step.x)
        self._plan = plan = part.plan(len(step.x))
        self._optimizers = step.optimizers
        self._criterion, self._labels = step.criterion, step.labels
        self._x = _kind(step.x)
        target, context = step.given
        self._target = _kind(target)
        self._context = None if context is None else _kind(context)
        self._mask = step.active[:-1]
        self._surroundings = Surroundings(structure.parameters[0].device)
        self._versions = [*updates.written, *plan.statistics]
        self._parameters = structure.parameters
        self._no_gradients = Watch()
        self._no_gradients.none(self._parameters, "grad")
        self._no_gradients.done()
        self._watch = Watch()
        for tensor in self._versions:
            self._watch.tensor(tensor)
        watch_criterion(self._watch, self._criterion)
        optimizers = step.optimizers
        self._watch.done(structure.watch, optimizers.watch, optimizers.kept().watch)
        self._unchanged = self._watch.unchanged

    def is_like(self, x, target, optimizer, criterion, context, update_mask) -> bool:
        """Whether a step is the same but for the values of its data."""
        return (
            (all(self._mask) if update_mask is None else self._has_mask(update_mask))
            and criterion is self._criterion
            and type(x) is type(target) is Tensor
            and _kind(x) == self._x
            and _kind(target) == self._target
            and (
                context is self._context  # None
                or (type(context) is Tensor and _kind(context) == self._context)
            )
            and self._surroundings.are_same()
            and self._optimizers.are(optimizer)
            and self._unchanged()
            and self._plan.can_be_repeated()
            and self._read()
        )

    def _has_mask(self, update_mask) -> bool:
        # Anything else may be there to be looked through once, or to be refused.
        given = type(update_mask) in (list, tuple) and {*map(type, update_mask)} == {bool}
        return given and [*update_mask] == self._mask

    def _read(self) -> bool:
        """The optimizers' numbers as they are now."""
        self._settings = self._optimizers.settings_if_alike()
        return self._settings is not None

    def take(self, caller: str, x: Tensor, target: Tensor, context: Tensor | None) -> Results:
        """Loss, output and synthesis losses of a step that `is_like`."""
        if self._labels is not None:
            target, context = self._labels(target, context)
        noise = ()
        if self._prepares:
            x, noise = self._part.input(x), self._part.noise(self._plan.batch)
        output, loss, synthesis_loss = ops.sweep_repeat_(
            self._plan, x, target, context, self._settings, caller, noise
        )
        _increment_version(self._versions)
        self._optimizers.mark_called()
        if not self._no_gradients.unchanged():
            _drop_gradients(self._parameters)
        return loss, output, synthesis_loss


# ---- part by part ----


def run_by_parts(structure: Structure, parts: list, step: Step) -> Results:
    """The step in parts: all forward passes, all gradients, then all updates."""
    arguments.keep_apart(step, structure.written)
    if step.optimizers is None:
        passes, _ = begin_parts(structure, parts, step)
        for each in passes:
            each.update(None)
        return _results(structure, passes)
    with updating(structure, step) as update:
        passes, _ = begin_parts(structure, parts, step)
        update(passes)
    return _results(structure, passes)


@contextmanager
def updating(structure: Structure, step: Step, reduce: Callable | None = None):
    """Within it are the gradients of a step, and then, by the call that it gives, all updates.

    Args:
        reduce: called with the parameters when their gradients are in `p.grad`: those of other
            processes are to be joined.
    """
    optimizers = step.optimizers
    fused = optimizers.reason is None and _fit(structure, step)

    def update(passes: list) -> None:
        if fused and reduce is None and not ops.update_is_compiled(structure.parameters):
            if not all(each.part.fused for each in passes):
                optimizers.step()
            for each in passes:
                each.update(optimizers)
        else:
            for each in passes:
                each.update(None)
            if reduce is not None:
                reduce(structure.parameters)
            update_by_gradients(structure, optimizers)
        if fused:
            optimizers.mark_called()

    with gradients_apart(structure.parameters):
        yield update


def _fit(structure: Structure, step: Step) -> bool:
    """Whether the fused updates can be made of what the optimizers keep, refused where nobody
    could: before anything is written."""
    return updates_of(step.optimizers, structure, structure.parameters).reason is None


def update_by_gradients(structure: Structure, optimizers: Optimizers) -> None:
    """Every update by what is in p.grad; where it can be in one call: nothing from outside comes
    between them then."""
    if optimizers.reason is not None or not _update_at_once(structure, optimizers):
        optimizers.step()


def _update_at_once(structure: Structure, optimizers: Optimizers) -> bool:
    """Whether all of it could be done in one call; otherwise nothing has been written."""
    parameters = structure.parameters
    gradients = [*map(_grad, parameters)]
    pairs = [*zip(parameters, gradients, strict=True)]
    if not ops.update_is_compiled(parameters):
        return False
    if not all(type(p) is nn.Parameter and (g is None or _is_like(g, p)) for p, g in pairs):
        return False
    found = tuple(g is not None for g in gradients)
    updates = updates_of(optimizers, structure, parameters, found)
    if updates.reason is not None:
        return False
    anything = [p if g is None else g for p, g in pairs]
    updates.run(lambda *how: ops.update_(parameters, anything, *how, optimizers.caller))
    return True


def _is_like(gradient: Tensor, parameter: Tensor) -> bool:
    return gradient.layout == torch.strided and gradient.dtype == parameter.dtype


def begin_parts(structure: Structure, parts: list, step: Step) -> tuple[list, Tensor | None]:
    """A pass of every part, with what came from above; and the gradient of the step's input."""
    h, left, passes = step.x, list(parts), []
    with torch.enable_grad():
        while left:
            part = left.pop(0)
            if part.fused and not part.takes(h, step.x):  # (B, T, K), say
                left = [structure.local_part(number) for number in part.numbers] + left
                continue
            passes.append(part.begin(h, step))
            h = passes[-1].output
        gradient = None
        for each in reversed(passes):
            gradient = each.backward(gradient)
    return passes, gradient


def _results(structure: Structure, passes: list) -> Results:
    output = passes[-1].output
    wide = accumulate_dtype(output.dtype)

    def stacked(losses: list[Tensor]) -> Tensor:
        return torch.stack([x.to(wide) for x in losses]) if losses else output.new_empty(0)

    synthesis_loss = stacked([x for each in passes for x in each.synthesis_losses])
    if structure.input_synthesizers:
        of_inputs = stacked([x for each in passes for x in each.input_losses])
        synthesis_loss = torch.stack([synthesis_loss, of_inputs])
    return passes[-1].loss, output, synthesis_loss
