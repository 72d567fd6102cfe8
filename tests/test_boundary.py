"""The op boundary_: a prediction, its regression and the update, against fastdni.reference in
float64, and that against torch.optim."""

import copy
import itertools
import re

import pytest
import torch
from conftest import sample
from layouts import LAYOUTS
from synthesizer_problem import CONTEXT, Problem, Sizes, as_one, forward, plain_autograd, problem
from tolerances import assert_near

import fastdni
from fastdni import ops, reference
from fastdni.ops import SynthesizerParameters
from fastdni.reference import OptimizerSettings

RAW = torch.ops.fastdni
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
RULES = {
    "write": OptimizerSettings("gradient", a=0.0),
    "add": OptimizerSettings("gradient", a=1.0),
    "sgd": OptimizerSettings("sgd", 0.1),
    "decay": OptimizerSettings("sgd", 0.1, 0.01),
    "momentum": OptimizerSettings("sgd_momentum", 0.1, 0.01, 0.9, 0.1),
    "nesterov": OptimizerSettings("sgd_momentum", 0.1, 0.01, 0.9, 0.0, 0.0, True),
    "adam": OptimizerSettings("adam", 0.01, 0.1, 0.8, 0.9, 1e-8),
    "adamw": OptimizerSettings("adamw", 0.01, 0.1, 0.8, 0.9, 1e-8),
}


def name(value):
    if isinstance(value, Sizes):
        return f"{value.trigger}_{value.hidden}_{value.output}"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "no_batch"
    return str(value).removeprefix("torch.")


def state_of(row: OptimizerSettings, parameters: list, groups: list[int]) -> list:
    """What an optimizer that has taken two steps may have kept."""
    state = []
    for parameter, group in zip(parameters, groups, strict=True):
        if group < 0:
            continue
        # Gradients to be added to are small: they must not cancel what comes.
        size = 0.1 if row.rule == "gradient" else 1.0
        state += [size * torch.rand_like(parameter) for _ in range(reference.KEPT[row.rule])]
        if row.rule.startswith("adam"):
            state.append(torch.tensor(2.0))
    return state


class Case:
    """A problem with an optimizer.

    Args:
        p: the problem.
        rule: one of RULES.
        frozen: the numbers of parameters that nobody updates.
    """

    def __init__(self, p: Problem, rule: str, scale: float | None = None, frozen=()):
        self.p, self.row, self.scale = p, RULES[rule], scale
        tensors = p.parameters.tensors()
        self.groups = [-1 if i in frozen else 0 for i in range(len(tensors))]
        self.state = state_of(self.row, tensors, self.groups)
        self.settings = ops.flat([self.row])

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy, its step counts left as they are."""
        made = copy.copy(self)
        made.settings = list(self.settings)
        made.p = copy.deepcopy(self.p).to(dtype)
        made.state = [t.clone() if t.dim() == 0 else t.to(dtype, copy=True) for t in self.state]
        return made

    def arguments(self) -> tuple:
        p = self.p
        given = (p.parameters, p.trigger, p.context, p.target)
        return *given, self.state, self.groups, self.settings

    def run(self, of=ops, *known) -> list[torch.Tensor]:
        """Loss, prediction and error, then all that may have been written, but the step counts."""
        scale = self.scale
        if of is reference and scale is None:
            scale = 2 / max(self.p.target.shape[0], 1)
        results = of.boundary_(*self.arguments(), scale, *known)
        kept = [tensor for tensor in self.state if tensor.dim() > 0]
        return [*results, *self.p.parameters.tensors(), *kept]

    def counts(self) -> list[float]:
        return [tensor.item() for tensor in self.state if tensor.dim() == 0]


def assert_right(case: Case) -> None:
    """The prediction, and all else given that: few rounded values are no measure of what is made
    from them."""
    dtype = case.p.trigger.dtype
    plain, wide = case.to(dtype), case.to(torch.float64)
    prediction, *hidden = forward(ops, case.p)
    assert_near([prediction], forward(reference, wide.p)[:1], forward(reference, plain.p)[:1])
    found = case.run()
    oracle = wide.run(reference, prediction.double(), [h.double() for h in hidden])
    assert_near(found, oracle, plain.run(reference, prediction, hidden))
    assert torch.equal(found[1], prediction) or not prediction.isfinite().all()
    assert case.counts() == wide.counts()


# ---- results ----

CASES = list(
    itertools.product(
        RULES,
        [(1,), (3,), (64,), (2, 5), (2, 0, 3), (0,), ()],
        [Sizes(1, 1, 1), Sizes(7, 5, 3), Sizes(33, 64, 20), Sizes(33, 70, 64)],
        [0, 1, 2],
        [True, False],
        [True, False],
        DTYPES,
        [None, 0.3],
    )
)


@pytest.mark.parametrize(
    ("rule", "leading", "sizes", "n_hidden", "context", "bias", "dtype", "scale"),
    sample(CASES, every=61),
    ids=name,
)
def test_results_are_right(rule, leading, sizes, n_hidden, context, bias, dtype, scale):
    assert_right(Case(problem(leading, sizes, n_hidden, context, bias, dtype), rule, scale))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_many_rows_and_a_wide_layer(rule):
    assert_right(Case(problem((1100,), Sizes(65, 130, 33), 1, dtype=torch.float64), rule))


def optimizer_for(row: OptimizerSettings, parameters: list, state: list) -> torch.optim.Optimizer:
    """torch.optim's, in that state."""
    how = {"lr": row.lr, "weight_decay": row.weight_decay}
    if row.rule.startswith("sgd"):
        momentum = {"momentum": row.a, "dampening": row.b, "nesterov": row.nesterov}
        optimizer = torch.optim.SGD(parameters, **how, **momentum)
        keys = ["momentum_buffer"] if row.rule == "sgd_momentum" else []
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[row.rule]
        optimizer = kind(parameters, **how, betas=(row.a, row.b), eps=row.eps)
        keys = ["exp_avg", "exp_avg_sq", "step"]
    left = iter(state)
    for parameter in parameters:
        optimizer.state[parameter] = {key: next(left).clone() for key in keys}
    return optimizer


