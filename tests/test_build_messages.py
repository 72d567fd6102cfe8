"""What the build says, and what it refuses: each in one line that names what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def configure(build: Path, *definitions: str, **environment: str) -> str:
    """Runs CMake on the sources, as far as it comes; returns what it prints."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake or ninja is not on the PATH")
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build]
    command += [f"-DPython_EXECUTABLE={sys.executable}", *definitions]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=build.parent
    )
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("archs", ["sm_90a", "9.0a", "ninety"])
def test_architectures_of_another_form(archs, tmp_path):
    said = configure(tmp_path / "b", "-DFASTDNI_CUDA=1", f"-DFASTDNI_CUDA_ARCHS={archs}")
    assert f'FASTDNI_CUDA_ARCHS must look like "80 90a", got "{archs}"' in said


def test_a_build_without_cuda_says_so(tmp_path):
    said = configure(tmp_path / "b", "-DFASTDNI_CUDA=0")
    assert "no nvcc found (or FASTDNI_CUDA=0): building for the CPU only" in said
    assert "Configuring done" in said


def test_an_old_torch(tmp_path):
    (tmp_path / "torch-2.10.1.dist-info").mkdir()
    (tmp_path / "torch-2.10.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.10.1\n")
    said = configure(tmp_path / "b", "-DFASTDNI_CUDA=0", PYTHONPATH=str(tmp_path))
    assert "fastdni: torch must be 2.11 or later, found 2.10.1" in said


def test_no_torch(tmp_path):
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    hide_torch = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a);"
        "__file__ = 'setup.py'; sys.argv = [__file__, '-q', 'build_ext', '--inplace'];"
        "exec(open(__file__).read())"
    )
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastdni").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", hide_torch], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "fastdni: torch is needed to build" in done.stderr
    assert "Traceback" not in done.stderr


def test_sources_that_were_not_built(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastdni", tmp_path / "fastdni", ignore=ignore)
    # Without the finder of an editable installation, which would find the extension all the same.
    load = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    load += "import fastdni"
    done = subprocess.run(
        [sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "did not load; build it with `pip install --no-build-isolation -e .`" in last
