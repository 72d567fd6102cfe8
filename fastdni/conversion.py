"""Decoupled networks from ordinary ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from fastdni.network import DecoupledSequential
from fastdni.synthesizers import BasicSynthesizer, start_at_zero
from fastdni.training.stages import layers_of


def decouple(
    model: nn.Sequential,
    synthesizer: str | Callable[[torch.Size], nn.Module] = "linear",
    context_dim: int | None = None,
    example_input: Tensor | None = None,
) -> DecoupledSequential:
    """A decoupled network of the layers of `model`, which it shares.

    A stage begins at each layer with parameters that is no normalisation; what follows it (norms,
    activations, pooling) belongs to it.

    Args:
        model: an `nn.Sequential`; Sequentials within it are opened.
        synthesizer: "linear"; "mlp", two hidden layers of 1024 units, as in the paper; or a
            callable that is given the shape of one sample at a boundary, such as torch.Size([256]),
            and returns the boundary's module.
        context_dim: width of the context of "linear" and "mlp": the number of classes for labels.
        example_input: (B, ...), needed where a stage's output shape cannot be read off a Linear.

    Returns:
        The network, in the model's mode. Its synthesizers have the dtype and the device of the
        stage below them; those made here start at zero: the last layer's weight and bias.

    Raises:
        ValueError: the model has fewer than two stages, or a shape is not known (of lazy layers
            without an example_input).

    Example:
        >>> model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> net = fastdni.decouple(model, context_dim=10)
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"decouple: model must be an nn.Sequential, got {type(model).__name__}")
    stages = _split(model)
    if len(stages) < 2:
        raise ValueError(
            f"decouple: model must have at least two layers with parameters, got {len(stages)}"
        )
    make = _synthesizer_factory(synthesizer, context_dim)
    shapes = _boundary_shapes(stages, example_input)
    synthesizers = [
        _following(make(shape), stage).train(model.training)
        for shape, stage in zip(shapes, stages, strict=False)
    ]
    net = DecoupledSequential(*stages, synthesizers=synthesizers)
    for container in (net, net.stages, net.synthesizers):
        container.training = model.training
    return net


def _following(synthesizer: nn.Module, stage: nn.Module) -> nn.Module:
    """A synthesizer with the dtype and on the device of a stage."""
    for parameter in stage.parameters():
        if parameter.is_floating_point():
            return synthesizer.to(parameter.device, parameter.dtype)
    return synthesizer


# Layers with parameters that belong to the stage before them.
_WITHIN_A_STAGE = (
    nn.PReLU,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


# Layers whose output has the shape of their input.
_KEEP_SHAPES = (
    *_WITHIN_A_STAGE,
    nn.modules.dropout._DropoutNd,
    *(nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Mish),
    *(nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Softplus, nn.Softsign, nn.CELU),
)


def _split(model: nn.Sequential) -> list[nn.Module]:
    layers = _opened(model)
    groups: list[list[nn.Module]] = [[]]
    begun = False
    for layer in layers:
        begins = any(True for _ in layer.parameters()) and not isinstance(layer, _WITHIN_A_STAGE)
        if begins and begun:
            groups.append([])
        begun = begun or begins
        groups[-1].append(layer)
    return [group[0] if len(group) == 1 else nn.Sequential(*group) for group in groups if group]


def _opened(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in _opened(child)]


def _boundary_shapes(stages: list[nn.Module], example: Tensor | None) -> list[torch.Size]:
    if example is not None:
        shapes = []
        modes = [(m, m.training) for stage in stages for m in stage.modules()]
        try:
            for stage in stages:
                stage.eval()  # a look must not move running statistics
            with torch.no_grad():
                for stage in stages[:-1]:
                    example = stage(example)
                    shapes.append(example.shape[1:])
        finally:
            for module, training in modes:
                module.training = training
        return shapes
    shapes = []
    for number, stage in enumerate(stages[:-1]):
        layers = layers_of(stage)
        if any(isinstance(p, UninitializedTensorMixin) for p in stage.parameters()):
            raise ValueError(
                "decouple: example_input must be given for a model with lazy layers, or the model "
                "run once before, `model(x)`"
            )
        linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
        features = [layers[i].out_features for i in linear]
        if len(linear) != 1 or not all(
            isinstance(m, _KEEP_SHAPES) for m in layers[linear[0] + 1 :]
        ):
            raise ValueError(
                f"decouple: example_input must be given, because the shape of stage {number}'s "
                "output cannot be read off a Linear layer"
            )
        shapes.append(torch.Size(features))
    return shapes


def _synthesizer_factory(
    synthesizer: str | Callable[[torch.Size], nn.Module], context_dim: int | None
) -> Callable[[torch.Size], nn.Module]:
    if callable(synthesizer):
        return synthesizer
    if synthesizer not in ("linear", "mlp"):
        raise ValueError(
            f'decouple: synthesizer must be "linear", "mlp" or a callable, got {synthesizer!r}'
        )
    hidden = {"n_hidden": 2, "hidden_dim": 1024} if synthesizer == "mlp" else {}

    def make(shape: torch.Size) -> nn.Module:
        if len(shape) != 1:
            raise ValueError(
                f'decouple: synthesizer "{synthesizer}" is for boundaries of shape (features,), '
                f"got {tuple(shape)}; give a callable that makes one for it"
            )
        return start_at_zero(BasicSynthesizer(shape[0], context_dim=context_dim, **hidden))

    return make
