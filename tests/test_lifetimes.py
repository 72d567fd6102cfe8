"""What stays alive: nothing that the user has let go of. Without the garbage collector, which may
come late or never: reference counts alone free networks, optimizers, batches and parameters."""

import copy
import gc
import weakref

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, plain_step, twin_of
from torch import nn

import fastdni
from fastdni.training import trainer


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    gc.freeze()  # what was there before need not be looked through by those that collect
    yield
    gc.unfreeze()
    gc.enable()


def mixed(**how):
    net = network(**how)
    net.stages[1][1] = nn.GELU()
    return net


MAKERS = {
    "fused": network,
    "mixed": mixed,
    "local": lambda **how: local(network(**how)),
    "unlocked": lambda **how: network(unlocked=True, **how),
    "backprop": lambda **how: network(bp_lambda=0.5, **how),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
kinds = pytest.mark.parametrize("kind", ["sgd", "adam"])


def in_numpy(tensor):
    """A tensor in the memory of an array, and a reference to that: dead once the memory is free."""
    array = tensor.detach().numpy().copy()
    return torch.from_numpy(array), weakref.ref(array)


def trained(make, kind="adam", steps=4, **how):
    net = make(context=True, **how)
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(steps):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    return net, optimizer


# ---- networks ----


@makers
@kinds
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_network_and_its_optimizer(steps, kind, make):
    net, optimizer = trained(make, kind, steps)
    references = [weakref.ref(net), weakref.ref(optimizer), *map(weakref.ref, net.parameters())]
    references += [*map(weakref.ref, net.modules())]
    del net
    assert references[0]() is None, "the network, while its optimizer lives"
    del optimizer
    assert [r for r in references if r() is not None] == []


def backward(net, optimizer):
    net.backward(**batch(net))


def explained(net, optimizer):
    fastdni.explain(net, batch(net)["x"], optimizer)


def reference(net, optimizer):
    with fastdni.use_backend("reference"):
        net.step(optimizer=optimizer, **batch(net))


def masked(net, optimizer):
    net.step(optimizer=optimizer, update_mask=[True, False, True], **batch(net))


def refused(net, optimizer):
    with pytest.raises(RuntimeError):
        net.step(optimizer=optimizer, **batch(net) | {"target": torch.zeros(6).long() + 100})


def refused_by_the_criterion(net, optimizer):
    def fail(output, target):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        net.step(optimizer=optimizer, **batch(net) | {"criterion": fail})


def with_a_sequence(net, optimizer):
    net.step(optimizer=[optimizer], **batch(net))


def of_many_sizes(net, optimizer):
    for rows in range(2, 14):
        net.step(optimizer=optimizer, **batch(net, rows))


def moved(net, optimizer):
    net.to(torch.float64)
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    net.step(optimizer=optimizer, **batch(net))


def under_autocast(net, optimizer):
    with torch.autocast("cpu", torch.bfloat16):
        net.step(optimizer=optimizer, **batch(net))


def copied(net, optimizer):
    twin = copy.deepcopy(net)
    twin.step(optimizer=OPTIMIZERS["sgd"](twin.parameters()), **batch(twin))


USES = [backward, explained, reference, masked, refused, refused_by_the_criterion, with_a_sequence,
        of_many_sizes, moved, under_autocast, copied]  # fmt: skip


@makers
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_was_done_with_it(use, make):
    net, optimizer = trained(make)
    use(net, optimizer)
    references = [weakref.ref(net), weakref.ref(optimizer), *map(weakref.ref, net.parameters())]
    del net, optimizer
    assert [r for r in references if r() is not None] == []


def test_networks_in_a_loop():
    """Each is gone when the next is made."""
    before = None
    for _ in range(4):
        net, optimizer = trained(network)
        assert before is None or before() is None
        before = weakref.ref(net.stages[0][0].weight)
        del net, optimizer


# ---- optimizers ----


@makers
@kinds
def test_an_optimizer_that_is_let_go(kind, make):
    """While the network lives, and before another optimizer comes."""
    net, optimizer = trained(make, kind)
    group = optimizer.param_groups[0]
    state = [v for entry in optimizer.state.values() for v in entry.values()]
    references = [weakref.ref(optimizer), *map(weakref.ref, state)]
    del optimizer, group, state
    assert [r for r in references if r() is not None] == []
    # And the next one may come where it was.
    twin = copy.deepcopy(net)
    optimizer, own = (OPTIMIZERS[kind](n.parameters()) for n in (net, twin))
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)


