"""synthesizer: the forward pass of M(h, ctx), and its regression when the target arrives.

No autograd graph is built for the synthesizer: its forward op keeps what its backward op needs, and
one backward call gives the loss and every parameter's gradient. They reach autograd through a node
(`regress_when_gradient_arrives`) whose inputs are the parameters, so that hooks, `p.grad` and
`torch.autograd.grad` see them as they would see any gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdni import backend, reference
from fastdni.reference import SynthesizerParameters

FROZEN = "synthetic_gradient should need gradient but it does not"

_DEVICES = backend.kernel_devices("synthesizer_fwd")
_fwd = torch.ops.fastdni.synthesizer_fwd.default
_bwd = torch.ops.fastdni.synthesizer_bwd.default


@torch.library.register_fake("fastdni::synthesizer_fwd")
def _(trigger, context, weights, biases, context_weight, context_bias, precision="exact"):
    rows = trigger.shape[:-1].numel()
    hidden = [trigger.new_empty(rows, weight.shape[0]) for weight in weights[:-1]]
    return trigger.new_empty(*trigger.shape[:-1], weights[-1].shape[0]), hidden


@torch.library.register_fake("fastdni::synthesizer_bwd")
def _(target, prediction, hidden, trigger, context, weights, bias, reduction, precision="exact"):
    wide = reference.accumulate_dtype(prediction.dtype)
    grads = [weight.new_empty(weight.shape) for weight in weights]
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


@torch.library.register_fake("fastdni::synthesizer_bwd_check")
def _(target, prediction, hidden, trigger, context, weights, bias, reduction):
    return None


def _check_devices(
    trigger: Tensor, context: Tensor | None, parameters: SynthesizerParameters
) -> None:
    # Looked at here: the dispatcher picks a kernel by the devices before any rule runs.
    device = trigger.device
    for tensor in (context, *parameters.tensors()):
        if tensor is not None and tensor.device != device:
            arguments = {"context": [context], "weights": parameters.weights}
            arguments |= {"biases": parameters.biases, "context_bias": [parameters.context_bias]}
            arguments["context_weight"] = [parameters.context_weight]
            (name,) = (n for n, given in arguments.items() if any(t is tensor for t in given))
            raise RuntimeError(
                f"synthesizer: {name} must be on trigger's device {device}, got {tensor.device}"
            )


def synthesizer_fwd(
    trigger: Tensor, context: Tensor | None, parameters: SynthesizerParameters
) -> tuple[Tensor, list[Tensor]]:
    """What the synthesizer predicts, and what its regression needs later.

    The formula, shapes and letters are those of `fastdni.reference.synthesizer_fwd`.

    Args:
        trigger: h, (..., K), in the parameters' dtype: float32, float64 or bfloat16 (float16 is
            served by Triton or the reference). Sums are float32 for bfloat16.
        context: ctx, (..., C), or None.
        parameters: of the synthesizer.

    Returns:
        The prediction, (..., N), and the activations of the hidden layers.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 2.1.
    """
    _check_devices(trigger, context, parameters)
    server = backend.server(trigger, _DEVICES)
    if server in ("cpu", "cuda"):
        if not _is_narrow_on_a_gpu(trigger):
            return _fwd(trigger, context, *parameters, backend.precision(trigger.device, None))
        trigger, context, parameters = cast(trigger, context, parameters, torch.float32)
        prediction, hidden = _fwd(trigger, context, *parameters, "bfloat16")
        return prediction.bfloat16(), [h.bfloat16() for h in hidden]
    torch.ops.fastdni.synthesizer_check(trigger, context, *parameters)
    if server == "triton":
        prediction, *hidden = torch.ops.fastdni.triton_synthesizer_fwd(
            trigger, context, *parameters, _precision(trigger)
        )
        return prediction, hidden
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

    Args:
        target: what arrived, (..., N), in prediction's dtype, or float32 beside bfloat16.
        prediction, hidden: what `synthesizer_fwd` returned.
        trigger, context: what it was given.
        weights: the parameters' weights; of the first only the shape matters.
        bias: whether the layers have biases.
        reduction: `"batchmean"` (the divisor is target's first size) or `"mean"` (all elements).

    Returns:
        The loss, 0-d, and the gradients in the order of `SynthesizerParameters.tensors`. The loss
        of bfloat16 is float32, as is the error inside; gradients have the parameters' dtype.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or the reduction is unknown.

    Note:
        The sums between the products have a fixed order. The products are those of torch's
        libraries: the same bits run after run, the last of them may depend on the number of
        threads.
    """
    arguments = (target, prediction, hidden, trigger, context, weights, bias, reduction)
    server = backend.server(prediction, _DEVICES)
    if server in ("cpu", "cuda"):
        if not _is_narrow_on_a_gpu(prediction):
            return _bwd(*arguments, backend.precision(prediction.device, None))
        loss, grads = _bwd(*map(_widened, arguments), "bfloat16")
        return loss, [grad.bfloat16() for grad in grads]
    torch.ops.fastdni.synthesizer_bwd_check(*arguments)
    if server == "triton":
        loss, *grads = torch.ops.fastdni.triton_synthesizer_bwd(*arguments, _precision(prediction))
        return loss, grads
    return reference.synthesizer_bwd(*arguments)


