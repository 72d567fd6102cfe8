"""What a synthesizer is given, made at random, and what must come of it."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tolerances import assert_near
from torch import Tensor

from fastdni import ops, reference
from fastdni.ops import SynthesizerParameters

CONTEXT = 10
PARTS = ["trigger", "context", "target", "weights", "biases", "context_weight", "context_bias"]


class Sizes(NamedTuple):
    trigger: int
    hidden: int
    output: int


class Problem(NamedTuple):
    """All that the two ops are given."""

    trigger: Tensor
    context: Tensor | None
    target: Tensor
    parameters: SynthesizerParameters

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(x):
            if isinstance(x, list):
                return [cast(y) for y in x]
            return None if x is None else x.to(dtype)

        parameters = SynthesizerParameters(*map(cast, self.parameters))
        return Problem(cast(self.trigger), cast(self.context), cast(self.target), parameters)

    def tensors(self) -> list[Tensor]:
        context = [] if self.context is None else [self.context]
        return [self.trigger, self.target, *context, *self.parameters.tensors()]


def problem(
    leading=(4,),
    sizes=Sizes(5, 6, 3),  # noqa: B008  (immutable)
    n_hidden=1,
    context=True,
    bias=True,
    dtype=torch.float32,
    device="cpu",
) -> Problem:
    def normal(*shape):
        return torch.randn(shape, device=device)

    widths = [sizes.trigger, *[sizes.hidden] * n_hidden, sizes.output]
    pairs = list(itertools.pairwise(widths))
    first = widths[1]
    parameters = SynthesizerParameters(
        [normal(n, k) / k**0.5 for k, n in pairs],
        [normal(n) for _, n in pairs] if bias else [],
        normal(first, CONTEXT) / CONTEXT**0.5 if context else None,
        normal(first) if context and bias else None,
    )
    made = Problem(
        normal(*leading, sizes.trigger),
        normal(*leading, CONTEXT) if context else None,
        normal(*leading, sizes.output),
        parameters,
    )
    return made.to(dtype)


def forward(of, p: Problem) -> list[Tensor]:
    """The prediction and the hidden activations, by `ops` or by `reference`."""
    parameters = [p.parameters] if of is ops else p.parameters
    prediction, hidden = of.synthesizer_fwd(p.trigger, p.context, *parameters)
    return [prediction, *hidden]


def backward(of, p: Problem, activations: list[Tensor], reduction="batchmean") -> list[Tensor]:
    """The loss and the gradients, given what `forward` returned."""
    prediction, *hidden = activations
    bias = len(p.parameters.biases) > 0
    loss, grads = of.synthesizer_bwd(
        p.target, prediction, hidden, p.trigger, p.context, p.parameters.weights, bias, reduction
    )
    return [loss, *grads]


def plain_autograd(p: Problem, reduction="batchmean") -> list[Tensor]:
    """Prediction, loss and gradient by autograd of the formula, written with torch alone."""
    leaves = [x.detach().clone().requires_grad_() for x in p.parameters.tensors()]
    left = list(leaves)
    weights = [left.pop(0) for _ in p.parameters.weights]
    biases = [left.pop(0) for _ in p.parameters.biases] or [None] * len(weights)
    a = F.linear(p.trigger, weights[0], biases[0])
    if p.context is not None:
        a = a + F.linear(p.context, *left)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        a = F.linear(a.relu(), weight, bias)
    count = a.shape[0] if reduction == "batchmean" else a.numel()
    loss = (a - p.target).square().sum() / max(count, 1)
    loss.backward()
    return [a.detach(), loss.detach(), as_one([leaf.grad for leaf in leaves])]


def as_one(grads: list[Tensor]) -> Tensor:
    """The gradient as one vector: what cancels within a parameter is small beside the others."""
    return torch.cat([grad.flatten() for grad in grads])


def assert_right(p: Problem, reduction="batchmean") -> None:
    """Each op against the reference on the inputs that it gets, and both ops against autograd."""
    wide = p.to(torch.float64)
    activations = forward(ops, p)
    assert_near(activations, forward(reference, wide), forward(reference, p))
    widened = [a.double() for a in activations]
    result = backward(ops, p, activations, reduction)
    oracle = backward(reference, wide, widened, reduction)
    assert_near(result, oracle, backward(reference, p, activations, reduction))
    if p.trigger.dtype != torch.bfloat16:  # few rounded values are no measure: see below
        both = [activations[0], result[0], as_one(result[1:])]
        assert_near(both, plain_autograd(wide, reduction), plain_autograd(p, reduction))