@pytest.mark.parametrize("n_hidden", [0, 2])
@pytest.mark.parametrize("rule", [r for r in RULES if r not in ("write", "add")])
def test_an_update_is_that_of_torch_optim(rule, n_hidden):
    case = Case(problem((6,), n_hidden=n_hidden, dtype=torch.float64), rule)
    twins = [p.clone().requires_grad_() for p in case.p.parameters.tensors()]
    optimizer = optimizer_for(case.row, twins, case.state)
    prediction, loss, gradient = plain_autograd(case.p)
    for twin, part in zip(twins, gradient.split([t.numel() for t in twins]), strict=True):
        twin.grad = part.view_as(twin)
    optimizer.step()
    found_loss, found, error, *_ = case.run()
    torch.testing.assert_close([found_loss, found], [loss, prediction], rtol=1e-12, atol=1e-12)
    assert torch.equal(error, found - case.p.target)
    updated = case.p.parameters.tensors()
    torch.testing.assert_close(updated, [t.detach() for t in twins], rtol=1e-11, atol=1e-12)
    kept = [x for twin in twins for x in optimizer.state[twin].values()]
    torch.testing.assert_close(case.state, kept, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("n_hidden", [0, 1])
def test_gradients_are_added(n_hidden):
    p = problem((6,), n_hidden=n_hidden, dtype=torch.float64)
    before = [x.clone() for x in p.parameters.tensors()]
    case = Case(p, "add")
    expected = as_one(case.state) + plain_autograd(p)[2]
    case.run()
    torch.testing.assert_close(as_one(case.state), expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, p.parameters.tensors(), before))


def test_each_parameter_has_its_own_group():
    case = Case(problem(n_hidden=1), "sgd", frozen=[1])
    wide = case.to(torch.float64)
    rows = [OptimizerSettings("sgd", 0.1), OptimizerSettings("sgd", 0.7)]
    groups = [1, -1, 0, 1, 0, 1]
    before = [x.clone() for x in case.p.parameters.tensors()]
    for each in (case, wide):
        each.settings, each.groups = ops.flat(rows), groups
    assert_near(case.run(), wide.run(reference))
    after = case.p.parameters.tensors()
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [
        group < 0 for group in groups
    ]


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_learning_rate_may_be_a_tensor(rule):
    case = Case(problem(), rule)
    twin = case.to(torch.float32)
    case.settings[1] = float("nan")
    lr, width = torch.tensor(RULES[rule].lr, dtype=torch.float64), len(case.state) // 6
    case.state = [
        t for i in range(6) for t in (*case.state[i * width : (i + 1) * width], lr)
    ]  # of each parameter in turn
    for found, expected in zip(case.run()[:9], twin.run()[:9], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["add", "adam"])
