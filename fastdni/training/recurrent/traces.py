"""Targets that look further than the next boundary: lambda-targets, in two views.

    forward view   G_w = dL_w/ds_w + J_w^T ((1 - l) y M(s_{w+1}) + l y G_{w+1})
    online view    E_w = y l J_{w-1} E_{w-1} + dM(s_w)/dtheta
                   theta's gradient: scale sum over rows of E_w^T (M(s_w) - G_w), with G_w of l = 0

with l = trace_lambda, y = discount, J_w = ds_{w+1}/ds_w; nothing crosses an episode's end. With
theta fixed both give the same sums.

Source: Pemberton and Costa 2024, "BP(lambda)" (arXiv 2401.07044).
"""

from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils.rnn import PackedSequence

from fastdni.training.recurrent.boundaries import Gathered
from fastdni.training.recurrent.engine import Engine
from fastdni.training.recurrent.layouts import Layout, State, rebuilt, tensors_of

MOST_KEPT = 1000  # windows
MOST_BYTES = 1 << 30  # of an online trace


def own(given: Any, spare: Any = None) -> Any:
    """What the caller gave, in memory of our own: he may use his for the next window.

    Args:
        spare: what was kept before, whose memory is free.
    """
    if isinstance(given, PackedSequence):
        return given._replace(data=own(given.data))
    if isinstance(given, tuple | list):
        fits = isinstance(spare, tuple | list) and len(spare) == len(given)
        parts = [*map(own, given, spare if fits else repeat(None))]
        return parts if isinstance(given, list) else tuple(parts)
    if not isinstance(given, Tensor):
        return given
    if isinstance(spare, Tensor) and _kind(spare) == _kind(given):
        return spare.copy_(given.detach())
    return given.detach().clone()


_kind = attrgetter("shape", "dtype", "device", "layout")


class Kept:
    """What is kept of a window to run it again: its start, its input, and the gradient of the loss
    at its output."""

    def __init__(self):
        self._gradient: Tensor | None = None
        self._memory: Tensor | None = None  # of it

    @classmethod
    def made(cls, engine: Engine) -> "Kept":
        """In memory of one that is no longer needed, where there is one: what many windows keep and
        let go of by turns would leave holes in the heap."""
        if not engine.spare:
            return cls()
        kept = engine.spare.pop()
        kept._gradient = None
        return kept

    def state_dict(self) -> dict[str, Any]:
        """All of it, in memory that stays as it is when this one's is used again."""
        return {name: own(fact) for name, fact in vars(self).items() if name != "_memory"}

    @classmethod
    def from_state_dict(cls, facts: dict[str, Any]) -> "Kept":
        """The reverse."""
        kept = cls()
        vars(kept).update({name: own(fact) for name, fact in facts.items()})
        return kept

    def listen(self, output: Any) -> None:
        """Keeps the gradient that will come to the window's output."""
        data = output.data if isinstance(output, PackedSequence) else output
        if isinstance(data, Tensor) and data.requires_grad:
            data.register_hook(self._keep)

    def _keep(self, gradient: Tensor | None) -> None:
        if gradient is None:  # the window has no loss
            return
        gradient = gradient.detach()
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def fill(self, like: State, gradient: Tensor | None = None, **facts) -> None:
        """What is known once the window's backward pass is over.

        Args:
            like: a state, of the form of all.
            gradient: of the loss at the output, where nobody has listened.
            facts: kept as they are now, whatever becomes of them: x, start, end, ended, lengths,
                ctx, rows, learns: see `Window`; loss_scale: what the gradient was multiplied by.
        """
        if gradient is not None:
            self._gradient = gradient
        if self._gradient is not None:
            self._gradient = self._memory = own(self._gradient, self._memory)
        self.form = rebuilt(like, repeat(torch.empty(0)))
        known = self.__dict__
        known.update({name: own(fact, known.get(name)) for name, fact in facts.items()})

    def again(self, engine: Engine, sent: list[Tensor | None]) -> list[Tensor]:
        """Runs the window with the parameters of now; what is found at its start.

        Args:
            sent: the gradients of the state at its end.
        """
        gradient = self._gradient
        if gradient is not None and self.loss_scale != 1:
            gradient = gradient / self.loss_scale
        whole = self.lengths is None and (self.ended is None or len(self.ended) == 1)
        if whole and None not in sent and engine.unroller.why_no_kernel(self.x) is None:
            return engine.unroller.pulled_back(self.x, self.start, gradient, sent)
        start = [t.detach().requires_grad_() for t in self.start]
        before = rebuilt(self.form, iter(start))
        with torch.enable_grad():
            output, end, _ = engine.unroller.run(self.x, before, self.ended, self.lengths)
        pairs = [*zip(tensors_of(end), sent, strict=True)]
        if gradient is not None:
            pairs.append((output.data if isinstance(output, PackedSequence) else output, gradient))
        pairs = [(t, g) for t, g in pairs if g is not None and t.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in start]
        variables, gradients = map(list, zip(*pairs, strict=True))
        found = torch.autograd.grad(
            variables, start, gradients, allow_unused=True, materialize_grads=True
        )
        return list(found)


