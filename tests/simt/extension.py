"""The extension with its CUDA kernels compiled for the host: as "HOST" they serve CPU tensors, as
"EMULATED" the tensors of an emulated GPU (tests/emulated).

As a pytest plugin (`-p simt.extension`) it takes the place of fastdni's own: the tests then run a
network's step through everything that a GPU would run, from the public API down to the kernels.
"""

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = "FASTDNI_TEST_EXTENSION"


@functools.cache
def build(kind: str = "HOST") -> Path:
    """Compiles it, unless that is done, and returns its file."""
    folder = ROOT / "build" / f"simt-extension-{kind.lower()}"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1 -g1",  # -O2 takes longer to compile than it saves
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "made",
        "FASTDNI_CUDA": kind,
        "Python_EXECUTABLE": sys.executable,
    }
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would spoil each other's
        for command in (
            ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *definitions],
            ["cmake", "--build", folder],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    (made,) = (folder / "made").glob("_C*.so")
    return made


def _take_its_place(path: str) -> None:
    import torch  # noqa: F401  the extension finds torch's libraries already loaded

    spec = importlib.util.spec_from_file_location("fastdni._C", path)
    sys.modules["fastdni._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fastdni._C"])


if PATH in os.environ:
    _take_its_place(os.environ[PATH])
