"""Which stages a sweep can run, and what it has to know of them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdni.reference import SweepNorm, SweepStage
from fastdni.synthesizers import BasicSynthesizer, is_changed, plain_parameters

ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: "identity"}
FORM = "Linear [BatchNorm1d] [ReLU | Tanh | Sigmoid | Identity]"
DTYPES = (torch.float32, torch.float64)


class Unfused(Exception):
    """Why a stage goes the generic path."""


def layers_of(stage: nn.Module) -> list[nn.Module]:
    """The layers of a stage: those of an nn.Sequential, or the module itself."""
    return list(stage) if type(stage) is nn.Sequential else [stage]


def _parse_layers(stage: nn.Module) -> tuple[nn.Linear, nn.BatchNorm1d | None, str]:
    layers = layers_of(stage)
    kinds = [type(layer) for layer in layers]
    rest = kinds[1:]
    norm = None
    if kinds[:1] == [nn.Linear]:
        if rest[:1] == [nn.BatchNorm1d]:
            norm, rest = layers[1], rest[1:]
        if not rest or (len(rest) == 1 and rest[0] in ACTIVATIONS):
            return layers[0], norm, ACTIVATIONS[rest[0]] if rest else "identity"
    raise Unfused(f"{' -> '.join(k.__name__ for k in kinds) or 'nothing'} is not {FORM}")


def _norm_of(norm: nn.BatchNorm1d | None, width: int) -> SweepNorm | None:
    if norm is None:
        return None
    if not norm.training:
        raise Unfused("its BatchNorm1d is in eval mode")
    if norm.num_features != width:
        raise Unfused("its BatchNorm1d is not as wide as its Linear")
    if (norm.weight is None) != (norm.bias is None):
        raise Unfused("its BatchNorm1d has a weight or a bias alone")
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if len({t is None for t in running} | {not norm.track_running_stats}) > 1:
        raise Unfused("its BatchNorm1d keeps a part of the running statistics")
    if norm.momentum is not None and norm.momentum < 0:
        raise Unfused("its BatchNorm1d has a negative momentum")
    if running[0] is None:
        running = None
    return SweepNorm(norm.weight, norm.bias, running, norm.momentum, norm.eps)


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


def parse(
    stage: nn.Module,
    synthesizer: nn.Module | None,
    input_synthesizer: nn.Module | None,
    network_inputs: int | None,
) -> SweepStage:
    """What a sweep has to know of a stage and the synthesizers of the boundary above it.

    Raises:
        Unfused: no sweep can run it; the message says why.
    """
    if _has_any_global_hook():
        raise Unfused("there are hooks on all modules")
    linear, norm, activation = _parse_layers(stage)
    for module in stage.modules():
        if is_changed(module):
            raise Unfused(f"its {type(module).__name__} has hooks or another forward")
    outputs, inputs = linear.weight.shape
    parsed = SweepStage(
        linear.weight,
        linear.bias,
        _norm_of(norm, outputs),
        activation,
        _synthesizer_of(synthesizer, outputs, outputs),
        _synthesizer_of(input_synthesizer, network_inputs, outputs),
    )
    first = parsed.weight
    for tensor in parsed.parameters():
        if type(tensor) not in (nn.Parameter, Tensor):
            raise Unfused(f"a parameter is a {type(tensor).__name__}")
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            raise Unfused("its parameters are not all float32 or all float64")
        if tensor.device != first.device or not tensor.is_contiguous():
            raise Unfused("its parameters are not contiguous on one device")
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise Unfused("a parameter has hooks")
    for tensor in parsed.statistics()[:2]:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise Unfused("its running statistics have another dtype or device")
    return parsed
