"""What the sources of the extension may include: nothing above, and no other backend."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
# Of each folder the folders below it.
BELOW = {
    "common": (),
    "ops": ("common",),
    "cpu": ("cpu/kernels", "ops", "common"),
    "cpu/kernels": ("common",),
    "cuda": ("cuda/kernels", "ops", "common"),
    "cuda/kernels": ("common",),
}
# Which instruction set a kernel is compiled for.
ALLOWED = {("cpu/kernels", "cpu/isa.h")}
SOURCES = [path for path in sorted(CSRC.rglob("*.*")) if path.parent != CSRC]


def folder(path: str) -> str:
    return path.rpartition("/")[0]


def why_not(source: str, text: str) -> list[str]:
    """The includes that a file must not have."""
    here = folder(source)
    own = re.findall(r'#include "([^"]+)"', text)
    wrong = [
        path
        for path in own
        if folder(path) not in (here, *BELOW[here]) and (here, path) not in ALLOWED
    ]
    # A kernel's header may meet code compiled for another instruction set, or by nvcc.
    alone = here in ("common", "cpu/kernels", "cuda/kernels")
    return wrong + (re.findall(r"#include <(torch/[^>]+)>", text) if alone else [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes_point_down(path):
    assert why_not(path.relative_to(CSRC).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("ops/sweep.cpp", '#include "cpu/kernels/sweep.h"'),
        ("ops/sweep.cpp", '#include "cuda/device.h"'),
        ("cpu/sweep.cpp", '#include "cuda/kernels/sweep.h"'),
        ("common/network.h", '#include "ops/tensor.h"'),
        ("cuda/kernels/sweep.h", "#include <torch/csrc/stable/tensor.h>"),
    ],
)
def test_an_arrow_that_points_up_is_found(source, line):
    assert len(why_not(source, line)) == 1
