"""A step of consecutive stages of a network whose others are elsewhere: their output goes there,
the gradient of it comes from there, later."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastdni.training import arguments
from fastdni.training.boundary import Boundary, context_for, learns
from fastdni.training.running import (
    begin_parts,
    gradients_apart,
    update_by_gradients,
    updating,
)
from fastdni.training.structure import Network
from fastdni.training.trainer import Trainer

Reduce = Callable[[list[Tensor]], None]


class Done(NamedTuple):
    """What a step of a piece found out.

    Attributes:
        output: of its last stage.
        gradient: of its input; None where nothing is below.
        loss: the criterion's; None where the network's last stage is elsewhere.
        synthesis_losses: of the synthesizers that have learnt in it.
        open: what is left of it for `regress` to do; None: nothing.
    """

    output: Tensor
    gradient: Tensor | None
    loss: Tensor | None
    synthesis_losses: list[Tensor]
    open: Any = None


class Held(NamedTuple):
    """What a synthesizer predicted from, until the true gradient comes.

    Attributes:
        h: the piece's output; `ctx`: its context; `open`: as that of `Done`.
    """

    h: Tensor
    ctx: Any
    open: Any = None


class Piece:
    """Consecutive stages of a network.

    Args:
        net: them and their synthesizers; see `Network`.
        caller: whom messages name.
        waits: whether the true gradient is waited for before the next step. A sweep then makes the
            uppermost updates when it has come, as it would in an undivided network: to the bit.
        reduce: joins the gradients in `p.grad` with those of other processes.
    """

    def __init__(self, net: Network, caller: str, waits: bool, reduce: Reduce | None = None):
        self._net, self._caller, self._waits, self._reduce = net, caller, waits, reduce
        self._trainer = Trainer()

    def step(self, x: Tensor, target: Any, context: Any, optimizer: Any, criterion: Any) -> Done:
        """Forward pass, gradients and updates: all but that of the synthesizer above, whose
        gradient is sent into the stages. Arguments as those of `DecoupledSequential.step`.

        Raises:
            As `DecoupledSequential.step`; nothing has been written then.
        """
        structure, step, parts = self._trainer.prepare(
            self._net, self._caller, x, target, optimizer, criterion, context, None
        )
        has_head = structure.has_head
        arguments.check_inputs(structure, step)
        arguments.keep_apart(step, structure.written)
        stays_open = self._waits and not has_head and parts[-1].fused
        step.active[-1] = int(has_head or stays_open)  # whether its gradient is here, or will be
        with updating(structure, step, self._reduce) as update:
            passes, gradient = begin_parts(structure, parts, step)
            done = passes[:-1] if stays_open else passes
            update(done)
        losses = [loss for each in done for loss in each.synthesis_losses]
        if not (has_head or stays_open):
            del losses[-1]  # of the one above
        loss = passes[-1].loss if has_head else None
        left = (structure, step, passes[-1]) if stays_open else None
        return Done(passes[-1].output, gradient, loss, losses, left)

    def hold(self, done: Done, target: Any, context: Any) -> Held:
        """What the synthesizer above will need to learn."""
        h = done.output.detach()
        ctx = context_for(self._net.synthesizers[-1], context, target, h)
        return Held(h, ctx, done.open)

    def regress(self, held: Held, gradient: Tensor, optimizer: Any) -> list[Tensor]:
        """Has the synthesizer above learn from the true gradient of what it was asked for, with
        its parameters as they are now; losses of those that learn.

        Raises:
            RuntimeError: the gradient has another shape.
        """
        if held.open is not None:
            structure, step, top = held.open
            with updating(structure, step, self._reduce) as update:
                top.backward(gradient)
                update([top])
            return top.synthesis_losses
        synthesizer = self._net.synthesizers[-1]
        structure = self._trainer.structure(self._net, self._caller)
        optimizers = self._trainer.optimizers(structure, self._caller, optimizer)
        learn = learns(synthesizer)
        prediction = Boundary(synthesizer).predict(held.h, held.ctx, learn)
        if not learn:
            return [prediction.regress(gradient, learn=False)[0]]
        with gradients_apart(structure.parameters):
            loss, _ = prediction.regress(gradient)
            if self._reduce is not None:
                self._reduce(list(synthesizer.parameters()))
            update_by_gradients(structure, optimizers)
        return [loss]
