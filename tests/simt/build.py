"""Compiles a CUDA kernel for the host (see simt.h) and runs it on numpy arrays."""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIMT = Path(__file__).resolve().parent
ROOT = SIMT.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"

FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-g1"]
# The sanitized builds are optimised only where that pays for its own compile time.
VARIANTS = {
    "plain": ["-O2"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}

Run = Callable[..., list[np.ndarray]]


class Unavailable(Exception):
    """This machine cannot make a variant; the message says why."""


class HostRunError(Exception):
    """A host run failed; the message is what the shim or the sanitizer reported."""


class Fault(NamedTuple):
    """A fault to plant: in csrc/`header`, `old` (which must occur once) becomes `new`."""

    header: str
    old: str
    new: str


def build(kernel: str, variant: str, fault: Fault | None = None) -> Run:
    """Compiles tests/simt/<kernel>.cpp, and with it the kernel, for the host.

    Args:
        kernel: name of the case.
        variant: a key of VARIANTS.
        fault: a fault to plant in a copy of csrc first; such a build has float64 alone.

    Returns:
        run(params, arrays, outputs): calls the kernel with `params` (a mapping) and the arrays the
        case reads, in order. `outputs` are the (dtype, count) of the arrays that it writes, which
        run returns. Raises HostRunError.

    Raises:
        Unavailable: no compiler here, or no runtime of that sanitizer.
    """
    require(variant)
    csrc = CSRC if fault is None else _plant(fault)
    # Only the kernel sees the fault, so that its build shares everything else with the sound one.
    shared = tuple(VARIANTS[variant])
    alone = () if fault is None else ("-DSIMT_FLOAT64_ALONE",)
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(_compile, ("main", kernel), (CSRC, csrc), (shared, shared + alone)))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    program = CACHE / f"host_kernels-{kernel}-{variant}-{name}"
    _make(program, [*FLAGS, *VARIANTS[variant], *objects])
    return functools.partial(_run, program, kernel)


def _run(
    program: Path,
    kernel: str,
    params: Mapping[str, object],
    arrays: Iterable[np.ndarray] = (),
    outputs: Iterable[tuple[type, int]] = (),
) -> list[np.ndarray]:
    done = subprocess.run(
        [program, kernel, *(f"{key}={value}" for key, value in params.items())],
        input=b"".join(array.tobytes() for array in arrays),
        capture_output=True,
        env=os.environ | SANITIZER_OPTIONS,
        timeout=120,
    )
    if done.returncode:
        raise HostRunError(f"exit code {done.returncode}\n{done.stderr.decode()}")
    results, begin = [], 0
    for dtype, count in outputs:
        results.append(np.frombuffer(done.stdout, dtype, count, begin))
        begin += results[-1].nbytes
    if begin != len(done.stdout):
        raise HostRunError(f"{kernel} wrote {len(done.stdout)} bytes, {begin} were expected")
    return results


def _plant(fault: Fault) -> Path:
    """A copy of csrc with the fault in it."""
    sound = (CSRC / fault.header).read_text()
    if sound.count(fault.old) != 1:
        raise ValueError(f"{fault.header} has {sound.count(fault.old)} times {fault.old!r}")
    csrc = CACHE / f"fault-{hashlib.sha256(repr(fault).encode()).hexdigest()[:16]}"
    for folder in ("common", "cuda/kernels"):
        shutil.copytree(CSRC / folder, csrc / folder, dirs_exist_ok=True)
    (csrc / fault.header).write_text(sound.replace(fault.old, fault.new))
    return csrc


def _compile(source: str, csrc: Path, variant_flags: tuple[str, ...]) -> Path:
    flags = [*FLAGS, *variant_flags, f"-I{SIMT}", f"-I{csrc}"]
    text = hashlib.sha256(" ".join([_compiler_version(), *flags]).encode())
    headers = [
        *SIMT.glob("*.h"),
        *(csrc / "common").iterdir(),
        *(csrc / "cuda" / "kernels").iterdir(),
    ]
    for file in [SIMT / f"{source}.cpp", *sorted(headers)]:
        text.update(file.name.encode() + file.read_bytes())
    target = CACHE / f"{source}-{text.hexdigest()[:16]}.o"
    _make(target, [*flags, "-c", SIMT / f"{source}.cpp"])
    return target


def shared_library(source: Path, headers: Path) -> Path:
    """Compiles a file, and the headers beside it, to a shared library, unless that is done."""
    flags = [*FLAGS, "-O2", "-shared", "-fPIC", "-isystem", str(headers)]
    text = hashlib.sha256(" ".join([_compiler_version(), *flags]).encode())
    for file in [source, *sorted(source.parent.glob("*.h"))]:
        text.update(file.read_bytes())
    name = f"{source.stem}-{text.hexdigest()[:16]}.so"
    _make(CACHE / name, [*flags, source])
    return CACHE / name


def _make(target: Path, arguments: list[str | Path]) -> None:
    """Runs g++ unless the target is there already, or another process is making it."""
    if target.exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with (
        open(CACHE / f"{target.name}.lock", "w") as lock,
        tempfile.TemporaryDirectory(dir=CACHE) as folder,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        made = Path(folder) / target.name
        done = subprocess.run(["g++", *arguments, "-o", made], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        made.replace(target)


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout


@functools.cache
def _unavailable(variant: str) -> str | None:
    """Why an empty program cannot be compiled and run in a variant, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the stack switch is written for x86-64, this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "no g++"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("#include <source_location>\nint main() {}\n")
        for command in (["g++", *FLAGS, *VARIANTS[variant], source, "-o", program], [program]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"no {variant} build here: {done.stderr.strip()[-200:]}"
    return None


def require(variant: str) -> None:
    reason = _unavailable(variant)
    if reason is not None:
        raise Unavailable(reason)
