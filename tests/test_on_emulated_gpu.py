"""Tests for GPUs where there is none: on one that is emulated (tests/emulated), by a CUDA build of
torch, in processes of their own.

What that leaves open: torch's own kernels and libraries, a device's limits and orders of execution
within a kernel (tests/simt has those), everything about time.
"""

import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from simt.build import Unavailable

TESTS = Path(__file__).parent

# Of each file what runs there: kernels on the host are slow, so of many cases a few.
CHOSEN = {
    "test_emulation.py": "",
    "test_cuda_device.py": "not twenty_steps and not twenty_times and not bench and not agree"
    " or (adamw and norm)",
    "test_regression_loss.py": "cuda and 3x4",
    "test_triton.py": "test_a_step or descriptors or agreement",
    "test_backend.py": "",
}


def run(chosen: dict[str, str], **environment: str) -> None:
    missing = emulated.why_not()
    if missing:
        pytest.skip(missing)
    try:
        own = emulated.environment() | environment
    except Unavailable as reason:
        pytest.skip(str(reason))
    for file, tests in chosen.items():
        command = [sys.executable, "-m", "pytest", "-v", "-p", "emulated.plugin", TESTS / file]
        done = subprocess.run([*command, "-k", tests], capture_output=True, text=True, env=own)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert re.search(r" PASSED", done.stdout), f"none of {file} ran"


@pytest.mark.parametrize("file", CHOSEN)
def test_device_tests_pass(file):
    run({file: CHOSEN[file]})


@pytest.mark.parametrize("seed", ["1", "2"])
def test_they_pass_whenever_work_is_done(seed):
    chosen = {"test_cuda_device.py": "streams or turn or (captured and cuda)"}
    run(chosen, EMULATED_ORDER="random", EMULATED_SEED=seed)
