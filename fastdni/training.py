"""One step of a decoupled network: its checks, which stages run fused, in what order all of them
run.

The network is a list of parts from the input on (`fastdni.parts`), found anew when something about
the modules has changed.
"""

from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdni import backend, ops, reference
from fastdni.arguments import (
    autocast_dtype,
    check_arguments,
    check_devices,
    check_inputs,
)
from fastdni.optimizers import Optimizers
from fastdni.parts import FusedPart, LocalPart, Step
from fastdni.reference import SweepStage
from fastdni.stages import Unfused, layers_of, parse
from fastdni.synthesizers import BasicSynthesizer
from fastdni.watch import ModuleWatch

GRADIENTS = object()  # in an optimizer's place: no update
_MAX_DIVISIONS = 8  # of a network into parts, by criterion, precision and batch size

_grad = attrgetter("grad")


def _autocast(device: torch.device) -> torch.dtype | None:
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class Repetition:
    """The last step, where one sweep with its optimizers was all of it, to be taken again.

    At small sizes the checks in front of a step take as long as the step. While modules, optimizer
    and surroundings are those of the last step, only its data can be wrong, and the sweep refuses
    that itself before it writes; the way through all checks then finds the words for it.
    """

    def __init__(
        self,
        run: Callable,
        plan: ops.SweepPlan,
        step: Step,
        given: Optimizer,
        device: torch.device,
        watch: ModuleWatch,
    ):
        self._plan = plan
        self._run, self._watch, self._optimizers = run, watch, step.optimizers
        self._rules, self._given = step.optimizers.rules, given
        self._criterion, self._device, self._backend = step.criterion, device, backend.choice()
        self._autocast, self._dtype = _autocast(device), step.x.dtype
        self._precision = backend.precision(device, self._autocast)
        self._batch = len(step.x)

    def take(
        self, x: Tensor, target: Tensor, optimizer: Optimizer, criterion: str, context
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Loss, output and synthesis losses; None where this is not the same step or was refused,
        and nothing has happened then."""
        optimizers, device = self._optimizers, self._device
        if (
            optimizer is not self._given
            or criterion is not self._criterion
            or backend.choice() != self._backend
            or _autocast(device) is not self._autocast
            or backend.precision(device, self._autocast) != self._precision
            or torch.is_inference_mode_enabled()
            or not self._watch.unchanged()
            or not optimizers.unchanged()
        ):
            return None
        try:
            optimizers.read()
            if (
                optimizers.rules is not self._rules
                or optimizers.reason is not None
                or not x.device == target.device == device
                or x.dtype is not self._dtype
                or x.size(0) != self._batch
                or (context is not None and context.device != device)
            ):
                return None
            results = self._run(x, target, context)
        except Exception:
            if self._plan.begun:  # no refusal: a GPU that is out of memory, say
                raise
            return None
        self.finish()
        return results

    def finish(self) -> None:
        """See `_finish`."""
        _finish(self._optimizers, self._watch)


def _finish(optimizers: Optimizers, watch: ModuleWatch) -> None:
    """What an optimizer's own step and `zero_grad` would leave."""
    optimizers.mark_called()
    if not watch.no_gradients():
        _drop_gradients(watch.parameters)


class Trainer:
    """Steps of one network, and what they need to know of it from one to the next."""

    def __init__(self, net: nn.Module):
        self._net = net
        self._watch: ModuleWatch | None = None
        self._parts: dict[tuple, list] = {}
        self._optimizers: Optimizers | None = None
        self._last: Repetition | None = None
        self._whole = True  # whether one sweep was all of the last step

    # ---- what the network is ----

    def look(self, closely: bool = True) -> None:
        """Finds out again what changed since the last look; without `closely`, all but what a sweep
        would refuse of itself: another dtype, device or shape of a parameter."""
        watch = self._watch
        if watch is None or not watch.unchanged() or (closely and not watch.layouts_unchanged()):
            self._watch = ModuleWatch(self._net)
            self._parts, self._optimizers = {}, None
            self._parse()

    def _parse(self) -> None:
        net = self._net
        self.parsed: list[SweepStage | None] = []
        self.reasons: list[str | None] = []
        # What every input synthesizer predicts from; another width would be another tensor.
        made = [m for m in net.input_synthesizers or [] if type(m) is BasicSynthesizer]
        inputs = made[0].input_trigger.in_features if made else None
        for number, stage in enumerate(net.stages):
            top = number == len(net.stages) - 1
            made = None if net.input_synthesizers is None or top else net.input_synthesizers[number]
            try:
                parsed = parse(stage, None if top else net.synthesizers[number], made, inputs)
                self.parsed.append(parsed)
                self.reasons.append(None)
            except Unfused as reason:
                self.parsed.append(None)
                self.reasons.append(str(reason))
        lowest = self.parsed[0]
        if inputs is not None and lowest is not None and lowest.weight.shape[1] != inputs:
            self._refuse(0, "its input is not what the input synthesizers take")
        self._refuse_shared()
        for number in range(1, len(self.parsed)):
            below, own = self.parsed[number - 1], self.parsed[number]
            if below is None or own is None:
                continue
            if below.weight.shape[0] != own.weight.shape[1]:
                self._refuse(number, "its input is not as wide as the output of the stage below")
            elif (below.weight.dtype, below.weight.device) != (own.weight.dtype, own.weight.device):
                self._refuse(number, "its parameters differ in dtype or device from those below")
        if net.bp_lambda > 0:
            self._refuse_all("bp_lambda above 0 needs the order of backpropagation")

    def _refuse(self, number: int, reason: str) -> None:
        if self.reasons[number] is None:
            self.parsed[number], self.reasons[number] = None, reason

    def _refuse_all(self, reason: str) -> None:
        for number in range(len(self.parsed)):
            self._refuse(number, reason)

    def _refuse_shared(self) -> None:
        """Parameters that several stages, or a stage and a synthesizer, have in common."""
        net = self._net
        seen: dict[int, set[int]] = {}
        lists = [net.stages, net.synthesizers, net.input_synthesizers or []]
        owners = [(number, module) for modules in lists for number, module in enumerate(modules)]
        for place, (_, module) in enumerate(owners):
            for parameter in module.parameters():
                seen.setdefault(id(parameter), set()).add(place)
        for places in seen.values():
            if len(places) > 1:
                for place in places:
                    self._refuse(owners[place][0], "it shares parameters with another module")
        for number, stage in enumerate(self.parsed):
            if stage is not None and len({id(p) for p in stage.parameters()}) < len(
                stage.parameters()
            ):
                self._refuse(number, "it shares parameters with another module")

    def _parts_for(self, criterion, dtype: torch.dtype | None, batch: int) -> list:
        """The network as parts, from below: stages that follow each other and are served by the
        same backend are one."""
        name = criterion if isinstance(criterion, str) else None
        # Where every stage is on the CPU the key is the same whatever torch says of GPUs.
        devices = [stage.weight.device for stage in self.parsed if stage is not None]
        asked = next((d for d in devices if d.type == "cuda"), torch.device("cpu"))
        precision = backend.precision(asked, dtype)
        servers = None  # of each stage, where that depends on its size
        if backend.choice() == "auto" and precision in backend.TRITON_FROM:
            servers = tuple(
                None if stage is None else ops.sweep_backend([stage], batch, precision)
                for stage in self.parsed
            )
        choice = (name, dtype, backend.choice(), precision, servers)
        parts = self._parts.get(choice)
        if parts is not None:
            return parts
        parts, run = [], []
        count = len(self.parsed)

        def close(end: int) -> None:
            if run:
                top = end == count
                first = end - len(run)
                of_part = backend.precision(run[0].weight.device, dtype)
                parts.append(FusedPart(list(run), first, name if top else None, of_part))
                run.clear()

        for number, stage in enumerate(self.parsed):
            local = dtype not in (None, torch.bfloat16) or (number == count - 1 and name is None)
            if stage is None or local:
                close(number)
                parts.append(LocalPart(self._net, number))
            else:
                if run and servers is not None and servers[number] != servers[number - 1]:
                    close(number)
                run.append(stage)
        close(count)
        if len(self._parts) == _MAX_DIVISIONS:
            del self._parts[next(iter(self._parts))]
        self._parts[choice] = parts
        return parts

    def explain(self, x: Tensor, optimizer, criterion) -> list[dict]:
        """See `fastdni.explain`."""
        self.look()
        optimizers = self._optimizers_of(optimizer)
        dims, dtype = self._input_dims(x), autocast_dtype(x)
        fused = {
            number: part
            for part in self._parts_for(criterion, dtype, len(x))
            if isinstance(part, FusedPart)
            for number in range(part.first, part.first + len(part.stages))
            if dims[part.first] == 2
        }
        rows = []
        for number, stage in enumerate(self._net.stages):
            reason = self.reasons[number]
            part = fused.get(number)
            served_by = "torch" if part is None else part.backend(len(x))
            kernel = "autograd of the stage" if part is None else "sweep"
            if served_by in ("cuda", "triton"):
                kernel += f": {part.plan(len(x)).launches}"
            if number not in fused and reason is None:
                reason = "the criterion is a callable"
                if dims[number] != 2:
                    reason = "the input of these stages is not (B, K)"
                elif dtype not in (None, torch.bfloat16):
                    reason = f"autocast to {dtype}"
            elif served_by == "triton" and backend.choice() == "auto":
                reason = backend.why_triton(part.precision)
            elif served_by == "reference":
                reason = backend.why_reference(self.parsed[number].weight)
            elif number in fused and optimizers.reason is not None:
                reason = f"its gradients; the update is the optimizer's own: {optimizers.reason}"
            rows.append(
                {
                    "stage": " -> ".join(type(layer).__name__ for layer in layers_of(stage)),
                    "fused": served_by not in ("torch", "reference"),
                    "backend": served_by,
                    "kernel": kernel,
                    "reason": reason or "",
                }
            )
        return rows

    def _input_dims(self, x: Tensor) -> list[int]:
        """The number of dimensions of each stage's input."""
        modes = [(module, module.training) for module in self._net.modules()]
        dims = []
        try:
            self._net.eval()
            with torch.no_grad():
                for stage in self._net.stages:
                    dims.append(x.dim())
                    x = stage(x)
        finally:
            for module, training in modes:
                module.training = training
        return dims

    # ---- a step ----

    def step(
        self,
        x: Tensor,
        target: Tensor,
        optimizer,
        criterion: str | Callable,
        context: Tensor | None,
        update_mask: Iterable[bool] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DecoupledSequential.step`; for GRADIENTS as the optimizer its `backward`.

        Returns:
            Loss, output, synthesis losses.
        """
        if self._last is not None and update_mask is None:
            results = self._last.take(x, target, optimizer, criterion, context)
            if results is not None:
                return results
        self._last = None
        caller = "net.backward" if optimizer is GRADIENTS else "net.step"
        active = check_arguments(self._net, caller, x, target, criterion, context, update_mask)
        step = Step(caller, x, target, criterion, context, active)
        try:
            return self._run(step, optimizer, closely=not self._whole)
        except Exception:
            # Refused, perhaps, because the parameters are no longer those that the parts were made
            # for: net.double(), p.data = ...
            if self._watch is None or self._watch.layouts_unchanged():
                raise
        return self._run(step, optimizer, closely=True)

    def _run(self, step: Step, optimizer, closely: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.look(closely)
        step.optimizers = None if optimizer is GRADIENTS else self._optimizers_of(optimizer)
        watch = self._watch
        device = watch.parameters[0].device if watch.parameters else step.x.device
        check_devices(step, device)
        parts = self._parts_for(step.criterion, autocast_dtype(step.x), len(step.x))
        fused = all(type(part) is FusedPart for part in parts) and step.x.dim() == 2
        self._whole = whole = fused and len(parts) == 1
        if not whole and not closely:
            return self._run(step, optimizer, closely=True)
        if not whole or parts[0].backend(len(step.x)) not in ("cpu", "cuda"):
            check_inputs(self._net, step)
        optimizers = step.optimizers
        run = partial(self._run_whole if whole else self._run_parts, parts)
        if optimizers is None:
            return run(step)
        if not fused or optimizers.reason is not None:
            return self._through_gradients(run, step)
        if not whole:
            results = run(step)
            _finish(optimizers, watch)
            return results
        (part,) = parts
        run = part.whole_step(step)
        results = run(step.x, step.target, step.context)
        last = Repetition(run, part.plan(len(step.x)), step, optimizer, device, watch)
        last.finish()
        plain = all(step.active) and isinstance(optimizer, Optimizer)
        self._last = last if plain and part.backend(len(step.x)) in ("cpu", "cuda") else None
        return results

    @staticmethod
    def _run_whole(parts: list, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        (part,) = parts
        return part.whole_step(step)(step.x, step.target, step.context)

    def _optimizers_of(self, given) -> Optimizers:
        if self._optimizers is None or not self._optimizers.is_current(given):
            self._optimizers = Optimizers(given, list(self._net.parameters()))
        self._optimizers.check() if self._optimizers.reason else self._optimizers.read()
        return self._optimizers

    def _through_gradients(self, run: Callable, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Updates by the optimizers' own `step`, of what no sweep updates."""
        parameters, optimizers = self._watch.parameters, step.optimizers
        before = [*map(_grad, parameters)]  # no part of this step
        _drop_gradients(parameters)
        try:
            if optimizers.reason is not None:
                step.optimizers = None
            results = run(step)
            optimizers.step()
        except BaseException:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
            raise
        _drop_gradients(parameters)
        return results

    def _run_parts(self, parts: list, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        for part in parts:
            if isinstance(part, FusedPart):
                part.check_state(step)
        h = step.x
        left, done = list(parts), []
        with torch.enable_grad():
            while left:
                part = left.pop(0)
                if isinstance(part, FusedPart) and not part.takes(h, step):  # (B, T, K), say
                    numbers = range(part.first, part.first + len(part.stages))
                    left = [LocalPart(self._net, number) for number in numbers] + left
                    continue
                h = part.forward(h, step)
                done.append(part)
            gradient = None
            for part in reversed(done):
                gradient = part.backward(gradient, step)
        losses = [loss for part in done for loss in part.synthesis_losses]
        wide = reference.accumulate_dtype(h.dtype)
        synthesis_loss = (
            torch.stack([loss.to(wide) for loss in losses]) if losses else h.new_empty(0)
        )
        if self._net.input_synthesizers is not None:
            made = [loss.to(wide) for part in done for loss in part.input_losses]
            synthesis_loss = torch.stack([synthesis_loss, torch.stack(made)])
        loss = done[-1].loss
        for part in done:
            part.forget()
        return loss, h, synthesis_loss


def _drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