@makers
def test_an_optimizer_that_goes_in_the_middle_of_a_step(make, monkeypatch):
    """As when the garbage collector finds the cycle that it was in."""
    net, optimizer = trained(make, "adam")
    twin = copy.deepcopy(net)
    old, new = (torch.optim.SGD(net.parameters(), lr=0.01) for _ in range(2))
    own = torch.optim.SGD(twin.parameters(), lr=0.01)
    net.step(optimizer=old, **batch(net))
    plain_step(twin, optimizer=own, **batch(net))
    left = [old]
    del old
    structure = trainer.Trainer.structure

    def structure_and_collect(self, *arguments):
        found = structure(self, *arguments)
        left.clear()
        return found

    monkeypatch.setattr(trainer.Trainer, "structure", structure_and_collect)
    for seed in range(3):
        net.step(optimizer=new, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)


def test_what_is_forgotten_in_a_step_is_not_remembered_after_it(monkeypatch):
    net, optimizer = trained(MAKERS["fused"], "sgd")
    run, own = trainer.run_whole, net._trainer
    assert own._last is not None

    def run_and_forget(*arguments):
        results = run(*arguments)
        own.forget()
        return results

    monkeypatch.setattr(trainer, "run_whole", run_and_forget)
    net.step(optimizer=optimizer, **batch(net), update_mask=[True] * len(net.stages))
    assert own._last is not None  # a repeated step, in which nothing is run anew
    net.step(optimizer=optimizer, **batch(net, rows=4))
    assert own._last is None


def test_optimizers_one_after_the_other_at_one_address():
    """A new optimizer may be made where the old one was: it is another one all the same."""
    net = network()
    twin = copy.deepcopy(net)
    for number in range(8):
        kind = ("sgd", "adam", "nesterov")[number % 3]
        optimizer, own = (OPTIMIZERS[kind](n.parameters()) for n in (net, twin))
        for each in (optimizer, own):
            each.param_groups[0]["lr"] = 0.001 * (number + 1)
        for seed in range(2):
            net.step(optimizer=optimizer, **batch(net, seed=seed))
            plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)
        del optimizer, own


@kinds
def test_state_that_was_replaced(kind):
    net, optimizer = trained(network, "nesterov" if kind == "sgd" else kind)
    references = [weakref.ref(v) for e in optimizer.state.values() for v in e.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    net.step(optimizer=optimizer, **batch(net))  # which lets go of what it no longer finds
    assert [r for r in references if r() is not None] == []
    optimizer.state.clear()
    net.step(optimizer=optimizer, **batch(net))


# ---- data ----


@makers
@pytest.mark.parametrize("call", ["step", "backward"])
@pytest.mark.parametrize("criterion", ["cross_entropy", "mse", "callable"])
def test_batches(criterion, call, make):
    """The first one's, which a step that is repeated might keep, and the last one's."""
    net, optimizer = trained(make)
    held = []
    for seed in range(3):
        given = batch(net, criterion="mse" if criterion == "mse" else "cross_entropy", seed=seed)
        given["context"] = torch.randn(6, 5, dtype=torch.float64)
        for name in ("x", "target", "context"):
            given[name], memory = in_numpy(given[name])
            held.append(memory)
        if criterion == "callable":
            given["criterion"] = lambda output, target: nn.functional.cross_entropy(output, target)
            held.append(weakref.ref(given["criterion"]))
        if call == "step":
            given["optimizer"] = optimizer
        result = getattr(net, call)(**given)
        del given
        assert [h for h in held if h() is not None] == [], f"after step {seed}"
    kept = [weakref.ref(t) for t in result]
    del result
    assert [k for k in kept if k() is not None] == []


@makers
def test_parameters_that_were_replaced(make):
    net, optimizer = trained(make, "sgd")
    for layer in (net.stages[0][0], net.synthesizers[1].input_trigger):
        old = weakref.ref(layer.weight)
        parameters = optimizer.param_groups[0]["params"]
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        optimizer.param_groups[0]["params"] = [p for p in parameters if p is not old()]
        del parameters
        net.step(optimizer=optimizer, **batch(net))  # which lets go of what it no longer finds
        assert old() is None


@makers
def test_data_that_was_replaced(make):
    """The memory that `p.data` had."""
    net, optimizer = trained(make, "sgd")
    weight = net.stages[0][0].weight
    weight.data, memory = in_numpy(weight)
    for _ in range(3):
        net.step(optimizer=optimizer, **batch(net))
    weight.data = weight.data.clone()
    assert memory() is None
    buffered = network(norm=True)
    own = OPTIMIZERS["sgd"](buffered.parameters())
    buffered.stages[0][1].running_mean, memory = in_numpy(buffered.stages[0][1].running_mean)
    for _ in range(3):
        buffered.step(optimizer=own, **batch(buffered))
    buffered.stages[0][1].running_mean = torch.zeros(9, dtype=torch.float64)
    buffered.step(optimizer=own, **batch(buffered))
    assert memory() is None


@makers
def test_modules_that_were_replaced(make):
    net, optimizer = trained(make, "sgd")
    references = [weakref.ref(m) for m in net.stages[1].modules()]
    own = set(net.stages[1].parameters())
    net.stages[1] = nn.Linear(9, 6).double()
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p not in own]
    del own
    net.step(optimizer=optimizer, **batch(net))
    assert [r for r in references if r() is not None] == []


