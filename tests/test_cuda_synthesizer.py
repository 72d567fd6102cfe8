"""The synthesizer's CUDA kernels and launchers, run on the host (tests/simt) in float64 against the
equations."""

import functools

import numpy as np
import pytest
from simt.build import Fault, HostRunError, Unavailable, build

SIZES = {
    "one of each": (1, 1, 1, 1),
    "one row": (1, 5, 7, 3),
    "one column": (20, 9, 1, 1),
    "odd": (33, 70, 65, 5),
    "vectors": (32, 64, 64, 8),
    "deep": (17, 300, 20, 130),
}


def built(variant, fault=None):
    try:
        return build("synthesizer", variant, fault)
    except Unavailable as reason:
        pytest.skip(str(reason))


def given(name, number=np.float64):
    rows, inputs, outputs, context = SIZES[name]
    random = np.random.default_rng(len(name))
    shapes = [(rows, inputs), (outputs, inputs), (outputs,), (rows, context)]
    shapes += [(outputs, context), (outputs,), (rows, outputs)]
    return [random.standard_normal(shape).astype(number) for shape in shapes]


def found(run, name, number=np.float64, **how):
    rows, inputs, outputs, context = SIZES[name]
    params = {"dtype": np.dtype(number).name, "divisor": float(rows)}
    params |= {"rows": rows, "inputs": inputs, "outputs": outputs, "context": context}
    sizes = [rows * outputs] * 2 + [rows * inputs, outputs * inputs, outputs, outputs]
    sizes += [outputs * context, 1]
    return run(params | how, given(name, number), [(number, size) for size in sizes])


def expected(name):
    x, w, b, ctx, q, qb, target = given(name)
    prediction = np.maximum(x @ w.T + b + ctx @ q.T + qb, 0)
    error = prediction - target
    grad = 2 / len(x) * error
    sums = grad.sum(0)
    loss = (error**2).sum() / len(x)
    return [prediction, grad, (grad @ w) * (x > 0), grad.T @ x, sums, sums, grad.T @ ctx, loss]


def compare(results, name, tolerance=1e-11):
    for a, b in zip(results, expected(name), strict=True):
        np.testing.assert_allclose(a, np.ravel(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SIZES)
def test_layers_and_gradients(name):
    compare(found(built("plain"), name), name)


@pytest.mark.parametrize("name", ["odd", "deep"])
def test_the_same_bits_in_any_order_of_threads(name):
    run = built("plain")
    first = found(run, name, np.float32)
    compare(first, name, 2e-4)
    for seed in (1, 2):
        again = found(run, name, np.float32, seed=seed)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", SIZES)
def test_stays_in_bounds(name):
    compare(found(built("address"), name), name)


@pytest.mark.parametrize("name", ["one row", "odd"])
def test_has_no_race(name):
    compare(found(built("thread"), name, seed=1), name)


FAULT = Fault(
    "cuda/kernels/synthesizer.cuh",
    "if (output < args.outputs && column < args.inputs)",
    "if (output < args.outputs)",
)


def test_a_planted_fault_is_caught():
    run = built("address", FAULT)
    with pytest.raises(HostRunError, match="AddressSanitizer: heap"):
        found(run, "one column")


BUILDS = [
    *(functools.partial(build, "synthesizer", v) for v in ("plain", "address", "thread")),
    functools.partial(build, "synthesizer", "address", FAULT),
]
