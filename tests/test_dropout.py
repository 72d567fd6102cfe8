"""Dropout in a stage: torch's random numbers, and the stage stays fused."""

from functools import partial

import pytest
import torch
from network_cases import OPTIMIZERS, batch, network
from paths import assert_fused
from plain_step import assert_same, assert_same_state, plain_backward, plain_step, twin_of
from sweep_problem import cast, stages
from torch import nn

import fastdni
from fastdni import _C, BasicSynthesizer, DecoupledSequential, ops, use_backend

DROPPED = {
    "after the activation": lambda p: [nn.Linear(7, 9), nn.ReLU(), nn.Dropout(p)],
    "before the activation": lambda p: [nn.Linear(7, 9), nn.Dropout(p), nn.Tanh()],
    "first": lambda p: [nn.Dropout(p), nn.Linear(7, 9), nn.ReLU()],
    "after a norm": lambda p: [nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(p)],
    "twice": lambda p: [nn.Dropout(p), nn.Linear(7, 9), nn.ReLU(), nn.Dropout(p)],
    "in place": lambda p: [nn.Linear(7, 9), nn.Dropout(p, inplace=True), nn.Tanh()],
}


def dropping(place, p, where=0):
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(7, 9), nn.ReLU()),
        nn.Sequential(nn.Linear(9, 6), nn.ReLU()),
        nn.Linear(6, 5),
    ]
    layers = DROPPED[place](p)
    sizes = [(7, 9), (9, 6)][where]
    for index, layer in enumerate(layers):
        if type(layer) is nn.Linear:
            layers[index] = nn.Linear(*sizes)
        elif type(layer) is nn.BatchNorm1d:
            layers[index] = nn.BatchNorm1d(sizes[1])
    stages[where] = nn.Sequential(*layers)
    return DecoupledSequential(
        *stages, synthesizers=[BasicSynthesizer(n, context_dim=5) for n in (9, 6)]
    ).double()


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("place", DROPPED)
def test_dropout_is_torchs(place, p, where):
    """The same random numbers, so the same values."""
    net = dropping(place, p, where)
    optimizer = OPTIMIZERS["nesterov"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(4):
        given = batch(net, seed=seed)
        torch.manual_seed(seed)
        results = net.step(optimizer=optimizer, **given)
        after = torch.rand(1)
        torch.manual_seed(seed)
        expected = plain_step(twin, optimizer=own, **given)
        assert torch.equal(after, torch.rand(1)), "as many random numbers were drawn"
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)


def test_dropout_in_front_of_the_network_leaves_it_fused():
    net = dropping("first", 0.5)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [True] * 3


@pytest.mark.parametrize("place", ["after the activation", "after a norm"])
def test_dropout_leaves_stages_fused(place):
    net = dropping(place, 0.5)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [True] * 3


def test_dropout_that_changes():
    net = dropping("after the activation", 0.5)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed, p in enumerate((0.5, 0.5, 0.1, None, None, 0.9)):
        for one in (net, twin):
            layer = one.stages[0][2]
            layer.train(p is not None)
            layer.p = layer.p if p is None else p
        given = batch(net, seed=seed)
        for of, step in ((optimizer, net.step), (own, partial(plain_step, twin))):
            torch.manual_seed(seed)
            step(optimizer=of, **given)
        assert_same(net, twin)


