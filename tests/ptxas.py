"""Reads what `nvcc -Xptxas -v` says about kernels."""

import re
import subprocess
from typing import NamedTuple

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    name: str  # "regression_loss_kernel"
    dtype: str  # its first template argument: "float"
    architecture: str  # "sm_90a"


class Usage(NamedTuple):
    stack: int  # bytes
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    registers: int  # per thread


def parse(log: str) -> dict[Kernel, Usage]:
    """Usage by kernel."""
    usage = {}
    for entry in log.split("ptxas info    : Compiling entry")[1:]:
        symbol, architecture = COMPILING.search("Compiling entry" + entry).groups()
        frame = map(int, FRAME.search(entry).groups())
        registers = int(REGISTERS.search(entry).group(1))
        usage[Kernel(*kernel_name(symbol), architecture)] = Usage(*frame, registers)
    return usage


def kernel_name(symbol: str) -> tuple[str, str]:
    """A mangled symbol's name and first template argument, both without their namespace."""
    signature = subprocess.run(
        ["c++filt", symbol], capture_output=True, text=True, check=True
    ).stdout
    name, dtype = re.search(r"(\w+)<(?:\w+::)*(\w+)", signature).groups()
    return name, dtype
