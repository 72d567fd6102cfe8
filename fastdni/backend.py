"""Which backend serves an op here, and why.

An op runs on its own kernels where they exist for the tensor's device and dtype, and on the plain
PyTorch of `fastdni.reference` everywhere else. `set_backend` and `use_backend` fix the choice.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastdni import _C, triton
from fastdni.traced import constant

BACKENDS = ("cpu", "cuda", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# The schema of oneDNN's product, a private op of torch, that csrc/cpu/product.cpp was written for.
_ONEDNN_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, "
    "Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


def _onednn_usable() -> bool:
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return (
        op is not None
        and torch.backends.mkldnn.is_available()
        and str(op.default._schema) == _ONEDNN_SCHEMA
    )


_C.enable_onednn(_onednn_usable())


class _Choice(threading.local):
    override: str | None = None


_choice = _Choice()
_default = "auto"
_found_available: set[str] = set()
_fp32_precision = "torch"


def _unfit(device: torch.device | None = None) -> str | None:
    """What keeps the CUDA kernels from a GPU, by default the current one: its age, the driver's,
    the build."""
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    if major < 8:
        return f"the kernels are for GPUs from sm_80 on, this is {gpu}"
    driver, toolkit = _C.cuda_versions()
    if driver // 1000 < toolkit // 1000:
        served, built = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, toolkit))
        return f"the driver serves CUDA {served}, the kernels are built with {built}"
    built_for = _C.build_info()["cuda_architectures"].split()
    if not any(_runs(architecture, 10 * major + minor) for architecture in built_for):
        return f"the kernels are built for {', '.join(built_for)}; this is {gpu}"
    return None


# Of each backend and GPU met so far why it does not serve there by itself, or None: it does.
_unserved: dict[tuple[str, int], str | None] = {}
_looking = threading.Lock()


# Of a GPU and a backend, what its kernels compute there that plain PyTorch does not, or None.
# `agreement` gives it: it calls the ops, which ask here.
_disagreement: Callable[[torch.device, str], str | None]


def compare_by(disagreement: Callable[[torch.device, str], str | None]) -> None:
    """Has a GPU's kernels compared with plain PyTorch by this function before they serve."""
    global _disagreement
    _disagreement = disagreement


def _look(device: torch.device, name: str) -> str | None:
    try:
        reason = triton.unavailable() if name == "triton" else _unfit(device)
        reason = reason or _disagreement(device, name)
    except Exception as error:  # whatever a compiler or a driver raises
        reason = f"its kernels fail: {(str(error) or repr(error)).splitlines()[0]}"
    if reason is not None:
        warnings.warn(f"fastdni: {name} does not serve {device}: {reason}", stacklevel=2)
    return reason


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _is_known(device: torch.device, name: str) -> bool:
    """Whether it is known how a backend does on a GPU, or can be seen now."""
    known = (name, _number(device)) in _unserved
    return known or not torch.cuda.is_current_stream_capturing()


@constant
def why_unserved(device: torch.device, name: str = "cuda") -> str | None:
    """Why `auto` does not let a backend serve a GPU, or None. The first time, its kernels are
    compared there with plain PyTorch: a second's work (for Triton, which compiles them, some more),
    that the host waits for.

    Raises:
        RuntimeError: that first time is inside a CUDA graph's capture.
    """
    index = _number(device)
    if (name, index) not in _unserved:
        if not _is_known(device, name):
            raise RuntimeError(
                f"fastdni: take this step once before its capture: the first one on cuda:{index} "
                f"compares {name}'s kernels with plain PyTorch, which a graph cannot"
            )
        with _looking:
            if (name, index) not in _unserved:
                _unserved[name, index] = _look(torch.device("cuda", index), name)
    return _unserved[name, index]


# From so many multiply-adds of a stage's product on, B N K, `auto` takes Triton's tiles on tensor
# cores before the CUDA backend, by the precision of products. Estimated from the sizes at which
# tiles of 128 x 128 fill a GPU, not measured.
TRITON_FROM = {"bfloat16": 2e9, "tf32": 1e9}


def takes_triton(device: torch.device, work: int, precision: str) -> bool:
    """Whether `auto` gives stages whose largest product has so many multiply-adds to Triton, on a
    GPU that the CUDA kernels serve."""
    if work < TRITON_FROM.get(precision, math.inf) or triton.unavailable() is not None:
        return False
    return _is_known(device, "triton") and why_unserved(device, "triton") is None


def why_triton(precision: str) -> str:
    """Why `auto` has chosen Triton, in words."""
    if precision not in TRITON_FROM:
        return "auto: the CUDA backend does not serve here"
    return f"auto: a product of {TRITON_FROM[precision]:.0e} multiply-adds or more (an estimate)"


def _runs(architecture: str, of_gpu: int) -> bool:
    """Whether a GPU runs code for an architecture such as "80" or "90a"."""
    if not architecture.isdigit():
        return int(architecture[:-1]) == of_gpu
    return int(architecture) <= of_gpu  # the newest is there as PTX, for GPUs after it


