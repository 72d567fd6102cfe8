"""What nvcc made of the CUDA kernels: no GPU is needed to see spills or missing vector loads."""

import re

import cuobjdump
import pytest

from fastdni import _C

INFO = _C.build_info()
ARCHITECTURES = (INFO["cuda_architectures"] or "").split()
pytestmark = [
    pytest.mark.skipif(INFO["cuda"] is None, reason="built without CUDA kernels"),
    pytest.mark.skipif(
        cuobjdump.available() is None,
        reason="no cuobjdump and nvdisasm, neither in PATH nor in triton",
    ),
]

BYTES = {"float": 4, "double": 8, "bfloat16": 2}
TENSOR_CORES = {
    ("float", "tf32"): "HMMA.1688.F32.TF32",
    ("float", "tf32x3"): "HMMA.1688.F32.TF32",
    ("float", "bfloat16"): "HMMA.16816.F32.BF16",
}
MULTIPLYING = {
    "sweep_rows_kernel",
    "sweep_update_kernel",
    "synthesizer_layer_kernel",
    "synthesizer_gradient_kernel",
}
FLOATING = {
    "sweep_reduction_kernel",
    "sweep_count_kernel",
    "sweep_labels_kernel",
    "sweep_sums_kernel",
    "sweep_prepare_kernel",
    "synthesizer_prepare_kernel",
    "sweep_loss_kernel",
}
LOSS = {"regression_loss_kernel", "regression_loss_sum_kernel"}
EXPECTED = {
    ("sweep_write_kernel", "", ""),
    *((name, dtype, "") for name in LOSS for dtype in BYTES),
    *((name, dtype, "") for name in FLOATING for dtype in ("float", "double")),
    *((name, *kind) for name in MULTIPLYING for kind in TENSOR_CORES),
    *((name, dtype, "exact") for name in MULTIPLYING for dtype in ("float", "double")),
    *((name, "double", "bfloat16") for name in MULTIPLYING),
}
# Blocks of 512 threads at 64 registers take half a multiprocessor's, as do 256 at 128. The sweep
# in float64 is for proofs.
MAX_REGISTERS = {
    "sweep_write_kernel": 32,
    **dict.fromkeys(LOSS, 64),
    **dict.fromkeys(MULTIPLYING | FLOATING, 128),
}
# What a kernel may declare, and the 1 KB that sm_90 and later keep for themselves. Twice of it fits
# a multiprocessor from sm_80 on.
MAX_SHARED = (48 << 10) + (1 << 10)


@pytest.fixture(params=ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def architecture(request):
    return request.param


def test_every_kernel_is_there_for_every_dtype(architecture):
    assert set(cuobjdump.usage(_C.__file__, architecture)) == EXPECTED


def test_kernels_stay_in_registers_and_in_shared_memory(architecture):
    for kernel, usage in cuobjdump.usage(_C.__file__, architecture).items():
        assert usage.stack == usage.local == 0, kernel
        proof = kernel.dtype == "double" and kernel.name in MULTIPLYING
        assert usage.registers <= (255 if proof else MAX_REGISTERS[kernel.name]), kernel
        assert usage.shared <= MAX_SHARED, kernel


def test_regression_loss_moves_16_bytes_at_a_time(architecture):
    kernels = cuobjdump.instructions(_C.__file__, architecture)
    for dtype, size in BYTES.items():
        text = kernels["regression_loss_kernel", dtype, ""]
        # Eight elements a thread from each of two inputs; the error has at least float's size.
        assert len(re.findall(r"\bLDG\.E[.\w]*\.128\b", text)) >= 2 * 8 * size // 16, dtype
        assert len(re.findall(r"\bSTG\.E[.\w]*\.128\b", text)) >= 8 * max(size, 4) // 16, dtype


def test_products_are_made_on_the_units_they_are_meant_for(architecture):
    seen = 0
    for kernel, text in cuobjdump.instructions(_C.__file__, architecture).items():
        found = set(re.findall(r"\bHMMA[.\w]*", text))
        wanted = TENSOR_CORES.get((kernel.dtype, kernel.precision))
        assert found == ({wanted} if wanted else set()), kernel
        if kernel.name in MULTIPLYING:
            seen += 1
            assert "LDG.E.128" in text, kernel
            assert wanted or re.search(r"\bFFMA|\bDFMA", text), kernel
    assert seen == 6 * len(MULTIPLYING)