class ForwardTrace:
    """Windows one after the other that wait until their targets can be made.

    Attributes:
        windows: oldest first.
        left: what the last of them hands on: whoever starts from it goes on with the trace.
    """

    def __init__(self):
        self.windows: list[Kept] = []
        self.left: Any = None

    def add(self, kept: Kept, left: Any) -> None:
        """The next window."""
        if len(self.windows) == MOST_KEPT:
            raise RuntimeError(
                f"DecoupledRNN: {MOST_KEPT} windows are kept for their lambda-targets; say where "
                "episodes end (done), or give trace_windows"
            )
        self.windows.append(kept)
        self.left = left

    def learn(
        self, engine: Engine, loss_scale: float, gathered: Gathered | None
    ) -> tuple[Any, Any]:
        """Runs the windows again, last first, and has the synthesizers learn at each one's start.

        Returns:
            Their loss, and that of the targets alone; 0 where nothing was learnt.
        """
        windows, self.windows, self.left = self.windows, [], None
        engine.spare += windows
        if windows and not windows[0].learns:  # the first one
            del windows[0]
        if not windows:
            return 0.0, 0.0
        boundaries, last = engine.boundaries, windows[-1]
        # One window's rows after those of another: the synthesizers are asked once for all.
        starts = [
            torch.cat(tensors, -2) for tensors in zip(*(w.start for w in windows), strict=True)
        ]
        predictions = boundaries.predict(starts, _joined([w.ctx[0] for w in windows]))
        at_end = boundaries.predict(last.end, last.ctx[1], learn=False)
        messages = [p.message for p in predictions]
        of_windows = zip(*(m.chunk(len(windows), _row_axis(m)) for m in messages), strict=True)
        after = [*of_windows, [p.message for p in at_end]][1:]
        found: list[list[Tensor]] = []  # G, of the last window first
        for kept, messages in zip(reversed(windows), reversed(after), strict=True):
            found.append(kept.again(engine, self._sent(engine, kept, messages, found)))
        targets = [boundaries.targets(each) for each in reversed(found)]
        wanted = [torch.cat(each, _row_axis(each[0])) for each in zip(*targets, strict=True)]
        loss, energy = boundaries.regress(
            predictions,
            wanted,
            last.start,
            _joined([_rows(w) for w in windows])
            if any(w.rows is not None for w in windows)
            else None,
            weight=loss_scale,
            gathered=gathered,
            windows=len(windows),
        )
        return loss / loss_scale, energy / loss_scale

    @staticmethod
    def _sent(
        engine: Engine, kept: Kept, messages: list[Tensor], found: list[list[Tensor]]
    ) -> list[Tensor | None]:
        """The gradients of the state at a window's end, of what M says there and of G."""
        lam, discount = engine.settings.trace_lambda, engine.settings.bootstrap
        share = (1 - lam) * discount if found else discount
        sent = engine.boundaries.gradients(messages, kept.end, share)
        if found:
            further = [lam * discount * g for g in found[-1]]
            sent = [g if m is None else m + g for m, g in zip(sent, further, strict=True)]
        if kept.ended is None:
            return sent
        rows = kept.ended[-1].unsqueeze(1)
        return [None if g is None else torch.where(rows, 0, g) for g in sent]


def _row_axis(trigger: Tensor) -> int:
    """The dimension of the rows of a trigger, (..., B, K)."""
    return trigger.dim() - 2


def _rows(kept: Kept) -> Tensor:
    """The rows of a window that count, (B, 1)."""
    if kept.rows is not None:
        return kept.rows
    first = kept.start[0]
    return torch.ones(first.shape[-2], 1, dtype=torch.bool, device=first.device)


def _joined(contexts: list[Any]) -> Any:
    """Of several windows one context."""
    if contexts[0] is None:
        return None
    if not all(isinstance(ctx, Tensor) for ctx in contexts):
        raise RuntimeError("DecoupledRNN: context must be a tensor (or None) with trace_lambda")
    return torch.cat(contexts)


