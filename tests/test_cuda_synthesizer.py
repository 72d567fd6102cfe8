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
    params = {"dtype": np.dtype(number).name, "divisor": float(rows), "updates": 1}
    params |= {"rows": rows, "inputs": inputs, "outputs": outputs, "context": context}
    sizes = [rows * outputs] * 2 + [rows * inputs, outputs * inputs, outputs, outputs]
    sizes += [outputs * context, 1, rows * outputs]
    for size in (outputs * inputs, outputs):  # of the weight and the bias under Adam
        sizes += [size] * 3 + [1]
    return run(params | how, given(name, number), [(number, size) for size in sizes])


def expected(name):
    x, w, b, ctx, q, qb, target = given(name)
    prediction = np.maximum(x @ w.T + b + ctx @ q.T + qb, 0)
    error = prediction - target
    grad = 2 / len(x) * error
    sums = grad.sum(0)
    loss = (error**2).sum() / len(x)
    results = [prediction, grad, (grad @ w) * (x > 0), grad.T @ x, sums, sums, grad.T @ ctx, loss]
    return [*results, error, *adam(w, grad.T @ x), *adam(b, sums)]


def adam(value, gradient):
    """torch.optim's third step from averages of 0.5, with a weight decay."""
    gradient = gradient + 0.01 * value
    first, second = 0.8 * 0.5 + 0.2 * gradient, 0.9 * 0.5 + 0.1 * gradient**2
    root = np.sqrt(second) / np.sqrt(1 - 0.9**3) + 1e-8
    return [value - 0.1 / (1 - 0.8**3) * first / root, first, second, 3.0]


def compare(results, name, tolerance=1e-11):
    for a, b in zip(results, expected(name), strict=True):
        np.testing.assert_allclose(a, np.ravel(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("ready", [0, 1])
def test_layers_gradients_and_updates(name, ready):
    compare(found(built("plain"), name, ready=ready), name)


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
