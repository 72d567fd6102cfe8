"""Which stages a sweep can run, and what it has to know of them."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastdni.reference import SweepNorm, SweepStage
from fastdni.synthesizers import BasicSynthesizer, is_changed, plain_parameters

ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: "identity"}
FORM = "[Flatten] Linear [BatchNorm1d] [ReLU | Tanh | Sigmoid | Identity] [Dropout]"
DTYPES = (torch.float32, torch.float64)

# What leaves the shape as it is.
_KEEPING = (nn.BatchNorm1d, nn.Dropout, *ACTIVATIONS)
# What the classes compute, as long as nobody patches them.
_FUSED = (nn.Sequential, nn.Flatten, nn.Linear, *_KEEPING)
_FORWARDS = {kind: kind.forward for kind in _FUSED}


class Unfused(Exception):
    """Why a stage goes the generic path."""


class FusedStage(NamedTuple):
    """A stage as the sweep sees it; the layers before, which make the sweep's input: Flatten, and
    in front of the whole network Dropout; and with what probability its own Dropout drops."""

    sweep: SweepStage
    before: tuple[nn.Module, ...]
    p: float


def layers_of(stage: nn.Module) -> list[nn.Module]:
    """The layers of a stage: those of an nn.Sequential, or the module itself."""
    return list(stage) if type(stage) is nn.Sequential else [stage]


def flattens(layer: nn.Module) -> bool:
    """Whether a layer makes (B, K) of every sample, and no more."""
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def _parse_layers(
    stage: nn.Module, lowest: bool
) -> tuple[tuple[nn.Module, ...], nn.Linear, nn.BatchNorm1d | None, str, nn.Dropout | None]:
    layers = layers_of(stage)
    begin = 0
    while begin < len(layers) and _prepares(layers[begin], lowest):
        begin += 1
    before, rest = tuple(layers[:begin]), layers[begin:]
    if rest and type(rest[0]) is nn.Linear:
        linear, *rest = rest
        norm = rest.pop(0) if rest and type(rest[0]) is nn.BatchNorm1d else None
        phi = type(rest.pop(0)) if rest and type(rest[0]) in ACTIVATIONS else nn.Identity
        dropout = rest.pop(0) if rest and type(rest[0]) is nn.Dropout else None
        if not rest:
            return before, linear, norm, ACTIVATIONS[phi], dropout
    kinds = [type(layer).__name__ for layer in layers]
    raise Unfused(f"{' -> '.join(kinds) or 'nothing'} is not {FORM}")


def _prepares(layer: nn.Module, lowest: bool) -> bool:
    """Whether a layer in front of a Linear is none of the sweep's business."""
    return flattens(layer) or (lowest and type(layer) is nn.Dropout and not layer.inplace)


def _probability(dropout: nn.Dropout | None) -> float:
    """With what probability a layer drops, as it is now."""
    if dropout is None or not dropout.training:
        return 0.0
    if dropout.inplace:  # autograd has something to say about that
        raise Unfused("its Dropout works in place")
    if not isinstance(dropout.p, int | float):
        raise Unfused("its Dropout's p is not a number")
    return dropout.p


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    # A tensor put in a parameter's place is for autograd to follow.
    if name not in module._parameters:
        raise Unfused(f"its {type(module).__name__}'s {name} is no parameter")
    return module._parameters[name]


def _norm_of(norm: nn.BatchNorm1d | None, width: int) -> SweepNorm | None:
    if norm is None:
        return None
    if not norm.training:
        raise Unfused("its BatchNorm1d is in eval mode")
    if norm.num_features != width:
        raise Unfused("its BatchNorm1d is not as wide as its Linear")
    weight, bias = _parameter(norm, "weight"), _parameter(norm, "bias")
    if (weight is None) != (bias is None):
        raise Unfused("its BatchNorm1d has a weight or a bias alone")
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if len({t is None for t in running} | {not norm.track_running_stats}) > 1:
        raise Unfused("its BatchNorm1d keeps a part of the running statistics")
    if norm.momentum is not None and norm.momentum < 0:
        raise Unfused("its BatchNorm1d has a negative momentum")
    if running[0] is None:
        running = None
    return SweepNorm(weight, bias, running, norm.momentum, norm.eps)


