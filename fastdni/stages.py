"""Which stages a sweep can run, and what it has to know of them."""

from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastdni.reference import SweepNorm, SweepStage
from fastdni.synthesizers import BasicSynthesizer, is_changed, plain_parameters

ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: "identity"}
FORM = "Linear [BatchNorm1d] [ReLU | Tanh | Sigmoid | Identity]"
DTYPES = (torch.float32, torch.float64)

# What a step may find changed of a parameter; `grad` is None between steps.
_marks = attrgetter("grad", "requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_layout = attrgetter("dtype", "device", "shape")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    if any(t is None for t in running):
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
        _synthesizer_of(input_synthesizer, network_inputs or inputs, outputs),
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


class Watch:
    """Notices that modules are no longer what they were found to be.

    A step asks at every call, so a look takes a few microseconds: the loops are those of `map`, `all`
    and `any`.
    """

    def __init__(self, roots: list[nn.Module]):
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        seen: list[tuple[dict, str]] = []
        containers: list[dict] = []
        hooks: list[dict] = []
        for module in modules:
            own = vars(module)
            seen.append((own, "forward"))
            if isinstance(module, nn.BatchNorm1d):
                seen += [(own, name) for name in ("training", "momentum", "eps")]
            for kind in ("_modules", "_parameters", "_buffers"):
                seen += [(own[kind], name) for name in own[kind]]
            if own["_modules"]:
                containers.append(own["_modules"])
            hooks += [own[name] for name in _HOOKS]
        self._dicts, self._names = [d for d, _ in seen], [name for _, name in seen]
        self._values = [d.get(name) for d, name in seen]
        self._containers, self._sizes = containers, [*map(len, containers)]
        self._no_hooks = [h for h in hooks if not h]
        self._hooks = [(h, len(h)) for h in hooks if h]
        self._global_hooks = _has_any_global_hook()
        self.parameters = list(
            {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
        )
        self._marks = [(None, *_marks(p)[1:]) for p in self.parameters]
        self._layouts = self._layouts_now()

    def _layouts_now(self) -> list:
        tensors = self.parameters
        return [*map(_layout, tensors), *map(Tensor.is_contiguous, tensors)]

    def unchanged(self) -> bool:
        """Whether modules, hooks and parameters are the same, as far as a quick look shows."""
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and [*map(len, self._containers)] == self._sizes
            and not any(self._no_hooks)
            and all([len(hooks) == count for hooks, count in self._hooks])
            and _has_any_global_hook() == self._global_hooks
        )

    def parameters_unchanged(self) -> bool:
        """Whether no parameter was frozen, thawed or hooked; also sets `has_gradients`."""
        marks = [*map(_marks, self.parameters)]
        self.has_gradients = marks != self._marks
        return not self.has_gradients or [m[1:] for m in marks] == [m[1:] for m in self._marks]

    def layouts_unchanged(self) -> bool:
        """Whether all parameters have the dtype, device and shape they had (a slower look, for when
        something has failed)."""
        return self._layouts_now() == self._layouts
