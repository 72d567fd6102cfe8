"""The protocol of `make gpu`: what a machine with a CUDA GPU can show, in one command.

    python -m benchmarks.gpu [--quick] [--output FOLDER]

Device tests, compute-sanitizer over small steps, the device's own constants, then the step times
of the CUDA backend beside every baseline, each in a process of its own. What this build has done is
not done again: a second run goes on where the first one stopped. Writes to
benchmarks/results/<gpu>/<date>/: gpu.json, gpu.md, speedup.png, roofline.png, constants.json,
weight_update.json and log.txt.
"""

import datetime
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fastdni as dni
from fastdni.bench import hardware, header
from fastdni.bench.cases import Case
from fastdni.bench.command import Parser
from fastdni.bench.network import Result, forms_for, measure, report
from fastdni.bench.products import product_calls, time_calls
from fastdni.reference import OptimizerSettings

HERE = Path(__file__).parent
ROOT = HERE.parent
DEVICE_TESTS = {
    "tests": ("test_cuda_device.py", "test_regression_loss.py", "test_backend.py"),
    "triton_tests": ("test_triton.py",),  # which compile some two hundred kernels
}

# The sizes of every goal that the kernels here are for.
CASES = {
    "256-fp32": Case((256, 256, 256, 10), 256),
    "256-tf32": Case((256, 256, 256, 10), 256, precision="tf32"),
    "256-norm-tf32": Case((256, 256, 256, 10), 256, norm=True, precision="tf32"),
    "256-bf16": Case((256, 256, 256, 10), 256, precision="bf16"),
    "128x16-bf16": Case((*[128] * 16, 10), 256, precision="bf16"),
    "1024-tf32": Case((1024, 1024, 1024, 10), 256, precision="tf32"),
    "mlp1024-tf32": Case((256, 256, 256, 10), 256, hidden=(1024, 1024), precision="tf32"),
    "4096-bf16": Case((4096, 4096, 10), 4096, precision="bf16"),
}
QUICK = ("256-fp32", "256-tf32", "1024-tf32")
# Seconds of the whole; what a case needs at most beside its own timing.
BUDGET = {False: 25 * 60, True: 8 * 60}
CASE_SECONDS = {False: 150, True: 60}


class Step(NamedTuple):
    """One part of the protocol: a command, run until it has succeeded once.

    Attributes:
        name: of its mark and its log.
        command: to run.
        seconds: after which it is stopped.
    """

    name: str
    command: Sequence[str]
    seconds: float


def sources() -> str:
    """What is measured, in a word: of another one nothing is done yet."""
    text = hashlib.sha256()
    for folder in ("fastdni", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).glob("**/*")):
            if path.suffix in (".py", ".cu", ".so"):
                text.update(path.read_bytes())
    return text.hexdigest()


def run(command: Sequence[str], seconds: float, log: Path) -> str:
    """Runs a command, and stops it with all that it has started; returns how it failed, or ""."""
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            out.write(f"{error}\n")
            return "not started"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return f"exit code {code}" if code else ""


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    left: Callable[[], float],
    say: Callable[[str], None],
    of: str = "",
) -> list[str]:
    """Runs what is not marked as done `of` these sources; returns the names of those that failed or
    had no time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for step in steps:
        mark, log = folder / f"{step.name}.done", folder / f"{step.name}.log"
        done = f"{of} {' '.join(map(str, step.command))}"
        if mark.exists() and mark.read_text() == done:
            say(f"{step.name}: done before")
            continue
        limit = min(step.seconds, left())
        if limit < 10:
            say(f"{step.name}: no time left; run it again to go on")
            missing.append(step.name)
            continue
        begin = time.monotonic()
        failure = run(step.command, limit, log)
        if failure:
            last = log.read_text().strip().rpartition("\n")[2]
            say(f"{step.name}: FAILED, {failure}: {last}")
            missing.append(step.name)
        else:
            mark.write_text(done)
            say(f"{step.name}: done in {time.monotonic() - begin:.0f} s")
    return missing


def small_steps() -> None:
    """A few steps of small networks of every kind, for compute-sanitizer."""
    from fastdni.agreement import disagreement

    # Every arithmetic of products, BatchNorm, a wide layer, the ops of a synthesizer.
    print(disagreement(torch.device("cuda"), "cuda") or "the kernels agree with plain PyTorch")

    cases = [
        Case((33, 40, 70, 5), 20),
        Case((33, 40, 70, 5), 20, "sgd", "tanh", norm=True),
        Case((33, 40, 70, 5), 20, hidden=(50,), precision="tf32"),
        Case((33, 40, 70, 5), 20, precision="bf16"),
        Case((33, 40, 70, 5), 20, "momentum", "sigmoid", context=False),
        Case((64, 600, 5), 40),
    ]
    for case in (case._replace(device="cuda") for case in cases):
        net, (x, y) = case.build(), case.data()
        torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
        optimizer = case.make_optimizer(list(net.parameters()))
        for backend in ("cuda", "triton"):
            if dni.backends()[backend] != "available":
                continue
            with dni.use_backend(backend), case.autocast():
                for _ in range(2):
                    loss = net.step(x, y, optimizer).loss.item()
            print(backend, case, loss)


def cuda_tool(name: str) -> str:
    """The path of one of the toolkit's programs."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or str(Path(home) / "bin" / name)


