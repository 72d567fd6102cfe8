"""One window: from its forward pass to the regression of the synthesizers at its start.

    g^ = M(s', ctx')                       predicted at its end s', detached
    gradients of all parameters            those of L + factor < g^, s' >
    G = d/ds of L + discount < g^, s' >    found at its start s: what M(s, ctx) learns

where a row's episode ends nothing is sent and nothing crosses. With a trace the targets look
further: see `traces.py`.
"""

from typing import Any

import torch
from torch import Tensor

from fastdni.training.boundary import Prediction
from fastdni.training.recurrent.boundaries import Gathered
from fastdni.training.recurrent.engine import Engine, Passed, who_learns
from fastdni.training.recurrent.horizon import Met
from fastdni.training.recurrent.layouts import State, rebuilt, tensors_of, zeroed
from fastdni.training.recurrent.traces import Kept, OnlineTrace, own


class Window:
    """A window that waits for its backward pass.

    Args:
        engine: of the network.
        x: the window's input.
        state: it starts from; None: from the module's own start.
        passed: what is known of that state; None: the caller made it.
        ended: (T, B), after which steps a row's episode ends, or (1, B) for the last one alone;
            None: after none.
        contexts: at its start and at its end.
        lengths: (B,), of padded rows.
        gathers: whether gradients of the synthesizers are handed over together: see `Gathered`.

    Attributes:
        output: what the module gave.
        state: at its end, detached; zero where an episode ended. `passed`: what is known of it.
        engine, gathers: as given.
    """

    def __init__(
        self,
        engine: Engine,
        x: Any,
        state: State | None,
        passed: Passed | None,
        ended: Tensor | None,
        contexts: tuple[Any, Any],
        lengths: Tensor | None,
        gathers: bool,
    ):
        self.engine, self._contexts, self.gathers = engine, contexts, gathers
        self._x, self._ended, self._lengths = x, ended, lengths
        self._before = passed
        settings = engine.settings
        if state is None and settings.first == "train":
            state = engine.unroller.zeros(engine.unroller.size(x)[1])
            if state is None:
                raise RuntimeError(
                    'DecoupledRNN: state must be given to a module of your own with first="train"'
                )
        self._given = [] if state is None else tensors_of(state)
        self.learns, self._rows = who_learns(engine, state, passed)
        self.start = [t.detach() for t in self._given]
        if self.learns or any(t.requires_grad for t in self._given):
            for tensor in self.start:
                tensor.requires_grad_()
        before = None if state is None else rebuilt(state, iter(self.start))
        self.output, end, self._endings = engine.unroller.run(x, before, ended, lengths)
        self.end = tensors_of(end)
        last = None if ended is None else ended[-1].unsqueeze(1)
        self._last = last
        self.state = rebuilt(end, iter([t.detach() for t in self.end]))
        if last is not None:
            self.state = zeroed(self.state, last)
        self.passed = Passed(last)
        self._kept = None
        if settings.trace_lambda is not None and settings.trace_view == "forward":
            self._kept = Kept.made(engine)
            self._kept.listen(self.output)
        self._versions = self._versions_now()
        self.predictions: list[Prediction] | None = None
        self._extra: list[Tensor | None] | None = None
        self._jacobian: Tensor | None = None

    def _versions_now(self) -> list[int]:
        return [p._version for p in self.engine.unroller.rnn.parameters()]

    # ---- before the backward pass ----

    def check(self) -> None:
        """Refuses parameters that are not those of the forward pass.

        Raises:
            RuntimeError: they have changed since.
        """
        if self._versions_now() != self._versions:
            raise RuntimeError(
                "DecoupledRNN: parameters must stay as they are between a window's forward pass and"
                " rnn.backward(loss); an optimizer has stepped, or they were loaded"
            )

    def send(self, loss_scale: float) -> tuple[list[Tensor], list[Tensor]]:
        """What to call the backward pass with besides the loss: tensors, and their gradients."""
        engine, settings = self.engine, self.engine.settings
        self._loss_scale = loss_scale
        if engine.is_plain:
            return [], []
        self.predictions = engine.boundaries.predict(self.end, self._contexts[1])
        messages = [p.message for p in self.predictions]
        if self._last is not None:
            messages = [torch.where(self._last, 0, message) for message in messages]
        further = settings.bootstrap - settings.factor
        plain = self._kept is None
        if self.learns and plain and further != 0:
            self._extra = self._pulled_back(messages, further * loss_scale)
        if self.learns and settings.trace_lambda is not None and plain:
            self._jacobian = OnlineTrace.jacobian(engine.boundaries.layout, self.end, self.start)
        if settings.factor == 0:
            return [], []
        sent = engine.boundaries.gradients(messages, self.end, settings.factor * loss_scale)
        pairs = [
            (t, g) for t, g in zip(self.end, sent, strict=True) if g is not None and t.requires_grad
        ]
        return [t for t, _ in pairs], [g for _, g in pairs]

    def _pulled_back(self, messages: list[Tensor], factor: float) -> list[Tensor | None]:
        """`factor` times what messages at the end are at the start."""
        given = self.engine.boundaries.gradients(messages, self.end, factor)
        pairs = [
            (t, g)
            for t, g in zip(self.end, given, strict=True)
            if g is not None and t.requires_grad
        ]
        ends, gradients = map(list, zip(*pairs, strict=True))
        return list(
            torch.autograd.grad(ends, self.start, gradients, retain_graph=True, allow_unused=True)
        )

    # ---- after it ----

    def learn(self, gathered: Gathered | None) -> tuple[Tensor | float, Tensor | float]:
        """Has the synthesizers learn from what the backward pass has found.

        Returns:
            Their loss, and that of targets alone; 0 where nothing was learnt.
        """
        self._gathered = gathered
        self._hand_to_learned_start()
        loss = energy = 0.0
        if self.learns and self._kept is None:
            loss, energy = self._learn_at_start()
        loss = loss + self._learn_the_end()
        self._look_ahead()
        passed = self.passed
        if self._last is None and self.predictions is not None:
            passed.predictions, passed.ctx = self.predictions, self._contexts[1]
            passed.engine = self.engine
        return loss, energy

    def _hand_to_learned_start(self) -> None:
        pairs = [
            (given, leaf.grad)
            for given, leaf in zip(self._given, self.start, strict=True)
            if given.requires_grad and leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))

    def _found(self) -> list[Tensor]:
        """G, of each tensor of the state."""
        extra = self._extra or [None] * len(self.start)
        found = []
        for leaf, further in zip(self.start, extra, strict=True):
            parts = [part for part in (leaf.grad, further) if part is not None]
            found.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(leaf))
        return found

    def _learn_at_start(self) -> tuple[Tensor, Tensor]:
        boundaries, scale = self.engine.boundaries, self._loss_scale
        targets = boundaries.targets(self._found(), scale)
        if self._jacobian is not None:
            trace = OnlineTrace(self.engine, self.start, self._contexts[0], self._rows)
            loss, energy, self.passed.trace = trace.learn(
                targets,
                self._before and self._before.trace,
                self._jacobian,
                self._ended,
                scale,
                self._gathered,
            )
            return loss, energy
        loss, energy = boundaries.regress(
            self.predictions_at_start(),
            targets,
            self.start,
            self._rows,
            weight=scale,
            gathered=self._gathered,
        )
        return loss / scale, energy / scale

    def predictions_at_start(self) -> list[Prediction]:
        """Those that the window before has made, where they are for the same rows and context."""
        before, ctx = self._before, self._contexts[0]
        made = None if before is None or self._rows is not None else before.predictions
        if made is not None and before.ctx is ctx and before.engine is self.engine:
            before.predictions = None
            return made
        return self.engine.boundaries.predict(self.start, ctx)

    def _learn_the_end(self) -> Tensor | float:
        """Where an episode ends, its future is worth zero."""
        if self.engine.settings.end is None or self._ended is None or self.engine.is_plain:
            return 0.0
        loss, scale, boundaries = 0.0, self._loss_scale, self.engine.boundaries
        for rows, tensors in [*self._endings, (self._last, self.end)]:
            predictions = boundaries.predict(tensors, self._contexts[1])
            zeros = [torch.zeros_like(p.message) for p in predictions]
            each, _ = boundaries.regress(
                predictions, zeros, tensors, rows, scale, gathered=self._gathered
            )
            loss = loss + each / scale
        return loss

    def _look_ahead(self) -> None:
        horizon = self.engine.horizon
        if not horizon.length:
            return
        met = None
        if self.learns:
            met = Met([t.detach() for t in self.start], own(self._contexts[0]), self._rows)
        earlier = [] if self._before is None else self._before.met
        ended = None if self._ended is None else self._ended.any(0).unsqueeze(1)
        self.passed.met = horizon.learn(
            [met, *earlier],
            ended,
            [p.message for p in self.predictions],
            weight=self._loss_scale,
            gathered=self._gathered,
        )

    def give_back(self) -> None:
        """Undoes what its start has used up."""
        if self._before is not None:
            self._before.is_used = False

    # ---- for a trace by the forward view ----

    @property
    def before(self) -> Passed | None:
        """What it was handed by the window before."""
        return self._before

    def release(self) -> "Kept | None":
        """Lets go of the graph. What is kept of the window to run it again."""
        kept = self._kept
        if kept is not None:
            kept.fill(
                like=self.state,
                x=self._x,
                start=[t.detach() for t in self.start],
                end=[t.detach() for t in self.end],
                ended=self._ended,
                lengths=self._lengths,
                ctx=self._contexts,
                rows=self._rows,
                learns=self.learns,
                loss_scale=self._loss_scale,
            )
        self.output = self.end = self.start = self._given = self._before = None
        return kept
