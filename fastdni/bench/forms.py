"""A training step in every form that is compared.

* fastdni BACKEND: `net.step` on that backend; fastdni bf16: under autocast, whatever the others are
  in;
* eager, eager fused: every stage with a backward pass of its own, as one writes it in PyTorch, with
  the optimizer as torch makes it, and with a fused one;
* compiled: the equations of `fastdni.reference.sweep` without autograd, all stages in one graph, by
  torch.compile through inductor's C++ wrapper and with no guards to evaluate; the update by the
  fused optimizer, or inside the graph at small sizes, where that was found to be faster. (Compiled
  stages with autograd, the Python wrapper and guards were slower.) On a GPU inductor tries its own
  products beside the library's (max_autotune);
* graphed, compiled graphed: eager fused and compiled, captured in a CUDA graph;
* backprop, backprop compiled, backprop graphed, backprop compiled graphed: the stages alone, in the
  same forms, with fused optimizers;
* products: nothing but the matrix products of the decoupled step, each by the library that is
  fastest at it; on a GPU captured in a graph.

All of them in the same precision, on the same data.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import fastdni as dni
from fastdni.bench.cases import Case
from fastdni.bench.timing import GRAPH_WARMUP, graphed
from fastdni.reference import SweepStage
from fastdni.reference.synthesizer import synthesizer_bwd, synthesizer_fwd
from fastdni.training.stages import parse

# The families of baselines; the strongest of each is what fastdni is held against.
DECOUPLED = ("eager", "eager fused", "compiled", "graphed", "compiled graphed", "easy")
BACKPROP = ("backprop", "backprop compiled", "backprop graphed", "backprop compiled graphed")
COMPILED = tuple(form for form in (*DECOUPLED, *BACKPROP) if "compiled" in form)
# fastdni's, and those of PyTorch.
OWN_GRAPHED = ("fastdni cuda graphed", "fastdni triton graphed")
GRAPHED = (*OWN_GRAPHED, *(form for form in (*DECOUPLED, *BACKPROP) if "graphed" in form))

# Parameters up to which the compiled form updates them inside its graph.
_SMALL = 100_000
# Steps that are compared: from the third on fastdni repeats its last one, and a CUDA graph has
# taken three in its warm-up.
CHECK_STEPS = 4
# Norm of the difference to eager float64 after them, relative to that of the change itself. In
# float32 a ReLU may open in one and stay shut in the other; a wrong equation is off by 0.1 or more.
TOLERANCE = {"float64": 1e-9, "fp32": 1e-2, "tf32": 2e-2, "bf16": 2e-2}
# Where PyTorch's own eager form is further off (deep networks; BatchNorm in bfloat16, which takes
# the means out of gradients and leaves mostly rounding), so many times its error.
OWN_ERROR_FACTOR = 3

_numbers = itertools.count()


class Candidate(NamedTuple):
    """A network, and a step of it without arguments."""

    net: dni.DecoupledSequential
    optimizer: Optimizer
    step: Callable[[], object]


# ---- plain PyTorch ----


def _make_optimizer(form: str, case: Case, parameters: list[Tensor]) -> Optimizer:
    """As it comes for "eager", fused for the others; one that a graph captures counts its steps on
    the device."""
    how: dict[str, bool] = {} if form == "eager" else {"fused": True}
    if form in GRAPHED and case.optimizer.startswith("adam"):
        how["capturable"] = True
    return case.make_optimizer(parameters, **how)


def _eager_step(
    case: Case, net: dni.DecoupledSequential, optimizer: Optimizer, x: Tensor, y: Tensor
) -> None:
    """A decoupled step with local autograd, from the lowest stage up."""
    optimizer.zero_grad()
    context = F.one_hot(y, case.widths[-1]).to(x.dtype) if case.context else None
    with case.autocast():
        h, prediction = x, None
        for number, stage in enumerate(net.stages):
            stage_input = h.detach().requires_grad_(number > 0)
            h = stage(stage_input)
            below = prediction
            if number < len(net.synthesizers):
                prediction = net.synthesizers[number](h.detach(), context)
                h.backward(prediction.detach().to(h.dtype))
            else:
                F.cross_entropy(h, y).backward()
            if below is not None:
                (F.mse_loss(below, stage_input.grad, reduction="sum") / len(x)).backward()
    optimizer.step()


def _backprop_step(
    case: Case, net: dni.DecoupledSequential, optimizer: Optimizer, x: Tensor, y: Tensor
) -> None:
    """A step of backpropagation through the stages."""
    optimizer.zero_grad()
    with case.autocast():
        loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()


# ---- the equations, compiled ----


def gradients(
    stages: list[SweepStage], x: Tensor, y: Tensor, bfloat16: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Loss, output, synthesis losses and the gradients in the order of the stages' parameters.

    The equations of `fastdni.reference.sweep`, written for torch.compile. Where a stage has no
    synthesizer its gradient is the one that arrives from above: without any, backpropagation.
    """

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if bfloat16 else a @ b

    one_hot = F.one_hot(y, stages[-1].weight.shape[0]).to(x.dtype)
    inputs, normalized, predictions = [x], [], []
    for stage in stages:
        z = product(inputs[-1], stage.weight.t())
        if stage.bias is not None:
            z = z + stage.bias
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
        h = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(
            stage.activation, lambda z: z
        )(z)
        inputs.append(h)
        m = stage.synthesizer
        context = None if m is None or m.context_weight is None else one_hot
        predictions.append(None if m is None else synthesizer_fwd(h, context, *m, product))

    log_probability = inputs[-1].log_softmax(1)
    loss = -(log_probability * one_hot).sum() / len(x)
    sent = (log_probability.exp() - one_hot) / len(x)
    losses, found = [], []
    for number in reversed(range(len(stages))):
        stage, h, m = stages[number], inputs[number + 1], stages[number].synthesizer
        of_synthesizer = []
        if m is not None:
            context = None if m.context_weight is None else one_hot
            prediction, hidden = predictions[number]
            synthesis_loss, of_synthesizer = synthesizer_bwd(
                sent, prediction, hidden, h, context, m.weights, True, "batchmean", product
            )
            losses.insert(0, synthesis_loss)
            sent = prediction
        if stage.activation == "relu":
            sent = sent * (h > 0)
        elif stage.activation == "sigmoid":
            sent = sent * (h * (1 - h))
        elif stage.activation == "tanh":
            sent = sent * (1 - h * h)
        others = []
        if stage.norm is not None:
            z, inverse = normalized[number]
            others = [(sent * z).sum(0), sent.sum(0)]
            centred = sent - others[1] / len(x) - z * (others[0] / len(x))
            sent = centred * (inverse * stage.norm.weight)
        if stage.bias is not None:
            others.insert(0, sent.sum(0))
        found = [product(sent.t(), inputs[number]), *others, *of_synthesizer, *found]
        if number > 0:
            sent = product(sent, stage.weight)
    return loss, inputs[-1], torch.stack(losses) if losses else None, found


