"""A step is whole or nothing: whatever is found wrong in it, in any part of a network, is found
before the first parameter is written."""

import copy
import itertools

import pytest
import torch
from conftest import sample
from network_cases import OPTIMIZERS, batch, network
from plain_step import assert_same, assert_same_state, plain_step
from torch import nn

from fastdni import BasicSynthesizer, DecoupledSequential

WIDTHS = (7, 9, 8, 6, 5)  # four stages


def with_local(*numbers):
    """A network some of whose stages take local autograd, between fused ones."""

    def make(**how):
        net = network(WIDTHS, context=True, **how)
        for number in numbers:
            net.stages[number].register_forward_hook(lambda module, arguments, output: None)
        return net

    return make


NETWORKS = {
    "fused": with_local(),
    "local": with_local(0, 1, 2, 3),
    "local below": with_local(0),
    "local within": with_local(1),
    "local in turns": with_local(1, 3),
    "local head": with_local(3),
}
networks = pytest.mark.parametrize("kind", NETWORKS)
optimizers = pytest.mark.parametrize("name", ["nesterov", "adam"])


class Mine(Exception):
    pass


def fail(*arguments):
    raise Mine("the user's own")


class Wide(nn.Module):
    """A synthesizer of the wrong shape."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width + 1).double()

    def forward(self, trigger, context):
        return self.inner(trigger)


class Raising(nn.Module):
    """A synthesizer that fails after it has been right for a while."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width).double()

    def forward(self, trigger, context):
        raise Mine("the user's own")


class RaisingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Mine("the user's own")


class Fails(nn.Module):
    """A layer whose backward pass fails."""

    def forward(self, x):
        return RaisingBackward.apply(x)


def replaced(net, optimizer, number, synthesizer):
    gone = set(net.synthesizers[number].parameters())
    net.synthesizers[number] = synthesizer
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    optimizer.add_param_group({"params": list(synthesizer.parameters())})


def misshapen(optimizer, parameter):
    """State that does not fit its parameter."""
    for key, value in optimizer.state[parameter].items():
        if key != "step":
            optimizer.state[parameter][key] = torch.zeros(*value.shape, 2, dtype=value.dtype)


def another_dtype(optimizer, parameter):
    for key, value in optimizer.state[parameter].items():
        if key != "step":
            optimizer.state[parameter][key] = value.to(torch.complex128)


def lacking(optimizer, parameter):
    key = next(k for k in optimizer.state[parameter] if k != "step")
    optimizer.state[parameter] = {k: v for k, v in optimizer.state[parameter].items() if k != key}
    if not optimizer.state[parameter]:
        optimizer.state[parameter][key] = torch.zeros(3, dtype=torch.float64)


FAULTS = {}
for _n, _width in enumerate(WIDTHS[1:-1]):
    FAULTS |= {
        f"synthesizer {_n} of another width": lambda n, o, i=_n, w=_width: replaced(
            n, o, i, BasicSynthesizer(w + 1, trigger_dim=w, context_dim=5).double()
        ),
        f"module of another width as synthesizer {_n}": lambda n, o, i=_n, w=_width: replaced(
            n, o, i, Wide(w)
        ),
        f"synthesizer {_n} raises": lambda n, o, i=_n, w=_width: replaced(n, o, i, Raising(w)),
        f"synthesizer {_n} has a hook that raises": lambda n, o, i=_n: n.synthesizers[
            i
        ].register_forward_hook(fail),
        f"a gradient of synthesizer {_n} raises": lambda n, o, i=_n: n.synthesizers[
            i
        ].input_trigger.weight.register_hook(fail),
        f"the state of synthesizer {_n}": lambda n, o, i=_n: misshapen(
            o, n.synthesizers[i].input_trigger.weight
        ),
    }