def backends() -> dict[str, str]:
    """The backends: each name with `"available"`, or the reason why it is not."""
    if _C.build_info()["cuda"] is None:
        cuda = "built without CUDA kernels (no nvcc was found, or FASTDNI_CUDA=0)"
    elif not torch.cuda.is_available():
        cuda = "torch sees no CUDA GPU"
    else:
        cuda = _unfit() or "available"
    return {
        "cpu": "available",
        "cuda": cuda,
        "triton": triton.unavailable() or "available",
        "reference": "available",
    }


def _check(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(
            f"fastdni: backend must be one of {', '.join(('auto', *BACKENDS))}, got {name!r}"
        )
    if name not in _found_available:  # to look is slow, and what is there stays there
        reason = backends().get(name, "available")
        if reason != "available":
            raise RuntimeError(f"fastdni: backend {name!r} is not available: {reason}")
        if name == "triton":
            triton.load()
        _found_available.add(name)
    return name


def set_backend(name: str) -> None:
    """Fixes the backend of every op in this process.

    Args:
        name: `"auto"` (the default: kernels where they exist, on a GPU where they agree with the
            reference, which is looked at once; else the reference), `"cpu"`, `"cuda"`, `"triton"`
            or `"reference"`.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available here; the message says why.
    """
    global _default
    _default = _check(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for the calling thread, until the end of the `with` block."""
    previous, _choice.override = _choice.override, _check(name)
    try:
        yield
    finally:
        _choice.override = previous


def set_fp32_precision(name: str) -> None:
    """Fixes how the kernels of a GPU multiply float32, in this process.

    Args:
        name: `"torch"` (the default): what `torch.backends.cuda.matmul.fp32_precision` says, exact
            or TF32; `"tf32x3"`: on tensor cores, from the upper and lower parts of the operands,
            nearly as exact as float32.

    Raises:
        ValueError: there is no such precision.
    """
    global _fp32_precision
    if name not in ("torch", "tf32x3"):
        raise ValueError(f'fastdni: fp32 precision must be "torch" or "tf32x3", got {name!r}')
    _fp32_precision = name


@constant  # that torch.compile watches itself
def _precision_of_torch() -> str:
    return torch.backends.cuda.matmul.fp32_precision


def precision(device: torch.device, autocast: torch.dtype | None) -> str:
    """The precision of a step's products (see `ops.SweepPlan`) as torch's settings ask for it."""
    if autocast == torch.bfloat16:
        return "bfloat16"
    if device.type != "cuda":
        return "exact"
    if _fp32_precision == "tf32x3":
        return "tf32x3"
    return "tf32" if _precision_of_torch() == "tf32" else "exact"


def choice() -> str:
    """The backend that holds for the calling thread: a name, or "auto"."""
    return _choice.override or _default


def kernel_devices(op: str) -> tuple[str, ...]:
    """The device types for which the extension registers the raw op `fastdni::<op>`."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name in ("cpu", "cuda") if has(f"fastdni::{op}", name.upper()))


def has_cpu_kernel(tensor: torch.Tensor, devices: tuple[str, ...]) -> bool:
    """Whether the CPU's kernels serve an op that no GPU has kernels for, and whose callers have
    another way: a fixed backend without one is then no error.

    Args:
        tensor, devices: see `server`.
    """
    known = "cpu" in devices and tensor.dtype in (torch.float32, torch.float64)
    return known and tensor.device.type == "cpu" and choice() in ("auto", "cpu")


def server(tensor: torch.Tensor, devices: tuple[str, ...]) -> str:
    """Who serves an op: "cpu", "cuda", "triton" or "reference".

    Args:
        tensor: the op's first tensor.
        devices: the device types that the op has compiled kernels for, from `kernel_devices`.

    Raises:
        RuntimeError: a fixed backend cannot serve this tensor.
    """
    name = choice()
    if name == "reference":
        return name
    device = tensor.device.type
    compiled = device in devices and tensor.dtype in KERNEL_DTYPES
    if name == "auto":
        if compiled and (device != "cuda" or why_unserved(tensor.device) is None):
            return device
        # What the CUDA kernels do not serve: float16, AMD's GPUs, a build without them.
        others = device == "cuda" and tensor.dtype in triton.DTYPES and triton.unavailable() is None
        return "triton" if others and why_unserved(tensor.device, "triton") is None else "reference"
    if name == "triton":
        on_its_device = device == ("cpu" if triton.interpreted() else "cuda")
        if on_its_device and tensor.dtype in triton.DTYPES:
            return name
    elif name == device and compiled:
        return name
    raise RuntimeError(
        f"fastdni: backend {name!r} has no kernel for this op on a {tensor.dtype} tensor on "
        f'{tensor.device}; set_backend("auto") falls back to the reference'
    )


def why_reference(tensor: torch.Tensor) -> str:
    """Why the reference serves a tensor, in words."""
    if choice() == "reference":
        return 'plain PyTorch: the backend is "reference"'
    device = tensor.device
    if device.type == "cuda" and tensor.dtype == torch.float32:
        of_triton = triton.unavailable() or why_unserved(device, "triton")
        has_cuda = "cuda" in kernel_devices("sweep_")
        of_cuda = why_unserved(device) if has_cuda else backends()["cuda"]
        return f"plain PyTorch: cuda: {of_cuda}; triton: {of_triton}"
    return f"plain PyTorch: there are no kernels for {tensor.dtype} on {device.type}"
