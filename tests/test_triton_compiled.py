"""What Triton's compilers make of the kernels, ahead of time: no GPU is needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import sample, takes_all

pytest.importorskip("triton", reason="Triton is not installed")
from fastdni.triton.tile import DESCRIBED, TILES  # noqa: E402

SCRIPT = Path(__file__).parent / "triton_compiled.py"
# Shared memory of a block, in KB, and the instruction that products on tensor cores become.
TARGETS = {
    "sm_80": (163, r"mma\.sync"),
    "sm_90": (227, r"wgmma\.mma_async"),
    "sm_100": (227, r"tcgen05\.mma"),
    "sm_120": (99, r"mma\.sync"),
    "gfx942": (64, r"v_mfma"),
}
# Of the script's cases those that have every kernel. Under --all each target has all there are, and
# with them every size of tile.
KERNELS = ("large bfloat16", "norm, exact", "ops bfloat16")
# One for each instruction; under --all every one.
SOME = sample(TARGETS, len(TARGETS), kinds=lambda target: [TARGETS[target][1]])

LONG = True


def compiled(target: str, *cases: str) -> list[dict]:
    """Every kernel as the cases launch it. In a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, target, *cases], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def name(kernel: dict) -> str:
    return f"{kernel['case']}: {kernel['kernel']} {kernel['constants']}"


# One test a target, so that a run in several processes compiles for each target once.
@pytest.mark.parametrize("target", SOME)
def test_kernels_fit_and_use_tensor_cores(target):
    most, instruction = TARGETS[target]
    found = compiled(target, *(["all"] if takes_all() else KERNELS))
    assert {k["kernel"] for k in found} == {
        "layer_kernel", "update_kernel", "norm_kernel", "norm_gradient_kernel",
        "cross_entropy_kernel", "mse_kernel", "sum_kernel", "regression_loss_kernel",
    }  # fmt: skip
    descriptors = target in ("sm_90", "sm_100")
    tables = [(None, tiles) for tiles in TILES.values()]
    tables += DESCRIBED.items() if descriptors else ()
    met = {tuple(kernel["tile"]) for kernel in found}
    missing = {(*t[:3], t.parts, kind) for kind, tiles in tables for t in tiles} - met
    assert not (missing and takes_all())
    finishes = {k["constants"].get("FINISH") for k in found}
    assert finishes >= {"activate", "synthesize", "differentiate", "regress"}
    for kernel in found:
        spilled = ("spilled", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        assert not any(kernel.get(key, 0) for key in spilled), name(kernel)
        assert kernel["shared"] <= most << 10, name(kernel)
        assert not kernel["atomics"], name(kernel)
    # Products of large tiles; those of a few columns may take another instruction.
    large = [k for k in found if k["case"].startswith("large") and (k["tile"][0] or 0) >= 64]
    products = [k for k in large if k["multiplies"]]
    assert len(products) >= 4
    for kernel in products:
        assert any(re.match(instruction, each) for each in kernel["instructions"]), name(kernel)
    described = [k for k in products if "cp.async.bulk.tensor" in k["instructions"]]
    assert (len(described) >= 4) == descriptors
    exact = [k for k in found if "exact" in k["constants"].values()]
    assert exact and (target == "gfx942" or not any(k["instructions"] for k in exact))


def test_a_step_is_traced_into_one_graph():
    """Through the op to its kernels, as torch.compile sees them."""
    done = subprocess.run(
        [sys.executable, SCRIPT.with_name("triton_traced.py")],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)["kernels"]
    # Two stages with BatchNorm, their synthesizers with a label context, a head: every weight is
    # updated with its biases, gamma and beta of the norms by themselves.
    assert kernels[:4] == ["layer_kernel", "norm_kernel", "layer_kernel", "norm_gradient_kernel"]
    counts = {name: kernels.count(name) for name in set(kernels)}
    assert counts == {
        "layer_kernel": 7, "norm_kernel": 2, "norm_gradient_kernel": 2, "cross_entropy_kernel": 1,
        "sum_kernel": 3, "update_kernel": 11,
    }  # fmt: skip


def test_what_spills_is_seen():
    """By the same look: a tile that is too large for its threads."""
    (kernel,) = compiled("sm_90", "too large")
    assert kernel["spilled"] > 0
