"""The sweep: the kernels against the equations, for every optimizer and everything a stage may
be."""

import itertools

import pytest
import torch
from conftest import sample
from sweep_problem import OPTIMIZERS, Problem, cast, stages

from fastdni import ops, use_backend

CASES = sample(
    itertools.product(
        [False, True],  # norm
        ["identity", "relu", "tanh", "sigmoid"],
        [0, 1, 2],  # n_hidden
        [False, True],  # context
        [False, True],  # unlocked
        ["cross_entropy", "mse"],
        OPTIMIZERS,
        [True, False],  # bias
        [3, 30, 61],  # rows: one block, two, three
        [(), (1,), (0, 2)],  # masked
    ),
    every=101,
)


def problem(case, **how) -> Problem:
    norm, activation, n_hidden, context, unlocked, criterion, settings, bias, rows, masked = case
    given = stages(
        (7, 9, 33, 5),
        norm=norm,
        activation=activation,
        n_hidden=n_hidden,
        context=context,
        unlocked=unlocked,
        bias=bias,
    )
    return Problem(given, rows, criterion, settings, masked=masked, **how)


def assert_equal(found, wanted, tolerance):
    """Within `tolerance` of each tensor's largest value (or of one)."""
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        scale = max(b.abs().nan_to_num().max().item(), 1) if b.numel() else 1
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * scale, equal_nan=True,
            msg=lambda m, n=number: f"tensor {n} of {len(found)}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_results_are_right(case):
    # With 0.1 a first step may leave gradients of 1e5, and the second few digits.
    one = problem(case, rate=0.01)
    assert_equal(one.run("cpu", steps=2), one.run("reference", steps=2), 1e-10)


# Without a bias in front of a BatchNorm, whose gradient is what rounding leaves of zero.
PRECISE = [case for case in CASES[::3] if not (case[0] and case[7])]


@pytest.mark.parametrize("case", PRECISE, ids=lambda case: "-".join(map(str, case)))
def test_float32_results_are_right(case):
    """One step to 1e-5 of each tensor's largest value; the longest sums have 61 terms."""
    # The default's three rows leave a column of a BatchNorm nearly no variance, and few digits.
    one = problem(case, dtype=torch.float32, seed=1)
    found, oracle = one.run("cpu"), one.run("reference", torch.float64)
    assert {t.dtype for t in found} <= {torch.float32, torch.int64}
    assert_equal([t.double() for t in found], [t.double() for t in oracle], 1e-5)


@pytest.mark.parametrize("widths", [(1, 1, 1), (7, 1, 33, 2), (65, 257, 130, 10), (3,) * 22])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [2, 25, 100])
def test_results_are_right_in_every_size(widths, norm, rows):
    one = Problem(stages(widths, norm=norm, n_hidden=1, context=True), rows, settings="adam")
    assert_equal(one.run("cpu"), one.run("reference"), 1e-10)


def test_results_are_right_with_plain_averages_and_without_affine():
    for norm in ({"momentum": None}, {"affine": False}):
        one = Problem(stages(norm=True, **norm), 5, settings="adamw")
        assert_equal(one.run("cpu", steps=3), one.run("reference", steps=3), 1e-11)


@pytest.mark.parametrize("unlocked", [False, True])
def test_bfloat16_products_are_right(unlocked):
    """Against the equations with the operands of products rounded, in float64 otherwise; in a
    network small enough that no rounding happens to fall the other way."""
    one = Problem(
        stages((7, 9, 33, 5), n_hidden=1, context=True, unlocked=unlocked), 30, dtype=torch.float32
    )
    found = one.run("cpu", torch.float32, precision="bfloat16")
    oracle = one.run("reference", torch.float32, precision="bfloat16")
    exact = one.run("reference", torch.float32)
    assert_equal(found, oracle, 2e-3)
    rounded = max((a - b).abs().max().item() for a, b in zip(oracle, exact, strict=True))
    assert rounded > 1e-3, "the rounding shows"


@pytest.mark.parametrize("above", [False, True], ids=["masked above", "updated above"])
@pytest.mark.parametrize("unlocked", [False, True])
def test_a_part_of_a_network_is_right(above, unlocked):
    """Stages with something above them: what comes back is the topmost target. In complete
    unlock the part has two inputs, and hands up what the topmost I predicts."""
    given = stages((7, 9, 33), norm=True, n_hidden=1, top=True, unlocked=unlocked)
    torch.manual_seed(5)
    x, back = torch.randn(8, 7).double(), torch.randn(8, 33).double()
    network_input = torch.randn(8, 7).double() if unlocked else None
    active = [1, 1, int(above)]
    found = {}
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            plan = ops.SweepPlan(
                cast(given, torch.float64), 8, None, input_gradient=True, separate_input=unlocked
            )
        output, _, gradient = ops.sweep_forward_(
            plan, x, None, None, active, network_input=network_input
        )
        groups = [0 if active[s] else -1 for s in plan.parameter_stages]
        losses = ops.sweep_update_(
            plan, back if above else None, [], groups, ops.flat([OPTIMIZERS["sgd"]]), active
        )
        assert losses.reshape(-1, 2).isnan().tolist() == [[False, not above]] * (1 + unlocked)
        found[backend] = [output, gradient, losses, *plan.parameters, *plan.statistics]
    assert_equal(found["cpu"], found["reference"], 1e-11)


def bits(threads: int, dtype=torch.float32) -> list[torch.Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    given = stages((70, 300, 200, 10), norm=True, n_hidden=1, context=True)
    return Problem(given, 300, settings="adam", dtype=dtype).run("cpu", steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_again_and_with_any_number_of_threads(dtype):
    first = bits(2, dtype)
    for threads in (2, 1, 3):
        assert all(map(torch.equal, first, bits(threads, dtype)))


def test_nan_and_infinity_spread_as_in_the_reference():
    one = Problem(stages(activation="relu"), 6)
    one.x[2, 3], one.x[4, 1] = float("nan"), float("inf")
    found, wanted = one.run("cpu"), one.run("reference")
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_rows_that_are_ignored():
    one = Problem(stages(context=True), 6)
    one.target[1] = one.target[5] = -100
    assert_equal(one.run("cpu"), one.run("reference"), 1e-11)
    one.target.fill_(-100)
    found = one.run("cpu")
    assert found[1].isnan(), "as torch's cross_entropy"
    assert_equal(found, one.run("reference"), 1e-11)


def test_a_long_batch_is_right():
    """On a GPU some sums are divided, and torch's library makes the weights' gradients."""
    torch.manual_seed(0)
    problem = Problem(stages((3, 2)), 16_400, settings="adam")
    problem.target[::5] = -100
    for a, b in zip(problem.run("cpu"), problem.run("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
