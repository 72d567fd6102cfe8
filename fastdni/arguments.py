"""What the arguments of a step must be: checked before anything is written.

Rules of the sweep itself are in csrc/ops/sweep_binding.cpp; here are those that come before it, and
those of stages that take local autograd.
"""

import torch
from torch import Tensor, nn

from fastdni import ops
from fastdni.parts import CRITERIA, Step
from fastdni.stages import ACTIVATIONS, layers_of


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds the operands of products to; None for nothing."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def check_arguments(net, caller, x, target, criterion, context, update_mask) -> list[int]:
    """What can be told at once; `net.step`'s arguments, and whom messages name.

    Returns:
        For each stage, and one above, whether (1) or not (0) it is updated.
    """
    if not net.training:
        raise RuntimeError(f"{caller}: the network must be in training mode; call net.train()")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{caller}: training is not possible in torch.inference_mode()")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] == 0:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise RuntimeError(f"{caller}: x must be a tensor of at least one row, got {got}")
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(
                f'{caller}: criterion must be "cross_entropy", "mse" or a callable, got '
                f"{criterion!r}"
            )
        if not isinstance(target, Tensor):
            raise RuntimeError(
                f"{caller}: target must be a tensor for {criterion}, got {type(target).__name__}"
            )
    elif not callable(criterion):
        raise ValueError(
            f'{caller}: criterion must be "cross_entropy", "mse" or a callable, got {criterion!r}'
        )
    if context is not None and not isinstance(context, Tensor):
        raise RuntimeError(f"{caller}: context must be a tensor, got {type(context).__name__}")
    count = len(net.stages)
    if update_mask is None:
        return [1] * (count + 1)
    try:
        mask = [] if isinstance(update_mask, str) else [*map(bool, update_mask)]
    except (TypeError, RuntimeError):
        mask = []
    if len(mask) != count:
        raise ValueError(
            f"{caller}: update_mask must be one boolean for each of the {count} stages, got "
            f"{len(mask) or type(update_mask).__name__}"
        )
    return [*map(int, mask), 1]


def check_devices(step: Step, device: torch.device) -> None:
    """Tensors belong on the parameters' device."""
    for name, tensor in (("x", step.x), ("target", step.target), ("context", step.context)):
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise RuntimeError(
                f"{step.caller}: {name} must be on the parameters' device {device}, got "
                f"{tensor.device}"
            )


def check_inputs(net: nn.Module, step: Step) -> None:
    """What the CPU's sweep would find out before it writes, for all that runs otherwise."""
    caller, x, batch = step.caller, step.x, len(step.x)
    first = layers_of(net.stages[0])[:1]
    if first and type(first[0]) is nn.Linear:
        inputs, dtype = first[0].in_features, first[0].weight.dtype
        if x.dim() < 2 or x.shape[-1] != inputs:
            raise RuntimeError(f"{caller}: x must be (B, {inputs}), got {tuple(x.shape)}")
        if x.dtype != dtype and autocast_dtype(x) is None:
            raise RuntimeError(
                f"{caller}: x must have the parameters' dtype {dtype}, got {x.dtype}"
            )
    if batch == 1 and x.dim() == 2 and any(map(_has_norm, net.stages)):
        raise RuntimeError(
            f"{caller}: x must have at least 2 rows for BatchNorm in training, got 1"
        )
    if isinstance(step.criterion, str):
        _check_target(net, step)
    for synthesizer in (*net.synthesizers, *(net.input_synthesizers or [])):
        taken = getattr(synthesizer, "input_context", None)
        if isinstance(taken, nn.Linear):
            _check_context(step, taken)


def _has_norm(stage: nn.Module) -> bool:
    """Whether a BatchNorm1d in training follows a Linear at once."""
    layers = layers_of(stage)
    return any(
        type(below) is nn.Linear and isinstance(norm, nn.BatchNorm1d) and norm.training
        for below, norm in zip(layers, layers[1:], strict=False)
    )


def _check_target(net: nn.Module, step: Step) -> None:
    caller, x, target = step.caller, step.x, step.target
    if target.dim() == 0 or len(target) != len(x):
        raise RuntimeError(
            f"{caller}: target must have x's {len(x)} rows, got {tuple(target.shape)}"
        )
    floating = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
    if step.criterion == "cross_entropy" and target.dtype != torch.int64:
        raise RuntimeError(
            f"{caller}: target must be int64 labels for cross_entropy, got {target.dtype}"
        )
    if step.criterion == "mse" and floating is not None and target.dtype != floating:
        raise RuntimeError(
            f"{caller}: target must have the parameters' dtype {floating}, got {target.dtype}"
        )
    layers = layers_of(net.stages[-1])
    plain = layers and type(layers[0]) is nn.Linear
    plain = plain and all(type(layer) in (nn.BatchNorm1d, *ACTIVATIONS) for layer in layers[1:])
    if plain and x.dim() == 2:
        outputs = layers[0].out_features
        ops.sweep_check_target(caller, target, len(x), outputs, step.criterion)


def _check_context(step: Step, taken: nn.Linear) -> None:
    caller, x, context, target = step.caller, step.x, step.context, step.target
    width = taken.in_features
    if context is not None:
        fits = context.dim() > 0 and context.shape[-1] == width
        if not fits or (x.dim() == 2 and context.shape != (len(x), width)):
            raise RuntimeError(
                f"{caller}: context must be (B, C) = ({len(x)}, {width}), got "
                f"{tuple(context.shape)}"
            )
        if context.dtype != taken.weight.dtype and autocast_dtype(context) is None:
            raise RuntimeError(
                f"{caller}: context must have the parameters' dtype {taken.weight.dtype}, got "
                f"{context.dtype}"
            )
    elif not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise RuntimeError(
            f"{caller}: context must be (B, C) = ({len(x)}, {width}), got None, and target holds "
            "no labels to make it from"
        )
    elif target.numel() and target.device.type == "cpu" and target.max() >= width:
        raise RuntimeError(
            f"{caller}: context must be given, because the label {target.max()} has no place in a "
            f"one-hot context of width {width}"
        )
