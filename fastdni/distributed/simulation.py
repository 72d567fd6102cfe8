"""The schedule on virtual time: links with latency, bandwidth and jitter, stages with compute
times, kills and partitions, all of it seeded.

What runs is `protocol.py` itself. In the place of a network each stage keeps two numbers, for its
layers and its synthesizer, which are mixed with whatever it is given: a message that is lost,
doubled, reordered or applied at another time changes them for good.
"""

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdni.distributed.protocol import StageProtocol

_MASK = (1 << 61) - 1


def _mixed(*numbers: int) -> int:
    found = 0x9E3779B97F4A7C15
    for number in numbers:
        found = ((found ^ number) * 0x100000001B3 + 0x632BE59BD9B4E019) & _MASK
        found ^= found >> 29
    return found


class Link(NamedTuple):
    """What a frame meets between two stages, in seconds.

    Attributes:
        latency: of every frame; `jitter`: at most so much more, drawn.
        transfer: for which a frame occupies the link.
    """

    latency: float = 0.0
    jitter: float = 0.0
    transfer: float = 0.0


class Fault(NamedTuple):
    """A stage that is killed at a time; or, for a `duration`, the link above it that is cut."""

    time: float
    stage: int
    duration: float | None = None


@dataclass
class Setting:
    """A run.

    Attributes:
        compute: seconds of each stage's message; `apply`: of a regression; `save`: of a checkpoint.
        spread: share by which each of these varies, drawn.
        links: one between each stage and the next.
        messages: how many.
        restart: seconds from a fault to the new start; `heartbeat`: from a cut link to its notice.
    """

    compute: Sequence[float]
    links: Sequence[Link]
    messages: int
    mode: str = "fixed"
    staleness: int = 4
    apply: float = 0.0
    save: float = 0.0
    save_every: int | None = None
    spread: float = 0.0
    faults: Sequence[Fault] = ()
    restart: float = 1.0
    heartbeat: float = 1.0
    seed: int = 0


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        seconds: that it took; `busy`: of each stage, those it computed in.
        finished: when each stage had computed each message, in the last attempt.
        state: layers' and synthesizers' numbers at the end.
        most_held: predictions that a stage held at most; `most_flying`: frames on one direction of
            a link; `most_saved`: checkpoints of a stage.
        attempts: how often it was started.
    """

    seconds: float = 0.0
    busy: list[float] = field(default_factory=list)
    finished: list[list[float]] = field(default_factory=list)
    state: list[tuple[int, int]] = field(default_factory=list)
    most_held: int = 0
    most_flying: int = 0
    most_saved: int = 0
    attempts: int = 0


class _Model:
    """The numbers of a stage, and what it holds of messages."""

    def __init__(self, stage: int):
        self.layers, self.synthesizer = _mixed(stage, 1), _mixed(stage, 2)
        self.held: dict[int, int] = {}  # activations whose gradient has not been applied
        self.feedback: dict[int, int] = {}  # gradients that have come
        self.inputs: dict[int, int] = {}

    def copy(self) -> "_Model":
        other = _Model(0)
        other.layers, other.synthesizer = self.layers, self.synthesizer
        other.held, other.feedback = dict(self.held), dict(self.feedback)
        return other  # inputs will come again

    def compute(self, number: int, first: bool, last: bool) -> tuple[int, int]:
        x = _mixed(number) if first else self.inputs.pop(number)
        activation, gradient = _mixed(self.layers, x), _mixed(self.layers, x, 3)
        sent = 0 if last else self.synthesizer
        self.layers = _mixed(self.layers, x, sent)
        if not last:
            self.held[number] = activation
        return activation, gradient

    def apply(self, number: int) -> None:
        held, gradient = self.held.pop(number), self.feedback.pop(number)
        self.synthesizer = _mixed(self.synthesizer, held, gradient)


def simulate(setting: Setting) -> Outcome:
    """Runs the schedule to its end.

    Raises:
        ProtocolError: a frame came that must not; RuntimeError: nobody had anything left to do.
    """
    return _Run(setting).run()


class _Run:
    def __init__(self, setting: Setting):
        self.setting, self.stages = setting, len(setting.compute)
        self.random = random.Random(setting.seed)
        self.now = 0.0
        self.outcome = Outcome(busy=[0.0] * self.stages)
        # Checkpoints of each stage that are complete: message -> (model, applied).
        self.saved = [{0: (_Model(s), 0)} for s in range(self.stages)]
        self.events: list[tuple] = []
        self.count = 0
        self.faults = sorted(setting.faults, reverse=True)
        self.cut_until = [0.0] * (self.stages - 1)

    def run(self) -> Outcome:
        while not self._attempt():
            self.now += self.setting.restart
        self.outcome.seconds = self.now
        self.outcome.state = [(m.layers, m.synthesizer) for m in self.models]
        return self.outcome

    def _push(self, time: float, kind: str, *what) -> None:
        self.count += 1
        heapq.heappush(self.events, (time, self.count, kind, *what))

    def _attempt(self) -> bool:
        """From the newest checkpoint that every stage has; whether it came to the end."""
        setting = self.setting
        self.outcome.attempts += 1
        start = max(set.intersection(*(set(saved) for saved in self.saved)))
        self.models, self.protocols = [], []
        for stage, saved in enumerate(self.saved):
            for number in [n for n in saved if n > start]:
                del saved[number]
            model, applied = saved[start]
            self.models.append(model.copy())
            protocol = StageProtocol(
                stage, self.stages, setting.mode, setting.staleness, setting.save_every
            )
            protocol.go_on_from(start, applied)
            for _ in range(setting.messages - start):
                protocol.give()
            protocol.close()
            self.protocols.append(protocol)
        self.free_at = {}  # of each direction of each link
        self.flying: dict[tuple, int] = {}
        self.busy = [False] * self.stages
        self.left = set(range(self.stages))  # stages that are not through
        self.events = []
        self.outcome.finished = [[] for _ in range(self.stages)]
        if self.faults:
            fault = self.faults[-1]
            self._push(max(fault.time, self.now), "fault")
        for stage in range(self.stages):
            self._go_on(stage)
        while self.left:
            if not self.events:
                raise RuntimeError(f"nobody has anything left to do: {self._described()}")
            self.now, _, kind, *what = heapq.heappop(self.events)
            if kind == "fault":
                if self._breaks(self.faults.pop()):
                    return False
            elif kind == "notice":
                return False
            else:
                getattr(self, f"_{kind}")(*what)
        return True

    def _breaks(self, fault: Fault) -> bool:
        """Whether a fault ends the attempt at once."""
        if self.faults:
            self._push(max(self.faults[-1].time, self.now), "fault")
        if fault.duration is None:
            return True
        edge = min(fault.stage, self.stages - 2)
        if fault.duration > self.setting.heartbeat:
            self._push(self.now + self.setting.heartbeat, "notice")
        self.cut_until[edge] = max(self.cut_until[edge], self.now + fault.duration)
        return False

    def _described(self) -> str:
        return ", ".join(
            f"{p.computed}/{p.given} computed, {p.applied} applied" for p in self.protocols
        )

    # ---- a stage ----

    def _go_on(self, stage: int) -> None:
        if self.busy[stage]:
            return
        action = self.protocols[stage].next()
        if action is None:
            if self.protocols[stage].is_drained:
                self.left.discard(stage)
            return
        self.busy[stage] = True
        setting = self.setting
        seconds = setting.compute[stage] if action.kind == "compute" else (
            setting.apply if action.kind == "apply" else setting.save)  # fmt: skip
        seconds *= 1 + setting.spread * self.random.uniform(-1, 1)
        self._push(self.now + seconds, "done", stage, action, seconds)

    def _done(self, stage: int, action, seconds: float) -> None:
        model, protocol, number = self.models[stage], self.protocols[stage], action.number
        protocol.complete()
        if action.kind == "compute":
            self.outcome.busy[stage] += seconds
            self.outcome.finished[stage].append(self.now)
            activation, gradient = model.compute(number, protocol.first, protocol.last)
            if not protocol.last:
                self._send(stage, stage + 1, "input", number, activation)
            if not protocol.first:
                self._send(stage, stage - 1, "feedback", number, gradient)
            self.outcome.most_held = max(self.outcome.most_held, len(model.held))
        elif action.kind == "apply":
            model.apply(number)
        else:
            saved = self.saved[stage]
            saved[number] = model.copy(), protocol.applied
            self.outcome.most_saved = max(self.outcome.most_saved, len(saved))
        for old in [n for n in self.saved[stage] if n < protocol.saved_by_all]:
            del self.saved[stage][old]
        self.busy[stage] = False
        self._go_on(stage)

    # ---- a link ----

    def _send(self, source: int, target: int, kind: str, number: int, value: int) -> None:
        edge, direction = min(source, target), (source, target)
        link = self.setting.links[edge]
        begin = max(self.now, self.free_at.get(direction, 0.0), self.cut_until[edge])
        self.free_at[direction] = end = begin + link.transfer
        come = end + link.latency + link.jitter * self.random.random()
        # A frame does not overtake another.
        come = max(come, self.free_at.get((direction, "come"), 0.0))
        self.free_at[direction, "come"] = come
        self.flying[direction] = flying = self.flying.get(direction, 0) + 1
        self.outcome.most_flying = max(self.outcome.most_flying, flying)
        saved = self.protocols[source].saved_by(kind)
        self._push(come, "come", direction, kind, number, saved, value)

    def _come(self, direction, kind: str, number: int, saved: int, value: int) -> None:
        _, stage = direction
        self.flying[direction] -= 1
        self.protocols[stage].arrive(kind, number, saved)
        model = self.models[stage]
        (model.inputs if kind == "input" else model.feedback)[number] = value
        self._go_on(stage)
