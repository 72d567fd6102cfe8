"""CUDA kernels and their launchers, run on the host (tests/simt) without a GPU."""

import functools
import itertools
import math

import numpy as np
import pytest
from conftest import sample
from simt.build import Fault, HostRunError, Unavailable, build

# dtype -> (as stored, accumulate_t). bfloat16 travels as the upper halves of float32 words.
DTYPES = {
    "float32": (np.float32, np.float32),
    "float64": (np.float64, np.float64),
    "bfloat16": (np.uint16, np.float32),
}

# The constants of csrc/cuda/kernels/regression_loss.h.
CHUNK, ONE_BLOCK, MAX_BLOCKS = 4096, 4 * 4096, 512
PER_THREAD = 8
BLOCKS = {
    **dict.fromkeys([0, 1, 7, 32, 33, 255, 1023, 1024, CHUNK, CHUNK + 1, ONE_BLOCK], 1),
    ONE_BLOCK + 1: 5,
    10 * CHUNK - 3: 10,
    MAX_BLOCKS * CHUNK + 5: MAX_BLOCKS,
}
UP_TO_FIVE_BLOCKS = [n for n in BLOCKS if n <= ONE_BLOCK + 1]


TWO_PASSES = ("float32", ONE_BLOCK + 1)
BUILDS = [functools.partial(build, "regression_loss", v) for v in ("plain", "address", "thread")]


def built(variant, fault=None):
    try:
        return build("regression_loss", variant, fault)
    except Unavailable as reason:
        pytest.skip(str(reason))


def example(dtype, n):
    """prediction and target as stored, and the error they must give, bit by bit."""
    random = np.random.default_rng(n)
    stored, accumulate = DTYPES[dtype]
    arrays = [random.standard_normal(n).astype(accumulate) for _ in range(2)]
    if dtype == "bfloat16":
        arrays = [(a.view(np.uint32) >> 16).astype(np.uint16) for a in arrays]
        prediction, target = [(a.astype(np.uint32) << 16).view(np.float32) for a in arrays]
    else:
        prediction, target = arrays
    return arrays, prediction - target


def regression_loss(run, dtype, arrays, divisor=3.0, **params):
    n = len(arrays[0])
    accumulate = DTYPES[dtype][1]
    error, loss, blocks = run(
        {"dtype": dtype, "n": n, "divisor": divisor, **params},
        arrays,
        [(accumulate, n), (accumulate, 1), (np.int64, 1)],
    )
    return error, loss[0], blocks[0]


