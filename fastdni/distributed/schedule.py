"""The schedule of decoupled stages, over torch.distributed."""

import queue
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from fastdni.distributed.channels import VERSION, Frame, FrameError, Receiver, Sender
from fastdni.distributed.checkpoint import Checkpoints
from fastdni.distributed.liveness import Liveness
from fastdni.distributed.protocol import MODES, Action, ProtocolError, StageProtocol
from fastdni.distributed.safety import Safety
from fastdni.distributed.stage import DecoupledStage
from fastdni.training.piece import Done

_EVALUATION = 1 << 62  # the number of a frame that nobody learns from
_MORE = (
    3  # frames of a window than the staleness: the newest message, an evaluation, and a spare one
)
_REMEMBERED = 1000  # actions of a timeline
_LOOK = 0.05  # seconds between two looks at who is alive, while a frame is waited for


class DistributedError(RuntimeError):
    """Training has come to an end on every process; the message says whose fault it was."""


class StageResult(NamedTuple):
    """What a step found out on this process.

    Attributes:
        loss: the criterion's, on the last stage; elsewhere None.
        output: of this stage.
        synthesis_loss: of the synthesizers of this stage, the topmost one's that of the newest
            message whose gradient has come (NaN: none has); None where there is none.
    """

    loss: Tensor | None
    output: Tensor
    synthesis_loss: Tensor | None


