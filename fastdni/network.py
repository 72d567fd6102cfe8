"""Networks whose stages train decoupled, each on a synthetic gradient of its output.

Jaderberg et al. 2016, "Decoupled Neural Interfaces using Synthetic Gradients" (arXiv 1608.05343),
sections 2 and 3; the equations of a step are in `fastdni.reference.sweep`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer

from fastdni.scopes import outside_compiled_graphs
from fastdni.training.trainer import GRADIENTS, Trainer

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


_result = partial(tuple.__new__, StepResult)  # of its three tensors


class DecoupledSequential(nn.Module):
    """Stages one after the other, with a synthesizer of the gradient at each boundary between them.

    `net(x)` is the ordinary forward pass. `net.step(x, target, optimizer)` is one decoupled
    training step: stage l takes the output h of the stage below and the synthetic gradient
    M_l(h, ctx) of its own output, and updates at once; M_l learns from the gradient that the stage
    above finds.

    Stages of the form `Linear [BatchNorm1d] [ReLU | Tanh | Sigmoid | Identity] [Dropout]` with a
    `BasicSynthesizer`, under SGD, Adam or AdamW of torch.optim, run fused, in one call for all of
    them (with Dropout on the CPU alone); everything else takes local autograd, with the same
    result. `fastdni.explain` tells which and why.

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
        self._trainer = Trainer()

    def __getstate__(self) -> dict:
        # Plans and what was found out about optimizers stay behind: they are made again.
        state = super().__getstate__()
        del state["_trainer"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._trainer = Trainer()

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
                callable (output, target) -> loss. `F.cross_entropy`, `F.mse_loss` and torch's
                modules of them are these two (in their mean, without weights and label smoothing);
                any other callable takes local autograd for the last stage.
            context: ctx, (B, C), for the synthesizers that take one; None: one-hot labels of the
                width that each of them names as its `context_dim`.
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
        if is_compiling():
            return _step_outside(self, x, target, optimizer, criterion, context, update_mask)
        return _result(
            self._trainer.step(
                self, "net.step", x, target, optimizer, criterion, context, update_mask
            )
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
        if is_compiling():
            return _backward_outside(self, x, target, criterion, context, update_mask)
        return _result(
            self._trainer.step(
                self, "net.backward", x, target, GRADIENTS, criterion, context, update_mask
            )
        )


# A compiler would hand a step copies of the parameters, for it to update.
_step_outside = outside_compiled_graphs(DecoupledSequential.step)
_backward_outside = outside_compiled_graphs(DecoupledSequential.backward)
