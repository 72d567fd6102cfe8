"""One step of a decoupled network: which stages run fused, in what order all of them run.

A network is a list of parts from the input on: a `_FusedPart` is consecutive stages that one sweep
runs, a `_LocalPart` is a single stage that takes local autograd. `forward` of each part is called
from below, `backward` from above, with the gradient that the part above found at its input. When
the sweep runs the whole network, that is one call.
"""

from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdni import backend, ops, reference
from fastdni.optimizers import Binding, Optimizers
from fastdni.reference import SweepStage
from fastdni.stages import Unfused, layers_of, parse
from fastdni.synthesizers import BasicSynthesizer
from fastdni.watch import ModuleWatch

CRITERIA = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
GRADIENTS = object()  # in an optimizer's place: no update
_MAX_PLANS = 8  # of one part, by batch size: an epoch has one or two

_grad = attrgetter("grad")


class _Step:
    """What the parts of one step have in common."""

    __slots__ = ("caller", "x", "target", "criterion", "context", "active", "optimizers")

    def __init__(self, caller, x, target, criterion, context, active):
        self.caller, self.x, self.target, self.criterion = caller, x, target, criterion
        self.context, self.active = context, active
        self.optimizers: Optimizers | None = None  # None: gradients go to p.grad


class _FusedPart:
    """Consecutive stages that a sweep runs.

    Args:
        stages: theirs, as the sweep sees them.
        first: the number of the lowest in the network.
        criterion: name of the network's, if the topmost stage is among them.
        bfloat16: see `ops.SweepPlan`.
    """

    def __init__(self, stages: list[SweepStage], first: int, criterion: str | None, bfloat16: bool):
        self.stages, self.first = stages, first
        self._how = {
            "criterion": criterion,
            "input_gradient": first > 0,
            "separate_input": first > 0 and stages[0].input_synthesizer is not None,
            "bfloat16": bfloat16,
        }
        self._plans: dict[int, ops.SweepPlan] = {}
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._rules: list[str] | None = None

    def plan(self, batch: int) -> ops.SweepPlan:
        """The plan of a batch size, made when it is first met."""
        plan = self._plans.get(batch)
        if plan is None:
            if len(self._plans) == _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[batch] = ops.SweepPlan(self.stages, batch, **self._how)
        return plan

    def _active(self, step: _Step) -> list[int]:
        return step.active[self.first : self.first + len(self.stages) + 1]

    def binding(self, plan: ops.SweepPlan, step: _Step) -> "Binding | _GradientBinding":
        """Who updates which parameter."""
        active = self._active(step)
        optimizers = step.optimizers
        if optimizers is None:
            updated = [bool(active[s]) for s in plan.parameter_stages]
            return _GradientBinding(plan.parameters, updated)
        if self._rules is not optimizers.rules:  # another list, another optimizer or another rule
            self._bindings, self._rules = {}, optimizers.rules
        mask = tuple(active)
        binding = self._bindings.get(mask)
        if binding is None:
            updated = [bool(active[s]) for s in plan.parameter_stages]
            binding = self._bindings[mask] = Binding(optimizers, plan.parameters, updated)
        return binding

    def whole_step(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """A step of a network that is this part alone."""
        plan = self.plan(len(step.x))
        binding = self.binding(plan, step)
        state, pending, groups, settings = binding.state()
        output, loss, synthesis_loss = ops.sweep_(
            plan,
            step.x,
            step.target,
            step.context,
            state,
            groups,
            settings,
            self._active(step),
            step.caller,
        )
        self._finish(plan, binding, state, pending)
        return loss, output, synthesis_loss

    @staticmethod
    def _finish(plan, binding, state, pending) -> None:
        # Raw in-place ops leave the counters alone that autograd looks at.
        torch.autograd.graph.increment_version([*binding.parameters, *state, *plan.statistics])
        if pending:
            binding.commit(pending)

    def takes(self, x: Tensor, step: _Step) -> bool:
        """Whether a sweep can run on this input."""
        return x.dim() == 2 and (not self._how["separate_input"] or step.x.dim() == 2)

    @torch.no_grad()
    def forward(self, x: Tensor, step: _Step) -> Tensor:
        """The output of the topmost stage; in complete unlock what the next one gets instead."""
        self._plan = self.plan(len(x))
        target = step.target if isinstance(step.target, Tensor) else None
        network_input = step.x if self._plan.separate_input else None
        output, self.loss, self._input_gradient = ops.sweep_forward_(
            self._plan, x, target, step.context, self._active(step), step.caller, network_input
        )
        return output

    @torch.no_grad()
    def backward(self, gradient: Tensor | None, step: _Step) -> Tensor | None:
        """All updates, the topmost synthesizer's with what came from above; the gradient of x."""
        plan, active = self._plan, self._active(step)
        if gradient is not None:
            gradient = gradient.to(plan.parameters[0].dtype)
        binding = self.binding(plan, step)
        state, pending, groups, settings = binding.state()
        losses = ops.sweep_update_(plan, gradient, state, groups, settings, active, step.caller)
        self._finish(plan, binding, state, pending)
        unlocked = losses.dim() == 2
        self.synthesis_losses = list(losses[0] if unlocked else losses)
        self.input_losses = list(losses[1]) if unlocked else []
        return self._input_gradient if active[0] else None


class _GradientBinding:
    """Every parameter's gradient goes to its `p.grad`."""

    settings = ops.flat(
        [reference.OptimizerSettings("gradient", a=a) for a in (0.0, 1.0)]  # write, add
    )

    def __init__(self, parameters: list[Tensor], updated: list[bool]):
        self.parameters = []  # not changed themselves
        self._groups, self._tensors, self._pending = [], [], []
        for parameter, free in zip(parameters, updated, strict=True):
            if not (free and parameter.requires_grad):
                self._groups.append(-1)
                continue
            grad = parameter.grad
            if grad is not None and grad.is_contiguous() and grad.dtype == parameter.dtype:
                self._groups.append(1)
            else:
                self._groups.append(0)
                grad = torch.empty_like(parameter)
                self._pending.append((parameter, grad))
            self._tensors.append(grad)

    def state(self) -> tuple[list[Tensor], list[tuple], list[int], list[float]]:
        return self._tensors, self._pending, self._groups, self.settings

    @staticmethod
    def commit(pending: list[tuple[Tensor, Tensor]]) -> None:
        for parameter, grad in pending:
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad


class _LocalPart:
    """One stage and the synthesizers above it, through autograd of their own.

    Args:
        net: the network.
        number: that of the stage.
    """

    def __init__(self, net: nn.Module, number: int):
        self.synthesis_losses: list[Tensor] = []
        self.input_losses: list[Tensor] = []
        self._net, self._number = net, number
        self._stage = net.stages[number]
        top = number == len(net.stages) - 1
        self._synthesizer = None if top else net.synthesizers[number]
        self._input_synthesizer = None
        if net.input_synthesizers is not None and not top:
            self._input_synthesizer = net.input_synthesizers[number]

    def forward(self, x: Tensor, step: _Step) -> Tensor:
        """The stage's output; in complete unlock what the next stage gets in its place."""
        active, above = step.active[self._number], step.active[self._number + 1]
        self._x = x.detach().requires_grad_(self._number > 0 and x.is_floating_point())
        with torch.set_grad_enabled(bool(active)):
            self._output = self._stage(self._x)
        h = self._output.detach()
        if self._synthesizer is None:
            with torch.set_grad_enabled(bool(active)):
                name = step.criterion
                self._loss = (CRITERIA[name] if isinstance(name, str) else name)(
                    self._output, step.target
                )
            self.loss, self.output = self._loss.detach(), h
            return h
        self._prediction = self._evaluate(self._synthesizer, h, step, above)
        self._regressed = self._prediction
        if self._input_synthesizer is None:
            return h
        made = self._evaluate(self._input_synthesizer, step.x, step, above)
        self.input_losses = [self._regress(made, h, above)]
        made = made.detach().to(h.dtype)
        self._regressed = self._evaluate(self._synthesizer, made, step, above)
        return made

    @staticmethod
    def _evaluate(synthesizer: nn.Module, trigger: Tensor, step: _Step, regressed: int) -> Tensor:
        context = step.context
        if context is None and getattr(synthesizer, "input_context", None) is not None:
            width = synthesizer.input_context.weight.shape[1]
            context = reference.one_hot(step.target, width, synthesizer.input_context.weight)
        with torch.set_grad_enabled(bool(regressed)):
            return synthesizer(trigger.detach(), context)

    @staticmethod
    def _regress(prediction: Tensor, target: Tensor, active: int) -> Tensor:
        wide = reference.accumulate_dtype(prediction.dtype)
        if not active:
            return prediction.new_full((), float("nan"), dtype=wide)
        if prediction.shape != target.shape:
            raise RuntimeError(
                f"net.step: a synthesizer must predict the shape {tuple(target.shape)}, got "
                f"{tuple(prediction.shape)}"
            )
        with torch.enable_grad():
            error = prediction.to(wide) - target.to(wide)
            loss = error.square().sum() / len(error)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def backward(self, gradient: Tensor | None, step: _Step) -> Tensor | None:
        """The gradients of the stage, and of M with what came from above; returns that of x."""
        if self._synthesizer is not None:
            above = step.active[self._number + 1]
            if gradient is None and above:  # nothing above depends on this output
                gradient = torch.zeros_like(self._output)
            loss = self._regress(self._regressed, gradient, above)
            self.synthesis_losses = [loss]
        if not step.active[self._number]:
            return None
        if self._synthesizer is None:
            if self._loss.requires_grad:
                self._loss.backward()
        elif self._output.requires_grad:
            sent = self._prediction.detach()
            share = self._net.bp_lambda
            if share > 0 and gradient is not None:
                sent = (1 - share) * sent + share * gradient
            self._output.backward(sent.to(self._output.dtype))
        found = self._x.grad
        return torch.zeros_like(self._x) if found is None and self._number > 0 else found


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products to; None for nothing."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


class Trainer:
    """Steps of one network, and what they need to know of it from one to the next."""

    def __init__(self, net: nn.Module):
        self._net = net
        self._watch: ModuleWatch | None = None
        self._parts: dict[tuple, list] = {}
        self._optimizers: Optimizers | None = None

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

    def _parts_for(self, criterion, dtype: torch.dtype | None) -> list:
        """The network as parts, from below."""
        name = criterion if isinstance(criterion, str) else None
        choice = (name, dtype, backend.choice())
        parts = self._parts.get(choice)
        if parts is not None:
            return parts
        parts, run = [], []
        count = len(self.parsed)

        def close(end: int) -> None:
            if run:
                top = end == count
                first = end - len(run)
                rounded = dtype == torch.bfloat16
                parts.append(_FusedPart(list(run), first, name if top else None, rounded))
                run.clear()

        for number, stage in enumerate(self.parsed):
            local = dtype not in (None, torch.bfloat16) or (number == count - 1 and name is None)
            if stage is None or local:
                close(number)
                parts.append(_LocalPart(self._net, number))
            else:
                run.append(stage)
        close(count)
        self._parts[choice] = parts
        return parts

    def explain(self, x: Tensor, optimizer, criterion) -> list[dict]:
        """See `fastdni.explain`."""
        self.look()
        optimizers = self._optimizers_of(optimizer)
        dims = self._input_dims(x)
        fused = {
            number: part.plan(len(x)).backend
            for part in self._parts_for(criterion, _autocast_dtype(x))
            if isinstance(part, _FusedPart)
            for number in range(part.first, part.first + len(part.stages))
            if dims[part.first] == 2
        }
        rows = []
        for number, stage in enumerate(self._net.stages):
            reason = self.reasons[number]
            if number not in fused and reason is None:
                top = number == len(self._net.stages) - 1
                reason = "the criterion is a callable" if top else ""
                if dims[number] != 2:
                    reason = "the input of these stages is not (B, K)"
            elif number in fused and optimizers.reason is not None:
                reason = f"its gradients; the update is the optimizer's own: {optimizers.reason}"
            rows.append(
                {
                    "stage": " -> ".join(type(layer).__name__ for layer in layers_of(stage)),
                    "fused": number in fused,
                    "backend": fused.get(number, "torch"),
                    "kernel": "sweep" if number in fused else "autograd of the stage",
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
        caller = "net.backward" if optimizer is GRADIENTS else "net.step"
        active = self._check(caller, x, target, criterion, context, update_mask)
        step = _Step(caller, x, target, criterion, context, active)
        try:
            return self._run(step, optimizer, closely=False)
        except Exception:
            # Refused, perhaps, because the parameters are no longer those that the parts were made
            # for: net.double(), p.data = ...
            if self._watch is None or self._watch.layouts_unchanged():
                raise
        return self._run(step, optimizer, closely=True)

    def _run(self, step: _Step, optimizer, closely: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.look(closely)
        step.optimizers = None if optimizer is GRADIENTS else self._optimizers_of(optimizer)
        self._check_devices(step)
        parts = self._parts_for(step.criterion, _autocast_dtype(step.x))
        whole = len(parts) == 1 and type(parts[0]) is _FusedPart and step.x.dim() == 2
        if not whole and not closely:
            return self._run(step, optimizer, closely=True)
        run = parts[0].whole_step if whole else partial(self._run_parts, parts)
        if step.optimizers is None:
            return run(step)
        if whole and step.optimizers.reason is None:
            results = run(step)
            step.optimizers.mark_called()
        else:
            results = self._through_gradients(run, step)
        if not self._watch.no_gradients():
            _drop_gradients(self._watch.parameters)
        return results

    def _check(self, caller, x, target, criterion, context, update_mask) -> list[int]:
        net = self._net
        if not net.training:
            raise RuntimeError(f"{caller}: the network must be in training mode; call net.train()")
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] == 0:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(f"{caller}: x must be a tensor of at least one row, got {got}")
        if isinstance(criterion, str):
            if criterion not in CRITERIA:
                raise ValueError(
                    f'{caller}: criterion must be "cross_entropy", "mse" or a callable, got '
                    f"{criterion!r}"
                )
            if not isinstance(target, Tensor):
                raise RuntimeError(
                    f"{caller}: target must be a tensor for {criterion}, got "
                    f"{type(target).__name__}"
                )
        elif not callable(criterion):
            raise ValueError(
                f'{caller}: criterion must be "cross_entropy", "mse" or a callable, got '
                f"{criterion!r}"
            )
        count = len(net.stages)
        if update_mask is None:
            return [1] * (count + 1)
        mask = list(map(bool, update_mask))
        if len(mask) != count:
            raise ValueError(
                f"{caller}: update_mask must be one boolean for each of the {count} stages, got "
                f"{len(mask)}"
            )
        return [*map(int, mask), 1]

    def _check_devices(self, step: _Step) -> None:
        parameters = self._watch.parameters
        device = parameters[0].device if parameters else step.x.device
        for name, tensor in (("x", step.x), ("target", step.target), ("context", step.context)):
            if isinstance(tensor, Tensor) and tensor.device != device:
                raise RuntimeError(
                    f"{step.caller}: {name} must be on the parameters' device {device}, got "
                    f"{tensor.device}"
                )

    def _optimizers_of(self, given) -> Optimizers:
        if self._optimizers is None or not self._optimizers.is_current(given):
            self._optimizers = Optimizers(given, list(self._net.parameters()))
        self._optimizers.check() if self._optimizers.reason else self._optimizers.read()
        return self._optimizers

    def _through_gradients(self, run: Callable, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
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

    def _run_parts(self, parts: list, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        self._check_before_running(step)
        h = step.x
        left, done = list(parts), []
        with torch.enable_grad():
            while left:
                part = left.pop(0)
                if isinstance(part, _FusedPart) and not part.takes(h, step):  # (B, T, K), say
                    numbers = range(part.first, part.first + len(part.stages))
                    left = [_LocalPart(self._net, number) for number in numbers] + left
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
        return done[-1].loss, h, synthesis_loss

    def _check_before_running(self, step: _Step) -> None:
        """What a sweep would find out first, for stages that no sweep runs: nothing is written
        yet."""
        net, x, target, batch = self._net, step.x, step.target, len(step.x)
        first, last = layers_of(net.stages[0])[:1], layers_of(net.stages[-1])[-2:]
        if first and type(first[0]) is nn.Linear:
            linear = first[0]
            if x.shape[-1] != linear.in_features:
                raise RuntimeError(
                    f"{step.caller}: x must be (..., {linear.in_features}), got {tuple(x.shape)}"
                )
            if x.dtype != linear.weight.dtype and _autocast_dtype(x) is None:
                raise RuntimeError(
                    f"{step.caller}: x must have the parameters' dtype {linear.weight.dtype}, got "
                    f"{x.dtype}"
                )
        norms = [m for m in net.stages.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
        if batch == 1 and x.dim() == 2 and norms:
            raise RuntimeError(
                f"{step.caller}: x must have at least 2 rows for BatchNorm in training, got 1"
            )
        linear = next((m for m in reversed(last) if type(m) is nn.Linear), None)
        if isinstance(step.criterion, str):
            if target.dim() == 0 or len(target) != batch:
                raise RuntimeError(
                    f"{step.caller}: target must have x's {batch} rows, got {tuple(target.shape)}"
                )
            plain = linear is not None and x.dim() == 2 and target.device.type == "cpu"
            probabilities = target.is_floating_point() and target.dim() == 2
            if plain and (step.criterion == "mse" or not probabilities):
                ops.sweep_check_target(
                    step.caller, target, batch, linear.out_features, step.criterion
                )
        for synthesizer in (*net.synthesizers, *(net.input_synthesizers or [])):
            taken = getattr(synthesizer, "input_context", None)
            if isinstance(taken, nn.Linear):
                self._check_context(step, taken.in_features)

    @staticmethod
    def _check_context(step: _Step, width: int) -> None:
        context, target = step.context, step.target
        if context is not None:
            if context.shape[-1] != width:
                raise RuntimeError(
                    f"{step.caller}: context must be (B, C) = ({len(step.x)}, {width}), got "
                    f"{tuple(context.shape)}"
                )
        elif not isinstance(target, Tensor) or target.dtype != torch.int64:
            raise RuntimeError(
                f"{step.caller}: context must be (B, C) = ({len(step.x)}, {width}), got None, and "
                "target holds no labels to make it from"
            )
        elif target.numel() and target.device.type == "cpu" and target.max() >= width:
            raise RuntimeError(
                f"{step.caller}: context must be given, because the label {target.max()} has no "
                f"place in a one-hot context of width {width}"
            )


def _drop_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
