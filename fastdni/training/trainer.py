"""A step of a decoupled network: repeated where it is like the last one, else prepared and run."""

import threading
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from fastdni.training import arguments
from fastdni.training.optimizers import Optimizers
from fastdni.training.parts import FusedPart
from fastdni.training.running import Repetition, Results, run_by_parts, run_whole
from fastdni.training.step import Step
from fastdni.training.structure import Network, Structure

GRADIENTS = object()  # in an optimizer's place: no update


class Trainer:
    """Steps of one network, and what they need to know of it from one to the next.

    Steps are taken one at a time, whatever thread asks for them. The trainer holds neither the
    network nor the optimizers; the network holds it.
    """

    def __init__(self):
        self.lock = threading.RLock()  # of whoever works on the network
        self._version = 0  # raised whenever something is forgotten
        self._structure: Structure | None = None
        self._optimizers: Optimizers | None = None
        self._last: Repetition | None = None

    def forget(self) -> None:
        """Lets go of all that is known: what it was learnt from has changed."""
        self.forget_optimizers()
        self._structure = None

    def forget_optimizers(self) -> None:
        """Lets go of what was found out about optimizers: one of them is gone."""
        self._version += 1
        self._optimizers = self._last = None

    def step(
        self,
        net: Network,
        caller: str,
        x: Tensor,
        target: Tensor,
        optimizer,
        criterion: str | Callable,
        context: Tensor | None,
        update_mask: Iterable[bool] | None,
    ) -> Results:
        """See `DecoupledSequential.step`; for GRADIENTS as the optimizer its `backward`."""
        if self.lock._is_owned():
            raise RuntimeError(
                f"{caller}: a step of this network is under way, which called this one"
            )
        with self.lock:
            last = self._last
            if last is not None and last.is_like(
                x, target, optimizer, criterion, context, update_mask
            ):
                return last.take(caller, x, target, context)
            self._last = None
            given = (x, target, optimizer, criterion, context, update_mask)
            mode = torch.is_grad_enabled()
            try:
                return self._prepare(net, caller, *given)()
            finally:
                # An exception from outside may arrive on the way into a `no_grad`.
                torch._C._set_grad_enabled(mode)

    def _prepare(
        self, net, caller, x, target, optimizer, criterion, context, update_mask
    ) -> Callable[[], Results]:
        """A step that is not like the last one: its arguments checked, and who runs it found."""
        structure, step, parts = self.prepare(
            net, caller, x, target, optimizer, criterion, context, update_mask
        )
        (part, *others) = parts
        if not others and part.fused and part.takes(step.x, step.x):
            return partial(self._run_whole, structure, part, step)
        arguments.check_inputs(structure, step)
        return partial(run_by_parts, structure, parts, step)

    def prepare(
        self, net, caller, x, target, optimizer, criterion, context, update_mask
    ) -> tuple[Structure, Step, list]:
        """What the network is, the arguments, checked, and the parts that run them."""
        step = arguments.prepared(net, caller, x, target, criterion, context, update_mask)
        structure = self.structure(net, caller)
        if optimizer is not GRADIENTS:
            step.optimizers = self.optimizers(structure, caller, optimizer)
        arguments.check_devices(step, structure.parameters)
        arguments.check_real(caller, step.x, structure.parameters)
        if structure.has_head:
            arguments.normalize(structure, step)
        else:  # nobody here has a use for the criterion
            step.name = None
        parts = structure.parts(step.name, arguments.autocast_dtype(step.x), len(step.x))
        return structure, step, parts

    def _run_whole(self, structure: Structure, part: FusedPart, step: Step) -> Results:
        version = self._version
        results, repetition = run_whole(structure, part, step)
        if self._version == version:
            self._last = repetition
        return results

    # ---- what is known ----

    def structure(self, net: Network, caller: str) -> Structure:
        """The network as it is now."""
        known = self._structure
        if known is None or not known.is_current():
            self.forget()
            arguments.check_initialized(caller, list(net.parameters()))
            self._structure = known = Structure(net)
        return known

    def optimizers(self, structure: Structure, caller: str, given) -> Optimizers:
        """What is given as the optimizer, for the network as it is."""
        known = self._optimizers
        if known is not None:
            known.caller = caller
        if known is None or not known.still_serve(given):
            parameters, forget = structure.parameters, self.forget_optimizers
            self._optimizers = known = Optimizers(caller, given, parameters, forget)
        return known
