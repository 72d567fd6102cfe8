"""The parts of a network that a step goes through: consecutive stages that one sweep runs, or a
single stage that takes local autograd.

A step begins each part from below, which makes a pass of it; then takes the passes from above,
each with the gradient that the one above found at its input; then, when every gradient is known,
lets them make their updates. What belongs to one step is in the passes, none of it in the parts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdni import ops
from fastdni.reference import SweepStage, accumulate_dtype
from fastdni.training.boundary import Boundary, Prediction, context_for, learns, mixed
from fastdni.training.criteria import FUNCTIONS
from fastdni.training.optimizers import Optimizers
from fastdni.training.stages import FusedStage, flattens, layers_of
from fastdni.training.step import Step
from fastdni.training.updates import Gradients, Updates, updates_of

increment_version = torch.autograd.graph.increment_version
_MAX_PLANS = 8  # of a part, by batch size (an epoch has one or two)


class FusedPart:
    """Consecutive stages that a sweep runs.

    Args:
        stages: theirs, as the sweep sees them.
        first: the number of the lowest in the network.
        criterion: name of the network's, if the topmost stage is among them.
        precision: see `ops.SweepPlan`.
        below: whether there are stages below it.
    """

    fused = True

    def __init__(
        self,
        stages: list[FusedStage],
        first: int,
        criterion: str | None,
        precision: str,
        below: bool,
    ):
        self.stages: list[SweepStage] = [stage.sweep for stage in stages]
        self.first, self.precision, self.below = first, precision, below
        self._before = stages[0].before
        self._dropping = [(stage.sweep.weight, stage.p) for stage in stages if stage.sweep.dropout]
        self._flattens = any(map(flattens, self._before))
        self._unlocked = self.stages[0].input_synthesizer is not None
        self._how = {
            "criterion": criterion,
            "input_gradient": below,
            "separate_input": below and self._unlocked,
            "precision": precision,
        }
        self._plans: dict[int, ops.SweepPlan] = {}

    @property
    def numbers(self) -> range:
        """Those of its stages."""
        return range(self.first, self.first + len(self.stages))

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

    def active(self, step: Step) -> list[int]:
        """For each of its stages, and one above, whether it is updated."""
        return step.active[self.first : self.first + len(self.stages) + 1]

    def updates(self, step: Step, optimizers: Optimizers | None) -> Updates | Gradients:
        """Who updates which parameter."""
        plan, active = self.plan(len(step.x)), self.active(step)
        updated = None
        if not all(active):
            updated = tuple([bool(active[s]) for s in plan.parameter_stages])
        if optimizers is None:
            return Gradients(plan.parameters, updated)
        return updates_of(optimizers, plan, plan.parameters, updated)

    def takes(self, x: Tensor, network_input: Tensor) -> bool:
        """Whether a sweep can run on this input."""
        flat = x.dim() == 2 or (self._flattens and x.dim() > 2)
        return flat and (not self._unlocked or network_input.dim() == 2)

    def input(self, x: Tensor) -> Tensor:
        """x as the sweep takes it: through the layers before the first Linear, and in the
        parameters' dtype where a stage below or autocast gave it another one."""
        for layer in self._before:
            x = layer(x)
        dtype = self.stages[0].weight.dtype
        cast = x.dtype != dtype and (self.below or self.precision == "bfloat16")
        return x.to(dtype) if cast else x

    def prepares(self, x: Tensor) -> bool:
        """Whether the sweep may take anything but x itself, or noise besides."""
        return bool(self._before or self._dropping) or x.dtype != self.stages[0].weight.dtype

    def noise(self, batch: int) -> list[Tensor]:
        """What Dropout multiplies by: torch's random numbers, in the order of the stages."""
        return [F.dropout(weight.new_ones(batch, len(weight)), p) for weight, p in self._dropping]

    def begin(self, x: Tensor, step: Step) -> "_FusedPass":
        """F, S and D of its stages."""
        return _FusedPass(self, x, step)


class _FusedPass:
    """One step of a `FusedPart`."""

    def __init__(self, part: FusedPart, x: Tensor, step: Step):
        self.part, self._step = part, step
        self._plan = plan = part.plan(len(x))
        target = step.target if isinstance(step.target, Tensor) else None
        network_input = step.x.to(plan.parameters[0].dtype) if plan.separate_input else None
        with torch.no_grad():
            # In complete unlock the output is what the next stage gets instead.
            self.output, self.loss, self._input_gradient = ops.sweep_forward_(
                plan, part.input(x), target, step.context, part.active(step), step.caller,
                network_input, part.noise(len(x)),
            )  # fmt: skip

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """Takes what came from above; returns the gradient of its input."""
        if gradient is not None:
            gradient = gradient.to(self._plan.parameters[0].dtype)
        self._gradient = gradient
        return self._input_gradient if self.part.active(self._step)[0] else None

    def update(self, optimizers: Optimizers | None) -> None:
        """All updates, the topmost synthesizer's with what came from above; None: gradients go to
        p.grad."""
        step, plan = self._step, self._plan
        updates = self.part.updates(step, optimizers)
        groups, settings = updates.settings()
        updates.put_in_place()
        with torch.no_grad():
            losses = ops.sweep_update_(
                plan, self._gradient, updates.state, groups, settings, self.part.active(step),
                step.caller,
            )  # fmt: skip
        # Raw in-place ops leave alone the counters that autograd looks at.
        increment_version([*updates.written, *plan.statistics])
        updates.finish()
        unlocked = losses.dim() == 2
        self.synthesis_losses = list(losses[0] if unlocked else losses)
        self.input_losses = list(losses[1]) if unlocked else []