def _update(
    optimizer: Optimizer,
    parameters: list[Tensor],
    found: list[Tensor],
    state: list[dict[str, Tensor]],
) -> None:
    """What torch.optim's SGD, Adam and AdamW do, for torch.compile."""
    options = optimizer.param_groups[0]
    rate = options["lr"]
    if isinstance(optimizer, torch.optim.SGD):
        for parameter, gradient, kept in zip(parameters, found, state, strict=True):
            if options["momentum"] != 0:
                gradient = kept["momentum_buffer"].mul_(options["momentum"]).add_(gradient)
            parameter.sub_(rate * gradient)
        return
    (beta1, beta2), eps = options["betas"], options["eps"]
    step = state[0]["step"].add_(1)  # all parameters share it
    first, second = 1 - beta1**step, (1 - beta2**step).sqrt()
    for parameter, gradient, kept in zip(parameters, found, state, strict=True):
        if options["decoupled_weight_decay"]:
            parameter.mul_(1 - rate * options["weight_decay"])
        kept["exp_avg"].lerp_(gradient, 1 - beta1)
        kept["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = kept["exp_avg_sq"].sqrt() / second + eps
        parameter.sub_(rate / first * (kept["exp_avg"] / denominator))


def _make_state(case: Case, optimizer: Optimizer, parameters: list[Tensor]) -> list[dict]:
    """The optimizer's state before its first step."""
    step = torch.zeros((), device=case.device)
    keys = {"sgd": [], "momentum": ["momentum_buffer"]}.get(
        case.optimizer, ["exp_avg", "exp_avg_sq"]
    )
    for p in parameters:
        kept = {key: torch.zeros_like(p) for key in keys}
        optimizer.state[p] = ({"step": step} if len(keys) == 2 else {}) | kept
    return [dict(optimizer.state[p]) for p in parameters]


def compiled(function: Callable, **options: bool) -> Callable:
    """The function as one graph for the tensors of its first call; it looks at no others. With
    inductor's options."""
    # torch.compile keeps its graphs by code object, and with no guards any of them would do.
    own = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}"),
        function.__globals__,
        argdefs=function.__defaults__,
        closure=function.__closure__,
    )
    options |= {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _prepare_compiled(form: str, case: Case) -> Candidate:
    """A step through `gradients`, compiled."""
    net, (x, y) = case.build(), case.data()
    of_stages = form.startswith("backprop")
    synthesizers = [None] * len(net.stages) if of_stages else [*net.synthesizers, None]
    # A graph's replay calls no wrapper.
    options = {"cpp_wrapper": form not in GRAPHED, "max_autotune": case.device == "cuda"}
    stages = [parse(*pair, None, None).sweep for pair in zip(net.stages, synthesizers, strict=True)]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    optimizer = _make_optimizer(form, case, parameters)
    bfloat16 = case.precision == "bf16"
    if sum(p.numel() for p in parameters) <= _SMALL:
        state = _make_state(case, optimizer, parameters)

        def whole(stages, parameters, state, x, y):
            *results, found = gradients(stages, x, y, bfloat16)
            _update(optimizer, parameters, found, state)
            return results

        run = compiled(whole, **options)
        step = torch.no_grad()(partial(run, stages, parameters, state, x, y))
        return Candidate(net, optimizer, step)

    run = compiled(gradients, **options)

    @torch.no_grad()
    def step():
        *results, found = run(stages, x, y, bfloat16)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return results

    return Candidate(net, optimizer, step)


# ---- fastdni ----


def _fastdni_step(
    case: Case, backend: str, net: dni.DecoupledSequential, optimizer: Optimizer, x, y
) -> Callable[[], object]:
    def step():
        return net.step(x, y, optimizer)

    def in_autocast():
        with case.autocast():
            return net.step(x, y, optimizer)

    run = in_autocast if case.precision == "bf16" else step
    if backend in ("auto", "cpu"):
        return run  # what a user gets who asks for nothing

    def on_backend():
        with dni.use_backend(backend):
            return run()

    return on_backend


def _prepare_graphed(case: Case, backend: str, net: dni.DecoupledSequential, x, y) -> Candidate:
    if not case.optimizer.startswith("adam"):
        raise RuntimeError(f"make_graphed_step takes no {case.optimizer}: it is not capturable")
    optimizer = case.make_optimizer(list(net.parameters()), capturable=True)
    with dni.use_backend(backend), case.autocast():
        run = dni.make_graphed_step(net, optimizer, x, y, warmup=GRAPH_WARMUP)
    return Candidate(net, optimizer, partial(run, x, y))


def prepare(form: str, case: Case, dtype: torch.dtype = torch.float32) -> Candidate:
    """The network and the step of a form; "products" is not among them."""
    if form in COMPILED:
        made = _prepare_compiled(form, case)
        return made._replace(step=graphed(made.step)) if form in GRAPHED else made
    if form == "fastdni bf16":
        form, case = "fastdni", case._replace(precision="bf16")
    net = case.build(dtype)
    if form.startswith("fastdni"):
        if form in OWN_GRAPHED:
            return _prepare_graphed(case, form.split()[1], net, *case.data(dtype))
        optimizer = case.make_optimizer(list(net.parameters()))
        backend = form.partition(" ")[2] or "auto"
        step = _fastdni_step(case, backend, net, optimizer, *case.data(dtype))
        return Candidate(net, optimizer, step)
    of_stages = form.startswith("backprop")
    parameters = net.stage_parameters() if of_stages else list(net.parameters())
    optimizer = _make_optimizer(form, case, parameters)
    own = _backprop_step if of_stages else _eager_step
    step = partial(own, case, net, optimizer, *case.data(dtype))
    return Candidate(net, optimizer, graphed(step) if form in GRAPHED else step)


# ---- whether they are the same step ----


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


def _without_signs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Not the parameters under Adam: their first update is the sign of the gradient, which rounding
    to bfloat16 may turn; but its averages, which are the gradient and its square."""
    return {name: t for name, t in tensors.items() if f"{name} exp_avg" not in tensors}


class Check:
    """Compares the forms of a case with the eager one in float64, by first steps of each."""

    def __init__(self, case: Case):
        self._case = case
        self._exact = case._replace(precision="fp32")
        self._expected: dict[str, tuple] = {}
        self._own: dict[tuple, float] = {}

    def _oracle(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if name not in self._expected:
            candidate = prepare(name, self._exact, torch.float64)
            start = changed(candidate)
            _take(candidate, CHECK_STEPS)
            self._expected[name] = (changed(candidate), start)
        return self._expected[name]

    def _allowed(self, oracle: str, precision: str) -> float:
        """The tolerance, or a multiple of the error that eager PyTorch itself makes."""
        if precision == "float64":
            return TOLERANCE[precision]
        if (oracle, precision) not in self._own:
            candidate = prepare(oracle, self._case._replace(precision=precision))
            _take(candidate, CHECK_STEPS)
            self._own[oracle, precision] = self._error(candidate, oracle, precision)[0]
        return max(TOLERANCE[precision], OWN_ERROR_FACTOR * self._own[oracle, precision])

    def __call__(self, form: str, candidate: Candidate) -> None:
        """Lets a candidate take its first steps; fastdni takes some in float64, too, with a network
        of its own.

        Raises:
            ArithmeticError: parameters, statistics or optimizer state change otherwise.
        """
        precision = self._case.precision
        left = CHECK_STEPS - (GRAPH_WARMUP if form in GRAPHED else 0)
        if form == "fastdni bf16":
            precision = "bf16"
        elif form.startswith("fastdni") and "triton" not in form:  # which has no float64
            exact = prepare(form, self._exact, torch.float64)
            _take(exact, left)
            self._compare(form, exact, "float64")
        _take(candidate, left)
        self._compare(form, candidate, precision)

    def _error(self, candidate: Candidate, oracle: str, precision: str) -> tuple[float, str]:
        expected, start = self._oracle(oracle)
        if precision == "bf16":
            expected = _without_signs(expected)
        return error(changed(candidate), expected, start)

    def _compare(self, form: str, candidate: Candidate, precision: str) -> None:
        oracle = "backprop" if form.startswith("backprop") else "eager"
        off, where = self._error(candidate, oracle, precision)
        allowed = self._allowed(oracle, precision)
        # Written so that NaN fails too.
        if not off <= allowed:
            raise ArithmeticError(
                f"{form}, {self._case}, {precision}: {where} off by {off:.1e}, allowed "
                f"{allowed:.1e}"
            )


def _take(candidate: Candidate, steps: int) -> None:
    for _ in range(steps):
        candidate.step()
