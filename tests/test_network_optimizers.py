"""The user's optimizers, and what changes between two steps of a network."""

import copy
import warnings

import pytest
import torch
from network_cases import (
    OPTIMIZERS,
    batch,
    local,
    network,
    optimizer_of,
    reasons,
    same,
    state_of,
    steps_of,
    structure,
    train,
)
from torch import nn
from torch.optim.lr_scheduler import StepLR

# ---- the user's optimizer ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_go_from_fused_to_unfused_and_back(name):
    bias = not name.startswith("adam")
    net = network(norm=True, context=True, bias=bias)
    plain = local(net)
    optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, plain))
    for _ in range(4):
        same(train(net, optimizer, 2), train(plain, own, 2), 1e-9)
        # Each goes on from the other's checkpoint.
        states = [copy.deepcopy(o.state_dict()) for o in (optimizer, own)]
        optimizer.load_state_dict(states[1])
        own.load_state_dict(states[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_the_optimizers_own_step(name):
    """Keys, dtypes and shapes, in the order of torch."""
    net = network(dtype=torch.float32)
    plain = local(net)
    optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, plain))
    steps_of(net, optimizer, 1)
    steps_of(plain, own, 1)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        found, wanted = optimizer.state.get(p, {}), own.state.get(q, {})
        assert sorted(found) == sorted(wanted)
        for key in wanted:
            assert (found[key].dtype, found[key].shape) == (wanted[key].dtype, wanted[key].shape)
    assert optimizer.state_dict()["state"].keys() == own.state_dict()["state"].keys()


def test_schedulers_give_no_warning_and_are_heeded():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        scheduler = StepLR(optimizer, 2, gamma=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(6):
                twin.step(optimizer=optimizer, **batch(twin, seed=seed))
                scheduler.step()
        values.append([*twin.parameters(), *state_of(optimizer)])
    assert structure(net).reasons == [None] * 3 and not reasons(net, optimizer_of(net))[0]
    same(*values)


def test_groups_options_and_tensors_as_learning_rates():
    net = network(context=True)
    plain = local(net)
    values = []
    for twin in (net, plain):
        rate = torch.tensor(0.002, dtype=torch.float64)
        optimizer = torch.optim.Adam(
            [
                {"params": twin.stage_parameters(), "lr": rate, "betas": (0.8, 0.9)},
                {"params": twin.synthesizer_parameters()[:3], "eps": 1e-4, "weight_decay": 0.1},
            ],
            lr=1e-3,
            foreach=False,
        )
        for seed in range(6):
            twin.step(optimizer=optimizer, **batch(twin, seed=seed))
            rate.mul_(0.5)
            optimizer.param_groups[1]["lr"] *= 0.9
        values.append([*twin.parameters(), *state_of(optimizer)])
    same(*values)
    free = net.synthesizer_parameters()[3]
    assert free not in optimizer.state, "what no optimizer holds is not updated"


def test_a_group_that_is_added():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = torch.optim.SGD(twin.stage_parameters(), lr=0.01, momentum=0.9)
        steps_of(twin, optimizer, 2)
        optimizer.add_param_group({"params": twin.synthesizer_parameters(), "momentum": 0.0})
        steps_of(twin, optimizer, 2)
        optimizer.param_groups[1]["momentum"] = 0.5
        values.append(steps_of(twin, optimizer, 2))
    same(*values)


def test_several_optimizers():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizers = [
            torch.optim.SGD(twin.stage_parameters(), lr=0.01, momentum=0.5, dampening=0.1),
            torch.optim.AdamW(twin.synthesizer_parameters(), lr=0.01),
        ]
        for seed in range(4):
            twin.step(optimizer=optimizers, **batch(twin, seed=seed))
        values.append([*twin.parameters(), *state_of(optimizers[0]), *state_of(optimizers[1])])
        assert twin._trainer._optimizers.reason is None
    same(*values)


def test_masked_parameters_have_no_state_yet():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, dampening=0.5)
    plain = local(net)
    own = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, dampening=0.5)
    masks = [[True, False, True], [True, True, False], [True, True, True]]
    for number, mask in enumerate(masks):
        for twin, each in ((net, optimizer), (plain, own)):
            twin.step(optimizer=each, update_mask=mask, **batch(twin, seed=number))
        assert len(optimizer.state) == len(own.state)
        assert (net.stages[1][0].weight in optimizer.state) == (number > 0)
    same(net.parameters(), plain.parameters())


