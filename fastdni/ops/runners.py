"""What runs a sweep on each backend: one small interface, chosen once by the plan.

The plan is given at every call and not kept, so that neither holds the other. What a step may be
given is the same everywhere: compiled steps check it themselves, the others ask the same rules
first (`sweep_check_forward`, `sweep_check_update`).
"""

import abc
import importlib

import torch
from torch import Tensor

from fastdni import backend, reference

_sweep = torch.ops.fastdni.sweep_.default
_forward = torch.ops.fastdni.sweep_forward_.default
_update = torch.ops.fastdni.sweep_update_.default
_check_forward = torch.ops.fastdni.sweep_check_forward.default
_check_update = torch.ops.fastdni.sweep_check_update.default

Results = tuple[Tensor, Tensor, Tensor]


class Runner(abc.ABC):
    """Steps of one plan.

    Attributes:
        compiled: whether the plan itself has the memory and the program of a step.
        launches: how a GPU's launches divide the step, where the plan does not know it.
    """

    compiled = False
    launches = ""

    def __init__(self, plan):
        self._pending = None  # what a forward part leaves for its update

    def step(
        self, plan, caller, x, target, context, noise, state, groups, settings, active, repeatable
    ) -> Results:
        """A whole step: see `fastdni.ops.sweep_`."""
        output, loss, _ = self.forward(plan, caller, x, target, context, None, noise, active)
        losses = self.update(plan, caller, None, state, groups, settings, active)
        return output, loss, losses

    @abc.abstractmethod
    def forward(self, plan, caller, x, target, context, network_input, noise, active) -> Results:
        """Its first part: see `fastdni.ops.sweep_forward_`."""

    @abc.abstractmethod
    def update(self, plan, caller, gradient, state, groups, settings, active) -> Tensor:
        """The rest: see `fastdni.ops.sweep_update_`."""


class Compiled(Runner):
    """The kernels of csrc, for the CPU and for CUDA."""

    compiled = True

    def step(
        self, plan, caller, x, target, context, noise, state, groups, settings, active, repeatable
    ) -> Results:
        return _sweep(
            plan.handle, caller, x, target, context, noise, plan.parameters, plan.statistics,
            state, groups, settings, active, repeatable,
        )  # fmt: skip

    def forward(self, plan, caller, x, target, context, network_input, noise, active) -> Results:
        return _forward(
            plan.handle, caller, x, target, context, network_input, noise, plan.parameters,
            plan.statistics, active,
        )  # fmt: skip

    def update(self, plan, caller, gradient, state, groups, settings, active) -> Tensor:
        return _update(
            plan.handle, caller, gradient, plan.parameters, state, groups, settings, active
        )


class Triton(Runner):
    """Triton's kernels."""

    launches = "a launch for each layer, a program for each tile"

    def __init__(self, plan):
        super().__init__(plan)
        if any(stage.dropout for stage in plan.stages):
            raise RuntimeError("sweep: a plan for Triton must have no stage with Dropout")
        backend.triton.load()
        module = importlib.import_module("fastdni.triton.sweep")
        self.structure = module.Structure(plan.stages, plan.criterion, plan.precision)

    def step(
        self, plan, caller, x, target, context, noise, state, groups, settings, active, repeatable
    ) -> Results:
        lists = (plan.parameters, plan.statistics)
        _check_forward(plan.handle, caller, x, target, context, None, noise, *lists, active)
        _check_update(plan.handle, caller, None, lists[0], state, groups, settings, active)
        with torch.no_grad():
            return torch.ops.fastdni.triton_sweep_(
                self.structure.number, x, target, context, *lists, state, groups, settings, active
            )

    def forward(self, plan, caller, x, target, context, network_input, noise, active) -> Results:
        lists = (noise, plan.parameters, plan.statistics)
        _check_forward(plan.handle, caller, x, target, context, network_input, *lists, active)
        done = self._pending = self.structure.forward(
            plan.stages, x, target, context, active, network_input, plan.input_gradient
        )
        return done.output, done.loss, done.input_gradient

    def update(self, plan, caller, gradient, state, groups, settings, active) -> Tensor:
        parameters = plan.parameters
        _check_update(plan.handle, caller, gradient, parameters, state, groups, settings, active)
        done, self._pending = self._pending, None
        return self.structure.update(done, gradient, parameters, state, groups, settings)


class Reference(Runner):
    """The equations in plain PyTorch."""

    def forward(self, plan, caller, x, target, context, network_input, noise, active) -> Results:
        lists = (noise, plan.parameters, plan.statistics)
        _check_forward(plan.handle, caller, x, target, context, network_input, *lists, active)
        with torch.autocast(x.device.type, enabled=False):
            done = self._pending = reference.sweep(
                plan.stages, x, target, context, plan.criterion, list(map(bool, active)),
                plan.precision == "bfloat16", network_input, noise,
            )  # fmt: skip
        return done.output, done.loss, done.input_gradient

    def update(self, plan, caller, gradient, state, groups, settings, active) -> Tensor:
        parameters = plan.parameters
        _check_update(plan.handle, caller, gradient, parameters, state, groups, settings, active)
        done, self._pending = self._pending, None
        gradients, losses = done.gradients, done.synthesis_loss
        if done.regress_top is not None and gradient is not None:
            with torch.autocast(gradient.device.type, enabled=False):
                loss, of_top = done.regress_top(gradient)
            above = plan.stages[-1].input_synthesizer  # whose gradients come last
            end = len(gradients) - (0 if above is None else len(above.tensors()))
            gradients = gradients[: end - len(of_top)] + of_top + gradients[end:]
            losses = losses.clone()
            losses.view(-1, len(plan.stages))[0, -1] = loss
        found = dict(zip(map(id, parameters), gradients, strict=True))
        with torch.no_grad():
            for parameter, row, own in reference.assigned(parameters, state, groups, settings):
                if found[id(parameter)] is not None:
                    reference.optimizer_update(row, parameter, found[id(parameter)], own)
        return losses


# By the name that a backend has in `fastdni.backends()`.
RUNNERS = {"cpu": Compiled, "cuda": Compiled, "triton": Triton, "reference": Reference}
