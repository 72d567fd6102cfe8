"""The CUDA backend as a whole without a GPU: the tests of a network's step run once more in a
process of their own, in which CPU tensors are served by the CUDA kernels, launchers and their
binding, compiled for the host (tests/simt/extension.py).

What that leaves open: copies, streams, graphs and whatever else only a driver does.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from simt.build import Unavailable, _require
from simt.extension import PATH, build

TESTS = Path(__file__).parent

# Of each file what is to run; kernels on the host are slow, so of many cases a few.
CHOSEN = {
    "test_sweep.py": "plain_averages or bfloat16 or part_of or ignored or registered or repeated"
    " or refuse or lives",
    "test_network_edges.py": "learning_rate_in or state or clone",
    "test_network_repetition.py": "",
    "test_network_equality.py": "masks or unlocked or fused_and_local",
}


@pytest.mark.parametrize("file", CHOSEN)
def test_the_tests_of_a_step_pass_on_the_cuda_kernels(file):
    try:
        _require("plain")
    except Unavailable as reason:
        pytest.skip(str(reason))
    environment = os.environ | {PATH: str(build()), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simt.extension", TESTS / file]
    done = subprocess.run(
        [*command, *(["-k", CHOSEN[file]] if CHOSEN[file] else [])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 0
