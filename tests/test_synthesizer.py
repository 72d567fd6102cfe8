"""The synthesizer's ops against fastdni.reference and against autograd of the plain formula."""

import itertools
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import sample
from layouts import LAYOUTS
from tolerances import assert_near
from torch import Tensor

import fastdni
from fastdni import _C, backend, ops, reference
from fastdni.ops import SynthesizerParameters

RAW = torch.ops.fastdni
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
REDUCTIONS = ["batchmean", "mean"]
CONTEXT = 10


class Sizes(NamedTuple):
    trigger: int
    hidden: int
    output: int


class Problem(NamedTuple):
    """All that the two ops are given."""

    trigger: Tensor
    context: Tensor | None
    target: Tensor
    parameters: SynthesizerParameters

    def to(self, dtype: torch.dtype) -> "Problem":
        context = None if self.context is None else self.context.to(dtype)
        parameters = self.parameters.to(dtype)
        return Problem(self.trigger.to(dtype), context, self.target.to(dtype), parameters)

    def tensors(self) -> list[Tensor]:
        context = [] if self.context is None else [self.context]
        return [self.trigger, self.target, *context, *self.parameters.tensors()]


def problem(
    leading=(4,),
    sizes=Sizes(5, 6, 3),  # noqa: B008  (immutable)
    n_hidden=1,
    context=True,
    bias=True,
    dtype=torch.float32,
    device="cpu",
) -> Problem:
    def normal(*shape):
        return torch.randn(shape, device=device)

    widths = [sizes.trigger, *[sizes.hidden] * n_hidden, sizes.output]
    pairs = list(itertools.pairwise(widths))
    first = widths[1]
    parameters = SynthesizerParameters(
        [normal(n, k) / k**0.5 for k, n in pairs],
        [normal(n) for _, n in pairs] if bias else [],
        normal(first, CONTEXT) / CONTEXT**0.5 if context else None,
        normal(first) if context and bias else None,
    )
    made = Problem(
        normal(*leading, sizes.trigger),
        normal(*leading, CONTEXT) if context else None,
        normal(*leading, sizes.output),
        parameters,
    )
    return made.to(dtype)


def forward(of, p: Problem) -> list[Tensor]:
    """The prediction and the hidden activations, by `ops` or by `reference`."""
    parameters = [p.parameters] if of is ops else p.parameters
    prediction, hidden = of.synthesizer_fwd(p.trigger, p.context, *parameters)
    return [prediction, *hidden]


def backward(of, p: Problem, activations: list[Tensor], reduction="batchmean") -> list[Tensor]:
    """The loss and the gradients, given what `forward` returned."""
    prediction, *hidden = activations
    bias = bool(p.parameters.biases)
    loss, grads = of.synthesizer_bwd(
        p.target, prediction, hidden, p.trigger, p.context, p.parameters.weights, bias, reduction
    )
    return [loss, *grads]


def plain_autograd(p: Problem, reduction="batchmean") -> list[Tensor]:
    """Prediction, loss and gradients by autograd of the formula, written with torch alone."""
    leaves = [x.detach().clone().requires_grad_() for x in p.parameters.tensors()]
    left = list(leaves)
    weights = [left.pop(0) for _ in p.parameters.weights]
    biases = [left.pop(0) for _ in p.parameters.biases] or [None] * len(weights)
    a = F.linear(p.trigger, weights[0], biases[0])
    if p.context is not None:
        a = a + F.linear(p.context, *left)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        a = F.linear(a.relu(), weight, bias)
    count = a.shape[0] if reduction == "batchmean" else a.numel()
    loss = (a - p.target).square().sum() / max(count, 1)
    loss.backward()
    return [a.detach(), loss.detach(), *(leaf.grad for leaf in leaves)]


def assert_right(p: Problem, reduction="batchmean", against=ops) -> None:
    """Each op against the reference, on the inputs that it gets; then both against autograd."""
    wide = p.to(torch.float64)
    activations = forward(against, p)
    assert_near(activations, forward(reference, wide), forward(reference, p))
    result = backward(against, p, activations, reduction)
    widened = [a.double() for a in activations]
    oracle = backward(reference, wide, widened, reduction)
    assert_near(result, oracle, backward(reference, p, activations, reduction))

    prediction, loss, *grads = plain_autograd(p, reduction)
    plain = [prediction, loss.to(result[0].dtype), *grads]
    assert_near([activations[0], *result], plain_autograd(wide, reduction), plain)


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
    sample(CASES, every=11),
    ids=name,
)
def test_results_are_right(leading, sizes, n_hidden, context, bias, dtype, reduction, device):
    p = problem(leading, sizes, n_hidden, context, bias, dtype, device)
    before = [x.clone() for x in p.tensors()]
    assert_right(p, reduction)
    assert all(torch.equal(x, y) for x, y in zip(p.tensors(), before, strict=True))
    assert all(x._version == 0 for x in p.tensors())


