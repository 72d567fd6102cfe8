"""Step time of decoupled networks against plain PyTorch, backpropagation and bare products.

    python -m benchmarks.network [--quick] [--sizes NAME ...] [--threads 1] [--json out.json]

One training step, forward to update, of

* fastdni, fastdni bf16: `net.step`, the second one under autocast to bfloat16;
* eager, eager fused: every stage with a backward pass of its own, as one writes it in PyTorch, with
  the optimizer as torch makes it and with a fused one;
* compiled: the equations of `fastdni.reference.sweep` without autograd, all stages in one graph, by
  torch.compile through inductor's C++ wrapper and with no guards to evaluate; the update by the
  fused optimizer, or inside the graph at the small sizes, where that was found to be faster.
  (Compiled stages with autograd, the Python wrapper and guards were slower.)
* backprop, backprop compiled: the stages alone in the same two forms, both with fused updates;
* products: nothing but the matrix products of the decoupled step, each by MKL or oneDNN, whichever
  a short look beforehand finds faster. A one-hot context needs none.

Sizes are those of SIZES: synthesizers are linear and take one-hot labels as context, but in `talk`.
Before anything is timed, fastdni and the compiled forms take one step and must change parameters,
statistics and optimizer state as the eager form in float64 does. (bf16 is timed only.)
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import fastdni as dni
from benchmarks.products import onednn_linear, repeat
from fastdni import bench
from fastdni.reference import SweepStage
from fastdni.stages import parse


class Size(NamedTuple):
    """A network and how it is trained."""

    widths: tuple[int, ...]
    batch: int
    optimizer: str = "adam"
    activation: type[nn.Module] = nn.ReLU
    norm: bool = False
    context: bool = True
    update_in_graph: bool = False  # of the compiled forms


SIZES = {
    "talk": Size((24, 128, 64, 12), 10, "sgd", nn.Sigmoid, context=False, update_in_graph=True),
    "small": Size((64, 64, 64, 10), 32, update_in_graph=True),
    "paper3": Size((784, 256, 256, 10), 256),
    "paper3-bn": Size((784, 256, 256, 10), 256, norm=True),
    "paper6": Size((784, *[256] * 5, 10), 256),
    "paper6-bn": Size((784, *[256] * 5, 10), 256, norm=True),
    "wide": Size((784, 1024, 1024, 10), 256),
}
COLUMNS = (
    "fastdni",
    "eager",
    "eager fused",
    "compiled",
    "backprop",
    "backprop compiled",
    "fastdni bf16",
    "products",
)
COMPILED = ("compiled", "backprop compiled")
RATIOS = {
    "eager/fastdni": ("eager", "fastdni"),
    "eager fused/fastdni": ("eager fused", "fastdni"),
    "compiled/fastdni": ("compiled", "fastdni"),
    "eager/fastdni bf16": ("eager", "fastdni bf16"),
    "fastdni/backprop": ("fastdni", "backprop"),
    "fastdni/backprop compiled": ("fastdni", "backprop compiled"),
    "fastdni/products": ("fastdni", "products"),
}
# So low that thousands of steps on one batch leave the network where it began (a loss near zero
# would bring denormal numbers, which are slow), and yet one step shows in float32.
LEARNING_RATES = {"adam": 1e-5, "sgd": 1e-2}
# Norm of the difference to eager float64 after a step, relative to that of the change itself. In
# float32 a ReLU may open in one and stay shut in the other; a wrong equation is off by 0.1 or more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}
COMPILE_SECONDS = 240  # from then on nothing is compiled: the run ends in 6 minutes
MEMORY_STEPS = 200

_numbers = itertools.count()


class Candidate(NamedTuple):
    """A network, and a step of it without arguments."""

    net: dni.DecoupledSequential
    optimizer: Optimizer
    step: Callable[[], object]


def data(size: Size, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A random batch: inputs (B, K) and labels (B,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size.batch, size.widths[0], generator=generator).to(dtype)
    return x, torch.randint(size.widths[-1], (size.batch,), generator=generator)


def build(size: Size, dtype: torch.dtype = torch.float32) -> dni.DecoupledSequential:
    """The network, the same in each call; no parameter is zero, so that all of them matter."""
    torch.manual_seed(0)
    stages = []
    for number, (inputs, outputs) in enumerate(zip(size.widths, size.widths[1:], strict=False)):
        top = number == len(size.widths) - 2
        # A bias in front of a BatchNorm has the gradient zero, and rounding decides its update.
        layers = [nn.Linear(inputs, outputs, bias=top or not size.norm)]
        if not top:
            layers += [nn.BatchNorm1d(outputs)] if size.norm else []
            layers.append(size.activation())
        stages.append(nn.Sequential(*layers))
    context_dim = size.widths[-1] if size.context else None
    synthesizers = [dni.BasicSynthesizer(w, context_dim=context_dim) for w in size.widths[1:-1]]
    net = dni.DecoupledSequential(*stages, synthesizers=synthesizers)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.01 * torch.randn(parameter.shape))
    return net.to(dtype)


def make_optimizer(size: Size, parameters: list[Tensor], fused: bool | None) -> Optimizer:
    """torch's; None is its default, which is not the fused form."""
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[size.optimizer]
    return kind(parameters, lr=LEARNING_RATES[size.optimizer], fused=fused)


