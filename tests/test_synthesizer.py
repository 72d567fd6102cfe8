"""The synthesizer's ops against fastdni.reference and against autograd of the plain formula."""

import itertools

import pytest
import torch
from conftest import sample
from layouts import LAYOUTS
from synthesizer_problem import (
    PARTS,
    Sizes,
    as_one,
    assert_right,
    backward,
    forward,
    plain_autograd,
    problem,
)
from tolerances import assert_near

import fastdni
from fastdni import _C, ops, reference
from fastdni.ops import SynthesizerParameters

RAW = torch.ops.fastdni
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
REDUCTIONS = ["batchmean", "mean"]

# ---- results ----

CASES = list(
    itertools.product(
        [(0,), (1,), (3,), (64,), (2, 5), (2, 0, 3), ()],
        [Sizes(1, 1, 1), Sizes(7, 5, 3), Sizes(33, 64, 20), Sizes(64, 64, 64), Sizes(33, 256, 70)],
        [0, 1, 2, 3],
        [True, False],
        [True, False],
        DTYPES,
        REDUCTIONS,
    )
)


def name(value):
    if isinstance(value, Sizes):
        return f"{value.trigger}_{value.hidden}_{value.output}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "no_batch"
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(
    ("leading", "sizes", "n_hidden", "context", "bias", "dtype", "reduction"),
    sample(CASES, every=37),
    ids=name,
)
def test_results_are_right(leading, sizes, n_hidden, context, bias, dtype, reduction, device):
    p = problem(leading, sizes, n_hidden, context, bias, dtype, device)
    before = [x.clone() for x in p.tensors()]
    assert_right(p, reduction)
    assert all(torch.equal(x, y) for x, y in zip(p.tensors(), before, strict=True))
    assert all(x._version == 0 for x in p.tensors())


@pytest.mark.parametrize("n_hidden", [0, 1, 2, 3])
def test_bfloat16_is_as_good_as_autograd_from_end_to_end(n_hidden):
    """By the mean error, on sizes that make it one: a ReLU may open for one and not the other."""
    p = problem((256,), Sizes(64, 64, 64), n_hidden, dtype=torch.bfloat16)
    activations = forward(ops, p)
    loss, *grads = backward(ops, p, activations)
    result = [activations[0], loss, as_one(grads)]
    oracle = plain_autograd(p.to(torch.float64))
    for ours, plain, true in zip(result, plain_autograd(p), oracle, strict=True):
        error, allowed = [(x.double() - true).norm() / true.norm() for x in (ours, plain)]
        assert error <= 1.5 * allowed + torch.finfo(torch.bfloat16).eps / 4


@pytest.fixture(params=["onednn", "mkl"])
def library(request):
    usable = _C.onednn_enabled()
    if request.param == "onednn" and not usable:
        pytest.skip("this torch has not the oneDNN product that fastdni was written for")
    _C.enable_onednn(request.param == "onednn")
    yield request.param
    _C.enable_onednn(usable)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("context", [True, False])
def test_large_products_are_right_in_both_libraries(context, layout, library):
    assert _C.product_library(512, 256, 256) == library
    assert _C.product_library(256, 256, 512) == library
    p = problem((512,), Sizes(256, 256, 256), 1, context)
    p = p._replace(trigger=LAYOUTS[layout](p.trigger))
    weights = [LAYOUTS[layout](w) for w in p.parameters.weights]
    assert_right(p._replace(parameters=p.parameters._replace(weights=weights)))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("rows, sizes", [(1, (1, 5, 3)), (5, (3, 1, 7)), (64, (40, 64, 33))])
def test_small_products_are_right_by_own_kernels(rows, sizes, layout):
    """Of every edge: one row, one column, depths and widths that fill no vector."""
    assert _C.product_library(rows, *sizes[:2]) == "own"
    for dtype in (torch.float32, torch.float64):
        p = problem((rows,), Sizes(*sizes), 1, True, dtype)
        p = p._replace(trigger=LAYOUTS[layout](p.trigger))
        weights = [LAYOUTS[layout](w) for w in p.parameters.weights]
        assert_right(p._replace(parameters=p.parameters._replace(weights=weights)))


def test_many_rows():
    """Many chunks of 16 (csrc/cpu/kernels/synthesizer.h), and a part of one."""
    assert_right(problem((64 * 16 * 2 + 7,), Sizes(7, 9, 5), 2))


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=name)
def test_any_layout_will_do(leading, part, layout):
    p = problem(leading, n_hidden=2)
    if part in p._fields:
        p = p._replace(**{part: LAYOUTS[layout](getattr(p, part))})
    else:
        old = getattr(p.parameters, part)
        new = [LAYOUTS[layout](x) for x in old] if isinstance(old, list) else LAYOUTS[layout](old)
        p = p._replace(parameters=p.parameters._replace(**{part: new}))
    assert_right(p)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
def test_activations_may_lie_anyhow_too(layout):
    p = problem(n_hidden=2)
    activations = [LAYOUTS[layout](x) for x in forward(ops, p)]
    oracle = backward(reference, p.to(torch.float64), [x.double() for x in activations])
    assert_near(backward(ops, p, activations), oracle, backward(reference, p, activations))


@pytest.mark.parametrize("leading", [(3,), (2, 3), ()], ids=name)
@pytest.mark.parametrize("empty", Sizes._fields)
def test_a_width_may_be_zero(empty, leading):
    assert_right(problem(leading, Sizes(5, 6, 3)._replace(**{empty: 0})))


def test_an_empty_batch_has_loss_and_gradients_zero():
    p = problem((0,), n_hidden=2)
    loss, *grads = backward(ops, p, forward(ops, p))
    assert loss.item() == 0
    assert [g.shape for g in grads] == [x.shape for x in p.parameters.tensors()]
    assert not any(g.any() for g in grads)