@pytest.fixture(params=["onednn", "mkl"])
def library(request):
    usable = backend._onednn_usable() and _C.onednn_linked()
    if request.param == "onednn" and not usable:
        pytest.skip("this torch has not the oneDNN product that fastdni was written for")
    _C.enable_onednn(request.param == "onednn")
    yield request.param
    _C.enable_onednn(usable)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("context", [True, False])
def test_large_products_are_right_in_both_libraries(context, layout, library):
    assert _C.product_library(256, 256, 256) == library
    p = problem((256,), Sizes(256, 256, 256), 1, context)
    p = p._replace(trigger=LAYOUTS[layout](p.trigger))
    weights = [LAYOUTS[layout](w) for w in p.parameters.weights]
    assert_right(p._replace(parameters=p.parameters._replace(weights=weights)))


def test_many_rows():
    """More rows than 64 chunks of 16: csrc/cpu/synthesizer.h gives each chunk more of them."""
    assert_right(problem((64 * 16 * 2 + 7,), Sizes(7, 9, 5), 2))


PARTS = ["trigger", "context", "target", "weights", "biases", "context_weight", "context_bias"]


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
            bool(p.parameters.biases),
            reduction,
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return None, None, *(grad_loss * grad for grad in ctx.grads)


def with_tensors(parameters: SynthesizerParameters, tensors) -> SynthesizerParameters:
    """The same with other tensors, in the order of `parameters.tensors()`."""
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


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("leading", [(0,), (4,), (2, 3)], ids=name)
def test_opcheck(leading, dtype, layout):
    for n_hidden, context, bias in ((0, False, False), (2, True, True)):
        p = problem(leading, n_hidden=n_hidden, context=context, bias=bias, dtype=dtype)
        weights = [LAYOUTS[layout](w) for w in p.parameters.weights]
        arguments = (p.trigger, p.context, *p.parameters._replace(weights=weights))
        torch.library.opcheck(RAW.synthesizer_fwd.default, arguments)
        torch.library.opcheck(RAW.synthesizer_check.default, arguments)
        prediction, hidden = RAW.synthesizer_fwd(*arguments)
        arguments = (p.target, prediction, hidden, p.trigger, p.context, weights, bias, "mean")
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


# ---- errors ----


def changed(**parts):
    """The forward op's arguments, (trigger, context, *parameters), with other parts."""
    p = problem()
    arguments = {"trigger": p.trigger, "context": p.context, **p.parameters._asdict()}
    return list((arguments | parts).values())


