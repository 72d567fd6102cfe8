"""Copies of networks: deep, shallow, pickled, averaged, of compiled ones; each trains apart."""

import copy
import io
import pickle

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastdni


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
    "within another module": lambda module: copy.deepcopy(nn.Sequential(module))[0],
}
ways = pytest.mark.parametrize("way", WAYS)


def trained(make=network, name="adam", **how):
    """A network that has repeated a step."""
    net = make(n_hidden=1, context=True, **how)
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    return net, optimizer


def moved(net):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)


def forward_by_hand(net, x):
    for stage in net.stages:
        for layer in stage:
            x = layer(x)
    return x


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield "eager"
    torch._dynamo.reset()


@ways
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_a_copy_of_a_compiled_module_answers_with_its_own_weights(way, called, compiler):
    net, _ = trained()
    x = batch(net)["x"]
    net.compile(backend=compiler)
    if called:
        torch.testing.assert_close(net(x), forward_by_hand(net, x))
    twin = WAYS[way](net)
    torch.testing.assert_close(twin(x), net(x))
    moved(net)
    assert not torch.allclose(net(x), twin(x))
    torch.testing.assert_close(twin(x), forward_by_hand(twin, x))
    moved(twin)
    torch.testing.assert_close(twin(x), net(x))
    # As a copy of any compiled module: it is not compiled, and may be.
    plain = nn.Linear(2, 2)
    plain.compile(backend=compiler)
    assert (copy.deepcopy(plain)._compiled_call_impl is None) == (twin._compiled_call_impl is None)
    twin.compile(backend=compiler)
    torch.testing.assert_close(twin(x), forward_by_hand(twin, x))


@ways
@pytest.mark.parametrize("make", [network, lambda **how: local(network(**how))],
                         ids=["fused", "local"])  # fmt: skip
def test_copy_and_original_train_apart(way, make):
    if way != "deepcopy" and way != "within another module" and make is not network:
        pytest.skip("its hooks cannot be pickled")
    net, optimizer = trained(make, norm=True, bias=False)
    twin, own = twin_of(net, optimizer)
    copied, _ = WAYS[way](net), None
    theirs = type(optimizer)(copied.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain, plains_own = twin_of(copied, theirs)
    for seed in range(4):  # in turns, on data of their own
        for one, of, by, plain_of, first in (
            (net, optimizer, twin, own, 10),
            (copied, theirs, plain, plains_own, 20),
        ):
            one.step(optimizer=of, **batch(net, seed=first + seed))
            plain_step(by, optimizer=plain_of, **batch(net, seed=first + seed))
    assert_same(net, twin)
    assert_same(copied, plain)
    assert_same_state(optimizer, own)
    assert_same_state(theirs, plains_own)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_network_and_optimizer_together(way):
    net, optimizer = trained()
    copied, theirs = WAYS[way]((net, optimizer))
    held = {id(p) for g in theirs.param_groups for p in g["params"]}
    assert held == set(map(id, copied.parameters()))
    twin, own = twin_of(copied, theirs)
    kept = [p.clone() for p in net.parameters()]
    for seed in range(3):
        copied.step(optimizer=theirs, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
    assert_same(copied, twin)
    assert_same_state(theirs, own)
    assert all(map(torch.equal, kept, net.parameters()))


def test_a_copied_optimizer_over_the_same_parameters():
    net, optimizer = trained()
    twin, own = twin_of(net, optimizer)
    branched, their_branch = copy.copy(optimizer), copy.copy(own)
    for each in (branched, their_branch):
        each.state = copy.copy(each.state)
        each.state.clear()
    for seed, (one, of) in enumerate([(optimizer, own), (branched, their_branch)] * 3):
        net.step(optimizer=one, **batch(net, seed=seed))
        plain_step(twin, optimizer=of, **batch(net, seed=seed))
        assert_same(net, twin)


def test_a_shallow_copy_trains_the_same_parameters():
    net, optimizer = trained()
    twin, own = twin_of(net, optimizer)
    shallow = copy.copy(net)
    for seed in range(6):
        (net, shallow)[seed % 2].step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)
    assert shallow.stages is net.stages
    torch.testing.assert_close(shallow(batch(net)["x"]), twin(batch(net)["x"]))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize(
    "how", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}]
)
def test_averages_of_weights(how, compiled, compiler):
    net, optimizer = trained(norm=True, bias=False)
    twin, own = twin_of(net, optimizer)
    if compiled:
        net.compile(backend=compiler)
        net(batch(net)["x"])
        twin.load_state_dict(net.state_dict())  # statistics moved
    averages = AveragedModel(net, **how), AveragedModel(twin, **how)
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        averages[0].update_parameters(net)
        averages[1].update_parameters(twin)
    assert_same(*averages)
    x = batch(net)["x"]
    for each in averages:
        each.eval()
    torch.testing.assert_close(averages[0](x), averages[1](x), rtol=1e-9, atol=1e-9)