def test_float16_is_served_by_the_reference():
    p = problem(dtype=torch.float16)
    assert_near(forward(ops, p), forward(reference, p.to(torch.float64)), forward(reference, p))
    assert backward(ops, p, forward(ops, p))[0].dtype == torch.float16


def test_the_reference_backend_agrees(device):
    p = problem((7,), n_hidden=2, device=device)
    with fastdni.use_backend("reference"):
        activations = forward(ops, p)
        results = backward(ops, p, activations)
    assert_near(activations, [x.double() for x in forward(ops, p)])
    assert_near(results, [x.double() for x in backward(ops, p, forward(ops, p))])


# ---- the ops as torch sees them ----


class Regression(torch.autograd.Function):
    """The loss by the two raw ops, differentiable in the parameters."""

    @staticmethod
    def forward(ctx, p, reduction, *tensors):
        p = p._replace(parameters=with_tensors(p.parameters, tensors))
        prediction, hidden = RAW.synthesizer_fwd(p.trigger, p.context, *p.parameters)
        loss, ctx.grads = RAW.synthesizer_bwd(
            p.target,
            prediction,
            hidden,
            p.trigger,
            p.context,
            p.parameters.weights,
            len(p.parameters.biases) > 0,
            reduction,
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return None, None, *(grad_loss * grad for grad in ctx.grads)


def with_tensors(parameters: SynthesizerParameters, tensors) -> SynthesizerParameters:
    """Other tensors, given in the order of `parameters.tensors()`."""
    left = list(tensors)
    weights = [left.pop(0) for _ in parameters.weights]
    biases = [left.pop(0) for _ in parameters.biases]
    return SynthesizerParameters(weights, biases, *left)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("n_hidden", [0, 1, 2])
def test_gradcheck(n_hidden, context, bias, reduction):
    p = problem((2, 3), n_hidden=n_hidden, context=context, bias=bias, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in p.parameters.tensors()]
    assert torch.autograd.gradcheck(lambda *x: Regression.apply(p, reduction, *x), leaves)


@pytest.mark.parametrize(
    ("leading", "dtype", "layout"),
    sample(itertools.product([(0,), (4,), (2, 3)], DTYPES, ["contiguous", "transposed"]), every=5),
    ids=name,
)
def test_opcheck(leading, dtype, layout):
    # The second's trigger is narrow: csrc/cpu/product.cpp takes such a weight's gradient apart.
    for sizes, n_hidden, extras in ((Sizes(5, 6, 3), 0, False), (Sizes(2, 16, 3), 2, True)):
        p = problem(leading, sizes, n_hidden, context=extras, bias=extras, dtype=dtype)
        weights = [LAYOUTS[layout](w) for w in p.parameters.weights]
        arguments = (p.trigger, p.context, *p.parameters._replace(weights=weights))
        torch.library.opcheck(RAW.synthesizer_fwd.default, arguments)
        torch.library.opcheck(RAW.synthesizer_check.default, arguments)
        prediction, hidden = RAW.synthesizer_fwd(*arguments)
        arguments = (p.target, prediction, hidden, p.trigger, p.context, weights, extras, "mean")
        torch.library.opcheck(RAW.synthesizer_bwd.default, arguments)


def test_compiles_to_one_graph():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(p):
        activations = forward(ops, p)
        return activations + backward(ops, p, activations)

    for rows in (6, 11):
        p = problem((rows,), n_hidden=2)
        wide = p.to(torch.float64)
        oracle = forward(reference, wide)
        assert_near(compiled(p), oracle + backward(reference, wide, oracle))


# ---- promises ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_in_every_run(dtype):
    p = problem((256,), Sizes(200, 256, 190), 1, dtype=dtype)
    activations = forward(ops, p)
    first = activations + backward(ops, p, activations)
    for _ in range(5):
        again = forward(ops, p)
        again += backward(ops, p, again)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_any_number_of_threads_will_do(dtype):
    p = problem((300,), Sizes(200, 256, 190), 1, dtype=dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_right(p)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_nan_and_infinity_propagate_as_in_the_formula(part, value):
    p = problem((8,), Sizes(20, 18, 17), 2)
    named = {**p._asdict(), **p.parameters._asdict()}
    for tensor in named[part] if isinstance(named[part], list) else [named[part]]:
        tensor.view(-1)[1] = value
    assert_right(p)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_in_an_activation(which, value):
    """Also in a hidden one: there the ReLU lets the gradient through, as torch's does."""
    p = problem((8,), Sizes(20, 18, 17), 2)
    activations = forward(ops, p)
    activations[which][3, 5] = value
    oracle = backward(reference, p.to(torch.float64), [x.double() for x in activations])
    plain = backward(reference, p, activations)
    assert not all(x.isfinite().all() for x in plain)
    assert_near(backward(ops, p, activations), oracle, plain)


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_a_float32_target_meets_a_bfloat16_prediction_unrounded(reduction):
    p = problem((33,), Sizes(7, 9, 11), 1, True, dtype=torch.bfloat16)
    prediction, *hidden = forward(ops, p)
    # A target so near the prediction that rounding it to bfloat16 would leave no error at all.
    target = prediction.float() * (1 + 2**-10)
    arguments = (prediction, hidden, p.trigger, p.context, p.parameters.weights, True, reduction)
    loss, grads = ops.synthesizer_bwd(target, *arguments)
    wanted_loss, wanted_grads = reference.synthesizer_bwd(target, *arguments)
    assert loss > 0
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(grads, wanted_grads, rtol=0.02, atol=1e-6)
