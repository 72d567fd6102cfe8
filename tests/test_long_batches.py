"""Sums over long batches in float32: within 3 times the error that plain PyTorch makes, at any
length (the bound is `assert_near`'s)."""

import numpy as np
import pytest
import torch
from simt.build import Unavailable, build
from sweep_problem import OPTIMIZERS, Problem, cast, stages
from synthesizer_problem import Sizes, backward, forward, problem
from tolerances import assert_near

import fastdni
from fastdni import ops, reference, use_backend

# Rows and widths: memory for the oracle in float64 is what limits them.
SIZES = {"262,144 rows": (262_144, (5, 8, 4)), "a million rows": (1_000_000, (3, 4, 2))}
KINDS = {
    "mlp, context": {"context": True, "n_hidden": 1},
    "norm": {"norm": True, "bias": False},  # a bias before BatchNorm has a gradient of noise
    "unlocked": {"unlocked": True},
}


def gradients(one: Problem, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, every gradient and the running statistics of a step."""
    own = cast(cast(one.given, torch.float32), dtype)
    x, target = (cast(cast(t, torch.float32), dtype) for t in (one.x, one.target))
    with use_backend(backend):
        plan = ops.SweepPlan(own, one.batch, one.criterion)
    found = [torch.zeros_like(p) for p in plan.parameters]
    settings = ops.flat([OPTIMIZERS["gradient"]])
    _, *losses = ops.sweep_(plan, x, target, None, found, [0] * len(found), settings, one.active)
    return [*losses, *found, *(t for t in plan.statistics if t.is_floating_point())]


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_step(size, kind, criterion):
    torch.manual_seed(0)
    rows, widths = SIZES[size]
    how = {k: v for k, v in KINDS[kind].items() if criterion != "mse" or k != "context"}
    one = Problem(stages(widths, **how), rows, criterion)
    plain, oracle = (gradients(one, "reference", d) for d in (torch.float32, torch.float64))
    assert_near(gradients(one, "cpu", torch.float32), oracle, plain)


@pytest.mark.parametrize("equal", [False, True], ids=["random", "all rows equal"])
@pytest.mark.parametrize("rows", [256, 300, 5_000, 262_144, 1_000_000])
def test_a_synthesizers_gradients(rows, equal):
    """Where all rows are equal the roundings of a long sum add up."""
    torch.manual_seed(0)
    p = problem((rows,), Sizes(3, 4, 2), 1, context=False)
    if equal:
        trigger, target = (t[:1].expand_as(t).contiguous() for t in (p.trigger, p.target))
        p = p._replace(trigger=trigger, target=target)

    with use_backend("cpu"), torch.no_grad():
        found = backward(ops, p, forward(ops, p))
    plain, oracle = (
        backward(reference, q, forward(reference, q)) for q in (p, p.to(torch.float64))
    )
    assert_near(found, oracle, plain)


@pytest.mark.parametrize("rows", [64, 65, 128, 5_000, 262_144, 1_000_000])
def test_a_bias_of_equal_gradients(rows):
    """Of a head alone."""
    torch.manual_seed(0)
    one = Problem(stages((1, 3), activation="identity"), rows, "mse")
    one.x, one.target = one.x[:1].expand_as(one.x), one.target[:1].expand_as(one.target)
    plain, oracle = (gradients(one, "reference", d) for d in (torch.float32, torch.float64))
    assert_near(gradients(one, "cpu", torch.float32), oracle, plain)


@pytest.mark.parametrize("equal", [False, True], ids=["random", "all equal"])
def test_regression_loss(equal):
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 1_000_000, 4)
    if equal:
        prediction, target = (t[:1].expand_as(t).contiguous() for t in (prediction, target))
    oracle = reference.regression_loss(prediction.double(), target.double(), "batchmean")
    plain = reference.regression_loss(prediction, target, "batchmean")
    with use_backend("cpu"):
        assert_near(ops.regression_loss(prediction, target, "batchmean"), oracle, plain)


@pytest.mark.parametrize("equal", [False, True], ids=["random", "all rows equal"])
def test_the_cuda_kernels_column_sums(equal):
    """Those of a synthesizer's gradient, and its weight's, in the kernels' own sums."""
    try:
        run = build("synthesizer", "plain")
    except Unavailable as reason:
        pytest.skip(str(reason))
    rows, inputs, outputs = 65_536, 2, 3
    torch.manual_seed(0)
    x, target = torch.rand(rows, inputs), torch.randn(rows, outputs) - 1
    if equal:
        x, target = (t[:1].expand_as(t).contiguous() for t in (x, target))
    weight, bias = torch.rand(outputs, inputs), torch.rand(outputs)
    nothing = torch.zeros(rows, 1), torch.zeros(outputs, 1), torch.zeros(outputs)
    sizes = [rows * outputs] * 2 + [rows * inputs, outputs * inputs, outputs, outputs, outputs, 1]
    params = {"dtype": "float32", "divisor": float(rows), "rows": rows}
    params |= {"inputs": inputs, "outputs": outputs, "context": 1}
    given = [t.numpy() for t in (x, weight, bias, *nothing, target)]
    found = [
        torch.from_numpy(a.copy()) for a in run(params, given, [(np.float32, n) for n in sizes])
    ]
    grad = found[1].view(rows, outputs)
    wide = grad.double()
    assert_near(found[3].view(outputs, inputs), wide.T @ x.double(), grad.T @ x)
    assert_near(found[4:6], [wide.sum(0)] * 2, [grad.sum(0)] * 2)


def close(found: torch.Tensor, oracle: torch.Tensor) -> None:
    """Within a few units: the long sums are joined in float64."""
    torch.testing.assert_close(found.cpu().double(), oracle, rtol=2e-6, atol=0)


def test_tritons_sums():
    pytest.importorskip("triton", reason="Triton is not installed")
    fastdni.triton.load()
    from fastdni.triton.loss import total
    from fastdni.triton.norm import norm, norm_gradient
    from fastdni.triton.tile import Precision
    from fastdni.triton.update import Target, apply

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows, columns = 65_536, 3
    number = torch.full((500_000,), 0.3)
    close(total(number.to(device), 2.0), number.double().sum() / 2)

    # Far from zero, and all of one sign: what is lost adds up.
    z, du = torch.rand(2, rows, columns) + 1
    scale, shift = torch.ones(2, columns)
    running = torch.zeros(columns), torch.zeros(columns), torch.tensor(0)
    own = reference.SweepNorm(scale, shift, running, 1.0, 0.0)
    on_device = own._replace(
        weight=scale.to(device), bias=shift.to(device), running=tuple(t.to(device) for t in running)
    )
    _, normalized, inverse = norm(z.to(device), on_device, "identity")
    close(on_device.running[0], z.double().mean(0))
    close(on_device.running[1], z.double().var(0))
    _, of_gamma, of_beta = norm_gradient(du.to(device), normalized, inverse, on_device)
    close(of_beta, du.double().sum(0))
    oracle = (du.double() * normalized.cpu().double()).sum(0)
    torch.testing.assert_close(of_gamma.cpu().double(), oracle, rtol=0, atol=2e-6 * rows)

    x, labels = torch.rand(rows, 2), torch.randint(2, (rows,))
    for given in (x, labels):
        weight, bias = (torch.zeros(size, device=device) for size in ((columns, 2), (columns,)))
        targets = [Target(t, [torch.zeros_like(t)], OPTIMIZERS["gradient"]) for t in (weight, bias)]
        grad, precision = du.to(device), Precision("exact")
        apply(grad, given.to(device), targets[0], grad, targets[1:], precision)
        close(targets[1].kept[0], du.double().sum(0))
        wide = reference.one_hot(labels, 2, du) if given is labels else x
        torch_s = du.T @ wide
        assert_near(targets[0].kept[0].cpu(), du.double().T @ wide.double(), torch_s)