def test_random_numbers_differ_from_step_to_step():
    net = dropping("after the activation", 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    given = batch(net)
    torch.manual_seed(0)
    losses = {net.step(optimizer=optimizer, **given).loss.item() for _ in range(5)}
    assert len(losses) == 5


# ---- at the end of a stage, as `decouple` puts it ----


def dropping_everywhere(p=0.4, head=False, **how):
    """A network whose hidden stages (or all) end with Dropout."""
    net = network(**how)
    for stage in net.stages if head else net.stages[:-1]:
        stage.append(nn.Dropout(p))
    return net


def seeded(seed, function, *arguments, **how):
    """What a function returns, and the random number that comes next."""
    torch.manual_seed(seed)
    return [*function(*arguments, **how), torch.rand(1)]


def compare(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


KINDS = {
    "relu": {"context": True},
    "tanh": {"activation": "tanh", "n_hidden": 1},
    "sigmoid": {"activation": "sigmoid", "head": True},
    "linear": {"activation": "identity", "head": True},
    "norm": {"norm": True, "bias": False},
    "norms in a row": {"norm": True, "widths": (7, 9, 6, 8, 5), "activation": "tanh"},
    "unlocked": {"unlocked": True, "activation": "tanh", "n_hidden": 1},
    "unlocked, norm": {"unlocked": True, "norm": True, "context": True, "bias": False},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [2, 6, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_stage_drops_as_torch(kind, rows, backend):
    net = dropping_everywhere(**KINDS[kind])
    optimizer = OPTIMIZERS["nesterov"](net.parameters())
    twin, own = twin_of(net, optimizer)
    with use_backend(backend):
        if backend == "cpu":
            assert_fused(net, batch(net, rows)["x"], optimizer)
        for seed in range(4):
            given = batch(net, rows, seed=seed)
            found = seeded(seed, net.step, optimizer=optimizer, **given)
            compare(found, seeded(seed, plain_step, twin, optimizer=own, **given))
            assert_same(net, twin)
    assert_same_state(optimizer, own)


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
def test_float32(criterion):
    net = dropping_everywhere(head=True, activation="tanh", dtype=torch.float32)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(4):
        given = batch(net, 33, criterion, seed)
        found = seeded(seed, net.step, optimizer=optimizer, **given)
        compare(found, seeded(seed, plain_step, twin, optimizer=own, **given), 1e-5)
        assert_same(net, twin, 1e-5)


@pytest.mark.parametrize("kind", ["relu", "norm", "unlocked"])
def test_masked_stages_drop_too(kind):
    net = dropping_everywhere(**KINDS[kind])
    optimizer = OPTIMIZERS["adam"](net.parameters())
    twin, own = twin_of(net, optimizer)
    masks = ([True, False, True], [False, True, True], [True, True, False], [True] * 3)
    for seed, mask in enumerate(masks):
        given = batch(net, seed=seed) | {"update_mask": mask}
        found = seeded(seed, net.step, optimizer=optimizer, **given)
        compare(found, seeded(seed, plain_step, twin, optimizer=own, **given))
        assert_same(net, twin)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["relu", "norm", "unlocked"])
def test_gradients_alone(kind, backend):
    net = dropping_everywhere(**KINDS[kind])
    (twin,) = twin_of(net)
    given = batch(net)
    with use_backend(backend):
        for seed in range(2):  # the second time they are added
            found = seeded(seed, net.backward, **given)
            compare(found, seeded(seed, plain_backward, twin, **given))
    compare(*([p.grad for p in each.parameters()] for each in (net, twin)))


@pytest.mark.parametrize("unlocked", [False, True])
def test_beside_stages_on_local_autograd(unlocked):
    """The sweep's numbers are drawn where its part begins."""
    net = dropping_everywhere(widths=(7, 9, 8, 6, 7, 5), unlocked=unlocked)
    net.stages[2] = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.2), nn.GELU()).double()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [True, True, False, True, True]
    twin, own = twin_of(net, optimizer)
    for seed in range(3):
        given = batch(net, seed=seed)
        found = seeded(seed, net.step, optimizer=optimizer, **given)
        compare(found, seeded(seed, plain_step, twin, optimizer=own, **given))
        assert_same(net, twin)


def test_steps_with_dropout_are_repeated(monkeypatch):
    count, repeat = [], ops.sweep_repeat_
    monkeypatch.setattr(ops, "sweep_repeat_", lambda *a: count.append(1) or repeat(*a))
    net = dropping_everywhere(norm=True, bias=False)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(6):
        given = batch(net, seed=seed)
        found = seeded(seed, net.step, optimizer=optimizer, **given)
        compare(found, seeded(seed, plain_step, twin, optimizer=own, **given))
    assert len(count) >= 4
    assert_same(net, twin)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "inplace", True), "its Dropout works in place"),
        (lambda layer: setattr(layer, "p", torch.tensor(0.5)), "its Dropout's p is not a number"),
        (
            lambda layer: layer.register_forward_hook(lambda *a: None),
            "its Dropout has hooks or another forward",
        ),
    ],
)
def test_what_only_torch_can_drop(change, reason):
    net = dropping_everywhere()
    change(net.stages[0][2])
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["reason"] for row in rows] == [reason, "", ""]


