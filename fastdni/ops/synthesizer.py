"""synthesizer: the forward pass of M(h, ctx), and its regression when the target arrives.

No autograd graph is built for the synthesizer: its forward op keeps what its backward op needs, and
one backward call gives the loss and every parameter's gradient.
"""

import torch
from torch import Tensor

from fastdni import backend, reference
from fastdni.reference import SynthesizerParameters

FROZEN = (
    "synthetic_gradient should need gradient but it does not; an interface made with learn=False "
    "sends without learning"
)

_DEVICES = backend.kernel_devices("synthesizer_fwd")
_fwd = torch.ops.fastdni.synthesizer_fwd.default
_bwd = torch.ops.fastdni.synthesizer_bwd.default
# Autograd looks past them, which saves a `no_grad` at each call.
_library = torch.library.Library("fastdni", "IMPL")
for _op in ("synthesizer_fwd", "synthesizer_bwd"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdni::synthesizer_fwd")
def _(trigger, context, weights, biases, context_weight, context_bias, precision="exact"):
    rows = trigger.shape[:-1].numel()
    hidden = [trigger.new_empty(rows, weight.shape[0]) for weight in weights[:-1]]
    return trigger.new_empty(*trigger.shape[:-1], weights[-1].shape[0]), hidden


@torch.library.register_fake("fastdni::synthesizer_bwd")
def _(
    target, prediction, hidden, trigger, context, weights, bias, reduction, precision="exact",
    scale=None,
):  # fmt: skip
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


def check_devices(
    trigger: Tensor, context: Tensor | None, parameters: SynthesizerParameters
) -> None:
    """Refuses tensors of several devices."""
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
    check_devices(trigger, context, parameters)
    server = backend.server(trigger, _DEVICES)
    if server in ("cpu", "cuda"):
        if not _is_narrow_on_a_gpu(trigger):
            return _fwd(trigger, context, *parameters, backend.precision(trigger.device, None))
        trigger, context, parameters = cast(trigger, context, parameters, torch.float32)
        prediction, hidden = _fwd(trigger, context, *parameters, "bfloat16")
        return prediction.bfloat16(), [h.bfloat16() for h in hidden]
    torch.ops.fastdni.synthesizer_check(trigger, context, *parameters)
    with torch.no_grad():
        if server == "triton":
            prediction, *hidden = torch.ops.fastdni.triton_synthesizer_fwd(
                trigger, context, *parameters, precision_of(trigger)
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
    scale: float | None = None,
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
        scale: of the error's gradient, in place of the reduction's 2 / divisor.

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
            return _bwd(*arguments, backend.precision(prediction.device, None), scale)
        loss, grads = _bwd(*map(_widened, arguments), "bfloat16", scale)
        return loss, [grad.bfloat16() for grad in grads]
    torch.ops.fastdni.synthesizer_bwd_check(*arguments)
    with torch.no_grad():
        if server == "triton":
            precision = precision_of(prediction)
            loss, *grads = torch.ops.fastdni.triton_synthesizer_bwd(*arguments, precision, scale)
            return loss, grads
        return reference.synthesizer_bwd(*arguments, scale=scale)


def precision_of(tensor: Tensor) -> str:
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
    with torch.no_grad():
        tensors = [tensor.to(dtype) for tensor in parameters.tensors()]
    parameters = SynthesizerParameters.of(
        tensors, len(parameters.weights), len(parameters.biases) > 0
    )
    return trigger.to(dtype), None if context is None else context.to(dtype), parameters
