"""Triton's kernels in its interpreter, or on a GPU where there is one, against the reference.

What the compilers make of them is in test_triton_compiled.py. The interpreter multiplies exactly
whatever precision is asked for, and does not notice reads out of bounds.
"""

import copy
import itertools

import pytest
import torch
from conftest import sample
from network_cases import OPTIMIZERS, batch, network, state_of
from sweep_problem import CASES, Problem, cast, fresh_state, problem, stages
from synthesizer_problem import Sizes, backward, forward
from synthesizer_problem import problem as of_synthesizer

import fastdni
from fastdni import ops, reference
from fastdni.reference import OptimizerSettings

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
fastdni.triton.load()


def on_device(value):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(DEVICE), value)


def compare(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        a, b = a.detach().cpu().double(), b.detach().double()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def run(one: Problem, **how) -> list[torch.Tensor]:
    """`Problem.run` in float32 on the device."""
    own = on_device(cast(one.given, torch.float32))
    data = on_device(cast([one.x, one.target, one.context], torch.float32))
    with fastdni.use_backend("triton"):
        plan = ops.SweepPlan(own, one.batch, one.criterion, **how)
    groups = [0 if one.active[s] else -1 for s in plan.parameter_stages]
    updated = [p for p, g in zip(plan.parameters, groups, strict=True) if g == 0]
    state = on_device(fresh_state(one.settings, updated))
    results = ops.sweep_(plan, *data, state, groups, ops.flat([one.settings]), one.active)
    return [*results, *plan.parameters, *state, *plan.statistics]


@pytest.mark.parametrize("name", CASES)
def test_a_step(name):
    one, _ = problem(name)
    compare(run(one), one.run("reference"), 2e-4)


@pytest.mark.parametrize(
    "settings, norm, activation, n_hidden, context",
    sample(
        itertools.product(
            ["gradient", "sgd", "nesterov", "momentum", "adam", "adamw"],
            [False, True], ["relu", "tanh", "sigmoid"], [0, 1], [False, True],
        ),
        every=17,
    ),
)  # fmt: skip
def test_combinations(settings, norm, activation, n_hidden, context):
    torch.manual_seed(0)
    given = {"norm": norm, "activation": activation, "n_hidden": n_hidden, "context": context}
    one = Problem(stages(**given), 21, settings=settings)
    compare(run(one), one.run("reference"), 2e-4)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("unlocked", [False, True])
def test_a_part_of_a_network(norm, unlocked):
    """More stages above: the topmost synthesizer learns from the gradient that comes back."""
    torch.manual_seed(0)
    given = stages(top=True, norm=norm, unlocked=unlocked, context=True)
    one = Problem(given, 20, criterion=None, explicit_context=True, settings="gradient")
    gradient = torch.randn(20, 5, dtype=torch.float64)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        move = on_device if backend == "triton" else (lambda value: value)
        own, x, ctx, of_top = move(cast([one.given, one.x, one.context, gradient], dtype))
        with fastdni.use_backend(backend):
            plan = ops.SweepPlan(own, 20, input_gradient=True)
        active = [1] * (len(own) + 1)
        output, _, of_input = ops.sweep_forward_(plan, x, None, ctx, active)
        state = [torch.zeros_like(p) for p in plan.parameters]
        how = ([0] * len(state), ops.flat([OptimizerSettings("gradient")]), active)
        losses = ops.sweep_update_(plan, of_top, state, *how)
        found.append([output, of_input, losses, *state, *plan.statistics])
    compare(*found, 2e-4)


def test_operands_are_rounded_to_bfloat16():
    one, _ = problem("mlp")
    found = run(one, precision="bfloat16")
    # Half a unit of an operand, where another order of a sum before moved it across.
    compare(found, one.run("reference", precision="bfloat16"), 4 * 2**-8)
    with pytest.raises(AssertionError):  # they were rounded at all
        compare(found, one.run("reference"), 1e-4)


@pytest.mark.parametrize("name", ["mlp", "unlocked"])
def test_tiles_in_parts(monkeypatch, name):
    """As the larger ones are, here of eight columns each."""
    from fastdni.triton import tile

    monkeypatch.setitem(tile.TILES, "exact", (tile.Tile(32, 32, 16, 4, 2, parts=4),))
    one, _ = problem(name)
    compare(run(one), one.run("reference"), 2e-4)


@pytest.mark.parametrize("name", ["mlp", "norm", "unlocked"])
def test_operands_by_descriptors(monkeypatch, name):
    """As on sm_90 and sm_100 from large sizes on: a few programs, each with many tiles."""
    from fastdni.triton import tile

    described = []
    small = tile.Tile(32, 32, 32, 4, 2, parts=2, described=True)
    monkeypatch.setattr(tile, "DESCRIBED", dict.fromkeys(tile.DESCRIBED, (small,)))
    monkeypatch.setattr(tile, "_DESCRIBED_FROM", 0)
    monkeypatch.setattr(tile, "_ENOUGH", 1)
    monkeypatch.setattr(tile, "has_descriptors", lambda device: described.append(1) or True)
    monkeypatch.setattr(tile, "multiprocessors", lambda device: 3)
    torch.manual_seed(0)
    kind = {"mlp": {"n_hidden": 1}, "norm": {"norm": True}}
    given = stages((48, 80, 16), context=True, **kind.get(name, {"unlocked": True}))
    given = [s._replace(synthesizer=_multiples_of_sixteen(s.synthesizer)) for s in given]
    one = Problem(given, 80, settings="gradient")
    found = run(one, precision="bfloat16")
    assert described
    # Sums before were in another order: some operands lie on the other side of a rounding.
    assert len(found) > 10
    for a, b in zip(found, one.run("reference", precision="bfloat16"), strict=True):
        assert (a.cpu().double() - b).norm() <= 2e-3 * (b.double().norm() + 1)


def _multiples_of_sixteen(synthesizer):
    """With hidden layers of the width of the output."""
    if synthesizer is None or len(synthesizer.weights) == 1:
        return synthesizer
    n = len(synthesizer.biases[-1])
    weights = [weight[:n, :n].contiguous() for weight in synthesizer.weights]
    biases = [bias[:n].contiguous() for bias in synthesizer.biases]
    of_context = [synthesizer.context_weight[:n].contiguous(), synthesizer.context_bias[:n]]
    return type(synthesizer)(weights, biases, *(t.contiguous() for t in of_context))


def test_rows_that_are_ignored_and_labels_that_are_none():
    one, _ = problem("plain")
    one.target[1] = -100
    compare(run(one), one.run("reference"), 2e-4)
    if DEVICE == "cuda":  # on the CPU the host looks, and refuses
        one.target[2] = 5
        output, loss, *_ = run(one)
        assert loss.isnan() and output.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "identity"])