for _n in range(len(WIDTHS) - 1):
    FAULTS |= {
        f"a gradient of stage {_n} raises": lambda n, o, i=_n: n.stages[i][0].weight.register_hook(
            fail
        ),
        f"a gradient of stage {_n} raises once it is there": lambda n, o, i=_n: n.stages[i][
            0
        ].weight.register_post_accumulate_grad_hook(fail),
        f"stage {_n} raises": lambda n, o, i=_n: n.stages[i].register_forward_pre_hook(fail),
        f"stage {_n} raises on its way back": lambda n, o, i=_n: n.stages[i].append(Fails()),
        f"a hook on the way back through stage {_n} raises": lambda n, o, i=_n: n.stages[i][
            0
        ].register_full_backward_pre_hook(fail),
        f"the state of stage {_n}": lambda n, o, i=_n: misshapen(o, n.stages[i][0].weight),
        f"the state of stage {_n}'s bias": lambda n, o, i=_n: misshapen(o, n.stages[i][0].bias),
        f"the dtype of the state of stage {_n}": lambda n, o, i=_n: another_dtype(
            o, n.stages[i][0].weight
        ),
        f"the lacking state of stage {_n}": lambda n, o, i=_n: lacking(o, n.stages[i][0].bias),
    }


def everything(net, optimizer):
    """All that a step writes, but running statistics (a forward pass that ran moves them)."""
    state = [v for e in optimizer.state.values() for v in e.values()]
    return [t.clone() for t in (*net.parameters(), *state)]


def identical(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


CASES = sample(itertools.product(["nesterov", "adam"], FAULTS, NETWORKS), every=5)


@pytest.mark.parametrize("name, fault, kind", CASES)
def test_a_fault_in_one_part_changes_no_other(name, fault, kind):
    net = NETWORKS[kind]()
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    FAULTS[fault](net, optimizer)
    kept = everything(net, optimizer)
    grads = [p.grad for p in net.parameters()]
    counts = {id(p): e.get("step") for p, e in optimizer.state.items()}
    with pytest.raises((Mine, RuntimeError, KeyError, TypeError, ValueError)) as found:
        net.step(optimizer=optimizer, **batch(net, seed=9))
    assert str(found.value)
    assert identical(everything(net, optimizer), kept)
    assert [p.grad for p in net.parameters()] == grads
    assert counts == {id(p): e.get("step") for p, e in optimizer.state.items()}


@networks
@optimizers
def test_after_a_step_that_failed_the_next_is_right(kind, name):
    net = NETWORKS[kind]()
    twin = copy.deepcopy(net)
    optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, twin))
    for seed in range(6):
        handle = net.stages[seed % 4][0].weight.register_hook(fail)
        with pytest.raises(Mine):
            net.step(optimizer=optimizer, **batch(net, seed=seed))
        handle.remove()
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)
    assert_same_state(optimizer, own)


@pytest.mark.parametrize("wrong", ["x", "target", "context", "label", "rate", "dtype"])
@networks
def test_arguments_are_refused_before_anything_runs(wrong, kind):
    """Statistics included: nothing has run then."""
    net = NETWORKS[kind](norm=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = batch(net)
    given["context"] = torch.randn(6, 5, dtype=torch.float64)
    net.step(optimizer=optimizer, **given)
    changed = {
        "x": {"x": given["x"][:, :5]},
        "target": {"target": given["target"][:4]},
        "context": {"context": given["context"][:, :4]},
        "label": {"target": given["target"] + 5},
        "rate": {},
        "dtype": {"x": given["x"].float()},
    }[wrong]
    if wrong == "rate":
        optimizer.param_groups[0]["lr"] = float("nan")
    kept = [t.clone() for t in net.state_dict().values()] + everything(net, optimizer)
    with pytest.raises((RuntimeError, ValueError), match="net.step: "):
        net.step(optimizer=optimizer, **given | changed)
    assert identical([*net.state_dict().values(), *everything(net, optimizer)], kept)


@pytest.mark.parametrize("unlocked", [False, True])
def test_a_network_with_one_convolution(unlocked):
    """The local stage is the first; a fused one above it has a synthesizer that does not fit."""
    first = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.ReLU())
    net = DecoupledSequential(
        first,
        nn.Sequential(nn.Linear(12, 9), nn.ReLU()),
        nn.Sequential(nn.Linear(9, 6), nn.ReLU()),
        nn.Linear(6, 5),
        synthesizers=[
            BasicSynthesizer(12),
            BasicSynthesizer(9),
            BasicSynthesizer(7, trigger_dim=6),
        ],
        input_synthesizers=[BasicSynthesizer(n, trigger_dim=8) for n in (12, 9, 6)]
        if unlocked
        else None,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    kept = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"net.step: .*\(6, 6\).*\(6, 7\)"):
        net.step(torch.randn(6, 8), torch.randint(5, (6,)), optimizer)
    assert all(map(torch.equal, kept, net.parameters()))
