"""The sweep's CUDA kernels and launchers, run on the host (tests/simt) against the reference."""

import functools
import importlib
import itertools

import numpy as np
import pytest
import torch
from conftest import sample
from simt.build import Fault, HostRunError, Unavailable, build
from sweep_problem import CASES, CONTEXT, Problem, cast, fresh_state, problem, stages

from fastdni import ops, reference

RULES = reference.RULES
SPREADS = ["rows", "clusters", "phases"]
KEPT = reference.KEPT


def built(variant, fault=None):
    try:
        return build("sweep", variant, fault)
    except Unavailable as reason:
        pytest.skip(str(reason))


def arrays_of(tensors):
    return [np.ascontiguousarray(t.numpy()) for t in tensors]


def host_step(one: Problem, given: dict, dtype, run, spread="rows", gradient=None, **how):
    """What the kernels make of a step: results, parameters, what is kept of them, statistics."""
    own = cast(one.given, dtype)
    parameters = [p for stage in own for p in stage.parameters()]
    statistics = [t for stage in own for t in stage.statistics()]
    with_plan = ops.SweepPlan(own, one.batch, one.criterion)
    updated = [one.active[s] for s in with_plan.parameter_stages]
    chosen = [p for p, u in zip(parameters, updated, strict=True) if u]
    state = [s for s in fresh_state(one.settings, chosen) if s.shape or s.numel() != 1]
    kept = KEPT[one.settings.rule]
    inputs = [one.x.to(dtype)]
    inputs += [one.target if not one.target.is_floating_point() else one.target.to(dtype)]
    inputs += [] if one.context is None else [one.context.to(dtype)]
    inputs += [] if gradient is None else [gradient.to(dtype)]
    of_parameters, left = [], iter(state)
    for parameter, free in zip(parameters, updated, strict=True):
        of_parameters.append(parameter)
        of_parameters += [next(left) for _ in range(kept)] if free else []
    inputs += of_parameters + statistics
    settings = one.settings
    of_norm = next((stage.norm for stage in own if stage.norm is not None), None)
    top = own[-1].synthesizer is not None
    count = sum(stage.synthesizer is not None for stage in own)
    unlocked = own[0].input_synthesizer is not None
    params = {
        "dtype": str(dtype).removeprefix("torch."),
        "widths": "-".join(map(str, [own[0].weight.shape[1], *(s.weight.shape[0] for s in own)])),
        "batch": one.batch,
        "criterion": one.criterion or "none",
        "activation": own[0].activation,
        "hidden": given.get("n_hidden", 0),
        "context": CONTEXT if given.get("context") else 0,
        "explicit_context": int(one.context is not None),
        "norm": int(of_norm is not None),
        "affine": int(of_norm is None or of_norm.weight is not None),
        "momentum": -1 if of_norm is not None and of_norm.momentum is None else 0.1,
        "bias": int(given.get("bias", True)),
        "unlocked": int(unlocked),
        "top": int(top),
        "active": "-".join(str(s) for s, a in enumerate(one.active) if a),
        "rule": RULES.index(settings.rule),
        **{key: float(getattr(settings, key)) for key in ("lr", "weight_decay", "a", "b", "eps")},
        "nesterov": int(settings.nesterov),
        "kept": kept,
        "steps": 2,
        "sizes": "-".join(str(p.numel()) for p in parameters),
        "stages": "-".join(map(str, with_plan.parameter_stages)),
        "spread": spread,
        "precision": "exact",
        "library_from": 2**62,
        **how,
    }
    number = np.float64 if dtype == torch.float64 else np.float32
    rows, outputs = one.batch, own[-1].weight.shape[0]
    of_input = rows * own[0].weight.shape[1] if how.get("input_gradient") else 0
    wanted = [(number, rows * outputs), (number, 1), (number, count * (1 + unlocked))]
    wanted += [(number, of_input)]
    wanted += [(number, p.numel()) for p in of_parameters]
    wanted += [(np.int64 if not t.is_floating_point() else number, t.numel()) for t in statistics]
    return run(params, arrays_of(inputs), wanted)


def reference_step(one: Problem, gradient=None, rounded=False, input_gradient=False):
    """The same, of the reference in float64."""
    own = cast(one.given, torch.float64)
    done = reference.sweep(
        own, one.x, one.target, one.context, one.criterion, list(map(bool, one.active)), rounded
    )
    gradients, losses = done.gradients, done.synthesis_loss
    if done.regress_top is not None:
        loss, of_top = done.regress_top(gradient)
        made = own[-1].input_synthesizer
        end = len(gradients) - (0 if made is None else len(made.tensors()))
        gradients = gradients[: end - len(of_top)] + of_top + gradients[end:]
        losses = losses.clone()
        losses.view(-1, len(own))[0, -1] = loss
    results = [done.output, torch.zeros(1) if done.loss is None else done.loss, losses]
    results += [done.input_gradient if input_gradient else torch.empty(0)]
    parameters = [p for stage in own for p in stage.parameters()]
    chosen = [p for p, g in zip(parameters, gradients, strict=True) if g is not None]
    state = iter(fresh_state(one.settings, chosen))
    kept = KEPT[one.settings.rule]
    for parameter, found in zip(parameters, gradients, strict=True):
        results.append(parameter)
        if found is None:
            continue
        beside = [next(state) for _ in range(kept)]
        if kept == 2:
            next(state)
            beside.append(torch.tensor(2.0))
        reference.optimizer_update(one.settings, parameter, found, beside)
        results += beside[:kept]
    return [*results, *(t for stage in own for t in stage.statistics())]