class LocalPart:
    """One stage and the synthesizers above it, through autograd of their own.

    Args:
        stage: the module.
        number: its number.
        synthesizer, input_synthesizer: those of the boundary above it, where there are any.
        bp_lambda: the true gradient's share in what is sent into the stage.
        below: whether there are stages below it.
    """

    fused = False

    def __init__(
        self,
        stage: nn.Module,
        number: int,
        synthesizer: nn.Module | None,
        input_synthesizer: nn.Module | None,
        bp_lambda: float,
        below: bool,
    ):
        self.stage, self.number, self.bp_lambda, self.below = stage, number, bp_lambda, below
        self.boundary = None if synthesizer is None else Boundary(synthesizer)
        self.input_boundary = None if input_synthesizer is None else Boundary(input_synthesizer)

    @property
    def numbers(self) -> range:
        """Those of its stages."""
        return range(self.number, self.number + 1)

    def begin(self, x: Tensor, step: Step) -> "_LocalPass":
        """The stage's forward pass and its synthesizers' predictions."""
        return _LocalPass(self, x, step)


class _LocalPass:
    """One step of a `LocalPart`."""

    def __init__(self, part: LocalPart, x: Tensor, step: Step):
        self.part, self._step = part, step
        self._active, self._active_above = step.active[part.number : part.number + 2]
        self.synthesis_losses: list[Tensor] = []
        self.input_losses: list[Tensor] = []
        self._x = x.detach().requires_grad_(part.below and x.is_floating_point())
        # A stage may begin with a layer that works in place, which a leaf must not be given to.
        inplace = any(getattr(layer, "inplace", False) for layer in layers_of(part.stage)[:1])
        with torch.set_grad_enabled(bool(self._active)):
            self._output = part.stage(self._x.clone() if inplace else self._x)
            if part.boundary is None:
                criterion = FUNCTIONS.get(step.name, step.criterion)
                self._loss = criterion(self._output, step.target)
                self.loss = self._loss.detach()
        self.output = self._output.detach()
        if part.boundary is not None:
            self._predict()

    def _predict(self) -> None:
        part, h = self.part, self.output
        self._sent = self._regressed = self._prediction(part.boundary, h, h)
        if part.input_boundary is None:
            return
        # Complete unlock: the next stage gets what is predicted from the network's input.
        self._made = self._prediction(part.input_boundary, self._step.x, h)
        self.output = self._made.message.to(h.dtype)
        self._regressed = self._prediction(part.boundary, self.output, h)

    def _prediction(self, boundary: Boundary, trigger: Tensor, like: Tensor) -> Prediction:
        """What a boundary's synthesizer says; it must have a shape."""
        step, synthesizer = self._step, boundary.synthesizer
        context = context_for(synthesizer, step.context, step.target, trigger)
        learn = bool(self._active_above) and learns(synthesizer)
        prediction = boundary.predict(trigger, context, learn)
        if prediction.message.shape != like.shape:
            raise RuntimeError(
                f"{step.caller}: a synthesizer must predict the shape {tuple(like.shape)}, got "
                f"{tuple(prediction.message.shape)}"
            )
        return prediction

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """The gradients of the stage, and of its synthesizers with what came from above; returns
        that of the stage's input."""
        part = self.part
        if part.boundary is not None:
            gradient = self._regress(gradient)
        if not self._active:
            return None
        if self._output.requires_grad:
            if part.boundary is None:
                self._loss.backward()
            else:
                self._output.backward(gradient.to(self._output.dtype))
        found = self._x.grad
        return torch.zeros_like(self._x) if found is None and part.below else found

    def _regress(self, gradient: Tensor | None) -> Tensor:
        """Trains the synthesizers; returns what is sent into the stage."""
        part, share = self.part, self.part.bp_lambda
        if not self._active_above:
            wide = accumulate_dtype(self.output.dtype)
            masked = self.output.new_full((), float("nan"), dtype=wide)
            self.synthesis_losses = [masked]
            if part.input_boundary is not None:
                self.input_losses = [masked]
            return self._sent.message
        if gradient is None:  # nothing above depends on this output
            gradient = torch.zeros_like(self.output)
        if part.input_boundary is not None:
            learn = learns(part.input_boundary.synthesizer)
            loss, _ = self._made.regress(self._output.detach(), learn=learn)
            self.input_losses = [loss]
        send, learn = (share, 1 - share), learns(part.boundary.synthesizer)
        loss, sent = self._regressed.regress(gradient, send=send, learn=learn)
        self.synthesis_losses = [loss]
        if self._regressed is self._sent:
            return sent
        return mixed(send, gradient, self._sent.message)

    def update(self, optimizers: Optimizers | None) -> None:
        """Nothing: its gradients are in `p.grad`, for the optimizers' own steps."""
