"""The op boundary_ by Triton's kernels, in its interpreter or on a GPU, against the reference."""

import itertools

import pytest
import torch
from conftest import sample
from layouts import LAYOUTS
from synthesizer_problem import Sizes, forward, problem
from test_boundary import RULES, Case, name
from tolerances import assert_near

import fastdni
from fastdni import ops, reference
from fastdni.ops import SynthesizerParameters

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
fastdni.triton.load()


def compare(case: Case) -> None:
    """Of each backend what it makes of Triton's own prediction."""
    plain, wide = case.to(case.p.trigger.dtype), case.to(torch.float64)
    with fastdni.use_backend("triton"):
        prediction, *hidden = forward(ops, case.p)
        found = case.run()
    oracle = wide.run(reference, prediction.double(), [h.double() for h in hidden])
    assert_near(found, oracle, plain.run(reference, prediction, hidden))
    assert case.counts() == wide.counts()


CASES = list(
    itertools.product(
        RULES,
        [(1,), (21,), (2, 5), ()],
        [0, 1, 2],
        [True, False],
        [True, False],
        [torch.float32, torch.bfloat16, torch.float16],
        [None, 0.3],
    )
)


@pytest.mark.parametrize(
    ("rule", "leading", "n_hidden", "context", "bias", "dtype", "scale"),
    sample(CASES, every=29),
    ids=name,
)
def test_results_are_right(rule, leading, n_hidden, context, bias, dtype, scale):
    p = problem(leading, Sizes(33, 40, 5), n_hidden, context, bias, dtype, DEVICE)
    compare(Case(p, rule, scale))


@pytest.mark.parametrize("rule", ["write", "momentum", "adamw"])
def test_any_layout_will_do(rule):
    p = problem((6,), n_hidden=1, device=DEVICE)
    parameters = [LAYOUTS["strided"](x) for x in p.parameters.tensors()]
    p = p._replace(
        trigger=LAYOUTS["transposed"](p.trigger),
        parameters=SynthesizerParameters.of(parameters, 2, True),
    )
    case = Case(p, rule)
    case.state = [LAYOUTS["strided"](t) if t.dim() else t for t in case.state]
    compare(case)


def test_a_known_prediction_is_taken():
    case = Case(problem((6,), n_hidden=1, device=DEVICE), "adam")
    twin = case.to(torch.float32)
    with fastdni.use_backend("triton"):
        prediction, *hidden = forward(ops, case.p)
        known, whole = case.run(ops, prediction, hidden), twin.run()
    assert all(map(torch.equal, known, whole))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", ["add", "adam"])
def test_the_schema_says_what_is_written(rule, known):
    p = problem((6,), n_hidden=1, device=DEVICE)
    case = Case(p, rule)
    prediction, *hidden = forward(ops, p)
    arguments = (
        p.trigger, p.context, p.target, p.parameters.tensors(), 2, True, case.state, case.groups,
        case.settings, 0.5, prediction if known else None, hidden if known else [], "exact",
    )  # fmt: skip
    op = torch.ops.fastdni.triton_boundary_.default
    torch.library.opcheck(op, arguments, test_utils="test_schema")


def test_what_does_not_fit_is_refused_before_a_kernel_runs():
    case = Case(problem((6,), n_hidden=1, device=DEVICE), "adam")
    case.state[0] = case.state[0][:1]
    before = [x.clone() for x in case.p.parameters.tensors()]
    with (
        fastdni.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"boundary: a parameter's optimizer state"),
    ):
        case.run()
    assert all(map(torch.equal, case.p.parameters.tensors(), before))
