"""boundary: a synthesizer's prediction, its regression on what arrived and its update, in one
call.

The formula, shapes and letters are those of `fastdni.reference.boundary_`, the updates those of
`fastdni.reference.optimizer_update`.
"""

import torch
from torch import Tensor

from fastdni import backend, reference
from fastdni.ops.synthesizer import check_devices, precision_of
from fastdni.ops.update import mark_updated
from fastdni.reference import SynthesizerParameters

_DEVICES = backend.kernel_devices("boundary_")
_boundary = torch.ops.fastdni.boundary_.default
# Nothing here is differentiable: autograd looks past the op, which saves a `no_grad`.
_library = torch.library.Library("fastdni", "IMPL")
_library.impl("boundary_", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastdni::boundary_")
def _(
    caller, trigger, context, target, parameters, layers, bias, state, groups, settings,
    scale, prediction, hidden, precision="exact",
):  # fmt: skip
    shape = (*trigger.shape[:-1], parameters[layers - 1].shape[0])
    wide = reference.accumulate_dtype(trigger.dtype)
    made = trigger.new_empty(shape if prediction is None else (0,))
    return trigger.new_empty((), dtype=wide), made, trigger.new_empty(shape, dtype=wide)


@torch.library.register_fake("fastdni::boundary_check")
def _(
    caller, trigger, context, target, parameters, layers, bias, state, groups, settings,
    scale, prediction, hidden,
):  # fmt: skip
    return None


def boundary_(
    parameters: SynthesizerParameters,
    trigger: Tensor,
    context: Tensor | None,
    target: Tensor,
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
    scale: float | None = None,
    prediction: Tensor | None = None,
    hidden: list[Tensor] | None = None,
    caller: str = "boundary",
) -> tuple[Tensor, Tensor, Tensor]:
    """What a synthesizer predicts, how far off that was, and its update, in place.

    Args:
        parameters: of the synthesizer, float32, float64 or bfloat16.
        trigger: h, (..., K), in the parameters' dtype.
        context: ctx, (..., C), or None.
        target: what arrived, (..., N), in trigger's dtype, or float32 beside bfloat16.
        state: of each parameter in turn what its rule keeps: see `reference.optimizer_update`.
        groups: for each parameter its row of `settings`; -1 leaves it as it is.
        settings: see `flat`. A learning rate that is NaN is a tensor, next in `state`.
        scale: of the error's gradient, scale e; by default 2 / size(0).
        prediction, hidden: what `synthesizer_fwd` returned with these parameters, if it is known.
        caller: whom error messages name.

    Returns:
        The loss, 0-d; the prediction, (..., N); the error, (..., N). Loss and error of bfloat16
        are float32.

    Raises:
        RuntimeError: a shape, dtype, device or state does not fit; nothing has been written then.

    Note:
        Gradients of bfloat16 parameters are rounded once, their updates are made in float32 and
        rounded once.
    """
    check_devices(trigger, context, parameters)
    if scale is None:
        rows = trigger if trigger.dim() > 1 else target
        scale = 2 / reference.reduction_divisor(rows, "batchmean")
    how = (state, groups, settings, scale)
    known = (prediction, hidden or [])
    server = backend.server(trigger, _DEVICES)
    if server in ("cpu", "cuda"):
        narrow = server == "cuda" and trigger.dtype == torch.bfloat16
        run = _widened if narrow else _compiled
        loss, made, error = run(caller, parameters, trigger, context, target, how, known)
    else:
        given = _flat(caller, parameters, trigger, context, target, how, known)
        torch.ops.fastdni.boundary_check(*given)
        if server == "triton":
            run = torch.ops.fastdni.triton_boundary_
            with torch.no_grad():
                loss, made, error = run(*given[1:], precision_of(trigger))
        else:
            return reference.boundary_(parameters, trigger, context, target, *how, *known)
    return loss, made if prediction is None else prediction, error


def _flat(caller, parameters, trigger, context, target, how, known) -> tuple:
    """The arguments as the raw ops take them."""
    layers, bias = len(parameters.weights), len(parameters.biases) > 0
    return (caller, trigger, context, target, parameters.tensors(), layers, bias, *how, *known)


def _compiled(caller, parameters, trigger, context, target, how, known, precision=None):
    if precision is None:
        precision = backend.precision(trigger.device, None)
    given = _flat(caller, parameters, trigger, context, target, how, known)
    results = _boundary(*given, precision)
    if not torch.compiler.is_compiling():
        state, groups, settings, _ = how
        mark_updated(given[4], state, groups, settings)
    return results


def _widened(caller, parameters, trigger, context, target, how, known):
    """Of bfloat16 on a GPU, whose kernels are for float32 in memory: on copies, whose products are
    bfloat16; rounded when they are copied back."""

    def wide(value):
        if isinstance(value, list | tuple):
            return [wide(v) for v in value]
        narrow = isinstance(value, Tensor) and value.dtype == torch.bfloat16
        return value.float() if narrow else value

    state = how[0]
    own, of_state = SynthesizerParameters(*wide(parameters)), wide(state)
    given = (own, wide(trigger), wide(context), wide(target), (of_state, *how[1:]), wide(known))
    loss, prediction, error = _compiled(caller, *given, "bfloat16")
    with torch.no_grad():
        pairs = [*zip(parameters.tensors(), own.tensors(), strict=True)]
        for narrow, result in [*pairs, *zip(state, of_state, strict=True)]:
            if narrow is not result:
                narrow.copy_(result)
    return loss, prediction.bfloat16(), error
