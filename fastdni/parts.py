"""The parts of a network that a step goes through: consecutive stages that one sweep runs, or a
single stage that takes local autograd.

`forward` of each part is called from below, `backward` from above, with the gradient that the part
above found at its input. When a sweep runs the whole network, `FusedPart.whole_step` prepares it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdni import ops, reference
from fastdni.optimizers import Binding, Optimizers
from fastdni.reference import SweepStage
from fastdni.stages import layers_of

CRITERIA = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
# Of one part: plans by batch size (an epoch has one or two), bindings by update mask.
_MAX_PLANS, _MAX_BINDINGS = 8, 64


class Step:
    """What the parts of one step have in common."""

    __slots__ = ("caller", "x", "target", "criterion", "context", "active", "optimizers")

    def __init__(self, caller, x, target, criterion, context, active):
        self.caller, self.x, self.target, self.criterion = caller, x, target, criterion
        self.context, self.active = context, active
        self.optimizers: Optimizers | None = None  # None: gradients go to p.grad


class FusedPart:
    """Consecutive stages that a sweep runs.

    Args:
        stages: theirs, as the sweep sees them.
        first: the number of the lowest in the network.
        criterion: name of the network's, if the topmost stage is among them.
        precision: see `ops.SweepPlan`.
    """

    def __init__(self, stages: list[SweepStage], first: int, criterion: str | None, precision: str):
        self.stages, self.first, self.precision = stages, first, precision
        self._how = {
            "criterion": criterion,
            "input_gradient": first > 0,
            "separate_input": first > 0 and stages[0].input_synthesizer is not None,
            "precision": precision,
        }
        self._plans: dict[int, ops.SweepPlan] = {}
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._rules: list[str] | None = None

    def backend(self, batch: int) -> str:
        """The backend that serves steps of so many rows."""
        return ops.sweep_backend(self.stages, batch, self.precision)

    def plan(self, batch: int) -> ops.SweepPlan:
        """The plan of a batch size, made when it is first met."""
        plan = self._plans.get(batch)
        if plan is None:
            if len(self._plans) == _MAX_PLANS:
                del self._plans[next(iter(self._plans))]
            plan = self._plans[batch] = ops.SweepPlan(self.stages, batch, **self._how)
        return plan

    def _active(self, step: Step) -> list[int]:
        return step.active[self.first : self.first + len(self.stages) + 1]

    def binding(self, plan: ops.SweepPlan, step: Step) -> "Binding | GradientBinding":
        """Who updates which parameter."""
        active = self._active(step)
        optimizers = step.optimizers
        if optimizers is None:
            updated = [bool(active[s]) for s in plan.parameter_stages]
            return GradientBinding(plan.parameters, updated)
        if self._rules is not optimizers.rules:  # another list, another optimizer or another rule
            self._bindings, self._rules = {}, optimizers.rules
            for kept in self._plans.values():
                kept.forget()
        mask = tuple(active)
        binding = self._bindings.get(mask)
        if binding is None:
            if len(self._bindings) == _MAX_BINDINGS:
                self._bindings.clear()
            updated = [bool(active[s]) for s in plan.parameter_stages]
            binding = self._bindings[mask] = Binding(optimizers, plan.parameters, updated)
        return binding

    def whole_step(self, step: Step) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """A step of a network that is this part alone: prepared, to be called with the data of the
        first and then of others like it. Returns loss, output and synthesis losses."""
        plan = self.plan(len(step.x))
        binding = self.binding(plan, step)
        active, caller = self._active(step), step.caller
        last: tuple = (None, None)  # state and settings of the plan's last step

        def run(x: Tensor, target: Tensor, context: Tensor | None):
            nonlocal last
            state, pending, groups, settings = binding.state()
            if state is last[0] and settings is last[1]:
                results = ops.sweep_repeat_(plan, self._input(x), target, context, caller)
            else:
                repeatable = plan.repeatable and step.optimizers is not None and not pending
                results = ops.sweep_(
                    plan, self._input(x), target, context, state, groups, settings, active, caller,
                    repeatable,
                )  # fmt: skip
                last = (state, settings) if repeatable else (None, None)
            self._finish(plan, binding, state, pending)
            output, loss, synthesis_loss = results
            return loss, output, synthesis_loss

        return run

    @staticmethod
    def _finish(plan, binding, state, pending) -> None:
        # Raw in-place ops leave the counters alone that autograd looks at.
        torch.autograd.graph.increment_version([*binding.parameters, *state, *plan.statistics])
        if pending:
            binding.commit(pending)

    def _input(self, x: Tensor) -> Tensor:
        """x in the parameters' dtype, where a stage below or autocast gave it another one."""
        dtype = self.stages[0].weight.dtype
        cast = x.dtype != dtype and (self.first > 0 or self._how["precision"] == "bfloat16")
        return x.to(dtype) if cast else x

    def check_state(self, step: Step) -> None:
        """Refuses optimizer state that does not fit, before anything runs."""
        if step.optimizers is not None:
            binding = self.binding(self.plan(len(step.x)), step)
            tensors, *_ = binding.state()
            binding.check(tensors, step.caller)

    def takes(self, x: Tensor, step: Step) -> bool:
        """Whether a sweep can run on this input."""
        return x.dim() == 2 and (not self._how["separate_input"] or step.x.dim() == 2)

    @torch.no_grad()
    def forward(self, x: Tensor, step: Step) -> Tensor:
        """The output of the topmost stage; in complete unlock what the next one gets instead."""
        self._plan = self.plan(len(x))
        target = step.target if isinstance(step.target, Tensor) else None
        network_input = self._input(step.x) if self._plan.separate_input else None
        output, self.loss, self._input_gradient = ops.sweep_forward_(
            self._plan,
            self._input(x),
            target,
            step.context,
            self._active(step),
            step.caller,
            network_input,
        )
        return output

    def forget(self) -> None:
        """Lets go of what the step has made."""
        self.loss, self._input_gradient, self._plan = None, None, None
        self.synthesis_losses, self.input_losses = [], []

    @torch.no_grad()
    def backward(self, gradient: Tensor | None, step: Step) -> Tensor | None:
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