def _precision(tensor: Tensor) -> str:
    """The precision of Triton's products of such tensors."""
    if tensor.dtype == torch.float32:
        return backend.precision(tensor.device, None)
    return str(tensor.dtype).removeprefix("torch.")


def _is_narrow_on_a_gpu(tensor: Tensor) -> bool:
    # The kernels there are for float32 in memory; their products may well be bfloat16.
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cuda"


def _widened(value):
    """Tensors, and lists of them, in float32."""
    if isinstance(value, list):
        return [_widened(v) for v in value]
    return value.float() if isinstance(value, Tensor) else value


def cast(
    trigger: Tensor, context: Tensor | None, parameters: SynthesizerParameters, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, SynthesizerParameters]:
    """The arguments of `synthesizer_fwd` in another dtype, as autocast wants them."""
    tensors = [tensor.to(dtype) for tensor in parameters.tensors()]
    parameters = SynthesizerParameters.of(
        tensors, len(parameters.weights), len(parameters.biases) > 0
    )
    return trigger.to(dtype), None if context is None else context.to(dtype), parameters


class _Regress(torch.autograd.Function):
    # The forward op runs in here, where no gradients are recorded. `tensors` are the parameters: to
    # compute with, and to be given their gradients. Everything that is no tensor comes in `how`: an
    # argument costs more than a tuple's entry, and this runs at every step.

    @staticmethod
    def forward(ctx, carrier, trigger, context, how, *tensors):
        if not any(ctx.needs_input_grad[4:]):
            raise ValueError(FROZEN)
        num_layers, bias, _, _, dtype = how
        parameters = SynthesizerParameters.of(tensors, num_layers, bias)
        if dtype is not None:
            trigger, context, parameters = cast(trigger, context, parameters, dtype)
        prediction, hidden = synthesizer_fwd(trigger, context, parameters)
        # The first weight's values are not needed later: it may change before the gradient comes.
        first_weight, *weights = parameters.weights
        ctx.save_for_backward(prediction, trigger, context, *hidden, *weights)
        ctx.first_weight, ctx.how = first_weight.detach(), how
        ctx.mark_non_differentiable(prediction)
        ctx.set_materialize_grads(False)
        # A copy: what comes next may well change it in place.
        return carrier.clone(), prediction

    @staticmethod
    def backward(ctx, gradient, _):
        if torch.is_grad_enabled():  # only under create_graph; the decorator is not for nothing
            return _regress_once_differentiable(ctx, gradient)
        return _regress(ctx, gradient)


def _regress(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    num_layers, bias, reduction, factor, _ = ctx.how
    prediction, trigger, context, *rest = ctx.saved_tensors
    hidden, weights = rest[: num_layers - 1], [ctx.first_weight, *rest[num_layers - 1 :]]
    if gradient is None:  # something downstream says that there is none: it is zero
        gradient = torch.zeros_like(prediction)
    target = gradient
    if gradient.dtype != prediction.dtype:  # under autocast: the error is formed in float32
        target = gradient.to(reference.accumulate_dtype(prediction.dtype))
    _, grads = synthesizer_bwd(
        target, prediction, hidden, trigger, context, weights, bias, reduction
    )
    if factor is not None:
        gradient = (prediction * factor).to(gradient.dtype)
    return (gradient, None, None, None, *grads)


_regress_once_differentiable = once_differentiable(_regress)


def regress_when_gradient_arrives(
    carrier: Tensor,
    trigger: Tensor,
    context: Tensor | None,
    parameters: SynthesizerParameters,
    reduction: str = "batchmean",
    factor: float | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Predicts, and makes the gradient that comes back to a copy of `carrier` the target.

    Args:
        carrier: the tensor to copy, with the prediction's shape.
        trigger: h, (..., K).
        context: ctx, (..., C), or None.
        parameters: of the synthesizer; they get the gradients of `synthesizer_bwd`.
        reduction: `"batchmean"` or `"mean"`.
        factor: None passes the gradient that arrives on to carrier; a number sends that many times
            the prediction in its place.
        dtype: what trigger, context and parameters are cast to first (autocast); None for nothing.

    Returns:
        The copy, which requires grad, and the prediction, which does not.

    Raises:
        ValueError: no parameter requires grad.
        RuntimeError: as `synthesizer_fwd`.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 2.1.
    """
    how = (len(parameters.weights), len(parameters.biases) > 0, reduction, factor, dtype)
    return _Regress.apply(carrier, trigger, context, how, *parameters.tensors())
