"""Reads the machine code of the CUDA kernels out of the built extension."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

FUNCTION = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# csrc/common/network.h
PRECISION = ["exact", "tf32", "tf32x3", "bfloat16"]


class Kernel(NamedTuple):
    name: str  # "regression_loss_kernel"
    dtype: str  # of its template arguments the type: "float"
    precision: str  # and the precision of products, where it is one of them: "tf32"


class Usage(NamedTuple):
    registers: int  # per thread
    stack: int  # bytes per thread: what does not stay in registers
    shared: int  # bytes
    local: int  # bytes per thread


def available() -> str | None:
    """The tool's name with path, in PATH or in triton's package; it needs nvdisasm beside it."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    path = f"{os.environ['PATH']}{os.pathsep}{bundled}"
    tool = shutil.which("cuobjdump", path=path)
    return tool if tool and shutil.which("nvdisasm", path=path) else None


@functools.cache
def _dump(option: str, architecture: str, file: str) -> str:
    tool = available()
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [tool, option, "-arch", f"sm_{architecture}", file],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def usage(file: str, architecture: str) -> dict[Kernel, Usage]:
    """What each kernel takes of a multiprocessor."""
    found = FUNCTION.findall(_dump("-res-usage", architecture, file))
    return {kernel(symbol): Usage(*map(int, numbers)) for symbol, *numbers in found}


def instructions(file: str, architecture: str) -> dict[Kernel, str]:
    """The instructions of each kernel, as text."""
    _, *functions = _dump("-sass", architecture, file).split("Function : ")
    return {kernel(text.split()[0]): text for text in functions}


@functools.cache
def kernel(symbol: str) -> Kernel:
    """Of a mangled symbol the name, the type and the precision, without their namespaces."""
    signature = subprocess.run(
        ["c++filt", symbol], capture_output=True, text=True, check=True
    ).stdout
    template = re.search(r"(\w+)<([^>]*)>", signature)
    name, arguments = (template or re.search(r"(\w+)()\(", signature)).groups()
    dtype = precision = ""
    for argument in arguments.split(", "):
        of_precision = re.fullmatch(r"\(fastdni::Precision\)(\d)", argument)
        if of_precision is not None:
            precision = PRECISION[int(of_precision.group(1))]
        else:
            dtype = argument.split("::")[-1]
    return Kernel(name, dtype, precision)