class GradientBinding:
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


class LocalPart:
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

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """The stage's output; in complete unlock what the next stage gets in its place."""
        active, above = step.active[self._number], step.active[self._number + 1]
        self._x = x.detach().requires_grad_(self._number > 0 and x.is_floating_point())
        # A stage may begin with a layer that works in place, which a leaf must not be given to.
        inplace = any(getattr(layer, "inplace", False) for layer in layers_of(self._stage)[:1])
        with torch.set_grad_enabled(bool(active)):
            self._output = self._stage(self._x.clone() if inplace else self._x)
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
        self.input_losses = [self._regress(made, h, above, step.caller)]
        made = made.detach().to(h.dtype)
        self._regressed = self._evaluate(self._synthesizer, made, step, above)
        return made

    @staticmethod
    def _evaluate(synthesizer: nn.Module, trigger: Tensor, step: Step, regressed: int) -> Tensor:
        context = step.context
        if context is None and getattr(synthesizer, "input_context", None) is not None:
            width = synthesizer.input_context.weight.shape[1]
            context = reference.one_hot(step.target, width, synthesizer.input_context.weight)
        with torch.set_grad_enabled(bool(regressed)):
            return synthesizer(trigger.detach(), context)

    @staticmethod
    def _regress(prediction: Tensor, target: Tensor, active: int, caller: str) -> Tensor:
        wide = reference.accumulate_dtype(prediction.dtype)
        if not active:
            return prediction.new_full((), float("nan"), dtype=wide)
        if prediction.shape != target.shape:
            raise RuntimeError(
                f"{caller}: a synthesizer must predict the shape {tuple(target.shape)}, got "
                f"{tuple(prediction.shape)}"
            )
        with torch.enable_grad():
            error = prediction.to(wide) - target.to(wide)
            loss = error.square().sum() / len(error)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def backward(self, gradient: Tensor | None, step: Step) -> Tensor | None:
        """The gradients of the stage, and of M with what came from above; returns that of x."""
        if self._synthesizer is not None:
            above = step.active[self._number + 1]
            if gradient is None and above:  # nothing above depends on this output
                gradient = torch.zeros_like(self._output)
            loss = self._regress(self._regressed, gradient, above, step.caller)
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

    def forget(self) -> None:
        """Lets go of what the step has made."""
        self._x = self._output = self._loss = self._prediction = self._regressed = None
