"""sweep: a step of consecutive decoupled stages, their losses and every update, in one call.

The formulas, shapes and letters are those of `fastdni.reference.sweep`, the updates those of
`fastdni.reference.optimizer_update`.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from fastdni import _C, backend, reference
from fastdni.ops.runners import RUNNERS
from fastdni.reference import OptimizerSettings, SweepStage, SynthesizerParameters

_DEVICES = backend.kernel_devices("sweep_")
_DROPOUT = ("cpu", "reference")  # the backends that have it
# What OpOverload calls: at small sizes its own call would be seen.
_repeat = torch.ops.fastdni.sweep_repeat_.default._op
# (caller, target, batch, outputs, criterion): raises unless the target fits.
sweep_check_target = torch.ops.fastdni.sweep_check_target.default
# Nothing here is differentiable: autograd looks past these ops, which saves a `no_grad` at each
# call.
_library = torch.library.Library("fastdni", "IMPL")
for _op in (
    "sweep_", "sweep_repeat_", "sweep_forward_", "sweep_update_", "sweep_check_forward",
    "sweep_check_update",
):  # fmt: skip
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def _fake_results(handle: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, loss and synthesis losses of a plan, without values."""
    outputs, boundaries, unlocked, _ = _C.plan_results(handle)
    losses = x.new_empty((2, boundaries) if unlocked else (boundaries,))
    return x.new_empty(len(x), outputs), x.new_empty(()), losses


@torch.library.register_fake("fastdni::sweep_")
def _(
    plan, caller, x, target, context, noise, parameters, statistics, state, groups, settings,
    active, repeatable,
):  # fmt: skip
    return _fake_results(plan, x)


@torch.library.register_fake("fastdni::sweep_forward_")
def _(plan, caller, x, target, context, network_input, noise, parameters, statistics, active):
    output, loss, _ = _fake_results(plan, x)
    return output, loss, x.new_empty(x.shape if _C.plan_results(plan)[3] else (0,))


@torch.library.register_fake("fastdni::sweep_update_")
def _(plan, caller, gradient, parameters, state, groups, settings, active):
    return _fake_results(plan, parameters[0])[2]


@torch.library.register_fake("fastdni::sweep_check_forward")
@torch.library.register_fake("fastdni::sweep_check_update")
@torch.library.register_fake("fastdni::sweep_check_target")
def _(*arguments):
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
        "dropout": stage.dropout,
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


def sweep_takes_dropout(stages: Sequence[SweepStage], batch: int, precision: str) -> bool:
    """Whether the backend that serves a sweep has Dropout."""
    return sweep_backend(stages, batch, precision) in _DROPOUT


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
        weight = stages[0].weight
        self.backend = sweep_backend(stages, batch, precision)
        runner = RUNNERS[self.backend]
        on_gpu = weight.device.type == "cuda"
        # What a GPU allows is asked of the current one.
        with torch.cuda.device(weight.device) if on_gpu else nullcontext():
            self._rules = _C.SweepPlan(
                stages=[_stage_spec(stage) for stage in stages],
                batch=batch,
                dtype=str(weight.dtype).removeprefix("torch."),
                gpu=None if weight.device.type == "cpu" else weight.get_device(),
                criterion=criterion or "none",
                input_gradient=input_gradient,
                precision=precision,
                separate_input=separate_input,
                runs=runner.compiled,
            )
        self.handle = self._rules.handle
        self.runner = runner(self)
        # Whether the last step's tensors are such as it was given.
        self.can_be_repeated = self._rules.can_be_repeated

    @property
    def parameter_stages(self) -> list[int]:
        """For each parameter the stage whose mask it shares; a synthesizer shares that above it."""
        return self._rules.parameter_stages

    @property
    def numbers(self) -> list[dict]:
        """Of each stage the numbers of its parameters, and of its running mean among the
        statistics; -1 where there is none."""
        return self._rules.numbers

    @property
    def compiled(self) -> bool:
        """Whether a compiled backend runs it, so that `sweep_repeat_` may follow a step, and data
        may lie in memory that the step writes."""
        return self.runner.compiled

    @property
    def steps(self) -> int:
        """Whole steps that were taken, where a compiled backend runs them."""
        return self._rules.steps

    @property
    def launches(self) -> str:
        """How a GPU's launches divide the step, in words; empty on the CPU."""
        return self.runner.launches or self._rules.launches

    @property
    def workspace_bytes(self) -> int:
        """Memory that the plan holds between steps; on a GPU, for each stream that takes them."""
        return self._rules.workspace_bytes


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
    noise: Sequence[Tensor] = (),
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
        repeatable: whether `sweep_repeat_` may follow.
        noise: (B, N) for each stage with Dropout, from below: what its output is multiplied by.

    Returns:
        The output (B, N), the loss (), and the synthesis losses: (S,), or in complete unlock
        (2, S), gradients and inputs; NaN at the boundary below a masked stage.

    Raises:
        RuntimeError: a shape, dtype, label or state does not fit; nothing has been written then.
    """
    return plan.runner.step(
        plan, caller, x, target, context, noise, state, groups, settings, active, repeatable
    )


def sweep_repeat_(
    plan: SweepPlan,
    x: Tensor,
    target: Tensor,
    context: Tensor | None,
    settings: list[float],
    caller: str = "sweep",
    noise: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """The last `sweep_` of a plan again, on other data: it takes and writes the same parameters,
    statistics and state.

    At small sizes handing the tensors over costs as much as the step. The plan has references to
    them that do not count: the caller keeps them, and asks `plan.can_be_repeated()` first.

    Args, returns, raises:
        As `sweep_`; also RuntimeError where the plan's last step was not repeatable.
    """
    return _repeat(plan.handle, caller, x, target, context, noise, settings)


def sweep_forward_(
    plan: SweepPlan,
    x: Tensor,
    target: Tensor | None,
    context: Tensor | None,
    active: list[int],
    caller: str = "sweep",
    network_input: Tensor | None = None,
    noise: Sequence[Tensor] = (),
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
    return plan.runner.forward(plan, caller, x, target, context, network_input, noise, active)


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
    return plan.runner.update(plan, caller, gradient, state, groups, settings, active)