def eager_step(net: dni.DecoupledSequential, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """A decoupled step with local autograd, from the lowest stage up."""
    optimizer.zero_grad()
    context = None
    if net.synthesizers[0].input_context is not None:
        context = F.one_hot(y, net.stages[-1][0].out_features).to(x.dtype)
    h, prediction = x, None
    for number, stage in enumerate(net.stages):
        stage_input = h.detach().requires_grad_(number > 0)
        h = stage(stage_input)
        below = prediction
        if number < len(net.synthesizers):
            prediction = net.synthesizers[number](h.detach(), context)
            h.backward(prediction.detach())
        else:
            F.cross_entropy(h, y).backward()
        if below is not None:
            (F.mse_loss(below, stage_input.grad, reduction="sum") / len(x)).backward()
    optimizer.step()


def backprop_step(net: dni.DecoupledSequential, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """A step of backpropagation through the stages."""
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def fastdni_step(
    net: dni.DecoupledSequential, optimizer: Optimizer, x: Tensor, y: Tensor, bfloat16: bool
) -> None:
    """`net.step`, under autocast where asked for."""
    if not bfloat16:
        net.step(x, y, optimizer)
        return
    with torch.autocast("cpu", torch.bfloat16):
        net.step(x, y, optimizer)


def gradients(
    stages: list[SweepStage], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Loss, output, synthesis losses and the gradients in the order of the stages' parameters.

    The equations of `fastdni.reference.sweep`, written for torch.compile. Where a stage has no
    synthesizer its gradient is the one that arrives from above: without any, backpropagation.
    """
    one_hot = F.one_hot(y, stages[-1].weight.shape[0]).to(x.dtype)
    inputs, normalized, predictions = [x], [], []
    for stage in stages:
        z = F.linear(inputs[-1], stage.weight, stage.bias)
        norm, of_norm = stage.norm, None
        if norm is not None:
            mean, variance = z.mean(0), z.var(0, unbiased=False)
            inverse = (variance + norm.eps).rsqrt()
            of_norm = ((z - mean) * inverse, inverse)
            running_mean, running_variance, count = norm.running
            count.add_(1)
            running_mean.lerp_(mean, norm.momentum)
            running_variance.lerp_(variance * (len(z) / (len(z) - 1)), norm.momentum)
            z = of_norm[0] * norm.weight + norm.bias
        normalized.append(of_norm)
        h = {"relu": torch.relu, "sigmoid": torch.sigmoid}.get(stage.activation, lambda z: z)(z)
        inputs.append(h)
        prediction, m = None, stage.synthesizer
        if m is not None:
            prediction = F.linear(h, m.weights[0], m.biases[0])
            if m.context_weight is not None:
                prediction = prediction + F.linear(one_hot, m.context_weight, m.context_bias)
        predictions.append(prediction)

    log_probability = inputs[-1].log_softmax(1)
    loss = -(log_probability * one_hot).sum() / len(x)
    sent = (log_probability.exp() - one_hot) / len(x)
    losses, found = [], []
    for number in reversed(range(len(stages))):
        stage, h, m = stages[number], inputs[number + 1], stages[number].synthesizer
        of_synthesizer = []
        if m is not None:
            error = predictions[number] - sent
            losses.insert(0, error.square().sum() / len(x))
            error = error * (2 / len(x))
            of_synthesizer = [error.t() @ h, error.sum(0)]
            if m.context_weight is not None:
                of_synthesizer += [error.t() @ one_hot, error.sum(0)]
            sent = predictions[number]
        if stage.activation == "relu":
            sent = sent * (h > 0)
        elif stage.activation == "sigmoid":
            sent = sent * (h * (1 - h))
        others = []
        if stage.norm is not None:
            z, inverse = normalized[number]
            others = [(sent * z).sum(0), sent.sum(0)]
            centred = sent - others[1] / len(x) - z * (others[0] / len(x))
            sent = centred * (inverse * stage.norm.weight)
        if stage.bias is not None:
            others.insert(0, sent.sum(0))
        found = [sent.t() @ inputs[number], *others, *of_synthesizer, *found]
        if number > 0:
            sent = sent @ stage.weight
    return loss, inputs[-1], torch.stack(losses) if losses else None, found


def update(
    kind: str, parameters: list[Tensor], found: list[Tensor], state: list[dict[str, Tensor]]
) -> None:
    """What torch.optim's SGD and Adam do with their defaults, for torch.compile."""
    rate = LEARNING_RATES[kind]
    if kind == "sgd":
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.sub_(rate * gradient)
        return
    step = state[0]["step"].add_(1)  # all parameters share it
    first, second = 1 - 0.9**step, (1 - 0.999**step).sqrt()
    for parameter, gradient, of in zip(parameters, found, state, strict=True):
        of["exp_avg"].lerp_(gradient, 1 - 0.9)
        of["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        denominator = of["exp_avg_sq"].sqrt() / second + 1e-8
        parameter.sub_(rate / first * (of["exp_avg"] / denominator))


def compiled(function: Callable) -> Callable:
    """The function as one graph for the tensors of its first call; it looks at no others."""
    # torch.compile keeps its graphs by code object, and with no guards any of them would do.
    own = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        closure=function.__closure__,
    )
    options = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def prepare_compiled(size: Size, backprop: bool) -> Candidate:
    """A step through `gradients`, compiled."""
    net, (x, y) = build(size), data(size)
    synthesizers = [None] * len(net.stages) if backprop else [*net.synthesizers, None]
    stages = [parse(*pair, None, None) for pair in zip(net.stages, synthesizers, strict=True)]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = make_optimizer(size, parameters, fused=True)
    if size.update_in_graph:
        if size.optimizer == "adam":
            step = torch.zeros(())
            for p in parameters:
                averages = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": step, **averages}
        state = [dict(optimizer.state[p]) for p in parameters]

        def whole(stages, parameters, state, x, y):
            *results, found = gradients(stages, x, y)
            update(size.optimizer, parameters, found, state)
            return results

        run = compiled(whole)
        step = torch.no_grad()(partial(run, stages, parameters, state, x, y))
        return Candidate(net, optimizer, step)

    run = compiled(gradients)

    @torch.no_grad()
    def step():
        *results, found = run(stages, x, y)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return results

    return Candidate(net, optimizer, step)


def prepare(column: str, size: Size, dtype: torch.dtype = torch.float32) -> Candidate:
    """The network and the step of a column; `products` is not among them."""
    if column in COMPILED:
        return prepare_compiled(size, column.startswith("backprop"))
    steps = {
        "fastdni": partial(fastdni_step, bfloat16=False),
        "fastdni bf16": partial(fastdni_step, bfloat16=True),
        "eager": eager_step,
        "eager fused": eager_step,
        "backprop": backprop_step,
    }
    net = build(size, dtype)
    of_stages = column == "backprop"
    parameters = net.stage_parameters() if of_stages else list(net.parameters())
    fused = True if column in ("eager fused", "backprop") else None
    optimizer = make_optimizer(size, parameters, fused)
    step = partial(steps[column], net, optimizer, *data(size, dtype))
    return Candidate(net, optimizer, step)


def changed(candidate: Candidate) -> dict[str, Tensor]:
    """All that a step may change: parameters, running statistics, optimizer state."""
    names = {parameter: name for name, parameter in candidate.net.named_parameters()}
    tensors = dict(candidate.net.state_dict())
    for parameter, state in candidate.optimizer.state.items():
        tensors |= {f"{names[parameter]} {key}": value for key, value in state.items()}
    return {name: t.detach().double().clone() for name, t in tensors.items() if t is not None}


def error(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> tuple[float, str]:
    """Largest norm of a difference, relative to that of the change since the start, and where.

    What is not in `start` (optimizer state) started at zero.
    """
    errors = {}
    for name, want in expected.items():
        change = (want - start[name] if name in start else want).norm().clamp(min=1e-30)
        errors[name] = ((found[name] - want).norm() / change).item()
    # max alone would step over a NaN.
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return errors[worst], worst


def check(name: str, size: Size, candidates: dict[str, Candidate]) -> None:
    """Lets candidates take a step; raises AssertionError unless it is eager float64's.

    fastdni is looked at in float64, too, with a network of its own.
    """
    cases = [("fastdni", torch.float64, prepare("fastdni", size, torch.float64), "eager")]
    for column, candidate in candidates.items():
        if column == "fastdni" or column in COMPILED:
            oracle = "backprop" if column.startswith("backprop") else "eager"
            cases.append((column, torch.float32, candidate, oracle))
    expected = {}
    for oracle in {oracle for *_, oracle in cases}:
        candidate = prepare(oracle, size, torch.float64)
        start = changed(candidate)
        candidate.step()
        expected[oracle] = (changed(candidate), start)
    for column, dtype, candidate, oracle in cases:
        candidate.step()
        off, where = error(changed(candidate), *expected[oracle])
        # Written so that NaN fails too.
        if not off <= TOLERANCE[dtype]:
            case = f"{column}, {name}, {str(dtype).removeprefix('torch.')}"
            raise AssertionError(f"{case}: {where} off by {off:.1e}, allowed {TOLERANCE[dtype]}")


def products(size: Size, seconds: float = 0.02) -> Callable[[], None]:
    """All matrix products of a decoupled step, in turn; `seconds` is for the look at each shape."""
    shapes = []
    for number, (inputs, outputs) in enumerate(zip(size.widths, size.widths[1:], strict=False)):
        top = number == len(size.widths) - 2
        shapes += [("forward", inputs, outputs), ("weight", inputs, outputs)]
        shapes += [("input", inputs, outputs)] if number > 0 else []
        shapes += [] if top else [("forward", outputs, outputs), ("weight", outputs, outputs)]
    faster: dict[tuple, str] = {}
    chosen = []
    for shape in shapes:
        calls = product_calls(size.batch, *shape)
        if shape not in faster:
            times = max(1, min(100, 10_000_000 // (size.batch * shape[1] * shape[2])))
            loops = {name: partial(repeat, call, times) for name, call in calls.items()}
            timings = bench.interleave(loops, seconds=seconds)
            faster[shape] = min(timings, key=lambda name: timings[name].median)
        chosen.append(calls[faster[shape]])

    def run() -> None:
        for call in chosen:
            call()

    return run


def product_calls(batch: int, product: str, inputs: int, outputs: int) -> dict[str, Callable]:
    """`library` -> one product of a layer, with tensors of its own."""
    x, w, dz = torch.rand(batch, inputs), torch.rand(outputs, inputs), torch.rand(batch, outputs)
    b = torch.rand(outputs) if product == "forward" else None
    left, right = {"forward": (x, w.t()), "weight": (dz.t(), x), "input": (dz, w)}[product]
    out = left @ right
    turned = out.t().contiguous()
    if b is None:
        found = {
            "MKL": lambda: torch.mm(left, right, out=out),
            "MKL transposed": lambda: torch.mm(right.t(), left.t(), out=turned),
        }
    else:
        found = {"MKL": lambda: torch.addmm(b, left, right, out=out)}
    linear = onednn_linear()
    return found if linear is None else found | {"oneDNN": lambda: linear(left, right.t(), b)}


def measure(
    name: str, size: Size, columns: tuple[str, ...], **limits: float
) -> dict[str, bench.Timing]:
    """Checks, and then times a step of the columns in turn."""
    torch.compiler.reset()  # nothing compiled for another size is kept
    candidates = {c: prepare(c, size) for c in columns if c != "products"}
    check(name, size, candidates)
    steps = {column: candidate.step for column, candidate in candidates.items()}
    if "products" in columns:
        steps["products"] = products(size)
    return bench.interleave(steps, burst=bench.BURST, **limits)


def ratios(timings: dict[str, bench.Timing]) -> dict[str, float]:
    """The quotients of medians that RATIOS names, of the columns there are."""
    return {
        name: timings[a].median / timings[b].median
        for name, (a, b) in RATIOS.items()
        if a in timings and b in timings
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(size: Size) -> dict[str, int]:
    """Workspace of the plan, and growth of the process over MEMORY_STEPS steps after as many."""
    candidate = prepare("fastdni", size)
    repeat(candidate.step, MEMORY_STEPS)
    before = resident_bytes()
    repeat(candidate.step, MEMORY_STEPS)
    growth = resident_bytes() - before
    ((part,),) = candidate.net._trainer._parts.values()
    return {"growth_bytes": growth, "workspace_bytes": part.plan(size.batch).workspace_bytes}


def tables(results: list[dict], markdown: bool) -> str:
    """Ratios, then times in microseconds as `median [p20 p80]`; `-` where nothing was measured."""

    def time(seconds: dict[str, float]) -> str:
        return "{:.0f} [{:.0f} {:.0f}]".format(
            *(1e6 * seconds[k] for k in ("median", "p20", "p80"))
        )

    quotients, times = [], []
    for result in results:
        case, found, seconds = result["case"], result["ratios"], result["seconds"]
        quotients.append(
            [*case.values(), *(f"{found[n]:.2f}" if n in found else "-" for n in RATIOS)]
        )
        cells = [time(seconds[c]) if c in seconds else "-" for c in COLUMNS]
        times.append([case["size"], *cells, seconds["fastdni"]["count"]])
    return "\n\n".join(
        [
            bench.table(quotients, [*results[0]["case"], *RATIOS], markdown),
            bench.table(times, ["size", *COLUMNS, "steps"], markdown),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="fewer rounds, nothing compiled")
    parser.add_argument("--rounds", type=int, help="timed rounds a size, instead of a time limit")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), metavar="NAME", default=None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")

    start = perf_counter()
    torch.set_num_threads(options.threads)
    limits = {"seconds": 0.6 if options.quick else 5.0}
    if options.rounds is not None:
        limits = {"rounds": options.rounds}
    names = options.sizes or list(SIZES)
    info = bench.hardware()
    print(bench.header(info))
    print("times in microseconds: median [20th 80th percentile]; ratios are of medians\n")

    results = []
    for name in names:
        size = SIZES[name]
        print(f"\r{name:12s}", end="", file=sys.stderr, flush=True)
        fast = options.quick or perf_counter() - start > COMPILE_SECONDS
        columns = tuple(c for c in COLUMNS if not (fast and c in COMPILED))
        timings = measure(name, size, columns, **limits)
        case = {"size": name, "B": size.batch, "threads": options.threads}
        seconds = {column: dataclasses.asdict(timing) for column, timing in timings.items()}
        results.append({"case": case, "ratios": ratios(timings), "seconds": seconds})
    print("\r" + " " * 12 + "\r", end="", file=sys.stderr)
    print(tables(results, options.markdown))

    print(f"\nmedians of the ratios over the {len(results)} lines:")
    for name in RATIOS:
        values = [r["ratios"][name] for r in results if name in r["ratios"]]
        if values:
            print(f"  {name}: {statistics.median(values):.2f}")
    of = "paper3" if "paper3" in names else names[0]
    used = {"size": of, **memory(SIZES[of])}
    held, grown = used["workspace_bytes"] / 1024, used["growth_bytes"] / 1024
    print(f"\nmemory at {of}: the plan holds {held:.0f} KiB; ", end="")
    print(f"{MEMORY_STEPS} steps grew the process by {grown:.0f} KiB")
    if options.json:
        written = {"hardware": info, "results": results, "memory": used}
        options.json.write_text(json.dumps(written, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
