"""What a network is to the engine: which of its stages a sweep can run, and which parts that makes
of it."""

from typing import Protocol

import torch
from torch import nn

from fastdni import backend, ops
from fastdni.synthesizers import BasicSynthesizer
from fastdni.training.parts import FusedPart, LocalPart
from fastdni.training.stages import FusedStage, Unfused, parse
from fastdni.training.watch import layouts, watch_modules

_MAX_DIVISIONS = 8  # of a network into parts, by criterion, arithmetic and batch size


class Network(Protocol):
    """What the engine is handed: a module with S + 1 stages and the synthesizers between them; or,
    of a network whose other stages are elsewhere, with as many of each, the last of them a
    synthesizer of the gradient that comes from there. `below` says that others are below."""

    training: bool
    stages: nn.ModuleList
    synthesizers: nn.ModuleList
    input_synthesizers: nn.ModuleList | None
    bp_lambda: float

    def parameters(self): ...

    def buffers(self): ...


class Structure:
    """A network as it is: true for as long as `is_current` says so.

    Attributes:
        parameters: all of the network's.
        parsed: of each stage what a sweep has to know of it, or None.
        reasons: of each stage why no sweep can run it, or None.
        written: what a step may write, besides optimizer state.
    """

    def __init__(self, net: Network):
        self.parameters = list(net.parameters())
        self.written = [*self.parameters, *net.buffers()]  # what a step may write
        self.bp_lambda, self.below = net.bp_lambda, getattr(net, "below", False)
        self.stages, self.synthesizers = list(net.stages), list(net.synthesizers)
        self.input_synthesizers = list(net.input_synthesizers or [])
        self.parsed: list[FusedStage | None] = []
        self.reasons: list[str | None] = []
        self._parse()
        self._parts: dict[tuple, list] = {}
        self.watch = watch_modules(net, ("bp_lambda", "training"))
        self._layouts = layouts(self.parameters)

    def is_current(self) -> bool:
        """Whether modules, hooks, buffers and parameters are the same, and no parameter was frozen,
        thawed, hooked, cast, moved or reshaped."""
        return self.watch.unchanged() and layouts(self.parameters) == self._layouts

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def has_head(self) -> bool:
        """Whether the network's output, and so its loss, is here."""
        return len(self.synthesizers) < len(self.stages)

    def _is_head(self, number: int) -> bool:
        """Whether a stage's output is the network's."""
        return number == len(self.synthesizers)

    # ---- which stages a sweep runs ----

    def _parse(self) -> None:
        # What every input synthesizer predicts from; another width would be another tensor.
        made = [m for m in self.input_synthesizers if type(m) is BasicSynthesizer]
        inputs = made[0].input_trigger.in_features if made else None
        for number, stage in enumerate(self.stages):
            top = self._is_head(number)
            of_gradient = None if top else self.synthesizers[number]
            unlocked = self.input_synthesizers and not top
            of_input = self.input_synthesizers[number] if unlocked else None
            try:
                lowest = number == 0 and not self.input_synthesizers and not self.below
                self.parsed.append(parse(stage, of_gradient, of_input, inputs, lowest))
                self.reasons.append(None)
            except Unfused as reason:
                self.parsed.append(None)
                self.reasons.append(str(reason))
        lowest = self.parsed[0]
        if inputs is not None and lowest is not None and lowest.sweep.weight.shape[1] != inputs:
            self._refuse(0, "its input is not what the input synthesizers take")
        self._refuse_shared()
        for number in range(1, len(self)):
            self._compare(number)
        if self.bp_lambda > 0:
            for number in range(len(self)):
                self._refuse(number, "bp_lambda above 0 needs the order of backpropagation")

    def _compare(self, number: int) -> None:
        """Refuses a stage that does not fit onto the one below."""
        below, own = self.parsed[number - 1], self.parsed[number]
        if below is None or own is None:
            return
        below, own = below.sweep.weight, own.sweep.weight
        if below.shape[0] != own.shape[1]:
            self._refuse(number, "its input is not as wide as the output of the stage below")
        elif (below.dtype, below.device) != (own.dtype, own.device):
            self._refuse(number, "its parameters differ in dtype or device from those below")

    def _refuse(self, number: int, reason: str) -> None:
        if self.reasons[number] is None:
            self.parsed[number], self.reasons[number] = None, reason

    def _refuse_shared(self) -> None:
        """Parameters that several stages, or a stage and a synthesizer, have in common."""
        seen: dict[int, set[int]] = {}
        lists = [self.stages, self.synthesizers, self.input_synthesizers]
        owners = [(number, module) for modules in lists for number, module in enumerate(modules)]
        for place, (_, module) in enumerate(owners):
            for parameter in module.parameters():
                seen.setdefault(id(parameter), set()).add(place)
        for places in seen.values():
            for place in places if len(places) > 1 else ():
                self._refuse(owners[place][0], "it shares parameters with another module")
        for number, stage in enumerate(self.parsed):
            own = [] if stage is None else [*map(id, stage.sweep.parameters())]
            if len(set(own)) < len(own):
                self._refuse(number, "it shares parameters with another module")

    # ---- the parts that makes ----

    def parts(self, criterion: str | None, autocast: torch.dtype | None, batch: int) -> list:
        """The network as parts, from below: stages that follow each other and are served by the
        same backend are one.

        Args:
            criterion: its name; None: only autograd can follow it.
            autocast: what it rounds the operands of products to; None for nothing.
            batch: number of rows.
        """
        # Where every stage is on the CPU the key is the same whatever torch says of GPUs.
        devices = [stage.sweep.weight.device for stage in self.parsed if stage is not None]
        asked = next((d for d in devices if d.type == "cuda"), torch.device("cpu"))
        precision = backend.precision(asked, autocast)
        servers = None  # of each stage, where that depends on its size
        if backend.choice() == "auto" and precision in backend.TRITON_FROM:
            servers = tuple(
                None if stage is None else ops.sweep_backend([stage.sweep], batch, precision)
                for stage in self.parsed
            )
        key = (criterion, autocast, backend.choice(), precision, servers)
        if key not in self._parts:
            if len(self._parts) == _MAX_DIVISIONS:
                del self._parts[next(iter(self._parts))]
            self._parts[key] = self._divided(criterion, autocast, batch, servers)
        return self._parts[key]

    def takes_dropout(self, number: int, autocast: torch.dtype | None, batch: int) -> bool:
        """Whether a stage that a sweep can run has no Dropout, or its backend has that, too."""
        sweep = self.parsed[number].sweep
        if not sweep.dropout:
            return True
        precision = backend.precision(sweep.weight.device, autocast)
        return ops.sweep_takes_dropout([sweep], batch, precision)

    def _divided(self, criterion, autocast, batch, servers) -> list:
        parts: list[FusedPart | LocalPart] = []
        run: list[FusedStage] = []

        def close(end: int) -> None:
            if run:
                first = end - len(run)
                of_part = backend.precision(run[0].sweep.weight.device, autocast)
                name = criterion if self._is_head(end - 1) else None
                below = first > 0 or self.below
                parts.append(FusedPart(list(run), first, name, of_part, below))
                run.clear()

        for number, stage in enumerate(self.parsed):
            top = self._is_head(number)
            unlike = autocast not in (None, torch.bfloat16) or (top and criterion is None)
            if stage is None or unlike or not self.takes_dropout(number, autocast, batch):
                close(number)
                parts.append(self.local_part(number))
                continue
            if run and servers is not None and servers[number] != servers[number - 1]:
                close(number)
            run.append(stage)
        close(len(self))
        return parts

    def local_part(self, number: int) -> LocalPart:
        """A stage through autograd of its own."""
        top = self._is_head(number)
        return LocalPart(
            self.stages[number],
            number,
            None if top else self.synthesizers[number],
            self.input_synthesizers[number] if self.input_synthesizers and not top else None,
            self.bp_lambda,
            number > 0 or self.below,
        )
