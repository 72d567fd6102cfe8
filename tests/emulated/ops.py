"""torch's ops on the emulated GPU: those of the CPU, on the same memory.

A step of fastdni is kernels of its own; what torch does before and after it (copies, random
numbers, a plain network) needs no kernels of a GPU to be right. So every op that torch has for CUDA
is replaced, but those that make tensors and views of them.
"""

import ctypes
import os
import traceback
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map, tree_map_only

_RUNTIME = ctypes.CDLL(None)  # loaded before torch's
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_RUNTIME.emulated_send.argtypes = [ctypes.c_void_p, _CALL, ctypes.c_int64]
_RUNTIME.emulated_drain.argtypes = [ctypes.c_void_p]
_RUNTIME.emulated_count.argtypes = [ctypes.c_char_p]
_RUNTIME.emulated_count.restype = ctypes.c_uint64

# They are right as they are: they run no kernel.
_KEPT = (
    "empty",
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "alias",
    "set_",
    "resize_",
    "record_stream",
    "is_pinned",
    "_pin_memory",
    "is_set_to",
)

_sent: list[Callable[[], None]] = []


def count(of: str) -> int:
    """How many "launches" of kernels, "allocations" of memory, "waits" of the host there were."""
    return _RUNTIME.emulated_count(of.encode())


@_CALL
def _do(number: int) -> None:
    try:
        _sent[number]()
    except BaseException:  # which no caller could see
        os.write(2, traceback.format_exc().encode())
        os._exit(3)


def send(work: Callable[[], None], stream: int) -> None:
    """Has something done in a stream of the current device when its turn comes; in a capture,
    whenever the graph is launched."""
    _sent.append(work)
    error = _RUNTIME.emulated_send(stream, _do, len(_sent) - 1)
    if error:
        raise RuntimeError(f"error {error} of the emulated GPU")


def wait_for(stream: int) -> None:
    """Until what was sent to a stream of the current device is done."""
    _RUNTIME.emulated_drain(stream)


def _record(work: Callable[[], None], device: torch.device) -> None:
    with torch.cuda.device(device):
        send(work, torch.cuda.current_stream().cuda_stream)


@contextmanager
def _opened(device: torch.device):
    """The memory of a device, for the host, when what was sent to the current stream is done."""
    with torch.cuda.device(device):
        wait_for(torch.cuda.current_stream().cuda_stream)
    _RUNTIME.emulated_open(device.index)
    try:
        yield
    finally:
        _RUNTIME.emulated_close(device.index)


def on_host(t: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU in the same memory."""
    if t.device.type != "cuda":
        return t
    bytes_ = t.untyped_storage().nbytes()
    if bytes_ == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")
    memory = (ctypes.c_char * bytes_).from_address(t.untyped_storage().data_ptr())
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    own = torch.empty(0, dtype=t.dtype, device="cpu")
    return own.set_(storage, t.storage_offset(), t.size(), t.stride())


def _for(kind: str):
    """Maps an op's arguments to another device."""

    def mapped(value):
        if isinstance(value, torch.Tensor):
            if kind == "cpu":
                return on_host(value)
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=kind)
        if isinstance(value, torch.device):
            return torch.device(kind)
        of_gpu = isinstance(value, torch.Generator) and value.device.type == "cuda"
        return None if of_gpu else value

    return mapped


class _Op:
    """An op for CUDA tensors, made of the CPU's."""

    def __init__(self, op):
        self._op = op
        self._arguments = op._schema.arguments
        self._returned = [self._alias(of.alias_info) for of in op._schema.returns]
        self._writes = any(a.alias_info and a.alias_info.is_write for a in self._arguments)

    def _alias(self, info) -> int | None:
        """The argument that a result is."""
        for number, argument in enumerate(self._arguments):
            if info and argument.alias_info and info.before_set & argument.alias_info.before_set:
                return number
        return None

    def __call__(self, *args, **kwargs):
        device = _device_of(args, kwargs)
        given = [
            kwargs.get(a.name) if a.kwarg_only or n >= len(args) else args[n]
            for n, a in enumerate(self._arguments)
        ]

        def computed(kind: str) -> list:
            own_args, own_kwargs = tree_map(_for(kind), (args, kwargs))
            found = self._op(*own_args, **own_kwargs)
            return [found] if len(self._returned) == 1 else list(found or [])

        made: list[torch.Tensor] = []

        def new(t: torch.Tensor) -> torch.Tensor:
            with torch.cuda.device(device):
                made.append(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device))
            return made[-1]

        captured = torch.cuda.is_current_stream_capturing()
        if not captured:
            with _opened(device):
                found = computed("cpu")
        elif all(at is not None for at in self._returned):
            found = [None] * len(self._returned)
        elif self._writes:
            raise NotImplementedError(f"{self._op} in a capture")
        else:
            found = computed("meta")  # nothing runs now: shapes are known without values
        results, copied = [], []
        for at, value in zip(self._returned, found, strict=True):
            if at is None:
                before = len(made)
                results.append(tree_map_only(torch.Tensor, new, value))
                copied += zip(made[before:], _tensors(value), strict=True)
                continue
            results.append(given[at])
            if value is not None and value.shape != given[at].shape:  # an out= that must grow
                given[at].resize_(value.shape)
                copied.append((given[at], value))
        if not captured:
            with _opened(device):
                for to, value in copied:
                    on_host(to).copy_(value)
        else:

            def again() -> None:
                found = computed("cpu")
                for to, value in zip(made, _tensors(found) if made else [], strict=True):
                    on_host(to).copy_(value)

            _record(again, device)
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)


def _tensors(value) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, value)
    return found


def _device_of(args, kwargs) -> torch.device:
    devices = {t.device for t in _tensors((args, kwargs)) if t.device.type == "cuda"}
    if len(devices) > 1:
        raise RuntimeError(f"tensors on {' and '.join(map(str, devices))}")
    device = devices.pop() if devices else torch.device(kwargs.get("device") or "cuda")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    kinds = {to.device.type, source.device.type}
    device = to.device if to.device.type == "cuda" else source.device
    if to.device == source.device:
        if torch.cuda.is_current_stream_capturing():
            _record(lambda: on_host(to).copy_(on_host(source)), device)
            return to
    elif kinds == {"cuda"}:
        torch.cuda.synchronize(source.device)
        with _opened(source.device):
            source = on_host(source).clone()
    else:
        # As for memory that is not pinned, which a capture refuses.
        torch.cuda.current_stream(device).synchronize()
    with _opened(device):
        on_host(to).copy_(on_host(source))
    return to


def _item(t: torch.Tensor):
    torch.cuda.current_stream(t.device).synchronize()
    with _opened(t.device):
        return on_host(t).item()


_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        packet = getattr(torch.ops.aten, base, None)
        if namespace == "aten" and packet is not None and not base.startswith(_KEPT):
            _library.impl(rest, _Op(getattr(packet, overload or "default")), "CUDA")
    _library.impl("copy_", _copy, "CUDA", allow_override=True)
    _library.impl("_local_scalar_dense", _item, "CUDA", allow_override=True)
    torch.backends.cudnn.enabled = False
