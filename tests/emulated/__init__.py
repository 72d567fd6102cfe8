"""A GPU that is none, for a CUDA build of torch on a machine without one.

`environment()` is that of a process which finds such a GPU: its CUDA runtime is runtime.cpp, loaded
before torch's; torch's ops run as the CPU's on the same memory (ops.py); fastdni's CUDA kernels are
compiled for the host (tests/simt), and Triton's are compiled for sm_90, launched, and run in its
interpreter (triton_driver.py). With the pytest plugin `emulated.plugin` device tests run there.
"""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from simt import extension
from simt.build import CACHE, require, shared_library

HERE = Path(__file__).resolve().parent


def why_not() -> str | None:
    """What is missing here, or None."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if not torch.backends.cuda.is_built() or torch.version.cuda is None:
        return "this torch is a CPU build (`make test-emulated` has one for CUDA)"
    if importlib.util.find_spec("triton") is None:
        return "Triton, and with it CUDA's headers, is not installed"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    return None


def environment() -> dict[str, str]:
    """Compiles what is missing. Raises simt.build.Unavailable."""
    require("plain")
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    runtime = shared_library(HERE / "runtime.cpp", headers)
    named = CACHE / runtime.stem  # the same library by the names under which others look for it
    named.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (named / "libcuda.so.1").symlink_to(runtime)
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return inherited | {
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": f"{named}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}",
        extension.PATH: str(extension.build("EMULATED")),
    }
