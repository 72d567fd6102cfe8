"""Who imports whom: arrows point down, in the package and in csrc, and files stay readable.

Imports inside functions count as all others do. A new module of the package needs a place here.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450
# From top to bottom: modules and packages import what stands below them, and beside them where that
# makes no circle.
LAYERS = (
    {"fastdni", "__main__", "explain", "bench", "compat", "distributed"},
    {"network", "interfaces", "recurrent", "graphs", "conversion"},
    {"training"},
    {"synthesizers", "scopes", "checkpoint"},
    {"agreement"},
    {"ops"},
    {"backend"},
    {"triton"},
    {"reference"},  # in whose types ops and backends speak of stages and optimizers
    {"traced", "_C"},
)
# Of each folder of csrc, which ones its files include besides their own. The root sees all.
INCLUDED = {
    "cpu": {"cpu/kernels", "ops", "common"},
    "cuda": {"cuda/kernels", "ops", "common"},
    "ops": {"common"},
    "cpu/kernels": {"common"},
    "cuda/kernels": {"common"},
    "common": set(),
}
WITHOUT_TORCH = ("cpu/kernels", "cuda/kernels", "common")

Arrows = dict[str, set[str]]


def imports(package: Path) -> Arrows:
    """Module -> the modules of the package, and of others, that it imports."""
    files = {_module(package, path): path for path in sorted(package.rglob("*.py"))}
    found = {name: set(_imported(path, name, files)) for name, path in files.items()}
    assert found, f"no modules in {package}"
    return found


def _module(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, name: str, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") + ["__init__"] * (path.name == "__init__.py")
                base = ".".join([*parts[: -node.level], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules or alias.name == "_C" else base


def layer(module: str) -> int:
    """The place of a module of fastdni in LAYERS."""
    place = module.removeprefix("fastdni.").partition(".")[0]
    found = [number for number, names in enumerate(LAYERS) if place in names]
    assert found, f"{module} has no place in LAYERS"
    return found[0]


def inside(arrows: Arrows) -> Arrows:
    """What of the package imports what of it."""
    return {
        name: {other for other in others if other.partition(".")[0] == "fastdni"}
        for name, others in arrows.items()
    }


def upward(arrows: Arrows) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in inside(arrows).items()
        for other in sorted(others)
        if layer(other) < layer(name)
    ]


def circle(arrows: Arrows) -> list[str]:
    """Of modules that import each other in a circle the names, in order; or none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := follow(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (follow(name, []) for name in arrows)), [])


def foreign(arrows: Arrows) -> list[str]:
    """What `reference` imports besides torch, Python's own modules and itself."""
    known = {"torch", *sys.stdlib_module_names}
    return [
        f"{name} imports {other}"
        for name, others in arrows.items()
        if name.startswith("fastdni.reference")
        for other in sorted(others)
        if other.partition(".")[0] not in known and not other.startswith("fastdni.reference")
    ]


def includes(csrc: Path) -> Arrows:
    """File -> the files of csrc, and the others in their brackets, that it includes."""
    found: Arrows = {}
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        quoted = re.findall(r'^\s*#\s*include\s+("[^"]+"|<[^>]+>)', path.read_text(), re.M)
        name = path.relative_to(csrc).as_posix()
        found[name] = {_resolved(csrc, path, each) for each in quoted}
    assert found, f"no files in {csrc}"
    return found


def _resolved(csrc: Path, path: Path, quoted: str) -> str:
    if quoted.startswith("<"):
        return quoted
    named = quoted.strip('"')
    for folder in (csrc, path.parent):
        if (folder / named).is_file():
            return (folder / named).resolve().relative_to(csrc.resolve()).as_posix()
    raise AssertionError(f"{path} includes {quoted}, which is not there")


def folder_of(file: str) -> str:
    return file.rpartition("/")[0]


def crossing(arrows: Arrows) -> list[str]:
    """What one folder of csrc includes of another that it must not."""
    found = []
    for name, others in arrows.items():
        own = folder_of(name)
        if not own:
            continue
        assert own in INCLUDED, f"csrc/{own} has no place in INCLUDED"
        ours = [other for other in sorted(others) if not other.startswith("<")]
        allowed = {own, *INCLUDED[own]}
        found += [f"{name} includes {o}" for o in ours if folder_of(o) not in allowed]
    return found


def torch_headers(arrows: Arrows) -> list[str]:
    pattern = re.compile(r"<(torch|ATen|c10|caffe2|pybind11)/")
    return [
        f"{name} includes {other}"
        for name, others in arrows.items()
        if folder_of(name) in WITHOUT_TORCH
        for other in sorted(others)
        if pattern.match(other)
    ]


