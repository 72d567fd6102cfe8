"""Compiles Triton's kernels ahead of time, as a step launches them, and says what came of it.

    python tests/triton_compiled.py TARGET CASE ...

TARGET is an architecture such as sm_90 or gfx942, CASE a name of CASES or "all". Prints a JSON
list, an entry for each kernel as a step of a case launches it (sizes, alignment and types
included). No GPU is needed: the step runs on tensors without memory, its launches are written down,
and Triton's own launcher takes them up to where it would ask the driver. Not in a process that
interprets kernels.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastdni.reference import (
    KEPT,
    RULES,
    OptimizerSettings,
    SweepNorm,
    SweepStage,
    SynthesizerParameters,
)
from fastdni.triton import (
    boundary,
    layer,
    loss,
    norm,
    regression_loss,
    sweep,
    synthesizer,
    tile,
    update,
)
from fastdni.triton.tile import Precision, Tile

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
META = torch.device("meta")

launches: list[tuple] = []


class Written:
    """In the place of a kernel: its launches are written down."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: launches.append((self._kernel, arguments, options))


for module in (layer, loss, norm, regression_loss, update):
    module.launched = Written


def tensor(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def made_synthesizer(n: int, hidden: int, context: int) -> SynthesizerParameters:
    widths = [n, *[hidden] * (hidden > 0), n]
    weights = [tensor(b, a) for a, b in zip(widths, widths[1:], strict=False)]
    biases = [tensor(b) for b in widths[1:]]
    of_context = (tensor(widths[1], context), tensor(widths[1])) if context else ()
    return SynthesizerParameters(weights, biases, *of_context)


def step(
    batch, width, precision, rule="adam", normed=False, hidden=0, activation="relu", classes=0,
    context=0, on_the_device=False,
) -> None:  # fmt: skip
    """Writes down the launches of a step of stages of that width; with a head and labels for it, or
    without, and then perhaps with a context of some width."""
    stages = []
    for number in range(3):
        top = number == 2
        n = classes if top and classes else width
        statistics = tensor(n), tensor(n), tensor(dtype=torch.int64)
        of_norm = SweepNorm(tensor(n), tensor(n), statistics, 0.1, 1e-5)
        stages.append(
            SweepStage(
                tensor(n, width), tensor(n), of_norm if normed and not top else None,
                "identity" if top and classes else activation,
                None if top else made_synthesizer(n, hidden, classes or context),
            )
        )  # fmt: skip
    structure = sweep.Structure(stages, "cross_entropy" if classes else "mse", precision)
    parameters = [p for stage in stages for p in stage.parameters()]
    target = tensor(batch, dtype=torch.int64) if classes else tensor(batch, width)
    given = tensor(batch, context) if context else None
    done = structure.forward(stages, tensor(batch, width), target, given, [1] * 4, None, False)
    kept = KEPT[rule]
    # Numbers as `net.step` hands them over: all of them are floats.
    settings = OptimizerSettings(rule, 1e-3, 0.01, 0.9, 0.99, 1e-8, float(rule == "sgd_momentum"))
    targets = {
        id(p): update.Target(
            p, [torch.empty_like(p) for _ in range(kept)], settings,
            step_at=tensor() if on_the_device else None,
            lr_at=tensor(dtype=torch.float64) if on_the_device else None,
        )
        for p in parameters
    }  # fmt: skip
    for grad, x, weight, sums, biases in done.gradients:
        of_biases = [targets[id(bias)] for bias in biases]
        update.apply(grad, x, targets.get(id(weight)), sums, of_biases, done.precision)


def ops(dtype: torch.dtype, precision: str) -> None:
    """Writes down the launches of the drop-in modules' ops."""
    x, target = tensor(1024, 256, dtype=dtype), tensor(1024, 256, dtype=dtype)
    weights = [tensor(512, 256, dtype=dtype), tensor(256, 512, dtype=dtype)]
    biases = [tensor(512, dtype=dtype), tensor(256, dtype=dtype)]
    forward = synthesizer.synthesizer_fwd._init_fn
    prediction, *hidden = forward(x, None, weights, biases, None, None, precision)
    backward = synthesizer.synthesizer_bwd._init_fn
    backward(target, prediction, hidden, x, None, weights, True, "batchmean", precision, None)
    regression_loss.regression_loss._init_fn(prediction, target, "batchmean")
    parameters = [*weights, *biases]
    kept = [t for p in parameters for t in (torch.empty_like(p), torch.empty_like(p), tensor())]
    settings = [float(RULES.index("adam")), 1e-3, 0.01, 0.9, 0.99, 1e-8, 0.0]
    boundary.boundary_._init_fn(
        x, None, target, parameters, 2, True, kept, [0] * 4, settings, 0.5, None, [], precision
    )


CASES = {
    "large bfloat16": lambda: step(4096, 4096, "bfloat16", classes=10),
    "less large bfloat16": lambda: step(2048, 1536, "bfloat16"),
    "large tf32": lambda: step(4096, 4096, "tf32", context=40),
    "large tf32x3": lambda: step(1024, 1024, "tf32x3"),
    "by no 16": lambda: step(4096, 4104, "bfloat16"),
    "large context": lambda: step(4096, 4096, "bfloat16", context=40),
    "wide head": lambda: step(4096, 4096, "bfloat16", classes=1000),
    "medium exact": lambda: step(256, 1024, "exact", "adamw", hidden=1024),
    "medium tf32x3": lambda: step(256, 1024, "tf32x3", "sgd"),
    "norm": lambda: step(256, 256, "tf32", "sgd_momentum", normed=True, activation="tanh"),
    "numbers on the device": lambda: step(256, 256, "tf32", hidden=64, on_the_device=True),
    "norm, exact": lambda: step(256, 256, "exact", normed=True),
    "odd": lambda: step(33, 70, "exact", "gradient", activation="sigmoid", classes=7),
    "odd bfloat16": lambda: step(33, 70, "bfloat16", normed=True, classes=7),
    "ops bfloat16": lambda: ops(torch.bfloat16, "bfloat16"),
    "ops float16": lambda: ops(torch.float16, "float16"),
}


def too_large() -> None:
    """A layer whose tile does not fit its threads' registers; of no use but to be seen."""
    exact = Precision("exact")
    exact.tile = lambda *of: Tile(64, 64, 16, 1, 2)
    layer.layer(tensor(256, 256), tensor(256, 256), exact)


class NoGPU:
    """In a driver's place: what kernels are to be compiled for."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kind_of(constants: dict) -> str:
    """A table's name in `tile.DESCRIBED`."""
    if "OUTPUTS" in constants:
        return "update"
    return "synthesize" if constants["FINISH"] == "synthesize" else "layer"


def looked_at(made, kernel, arguments, target: GPUTarget) -> dict:
    """What came of the kernel that a launch takes."""
    given = dict(zip([parameter.name for parameter in kernel.params], arguments, strict=True))
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    found = {
        "kernel": kernel.__name__,
        "constants": {k: v for k, v in constants.items() if isinstance(v, str)},
        "multiplies": given.get("weight") is not None,
        "shared": made.metadata.shared,
        # As `tile.Tile` begins, and of which table where operands come by descriptors.
        "tile": [
            constants.get("OUTPUTS", constants.get("ROWS")),
            constants.get("INPUTS", constants.get("COLUMNS")),
            constants.get("ROWS" if "OUTPUTS" in constants else "DEPTH"),
            constants.get("PARTS"),
            kind_of(constants) if constants.get("DESCRIBED") else None,
        ],
    }
    if target.backend == "hip":
        names = "vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size|vgpr_count"
        pairs = re.findall(rf"\.({names}):\s+(\d+)", made.asm["amdgcn"])
        found |= {name: int(number) for name, number in pairs}
        found["instructions"] = sorted(set(re.findall(r"v_mfma\w+", made.asm["amdgcn"])))
        found["atomics"] = len(re.findall(r"_atomic_", made.asm["amdgcn"]))
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found |= {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    # A stack may be a called function's; a look at what spills takes as long as the compilation.
    found["spilled"] = found["stack"] and spilled(made.asm["ptx"])
    found["atomics"] = len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", made.asm["ptx"], re.M))
    pattern = r"wgmma\.mma_async|mma\.sync\.aligned\.\w+|tcgen05\.mma|cp\.async\.bulk\.tensor"
    found["instructions"] = sorted(set(re.findall(pattern, made.asm["ptx"])))
    return found


def spilled(ptx: str) -> int:
    """Bytes that a thread stores because its registers do not suffice."""
    target = re.search(r"\.target (\w+)", ptx).group(1)
    newer = target >= "sm_100" and len(target) >= 6 and (TOOLS / "ptxas-blackwell").exists()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        tool = TOOLS / ("ptxas-blackwell" if newer else "ptxas")
        command = [tool, "-v", f"--gpu-name={target}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


def main(architecture: str, cases: list[str]) -> None:
    if architecture.startswith("gfx"):
        torch.version.hip = "of another torch"
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        tile.has_descriptors = lambda device: target.arch // 10 in (9, 10)
        tile.multiprocessors = lambda device: 132
    driver.set_active(NoGPU(target))
    found: dict[str, dict] = {}
    if "all" in cases:
        cases = [*CASES, *(case for case in cases if case not in CASES and case != "all")]
    for case in cases:
        launches.clear()
        {**CASES, "too large": too_large}[case]()
        for kernel, arguments, options in launches:
            made = kernel.warmup(*arguments, grid=(1,), **options)
            if made.hash not in found:
                found[made.hash] = {"case": case} | looked_at(made, kernel, arguments, target)
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1], sys.argv[2:])