def compare(found, expected, tolerance, skip_loss=False):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if skip_loss and index == 1:
            continue
        want = b.detach().double().numpy().reshape(-1)
        np.testing.assert_allclose(a.astype(np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, spread):
    one, given = problem(name)
    found = host_step(one, given, torch.float64, built("plain"), spread)
    compare(found, reference_step(one), 1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one of each"])
def test_a_step_whose_products_are_the_librarys(name):
    """Every one of them, however small; the rest of the instructions goes on from there."""
    one, given = problem(name)
    found = host_step(one, given, torch.float64, built("plain"), "phases", library_from=1)
    compare(found, reference_step(one), 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_float32(name):
    one, given = problem(name)
    compare(host_step(one, given, torch.float32, built("plain")), reference_step(one), 2e-4)


@pytest.mark.parametrize(
    "settings, norm, activation, n_hidden, context",
    sample(
        itertools.product(
            ["gradient", "sgd", "nesterov", "momentum", "adam", "adamw"],
            [False, True], ["relu", "tanh", "sigmoid"], [0, 1], [False, True],
        ),
        every=11,
    ),
)  # fmt: skip
def test_combinations(settings, norm, activation, n_hidden, context):
    torch.manual_seed(0)
    given = {"norm": norm, "activation": activation, "n_hidden": n_hidden, "context": context}
    one = Problem(stages(**given), 21, settings=settings)
    compare(host_step(one, given, torch.float64, built("plain")), reference_step(one), 1e-10)


@pytest.mark.parametrize("settings", ["sgd", "momentum", "adam", "adamw"])
def test_step_counts_and_learning_rate_that_are_on_the_gpu(settings):
    torch.manual_seed(0)
    one = Problem(stages(), 21, settings=settings)
    lr = np.float32(one.settings.lr).item()  # as the kernels read it
    one.settings = one.settings._replace(lr=lr)
    found = host_step(one, {}, torch.float64, built("plain"), on_device=1)
    compare(found, reference_step(one), 1e-10)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("unlocked", [False, True])
def test_a_part_of_a_network(norm, unlocked):
    """More stages above: the topmost synthesizer learns from the gradient that comes back."""
    torch.manual_seed(0)
    given = {"top": True, "norm": norm, "unlocked": unlocked, "context": True}
    one = Problem(stages(**given), 20, criterion=None, explicit_context=True)
    gradient = torch.randn(20, 5, dtype=torch.float64)
    how = {"gradient": gradient, "input_gradient": 1}
    found = host_step(one, given, torch.float64, built("plain"), **how)
    compare(found, reference_step(one, gradient, input_gradient=True), 1e-10, skip_loss=True)


def test_the_upper_part_of_a_network():
    """Its loss is there before the update, and the gradient of its input."""
    one, given = problem("norm")
    found = host_step(one, given, torch.float64, built("plain"), input_gradient=1)
    compare(found, reference_step(one, input_gradient=True), 1e-10)


def test_operands_rounded_to_bfloat16():
    one, given = problem("mlp")
    found = host_step(one, given, torch.float64, built("plain"), precision="bfloat16")
    # The reference in PyTorch rounds the same operands, up to those that lie between two.
    compare(found, reference_step(one, rounded=True), 1e-2)


def rounded_to_tf32(x):
    bits = x.float().numpy().view(np.int32)
    return torch.from_numpy(((bits + 0x1000) & ~0x1FFF).view(np.float32)).double()


@pytest.mark.parametrize("spread", ["rows", "clusters"])
@pytest.mark.parametrize("name", ["wide rows", "mlp", "given context", "unlocked, norm"])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_tensor_cores_multiply_rounded_operands(monkeypatch, precision, name, spread):
    one, given = problem(name)
    found = host_step(one, given, torch.float32, built("plain"), spread, precision=precision)
    if precision == "tf32":
        module = importlib.import_module("fastdni.reference.sweep")
        tf32 = rounded_to_tf32
        monkeypatch.setattr(module, "_rounded_product", lambda a, b: tf32(a) @ tf32(b))
    rounded = reference_step(one, rounded=True)
    # Half a unit of an operand, where another order of a sum before moved it across.
    unit = {"tf32": 2**-11, "bfloat16": 2**-8}[precision]
    compare(found, rounded, 4 * unit)
    with pytest.raises(AssertionError):  # they were rounded at all
        compare(found, reference_step(one), unit / 8)


@pytest.mark.parametrize("name", ["wide rows", "mlp", "given context", "unlocked, norm"])
def test_three_products_of_parts_are_nearly_float32(name):
    one, given = problem(name)
    found = host_step(one, given, torch.float32, built("plain"), precision="tf32x3")
    compare(found, reference_step(one), 2e-4)


def test_rows_that_are_ignored_and_labels_that_are_none():
    one, given = problem("plain")
    one.target[1] = -100
    compare(host_step(one, given, torch.float64, built("plain")), reference_step(one), 1e-10)
    one.target[2] = 5
    output, loss, *_ = host_step(one, given, torch.float64, built("plain"))
    assert np.isnan(loss) and np.isfinite(output).all()


def test_more_rows_than_a_block_counts_and_sums():
    torch.manual_seed(0)
    one = Problem(stages((3, 2, 2)), 4100)
    one.target[::3] = -100
    compare(host_step(one, {}, torch.float64, built("address")), reference_step(one), 1e-10)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", ["mlp", "norm", "unlocked"])
def test_the_same_bits_in_any_order_of_threads_and_launches(name):
    one, given = problem(name)
    run = built("plain")
    first = host_step(one, given, torch.float32, run)
    for how in (
        {"seed": 1},
        {"spread": "clusters", "seed": 2},
        {"spread": "phases"},
        {"spread": "phases", "seed": 3},
    ):
        assert_same_bits(first, host_step(one, given, torch.float32, run, **how))


@pytest.mark.parametrize(
    "name, spread",
    [
        ("wide rows", "phases"),
        ("one of each", "rows"),
        ("mlp", "rows"),
        ("unlocked, norm", "clusters"),
    ],
)
def test_stays_in_bounds(name, spread):
    one, given = problem(name)
    found = host_step(one, given, torch.float64, built("address"), spread)
    compare(found, reference_step(one), 1e-10)


@pytest.mark.parametrize(
    "name, spread",
    [("mlp", "rows"), ("norm", "phases"), ("mse", "rows"), ("a wide layer", "clusters")],
)
def test_has_no_race(name, spread):
    one, given = problem(name)
    found = host_step(one, given, torch.float64, built("thread"), spread, seed=1)
    compare(found, reference_step(one), 1e-10)


KERNELS, NORM, ROWS = (
    "cuda/kernels/sweep.cuh",
    "cuda/kernels/sweep_norm.cuh",
    "cuda/kernels/sweep_rows.cuh",
)
TILE = "cuda/kernels/tile_product.cuh"
FAULTS = {
    "no barrier before a chunk is used": (
        TILE, "thread", "data race", "plain", "rows",
        "__syncwarp();  // the chunk is there for all lanes, and all lanes are together", "",
    ),
    "no barrier before the warps' sums are added": (
        TILE, "thread", "data race", "plain", "rows",
        "      __syncthreads();\n      if (row / kPassRows", "      if (row / kPassRows",
    ),
    "no barrier after an instruction": (
        KERNELS, "thread", "data race", "norm", "rows",
        "      __syncthreads();\n    }\n  }\n}", "    }\n  }\n}",
    ),
    "no barrier before a column's moments are joined": (
        NORM, "thread", "data race", "norm", "rows",
        "  values[threadIdx.x] = value;\n  __syncthreads();", "  values[threadIdx.x] = value;",
    ),
    "no barrier in a cluster": (
        KERNELS, "thread", "data race", "wide rows", "clusters",
        "      cluster_barrier();", "      __syncthreads();",
    ),
    "a row too many": (
        ROWS, "address", "heap-buffer-overflow", "plain", "rows",
        "row < step.batch};", "row <= step.batch};",
    ),
    "a chunk past the depth": (
        TILE, "address", "heap-buffer-overflow", "plain", "rows",
        "along = side.depth_first ? depth - k", "along = side.depth_first ? depth - k + 1",
    ),
    "a chunk past the columns": (
        TILE, "address", "heap-buffer-overflow", "plain", "rows",
        "? side.wide - wide : depth - k;", "? side.wide - wide + 1 : depth - k + 1;",
    ),
}  # fmt: skip
# One for each way to find a fault: every build of the kernels takes ten seconds.
FAULTS = dict(sample(FAULTS.items(), 8, lambda fault: [fault[1][1:3]]))


VARIANTS = ("plain", "address", "thread")
BUILDS = [
    *(functools.partial(build, "sweep", variant) for variant in VARIANTS),
    *(
        functools.partial(build, "sweep", variant, Fault(header, old, new))
        for header, variant, *_, old, new in FAULTS.values()
    ),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    header, variant, report, name, spread, old, new = FAULTS[fault]
    one, given = problem(name)
    run = built(variant, Fault(header, old, new))
    with pytest.raises(HostRunError, match=report):
        host_step(one, given, torch.float64, run, spread, seed=1)
