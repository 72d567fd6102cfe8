"""A step like the last one takes a shorter way: when it does, and that nothing is missed there."""

import copy
import gc
import weakref

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network, snapshot, state_of

import fastdni
from fastdni import ops


@pytest.fixture
def repeated(monkeypatch):
    """The number of steps that were repeated."""
    count = []
    repeat = ops.sweep_repeat_

    def counted(*arguments):
        results = repeat(*arguments)
        count.append(1)
        return results

    monkeypatch.setattr(ops, "sweep_repeat_", counted)
    return count


def made(name="adam", **how):
    """A network whose next step would be a repeated one, and its optimizer."""
    net = network(n_hidden=1, context=True, dtype=torch.float32, **how)
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    return net, optimizer


def twin_of(net, optimizer):
    """A copy that remembers no step, with an optimizer in the same state."""
    twin = copy.deepcopy(net)
    own = type(optimizer)(twin.parameters())
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, own


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_repeated(repeated, name):
    net, optimizer = made(name)
    before = len(repeated)
    assert before >= 1
    twin, own = twin_of(net, optimizer)
    for seed in range(5):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        # What the twin remembers is taken from it: it goes the long way every time.
        twin._trainer._last = None
        twin.step(optimizer=own, **batch(twin, seed=seed))
    assert len(repeated) == before + 5
    assert all(map(torch.equal, snapshot(net, optimizer), snapshot(twin, own)))


def changes():
    """(what is done before the step, how the step is called) by name."""

    def momentum(net, optimizer):
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)

    def state(net, optimizer):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def entry(net, optimizer):
        kept = optimizer.state[net.stages[0][0].weight]
        kept["exp_avg"] = torch.ones_like(kept["exp_avg"])

    def storage(net, optimizer):
        net.stages[0][0].weight.data = torch.ones_like(net.stages[0][0].weight)

    def frozen(net, optimizer):
        net.stages[0][0].weight.requires_grad_(False)

    def another_module(net, optimizer):
        net.stages[0][1] = torch.nn.Tanh()

    def graded(net, optimizer):
        net.stages[0][0].weight.grad = torch.ones_like(net.stages[0][0].weight)

    def rate(net, optimizer):
        optimizer.param_groups[0]["lr"] = 0.5

    found = (momentum, state, entry, storage, frozen, another_module, graded, rate)
    return {change.__name__: change for change in found}


@pytest.mark.parametrize("change", changes())
def test_what_changed_is_noticed(change):
    net, optimizer = made()
    twin, own = twin_of(net, optimizer)
    for one, of in ((net, optimizer), (twin, own)):
        changes()[change](one, of)
        one.step(optimizer=of, **batch(one, seed=9))
    assert all(map(torch.equal, snapshot(net, optimizer), snapshot(twin, own)))
    assert net.stages[0][0].weight.grad is None


def test_a_mask_holds_for_its_step_alone():
    net, optimizer = made()
    twin, own = twin_of(net, optimizer)
    for mask in ([True, False, True], None, None, None):
        net.step(optimizer=optimizer, update_mask=mask, **batch(net))
        twin._trainer._last = None
        twin.step(optimizer=own, update_mask=mask, **batch(twin))
    before = [p.clone() for p in net.parameters()]
    net.step(optimizer=optimizer, **batch(net))
    assert not any(map(torch.equal, before, net.parameters()))
    twin.step(optimizer=own, **batch(twin))
    assert all(map(torch.equal, snapshot(net, optimizer), snapshot(twin, own)))


def test_surroundings_are_noticed(repeated):
    net, optimizer = made()
    count = len(repeated)
    with fastdni.use_backend("reference"):
        net.step(optimizer=optimizer, **batch(net))
    assert len(repeated) == count
    for _ in range(3):
        net.step(optimizer=optimizer, **batch(net))
    twin, own = twin_of(net, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        for one, of in ((net, optimizer), (twin, own)):
            one.step(optimizer=of, **batch(one))
    assert all(map(torch.equal, snapshot(net, optimizer), snapshot(twin, own)))
    for _ in range(3):
        net.step(optimizer=optimizer, **batch(net))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        net.step(optimizer=optimizer, **batch(net))
    net.eval()
    with pytest.raises(RuntimeError, match="call net.train"):
        net.step(optimizer=optimizer, **batch(net))


def test_a_repeated_step_leaves_what_an_optimizer_leaves():
    net, optimizer = made()
    optimizer._opt_called = False
    parameter = net.stages[0][0].weight
    parameter.grad = torch.ones_like(parameter)
    written = [*net.parameters(), *state_of(optimizer)]
    before = [tensor._version for tensor in written]
    net.step(optimizer=optimizer, **batch(net))
    assert optimizer._opt_called and parameter.grad is None
    assert all(t._version > version for t, version in zip(written, before, strict=True))


def test_batches_of_another_size(repeated):
    net, optimizer = made()
    twin, own = twin_of(net, optimizer)
    for rows in (6, 4, 6, 6, 4):
        net.step(optimizer=optimizer, **batch(net, rows))
        twin._trainer._last = None
        twin.step(optimizer=own, **batch(twin, rows))
    assert all(map(torch.equal, snapshot(net, optimizer), snapshot(twin, own)))


def in_numpy(tensor):
    """A tensor in the memory of an array, and a reference to that: dead once the memory is free."""
    array = tensor.detach().numpy().copy()
    return torch.from_numpy(array), weakref.ref(array)


def test_gradients_are_not_kept_alive():
    net, _ = made()
    parameter = net.stages[0][0].weight
    parameter.grad, memory = in_numpy(torch.zeros_like(parameter))
    net.backward(**batch(net))
    net.zero_grad()
    gc.collect()
    assert memory() is None


def test_state_of_an_optimizer_that_is_used_no_more_is_not_kept_alive():
    net, optimizer = made()
    kept = optimizer.state[net.stages[0][0].weight]
    kept["exp_avg"], memory = in_numpy(kept["exp_avg"])
    for _ in range(3):
        net.step(optimizer=optimizer, **batch(net))
    net.step(optimizer=OPTIMIZERS["sgd"](net.parameters()), **batch(net, rows=5))
    del optimizer, kept
    gc.collect()
    assert memory() is None


def test_parameters_can_be_swapped_on_conversion():
    net, optimizer = made()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
        net.load_state_dict(copy.deepcopy(net).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin = local(net)
    own = OPTIMIZERS["sgd"](twin.parameters())
    for one, of in ((net, optimizer), (twin, own)):
        one.step(optimizer=of, **batch(one))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