def constants(folder: Path) -> None:
    """Builds and runs device_constants.cu, and times large products of torch."""
    nvcc = cuda_tool("nvcc")
    program = folder / "work" / "device_constants"
    flags = ["-O2", "-std=c++17", f"-arch=sm_{architecture()}"]
    subprocess.run([nvcc, *flags, HERE / "device_constants.cu", "-o", program], check=True)
    found = json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
    size = 4096
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        calls = product_calls(size, "forward", size, size, dtype, "cuda")
        best = min(time_calls(calls, size**3, 0.2, "cuda").values())
        found[f"product_{name}_flop_per_second"] = 2 * size**3 / best
    stored = {"hardware": hardware(), "constants": found}
    (folder / "constants.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def weight_update(folder: Path) -> None:
    """Times a weight's gradient with its Adam in one kernel of Triton against torch's product and
    its fused Adam: N, K and B 4096, bfloat16 products."""
    from fastdni.triton.tile import Arithmetic
    from fastdni.triton.update import Target, apply

    size, row = 4096, OptimizerSettings("adam", 1e-3, 0.0, 0.9, 0.999, 1e-8)
    grad, x, weight, first, second = torch.randn(5, size, size, device="cuda").unbind()
    second = second.square()
    step = torch.ones((), device="cuda")
    # On both sides the operands have been rounded before.
    rounded = Arithmetic("bfloat16")
    narrow = rounded.rounded(grad), rounded.rounded(x)
    target = Target(weight, [first, second], row, step_at=step)
    how = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8)
    how |= dict(amsgrad=False, maximize=False)

    def by_torch():
        found = (narrow[0].T @ narrow[1]).float()
        torch._fused_adam_([weight], [found], [first], [second], [], [step], **how)

    calls = {
        "triton": lambda: apply(grad, x, target, None, [], rounded),
        "torch": by_torch,
    }
    times = time_calls(calls, size**3, 2.0, "cuda")
    stored = {"hardware": hardware(), "seconds": times}
    (folder / "weight_update.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(times, indent=1))


def one_case(name: str, folder: Path, quick: bool) -> None:
    """Measures a case and keeps the result."""
    case = CASES[name]._replace(device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
    backends = [name for name in ("cuda", "triton") if dni.backends()[name] == "available"]
    names = forms_for("cuda", backends, compile=not quick)
    seconds = 3.0 if quick else 8.0
    labels = {"size": name, "case": str(case)}
    result = measure(case, names, with_limit=True, labels=labels, seconds=seconds)
    print(report(result))
    (folder / "work" / f"{name}.pickle").write_bytes(pickle.dumps(result))


def write(folder: Path) -> None:
    """Table and pictures of the cases that have been measured."""
    made = [folder / "work" / f"{name}.pickle" for name in CASES]
    results: list[Result] = [pickle.loads(p.read_bytes()) for p in made if p.exists()]
    info = hardware()
    stored = {"hardware": info, "results": [result.stored() for result in results]}
    (folder / "gpu.json").write_text(json.dumps(stored, indent=1) + "\n")
    parts = [f"{r.case['size']}: {r.case['case']}\n\n{report(r, markdown=True)}" for r in results]
    (folder / "gpu.md").write_text("\n\n".join([header(info), *parts]) + "\n")
    logs = sorted((folder / "work").glob("*.log"))
    text = [f"== {log.stem}\n{log.read_text()[-4000:]}" for log in logs]
    (folder / "log.txt").write_text("\n".join(text))
    if not results:
        return
    try:
        from fastdni.bench.plots import bars, roofline
    except ImportError as reason:
        print(f"no pictures: {reason}; python -m benchmarks.gpu --draw {folder} makes them later")
        return
    bars(results, info, folder / "speedup.png")
    roofline(results, info, folder / "roofline.png")


def architecture() -> str:
    """Of the GPU found, as nvcc names it: "90a"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, nothing compiled")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="only the tables and pictures")
    parser.add_argument("--part", help="one part, by the protocol itself")
    options = parser.parse_args(arguments)
    if options.draw is not None:
        write(options.draw)
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU: there is nothing to measure")
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    folder = (options.output or HERE / "results" / gpu / today).resolve()
    if options.part is not None:
        parts = {
            "small": small_steps,
            "constants": lambda: constants(folder),
            "weight_update": lambda: weight_update(folder),
        }
        parts.get(options.part, lambda: one_case(options.part, folder, options.quick))()
        return 0

    begin = time.monotonic()
    budget = BUDGET[options.quick]
    part = [sys.executable, "-m", "benchmarks.gpu", "--output", str(folder)]
    part += ["--quick"] * options.quick + ["--part"]
    steps = []
    for name, files in DEVICE_TESTS.items():
        tests = [str(ROOT / "tests" / file) for file in files]
        steps.append(Step(name, [sys.executable, "-m", "pytest", "-q", *tests], 300))
    for tool in ("memcheck", "racecheck"):
        # Without torch's cache every tensor is an allocation of its own, whose ends are known.
        apart = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", cuda_tool("compute-sanitizer")]
        sanitizer = [*apart, "--tool", tool, "--error-exitcode", "1"]
        steps.append(Step(tool, [*sanitizer, *part, "small"], 120))
    steps.append(Step("constants", [*part, "constants"], 120))
    if dni.backends()["triton"] == "available":
        steps.append(Step("weight_update", [*part, "weight_update"], 60))
    chosen = QUICK if options.quick else tuple(CASES)
    steps += [Step(name, [*part, name], CASE_SECONDS[options.quick]) for name in chosen]
    missing = run_steps(
        steps,
        folder / "work",
        lambda: budget - (time.monotonic() - begin),
        lambda text: print(text, flush=True),
        sources(),
    )
    write(folder)
    print(f"wrote {folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