# ---- what wants to be the only owner ----


@makers
def test_tensors_are_swapped(make):
    net, optimizer = trained(make)
    twin, own = twin_of(net, optimizer)
    for one in (net, twin):
        other = nn.Parameter(0.5 * one.stages[0][0].weight.detach())
        torch.utils.swap_tensors(one.stages[0][0].weight, other)
    for seed in range(2):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)


class Wrapping(nn.Module):
    """A model that the network is a part of: the network is not told when this one is loaded."""

    def __init__(self, net):
        super().__init__()
        self.net, self.other = net, nn.Linear(2, 2)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@makers
@pytest.mark.parametrize("what", ["load", "to", "apply"])
def test_a_wrapping_model_is_loaded_and_converted(what, make, swapping):
    net, optimizer = trained(make, "sgd")
    twin, own = twin_of(net, optimizer)
    for one in (net, twin):
        model = Wrapping(one)
        if what == "load":
            state = {k: (0.9 * v).to(v.dtype) for k, v in model.state_dict().items()}
            model.load_state_dict(state)
        elif what == "to":
            model.to(torch.float32)
            model.to(torch.float64)
        else:
            model._apply(lambda t: 0.5 * t if t.is_floating_point() else t)
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)


# ---- cycles of the user's own are collected ----


def owner_of_a_parameter(net, optimizer):
    net.stages[0][0].weight.owner = net


def owner_of_a_buffer(net, optimizer):
    net.stages[0][1].running_mean.owner = net


def owner_of_the_state(net, optimizer):
    optimizer.state[net.stages[0][0].weight]["exp_avg"].owner = net


def owner_of_the_optimizer(net, optimizer):
    optimizer.net = net


def network_with_its_optimizer(net, optimizer):
    net.optimizer = optimizer
    optimizer.net = net


def hook_of_its_own(net, optimizer):
    net.stages[0].register_forward_hook(lambda module, arguments, output: net and None)


def forward_of_its_own(net, optimizer):
    net.stages[0].forward = lambda x: type(net.stages[0]).forward(net.stages[0], x)


CYCLES = [owner_of_a_parameter, owner_of_a_buffer, owner_of_the_state, owner_of_the_optimizer,
          network_with_its_optimizer, hook_of_its_own, forward_of_its_own]  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cycle", CYCLES, ids=lambda c: c.__name__)
def test_cycles_are_collected(cycle, when):
    net, optimizer = trained(network, norm=True, bias=False)
    cycle(net, optimizer)
    if when == "before":
        for seed in range(4):
            net.step(optimizer=optimizer, **batch(net, seed=seed))
    references = [weakref.ref(net), weakref.ref(optimizer), *map(weakref.ref, net.parameters())]
    del net, optimizer
    gc.collect()
    assert [r for r in references if r() is not None] == []