W0, W1 = torch.ones(6, 5), torch.ones(3, 6)
B0, B1 = torch.ones(6), torch.ones(3)
WRONG_FORWARD = {
    "no weights": (dict(weights=[]), "weights must hold at least one matrix, got none"),
    "too few biases": (
        dict(biases=[B0]),
        "biases must be empty or one per weight (2), got 1",
    ),
    "0-d trigger": (
        dict(trigger=torch.ones(())),
        "trigger must be (..., K), got a 0-d tensor",
    ),
    "trigger's width": (
        dict(trigger=torch.ones(4, 7)),
        "trigger must be (..., 5) to meet the first weight (6, 5), got (4, 7)",
    ),
    "weight's dtype": (
        dict(weights=[W0, W1.double()]),
        "weights[1] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "1-d weight": (dict(weights=[B0, W1]), "weights[0] must be (N, K), got (6,)"),
    "second weight's width": (
        dict(weights=[W0, torch.ones(3, 4)]),
        "weights[1] must be (3, 6), got (3, 4)",
    ),
    "bias's dtype": (
        dict(biases=[B0.bfloat16(), B1]),
        "biases[0] must have trigger's dtype torch.float32, got torch.bfloat16",
    ),
    "bias's shape": (
        dict(biases=[B0, B1[:, None]]),
        "biases[1] must be (3,), got (3, 1)",
    ),
    "context alone": (
        dict(context_weight=None, context_bias=None),
        "context and context_weight must be given together",
    ),
    "context's weight alone": (
        dict(context=None),
        "context and context_weight must be given together",
    ),
    "context's bias alone": (
        dict(context=None, context_weight=None),
        "context_bias needs a context_weight",
    ),
    "context's dtype": (
        dict(context=torch.ones(4, CONTEXT, dtype=torch.int64)),
        "context must have trigger's dtype torch.float32, got torch.int64",
    ),
    "context's rows": (
        dict(context=torch.ones(3, CONTEXT)),
        "context must be (4, 10), got (3, 10)",
    ),
    "context's width": (
        dict(context=torch.ones(4, 9)),
        "context must be (4, 10), got (4, 9)",
    ),
    "context weight's dtype": (
        dict(context_weight=torch.ones(6, CONTEXT).double()),
        "context_weight must have trigger's dtype torch.float32, got torch.float64",
    ),
    "context weight's height": (
        dict(context_weight=torch.ones(5, CONTEXT)),
        "context_weight must be (6, C), got (5, 10)",
    ),
    "1-d context weight": (
        dict(context_weight=torch.ones(6)),
        "context_weight must be (6, C), got (6,)",
    ),
    "context bias's dtype": (
        dict(context_bias=B0.half()),
        "context_bias must have trigger's dtype torch.float32, got torch.float16",
    ),
    "context bias's shape": (
        dict(context_bias=torch.ones(5)),
        "context_bias must be (6,), got (5,)",
    ),
}


@pytest.mark.parametrize("case", WRONG_FORWARD)
def test_wrong_forward_arguments(case):
    parts, message = WRONG_FORWARD[case]
    arguments = changed(**parts)
    for op in (RAW.synthesizer_fwd, RAW.synthesizer_check):
        with pytest.raises(RuntimeError, match="synthesizer: " + re.escape(message)):
            op(*arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [c for c in WRONG_FORWARD if c != "no weights"])
def test_wrong_arguments_of_the_public_forward(case, backend):
    parts, message = WRONG_FORWARD[case]
    trigger, context, *parameters = changed(**parts)
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.synthesizer_fwd(trigger, context, SynthesizerParameters(*parameters))


@pytest.mark.parametrize("part", [x for x in PARTS if x != "target"])
def test_wrong_device(part):
    """Everything else must be where the trigger is."""
    arguments = dict(zip((x for x in PARTS if x != "target"), changed(), strict=True))
    old = arguments[part]
    arguments[part] = [x.to("meta") for x in old] if isinstance(old, list) else old.to("meta")
    trigger, context, *parameters = arguments.values()
    with pytest.raises(RuntimeError, match="synthesizer: .* must be on trigger's device"):
        ops.synthesizer_fwd(trigger, context, SynthesizerParameters(*parameters))


def test_the_raw_ops_name_the_dtypes_they_have():
    p = problem(dtype=torch.float16)
    message = "synthesizer: trigger must be float32, float64 or bfloat16, got torch.float16"
    with pytest.raises(RuntimeError, match=message):
        RAW.synthesizer_fwd(p.trigger, p.context, *p.parameters)


WRONG_BACKWARD = {
    "target's dtype": (
        dict(target=torch.ones(4, 3, dtype=torch.float64)),
        "target must have trigger's dtype torch.float32, got torch.float64",
    ),
    "target's shape": (dict(target=torch.ones(1, 3)), "target must be (4, 3), got (1, 3)"),
    "prediction's dtype": (
        dict(prediction=torch.ones(4, 3, dtype=torch.bfloat16)),
        "prediction must have trigger's dtype torch.float32, got torch.bfloat16",
    ),
    "prediction's shape": (
        dict(prediction=torch.ones(4, 4)),
        "prediction must be (4, 3), got (4, 4)",
    ),
    "hidden's number": (dict(hidden=[]), "hidden must hold 1 activations, got 0"),
    "hidden's shape": (
        dict(hidden=[torch.ones(4, 5)]),
        "hidden[0] must be (4, 6), got (4, 5)",
    ),
    "hidden's dtype": (
        dict(hidden=[torch.ones(4, 6, dtype=torch.float64)]),
        "hidden[0] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "weight's dtype": (
        dict(weights=[W0, W1.double()]),
        "weights[1] must have trigger's dtype torch.float32, got torch.float64",
    ),
    "context's rows": (
        dict(context=torch.ones(3, CONTEXT)),
        "context must be (4, 10), got (3, 10)",
    ),
    "no weights": (dict(weights=[]), "weights must hold at least one matrix, got none"),
    "0-d trigger": (
        dict(trigger=torch.ones(())),
        "trigger must be (..., K), got a 0-d tensor",
    ),
    "reduction": (dict(reduction="sum"), 'reduction must be "batchmean" or "mean", got "sum"'),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", WRONG_BACKWARD)
def test_wrong_backward_arguments(case, backend):
    parts, message = WRONG_BACKWARD[case]
    p = problem()
    prediction, *hidden = forward(ops, p)
    arguments = {
        "target": p.target,
        "prediction": prediction,
        "hidden": hidden,
        "trigger": p.trigger,
        "context": p.context,
        "weights": p.parameters.weights,
        "bias": True,
        "reduction": "mean",
    }
    with fastdni.use_backend(backend), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.synthesizer_bwd(*(arguments | parts).values())
