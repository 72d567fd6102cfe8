"""The CUDA backend as a whole without a GPU: tests of the CPU backend run once more in a process of
their own, in which CPU tensors are served by the CUDA kernels, their launchers and bindings,
compiled for the host (tests/simt/extension.py).

What that leaves open: copies, streams, graphs and whatever else only a driver does.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import takes_all
from simt.build import Unavailable, require
from simt.extension import PATH, build

TESTS = Path(__file__).parent

# Of each file what runs there: kernels on the host are slow, so of many cases a few, the longest
# under --all. The kernels of bfloat16 tensors are the CPU's alone.
SWEEPS, BOUNDARIES, STEPS, STAGES = (
    (" or long_batch", "many_rows", "steps_are", " or hundred_stages")
    if takes_all()
    else ("", "many_rows and add", "steps_are and (momentum or adamw)", "")
)
CHOSEN = {
    "test_sweep.py": "plain_averages or bfloat16 or part_of or ignored" + SWEEPS,
    "test_sweep_rules.py": "registered or repeated or refuse or says_how or in_a_graph",
    "test_network_repetition.py": f"({STEPS}) or mask",
    "test_network_edges.py": "learning_rate_in or same_step or infinite" + STAGES,
    "test_synthesizer.py": "(zero or opcheck) and not bfloat16",
    "test_boundary.py": "(optim or known or written or empty or group or learning_rate or shape"
    f" or versions or ({BOUNDARIES})) and not bfloat16",
    "test_agreement.py": "kernels_agree",
}
# Where torch's library makes every product of a step.
BY_LIBRARY = {
    "test_network_repetition.py": "steps_are",
    "test_synthesizer.py": "zero and not bfloat16",
    "test_boundary.py": "optim or added or written",
}
# As a graph would take the launches: with Adam's step counts on the CPU it must not.
CAPTURED = {"test_network_repetition.py": "steps_are and not adam"}


BUILDS = [build]


def run(chosen: dict[str, str], **environment: str) -> None:
    try:
        require("plain")
    except Unavailable as reason:
        pytest.skip(str(reason))
    names = " or ".join(f"({file} and ({tests}))" for file, tests in chosen.items())
    files = [TESTS / file for file in chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "simt.extension", *files, "-k", names],
        capture_output=True,
        text=True,
        env=os.environ | {PATH: str(build()), "PYTHONPATH": str(TESTS)} | environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for file in chosen:
        assert re.search(rf"{re.escape(file)}::.* PASSED", done.stdout), f"none of {file} ran"


def test_the_cpus_tests_pass_on_the_cuda_backend():
    run(CHOSEN)


def test_they_pass_where_torch_makes_the_products():
    run(BY_LIBRARY, FASTDNI_LIBRARY_FROM="1")


def test_they_pass_where_the_launches_are_captured():
    run(CAPTURED, SIMT_CAPTURED="1")
