"""A synthesizer at one trigger: its prediction, and what regressing it takes.

The formulas and letters are those of `fastdni.reference.synthesizer`.
"""

from typing import NamedTuple

from torch import Tensor

from fastdni.reference import (
    OptimizerSettings,
    SynthesizerParameters,
    accumulate_dtype,
    reduction_divisor,
)
from fastdni.triton.layer import Layer, layer
from fastdni.triton.loss import total
from fastdni.triton.op import op
from fastdni.triton.tile import Precision
from fastdni.triton.update import Target, apply


class Gradient(NamedTuple):
    """What trains a layer: grad^T x is the weight's gradient, the column sums of `sums` are the
    biases'."""

    grad: Tensor | None  # (B, N)
    x: Tensor | None  # (B, K), or labels (B,) for their one-hot vectors
    weight: Tensor | None  # the parameters themselves
    sums: Tensor | None  # (P, N)
    biases: tuple[Tensor, ...]


class Evaluation:
    """M at a trigger.

    Args:
        parameters: of M.
        trigger: (B, K), contiguous.
        context: (B, C), labels (B,), or None.
        precision: of the products, as `SweepPlan` has it.
        h, activation: where the trigger is a stage's output h = phi(u), and the gradient of u is
            wanted with the prediction.

    Attributes:
        prediction: (B, N).
        du, sums: prediction * phi'(u), where it was asked for, and what its column sums are from.
    """

    def __init__(
        self,
        parameters: SynthesizerParameters,
        trigger: Tensor,
        context: Tensor | None,
        precision: Precision,
        h: Tensor | None = None,
        activation: str = "identity",
    ):
        self._begin(parameters, parameters.weights, trigger, context, precision)
        weights, biases = parameters.weights, parameters.biases
        for i, weight in enumerate(weights):
            last = i + 1 == len(weights)
            how = {"biases": (biases[i] if biases else None, None)}
            if i == 0 and self._context is not None:
                how = {
                    "biases": (biases[i] if biases else None, parameters.context_bias),
                    "context": self._context,
                    "context_weight": parameters.context_weight,
                }
            if last and h is not None:
                made = layer(
                    self._inputs[i], weight, precision, "synthesize", activation, other=h, **how
                )
                self.prediction, self.du, self.sums = made.out, made.second_out, made.sums
                break
            phi = "identity" if last else "relu"
            found = layer(self._inputs[i], weight, precision, "activate", phi, **how).out
            if last:
                self.prediction = found
            else:
                self._inputs.append(found)

    def _begin(self, parameters, weights, trigger, context, precision) -> None:
        self._parameters, self._weights, self._precision = parameters, weights, precision
        self._context = None if parameters.context_weight is None else context
        self._inputs, self.du, self.sums = [trigger], None, None

    @classmethod
    def of(
        cls, prediction: Tensor, hidden: list, parameters, weights, trigger, context, precision
    ) -> "Evaluation":
        """One that was made before with these weights; `parameters` are what it trains."""
        self = cls.__new__(cls)
        self._begin(parameters, weights, trigger, context, precision)
        self.prediction = prediction
        self._inputs += hidden
        return self

    @property
    def hidden(self) -> list[Tensor]:
        """The activations of the hidden layers, (B, H) each."""
        return self._inputs[1:]

    def regress(
        self, target: Tensor, weight: Tensor | None = None, divisor: float | None = None
    ) -> tuple[Tensor, list[Gradient]]:
        """The loss of the prediction beside what `target` is, or target @ weight, and what trains
        the layers, from above; by default the divisor is B."""
        p, precision = self.prediction, self._precision
        divisor = len(p) if divisor is None else divisor
        # e = p - target, and the gradient of the prediction.
        made = layer(
            target, weight, precision, "regress", transposed=True, other=p, scale=2 / divisor
        )
        return total(made.squares, divisor), self._gradients(made)

    def _gradients(self, made: Layer) -> list[Gradient]:
        """What trains the layers, from above, given the gradient of the prediction."""
        weights, biases = self._parameters.weights, self._parameters.biases
        found: list[Gradient] = []
        for i in reversed(range(len(weights))):
            grad, own = made.out, [biases[i]] if biases else []
            if i == 0 and self._context is not None:
                q = self._parameters.context_bias
                own += [] if q is None else [q]
                of_context = self._parameters.context_weight
                found.append(Gradient(grad, self._context, of_context, None, ()))
            found.append(Gradient(grad, self._inputs[i], weights[i], made.sums, tuple(own)))
            if i > 0:
                made = layer(
                    grad, self._weights[i], self._precision, "differentiate", "relu",
                    transposed=True, other=self._inputs[i],
                )  # fmt: skip
        return found


_WRITTEN = OptimizerSettings("gradient")


def matrix(tensor: Tensor) -> Tensor:
    """(..., K) -> (rows, K)"""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]).contiguous()


@op("triton_synthesizer_fwd")
def synthesizer_fwd(
    trigger: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    context_weight: Tensor | None,
    context_bias: Tensor | None,
    precision: str,
) -> list[Tensor]:
    """The prediction, then the activations of the hidden layers; see `fastdni.ops`."""
    given = (weights, biases, context_weight, context_bias)
    parameters = SynthesizerParameters(*given).contiguous()
    beside = None if context is None else matrix(context)
    made = Evaluation(parameters, matrix(trigger), beside, Precision(precision))
    return [made.prediction.reshape(*trigger.shape[:-1], weights[-1].shape[0]), *made.hidden]


@op("triton_synthesizer_bwd")
def synthesizer_bwd(
    target: Tensor,
    prediction: Tensor,
    hidden: list[Tensor],
    trigger: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    reduction: str,
    precision: str,
    scale: float | None = None,
) -> list[Tensor]:
    """The loss, then the gradients of the parameters; see `fastdni.ops`."""
    # The gradients take the parameters' places: what trains a layer names these.
    grads = SynthesizerParameters(
        [weight.new_empty(weight.shape) for weight in weights],
        [weight.new_empty(weight.shape[0]) for weight in weights] if bias else [],
    )
    if context is not None:
        first = weights[0]
        of_context = first.new_empty(first.shape[0], context.shape[-1])
        q = first.new_empty(first.shape[0]) if bias else None
        grads = grads._replace(context_weight=of_context, context_bias=q)
    beside = None if context is None else matrix(context)
    of_products = Precision(precision)
    made = Evaluation.of(
        matrix(prediction), list(map(matrix, hidden)), grads,
        [weight.contiguous() for weight in weights], matrix(trigger), beside, of_products,
    )  # fmt: skip
    divisor = reduction_divisor(target, reduction) if scale is None else 2 / scale
    loss, gradients = made.regress(matrix(target), divisor=divisor)
    for grad, x, weight, sums, biases in gradients:
        of_biases = [Target(b, [b], _WRITTEN) for b in biases]
        apply(grad, x, Target(weight, [weight], _WRITTEN), sums, of_biases, of_products)
    return [loss.to(accumulate_dtype(prediction.dtype)), *grads.tensors()]
