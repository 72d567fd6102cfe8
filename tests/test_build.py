"""What was built: the extension's file, its instruction sets, the source distribution."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import fastdni
from fastdni import _C

ROOT = Path(__file__).resolve().parents[1]


# ---- the extension ----


def test_build_info():
    info = _C.build_info()
    assert list(info) == ["version", "compiler", "torch_headers", "cuda", "cuda_architectures"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{info["version"]}"' in pyproject
    assert fastdni.__version__ == info["version"]
    assert re.fullmatch(r"\w+ [\d.]+", info["compiler"])
    assert re.match(r"2\.\d+", info["torch_headers"])
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)


def test_the_binary_keeps_to_torchs_stable_abi():
    """Or it would serve one version of torch, and not every one from 2.11 on."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    if shutil.which("git") is None:
        pytest.skip("git is not on the PATH")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listed.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    unstable = re.compile(r"_ZN?[KTVIS]*N?(2at|3c10|5torch|5caffe2)")
    assert [symbol for symbol in symbols if unstable.match(symbol)] == []


def test_the_binary_finds_torch_by_name():
    """A path to the builder's libraries in the file would be followed on other machines."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


# ---- instruction sets ----


def in_process(isa, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"FASTDNI_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_cpu_capability():
    """Also run by the next test, in its processes."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "base")
    assert _C.cpu_capability() == (os.environ.get("FASTDNI_ISA") or best)


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_passes_the_tests_of_the_ops(isa):
    if isa == _C.cpu_capability():
        pytest.skip("that of this process: its tests are these")
    supported = {"DEFAULT": ["base"], "AVX2": ["base", "avx2"]}
    if isa not in supported.get(torch.backends.cpu.get_cpu_capability(), [isa]):
        pytest.skip(f"not on this processor: {isa}")
    tests = ["regression_loss", "synthesizer", "sweep", "build"]
    names = "forward_is_right or results_are_right or infinity or many_rows or cpu_capability"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({names}) and not cuda"]
    done = in_process(isa, *command, *(f"tests/test_{test}.py" for test in tests))
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 100


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_fails_the_import(isa):
    done = in_process(isa, "-c", "import fastdni")
    assert done.returncode == 1
    expected = rf"fastdni: FASTDNI_ISA must be one of base.* on this processor, got {isa}"
    assert re.search(expected, done.stderr)


def test_an_empty_variable_is_none():
    done = in_process("", "-c", "from fastdni import _C; print(_C.cpu_capability())")
    assert done.returncode == 0, done.stderr
    if not os.environ.get("FASTDNI_ISA"):
        assert done.stdout.strip() == _C.cpu_capability()


# ---- the tests' own ground ----


@pytest.mark.parametrize("n", [3, 100, 3000, 100_000, 1_000_000])
def test_fresh_memory_is_not_clean(n):
    """As the extension gets it, and as torch gives it to Python (conftest.py)."""
    assert torch.empty(n).isnan().all()
    torch.utils.deterministic.fill_uninitialized_memory = False
    junk = torch.empty(n)
    assert not junk.eq(0).any() and junk.abs().median() > 1


# ---- the sources ----


def tracked() -> list[Path]:
    """The files of the repository, in it or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [Path(name) for name in listed.stdout.split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


def test_the_source_distribution_is_complete_and_clean(tmp_path):
    copy = tmp_path / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    for litter in ("tests/__pycache__/a.pyc", "fastdni/__pycache__/a.pyc", "build/a.o"):
        (copy / litter).parent.mkdir(parents=True, exist_ok=True)
        (copy / litter).touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = (copy / "dist").iterdir()
    with tarfile.open(made) as archive:
        names = {Path(*Path(member).parts[1:]) for member in archive.getnames()}
    needed = {name for name in tracked() if name.parts[0] in ("csrc", "fastdni")}
    needed |= {Path(name) for name in ("CMakeLists.txt", "LICENSE", "setup.py", "pyproject.toml")}
    assert needed - names == set()
    litter = re.compile(r"__pycache__|\.pyc$|\.pytest_cache|\.ruff_cache|^build|\.so$")
    assert [name for name in names if litter.search(str(name))] == []


# Whom the repository may point to. A host that is not here is a slip, such as a mirror's name that
# a tool wrote into a file.
HOSTS = {
    "arxiv.org",
    "docs.pytest.org",
    "github.com",
    "pytorch.org",
    "keepachangelog.com",
    "semver.org",
    "www.apache.org",
}


@pytest.mark.parametrize(
    ("slip", "allowed"),
    [
        (re.compile(r"(?<![\w.])/(?:root|home|Users|work|workspace|tmp)/[\w.]+"), set()),
        (re.compile(r"(?<=://)[\w.-]+"), HOSTS),
        (re.compile(r"--[a-z-]*(?:index-url|find-links|trusted-host)"), set()),
    ],
    ids=["path", "host", "index"],
)
def test_no_file_names_the_machine_it_was_written_on(slip, allowed):
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{name}: {match}" for match in slip.findall(text) if match not in allowed]
    assert found == []


def test_the_oldest_triton_is_written_once_and_read_everywhere():
    from fastdni import triton

    assert f'"triton>={triton.OLDEST}"' in (ROOT / "pyproject.toml").read_text()