UNFUSED = {
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.001, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.001, maximize=True),
    "subclass": type("Own", (torch.optim.SGD,), {}),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_optimizers_take_their_own_step(name):
    net = network(norm=True, context=True, bias=False)
    plain = local(net)
    make = UNFUSED[name]
    values = []
    for twin in (net, plain):
        optimizer = make(twin.parameters()) if name != "subclass" else make(twin.parameters(), 1e-3)
        values.append(steps_of(twin, optimizer, 5))
        assert all(p.grad is None for p in twin.parameters())
    same(*values, 1e-9)
    said = reasons(net, make(net.parameters()) if name != "subclass" else make(net.parameters(), 1))
    word = {"RMSprop": "the optimizer RMSprop", "subclass": "the optimizer Own"}.get(name, name)
    assert all(word in reason for reason in said)


def test_hooks_of_the_optimizers_step_are_called():
    net = network()
    optimizer = optimizer_of(net)
    steps_of(net, optimizer, 1)
    called = []
    handle = optimizer.register_step_post_hook(lambda *arguments: called.append(1))
    steps_of(net, optimizer, 2)
    assert len(called) == 2 and "has hooks" in reasons(net, optimizer)[0]
    handle.remove()
    steps_of(net, optimizer, 2)
    assert len(called) == 2 and reasons(net, optimizer) == [""] * 3


# ---- what changes between steps ----


def changes(net):
    """Ways to change a network; called between steps of the network and of its local twin."""

    def freeze(n):
        n.stages[1][0].weight.requires_grad_(False)

    def thaw(n):
        freeze(n)
        n.stages[1][0].weight.requires_grad_(True)

    def data(n):
        n.stages[0][0].weight.data = 0.5 * n.stages[0][0].weight.data

    def buffer(n):
        n.stages[0][1].reset_running_stats()

    def momentum(n):
        n.stages[0][1].momentum = 0.3

    def norm_eval(n):
        n.stages[1][1].eval()

    def layer(n):
        n.stages[1][2] = nn.Tanh()

    def parameter(n):
        n.stages[0][0].weight.data = n.stages[0][0].weight.data.t().contiguous().t()

    def load(n):
        state = n.state_dict()
        n.load_state_dict({k: (0.9 * v).to(v.dtype) for k, v in state.items()})

    return [freeze, thaw, data, buffer, momentum, norm_eval, layer, parameter, load]


@pytest.mark.parametrize("number", range(9))
def test_a_change_between_steps_is_heeded(number):
    net = network(norm=True, context=True)
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        steps_of(twin, optimizer, 2)
        changes(twin)[number](twin)
        values.append(steps_of(twin, optimizer, 3))
    same(*values, 1e-10)


def test_another_dtype_between_steps():
    net = network(dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    steps_of(net, optimizer, 2)
    net.double()
    plain = local(net)
    values = [steps_of(n, torch.optim.SGD(n.parameters(), lr=0.01), 2) for n in (net, plain)]
    assert values[0][0].dtype == torch.float64
    same(*values)


def test_a_changed_loss_of_state_is_heeded():
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    plain = local(net)
    own = OPTIMIZERS["adam"](plain.parameters())
    for twin, each in ((net, optimizer), (plain, own)):
        steps_of(twin, each, 2)
        weight = twin.stages[0][0].weight
        each.state[weight]["exp_avg"] = torch.ones_like(weight)
        del each.state[twin.stages[1][0].weight]
    same(steps_of(net, optimizer, 2), steps_of(plain, own, 2))


def test_versions_are_raised():
    """Autograd refuses a backward pass through what a step has changed."""
    net = network(norm=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps_of(net, optimizer, 1)
    written = [*net.parameters(), *net.buffers(), *state_of(optimizer)]
    before = [t._version for t in written]
    given = batch(net)
    loss = net(given["x"]).sum()
    net.step(optimizer=optimizer, **given)
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
