"""synthesizer: the forward pass of M(h, ctx), and its regression when the target arrives.

No autograd graph is built for the synthesizer: its forward op keeps what its backward op needs, and
one backward call gives the loss and every parameter's gradient. They reach autograd through a node
(`regress_when_gradient_arrives`) whose inputs are the parameters, so that hooks, `p.grad` and
`torch.autograd.grad` see them as they would see any gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdni import backend, reference

_DEVICES = backend.kernel_devices("synthesizer_fwd")


class SynthesizerParameters(NamedTuple):
    """The parameters of a synthesizer: the letters of `fastdni.reference.synthesizer_fwd`."""

    weights: list[Tensor]
    biases: list[Tensor]
    context_weight: Tensor | None = None
    context_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of `synthesizer_bwd`'s gradients."""
        optional = (self.context_weight, self.context_bias)
        return [*self.weights, *self.biases, *(p for p in optional if p is not None)]

    def to(self, dtype: torch.dtype) -> "SynthesizerParameters":
        def cast(p):
            return None if p is None else p.to(dtype)

        return SynthesizerParameters(
            [cast(p) for p in self.weights],
            [cast(p) for p in self.biases],
            cast(self.context_weight),
            cast(self.context_bias),
        )


@torch.library.register_fake("fastdni::synthesizer_fwd")
def _(trigger, context, weights, biases, context_weight, context_bias):
    rows = trigger.shape[:-1].numel()
    hidden = [trigger.new_empty(rows, weight.shape[0]) for weight in weights[:-1]]
    return trigger.new_empty(*trigger.shape[:-1], weights[-1].shape[0]), hidden


@torch.library.register_fake("fastdni::synthesizer_bwd")
def _(target, prediction, hidden, trigger, context, weights, bias, reduction):
    wide = torch.float32 if prediction.dtype == torch.bfloat16 else prediction.dtype
    grads = [torch.empty_like(weight) for weight in weights]
    if bias:
        grads += [weight.new_empty(weight.shape[0]) for weight in weights]
    if context is not None:
        grads.append(weights[0].new_empty(weights[0].shape[0], context.shape[-1]))
        if bias:
            grads.append(weights[0].new_empty(weights[0].shape[0]))
    return prediction.new_empty((), dtype=wide), grads


@torch.library.register_fake("fastdni::synthesizer_check")
def _(trigger, context, weights, biases, context_weight, context_bias):
    return None


def synthesizer_fwd(
    trigger: Tensor, context: Tensor | None, parameters: SynthesizerParameters
) -> tuple[Tensor, list[Tensor]]:
    """What the synthesizer predicts, and what its regression needs later.

    The formula, shapes and letters are those of `fastdni.reference.synthesizer_fwd`.

    Args:
        trigger: h, (..., K), in the parameters' dtype: float32, float64 or bfloat16 (others are
            served by the reference). Sums are float32 for bfloat16.
        context: ctx, (..., C), or None.
        parameters: of the synthesizer.

    Returns:
        The prediction, (..., N), and the activations of the hidden layers.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
    """
    for name, tensor in (("context", context), ("weights[0]", parameters.weights[0])):
        if tensor is not None and tensor.device != trigger.device:
            # Looked at here: the dispatcher picks a kernel by the devices before any rule runs.
            raise RuntimeError(
                f"synthesizer: {name} must be on trigger's device {trigger.device}, "
                f"got {tensor.device}"
            )
    if backend.serves(trigger, _DEVICES):
        return torch.ops.fastdni.synthesizer_fwd(trigger, context, *parameters)
    torch.ops.fastdni.synthesizer_check(trigger, context, *parameters)
    return reference.synthesizer_fwd(trigger, context, *parameters)


def synthesizer_bwd(
    target: Tensor,
    prediction: Tensor,
    hidden: list[Tensor],
    trigger: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    reduction: str = "batchmean",
) -> tuple[Tensor, list[Tensor]]:
    """The regression loss of a prediction and every parameter's gradient, in one call.

    The formula, shapes and letters are those of `fastdni.reference.synthesizer_bwd`.

    Returns:
        The loss, 0-d, and the gradients in the order of `SynthesizerParameters.tensors`.
    """
    if backend.serves(prediction, _DEVICES):
        op = torch.ops.fastdni.synthesizer_bwd
    else:
        op = reference.synthesizer_bwd
    return op(target, prediction, hidden, trigger, context, weights, bias, reduction)


def num_parameters_of(num_layers: int, bias: bool, context: Tensor | None) -> int:
    """The length of `SynthesizerParameters.tensors`."""
    return (num_layers + (context is not None)) * (2 if bias else 1)


class _RegressWhenGradientArrives(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, carrier, synthetic, prediction, trigger, context, num_layers, bias, reduction, *tensors
    ):
        # tensors: the hidden activations, the parameters (to be given their gradients), and the
        # weights as they were used, where autocast cast them.
        num_hidden, num_parameters = num_layers - 1, num_parameters_of(num_layers, bias, context)
        cast_weights = tensors[num_hidden + num_parameters :]
        weights = cast_weights or tensors[num_hidden : num_hidden + num_layers]
        ctx.save_for_backward(
            prediction, trigger, context, synthetic, *tensors[:num_hidden], *weights
        )
        ctx.num_hidden, ctx.bias, ctx.reduction = num_hidden, bias, reduction
        ctx.num_cast = len(cast_weights)
        # A fresh tensor: what comes next may well change it in place.
        return carrier.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        prediction, trigger, context, synthetic, *kept = ctx.saved_tensors
        hidden, weights = kept[: ctx.num_hidden], kept[ctx.num_hidden :]
        _, grads = synthesizer_bwd(
            gradient.to(prediction.dtype),
            prediction,
            hidden,
            trigger,
            context,
            weights,
            ctx.bias,
            ctx.reduction,
        )
        sent = gradient if synthetic is None else synthetic
        return (sent, *[None] * (7 + len(hidden)), *grads, *[None] * ctx.num_cast)


def regress_when_gradient_arrives(
    carrier: Tensor,
    prediction: Tensor,
    hidden: list[Tensor],
    trigger: Tensor,
    context: Tensor | None,
    used: SynthesizerParameters,
    parameters: SynthesizerParameters,
    reduction: str = "batchmean",
    synthetic_gradient: Tensor | None = None,
) -> Tensor:
    """A copy of `carrier`; the gradient that comes back to it is the synthesizer's target.

    Args:
        carrier: the tensor to copy, with the prediction's shape.
        prediction, hidden: what `synthesizer_fwd` returned for trigger and context.
        used: the parameters it was given.
        parameters: the parameters that get the gradients: the same, unless autocast cast them.
        reduction: `"batchmean"` or `"mean"`.
        synthetic_gradient: sent on to carrier in place of the gradient that arrives; by default
            that gradient passes unchanged.

    Returns:
        The copy; it requires grad when a parameter does.
    """
    cast_weights = () if used is parameters else used.weights
    tensors = (*hidden, *parameters.tensors(), *cast_weights)
    return _RegressWhenGradientArrives.apply(
        carrier,
        synthetic_gradient,
        prediction,
        trigger,
        context,
        len(used.weights),
        bool(used.biases),
        reduction,
        *tensors,
    )
