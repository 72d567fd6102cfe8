"""The window ops: against their equations, and what they refuse."""

import copy

import pytest
import torch
from conftest import sample

from fastdni import ops, reference, use_backend
from fastdni.ops import SynthesizerParameters, flat
from fastdni.reference import OptimizerSettings

T, B, K, H, N, C = 3, 5, 3, 4, 6, 2
RULES = {
    "adam": OptimizerSettings("adam", lr=0.01, weight_decay=0.1, a=0.9, b=0.99, eps=1e-8),
    "momentum": OptimizerSettings("sgd_momentum", lr=0.01, a=0.9, nesterov=True),
    "sgd": OptimizerSettings("sgd", lr=0.01),
}


class Given:
    """What a window is given, with an LSTM of one layer."""

    def __init__(self, dtype=torch.float64, hidden=True, context=True, bias=True, predicted=2):
        torch.manual_seed(0)

        def made(*sizes):
            return torch.randn(*sizes, dtype=dtype)

        size = predicted * H
        widths = [(7, size), (size, 7)] if hidden else [(size, size)]
        layers = [made(*sizes) for sizes in widths]
        biases = [made(len(layer)) for layer in layers] if bias else []
        first = len(layers[0])
        beside = (made(first, C), made(first) if bias else None) if context else (None, None)
        self.m = SynthesizerParameters(layers, biases, *beside)
        self.context = made(B, C) if context else None
        self.x, self.start = made(T, B, K), [made(1, B, H) for _ in range(2)]
        self.end = [made(1, B, H) for _ in range(2)]
        self.weights = [made(4 * H, K), made(4 * H, H), made(4 * H), made(4 * H)]
        self.output, self.head = made(T, B, H), [made(N, H)] + [made(N)] * bias
        self.labels = torch.randint(N, (T * B,))
        self.labels[2] = -100
        self.values = made(T * B, N)
        self.rows = torch.tensor([True, False, True, True, False])
        self.predicted = predicted

    def updates(self, rule, updated):
        """State, groups and settings of one optimizer for all of these."""
        row = RULES[rule]
        state = []
        for p in updated:
            state += [torch.rand_like(p) for _ in range(reference.KEPT[row.rule])]
            state += [torch.tensor(3.0)] * row.rule.startswith("adam")
        return [s.clone() for s in state], [0] * len(updated), flat([row])


FORWARD = [
    (dtype, criterion, hidden, context, bias, factor, predicted)
    for dtype in (torch.float64, torch.float32)
    for criterion in ("cross_entropy", "mse", None)
    for hidden in (True, False)
    for context in (True, False)
    for bias in (True, False)
    for factor in (0.5, 0.0)
    for predicted in (2, 1)
]


def assert_same(found, expected, dtype):
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for one, two in zip(found, expected, strict=True):
        if isinstance(one, list):
            assert_same(one, two, dtype)
        else:
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "criterion", "hidden", "context", "bias", "factor", "predicted"), sample(FORWARD)
)
def test_forward(dtype, criterion, hidden, context, bias, factor, predicted):
    g = Given(dtype, hidden, context, bias, predicted)
    target = {"mse": g.values, None: None}.get(criterion, g.labels)
    arguments = (
        g.output, target, criterion or "mse", 3.0, g.head, g.end, predicted, g.context, g.m, factor,
        g.rows,
    )  # fmt: skip
    assert_same(ops.window_fwd(*arguments), reference.window_fwd(*arguments), dtype)


UPDATE = [
    (dtype, rule, hidden, learns, clip, masked)
    for dtype in (torch.float64, torch.float32)
    for rule in RULES
    for hidden in (True, False)
    for learns in (True, False)
    for clip in (0.0, 0.5)
    for masked in (True, False)
]


@pytest.mark.parametrize(("dtype", "rule", "hidden", "learns", "clip", "masked"), sample(UPDATE))
def test_update(dtype, rule, hidden, learns, clip, masked):
    found = []
    for backend in ("cpu", "reference"):
        g = Given(dtype, hidden)
        others = [*g.weights, *g.head]
        gradients = [torch.randn_like(p) for p in others]
        updated = [*g.m.tensors(), *others] if learns else others
        state, groups, settings = g.updates(rule, updated)
        with use_backend(backend):
            results = ops.window_update_(
                g.start, g.end, 2, g.context, g.m, learns, (5.0, clip, 3.0, 2 / B),
                g.rows if masked else None, others, gradients, state, groups, settings,
            )  # fmt: skip
        found.append([*results, *updated, *state])
    assert_same(*found, dtype)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("loss", [True, False])
def test_a_step_is_its_parts(learns, loss):
    one, two = Given(), Given()
    target = one.labels if loss else None
    units = (5.0, 0.5, 3.0, 2 / B)
    updated = ([*one.m.tensors()] * learns) + [*one.weights] + [*one.head] * loss
    state, groups, settings = one.updates("adam", updated)
    its = copy.deepcopy(state)
    prediction, value, end, synthesis, energy = ops.window_step_(
        "lstm", one.x, one.start, one.weights, True, target, "cross_entropy", 2.0, one.head, 2,
        (one.context, one.context), one.m, learns, 0.5, units, None, one.rows, state, groups,
        settings,
    )  # fmt: skip
    output, after, saved = ops.recurrence_fwd("lstm", two.x, two.start, two.weights, True)
    forward = ops.window_fwd(
        output, target, "cross_entropy", 2.0, two.head, after, 2, two.context, two.m, 0.5, two.rows
    )
    above = forward[2] if loss else None
    _, before, gradients = ops.recurrence_bwd(
        "lstm", two.x, two.start, two.weights, True, output, saved, above, forward[4], False
    )
    others = [*two.weights] + [*two.head] * loss
    results = ops.window_update_(
        two.start, before, 2, two.context, two.m, learns, units, None, others,
        [*gradients, *forward[3]], its, groups, settings,
    )  # fmt: skip
    found = [prediction, value, end, synthesis, energy, *one.weights, *one.head, *state]
    found += one.m.tensors()
    expected = [*forward[:2], after, *results, *two.weights, *two.head, *its, *two.m.tensors()]
    assert all(map(torch.equal, flattened(found), flattened(expected)))