class Traces:
    """The windows of a network that wait for their targets: one trace after the other."""

    def __init__(self):
        self._now = ForwardTrace()

    def add(
        self, engine: Engine, kept: Kept, before: Any, left: Any, loss_scale: float,
        gathered: Gathered | None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Takes in a window, and has the synthesizers learn from traces that are over.

        Args:
            before: what it was handed by the window before it; `left`: what it hands on.

        Returns:
            As `ForwardTrace.learn`.
        """
        due = []
        if self._now.windows and (before is None or before is not self._now.left):
            due.append(self._now)  # cut off: nobody goes on from its last state
            self._now = ForwardTrace()
        self._now.add(kept, left)
        # Waits for a GPU's `done`.
        ends = kept.ended is not None and bool(kept.ended[-1].all())
        if ends or len(self._now.windows) == engine.settings.trace_windows:
            due.append(self._now)
            self._now = ForwardTrace()
        loss = energy = 0.0
        for trace in due:
            each, of_targets = trace.learn(engine, loss_scale, gathered)
            loss, energy = loss + each, energy + of_targets
        return loss, energy

    def state_dict(self, left: Any) -> list[dict[str, Any]]:
        """The windows that wait, where it is they that hand on `left`."""
        if self._now.left is not left:
            return []
        return [w.state_dict() for w in self._now.windows]

    def load_state_dict(self, windows: list[dict[str, Any]], left: Any) -> None:
        """The reverse."""
        self._now = ForwardTrace()
        for facts in windows:
            self._now.add(Kept.from_state_dict(facts), left)


class OnlineTrace:
    """The regression of one window with accumulated eligibility.

    Args:
        start: the state there; `ctx`: the context; `rows`: (B, 1), those that learn, None for all.
    """

    def __init__(self, engine: Engine, start: list[Tensor], ctx: Any, rows: Tensor | None):
        self._boundaries, self._settings = engine.boundaries, engine.settings
        (self._synthesizer,) = engine.boundaries.synthesizers
        (self._trigger,) = engine.boundaries.layout.join([t.detach() for t in start])
        self._start, self._ctx, self._rows = start, ctx, rows
        self._learning = [p for p in self._synthesizer.parameters() if p.requires_grad]

    @staticmethod
    def jacobian(layout: Layout, end: list[Tensor], start: list[Tensor]) -> Tensor:
        """J, (B, S, S), by as many backward passes as a row has numbers."""
        (joined,) = layout.join([t.detach() for t in end])
        found = []
        for number in range(joined.shape[1]):
            one = torch.zeros_like(joined)
            one[:, number] = 1
            sent = layout.split([one], end)
            rows = torch.autograd.grad(
                end, start, sent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found += layout.join(rows)
        return torch.stack(found, 1)

    def _slopes(self) -> Tensor:
        """dM/dtheta at each row, (B, S, |theta|)."""
        names = {n: p.detach() for n, p in self._synthesizer.named_parameters() if p.requires_grad}
        ctx = self._ctx if isinstance(self._ctx, Tensor) else None

        def said(parameters, s, c):
            c = None if c is None else c.unsqueeze(0)
            return functional_call(self._synthesizer, parameters, (s.unsqueeze(0), c)).squeeze(0)

        axes = (None, 0, None if ctx is None else 0)
        found = vmap(jacrev(said), in_dims=axes)(names, self._trigger, ctx)
        return torch.cat([slope.flatten(2) for slope in found.values()], 2)

    def learn(
        self,
        targets: list[Tensor],
        trace: Tensor | None,
        jacobian: Tensor,
        ended: Tensor | None,
        loss_scale: float,
        gathered: Gathered | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds theta's gradient to `p.grad`.

        Args:
            targets: with lambda = 0.
            trace: y l J_{w-1} E_{w-1}, (B, S, |theta|); None at an episode's start.
            jacobian: J_w.
            ended: (T, B), where episodes end in the window.
            gathered: see `Boundaries.regress`.

        Returns:
            The loss, that of the targets alone, and the next window's `trace`.
        """
        slopes = self._slopes()
        if self._rows is not None:
            slopes = torch.where(self._rows.unsqueeze(2), slopes, 0)
        trace = slopes if trace is None else trace + slopes
        with torch.no_grad():
            prediction = self._synthesizer(self._trigger, self._ctx)
        (target,) = targets
        error = prediction - target
        if self._rows is not None:
            error, target = (torch.where(self._rows, each, 0) for each in (error, target))
        scale = self._boundaries.scale(self._start, self._trigger.numel())
        flat = torch.einsum("bsp,bs->p", trace, error * (scale * loss_scale))
        sizes = [p.numel() for p in self._learning]
        if self._learning:
            pairs = zip(flat.split(sizes), self._learning, strict=True)
            found = [g.view_as(p) for g, p in pairs]
            if gathered is None:
                torch.autograd.backward(self._learning, found)
            else:
                gathered.add(self._learning, found)
        decay = self._settings.bootstrap * self._settings.trace_lambda
        following = decay * (jacobian @ trace)
        if ended is not None:
            following = torch.where(ended.any(0).view(-1, 1, 1), 0, following)
        half = scale / 2
        return error.square().sum() * half, target.square().sum() * half, following


def check_online(synthesizer, width: int, rows: int) -> None:
    """Refuses an online trace that would not fit into memory.

    Raises:
        RuntimeError: B S |theta| numbers are too many.
    """
    learning = [p for p in synthesizer.parameters() if p.requires_grad]
    count = rows * width * sum(p.numel() for p in learning)
    size = count * (learning[0].element_size() if learning else 0)
    if size > MOST_BYTES:
        raise RuntimeError(
            f'DecoupledRNN: trace_view="online" must keep {size / 2**30:.1f} GiB for {rows} rows of'
            f" a state of {width}, and may keep {MOST_BYTES >> 30}; the other way is "
            'trace_view="forward" over the last trace_windows windows'
        )