class Mine(fastdni.DecoupledSequential):
    """A subclass with a state of its own."""

    def __init__(self, *stages, **options):
        super().__init__(*stages, **options)
        self.seen = {"steps": 0}

    def step(self, *arguments, **options):
        self.seen["steps"] += 1
        return super().step(*arguments, **options)


@ways
def test_a_subclass(way):
    net = Mine(nn.Linear(7, 9), nn.Linear(9, 5), synthesizers=[fastdni.BasicSynthesizer(9)])
    net.double()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    net.step(optimizer=optimizer, **batch(net))
    copied = WAYS[way](net)
    assert type(copied) is Mine and copied.seen == {"steps": 1} and copied.seen is not net.seen
    twin = copy.deepcopy(copied)
    one, two = OPTIMIZERS["adam"](copied.parameters()), OPTIMIZERS["adam"](twin.parameters())
    copied.step(optimizer=one, **batch(net))
    plain_step(twin, optimizer=two, **batch(net))
    assert_same(copied, twin)


def test_what_is_pickled_is_what_a_module_is():
    """Nothing of how a network trained: neither plans nor batches nor optimizers."""
    fresh = network(n_hidden=1, context=True)
    net, _ = trained()
    with torch.no_grad():
        for p, q in zip(net.parameters(), fresh.parameters(), strict=True):
            p.copy_(q)
    assert len(pickle.dumps(net)) == len(pickle.dumps(fresh))
    assert set(net.__getstate__()) == set(fresh.__getstate__())
    assert set(nn.Module.__getstate__(fresh)) >= set(fresh.__getstate__())


def test_the_optimizer_is_pickled_as_ever():
    net, optimizer = trained()
    twin, own = twin_of(net, optimizer)
    plain_step(twin, optimizer=own, **batch(net))
    net.step(optimizer=optimizer, **batch(net))
    again = pickle.loads(pickle.dumps(optimizer))
    assert set(vars(again)) == set(vars(pickle.loads(pickle.dumps(own))))
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    for entry in state["state"].values():
        assert {k: type(v) for k, v in entry.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), torch.Tensor
        )


@ways
def test_a_copy_made_within_a_step(way):
    """A criterion that keeps the network as it is in the middle of a step."""
    net, optimizer = trained(name="sgd")
    copies = []

    def criterion(output, target):
        copies.append(WAYS[way](net))
        return nn.functional.cross_entropy(output, target)

    before = [p.clone() for p in net.parameters()]
    net.step(optimizer=optimizer, **batch(net) | {"criterion": criterion})
    assert all(map(torch.equal, before, copies[0].parameters()))
    twin = copy.deepcopy(copies[0])
    one, two = OPTIMIZERS["sgd"](copies[0].parameters()), OPTIMIZERS["sgd"](twin.parameters())
    copies[0].step(optimizer=one, **batch(net))
    plain_step(twin, optimizer=two, **batch(net))
    assert_same(copies[0], twin)


def test_shared_memory_of_a_copy():
    """`share_memory` moves the parameters; a copy made before keeps its own."""
    net, optimizer = trained()
    twin, own = twin_of(net, optimizer)
    net.share_memory()
    for seed in range(2):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
    assert_same(net, twin)
    assert all(p.is_shared() for p in net.parameters())


def test_functional_calls_of_a_network_that_trains():
    net, optimizer = trained()
    twin, own = twin_of(net, optimizer)
    x = batch(net)["x"]
    values = {k: 0.5 * v for k, v in net.state_dict().items()}
    found = torch.func.functional_call(net, values, (x,))
    half = copy.deepcopy(net)
    half.load_state_dict(values)
    torch.testing.assert_close(found, half(x))
    for seed in range(2):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
    assert_same(net, twin)
