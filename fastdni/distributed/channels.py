"""Frames between two stages: one direction of one edge is a channel.

A frame is one tensor of bytes: a head of 64 numbers, then what it carries (an activation, labels, a
context; or a gradient), each by its bytes and the shape and dtype that the head says. Nothing in it
is ever unpickled, and all of it is looked at before anything is written.

Receives are posted in advance, as many as frames can be in flight. A frame that is larger than
those before it is announced: the posted receives are used up by empty frames, and larger ones take
their place.
"""

import queue
import struct
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MAGIC, VERSION = 0x464E4944, 1  # "DINF"
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.int16, torch.int8,
)  # fmt: skip
DATA, GROWTH, EMPTY, END = range(4)
_NUMBERS, _MOST_TENSORS, _MOST_DIMENSIONS = 64, 4, 10
_HEAD = _NUMBERS * 8
_ALIGNED = 64


class FrameError(RuntimeError):
    """A frame that is none, or not the one that must come."""


class Frame(NamedTuple):
    """What came.

    Attributes:
        number: of the message; `saved`: see `StageProtocol.saved_by`.
        tensors: what it carries; None in the place of one that there is none of.
    """

    number: int
    saved: int
    tensors: list[Tensor | None]


def _rounded(count: int) -> int:
    return (count + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def size_of(tensors: list[Tensor | None]) -> int:
    """Bytes of a frame that carries these."""
    return _HEAD + sum(_rounded(t.nbytes) for t in tensors if t is not None)


def write(buffer: Tensor, kind: int, number: int, saved: int, tensors: list[Tensor | None]) -> None:
    """Puts a frame into memory that is large enough.

    Raises:
        FrameError: a tensor has too many dimensions, or a dtype that is not DTYPES'.
    """
    head = [MAGIC, VERSION, kind, number, saved, len(tensors)]
    at = _HEAD
    for tensor in tensors:
        if tensor is None:
            head += [-1] * (2 + _MOST_DIMENSIONS)
            continue
        if tensor.dim() > _MOST_DIMENSIONS or tensor.dtype not in DTYPES:
            raise FrameError(
                f"a frame's tensor must have up to {_MOST_DIMENSIONS} dimensions, got "
                f"{tensor.dim()}, and a dtype that can be sent, got {tensor.dtype}"
            )
        shape = [*tensor.shape, *[0] * (_MOST_DIMENSIONS - tensor.dim())]
        head += [DTYPES.index(tensor.dtype), tensor.dim(), *shape]
        into = buffer[at : at + tensor.nbytes]
        into.copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
        at += _rounded(tensor.nbytes)
    head += [0] * (_NUMBERS - len(head))
    packed = bytearray(struct.pack(f"<{_NUMBERS}q", *head))
    buffer[:_HEAD].copy_(torch.frombuffer(packed, dtype=torch.uint8))


def read(buffer: Tensor) -> tuple[int, Frame]:
    """A frame's kind, and what it carries, copied.

    Raises:
        FrameError: it is none.
    """
    head = struct.unpack(f"<{_NUMBERS}q", bytes(buffer[:_HEAD].cpu().numpy()))
    magic, version, kind, number, saved, count = head[:6]
    if magic != MAGIC or version != VERSION:
        raise FrameError(
            f"a frame must be of version {VERSION} of the format, got {version} ({magic:#x}): every"
            " process must run the same version of fastdni"
        )
    if not 0 <= count <= _MOST_TENSORS or number < 0:
        raise FrameError(f"a frame must carry up to {_MOST_TENSORS} tensors, got {count}")
    tensors: list[Tensor | None] = []
    at = _HEAD
    width = 2 + _MOST_DIMENSIONS
    for i in range(count):
        code, dims, *shape = head[6 + i * width : 6 + (i + 1) * width]
        if code == -1:
            tensors.append(None)
            continue
        shape = shape[:dims] if 0 <= dims <= _MOST_DIMENSIONS else [-1]
        if not 0 <= code < len(DTYPES) or min(shape, default=0) < 0:
            raise FrameError(f"a frame's tensor must have a dtype and a shape, got {head[6:]}")
        tensor = torch.empty(shape, dtype=DTYPES[code], device=buffer.device)
        if at + tensor.nbytes > len(buffer):
            raise FrameError(f"a frame's tensor of shape {tuple(shape)} must fit into the frame")
        tensor.view(-1).view(torch.uint8).copy_(buffer[at : at + tensor.nbytes])
        tensors.append(tensor)
        at += _rounded(tensor.nbytes)
    return kind, Frame(number, saved, tensors)


class Sender:
    """The end of a channel that sends.

    Args:
        peer: the process at the other end; `group`: of the channel alone.
        window: most frames in flight.
    """

    def __init__(self, peer: int, group, window: int, device: torch.device):
        self._to = {"dst": peer, "group": group}
        self._window, self._device = window, device
        self._count = 0
        self._make(_HEAD)

    def _make(self, size: int) -> None:
        self._size = size
        self._buffers = [
            torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(self._window)
        ]
        self._works: list = [None] * self._window

    def send(self, number: int, saved: int, tensors: list[Tensor | None]) -> None:
        """Sends a frame; waits where the window is full."""
        wanted = size_of(tensors)
        if wanted > self._size:
            self._flush(GROWTH, wanted)
            self._make(wanted)
        self._put(DATA, number, saved, tensors)

    def end(self) -> None:
        """No frame will follow."""
        self._flush(END, 0)

    def _flush(self, kind: int, number: int) -> None:
        """Uses up what the other end has posted."""
        self._put(kind, number, 0, [])
        for _ in range(self._window - 1):
            self._put(EMPTY, 0, 0, [])
        for work in self._works:
            if work is not None:
                work.wait()

    def _put(self, kind: int, number: int, saved: int, tensors: list[Tensor | None]) -> None:
        slot = self._count % self._window
        if self._works[slot] is not None:
            self._works[slot].wait()
        write(self._buffers[slot], kind, number, saved, tensors)
        self._works[slot] = dist.isend(self._buffers[slot], **self._to)
        self._count += 1


class Receiver:
    """The end that receives, by a thread of its own: gloo cannot be asked whether something came.

    Args:
        frames: a queue that gets (name, frame), or (name, an exception).
        name: of the channel.
        Others as `Sender`.
    """

    def __init__(self, peer: int, group, window: int, device, frames: queue.Queue, name):
        self._from = {"src": peer, "group": group}
        self._window, self._device = window, device
        self._frames, self._name = frames, name
        self._thread = threading.Thread(target=self._run, name=f"fastdni {name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            size = _HEAD
            while size:
                size = self._receive(size)
        except Exception as error:
            self._frames.put((self._name, error))

    def _receive(self, size: int) -> int:
        """Receives frames of a size, until another one is announced; that one, 0 at the end."""
        buffers = [
            torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self._window)
        ]
        works = [dist.irecv(buffer, **self._from) for buffer in buffers]
        slot, left, following = 0, None, 0
        while left != 0:
            works[slot].wait()
            kind, frame = read(buffers[slot])
            if left is not None:  # of what was posted
                left -= 1
            elif kind == DATA:
                works[slot] = dist.irecv(buffers[slot], **self._from)
                self._frames.put((self._name, frame))
            else:
                left, following = self._window - 1, frame.number if kind == GROWTH else 0
            slot = (slot + 1) % self._window
        return following

    def join(self, seconds: float) -> None:
        """Waits for the end."""
        self._thread.join(seconds)