def too_long(folder: Path) -> list[str]:
    lines = {
        path.relative_to(folder.parent).as_posix(): len(path.read_text().splitlines())
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
    }
    return [f"{name}: {count} lines" for name, count in lines.items() if count > MOST_LINES]


@pytest.fixture(scope="module")
def of_package() -> Arrows:
    return imports(ROOT / "fastdni")


@pytest.fixture(scope="module")
def of_csrc() -> Arrows:
    return includes(ROOT / "csrc")


def test_no_import_points_up(of_package):
    assert not upward(of_package)


def test_no_import_goes_in_a_circle(of_package):
    assert not circle(inside(of_package))


def test_the_reference_imports_only_torch(of_package):
    assert not foreign(of_package)


def test_a_folder_of_csrc_includes_what_it_may(of_csrc):
    """csrc/ops no backend, a backend no other, kernels no driver."""
    assert not crossing(of_csrc)


def test_no_include_goes_in_a_circle(of_csrc):
    assert not circle(of_csrc)


def test_kernels_include_no_torch_header(of_csrc):
    assert not torch_headers(of_csrc)


@pytest.mark.parametrize("folder", ["fastdni", "csrc"])
def test_files_are_short(folder):
    assert not too_long(ROOT / folder)


def test_suites_and_what_they_measure_with_share_no_names():
    of_bench, of_suites = (
        {p.stem for p in (ROOT / f).glob("[!_]*.py")} for f in ("fastdni/bench", "benchmarks")
    )
    assert of_bench and of_suites and not of_bench & of_suites


def written(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_faults_of_imports_are_seen(tmp_path):
    package = written(tmp_path / "fastdni", {
        "__init__.py": "from fastdni.network import net\n",
        "network.py": "from fastdni import ops, training\n",
        "training/__init__.py": "from fastdni.training.step import step\n",
        "training/step.py": "def step():\n    from fastdni import network\n",
        "ops/__init__.py": "from . import loss\n",
        "ops/loss.py": "from ..ops.sums import total\nimport fastdni.backend\n",
        "ops/sums.py": "from .loss import mean\n",
        "backend.py": "from fastdni import _C\n",
        "reference/__init__.py": "import math, torch, numpy.linalg\nimport fastdni.traced\n",
        "long.py": "\n" * (MOST_LINES + 1),
    })  # fmt: skip
    found = imports(package)
    assert found["fastdni.backend"] == {"fastdni._C"}
    with pytest.raises(AssertionError, match="fastdni.long has no place in LAYERS"):
        upward({**found, "fastdni.long": {"fastdni.ops"}})
    assert upward(found) == ["fastdni.training.step imports fastdni.network"]
    loop = ["fastdni.ops.loss", "fastdni.ops.sums", "fastdni.ops.loss"]
    assert circle({name: o for name, o in inside(found).items() if "ops" in name}) == loop
    assert foreign(found) == [
        "fastdni.reference imports fastdni.traced", "fastdni.reference imports numpy.linalg",
    ]  # fmt: skip
    assert too_long(package) == [f"fastdni/long.py: {MOST_LINES + 1} lines"]


def test_faults_of_includes_are_seen(tmp_path):
    csrc = written(tmp_path / "csrc", {
        "module.cpp": '#include "cpu/loss.h"\n',
        "ops/loss.cpp": '#include "common/scalar.h"\n#include "cpu/loss.h"\n',
        "cpu/loss.h": '#include "cuda/kernels/loss.cuh"\n#include <torch/csrc/stable/ops.h>\n',
        "cuda/kernels/loss.cuh": '#include "sum.cuh"\n#include <ATen/ATen.h>\n',
        "cuda/kernels/sum.cuh": '#include "cuda/kernels/loss.cuh"\n#include <cmath>\n',
        "common/scalar.h": "",
    })  # fmt: skip
    found = includes(csrc)
    assert crossing(found) == [
        "cpu/loss.h includes cuda/kernels/loss.cuh", "ops/loss.cpp includes cpu/loss.h",
    ]  # fmt: skip
    kernels = ["cuda/kernels/loss.cuh", "cuda/kernels/sum.cuh", "cuda/kernels/loss.cuh"]
    assert circle(found) == kernels
    assert torch_headers(found) == ["cuda/kernels/loss.cuh includes <ATen/ATen.h>"]
    written(csrc, {"cpu/loss.cpp": '#include "cpu/none.h"\n'})
    with pytest.raises(AssertionError, match="which is not there"):
        includes(csrc)