@pytest.mark.parametrize("n_hidden", [0, 2])
def test_a_known_prediction_is_taken(rule, n_hidden):
    case = Case(problem((6,), n_hidden=n_hidden), rule)
    prediction, *hidden = forward(ops, case.p)
    twin = case.to(torch.float32)
    for found, expected in zip(case.run(ops, prediction, hidden), twin.run(), strict=True):
        assert torch.equal(found, expected)
    shifted = case.to(torch.float32)  # it is that one's error, not another evaluation's
    loss, _, error, *_ = shifted.run(ops, prediction + 1, hidden)
    torch.testing.assert_close(error, prediction + 1 - case.p.target)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x != "contiguous"])
@pytest.mark.parametrize("part", ["trigger", "context", "target"])
def test_any_layout_of_what_is_read(part, layout):
    p = problem((2, 3), n_hidden=1)
    p = p._replace(**{part: LAYOUTS[layout](getattr(p, part))})
    assert_right(Case(p, "adam"))


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
@pytest.mark.parametrize("rule", ["write", "momentum", "adamw"])
def test_any_layout_of_what_is_written(rule, layout):
    p = problem((6,), n_hidden=1)
    parameters = [LAYOUTS[layout](x) for x in p.parameters.tensors()]
    case = Case(p._replace(parameters=SynthesizerParameters.of(parameters, 2, True)), rule)
    case.state = [LAYOUTS[layout](t) if t.dim() else t for t in case.state]
    given = [*parameters, *case.state]
    assert_right(case)
    assert all(a is b for a, b in zip(given, [*parameters, *case.state], strict=True))


def test_an_empty_batch_has_loss_and_gradients_zero():
    case = Case(problem((0,), n_hidden=1), "write")
    loss, *_ = case.run()
    assert loss == 0
    assert not any(t.any() for t in case.state)


def test_versions_tell_what_was_written():
    for rule in ("add", "sgd", "adam"):
        case = Case(problem(), rule, frozen=[0])
        case.run()
        changed = [p._version > 0 for p in case.p.parameters.tensors()]
        assert changed == [rule != "add" and group >= 0 for group in case.groups]
        assert all(t._version > 0 for t in case.state)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("rule", RULES)
def test_every_device(rule, dtype, device):
    p = problem((33,), Sizes(20, 24, 17), 1, dtype=dtype, device=device)
    assert_right(Case(p, rule))


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw"])
def test_numbers_on_the_device(rule, device):
    """Step counts, as capturable=True puts them there, and the learning rate."""
    case = Case(problem((33,), n_hidden=1, device=device), rule)
    twin = case.to(torch.float32)
    lr, width = torch.tensor(RULES[rule].lr, device=device), len(case.state) // 6
    case.settings[1] = float("nan")
    kept = [t.to(device) for t in case.state]
    case.state = [t for i in range(6) for t in (*kept[i * width : (i + 1) * width], lr)]
    found, expected = case.run(), twin.run()
    torch.testing.assert_close(found[:9], expected[:9])
    rest = [t for t in case.state if t is not lr]
    torch.testing.assert_close([t.cpu() for t in rest], [t.cpu() for t in twin.state])


@pytest.mark.parametrize("rule", ["add", "adam"])
def test_the_reference_backend_agrees(rule, device):
    case = Case(problem((7,), n_hidden=2, device=device), rule)
    case.state = [t.to(device) if t.dim() else t for t in case.state]
    wide = case.to(torch.float64)
    with fastdni.use_backend("reference"):
        found = case.run()
    assert_near(found, wide.run())


