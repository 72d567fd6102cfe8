"""Plants faults of one line, one at a time, and looks whether the tests of their subject fail.

    make test-mutants                     all of them
    make test-mutants MUTANTS=watch       those whose file or tests' name holds the word

The lists are `planted.py` and `planted_*.py`. Each fault is planted in a copy of the tree (in
build/mutants), which is built again where the fault is in C++; a fault that no test notices has
survived, and the exit status is then 1. A test that is taken for a fault's own must pass without
it: that is seen first.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(__file__))
from planted import MUTANTS, Mutant  # noqa: E402
from planted_distributed import DISTRIBUTED  # noqa: E402
from planted_recurrent import RECURRENT  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
TREES = ROOT / "build" / "mutants"
COPIED = ("fastdni", "csrc", "tests", "setup.py", "CMakeLists.txt", "pyproject.toml", "README.md")
PATIENCE = 300  # seconds, after which tests count as failed
FOR_A_BUILD = 1200
FAILED, NO_TESTS = 1, 5  # exit statuses of pytest


def copy_tree(name: str) -> pathlib.Path:
    """A copy of the tree, in which what is built is newer than what it is built from."""
    tree = TREES / name
    for part in COPIED:
        source, copy = ROOT / part, tree / part
        for file in [source] if source.is_file() else source.rglob("*"):
            place = copy / file.relative_to(source)
            if not file.is_file() or "__pycache__" in file.parts:
                continue
            if not place.exists() or place.read_bytes() != file.read_bytes():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
        if source.is_dir():  # what has gone since the last time
            for place in list(copy.rglob("*.py")):
                if not (source / place.relative_to(copy)).exists():
                    place.unlink()
    return tree


def run(tree: pathlib.Path, *command: str, patience: int = PATIENCE) -> tuple[int, str]:
    """Exit status and output of a Python command in a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "FASTDNI_CUDA": "0"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a file may change twice within a second
    try:
        found = subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return FAILED, "timed out"
    return found.returncode, found.stdout


def build(tree: pathlib.Path) -> None:
    status, said = run(tree, "setup.py", "--quiet", "build_ext", "--inplace", patience=FOR_A_BUILD)
    if status:
        raise RuntimeError(said[-2000:])


def test(tree: pathlib.Path, tests: str) -> tuple[int, str]:
    return run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", *tests.split())


def planted(source: str, mutant: Mutant) -> str:
    """The file with the fault in it."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"found {source.count(mutant.old)} times")
    return source.replace(mutant.old, mutant.new)


def judge(tree: pathlib.Path, mutant: Mutant) -> str:
    """What becomes of a fault: killed, SURVIVED, or why it could not be judged."""
    file = tree / mutant.file
    source = file.read_text()
    compiled = mutant.file.startswith("csrc")
    try:
        file.write_text(planted(source, mutant))
        if compiled:
            build(tree)
        status, said = test(tree, mutant.tests)
    except ValueError as error:
        return f"NOT PLANTED: {error}"
    except RuntimeError as error:
        return f"NOT BUILT: {error}"
    finally:
        file.write_text(source)
    if status == 0:
        return "SURVIVED"
    if status == FAILED or status < 0:  # below zero: ended by a signal
        return "killed"
    return f"NOT RUN: {said[-300:]}"


def judge_all(name: str, mutants: list[Mutant]) -> int:
    """Judges faults one after the other; how many were not killed."""
    if not mutants:
        return 0
    tree, failed = copy_tree(name), 0
    build(tree)
    for tests in dict.fromkeys(mutant.tests for mutant in mutants):
        status, said = test(tree, tests)
        if status:
            print(f"{tests} must pass without a fault, and does not:\n{said[-1000:]}", flush=True)
            return len(mutants)
    for mutant in mutants:
        start = time.monotonic()
        verdict = judge(tree, mutant)
        failed += verdict != "killed"
        line = f"{verdict:10} {time.monotonic() - start:4.0f} s  {mutant.file}: "
        print(
            line + (mutant.new.strip() or f"without {mutant.old.strip()}").splitlines()[0],
            flush=True,
        )
    if name == "compiled":
        build(tree)  # as it was, for the next time
    return failed


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in [*MUTANTS, *RECURRENT, *DISTRIBUTED] if word in m.file or word in m.tests]
    compiled = [m for m in chosen if m.file.startswith("csrc")]
    others = [m for m in chosen if m not in compiled]
    with ThreadPoolExecutor() as pool:
        failed = sum(pool.map(judge_all, ("compiled", "python"), (compiled, others)))
    print(f"{len(chosen) - failed} of {len(chosen)} killed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
