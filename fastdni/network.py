"""Networks whose stages train decoupled, each on a synthetic gradient of its output.

Jaderberg et al. 2016, "Decoupled Neural Interfaces using Synthetic Gradients" (arXiv 1608.05343),
sections 2 and 3; the equations of a step are in `fastdni.reference.sweep`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdni.stages import layers_of
from fastdni.synthesizers import BasicSynthesizer, start_at_zero
from fastdni.training import GRADIENTS, Trainer

Criterion = str | Callable[[Tensor, Tensor], Tensor]


class StepResult(NamedTuple):
    """What a step found out: fresh tensors, detached.

    Attributes:
        loss: the criterion's, ().
        output: of the topmost stage, (B, ...).
        synthesis_loss: ||e||^2 / B of each synthesizer, (S,); in complete unlock (2, S): those of
            the gradients, those of the inputs. NaN at the boundary below a masked stage.
    """

    loss: Tensor
    output: Tensor
    synthesis_loss: Tensor


class DecoupledSequential(nn.Module):
    """Stages one after the other, with a synthesizer of the gradient at each boundary between them.

    `net(x)` is the ordinary forward pass. `net.step(x, target, optimizer)` is one decoupled
    training step: stage l takes the output h of the stage below and the synthetic gradient
    M_l(h, ctx) of its own output, and updates at once; M_l learns from the gradient that the stage
    above finds.

    Stages of the form `Linear [BatchNorm1d] [ReLU | Tanh | Sigmoid | Identity]` with a
    `BasicSynthesizer`, under SGD, Adam or AdamW of torch.optim, run fused, in one call for all of
    them; everything else takes local autograd, with the same result. `fastdni.explain` tells which
    and why.

    Args:
        stages: S + 1 modules; the last one makes the output.
        synthesizers: S modules M_l(h, ctx) -> the gradient of h, for the boundaries from below.
        input_synthesizers: S modules I_l(x, ctx) -> h_l, x being the network's input: complete
            unlock. Stage l + 1 then trains on I_l(x, ctx) and waits for nothing at all.
        bp_lambda: the gradient sent into stage l is (1 - bp_lambda) g^_l + bp_lambda delta_l,
            delta_l coming from the (mixed) backward pass of the stage above; 1 is backpropagation.
            Above 0 all stages take local autograd, from the top down.

    Raises:
        ValueError: the numbers of stages and synthesizers do not fit, or bp_lambda is outside of
            0 to 1.

    Example:
        >>> stages = [nn.Sequential(nn.Linear(784, 256), nn.ReLU()), nn.Linear(256, 10)]
        >>> net = fastdni.DecoupledSequential(
        ...     *stages, synthesizers=[fastdni.BasicSynthesizer(256, context_dim=10)]
        ... )
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> result = net.step(torch.rand(64, 784), torch.randint(10, (64,)), optimizer)
        >>> result.output.shape
        torch.Size([64, 10])
    """

    def __init__(
        self,
        *stages: nn.Module,
        synthesizers: Sequence[nn.Module],
        input_synthesizers: Sequence[nn.Module] | None = None,
        bp_lambda: float = 0.0,
    ):
        super().__init__()
        if not stages:
            raise ValueError("DecoupledSequential: stages must be at least one module, got none")
        for name, given in (
            ("synthesizers", synthesizers),
            ("input_synthesizers", input_synthesizers),
        ):
            if given is not None and len(given) != len(stages) - 1:
                raise ValueError(
                    f"DecoupledSequential: {name} must be one for each of the {len(stages) - 1} "
                    f"boundaries between stages, got {len(given)}"
                )
        if not 0 <= bp_lambda <= 1:
            raise ValueError(f"DecoupledSequential: bp_lambda must be from 0 to 1, got {bp_lambda}")
        self.stages = nn.ModuleList(stages)
        self.synthesizers = nn.ModuleList(synthesizers)
        self.input_synthesizers = nn.ModuleList(input_synthesizers) if input_synthesizers else None
        self.bp_lambda = bp_lambda
        self._trainer = Trainer(self)

    def __getstate__(self) -> dict:
        # Plans and what was found out about optimizers stay behind: they are made again.
        return {k: v for k, v in self.__dict__.items() if k != "_trainer"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._trainer = Trainer(self)

    # Plans hold parameters; what changes these may want to be their only owner.
    def _apply(self, *arguments, **how):
        self._trainer = Trainer(self)
        return super()._apply(*arguments, **how)

    def load_state_dict(self, *arguments, **how):
        self._trainer = Trainer(self)
        return super().load_state_dict(*arguments, **how)

    def forward(self, x: Tensor) -> Tensor:
        """The stages one after the other; an ordinary differentiable call, in any mode."""
        for stage in self.stages:
            x = stage(x)
        return x

    def stage_parameters(self) -> list[nn.Parameter]:
        """The stages' parameters, for a parameter group."""
        return list(self.stages.parameters())

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """Those of all synthesizers: they want a learning rate 5 to 20 times lower, or less."""
        own = {id(p) for p in self.stages.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def step(
        self,
        x: Tensor,
        target: Tensor,
        optimizer: Optimizer | Sequence[Optimizer],
        criterion: Criterion = "cross_entropy",
        context: Tensor | None = None,
        update_mask: Iterable[bool] | None = None,
    ) -> StepResult:
        """One training step: forward, synthetic gradients, their regression, every update.

        All gradients are taken with the parameters as they were before the step. Its arguments are
        checked first: a step that is refused changes nothing.

        Args:
            x: the input, (B, ...), in the parameters' dtype.
            target: labels (B,) int64 for "cross_entropy" (-100: rows that do not count), (B, N) for
                "mse", anything for a callable.
            optimizer: of torch.optim, or a sequence of them, over parameters of this network (those
                that none holds are not updated). Its `param_groups` are read at every step, its
                `state` is written as its own `step()` would write it.
            criterion: "cross_entropy" (mean over the batch), "mse" (mean over all elements), or a
                callable (output, target) -> loss, which takes local autograd for the last stage.
            context: ctx, (B, C), for the synthesizers that take one; None: one-hot labels of the
                width that each of them takes.
            update_mask: S + 1 booleans. A masked stage runs its forward pass, running statistics
                included, and no more: neither it nor the synthesizers of the boundary below it are
                updated. None updates all.

        Returns:
            Loss, output and synthesis losses. `p.grad` is None afterwards.

        Raises:
            RuntimeError: eval mode, or a shape, dtype, device or label that does not fit.
            TypeError, ValueError: the optimizer is none, holds other parameters, or has a learning
                rate that is not finite.

        Note:
            Under `torch.autocast` the operands of products are rounded to bfloat16; sums, errors,
            losses, parameters and optimizer state stay float32. What runs fused does not depend on
            the number of threads.
        """
        return StepResult(
            *self._trainer.step(x, target, optimizer, criterion, context, update_mask)
        )

    def backward(
        self,
        x: Tensor,
        target: Tensor,
        criterion: Criterion = "cross_entropy",
        context: Tensor | None = None,
        update_mask: Iterable[bool] | None = None,
    ) -> StepResult:
        """The gradients of `step`, added to `p.grad`, and no update: for gradient clipping and
        accumulation, several processes, closures, optimizers over other parameters too.

        Args:
            As `step`.

        Returns:
            As `step`. Parameters that are masked or frozen keep their `p.grad`.

        Note:
            In several processes each has the gradients of its own rows: nothing is averaged, also
            inside DistributedDataParallel, whose forward this is not. Before the optimizer's step:

                for p in net.parameters():
                    torch.distributed.all_reduce(p.grad.div_(torch.distributed.get_world_size()))
        """
        return StepResult(
            *self._trainer.step(x, target, GRADIENTS, criterion, context, update_mask)
        )


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
        The network. Synthesizers made here start at zero: the last layer's weight and bias.

    Raises:
        ValueError: the model has fewer than two stages, or a shape is not known.

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
    synthesizers = [make(shape) for shape in _boundary_shapes(stages, example_input)]
    return DecoupledSequential(*stages, synthesizers=synthesizers)


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