def test_a_probability_that_is_none_is_refused_as_by_torch():
    net = dropping_everywhere()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    net.stages[1][2].p = 1.5
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        net.step(optimizer=optimizer, **batch(net))
    assert all(map(torch.equal, before, net.parameters())) and not optimizer.state


# ---- the op ----


def dropping_plan(backend, dtype=torch.float64):
    below, *above = cast(stages(), dtype)
    with use_backend(backend):
        return ops.SweepPlan([below._replace(dropout=True), *above], 4, "cross_entropy")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([], "noise must hold 1 tensors, one for each stage with Dropout, got 0"),
        ([torch.ones(4, 9).double()] * 2, "noise must hold 1 tensors, .* got 2"),
        ([torch.ones(4, 7).double()], r"noise must be .* of shape \(4, 9\), got .*7\)"),
        ([torch.ones(4, 9)], "noise must be a contiguous torch.float64 .* got torch.float32"),
        ([torch.ones(9, 4).double().t()], "noise must be a contiguous torch.float64 tensor"),
    ],
)
def test_noise_is_one_tensor_for_each_dropout(backend, noise, message):
    plan = dropping_plan(backend)
    x, target = torch.ones(4, 7).double(), torch.zeros(4, dtype=torch.int64)
    before = [p.clone() for p in plan.parameters]
    settings = ops.flat([fastdni.reference.OptimizerSettings("sgd", lr=1.0)])
    given = (x, target, None, [], [0] * len(before), settings, [1] * 4)
    with pytest.raises(RuntimeError, match=f"sweep: {message}"):
        ops.sweep_(plan, *given, noise=noise)
    assert all(map(torch.equal, before, plan.parameters))


def test_plans_for_a_gpu_have_no_dropout():
    """Their kernels would leave it out."""
    (stage,) = stages((7, 5))
    spec = ops.sweep._stage_spec(stage._replace(dropout=True))
    with pytest.raises(RuntimeError, match="a GPU's plan must have no stage with Dropout"):
        _C.SweepPlan(
            stages=[spec], batch=4, dtype="float64", gpu=0, criterion="mse", runs=True,
            input_gradient=False, precision="exact", separate_input=False,
        )  # fmt: skip


def test_triton_leaves_dropout_to_autograd():
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("on the CPU, in Triton's interpreter")
    with pytest.raises(RuntimeError, match="a plan for Triton must have no stage with Dropout"):
        dropping_plan("triton", torch.float32)
    net = dropping_everywhere(dtype=torch.float32)
    net.stages[1].pop(2)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    with use_backend("triton"):
        rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
        reasons = ["no kernels of its backend have Dropout", "", ""]
        assert [row["reason"] for row in rows] == reasons
        assert [row["fused"] for row in rows] == [False, True, True]
        for seed in range(2):
            given = batch(net, seed=seed)
            found = seeded(seed, net.step, optimizer=optimizer, **given)
            compare(found, seeded(seed, plain_step, twin, optimizer=own, **given), 1e-5)
            assert_same(net, twin, 1e-5)
