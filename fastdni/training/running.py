"""How a prepared step runs: as one sweep, as that sweep once more, or part by part."""

from operator import attrgetter

import torch
from torch import Tensor

from fastdni import backend, ops
from fastdni.reference import accumulate_dtype
from fastdni.training import arguments
from fastdni.training.criteria import watch_criterion
from fastdni.training.parts import FusedPart, count_versions
from fastdni.training.step import Step
from fastdni.training.structure import Structure
from fastdni.training.updates import Gradients, Updates
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


class _Surroundings:
    """What besides its arguments says how a step is taken, as it was when this was made."""

    def __init__(self, device: torch.device):
        self._device, self._kind = device, device.type
        self._choice, self._cuda = backend.choice(), device.type == "cuda"
        self._is_cast, self._autocast = self._cast_now()
        self._precision = backend.precision(device, self._autocast)

    def _cast_now(self) -> tuple[bool, torch.dtype | None]:
        cast = torch.is_autocast_enabled(self._kind)
        return cast, torch.get_autocast_dtype(self._kind) if cast else None

    def are_same(self) -> bool:
        """Whether it is so now, and nobody records or forbids what happens."""
        return (
            backend.choice() == self._choice
            and torch.is_autocast_enabled(self._kind) is self._is_cast
            and (not self._is_cast or torch.get_autocast_dtype(self._kind) is self._autocast)
            # On a CPU it follows from autocast.
            and not (self._cuda and self._has_another_precision())
            and not torch.is_inference_mode_enabled()
            and not _traced()
        )

    def _has_another_precision(self) -> bool:
        return backend.precision(self._device, self._autocast) != self._precision


# ---- one sweep is all of the step ----


def run_whole(
    structure: Structure, part: FusedPart, step: Step, updates: Updates | Gradients
) -> tuple[Results, bool]:
    """The step in one call; and whether the next one like it may be a `Repetition`."""
    plan = part.plan(len(step.x))
    arguments.keep_apart(step, [*structure.written, *updates.state])
    groups, settings = updates.settings()
    repeatable = (
        plan.can_repeat
        and isinstance(updates, Updates)
        and not updates.first
        and all(step.active)
        and not _traced()
    )
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
    count_versions(updates, plan)
    if step.optimizers is not None:
        step.optimizers.mark_called()
        _drop_gradients(structure.parameters)
    return (loss, output, synthesis_loss), repeatable


class Repetition:
    """The last step, where one sweep with its optimizers was all of it, to be taken again.

    At small sizes the checks in front of a step take as long as the step. While modules, optimizers
    and surroundings are those of the last step, only values of its data can be wrong, and the sweep
    refuses those before it writes.

    Args:
        structure, part, step, updates: of that step; neither its data nor its optimizers are kept.
        target, context: as they were given.
    """

    def __init__(
        self, structure: Structure, part: FusedPart, step: Step, updates: Updates,
        target: Tensor, context: Tensor | None,
    ):  # fmt: skip
        self._part = part
        self._plan = plan = part.plan(len(step.x))
        self._optimizers, self._updates = step.optimizers, updates
        self._criterion, self._labels = step.criterion, step.labels
        self._x = _kind(step.x)
        self._target = _kind(target)
        self._context = None if context is None else _kind(context)
        self._surroundings = _Surroundings(structure.parameters[0].device)
        self._versions = [*updates.parameters, *updates.state, *plan.statistics]
        self._parameters = structure.parameters
        self._no_gradients = Watch()
        self._no_gradients.none(self._parameters, "grad")
        self._no_gradients.done()
        kept = Watch()
        updates.watch(kept)
        for tensor in self._versions:
            kept.tensor(tensor)
        watch_criterion(kept, self._criterion)
        self._kept = kept.done(structure.watch, step.optimizers.watch)
        self._unchanged = self._kept.unchanged

    def is_like(self, x, target, optimizer, criterion, context, update_mask) -> bool:
        """Whether a step is the same but for the values of its data."""
        return (
            update_mask is None
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

    def _read(self) -> bool:
        """The optimizers' numbers as they are now."""
        self._settings = self._optimizers.settings_if_alike()
        return self._settings is not None

    def take(self, caller: str, x: Tensor, target: Tensor, context: Tensor | None) -> Results:
        """Loss, output and synthesis losses of a step that `is_like`."""
        if self._labels is not None:
            target, context = self._labels(target, context)
        output, loss, synthesis_loss = ops.sweep_repeat_(
            self._plan, self._part.input(x), target, context, self._settings, caller,
            self._part.noise(len(x)),
        )  # fmt: skip
        _increment_version(self._versions)
        self._optimizers.mark_called()
        if not self._no_gradients.unchanged():
            _drop_gradients(self._parameters)
        return loss, output, synthesis_loss


# ---- part by part ----


def run_by_parts(structure: Structure, parts: list, step: Step) -> Results:
    """The step in parts: all forward passes, all gradients, then all updates."""
    arguments.keep_apart(step, structure.written)
    optimizers, parameters = step.optimizers, structure.parameters
    if optimizers is None:
        passes = _gradients(structure, parts, step)
        for each in passes:
            each.update(None)
        return _results(structure, passes)
    fused = optimizers.reason is None and _fit(structure, step)
    before = [*map(_grad, parameters)]  # no part of this step
    _drop_gradients(parameters)
    try:
        passes = _gradients(structure, parts, step)
        if not fused:
            for each in passes:
                each.update(None)
        if not (fused and all(each.part.fused for each in passes)):
            optimizers.step()
        if fused:
            for each in passes:
                each.update(optimizers)
    except BaseException:
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        raise
    if fused:
        optimizers.mark_called()
    _drop_gradients(parameters)
    return _results(structure, passes)


def _fit(structure: Structure, step: Step) -> bool:
    """Whether the fused updates can be made of what the optimizers keep, refused where nobody
    could: before anything is written."""
    return Updates(step.optimizers, structure.parameters).reason is None


def _gradients(structure: Structure, parts: list, step: Step) -> list:
    """A pass of every part, with what came from above."""
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
    return passes


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
