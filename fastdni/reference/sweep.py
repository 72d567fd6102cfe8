"""A step of decoupled stages, written out: design and letters of every backend.

Jaderberg et al. 2016 (arXiv 1608.05343), sections 2 and 3. Stage l of L, batch B:

    F   z = x W^T + b;   u = BN(z) if the stage has one;   h = phi(u) * m
    S   g^ = M(h, ctx)
        du = g^ * m * phi'(u) (topmost stage: the criterion's gradient);   dz = du through BN
    D   delta = dz W, the target of the synthesizer below
        e = g^_below - delta;   synthesis loss = ||e||^2 / B
    U   dW = dz^T x, db = sum dz, dgamma = sum du z~, dbeta = sum du (z~ the normalised z);
        those of M as in `fastdni.reference.synthesizer_bwd`

m is the noise of Dropout, 0 or 1 / (1 - p) for each element; without Dropout there is none.
A stage's input x is the output of the stage below. In complete unlock (section 2.3) it is I(x_0,
ctx), which a second synthesizer predicts from the network's input x_0 and regresses on the output h
that the stage below really makes: e = I(x_0, ctx) - h. M is then regressed at I(x_0, ctx) as well.

No gradient passes from one stage to another, or through M, I or ctx. All are taken with the
parameters as they were before the step.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdni.reference.synthesizer import (
    SynthesizerParameters,
    synthesizer_bwd,
    synthesizer_fwd,
)


class SweepNorm(NamedTuple):
    """BatchNorm1d over the batch's own statistics."""

    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor, Tensor] | None  # mean, variance, number of batches
    momentum: float | None  # None: plain averages
    eps: float


class SweepStage(NamedTuple):
    """A stage and the synthesizers of the boundary above it."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    norm: SweepNorm | None
    activation: str  # "identity", "relu", "tanh" or "sigmoid"
    synthesizer: SynthesizerParameters | None = None
    input_synthesizer: SynthesizerParameters | None = None
    dropout: bool = False  # each step brings noise

    def parameters(self) -> list[Tensor]:
        """Those that there are, in the order of the sweep's gradients."""
        norm = [] if self.norm is None else [self.norm.weight, self.norm.bias]
        own = [t for t in (self.weight, self.bias, *norm) if t is not None]
        synthesizers = (self.synthesizer, self.input_synthesizer)
        return own + [t for s in synthesizers if s is not None for t in s.tensors()]

    def statistics(self) -> list[Tensor]:
        """running_mean, running_var and num_batches_tracked, where there are any."""
        return [] if self.norm is None or self.norm.running is None else [*self.norm.running]


class SweepResult(NamedTuple):
    """What a step makes.

    `gradients` are in the order of the stages' parameters, None where masked. Where the network
    goes on above, those of the topmost synthesizer come from `regress_top`, which takes what the
    stage above sends back and gives the loss and the gradients; until then they are None and the
    loss is NaN.
    """

    output: Tensor  # (B, N)
    loss: Tensor | None  # ()
    synthesis_loss: (
        Tensor  # (synthesizers,), or (2, synthesizers) in complete unlock; NaN if masked
    )
    gradients: list[Tensor | None]
    input_gradient: Tensor | None  # (B, K), delta of the lowest stage
    regress_top: Callable[[Tensor], tuple[Tensor, list[Tensor]]] | None


_ACTIVATIONS = {
    # phi(u), and grad * phi'(u) from h = phi(u)
    "identity": (lambda u: u, lambda grad, h: grad),
    "relu": (torch.relu, lambda grad, h: grad.masked_fill(h <= 0, 0)),
    "tanh": (torch.tanh, lambda grad, h: grad * (1 - h * h)),
    "sigmoid": (torch.sigmoid, lambda grad, h: grad * (h * (1 - h))),
}


