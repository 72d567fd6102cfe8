"""sweep: a step of consecutive decoupled stages, their losses and every update, in one call.

The formulas, shapes and letters are those of `fastdni.reference.sweep`, the updates those of
`fastdni.reference.optimizer_update`.
"""

import importlib
import weakref
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fastdni import _C, backend, reference
from fastdni.reference import OptimizerSettings, SweepStage, SynthesizerParameters

_DEVICES = backend.kernel_devices("sweep_")
_sweep = torch.ops.fastdni.sweep_.default
_repeat = torch.ops.fastdni.sweep_repeat_.default
_forward = torch.ops.fastdni.sweep_forward_.default
_update = torch.ops.fastdni.sweep_update_.default
# (caller, target, batch, outputs, criterion): raises unless the target fits.
sweep_check_target = torch.ops.fastdni.sweep_check_target.default
# Nothing here is differentiable: autograd looks past these ops, which saves a `no_grad` at each
# call.
_library = torch.library.Library("fastdni", "IMPL")
for _op in ("sweep_", "sweep_repeat_", "sweep_forward_", "sweep_update_"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")

_plans: "weakref.WeakValueDictionary[int, SweepPlan]" = weakref.WeakValueDictionary()


def _fake_results(handle: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, loss and synthesis losses of a plan, without values."""
    stages = _plans[handle].stages
    boundaries = sum(stage.synthesizer is not None for stage in stages)
    unlocked = stages[0].input_synthesizer is not None
    losses = x.new_empty((2, boundaries) if unlocked else (boundaries,))
    return x.new_empty(len(x), stages[-1].weight.shape[0]), x.new_empty(()), losses


@torch.library.register_fake("fastdni::sweep_")
def _(
    plan, caller, x, target, context, parameters, statistics, state, groups, settings, active,
    repeatable,
):  # fmt: skip
    return _fake_results(plan, x)


@torch.library.register_fake("fastdni::sweep_repeat_")
def _(plan, caller, written, x, target, context):
    return _fake_results(plan, x)


@torch.library.register_fake("fastdni::sweep_forward_")
def _(plan, caller, x, target, context, network_input, parameters, statistics, active):
    output, loss, _ = _fake_results(plan, x)
    return output, loss, x.new_empty(x.shape if _plans[plan].input_gradient else (0,))


@torch.library.register_fake("fastdni::sweep_update_")
def _(plan, caller, gradient, parameters, state, groups, settings, active):
    return _fake_results(plan, parameters[0])[2]


@torch.library.register_fake("fastdni::sweep_check_target")
def _(caller, target, batch, outputs, criterion):
    return None


def _synthesizer_spec(synthesizer: SynthesizerParameters | None) -> dict | None:
    if synthesizer is None:
        return None
    weights = synthesizer.weights
    of_context = synthesizer.context_weight
    return {
        "widths": [weights[0].shape[1], *(weight.shape[0] for weight in weights)],
        "bias": len(synthesizer.biases) > 0,
        "context": 0 if of_context is None else of_context.shape[1],
    }


def _stage_spec(stage: SweepStage) -> dict:
    norm = stage.norm
    return {
        "inputs": stage.weight.shape[1],
        "outputs": stage.weight.shape[0],
        "bias": stage.bias is not None,
        "activation": stage.activation,
        "batch_norm": None
        if norm is None
        else {
            "affine": norm.weight is not None,
            "running": norm.running is not None,
            "momentum": norm.momentum,
            "eps": norm.eps,
        },
        "synthesizer": _synthesizer_spec(stage.synthesizer),
        "input_synthesizer": _synthesizer_spec(stage.input_synthesizer),
    }


def sweep_backend(stages: Sequence[SweepStage], batch: int, precision: str) -> str:
    """The backend that serves a sweep: a name of `fastdni.backends()`."""
    weight = stages[0].weight
    name = backend.server(weight, _DEVICES)
    # float64 is the CUDA kernels' alone.
    if name == "cuda" and backend.choice() == "auto" and weight.dtype in backend.triton.DTYPES:
        largest = batch * max(p.numel() for stage in stages for p in stage.parameters())
        if backend.takes_triton(weight.device, largest, precision):
            return "triton"
    return name


class SweepPlan:
    """What a sweep runs over, and the memory that it works in.

    Args:
        stages: consecutive ones, each with the synthesizers of the boundary above it.
        batch: number of rows B.
        criterion: "cross_entropy" or "mse"; None when the network goes on above the last stage.
        input_gradient: whether the gradient of the lowest stage's input is wanted.
        separate_input: whether the input synthesizers predict from another tensor than the lowest
            stage's x: a part of a completely unlocked network.
        precision: of products; sums, errors, losses, parameters and optimizer state keep the
            parameters' dtype. "exact"; "bfloat16": operands rounded to it (autocast);
            "tf32" and "tf32x3" on a GPU's tensor cores, elsewhere exact.
    """

    def __init__(
        self,
        stages: list[SweepStage],
        batch: int,
        criterion: str | None = None,
        input_gradient: bool = False,
        separate_input: bool = False,
        precision: str = "exact",
    ):
        self.stages, self.batch, self.criterion = stages, batch, criterion
        self.input_gradient, self.precision = input_gradient, precision
        self.separate_input = separate_input
        self.parameters = [p for stage in stages for p in stage.parameters()]
        self.statistics = [t for stage in stages for t in stage.statistics()]
        # For each parameter the stage whose mask it shares; a synthesizer shares that above it.
        self.parameter_stages = []
        for index, stage in enumerate(stages):
            synthesizers = (stage.synthesizer, stage.input_synthesizer)
            above = sum(len(s.tensors()) for s in synthesizers if s is not None)
            own = len(stage.parameters()) - above
            self.parameter_stages += [index] * own + [index + 1] * above
        weight = stages[0].weight
        self.backend = sweep_backend(stages, batch, precision)
        self._memory, self._pending = None, None
        self._written = torch.empty(0, device=weight.device)  # see `sweep_repeat_`
        self.handle = 0
        self.structure = None
        if self.backend == "triton":
            backend.triton.load()
            triton = importlib.import_module("fastdni.triton.sweep")
            self.structure = triton.Structure(stages, criterion, precision)
        elif self.backend != "reference":
            on_gpu = weight.device.type == "cuda"
            # What a GPU allows is asked of the current one.
            with torch.cuda.device(weight.device) if on_gpu else nullcontext():
                self._memory = _C.SweepPlan(
                    stages=[_stage_spec(stage) for stage in stages],
                    batch=batch,
                    dtype=str(weight.dtype).removeprefix("torch."),
                    gpu=torch.cuda.current_device() if on_gpu else None,
                    criterion=criterion or "none",
                    input_gradient=input_gradient,
                    precision=precision,
                    separate_input=separate_input,
                )
            self.handle = self._memory.handle
            _plans[self.handle] = self

    def forget(self) -> None:
        """Lets go of parameters and state that a repeated step would take."""
        if self._memory is not None:
            self._memory.forget()

    @property
    def begun(self) -> bool:
        """Whether the last step had begun to write when it failed."""
        return self._memory is not None and self._memory.begun

    @property
    def launches(self) -> str:
        """How a GPU's launches divide the step, in words; empty on the CPU."""
        if self.structure is not None:
            return "a launch for each layer, a program for each tile"
        return "" if self._memory is None else self._memory.launches

    @property
    def workspace_bytes(self) -> int:
        """Memory that the plan holds between steps; on a GPU, for each stream that takes them."""
        return 0 if self._memory is None else self._memory.workspace_bytes


def flat(settings: Sequence[OptimizerSettings]) -> list[float]:
    """Optimizer settings as the raw op takes them."""
    rules = reference.RULES
    return [float(x) for row in settings for x in (rules.index(row.rule), *row[1:])]


def sweep_(
    plan: SweepPlan,
    x: Tensor,
    target: Tensor,
    context: Tensor | None,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    active: list[int],
    caller: str = "sweep",
    repeatable: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of a whole network, in place: parameters, optimizer state, running statistics.

    Args:
        plan: of the network; its criterion is not None.
        x: (B, K), in the parameters' dtype.
        target: labels (B,) int64, or (B, N) for "mse".
        context: (B, C), or None for one-hot labels where a synthesizer takes a context.
        state: of each parameter in turn what its rule keeps: see `reference.optimizer_update`.
        groups: for each parameter its row of `settings`; -1 leaves it as it is.
        settings: see `flat`. A learning rate that is NaN is a tensor, next in `state`.
        active: for each stage, and one above, whether (1) or not (0) it is updated.
        caller: whom error messages name.
        repeatable: whether the plan keeps the tensors, for `sweep_repeat_`.

    Returns:
        The output (B, N), the loss (), and the synthesis losses: (S,), or in complete unlock
        (2, S), gradients and inputs; NaN at the boundary below a masked stage.

    Raises:
        RuntimeError: a shape, dtype, label or state does not fit; nothing has been written then.
    """
    if plan.handle:
        return _sweep(
            plan.handle,
            caller,
            x,
            target,
            context,
            plan.parameters,
            plan.statistics,
            state,
            groups,
            settings,
            active,
            repeatable,
        )
    if plan.structure is not None:
        _check_data(plan, x, target, context, caller)
        _check_state(plan, state, groups, settings, caller)
        with torch.no_grad():
            return torch.ops.fastdni.triton_sweep_(
                plan.structure.number, x, target, context, plan.parameters, plan.statistics, state,
                groups, settings, active,
            )  # fmt: skip
    output, loss, _ = sweep_forward_(plan, x, target, context, active, caller)
    return output, loss, sweep_update_(plan, None, state, groups, settings, active, caller)


def _check_data(plan: SweepPlan, x, target, context, caller: str) -> None:
    """For Triton's kernels, which would read past the end."""
    if tuple(x.shape) != (plan.batch, plan.stages[0].weight.shape[1]):
        raise RuntimeError(
            f"{caller}: x must be (B, K) = {(plan.batch, plan.stages[0].weight.shape[1])}, got "
            f"{tuple(x.shape)}"
        )
    if plan.criterion is not None:
        outputs = plan.stages[-1].weight.shape[0]
        sweep_check_target(caller, target, plan.batch, outputs, plan.criterion)
    of_context = {
        s.context_weight.shape[1]
        for stage in plan.stages
        for s in (stage.synthesizer, stage.input_synthesizer)
        if s is not None and s.context_weight is not None
    }
    if of_context and context is None and (target is None or target.dim() != 1):
        raise RuntimeError(
            f"{caller}: context must be (B, C), got None, and target holds no labels to make it "
            "from"
        )
    for width in of_context if context is not None else ():
        if tuple(context.shape) != (plan.batch, width):
            raise RuntimeError(
                f"{caller}: context must be (B, C) = {(plan.batch, width)}, got "
                f"{tuple(context.shape)}"
            )


def _check_state(plan: SweepPlan, state, groups, settings, caller: str) -> None:
    """As `_check_data`: of what optimizers keep."""
    for parameter, row, own in reference.assigned(plan.parameters, state, groups, settings):
        for kept in own[: reference.KEPT[row.rule]]:
            if not (
                kept.shape == parameter.shape
                and kept.dtype == parameter.dtype
                and kept.device == parameter.device
                and kept.is_contiguous()
            ):
                raise RuntimeError(
                    f"{caller}: a parameter's optimizer state (or gradient) must be a contiguous "
                    f"{parameter.dtype} tensor of shape {tuple(parameter.shape)} on "
                    f"{parameter.device}, got {kept.dtype} {tuple(kept.shape)} on {kept.device}"
                )


def sweep_repeat_(
    plan: SweepPlan, x: Tensor, target: Tensor, context: Tensor | None, caller: str = "sweep"
) -> tuple[Tensor, Tensor, Tensor]:
    """The last `sweep_` of a plan again, on other data: it takes and writes the same parameters,
    statistics and state, by the same settings.

    At small sizes handing the tensors over costs as much as the step. The plan holds them; what
    their storage is it asks anew.

    Args, returns, raises:
        As `sweep_`; also RuntimeError where the plan's last step was not repeatable.
    """
    return _repeat(plan.handle, caller, plan._written, x, target, context)


def sweep_forward_(
    plan: SweepPlan,
    x: Tensor,
    target: Tensor | None,
    context: Tensor | None,
    active: list[int],
    caller: str = "sweep",
    network_input: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of a step that needs nothing from above: F, S and D of every stage.

    Args:
        network_input: (B, K), what the input synthesizers predict from, where the plan has a
            separate input.
        Others as `sweep_`.

    Returns:
        The output (B, N), or in a completely unlocked network that goes on above what it goes on
        with; the loss () where the plan has a criterion; the gradient of x (B, K) where the plan
        wants it.
    """
    if plan.handle:
        return _forward(
            plan.handle,
            caller,
            x,
            target,
            context,
            network_input,
            plan.parameters,
            plan.statistics,
            active,
        )
    if plan.structure is not None:
        _check_data(plan, x, target, context, caller)
        done = plan.structure.forward(
            plan.stages, x, target, context, active, network_input, plan.input_gradient
        )
        plan._pending = done
        return done.output, done.loss, done.input_gradient
    if plan.criterion is not None and x.device.type == "cpu":
        sweep_check_target(
            caller, target, plan.batch, plan.stages[-1].weight.shape[0], plan.criterion
        )
    with torch.autocast(x.device.type, enabled=False):
        done = reference.sweep(
            plan.stages,
            x,
            target,
            context,
            plan.criterion,
            list(map(bool, active)),
            plan.precision == "bfloat16",
            network_input,
        )
    plan._pending = done
    return done.output, done.loss, done.input_gradient


def sweep_update_(
    plan: SweepPlan,
    gradient: Tensor | None,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    active: list[int],
    caller: str = "sweep",
) -> Tensor:
    """The rest of the step that `sweep_forward_` began: every update.

    Args:
        gradient: what the stage above sends back, (B, N); None where the plan has a criterion.
        Others as `sweep_`.

    Returns:
        The synthesis losses.
    """
    if plan.handle:
        return _update(
            plan.handle, caller, gradient, plan.parameters, state, groups, settings, active
        )
    done, plan._pending = plan._pending, None
    if plan.structure is not None:
        _check_state(plan, state, groups, settings, caller)
        return plan.structure.update(done, gradient, plan.parameters, state, groups, settings)
    gradients, losses = done.gradients, done.synthesis_loss
    if done.regress_top is not None and gradient is not None:
        loss, of_top = done.regress_top(gradient)
        made = plan.stages[-1].input_synthesizer  # whose gradients come last
        end = len(gradients) - (0 if made is None else len(made.tensors()))
        gradients = gradients[: end - len(of_top)] + of_top + gradients[end:]
        losses = losses.clone()
        losses.view(-1, len(plan.stages))[0, -1] = loss
    found = dict(zip(map(id, plan.parameters), gradients, strict=True))
    with torch.no_grad():
        for parameter, row, own in reference.assigned(plan.parameters, state, groups, settings):
            if found[id(parameter)] is not None:
                reference.optimizer_update(row, parameter, found[id(parameter)], own)
    return losses
