"""Reads what `nvcc -Xptxas -v` says about kernels."""

import re
import subprocess
from typing import NamedTuple

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# csrc/common/network.h
PRODUCTS = ["exact", "tf32", "tf32x3", "bfloat16"]
REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    name: str  # "regression_loss_kernel"
    dtype: str  # of its template arguments the type: "float"
    products: str  # and the arithmetic, where it is one of them: "tf32"
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


def kernel_name(symbol: str) -> tuple[str, str, str]:
    """Of a mangled symbol the name, the type and the arithmetic, without their namespaces."""
    signature = subprocess.run(
        ["c++filt", symbol], capture_output=True, text=True, check=True
    ).stdout
    name, arguments = re.search(r"(\w+)<([^>]*)>", signature).groups()
    products = ""
    for argument in arguments.split(", "):
        of_products = re.fullmatch(r"\(fastdni::Products\)(\d)", argument)
        if of_products is not None:
            products = PRODUCTS[int(of_products.group(1))]
        else:
            dtype = argument.split("::")[-1]
    return name, dtype, products
