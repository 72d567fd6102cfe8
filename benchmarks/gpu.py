"""The protocol of `make gpu`: what a machine with a CUDA GPU can show, in one command.

    python -m benchmarks.gpu [--quick] [--seconds N] [--output FOLDER]

A few steps against plain PyTorch, the device's own constants, the step times of the CUDA backend
beside every baseline, then device tests and compute-sanitizer over small steps, each in a process
of its own. What these sources have done on this kind of GPU is not done again: a second run goes on
where the first one stopped. Writes after every part, to FOLDER or
benchmarks/results/<gpu>/<date>[-quick]/: gpu.json, gpu.md, constants.json, weight_update.json and
log.txt, at the end speedup.png and roofline.png. What it goes on from is there in work/.
"""

import contextlib
import ctypes
import datetime
import hashlib
import importlib.util
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import fastdni as dni
from fastdni.bench import cores, forms, hardware, header
from fastdni.bench.cases import Case
from fastdni.bench.command import Parser, positive
from fastdni.bench.network import Result, forms_for, measure, report
from fastdni.bench.products import product_calls, time_calls
from fastdni.reference import OptimizerSettings

HERE = Path(__file__).parent
ROOT = HERE.parent
DEVICE_TESTS = ("test_cuda_device.py", "test_regression_loss.py", "test_backend.py")

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
# Seconds of the whole, and of a case: most of them are compilers'.
BUDGET = {False: 25 * 60, True: 8 * 60}
CASE_SECONDS = {False: 240, True: 90}


class Step(NamedTuple):
    """One part of the protocol: a command, run until it has succeeded once.

    Attributes:
        name: of its files: its log, what it finds, the mark that it is done.
        command: to run.
        seconds: after which it is stopped.
    """

    name: str
    command: Sequence[str]
    seconds: float


def sources(architecture: str) -> str:
    """What is measured, in a word: of another one nothing is done yet."""
    text = hashlib.sha256(architecture.encode() + (ROOT / "CMakeLists.txt").read_bytes())
    for folder in ("csrc", "fastdni", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
                text.update(path.read_bytes())
    return text.hexdigest()


def run(command: Sequence[str], seconds: float, log: Path) -> str:
    """Runs a command, and stops it with all that it has started; returns how it failed, or ""."""
    # PR_SET_PDEATHSIG: it ends with this process, however that does.
    end_too = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                process_group=0, preexec_fn=end_too,
            )  # fmt: skip
        except OSError as error:
            out.write(f"{error}\n")
            return "not started"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit code {code}" if code else ""


def shortened(log: Path) -> str:
    """What a log begins and ends with."""
    text = log.read_text(errors="replace")
    return text if len(text) <= 8000 else f"{text[:2000]}\n[...]\n{text[-6000:]}"


def run_steps(
    steps: Sequence[Step],
    work: Path,
    left: Callable[[], float],
    say: Callable[[str], None],
    of: str = "",
    after: Callable[[], None] = lambda: None,
) -> list[str]:
    """Runs what is not marked as done `of` these sources, and `after` each step what is to be done
    then; returns the names of those that failed or had no time."""
    missing = []
    for step in steps:
        mark, log = work / f"{step.name}.done", work / f"{step.name}.log"
        done = f"{of} {' '.join(map(str, step.command))}"
        if mark.exists() and mark.read_text() == done:
            say(f"{step.name}: done before")
            continue
        for stale in work.glob(f"{step.name}.*"):
            stale.unlink()
        limit = min(step.seconds, left())
        if limit < 10:
            say(f"{step.name}: no time left; run it again to go on")
            missing.append(step.name)
            continue
        begin = time.monotonic()
        failure = run(step.command, limit, log)
        if failure:
            last = shortened(log).strip().rpartition("\n")[2]
            say(f"{step.name}: FAILED, {failure}: {last}")
            missing.append(step.name)
        else:
            mark.write_text(done)
            say(f"{step.name}: done in {time.monotonic() - begin:.0f} s")
        after()
    return missing


def small_steps(backend: str) -> None:
    """A few steps of small networks of every kind, for compute-sanitizer, too."""
    from fastdni.agreement import disagreement

    # Every arithmetic of products, BatchNorm, a wide layer, the ops of a synthesizer.
    differs = disagreement(torch.device("cuda"), backend)
    if differs:
        sys.exit(differs)
    print("the kernels agree with plain PyTorch")

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
        with dni.use_backend(backend), case.autocast():
            for _ in range(2):
                loss = net.step(x, y, optimizer).loss.item()
        print(backend, case, loss)


