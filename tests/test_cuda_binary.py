"""What nvcc makes of the CUDA kernels: no GPU is needed to see spills or missing vector loads."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import ptxas
import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100"]
BYTES = {"float": 4, "double": 8, "bfloat16": 2}
# A block of 512 threads at 64 registers takes half a multiprocessor's, as does one of 256 at 128.
MAX_REGISTERS = {"regression_loss": 64, "sweep": 128}
MAX_REGISTERS_DOUBLE = {"regression_loss": 64, "sweep": 255}  # the sweep's are for proofs


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(source) -> (object file, usage by kernel); each source is compiled once."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def compile_source(source):
        made = folder / f"{source}.o"
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        command = [nvcc, "-std=c++20", f"-I{CSRC}", *codes, "-Xptxas=-v,-warn-spills", "-c"]
        done = subprocess.run(
            [*command, CSRC / "cuda" / f"{source}.cu", "-o", made], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return made, ptxas.parse(done.stdout + done.stderr)

    return compile_source


MULTIPLYING = ("sweep_rows_kernel", "sweep_update_kernel")
TENSOR_CORES = {
    ("float", "tf32"): "HMMA.1688.F32.TF32",
    ("float", "tf32x3"): "HMMA.1688.F32.TF32",
    ("float", "bfloat16"): "HMMA.16816.F32.BF16",
}


def expected_variants(source, name):
    """The types, and the arithmetics, that a kernel is made for."""
    if source == "regression_loss":
        return {(dtype, "") for dtype in BYTES}
    if name in MULTIPLYING:
        return {*TENSOR_CORES, ("float", "exact"), ("double", "exact"), ("double", "bfloat16")}
    return {("float", ""), ("double", "")}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel_is_there_for_every_dtype_and_architecture(compiled, source):
    kernels = set(compiled(source)[1])
    names = {kernel.name for kernel in kernels}
    assert names
    assert kernels == {
        ptxas.Kernel(name, *variant, f"sm_{architecture}")
        for name in names
        for variant in expected_variants(source, name)
        for architecture in ARCHITECTURES
    }


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_stay_in_registers(compiled, source):
    for kernel, usage in compiled(source)[1].items():
        assert usage.stack == usage.spill_stores == usage.spill_loads == 0, kernel
        most = MAX_REGISTERS_DOUBLE if kernel.dtype == "double" else MAX_REGISTERS
        assert usage.registers <= most[source], kernel


def disassemble(made, architecture):
    """The instructions of each kernel, as text, by (name, dtype, products)."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    path = f"{bundled}{os.pathsep}{os.environ['PATH']}"
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("no cuobjdump and nvdisasm, neither in PATH nor in triton")
    done = subprocess.run(
        [cuobjdump, "-sass", "-arch", architecture, made],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    _, *functions = done.stdout.split("Function : ")
    return {ptxas.kernel_name(text.split()[0]): text for text in functions}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_regression_loss_moves_16_bytes_at_a_time(compiled, architecture):
    kernels = disassemble(compiled("regression_loss")[0], f"sm_{architecture}")
    for dtype, size in BYTES.items():
        text = kernels["regression_loss_kernel", dtype, ""]
        # Eight elements a thread from each of two inputs; the error has at least float's size.
        assert len(re.findall(r"\bLDG\.E[.\w]*\.128\b", text)) >= 2 * 8 * size // 16, dtype
        assert len(re.findall(r"\bSTG\.E[.\w]*\.128\b", text)) >= 8 * max(size, 4) // 16, dtype


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sweep_multiplies_on_the_units_it_is_meant_for(compiled, architecture):
    kernels = disassemble(compiled("sweep")[0], f"sm_{architecture}")
    seen = 0
    for (name, dtype, products), text in kernels.items():
        found = set(re.findall(r"\bHMMA[.\w]*", text))
        wanted = TENSOR_CORES.get((dtype, products))
        assert found == ({wanted} if wanted else set()), (name, dtype, products)
        if name in MULTIPLYING:
            seen += 1
            assert "LDG.E.128" in text, (name, dtype, products)
            assert wanted or re.search(r"\bFFMA|\bDFMA", text)
    assert seen == 12
