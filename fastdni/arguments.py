"""What the arguments of a step must be: checked before anything is written.

Rules of the sweep itself are in csrc/ops/sweep.cpp; here are those that come before it, and those
of stages that take local autograd.
"""

import torch
from torch import Tensor, nn

from fastdni import ops
from fastdni.parts import CRITERIA, Step
from fastdni.stages import layers_of


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
    mask = list(map(bool, update_mask))
    if len(mask) != count:
        raise ValueError(
            f"{caller}: update_mask must be one boolean for each of the {count} stages, got "
            f"{len(mask)}"
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


def check_for_local_parts(net: nn.Module, step: Step) -> None:
    """What a sweep would find out before it writes, for stages that no sweep runs."""
    x, target, batch = step.x, step.target, len(step.x)
    first, last = layers_of(net.stages[0])[:1], layers_of(net.stages[-1])[-2:]
    if first and type(first[0]) is nn.Linear:
        linear = first[0]
        if x.shape[-1] != linear.in_features:
            raise RuntimeError(
                f"{step.caller}: x must be (..., {linear.in_features}), got {tuple(x.shape)}"
            )
        if x.dtype != linear.weight.dtype and autocast_dtype(x) is None:
            raise RuntimeError(
                f"{step.caller}: x must have the parameters' dtype {linear.weight.dtype}, got "
                f"{x.dtype}"
            )
    norms = [m for m in net.stages.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    if batch == 1 and x.dim() == 2 and norms:
        raise RuntimeError(
            f"{step.caller}: x must have at least 2 rows for BatchNorm in training, got 1"
        )
    linear = next((m for m in reversed(last) if type(m) is nn.Linear), None)
    if isinstance(step.criterion, str):
        if target.dim() == 0 or len(target) != batch:
            raise RuntimeError(
                f"{step.caller}: target must have x's {batch} rows, got {tuple(target.shape)}"
            )
        plain = linear is not None and x.dim() == 2 and target.device.type == "cpu"
        probabilities = target.is_floating_point() and target.dim() == 2
        if plain and (step.criterion == "mse" or not probabilities):
            ops.sweep_check_target(step.caller, target, batch, linear.out_features, step.criterion)
    for synthesizer in (*net.synthesizers, *(net.input_synthesizers or [])):
        taken = getattr(synthesizer, "input_context", None)
        if isinstance(taken, nn.Linear):
            _check_context(step, taken.in_features)


def _check_context(step: Step, width: int) -> None:
    context, target = step.context, step.target
    if context is not None:
        if context.shape[-1] != width:
            raise RuntimeError(
                f"{step.caller}: context must be (B, C) = ({len(step.x)}, {width}), got "
                f"{tuple(context.shape)}"
            )
    elif not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise RuntimeError(
            f"{step.caller}: context must be (B, C) = ({len(step.x)}, {width}), got None, and "
            "target holds no labels to make it from"
        )
    elif target.numel() and target.device.type == "cpu" and target.max() >= width:
        raise RuntimeError(
            f"{step.caller}: context must be given, because the label {target.max()} has no "
            f"place in a one-hot context of width {width}"
        )
