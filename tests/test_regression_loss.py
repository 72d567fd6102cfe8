"""regression_loss against fastdni.reference in float64."""

import itertools
import re

import pytest
import torch
from conftest import sample
from layouts import LAYOUTS
from tolerances import assert_near

import fastdni
from fastdni import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
REDUCTIONS = ["batchmean", "mean"]
# Elements of one chunk of the CPU kernel, csrc/cpu/kernels/regression_loss.h.
CHUNK = 4096
SHAPES = [
    (),
    (1,),
    (0,),
    (0, 3),
    (3, 0),
    (1, 7),
    (33, 1),
    (3, 5, 7),
    (2, 3, 4, 5),
    (CHUNK,),
    (CHUNK + 1,),
    (5, CHUNK - 1),
    (123, 1001),
]
CASES = list(itertools.product(SHAPES, DTYPES, REDUCTIONS, LAYOUTS, LAYOUTS))


def name(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "0d"
    return str(value).removeprefix("torch.")


def example(shape, dtype=torch.float32, device="cpu", layouts=("contiguous", "contiguous")):
    """prediction and target."""
    return [LAYOUTS[x](torch.randn(shape, device=device).to(dtype)) for x in layouts]


def assert_right(prediction, target, reduction, result):
    oracle = reference.regression_loss(prediction.double(), target.double(), reduction)
    plain = reference.regression_loss(prediction, target, reduction)
    assert_near(result, oracle, plain)


@pytest.mark.parametrize(
    ("shape", "dtype", "reduction", "prediction_layout", "target_layout"),
    sample(CASES, every=23),
    ids=name,
)
def test_forward_is_right(shape, dtype, reduction, prediction_layout, target_layout, device):
    prediction, target = example(shape, dtype, device, (prediction_layout, target_layout))
    before = prediction.clone(), target.clone()
    loss, error = fastdni.regression_loss(prediction, target, reduction)
    assert_right(prediction, target, reduction, (loss, error))
    assert error.is_contiguous()
    assert torch.equal(prediction, before[0]) and torch.equal(target, before[1])
    assert prediction._version == target._version == 0

    raw = torch.ops.fastdni.regression_loss_fwd(prediction, target, reduction)
    assert torch.equal(raw[0], loss) and torch.equal(raw[1], error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_other_dtypes_are_served_by_the_reference(dtype, device):
    """But for float16 on a GPU: by Triton, whose sums are in an order of their own."""
    prediction, target = [(4 * x).to(dtype) for x in example((5, 3), device=device)]
    result = fastdni.regression_loss(prediction, target)
    if dtype == torch.float16 and device == "cuda":
        return assert_right(prediction, target, "batchmean", result)
    expected = reference.regression_loss(prediction, target)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    assert result[1].dtype == dtype


def test_an_empty_batch_has_loss_zero():
    for reduction in REDUCTIONS:
        loss, error = fastdni.regression_loss(torch.empty(0, 3), torch.empty(0, 3), reduction)
        assert loss.item() == 0 and error.shape == (0, 3)


def test_the_default_divides_by_the_batch():
    prediction, target = torch.full((2, 3), 3.0), torch.ones(2, 3)
    assert fastdni.regression_loss(prediction, target)[0].item() == 6 * 4 / 2
    assert fastdni.regression_loss(prediction, target, "mean")[0].item() == 4


def test_the_reference_backend_agrees(device):
    prediction, target = example((9, 31), device=device)
    with fastdni.use_backend("reference"):
        result = fastdni.regression_loss(prediction, target)
    assert_right(prediction, target, "batchmean", result)
    assert_near(result, [r.double() for r in fastdni.regression_loss(prediction, target)])


# ---- gradients ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 5), (2, 3, 4), (0, 3)], ids=name)
def test_gradcheck(shape, reduction):
    inputs = [x.requires_grad_() for x in example(shape, torch.float64)]

    def op(prediction, target):
        return fastdni.regression_loss(prediction, target, reduction)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("used", ["loss", "error", "both"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_are_right(dtype, reduction, used, device):
    prediction, target = example((17, 33), dtype, device)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    arriving = torch.randn((), device=device).to(wide)
    weights = LAYOUTS["expanded"](torch.randn(17, 33, device=device).to(wide))

    def gradients(op, cast):
        leaves = [cast(x.detach()).clone().requires_grad_() for x in (prediction, target)]
        loss, error = op(*leaves, reduction)
        outputs = {"loss": [loss], "error": [error], "both": [loss, error]}[used]
        sent = {"loss": [arriving], "error": [weights], "both": [arriving, weights]}[used]
        return torch.autograd.grad(outputs, leaves, [cast(x) for x in sent])

    oracle = gradients(reference.regression_loss, torch.Tensor.double)
    plain = gradients(reference.regression_loss, lambda x: x)
    assert_near(gradients(fastdni.regression_loss, lambda x: x), oracle, plain)


def test_the_target_may_need_no_gradient():
    prediction, target = example((4, 3))
    loss, _ = fastdni.regression_loss(prediction.requires_grad_(), target)
    loss.backward()
    assert_near(prediction.grad, (prediction.double() - target.double()) * 2 / 4)
    assert target.grad is None
    assert not fastdni.regression_loss(prediction.detach(), target)[0].requires_grad


# ---- the op as torch sees it ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=name)
def test_opcheck(shape, dtype, device):
    for layouts in (("contiguous", "contiguous"), ("transposed", "expanded")):
        arguments = (*example(shape, dtype, device, layouts), "batchmean")
        torch.library.opcheck(torch.ops.fastdni.regression_loss_fwd.default, arguments)
        torch.library.opcheck(torch.ops.fastdni.regression_loss_check.default, arguments)


def test_compiles_to_one_graph():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(prediction, target):
        loss, error = fastdni.regression_loss(prediction, target)
        return loss, error.sum()

    for shape in ((6, 9), (11, 5)):
        inputs = [x.requires_grad_() for x in example(shape)]
        outputs = compiled(*inputs)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        loss, error = reference.regression_loss(*wide)
        oracle = (loss, error.sum())
        assert_near([x.detach() for x in outputs], [x.detach() for x in oracle])
        grads, expected = torch.autograd.grad(outputs, inputs), torch.autograd.grad(oracle, wide)
        assert_near(grads, expected)


# ---- promises ----


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_in_every_run_and_for_any_number_of_threads(dtype, device):
    prediction, target = example((10, CHUNK + 17), dtype, device)
    first = fastdni.regression_loss(prediction, target)
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        again = fastdni.regression_loss(prediction, target)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["prediction", "target", "both"])
def test_nan_and_infinity_propagate(where, value, dtype, device):
    prediction, target = example((5, 100), dtype, device)
    if where in ("prediction", "both"):
        prediction[3, 97] = value
    if where in ("target", "both"):
        target[3, 97] = value
    loss, error = fastdni.regression_loss(prediction, target)
    assert not loss.isfinite()
    assert_right(prediction, target, "batchmean", (loss, error))


# ---- errors ----

ERRORS = {
    "shape": (
        lambda: (torch.ones(2, 3), torch.ones(3, 2), "mean"),
        "target must have prediction's shape (2, 3), got (3, 2)",
    ),
    "shape-1d": (
        lambda: (torch.ones(2), torch.ones(()), "mean"),
        "target must have prediction's shape (2,), got ()",
    ),
    "no-broadcasting": (
        lambda: (torch.ones(2, 3), torch.ones(1, 3), "mean"),
        "target must have prediction's shape (2, 3), got (1, 3)",
    ),
    "dtype": (
        lambda: (torch.ones(2), torch.ones(2, dtype=torch.bfloat16), "mean"),
        "target must have prediction's dtype torch.float32, got torch.bfloat16",
    ),
    "reduction": (
        lambda: (torch.ones(2), torch.ones(2), "sum"),
        'reduction must be "batchmean" or "mean", got "sum"',
    ),
    "empty-reduction": (
        lambda: (torch.ones(0), torch.ones(0), ""),
        'reduction must be "batchmean" or "mean", got ""',
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case, backend):
    arguments, message = ERRORS[case]
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(message)):
        fastdni.regression_loss(*arguments())


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", ["regression_loss_fwd", "regression_loss_check"])
def test_wrong_arguments_of_the_raw_ops(op, case):
    arguments, message = ERRORS[case]
    with pytest.raises(RuntimeError, match="regression_loss: " + re.escape(message)):
        getattr(torch.ops.fastdni, op)(*arguments())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wrong_device(backend):
    message = "regression_loss: target must be on prediction's device cpu, got meta"
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=message):
        fastdni.regression_loss(torch.ones(2), torch.ones(2, device="meta"))


@pytest.mark.parametrize(
    ("dtype", "got"),
    [
        (torch.float16, "torch.float16"),
        (torch.int64, "torch.int64"),
        (torch.complex64, "ComplexFloat"),
    ],
    ids=name,
)
def test_the_raw_op_names_the_dtypes_it_has(dtype, got):
    x = torch.ones(2, dtype=dtype)
    message = f"regression_loss: prediction must be float32, float64 or bfloat16, got {got}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdni.regression_loss_fwd(x, x, "mean")
