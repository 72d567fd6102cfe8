"""What a stage does next, as a state machine without input or output.

Frames and completed actions go in, actions come out; who moves the frames and does the work is the
driver's business: `schedule.py` over torch.distributed, `simulation.py` on virtual time.

    compute k   forward pass of message k, own update with a synthetic gradient
    apply j     the synthesizer's regression on the true gradient of message j
    save k      a checkpoint of a stage that has computed the messages below k, with the gradients
                that have come for them

A stage holds the predictions of at most staleness + 1 messages: further ones wait for the gradients
of the oldest, which is all the back-pressure there is: no queue is longer.

    fixed   the gradient of k - D is applied right after k is computed, however early it came: the
            same numbers on every link
    async   gradients are applied as they come; D messages without one are waited for

Frames say how far the stages behind them have saved. What a stage has heard from both sides tells
which checkpoint every stage has: older ones are for nobody.
"""

from typing import NamedTuple

MODES = ("fixed", "async")


class ProtocolError(RuntimeError):
    """A frame that must not come: lost, doubled or reordered ones before it."""


class Action(NamedTuple):
    """What to do: "compute", "apply" or "save"; of which message."""

    kind: str
    number: int


class StageProtocol:
    """One stage's part.

    Args:
        stage, stages: its number, and how many there are.
        mode: "fixed" or "async".
        staleness: D, how many messages a gradient may be late.
        save_every: messages between two checkpoints; None: none are made.

    Attributes:
        computed, applied: messages that are, counted from the beginning.
        given: messages that the caller has asked for; `inputs`, `feedback`: frames that have come.
        saved: the newest checkpoint.
    """

    def __init__(
        self,
        stage: int,
        stages: int,
        mode: str,
        staleness: int,
        save_every: int | None = None,
    ):
        if mode not in MODES:
            known = ", ".join(map(repr, MODES))
            raise ValueError(f"ScheduleDecoupled: mode must be one of {known}, got {mode!r}")
        if isinstance(staleness, bool) or not isinstance(staleness, int) or staleness < 0:
            raise ValueError(
                f"ScheduleDecoupled: staleness must be an integer from 0 on, got {staleness!r}"
            )
        self.first, self.last = stage == 0, stage == stages - 1
        self.mode, self.staleness, self._save_every = mode, staleness, save_every
        self.go_on_from(0, 0)
        self._closing = False
        self._now: Action | None = None

    # ---- what goes in ----

    def go_on_from(self, number: int, applied: int) -> None:
        """A checkpoint of this message is where training begins: the gradients of the messages
        below have come, and so many are applied."""
        self.computed = self.given = self.inputs = self.feedback = self.saved = number
        self.applied = number if self.last else applied
        self._saved_behind = {"input": number, "feedback": number}

    def give(self) -> int:
        """The caller asks for the next message; its number."""
        self.given += 1
        return self.given - 1

    def close(self) -> None:
        """No further message will be asked for: what is in flight is waited for."""
        self._closing = True

    def arrive(self, kind: str, number: int, saved: int) -> None:
        """A frame has come: "input" from below, or "feedback" from above.

        Args:
            saved: what the stages behind it have saved: see `saved_by`.

        Raises:
            ProtocolError: it is not the next one, or answers what was not sent.
        """
        wanted = self.inputs if kind == "input" else self.feedback
        if number != wanted or (kind == "feedback" and number >= self.computed):
            raise ProtocolError(
                f"{kind} must come in order, {wanted} next ({self.computed} sent), got {number}"
            )
        self._saved_behind[kind] = saved
        if kind == "input":
            self.inputs += 1
        else:
            self.feedback += 1

    def complete(self) -> None:
        """What `next` said last is done."""
        kind, number = self._now
        self._now = None
        if kind == "compute":
            self.computed = number + 1
        elif kind == "apply":
            self.applied = number + 1
        else:
            self.saved = number

    # ---- what comes out ----

    def saved_by(self, kind: str) -> int:
        """The newest checkpoint that this stage and all those behind it have, for a frame of this
        kind to say."""
        end = self.first if kind == "input" else self.last
        return self.saved if end else min(self.saved, self._saved_behind[kind])

    @property
    def saved_by_all(self) -> int:
        """A checkpoint that every stage has: the newest that is known of."""
        return min(self.saved_by("input"), self.saved_by("feedback"))

    def next(self) -> Action | None:
        """What to do now; None: to wait for a frame, or for the caller."""
        kind = self._next()
        if kind is None:
            return None
        number = self.applied if kind == "apply" else self.computed
        self._now = Action(kind, number)
        return self._now

    def _next(self) -> str | None:
        waiting = 0 if self.last else self.computed - self.applied
        has_feedback = self.feedback > self.applied
        if waiting > self.staleness:
            return "apply" if has_feedback else None
        if waiting and has_feedback and self.mode == "async":
            return "apply"
        if self._is_due:
            return "save" if self.last or self.feedback == self.computed else None
        if self.computed < self.given:
            return "compute" if self.first or self.inputs > self.computed else None
        return "apply" if self._closing and waiting and has_feedback else None

    @property
    def _is_due(self) -> bool:
        every = self._save_every
        return every is not None and self.computed % every == 0 and self.saved < self.computed

    @property
    def is_idle(self) -> bool:
        """Whether all that the caller has asked for is computed, and is saved where that is due."""
        late = not self.last and self.computed - self.applied > self.staleness
        return self.computed == self.given and not late and not self._is_due

    @property
    def is_drained(self) -> bool:
        """The same, with every gradient applied."""
        return self.is_idle and (self.last or self.applied == self.computed)