class ScheduleDecoupled:
    """Trains the stages of a network, each in its process, none of which waits for the others'
    gradients: a synthesizer says at once what will come.

    Every process runs the same loop. The first stage's x, target and context travel with the
    message; of the last stage the own target counts, where it is given one.

    Args:
        stage: this process's.
        loss_fn: as `criterion` of `DecoupledSequential.step`; of the last stage.
        optimizer: over the stage's parameters.
        mode: "fixed": the true gradient of message k - D is applied right after message k, the same
            numbers on every link; "async": as it comes, at most D messages late.
        staleness: D. To hide a link it must be 2 latency / time of a stage + 2.
        heartbeat: seconds of silence after which a process counts as lost.
        cap: from this staleness on the learning rates count by cap / staleness, for late gradients
            bear small steps only; None: never.
        alarm: whether a loss that grows is warned of (once), and one that is not finite refused.
        checkpoint: a folder that every process reaches. Training goes on from the newest checkpoint
            there that all have: a loop skips the batches before `next_step`.
        save_every: messages from one to the next.

    Attributes:
        next_step: the number of the next message.
        timeline: of the newest actions (kind, message, begin, end), in seconds of `time.time()`;
            "wait" is for a frame.
        seconds: spent on each kind so far.

    Raises:
        ValueError: an argument is out of its range.
        DistributedError: the processes do not agree about them.

    Note:
        With f_s the stage, M_s its synthesizer and x_k message k's input, a stage makes of it
        h = f_s(x_k) and takes its step with the gradient M_s(h); what that leaves at x_k is the
        true gradient g_k of the stage below, where ||M(h_k) - g_k||^2 / B is regressed when it has
        come, with M as it is then.

    Source:
        Jaderberg et al. 2016 (arXiv 1608.05343), section 2.

    Example:
        >>> with ScheduleDecoupled(stage, "cross_entropy", optimizer, staleness=4) as schedule:
        ...     for x, y in loader:
        ...         schedule.step(x, target=y)
    """

    def __init__(
        self,
        stage: DecoupledStage,
        loss_fn: str | Callable = "cross_entropy",
        optimizer: Any = None,
        mode: str = "fixed",
        staleness: int = 4,
        heartbeat: float = 10.0,
        cap: int | None = 8,
        alarm: bool = True,
        checkpoint: str | Path | None = None,
        save_every: int = 100,
    ):
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                "ScheduleDecoupled: optimizer must be one of torch.optim's, got "
                f"{type(optimizer).__name__}"
            )
        if save_every < 1:
            raise ValueError(f"ScheduleDecoupled: save_every must be positive, got {save_every}")
        saves = None if checkpoint is None else save_every
        self._protocol = StageProtocol(stage.index, stage.count, mode, staleness, saves)
        self.stage, self._optimizer = stage, optimizer
        self._criterion = loss_fn if stage.is_last else _no_loss
        self._piece = stage.piece(waits=staleness == 0)
        self._rank = dist.get_rank()
        self._device = torch.device(stage.mesh.device_type)
        self._safety = Safety(optimizer, staleness, cap, alarm)
        self._agree(mode=MODES.index(mode), staleness=staleness, save_every=saves or 0)
        self._frames: queue.Queue = queue.Queue()
        self._given: dict[int, tuple] = {}
        self._inputs: dict[int, Frame] = {}
        self._feedback: dict[int, Tensor] = {}
        self._held: dict[int, Any] = {}
        self._evaluated: Frame | None = None
        self._done: dict[int, Done] = {}
        self._late_losses: list[Tensor] = []  # of what has learnt from the newest gradient
        self.timeline: deque[tuple[str, int, float, float]] = deque(maxlen=_REMEMBERED)
        self.seconds = dict.fromkeys(("compute", "apply", "save", "wait"), 0.0)
        self._checkpoints: Checkpoints | None = None
        if checkpoint is not None:
            self._checkpoints = Checkpoints(checkpoint, stage.index, stage.replica)
            self._resume()
        self._open(staleness + _MORE)
        peers = {f"stage {s}": self._rank_of(s) for s in self._neighbours()}
        store = dist.distributed_c10d._get_default_store()
        self._alive: Liveness | None = Liveness(store, self._rank, peers, heartbeat)

    # ---- the processes ----

    def _neighbours(self) -> list[int]:
        index = self.stage.index
        return [s for s in (index - 1, index + 1) if 0 <= s < self.stage.count]

    def _rank_of(self, index: int) -> int:
        return int(self.stage.mesh.mesh[index, self.stage.replica])

    def _agree(self, **numbers: int) -> None:
        """Refuses processes that are not of one mind."""
        stages, replicas = self.stage.mesh.mesh.shape
        numbers = {"format": VERSION, "stages": stages, "replicas": replicas} | numbers
        mine = torch.tensor([*numbers.values()], device=self._device)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        for rank, theirs in enumerate(every):
            for (name, one), other in zip(numbers.items(), theirs.tolist(), strict=True):
                if one != other:
                    raise DistributedError(
                        f"ScheduleDecoupled: {name} must be the same on every process, got {one} on"
                        f" rank {self._rank} and {other} on rank {rank}"
                    )

    def _resume(self) -> None:
        """Goes on from the newest checkpoint of all, if there is one."""
        start = self._checkpoints.newest_of_all(self._device)
        if start:
            applied, self._held, self._feedback = self._checkpoints.load(
                start, self.stage, self._optimizer, self._device
            )
            self._protocol.go_on_from(start, applied)

    def _open(self, window: int) -> None:
        """A communicator for each direction of each edge, made by all processes in one order."""
        self._senders: dict[str, Sender] = {}
        self._receivers: list[Receiver] = []
        ranks = self.stage.mesh.mesh.tolist()
        groups = {}
        for edge in range(self.stage.count - 1):
            for below, above in zip(ranks[edge], ranks[edge + 1], strict=True):
                for kind in ("input", "feedback"):
                    groups[below, above, kind] = dist.new_group([below, above])
        index = self.stage.index
        for other in self._neighbours():
            peer, up = self._rank_of(other), other > index
            pair = (self._rank, peer) if up else (peer, self._rank)
            sent, received = ("input", "feedback") if up else ("feedback", "input")
            self._senders[sent] = Sender(peer, groups[*pair, sent], window, self._device)
            self._receivers.append(
                Receiver(
                    peer, groups[*pair, received], window, self._device, self._frames,
                    (received, other),
                )
            )  # fmt: skip

    # ---- what a user calls ----

    @property
    def next_step(self) -> int:
        """The number of the message that the next step will give."""
        return self._protocol.given

    def step(
        self, x: Tensor | None = None, target: Any = None, context: Tensor | None = None
    ) -> StageResult:
        """The next message.

        Args:
            x, target, context: as those of `DecoupledSequential.step`, of the first stage; of the
                last one the target. Others' are not looked at.

        Raises:
            DistributedError: this process or another one has failed.
            RuntimeError, ValueError: an argument does not fit (the other processes end then).
        """
        self._check_open()
        if self.stage.is_first and not isinstance(x, Tensor):
            raise RuntimeError(
                f"schedule.step: x must be a tensor on the first stage, got {type(x).__name__}"
            )
        number = self._protocol.give()
        self._given[number] = x, target, context
        self._run_until(lambda: self._protocol.is_idle)
        return self._result(self._done.pop(number))

    @torch.no_grad()
    def evaluate(self, x: Tensor | None = None) -> Tensor | None:
        """The network's output, on the last stage (elsewhere None), in eval mode; every process
        calls it."""
        self._check_open()
        stage = self.stage
        if not stage.is_first:
            self._run_until(lambda: self._evaluated is not None)
            (x, *_), self._evaluated = self._evaluated.tensors, None
        was_training = stage.training
        stage.eval()
        try:
            output = stage(x)
        finally:
            stage.train(was_training)
        if stage.is_last:
            return output
        self._send("input", _EVALUATION, [output])
        return None

    def close(self) -> None:
        """Waits for what is in flight, and ends the connection; every process calls it."""
        if self._alive is None:
            return
        self._protocol.close()
        self._run_until(lambda: self._protocol.is_drained)
        for sender in self._senders.values():
            sender.end()
        for receiver in self._receivers:
            receiver.join(60)
        # A process that is done must not take the store with it that others still look at.
        dist.barrier()
        self._alive.stop()
        self._alive = None

    def __enter__(self) -> "ScheduleDecoupled":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
        elif self._alive is not None:
            self._alive.fail(f"{self._whoami()}: {kind.__name__}: {error}")
            self._alive.stop()
            self._alive = None

    # ---- what drives the protocol ----

    def _whoami(self) -> str:
        return f"stage {self.stage.index} (rank {self._rank})"

    def _check_open(self) -> None:
        if self._alive is None:
            raise RuntimeError("schedule.step: the schedule must be open, and was closed")

    def _run_until(self, done: Callable[[], bool]) -> None:
        try:
            while not done():
                while not self._frames.empty():
                    self._take(*self._frames.get())
                action = self._protocol.next()
                begin = time.time()
                if action is not None:
                    getattr(self, f"_{action.kind}")(action)
                    self._protocol.complete()
                    self._note(*action, begin)
                elif not done():
                    self._wait()
                    self._note("wait", self._protocol.computed, begin)
        except DistributedError as error:
            self._alive.fail(str(error))
            raise
        except BaseException as error:
            self._alive.fail(f"{self._whoami()}: {type(error).__name__}: {error}")
            raise

    def _note(self, kind: str, number: int, begin: float) -> None:
        end = time.time()
        self.timeline.append((kind, number, begin, end))
        self.seconds[kind] += end - begin

    def _wait(self) -> None:
        """For a frame."""
        while True:
            if self._alive.failure is not None:
                raise DistributedError(f"{self._alive.failure} {self._where()}")
            try:
                return self._take(*self._frames.get(timeout=_LOOK))
            except queue.Empty:
                continue

    def _where(self) -> str:
        p = self._protocol
        return (
            f"[{self._whoami()}: messages below {p.computed} computed, {p.inputs} inputs and "
            f"{p.feedback} gradients received, {p.applied} applied]"
        )

    def _take(self, channel: tuple[str, int], frame: Frame | Exception) -> None:
        """A frame, or what has become of the channel."""
        kind, other = channel
        if isinstance(frame, Exception):
            raise self._broken(kind, other, frame)
        if frame.number == _EVALUATION:
            self._evaluated = frame
            return
        try:
            self._protocol.arrive(kind, frame.number, frame.saved)
        except ProtocolError as error:
            raise DistributedError(f"{error}, from stage {other} {self._where()}") from error
        if kind == "input":
            self._inputs[frame.number] = frame
        else:
            self._feedback[frame.number] = self._checked(frame)

    def _checked(self, frame: Frame) -> Tensor:
        """The gradient that a frame carries."""
        (gradient,) = frame.tensors if len(frame.tensors) == 1 else [None]
        wanted = tuple(self._held[frame.number].h.shape)
        got = None if gradient is None else tuple(gradient.shape)
        if got != wanted:
            raise FrameError(f"the gradient of message {frame.number} must be {wanted}, got {got}")
        return gradient

    def _compute(self, action: Action) -> None:
        stage, number = self.stage, action.number
        x, target, context = self._given.pop(number)
        if not stage.is_first:
            x, travelled, context = self._inputs.pop(number).tensors
            target = target if stage.is_last and target is not None else travelled
        with self._safety.capped():
            done = self._piece.step(x, target, context, self._optimizer, self._criterion)
        if done.loss is not None:
            self._safety.look_at(done.loss)
        if not stage.is_last:
            self._held[number] = self._piece.hold(done, target, context)
            sent = [done.output, target if isinstance(target, Tensor) else None, context]
            self._send("input", number, sent)
        if not stage.is_first:
            self._send("feedback", number, [done.gradient])
        self._done[number] = done

    def _save(self, action: Action) -> None:
        held, feedback = self._held, self._feedback
        applied = self._protocol.applied
        self._checkpoints.save(action.number, self.stage, self._optimizer, applied, held, feedback)
        self._checkpoints.keep_from(self._protocol.saved_by_all)

    def _result(self, done: Done) -> StageResult:
        missing = len(self.stage.synthesizers) - len(done.synthesis_losses)
        late = self._late_losses or [torch.full((), float("nan"), device=self._device)] * missing
        losses = [*done.synthesis_losses, *late]
        found = torch.stack([loss.to(losses[-1].dtype) for loss in losses]) if losses else None
        return StageResult(done.loss, done.output, found)

    def _send(self, kind: str, number: int, tensors: list[Tensor | None]) -> None:
        try:
            self._senders[kind].send(number, self._protocol.saved_by(kind), tensors)
        except RuntimeError as error:
            other = self.stage.index + (1 if kind == "input" else -1)
            raise self._broken(kind, other, error) from error

    def _broken(self, kind: str, other: int, error: Exception) -> DistributedError:
        """Whoever has ended has said why, unless he was killed."""
        said = self._alive.reason()
        if said is not None:
            return DistributedError(f"{said} {self._where()}")
        peer, reason = self._rank_of(other), (str(error) or type(error).__name__).splitlines()[0]
        return DistributedError(
            f"the channel of {kind} between {self._whoami()} and stage {other} (rank {peer}) broke:"
            f" {reason}; see what rank {peer} says, and start all of them again {self._where()}"
        )

    def _apply(self, action: Action) -> None:
        held, gradient = self._held.pop(action.number), self._feedback.pop(action.number)
        with self._safety.capped():
            self._late_losses = self._piece.regress(held, gradient, self._optimizer)


def _no_loss(output: Tensor, target: Any) -> Tensor:
    raise AssertionError("a stage without a head has no loss")