def flattened(values):
    return [t for v in values for t in (v if isinstance(v, list) else [v])]


def test_versions_are_raised_of_what_is_written():
    g = Given()
    others = [*g.weights, *g.head]
    state, groups, settings = g.updates("adam", others)
    groups[0] = -1
    state = state[3:]
    before = [p._version for p in (*others, *state, *g.m.tensors())]
    ops.window_update_(
        g.start, g.end, 2, g.context, g.m, False, (1.0, 0.0, 1.0, 1.0), None, others,
        [torch.randn_like(p) for p in others], state, groups, settings,
    )  # fmt: skip
    now = [p._version for p in (*others, *state, *g.m.tensors())]
    raised = [b > a for a, b in zip(before, now, strict=True)]
    written = len(others) + len(state)
    assert not raised[0] and all(raised[1:written]) and not any(raised[written:])


def test_opcheck():
    g = Given()
    names = ("test_schema", "test_autograd_registration", "test_faketensor")
    own = g.m.tensors()
    torch.library.opcheck(
        torch.ops.fastdni.window_fwd.default,
        ("test", g.output, g.labels, "cross_entropy", 1.0, g.head[0], g.head[1], g.end, 2,
         g.context, own, 2, True, 0.5, g.rows),
        test_utils=names,
    )  # fmt: skip
    others = [*g.weights, *g.head]
    state, groups, settings = g.updates("adam", [*own, *others])
    torch.library.opcheck(
        torch.ops.fastdni.window_update_.default,
        ("test", g.start, g.end, 2, g.context, own, 2, True, True, 5.0, 0.0, 1.0, 0.4, None, others,
         [torch.randn_like(p) for p in others], state, groups, settings),
        test_utils=names,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastdni.window_step_.default,
        ("test", "lstm", g.x, g.start, g.weights, True, g.labels, "cross_entropy", 1.0, g.head[0],
         g.head[1], 2, g.context, g.context, own, 2, True, True, 0.5, 5.0, 0.0, 1.0, 0.4, None,
         g.rows, state, groups, settings),
        test_utils=names,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must be \(B,\) = \(15,\)"),
        ({"target": torch.full((T * B,), N)}, "target must hold labels from 0 to 5"),
        ({"criterion": "hinge"}, "criterion must be one of"),
        ({"head": [torch.zeros(N, H + 1).double()]}, r"head must take 4 features, got a weight"),
        ({"head": [torch.zeros(N, H)]}, "head must have the output's dtype and device, got"),
        ({"state": [torch.zeros(B, H).double(), torch.zeros(B - 1, H).double()]},
         r"state must hold tensors \(\[L,\] B, H\) of 5 rows"),
        ({"predicted": 3}, "predicted must be from 1 to 2, got 3"),
        ({"predicted": 1}, r"input_trigger|must|trigger"),
        ({"ended": torch.zeros(B)}, "ended must be 5 booleans, got torch.float32"),
        ({"ended": torch.zeros(B - 1).bool()}, "ended must be 5 booleans, got Bool"),
        ({"context": torch.zeros(B, C + 1).double()}, "context"),
    ],
)  # fmt: skip
def test_what_it_refuses(change, message):
    g = Given()
    arguments = {
        "output": g.output, "target": g.labels, "criterion": "cross_entropy", "weight": 1.0,
        "head": g.head, "state": g.end, "predicted": 2, "context": g.context, "parameters": g.m,
        "factor": 0.5, "ended": None,
    }  # fmt: skip
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.window_fwd(**arguments | change)


def test_a_refused_update_writes_nothing():
    g = Given()
    others = [*g.weights, *g.head]
    updated = [*g.m.tensors(), *others]
    state, groups, settings = g.updates("adam", updated)
    gradients = [torch.randn_like(p) for p in others]
    given = dict(
        start=g.start, grad_start=g.end, predicted=2, context=g.context, parameters=g.m,
        learns=True, units=(1.0, 0.0, 1.0, 1.0), rows=None, others=others, gradients=gradients,
        state=state, groups=groups, settings=settings,
    )  # fmt: skip
    before = [t.clone() for t in (*updated, *state)]
    for change, message in (
        (
            {"gradients": gradients[1:]},
            "gradients must hold one for each of the 6 parameters, got 5",
        ),
        (
            {"gradients": [gradients[1], *gradients[1:]]},
            "a gradient must have its parameter's shape",
        ),
        ({"state": state[:-1]}, "state holds too few tensors"),
        ({"rows": torch.ones(B)}, "rows must be 5 booleans"),
        ({"grad_start": [s[:, :3] for s in g.end]}, "grad_start must have the shapes of start"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.window_update_(**given | change)
    assert all(map(torch.equal, before, (*updated, *state)))