def check(dtype, n, result, divisor=3.0):
    error, loss, blocks = result
    expected = example(dtype, n)[1]
    np.testing.assert_array_equal(error, expected)
    assert blocks == BLOCKS[n]
    # Every term is positive, so each rounding on a term's way to the loss costs at most half an
    # eps: its square, the sums of its thread, two block sums of ten steps each, the division.
    chunks = math.ceil(n / CHUNK / BLOCKS[n])
    roundings = 1 + PER_THREAD * chunks + 2 * 10 + 1
    reference = math.fsum(expected.astype(np.float64) ** 2) / divisor
    tolerance = roundings * float(np.finfo(error.dtype).eps) / 2
    assert float(loss) == pytest.approx(reference, rel=tolerance, abs=0)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("n", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_regression_loss(dtype, n):
    check(dtype, n, regression_loss(built("plain"), dtype, example(dtype, n)[0]))


@pytest.mark.parametrize(
    "n, dtype",
    sample(
        itertools.product([7, CHUNK + 1, ONE_BLOCK, ONE_BLOCK + 1, MAX_BLOCKS * CHUNK + 5], DTYPES)
    ),
)
def test_regression_loss_has_the_same_bits_in_any_order_of_threads(dtype, n):
    run = built("plain")
    arrays = example(dtype, n)[0]
    first = regression_loss(run, dtype, arrays)
    assert_same_bits(first, regression_loss(run, dtype, arrays))
    for seed in (1, 2):
        assert_same_bits(first, regression_loss(run, dtype, arrays, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_regression_loss_has_the_same_bits_without_alignment(dtype):
    run = built("plain")
    arrays = example(dtype, ONE_BLOCK + 1)[0]
    first = regression_loss(run, dtype, arrays)
    assert_same_bits(first, regression_loss(run, dtype, arrays, offset=1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("n", [7, ONE_BLOCK + 1])
def test_regression_loss_propagates(n, value):
    arrays = example("float32", n)[0]
    arrays[0][n // 2] = value
    error, loss, _ = regression_loss(built("plain"), "float32", arrays)
    np.testing.assert_array_equal(error, arrays[0] - arrays[1])
    np.testing.assert_array_equal(loss, np.float32(value))


@pytest.mark.parametrize(
    "offset, n, dtype", sample(itertools.product([0, 1], UP_TO_FIVE_BLOCKS, DTYPES))
)
def test_regression_loss_stays_in_bounds(dtype, n, offset):
    arrays = example(dtype, n)[0]
    check(dtype, n, regression_loss(built("address"), dtype, arrays, offset=offset))


@pytest.mark.parametrize(
    "seed, dtype, n",
    sample([(s, *each) for s in (1, 2) for each in [*((d, 33) for d in DTYPES), TWO_PASSES]], 5),
)
def test_regression_loss_has_no_race(dtype, n, seed):
    check(dtype, n, regression_loss(built("thread"), dtype, example(dtype, n)[0], seed=seed))


BLOCK_SUM, KERNELS = "cuda/kernels/block_reduce.cuh", "cuda/kernels/regression_loss.cuh"
BARRIER = "  __syncthreads();\n"


@pytest.mark.parametrize(
    "variant, report, n, offset, fault",
    [
        pytest.param(*row[1:], id=row[0])
        for row in [
            ("no_barrier", "thread", "data race", 33, 0, Fault(BLOCK_SUM, BARRIER, "")),
            (
                "barrier_in_one_warp",
                "plain",
                "deadlock",
                33,
                0,
                Fault(BLOCK_SUM, BARRIER, "  if (warp == 0) __syncthreads();\n"),
            ),
            (
                "shared_past_the_end",
                "address",
                "heap-buffer-overflow",
                33,
                0,
                Fault(BLOCK_SUM, "lane < kWarps ?", "lane <= kWarps ?"),
            ),
            (
                "input_past_the_end",
                "address",
                "heap-buffer-overflow",
                33,
                0,
                Fault(
                    "cuda/kernels/vector.cuh", "begin + k < n ? source", "begin + k <= n ? source"
                ),
            ),
            (
                "vector_unaligned",
                "address",
                "misaligned address",
                CHUNK,
                1,
                Fault(KERNELS, "aligned && (chunk + 1)", "(chunk + 1)"),
            ),
            (
                "blocks_share_a_partial_sum",
                "thread",
                "data race",
                ONE_BLOCK + 1,
                0,
                Fault(KERNELS, "args.partials[blockIdx.x] =", "args.partials[0] ="),
            ),
        ]
    ],
)
def test_a_planted_fault_is_caught(variant, report, n, offset, fault):
    run = built(variant, fault)
    with pytest.raises(HostRunError, match=report):
        regression_loss(run, "float64", example("float64", n)[0], offset=offset)


def test_a_removed_barrier_shows_in_the_result():
    run = built("plain", Fault(BLOCK_SUM, BARRIER, ""))
    _, loss, _ = regression_loss(run, "float64", example("float64", 33)[0], seed=1)
    assert np.isnan(loss)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"dtype": "float32", "divisor": 1}, "missing n="),
        ({"dtype": "float32", "divisor": 1, "n": "x"}, "n=x is not a number"),
        ({"dtype": "float32", "divisor": 1, "n": 4}, "standard input ended early"),
        ({"dtype": "float32", "divisor": 1, "n": 0, "m": 0}, "unknown m="),
        ({"dtype": "int8"}, "unknown dtype=int8"),
    ],
)
def test_bad_arguments_of_a_host_run(params, message):
    with pytest.raises(HostRunError, match=f"exit code 2\nhost_kernels: {message}\n$"):
        built("plain")(params)
