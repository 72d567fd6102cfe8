"""A step of decoupled stages by Triton kernels.

The order of things, the formulas and the letters are those of `fastdni.reference.sweep`. Memory
between kernels is torch's: the step can be traced, and captured in a CUDA graph.
"""

import itertools
import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdni.reference import SweepStage, SynthesizerParameters, assigned
from fastdni.triton.layer import layer
from fastdni.triton.loss import criterion
from fastdni.triton.norm import norm, norm_gradient
from fastdni.triton.op import on_device, op
from fastdni.triton.synthesizer import Evaluation, Gradient
from fastdni.triton.tile import Precision
from fastdni.triton.update import Target, apply


class SweepResult(NamedTuple):
    """As `fastdni.reference.SweepResult`; gradients are what makes them, in any order."""

    output: Tensor
    loss: Tensor | None
    synthesis_loss: Tensor
    gradients: list[Gradient]
    precision: Precision
    input_gradient: Tensor | None
    regress_top: Callable[[Tensor], tuple[Tensor, list[Gradient]]] | None


@torch.no_grad()
def sweep(
    stages: list[SweepStage],
    x: Tensor,
    target: Tensor | None,
    context: Tensor | None,
    criterion_name: str | None,
    active: list[bool],
    precision: Precision,
    network_input: Tensor | None = None,
    input_gradient: bool = False,
) -> SweepResult:
    """Losses of a step and what makes its gradients; moves the running statistics.

    Args:
        precision: of the products, as `SweepPlan` has it.
        input_gradient: whether the gradient of x is wanted.
        Others as `fastdni.reference.sweep`.
    """
    x = x.contiguous()
    beside = target if context is None else context
    beside = None if beside is None else beside.contiguous()
    network_input = x if network_input is None else network_input.contiguous()
    nan = torch.full((), float("nan"), device=x.device)

    def evaluate(synthesizer: SynthesizerParameters, trigger: Tensor, *h) -> Evaluation:
        return Evaluation(synthesizer, trigger, beside, precision, *h)

    unlocked = stages[0].input_synthesizer is not None
    made = [
        evaluate(stage.input_synthesizer, network_input)
        for stage in stages
        if stage.input_synthesizer is not None
    ]
    gradients: list[Gradient] = []
    losses: list[Tensor] = []
    input_losses: list[Tensor] = []
    below: Evaluation | None = None  # what the stage's delta is the target of
    h, loss, of_input, regress_top = x, None, None, None
    for index, stage in enumerate(stages):
        stage_input = made[index - 1].prediction if unlocked and index > 0 else h
        phi = stage.activation if stage.norm is None else "identity"
        own = (stage.bias, None)
        h = layer(stage_input, stage.weight, precision, "activate", phi, biases=own).out
        if stage.norm is not None:
            h, normalized, inverse = norm(h, stage.norm, stage.activation)
        du, sums, evaluation = None, None, None
        if stage.synthesizer is not None:
            evaluation = evaluate(stage.synthesizer, h, h, stage.activation)
            du, sums = evaluation.du, evaluation.sums
            if unlocked:
                evaluation = evaluate(stage.synthesizer, made[index].prediction)
        elif criterion_name is not None:
            loss, du = criterion(h, target.contiguous(), criterion_name, stage.activation)
            sums = du
        if active[index]:
            dz = du
            if stage.norm is not None:
                sums, of_gamma, of_beta = norm_gradient(du, normalized, inverse, stage.norm)
                dz = sums
                if stage.norm.weight is not None:
                    gradients += [
                        Gradient(None, None, None, of_gamma[None], (stage.norm.weight,)),
                        Gradient(None, None, None, of_beta[None], (stage.norm.bias,)),
                    ]
            own = () if stage.bias is None else (stage.bias,)
            gradients.append(Gradient(dz, stage_input, stage.weight, sums, own))
            if below is not None:
                found, of_synthesizer = below.regress(dz, stage.weight)
                losses.append(found)
                gradients += of_synthesizer
            elif input_gradient:
                of_input = layer(dz, stage.weight, precision, transposed=True).out
        elif below is not None:
            losses.append(nan)
        if stage.input_synthesizer is not None:
            if active[index + 1]:
                found, of_synthesizer = made[index].regress(h)
                input_losses.append(found)
                gradients += of_synthesizer
            else:
                input_losses.append(nan)
        below = evaluation
    if below is not None:
        losses.append(nan)
        regress_top = below.regress if active[-1] else None
    synthesis_loss = torch.stack(losses) if losses else x.new_empty(0)
    if unlocked:
        synthesis_loss = torch.stack([synthesis_loss, torch.stack(input_losses)])
    output = made[-1].prediction if unlocked and criterion_name is None else h
    return SweepResult(output, loss, synthesis_loss, gradients, precision, of_input, regress_top)