def _normalize(z: Tensor, norm: SweepNorm) -> tuple[Tensor, Tensor, Tensor]:
    """u, the normalised z and 1 / sqrt(variance + eps); moves the running statistics."""
    mean, variance = z.mean(0), z.var(0, unbiased=False)
    inverse = (variance + norm.eps).rsqrt()
    normalized = (z - mean) * inverse
    if norm.running is not None:
        running_mean, running_variance, count = norm.running
        count += 1
        momentum = 1 / count.item() if norm.momentum is None else norm.momentum
        running_mean.lerp_(mean, momentum)
        running_variance.lerp_(z.var(0, unbiased=True), momentum)
    u = normalized if norm.weight is None else normalized * norm.weight + norm.bias
    return u, normalized, inverse


def criterion(output: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The criterion's loss and its gradient with respect to the output.

    "cross_entropy": mean of -log softmax at the labels (those of -100 do not count);
    "mse": mean of squared differences over all elements.
    """
    if name == "mse":
        difference = output - target
        return difference.square().mean(), 2 / difference.numel() * difference
    counted = target != -100
    labels = target.masked_fill(~counted, 0).unsqueeze(1)
    log_probability = output.log_softmax(1)
    count = counted.sum()
    # Masked and not picked out: to know how many there are would be to wait for a GPU.
    found = log_probability.gather(1, labels).squeeze(1).masked_fill(~counted, 0)
    loss = -found.sum() / count
    gradient = log_probability.exp().scatter_add(
        1, labels, -torch.ones_like(labels, dtype=output.dtype)
    )
    return loss, gradient * counted.unsqueeze(1) / count.clamp(min=1)


def one_hot(labels: Tensor, width: int, like: Tensor) -> Tensor:
    """(B,) labels as the context (B, width); rows of a label below zero are zero."""
    return (labels.unsqueeze(1) == torch.arange(width, device=labels.device)).to(like.dtype)


def _rounded_product(a: Tensor, b: Tensor) -> Tensor:
    return a.bfloat16().to(a.dtype) @ b.bfloat16().to(b.dtype)


class _Evaluation:
    """A synthesizer at one trigger."""

    def __init__(self, synthesizer: SynthesizerParameters, trigger, context, target, product):
        if synthesizer.context_weight is None:
            context = None
        elif context is None:
            context = one_hot(target, synthesizer.context_weight.shape[1], trigger)
        self.synthesizer, self.trigger, self.context = synthesizer, trigger, context
        self.product = product
        self.prediction, self.hidden = synthesizer_fwd(trigger, context, *synthesizer, product)

    def regress(self, target: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The synthesis loss and the gradients of the parameters."""
        weights, biases = self.synthesizer.weights, self.synthesizer.biases
        return synthesizer_bwd(
            target,
            self.prediction,
            self.hidden,
            self.trigger,
            self.context,
            weights,
            len(biases) > 0,
            "batchmean",
            self.product,
        )


@torch.no_grad()
def sweep(
    stages: list[SweepStage],
    x: Tensor,
    target: Tensor | None,
    context: Tensor | None,
    criterion_name: str | None,
    active: list[bool],
    bfloat16: bool = False,
    network_input: Tensor | None = None,
    noise: Sequence[Tensor] = (),
) -> SweepResult:
    """Losses and gradients of a step; moves the running statistics and nothing else.

    Args:
        stages: from the input on.
        x: (B, K).
        target: of the criterion; also what a missing context is made of.
        context: (B, C), or None for one-hot labels where a synthesizer takes a context.
        criterion_name: "cross_entropy", "mse", or None when the network goes on above.
        active: for each stage and the one above whether it is updated; a masked stage only runs F.
            The synthesizers of the boundary below a masked stage are not updated either.
        bfloat16: round the operands of every product to bfloat16.
        network_input: what input synthesizers predict from, where that is not x: these stages are
            then a part of a network.
        noise: (B, N) for each stage with Dropout, from below.
    """
    product = _rounded_product if bfloat16 else torch.matmul

    def evaluate(synthesizer: SynthesizerParameters, trigger: Tensor) -> _Evaluation:
        return _Evaluation(synthesizer, trigger, context, target, product)

    unlocked = stages[0].input_synthesizer is not None
    made = [
        evaluate(stage.input_synthesizer, x if network_input is None else network_input)
        for stage in stages
        if stage.input_synthesizer is not None
    ]
    outputs, backwards, predictions = [], [], []
    h, drawn = x, iter(noise)
    for index, stage in enumerate(stages):
        stage_input = made[index - 1].prediction if unlocked and index > 0 else h
        z = product(stage_input, stage.weight.t())
        if stage.bias is not None:
            z = z + stage.bias
        u, normalized, inverse = z, None, None
        if stage.norm is not None:
            u, normalized, inverse = _normalize(z, stage.norm)
        h = phi = _ACTIVATIONS[stage.activation][0](u)
        m = next(drawn) if stage.dropout else None
        if m is not None:
            h = phi * m
        outputs.append(h)
        backwards.append((stage_input, normalized, inverse, phi, m))
        if stage.synthesizer is not None:
            predictions.append(evaluate(stage.synthesizer, h))

    loss, loss_gradient = None, None
    if criterion_name is not None:
        loss, loss_gradient = criterion(h, target, criterion_name)

    own_gradients, deltas = [], []
    for index, stage in enumerate(stages):
        if not active[index]:
            own_gradients.append(None)
            deltas.append(None)
            continue
        stage_input, normalized, inverse, phi, m = backwards[index]
        sent = loss_gradient if stage.synthesizer is None else predictions[index].prediction
        if m is not None:
            sent = sent * m
        du = _ACTIVATIONS[stage.activation][1](sent, phi)
        of_norm = []
        dz = du
        if stage.norm is not None:
            sums, dots = du.sum(0), (du * normalized).sum(0)
            dz = inverse * (du - du.mean(0) - normalized * dots / len(du))
            if stage.norm.weight is not None:
                dz = dz * stage.norm.weight
                of_norm = [dots, sums]
        bias = [] if stage.bias is None else [dz.sum(0)]
        own_gradients.append([product(dz.t(), stage_input), *bias, *of_norm])
        deltas.append(product(dz, stage.weight))

    targets = [*deltas[1:], None]
    regress_top = None
    gradients, losses, input_losses = [], [], []
    for index, stage in enumerate(stages):
        own = own_gradients[index]
        gradients += [None] * (len(stage.parameters()) - _size(stage)) if own is None else own
        above = active[index + 1]
        for synthesizer, kept in (
            (stage.synthesizer, losses),
            (stage.input_synthesizer, input_losses),
        ):
            if synthesizer is None:
                continue
            if not above:
                kept.append(x.new_full((), float("nan")))
                gradients += [None] * len(synthesizer.tensors())
                continue
            if kept is input_losses:
                found, of_synthesizer = made[index].regress(outputs[index])
            else:
                evaluation = predictions[index]
                if unlocked:
                    evaluation = evaluate(synthesizer, made[index].prediction)
                if targets[index] is None:
                    regress_top = evaluation.regress
                    kept.append(x.new_full((), float("nan")))
                    gradients += [None] * len(synthesizer.tensors())
                    continue
                found, of_synthesizer = evaluation.regress(targets[index])
            kept.append(found)
            gradients += of_synthesizer

    synthesis_loss = torch.stack(losses) if losses else x.new_empty(0)
    if unlocked:
        synthesis_loss = torch.stack([synthesis_loss, torch.stack(input_losses)])
    if unlocked and criterion_name is None:
        h = made[-1].prediction  # what the stage above trains on
    return SweepResult(h, loss, synthesis_loss, gradients, deltas[0], regress_top)


def _size(stage: SweepStage) -> int:
    """The number of parameters of the boundary's synthesizers."""
    synthesizers = (stage.synthesizer, stage.input_synthesizer)
    return sum(len(s.tensors()) for s in synthesizers if s is not None)