def cuda_tool(name: str) -> str:
    """The path of one of the toolkit's programs."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or str(Path(home) / "bin" / name)


def constants(work: Path) -> None:
    """Builds and runs device_constants.cu, and times large products of torch."""
    nvcc = cuda_tool("nvcc")
    program = work / "device_constants"
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
    (work / "constants.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def weight_update(work: Path) -> None:
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
    (work / "weight_update.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(times, indent=1))


def one_case(name: str, work: Path, quick: bool) -> None:
    """Measures a case and keeps the result."""
    case = CASES[name]._replace(device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
    backends = [name for name in ("cuda", "triton") if dni.backends()[name] == "available"]
    names = forms_for("cuda", backends, compile=not quick)
    # Ratios are to a graph: the strongest baselines are graphs, too.
    names.sort(key=lambda form: form not in forms.OWN_GRAPHED)
    seconds = 3.0 if quick else 8.0
    labels = {"size": name, "case": str(case)}
    result = measure(case, names, with_limit=True, labels=labels, seconds=seconds)
    print(report(result))
    (work / f"{name}.pickle").write_bytes(pickle.dumps(result))
    wrong = [form for form in result.left_out if form.startswith("fastdni")]
    if wrong:
        sys.exit(f"not measured: {', '.join(wrong)}")


def made_on(work: Path) -> dict:
    """The machine, which may be another one than that where pictures are drawn."""
    return json.loads((work / "hardware.json").read_text())


def results_in(work: Path) -> list[Result]:
    """Of the cases that have been measured."""
    made = [work / f"{name}.pickle" for name in CASES]
    return [pickle.loads(path.read_bytes()) for path in made if path.exists()]


def write(work: Path, folder: Path) -> None:
    """What there is so far, but for pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    results, info = results_in(work), made_on(work)
    stored = {"hardware": info, "results": [result.stored() for result in results]}
    (folder / "gpu.json").write_text(json.dumps(stored, indent=1) + "\n")
    parts = [f"{r.case['size']}: {r.case['case']}\n\n{report(r, markdown=True)}" for r in results]
    (folder / "gpu.md").write_text("\n\n".join([header(info), *parts]) + "\n")
    text = [f"== {log.stem}\n{shortened(log)}" for log in sorted(work.glob("*.log"))]
    (folder / "log.txt").write_text("\n".join(text))
    for name in ("constants.json", "weight_update.json") if folder != work else ():
        (folder / name).unlink(missing_ok=True)
        if (work / name).exists():
            shutil.copy(work / name, folder)


def draw(work: Path, folder: Path) -> None:
    """The pictures of the cases that have been measured."""
    results, info = results_in(work), made_on(work)
    if not results:
        return
    try:
        from fastdni.bench.plots import bars, roofline
    except ImportError as reason:
        print(f"no pictures: {reason}; --draw {work} --output {folder} makes them later")
        return
    bars(results, info, folder / "speedup.png")
    roofline(results, info, folder / "roofline.png")


def architecture() -> str:
    """Of the GPU found, as nvcc names it: "90a"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if major == 9 else "")


def steps_of(quick: bool, work: Path, triton: bool) -> list[Step]:
    """The protocol: what is soon to be known first, then what is measured, then proofs."""
    part = [sys.executable, "-m", "benchmarks.gpu", "--output", str(work), *["--quick"] * quick]
    part.append("--part")
    tests = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=10"]
    tests += ["-o", "faulthandler_timeout=100"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(min(8, cores())), "--dist", "worksteal"]
    # Without torch's cache every tensor is an allocation of its own, whose ends are known.
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", cuda_tool("compute-sanitizer")]
    sanitizer += ["--error-exitcode", "1", "--tool"]
    # Calls that fail are torch's and Triton's questions to the driver.
    memcheck = [*sanitizer, "memcheck", "--report-api-errors", "no"]
    own = ["--kernel-regex", "kns=fastdni"]  # of the CUDA backend, not torch's
    of_cuda = [str(ROOT / "tests" / file) for file in DEVICE_TESTS]
    of_triton = str(ROOT / "tests" / "test_triton.py")  # which compiles some 260 kernels
    return [
        Step("agreement", [*part, "cuda"], 180),
        *[Step("triton_agreement", [*part, "triton"], 180)] * triton,
        Step("constants", [*part, "constants"], 120),
        *[Step("weight_update", [*part, "weight_update"], 60)] * triton,
        *(Step(name, [*part, name], CASE_SECONDS[quick]) for name in (QUICK if quick else CASES)),
        Step("tests", [*tests, *of_cuda], 300),
        *[Step("triton_tests", [*tests, of_triton], 600)] * triton,
        Step("memcheck", [*memcheck, *own, *part, "cuda"], 300),
        Step("racecheck", [*sanitizer, "racecheck", *own, *part, "cuda"], 300),
        *[Step("triton_memcheck", [*memcheck, *part, "triton"], 300)] * triton,
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, nothing compiled")
    parser.add_argument("--seconds", type=positive, help="of the whole: 1500, with --quick 480")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--draw", type=Path, metavar="WORK", help="only the tables and pictures")
    parser.add_argument("--part", help="one part, by the protocol itself")
    options = parser.parse_args(arguments)
    if options.draw is not None:
        folder = options.output or options.draw.parent
        write(options.draw, folder)
        draw(options.draw, folder)
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU: there is nothing to measure")
    if options.part is not None:
        parts = {
            "cuda": lambda work: small_steps("cuda"),
            "triton": lambda work: small_steps("triton"),
            "constants": constants,
            "weight_update": weight_update,
        }
        measured = partial(one_case, options.part, quick=options.quick)
        parts.get(options.part, measured)(options.output)
        return 0

    begin = time.monotonic()
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    own = HERE / "results" / gpu / (today + "-quick" * options.quick)
    folder, work = (options.output or own).resolve(), own / "work"
    budget = options.seconds or BUDGET[options.quick]
    work.mkdir(parents=True, exist_ok=True)
    (work / "hardware.json").write_text(json.dumps(hardware()))
    missing = run_steps(
        steps_of(options.quick, work, dni.backends()["triton"] == "available"),
        work,
        lambda: budget - (time.monotonic() - begin),
        lambda text: print(text, flush=True),
        sources(architecture()),
        lambda: write(work, folder),
    )
    write(work, folder)
    draw(work, folder)
    print(f"wrote {folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what runs, as Ctrl-C does
    sys.exit(main())