def _synthesizer_of(module: nn.Module | None, inputs: int, outputs: int):
    if module is None:
        return None
    if type(module) is not BasicSynthesizer:
        raise Unfused(f"its synthesizer {type(module).__name__} is not a BasicSynthesizer")
    parameters = plain_parameters(module)
    if parameters is None:
        raise Unfused("its synthesizer was changed (a hook, a parametrization, another class)")
    shape = (parameters.weights[0].shape[1], parameters.weights[-1].shape[0])
    if shape != (inputs, outputs):
        raise Unfused(f"its synthesizer maps {shape[0]} to {shape[1]}, not {inputs} to {outputs}")
    return parameters


def _check_parameters(stage: SweepStage) -> None:
    first = stage.weight
    for tensor in stage.parameters():
        if type(tensor) is not nn.Parameter:
            raise Unfused(f"a parameter is a {type(tensor).__name__}")
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            raise Unfused("its parameters are not all float32 or all float64")
        if tensor.device != first.device or not tensor.is_contiguous():
            raise Unfused("its parameters are not contiguous on one device")
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise Unfused("a parameter has hooks")
    norm = () if stage.norm is None else (stage.norm.weight, stage.norm.bias)
    for tensor in (stage.bias, *norm):
        if tensor is not None and tensor.shape != first.shape[:1]:
            raise Unfused("a bias (or a norm's weight) is not (outputs,)")
    for tensor in stage.statistics()[:2]:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise Unfused("its running statistics have another dtype or device")
        if tensor.shape != first.shape[:1] or not tensor.is_contiguous():
            raise Unfused("its running statistics are not contiguous (outputs,)")


def parse(
    stage: nn.Module,
    synthesizer: nn.Module | None,
    input_synthesizer: nn.Module | None,
    network_inputs: int | None,
    lowest: bool = False,
) -> FusedStage:
    """What a sweep has to know of a stage and the synthesizers of the boundary above it; `lowest`:
    whether nobody else gets its input, or wants the gradient of it.

    Raises:
        Unfused: no sweep can run it; the message says why.
    """
    if _has_any_global_hook():
        raise Unfused("there are hooks on all modules")
    before, linear, norm, activation, dropout = _parse_layers(stage, lowest)
    for module in stage.modules():
        kind = type(module)
        if is_changed(module) or (kind in _FORWARDS and kind.forward is not _FORWARDS[kind]):
            raise Unfused(f"its {kind.__name__} has hooks or another forward")
    weight, bias = _parameter(linear, "weight"), _parameter(linear, "bias")
    outputs, inputs = weight.shape
    p = _probability(dropout)
    sweep = SweepStage(
        weight,
        bias,
        _norm_of(norm, outputs),
        activation,
        _synthesizer_of(synthesizer, outputs, outputs),
        _synthesizer_of(input_synthesizer, network_inputs, outputs),
        dropout=p != 0,
    )
    _check_parameters(sweep)
    return FusedStage(sweep, before, p)


def has_norm(stage: nn.Module) -> bool:
    """Whether a BatchNorm1d in training follows a Linear at once."""
    layers = layers_of(stage)
    return any(
        type(below) is nn.Linear and isinstance(norm, nn.BatchNorm1d) and norm.training
        for below, norm in zip(layers, layers[1:], strict=False)
    )


def begins(stage: nn.Module) -> tuple[bool, nn.Module | None]:
    """Whether a stage flattens its input, and the first layer that does more than to prepare it."""
    layers = layers_of(stage)
    rest = [layer for layer in layers if not _prepares(layer, True)]
    first = rest[0] if rest else None
    before = layers if first is None else layers[: layers.index(first)]
    return any(map(flattens, before)), first


def plain_head(stage: nn.Module) -> nn.Linear | None:
    """The Linear of a stage whose output is (B, outputs) for certain."""
    layers = [layer for layer in layers_of(stage) if not flattens(layer)]
    plain = layers and type(layers[0]) is nn.Linear
    if plain and all(type(layer) in _KEEPING for layer in layers[1:]):
        return layers[0]
    return None