class Structure:
    """Stages without their tensors: the op below is given these again at every step."""

    def __init__(self, stages: list[SweepStage], criterion: str, precision: str):
        self.criterion, self.precision = criterion, precision
        leaves, self._spec = tree_flatten(stages)
        # Of each leaf where its tensor comes: among the parameters, or the statistics.
        numbers: dict[int, tuple[int, int]] = {}
        parameters = [p for stage in stages for p in stage.parameters()]
        statistics = [t for stage in stages for t in stage.statistics()]
        for kind, tensors in enumerate((parameters, statistics)):
            numbers |= {id(tensor): (kind, n) for n, tensor in enumerate(tensors)}
        self._leaves = [numbers.get(id(leaf), leaf) for leaf in leaves]
        self.number = next(_numbers)
        _structures[self.number] = self

    def stages(self, *tensors: list[Tensor]) -> list[SweepStage]:
        """With these parameters and statistics."""
        leaves = [
            tensors[leaf[0]][leaf[1]] if isinstance(leaf, tuple) else leaf for leaf in self._leaves
        ]
        return tree_unflatten(leaves, self._spec)

    # A part of a network, in two calls.

    def forward(
        self, stages, x, target, context, active, network_input, input_gradient
    ) -> SweepResult:
        """See `fastdni.ops.sweep_forward_`."""
        with on_device(x):
            return sweep(
                stages, x, target, context, self.criterion, list(map(bool, active)),
                Precision(self.precision), network_input, input_gradient,
            )  # fmt: skip

    def update(self, done: SweepResult, gradient, parameters, state, groups, settings) -> Tensor:
        """See `fastdni.ops.sweep_update_`."""
        gradients, losses = done.gradients, done.synthesis_loss
        with on_device(losses), torch.no_grad():
            if done.regress_top is not None and gradient is not None:
                loss, of_top = done.regress_top(gradient.contiguous())
                gradients = gradients + of_top
                losses = losses.clone()
                (losses[0] if losses.dim() == 2 else losses)[-1] = loss
            update(gradients, parameters, state, groups, settings, done.precision)
        return losses


_numbers = itertools.count(1)
_structures: "weakref.WeakValueDictionary[int, Structure]" = weakref.WeakValueDictionary()


@op("triton_sweep_", mutates_args=("parameters", "statistics", "state"))
def sweep_(
    structure: int,
    x: Tensor,
    target: Tensor,
    context: Tensor | None,
    parameters: list[Tensor],
    statistics: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    active: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of a whole network: output, loss and synthesis losses; see `fastdni.ops.sweep_`."""
    of = _structures[structure]
    done = sweep(
        of.stages(parameters, statistics), x, target, context, of.criterion,
        list(map(bool, active)), Precision(of.precision),
    )  # fmt: skip
    update(done.gradients, parameters, state, groups, settings, done.precision)
    return done.output, done.loss, done.synthesis_loss


@torch.no_grad()
def update(
    gradients: list[Gradient],
    parameters: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    precision: Precision,
) -> None:
    """Every update; the arguments are those of `fastdni.reference.assigned`."""
    targets: dict[int, Target] = {}
    counts = []
    for parameter, row, own in assigned(parameters, state, groups, settings):
        kept, lr_at, step, step_at = list(own), None, 1.0, None
        if math.isnan(row.lr):
            lr_at = kept.pop()
            row = row._replace(lr=0.0)
            if lr_at.device != parameter.device:
                row, lr_at = row._replace(lr=lr_at.item()), None
        if row.rule in ("adam", "adamw"):
            *kept, count = kept
            counts.append(count)
            if count.device == parameter.device:
                step_at = count
            else:
                step = count.item() + 1
        targets[id(parameter)] = Target(parameter, kept, row, step, step_at, lr_at)
    if counts:
        torch._foreach_add_(counts, 1.0)
    for grad, x, weight, sums, biases in gradients:
        of_weight = targets.get(id(weight))
        of_biases = [targets[id(bias)] for bias in biases if id(bias) in targets]
        if of_weight is not None or of_biases:
            apply(grad, x, of_weight, sums, of_biases, precision)