def test_nan_stays_nan(activation):
    torch.manual_seed(0)
    one = Problem(stages(activation=activation), 4)
    one.x[1, 2] = torch.nan
    output, *_ = run(one)
    assert output[1].isnan().all() and output[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("settings", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("apart", [False, True], ids=["one launch", "numbers of their own"])
def test_an_update_by_numbers_on_the_host(settings, apart):
    """As Adam's are on a GPU without capturable=True; steps above find them on the device."""
    from sweep_problem import OPTIMIZERS

    from fastdni.triton.tile import Precision
    from fastdni.triton.update import Target, apply

    row = OPTIMIZERS[settings]
    other = row._replace(lr=row.lr / 2) if apart else row
    torch.manual_seed(0)
    grad, x = torch.randn(37, 40), torch.randn(37, 50)
    parameters = [torch.randn(40, 50), torch.randn(40), torch.randn(40)]
    gradients = [grad.T @ x, grad.sum(0), grad.sum(0)]
    expected, targets = [], []
    for parameter, gradient, own in zip(parameters, gradients, (row, other, row), strict=True):
        state = [s.abs() for s in fresh_state(own, [parameter])]
        count = reference.KEPT[own.rule]
        kept = on_device(cast(state[:count], torch.float32))
        mine = parameter.to(DEVICE, copy=True)
        targets.append(Target(mine, kept, own, 3.0))
        wide = cast([parameter, *state[:count]], torch.float64)
        steps = [torch.tensor(2.0)] if count == 2 else []
        reference.optimizer_update(own, wide[0], gradient.double(), [*wide[1:], *steps])
        expected += wide
    grad = grad.to(DEVICE)
    apply(grad, x.to(DEVICE), targets[0], grad, targets[1:], Precision("exact"))
    compare([t for target in targets for t in (target.value, *target.kept)], expected, 1e-5)


KINDS = {
    "plain": {},
    "mlp, context": {"n_hidden": 2, "context": True},
    "norm": {"norm": True, "context": True},
    "unlocked": {"unlocked": True, "n_hidden": 1},
}


@pytest.mark.parametrize(
    "name, kind", sample(itertools.product(sorted(OPTIMIZERS), KINDS), every=3)
)
def test_steps_of_a_network_equal_the_cpus(name, kind):
    # In front of a BatchNorm a bias' gradient is rounding noise, and Adam makes steps of it.
    how = KINDS[kind] | {"bias": not name.startswith("adam")}
    net = network((7, 20, 9, 5), **how).float()
    twin = copy.deepcopy(net)
    net.to(DEVICE)
    values = []
    for each, backend in ((net, "triton"), (twin, "cpu")):
        optimizer = OPTIMIZERS[name](each.parameters())
        results = []
        with fastdni.use_backend(backend):
            for seed in range(2):
                given = {
                    k: v.to(each.stages[0][0].weight.device)
                    if isinstance(v, torch.Tensor) else v
                    for k, v in batch(net, rows=20, seed=seed).items()
                }  # fmt: skip
                given["x"] = given["x"].float()
                mask = [True, seed != 1, True, True][: len(each.stages)]
                results += each.step(optimizer=optimizer, update_mask=mask, **given)
        values.append([*results, *each.state_dict().values(), *state_of(optimizer)])
    compare(*values, 1e-3 if name.startswith("adam") else 2e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's kernels stand for the CUDA backend's")
@pytest.mark.filterwarnings("error:.*lr_scheduler")
@pytest.mark.parametrize("name, how", [
    ("nesterov", {"norm": True, "context": True}), ("adam", {"unlocked": True}),
])  # fmt: skip
def test_auto_divides_a_network_by_the_size_of_its_stages(monkeypatch, name, how):
    """Each run of large stages goes to Triton, what lies between to compiled kernels; other
    batches, another division."""

    def by_size(stages, batch, precision):
        if fastdni.backend.choice() != "auto":
            return fastdni.backend.choice()
        width = max(stage.weight.shape[0] for stage in stages)
        return "triton" if batch * width >= 320 else "cpu"

    for where in ("fastdni.ops.sweep_backend", "fastdni.ops.sweep.sweep_backend"):
        monkeypatch.setattr(where, by_size)
    monkeypatch.setitem(fastdni.backend.TRITON_FROM, "exact", 0)
    net = network((7, 20, 16, 9, 8, 18, 5), bias=name != "adam", **how).float()
    twin = copy.deepcopy(net)
    divided = ["triton", "triton", "cpu", "cpu", "triton", "cpu"]
    steps = [(20, None, divided), (12, None, ["cpu"] * 6), (20, [True, False] * 3, divided)]
    values = []
    for each, backend in ((net, "auto"), (twin, "cpu")):
        optimizer = OPTIMIZERS[name](each.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        results = []
        with fastdni.use_backend(backend):
            for seed, (rows, mask, expected) in enumerate(steps):
                given = batch(each, rows=rows, seed=seed)
                for parameter in each.parameters():
                    parameter.grad = torch.ones_like(parameter)  # no part of a step
                results += each.step(optimizer=optimizer, update_mask=mask, **given)
                schedule.step()  # warns where no step was taken
                assert all(parameter.grad is None for parameter in each.parameters())
                served = [r["backend"] for r in fastdni.explain(each, given["x"], optimizer).rows]
                assert served == (expected if backend == "auto" else ["cpu"] * 6)
            for parameter in each.parameters():
                parameter.grad = None
            results += each.backward(**batch(each, rows=20))
            results += [parameter.grad for parameter in each.parameters()]
        values.append([*results, *each.state_dict().values(), *state_of(optimizer)])
    compare(*values, 1e-3 if name == "adam" else 2e-4)


@pytest.mark.parametrize(
    "dtype, n_hidden, shape",
    sample(
        itertools.product(
            [torch.float32, torch.float16, torch.bfloat16], [0, 2], [(37,), (3, 5), (1,), (0,)]
        ),
        every=5,
    ),
)
def test_a_synthesizers_ops_equal_the_reference(dtype, n_hidden, shape):
    one = of_synthesizer(shape, Sizes(33, 40, 5), n_hidden, dtype=dtype, device=DEVICE)
    found = []
    for name, of in (("triton", ops), ("reference", reference)):
        with fastdni.use_backend(name):
            found.append(backward(of, one, forward(of, one)))
    # Where the two round at other places a ReLU may open in one alone.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(*found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize(
    "shape, reduction, dtype",
    sample(
        itertools.product(
            [(0, 3), (1,), (), (5, 7, 3), (1030, 5)],
            ["batchmean", "mean"],
            [torch.float32, torch.float16, torch.bfloat16],
        )
    ),
)
def test_regression_loss(shape, reduction, dtype):
    given = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    if len(shape) == 2:
        given[0] = given[0].T.contiguous().T  # other strides than the target's
    for tensor in given:
        tensor.requires_grad_()
    found = []
    for name in ("triton", "reference"):
        with fastdni.use_backend(name):
            loss, error = fastdni.regression_loss(*given, reduction)
            grads = torch.autograd.grad(loss.float() + error.float().sum(), given)
            found.append([loss, error, *grads])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_same_bits_again():
    one, _ = problem("norm")
    assert all(map(torch.equal, run(one), run(one)))


def test_agreement_is_looked_at_and_holds():
    from fastdni import agreement

    assert agreement.disagreement(torch.device(DEVICE), "triton") is None


def test_the_ops_schemas_say_what_they_write():
    one, _ = problem("norm")
    own = on_device(cast(one.given, torch.float32))
    with fastdni.use_backend("triton"):
        plan = ops.SweepPlan(own, one.batch, one.criterion)
    x, target = on_device([one.x.float(), one.target])
    state = on_device(fresh_state(one.settings, plan.parameters))
    count = len(plan.parameters)
    arguments = (
        plan.runner.structure.number, x, target, None, plan.parameters, plan.statistics, state,
        [0] * count, ops.flat([one.settings]), one.active,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastdni.triton_sweep_, arguments, test_utils="test_schema")


@pytest.mark.parametrize("how", ["strided", "expanded"])
def test_labels_that_are_not_contiguous(how):
    one, _ = problem("one row")
    one = Problem(one.given, 6)
    labels = torch.tensor([[3, 1], [0, 4], [2, 2], [4, 0], [1, 3], [3, 1]])
    one.target = labels[:, 0] if how == "strided" else labels[0, :1].expand(6)
    found = {}
    for backend in ("triton", "reference"):
        own = on_device(cast(one.given, torch.float32))
        x, target = on_device([one.x.float(), one.target])
        with fastdni.use_backend(backend):
            plan = ops.SweepPlan(own, 6, "cross_entropy")
        state = [torch.zeros_like(p) for p in plan.parameters]
        how = ([0] * len(state), ops.flat([OptimizerSettings("gradient")]), one.active)
        found[backend] = [*ops.sweep_(plan, x, target, None, state, *how), *state]
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_logits_of_minus_infinity():
    """A whole block of them, too, in front of the others."""
    from fastdni.triton.loss import criterion

    h = torch.randn(3, 300)
    h[1, :200] = -torch.inf
    target = torch.tensor([4, 250, 299])
    loss, gradient = criterion(h.to(DEVICE), target.to(DEVICE), "cross_entropy", "identity")
    h.requires_grad_()
    expected = torch.nn.functional.cross_entropy(h, target)
    expected.backward()
    compare([loss, gradient], [expected, h.grad], 1e-5)


@pytest.mark.parametrize("change", [
    lambda t: t[:3], lambda t: t.bfloat16(), lambda t: t.T.contiguous().T, lambda t: t.double(),
])  # fmt: skip
def test_state_that_does_not_fit_is_refused(change):
    one, _ = problem("mlp")
    own = on_device(cast(one.given, torch.float32))
    with fastdni.use_backend("triton"):
        plan = ops.SweepPlan(own, one.batch, one.criterion)
    state = on_device(fresh_state(one.settings, plan.parameters))
    state[0] = change(state[0])
    before = [p.clone() for p in plan.parameters]
    how = ([0] * len(before), ops.flat([one.settings]), one.active)
    with pytest.raises(RuntimeError, match="optimizer state .* must be a contiguous torch.float32"):
        ops.sweep_(plan, on_device(one.x.float()), on_device(one.target), None, state, *how)
    assert all(map(torch.equal, before, plan.parameters))


def test_what_does_not_fit_is_refused():
    one, _ = problem("given context")
    for change, message in (
        ({"x": one.x[:, 1:]}, r"x must be \(B, K\) = \(4, 7\), got \(4, 6\)"),
        ({"context": one.context[:3]}, r"context must be \(B, C\) = \(4, 5\), got \(3, 5\)"),
        ({"target": one.target[:3]}, r"target must be \(B,\) = \(4,\), got \(3,\)"),
    ):
        twin, _ = problem("given context")
        vars(twin).update(change)
        with pytest.raises(RuntimeError, match=message):
            run(twin)
    net = network().to(DEVICE)  # float64
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch(net).items()}
    with fastdni.use_backend("triton"), pytest.raises(RuntimeError, match="no kernel for this op"):
        net.step(optimizer=optimizer, **given)