def test_float16_is_served_by_the_reference():
    case = Case(problem(dtype=torch.float16), "adam")
    assert_right(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(value):
    for part in ("trigger", "target"):
        p = problem((8,), Sizes(20, 18, 17), 1)
        getattr(p, part)[3, 5] = value
        assert_right(Case(p, "sgd"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_in_every_run(dtype):
    case = Case(problem((300,), Sizes(70, 130, 90), 1, dtype=dtype), "adam")
    first = case.to(dtype).run()
    for _ in range(3):
        assert all(map(torch.equal, case.to(dtype).run(), first))


# ---- the op as torch sees it ----


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rule", ["add", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(rule, dtype, known):
    for leading, extras, n_hidden in (((4,), True, 1), ((2, 3), False, 0)):
        p = problem(leading, n_hidden=n_hidden, context=extras, bias=extras, dtype=dtype)
        case = Case(p, rule)
        prediction, *hidden = forward(ops, p)
        arguments = (
            "test", p.trigger, p.context, p.target, p.parameters.tensors(), n_hidden + 1, extras,
            case.state, case.groups, case.settings, 0.5,
            prediction if known else None, hidden if known else [],
        )  # fmt: skip
        torch.library.opcheck(RAW.boundary_.default, arguments)
        torch.library.opcheck(RAW.boundary_check.default, arguments)


def test_compiles_to_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(case):
        return case.run()

    case = Case(problem((6,), n_hidden=1), "adam")
    twin = case.to(torch.float32)
    for found, expected in zip(compiled(case), twin.run(), strict=True):
        torch.testing.assert_close(found, expected)
    assert case.counts() == twin.counts()


# ---- what is refused ----


def wrong(**parts):
    p = problem()
    case = Case(p, "adam")
    arguments = {
        "parameters": p.parameters, "trigger": p.trigger, "context": p.context,
        "target": p.target, "state": case.state, "groups": case.groups,
        "settings": case.settings, "scale": None, "prediction": None, "hidden": None,
        "caller": "here",
    }  # fmt: skip
    return {key: parts[key](value) if key in parts else value for key, value in arguments.items()}


REFUSED = {
    "trigger's width": (
        dict(trigger=lambda t: t[:, :4]),
        "here: trigger must be (..., 5) to meet the first weight (6, 5), got (4, 4)",
    ),
    "target's shape": (dict(target=lambda t: t[:3]), "here: target must be (4, 3), got (3, 3)"),
    "target's dtype": (
        dict(target=lambda t: t.double()),
        "here: target must have trigger's dtype torch.float32, got torch.float64",
    ),
    "context's shape": (
        dict(context=lambda t: t[:, :9]),
        f"here: context must be (4, {CONTEXT}), got (4, 9)",
    ),
    "no context": (
        dict(context=lambda t: None),
        "here: parameters must hold 4 tensors for 2 layers, got 6",
    ),
    "too few groups": (dict(groups=lambda g: g[1:]), "here: groups must hold 6 numbers, got 5"),
    "no such group": (
        dict(groups=lambda g: [*g[1:], 1]),
        "here: groups must be below 1, got 1",
    ),
    "settings cut off": (dict(settings=lambda s: s[1:]), "here: settings must be rows of 7"),
    "no such rule": (
        dict(settings=lambda s: [9.0, *s[1:]]),
        "here: settings must begin with a rule from 0 to 5",
    ),
    "too little state": (dict(state=lambda s: s[1:]), "here: "),
    "too much state": (
        dict(state=lambda s: [*s, s[0]]),
        "here: state holds too many tensors: 19",
    ),
    "state's shape": (
        dict(state=lambda s: [s[0][:1], *s[1:]]),
        "here: a parameter's optimizer state (or gradient) must be a torch.float32 tensor of shape "
        "(6, 5), got torch.float32 (1, 5)",
    ),
    "state's dtype": (
        dict(state=lambda s: [s[0].double(), *s[1:]]),
        "here: a parameter's optimizer state (or gradient) must be a torch.float32 tensor of shape "
        "(6, 5), got torch.float64 (6, 5)",
    ),
    "step": (
        dict(state=lambda s: [*s[:2], torch.zeros(2), *s[3:]]),
        "here: an optimizer's step must be one float32 or float64 number, got torch.float32 (2,)",
    ),
    "prediction's shape": (
        dict(prediction=lambda _: torch.ones(4, 4), hidden=lambda _: [torch.ones(4, 6)]),
        "here: prediction must be (4, 3), got (4, 4)",
    ),
    "hidden's number": (
        dict(prediction=lambda _: torch.ones(4, 3)),
        "here: hidden must hold 1 activations, got 0",
    ),
    "hidden alone": (
        dict(hidden=lambda _: [torch.ones(4, 6)]),
        "here: hidden must be empty without a prediction, got 1",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, backend):
    parts, message = REFUSED[case]
    arguments = wrong(**parts)
    written = [*arguments["parameters"].tensors(), *arguments["state"]]
    before = [t.clone() for t in written]
    with (
        fastdni.use_backend(backend),
        pytest.raises(RuntimeError, match="^" + re.escape(message)),
    ):
        ops.boundary_(**arguments)
    assert all(map(torch.equal, written, before))


def test_an_unknown_precision_is_refused():
    p = problem()
    case = Case(p, "sgd")
    with pytest.raises((RuntimeError, ValueError), match='precision must be one of "exact"'):
        RAW.boundary_(
            "here", p.trigger, p.context, p.target, p.parameters.tensors(), 2, True, case.state,
            case.groups, case.settings, 0.5, None, [], "half",
        )  # fmt: skip
