"""The update op: against torch.optim and its equations, and what it refuses."""

import pytest
import torch
from layouts import LAYOUTS

from fastdni import ops, reference, use_backend
from fastdni.ops import flat
from fastdni.reference import OptimizerSettings

SHAPES = [(3, 4), (5,), (2, 3, 3), (1, 1), (700, 30)]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}, OptimizerSettings("sgd", lr=0.01, weight_decay=0.1)),
    "nesterov": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
        OptimizerSettings("sgd_momentum", lr=0.01, weight_decay=0.1, a=0.9, nesterov=True),
    ),
    "adam": (
        torch.optim.Adam,
        {"betas": (0.8, 0.99)},
        OptimizerSettings("adam", lr=0.01, weight_decay=0.1, a=0.8, b=0.99, eps=1e-8),
    ),
    "adamw": (
        torch.optim.AdamW,
        {"betas": (0.8, 0.99)},
        OptimizerSettings("adamw", lr=0.01, weight_decay=0.1, a=0.8, b=0.99, eps=1e-8),
    ),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def given(dtype, count=2):
    """Parameters, and gradients of several steps."""
    generator = torch.Generator().manual_seed(0)

    def made():
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]

    return made(), [made() for _ in range(count)]


def kept(optimizer):
    """What torch keeps, in the op's order."""
    order = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step")
    every = [p for group in optimizer.param_groups for p in group["params"]]
    entries = [optimizer.state[p] for p in every]
    return [entry[key] for entry in entries for key in order if key in entry]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "offset"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_torchs_update(name, dtype, layout):
    kind, how, row = OPTIMIZERS[name]
    start, gradients = given(dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = kind(theirs, 0.01, weight_decay=0.1, **how)
    for p, g in zip(theirs, gradients[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    ours = [LAYOUTS[layout](p.detach().clone()).requires_grad_() for p in theirs]
    state = [LAYOUTS[layout](s.clone()) if s.dim() else s.clone() for s in kept(optimizer)]
    versions = [t._version for t in (*ours, *state)]
    found = [LAYOUTS[layout](g) for g in gradients[1]]
    ops.update_(ours, found, state, [0] * len(ours), flat([row]))
    for p, g in zip(theirs, gradients[1], strict=True):
        p.grad = g
    optimizer.step()
    tolerance = TOLERANCES[dtype]
    for one, two in zip([*ours, *state], [*theirs, *kept(optimizer)], strict=True):
        torch.testing.assert_close(one.detach(), two.detach(), rtol=tolerance, atol=tolerance)
    assert all(t._version > v for t, v in zip((*ours, *state), versions, strict=True))


def test_it_is_its_equations():
    """Several groups, one without an optimizer, rates that are tensors."""
    rows = [OPTIMIZERS["adam"][2], OPTIMIZERS["nesterov"][2]._replace(lr=float("nan"))]
    groups = [0, 1, -1, 1, 0]
    found = []
    for op in (ops.update_, reference.update_):
        parameters, (gradients, state) = given(torch.float64)
        kept = []
        for group, s in zip(groups, state, strict=True):
            if group == 0:
                kept += [s, s.square(), torch.tensor(4.0)]
            elif group == 1:
                kept += [s, torch.tensor(0.02, dtype=torch.float64)]
        op(parameters, gradients, kept, groups, flat(rows))
        found.append([*parameters, *kept])
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


def test_a_backend_without_kernels_has_the_equations():
    found = []
    for backend in ("cpu", "reference"):
        parameters, (gradients,) = given(torch.float64, 1)
        with use_backend(backend):
            assert ops.update_is_compiled(parameters) == (backend == "cpu")
            ops.update_(parameters, gradients, [], [0] * 5, flat([OPTIMIZERS["sgd"][2]]))
        found.append(parameters)
    torch.testing.assert_close(*found)


def test_what_it_serves():
    (one, two, *_), _ = given(torch.float32)
    assert ops.update_is_compiled([one, two])
    assert not ops.update_is_compiled([one, two.double()])
    assert not ops.update_is_compiled([one.to("meta")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g, s, n: g.pop(), "gradients must hold one for each of the 5 parameters, got 4"),
        (lambda p, g, s, n: g.__setitem__(1, g[0]), "a gradient must have its parameter's shape"),
        (lambda p, g, s, n: g.__setitem__(1, g[1].float()), "and dtype, got"),
        (lambda p, g, s, n: s.pop(), "state holds too few tensors: 4"),
        (lambda p, g, s, n: s.append(s[0]), "state holds too many tensors: 6"),
        (lambda p, g, s, n: s.__setitem__(2, s[1]), r"optimizer state \(or gradient\) must be a"),
        (lambda p, g, s, n: n.pop(), "groups must hold 5 numbers, got 4"),
        (lambda p, g, s, n: n.__setitem__(0, 1), "groups must be below 1, got 1"),
        (lambda p, g, s, n: (p.__setitem__(4, p[4].float()), g.__setitem__(4, g[4].float())),
         "parameters must be of one dtype"),
    ],
)  # fmt: skip
def test_what_it_refuses(change, message):
    """Before anything is written."""
    parameters, (gradients, state) = given(torch.float64)
    groups, written = [0] * 5, [*parameters, *state]
    before = [t.clone() for t in written]
    change(parameters, gradients, state, groups)
    arguments = (parameters, gradients, state, groups, flat([OPTIMIZERS["nesterov"][2]]))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdni.update_("test", *arguments)
    assert all(map(torch.equal, written, before))


def test_opcheck():
    parameters, (gradients, state) = given(torch.float64)
    arguments = (parameters, gradients, state, [0] * 5, flat([OPTIMIZERS["nesterov"][2]]))
    names = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.fastdni.update_.default, ("test", *arguments), test_utils=names)
