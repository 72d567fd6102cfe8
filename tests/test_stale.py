"""What changes between two steps is heeded: each change, after steps that were repeated, gives the
values of a step that knows nothing of the ones before."""

import copy
from contextlib import ExitStack

import pytest
import torch
from call_mutations import CALLS
from network_cases import batch
from network_mutations import NETWORKS
from optimizer_mutations import OPTIMIZERS as CHANGES
from repeating import hold_its_own, made, take
from torch import nn


def change_and_compare(change, kind, **how):
    pairs = made(kind, **how)
    net, optimizer, twin, own = pairs
    with ExitStack() as undo:
        for one, of in ((net, optimizer), (twin, own)):
            torch.manual_seed(1)
            with ExitStack() as passing:  # what is process-wide is done once
                change(one, of, undo if one is twin else passing)
            hold_its_own(of, one)
        for seed in range(3):
            take(*pairs, batch(net, seed=10 + seed))
    for seed in range(2):  # and what was undone is heeded, too
        take(*pairs, batch(net, seed=20 + seed))


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("name", NETWORKS | CALLS)
def test_a_changed_network(name, kind):
    change_and_compare((NETWORKS | CALLS)[name], kind)


@pytest.mark.parametrize(
    "name, kind",
    [(name, kind) for name, (kinds, _) in CHANGES.items() for kind in kinds],
)
def test_a_changed_optimizer(name, kind):
    change_and_compare(CHANGES[name][1], kind, norm=name != "eps")


# ---- numbers that change where they are ----


def test_betas_in_a_list_change_in_place():
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        each.param_groups[0]["betas"] = [0.9, 0.99]
    for seed, value in enumerate((0.9, 0.9, 0.1, 0.5, 0.5)):
        for each in (optimizer, own):
            each.param_groups[0]["betas"][seed % 2] = value
        take(*pairs, batch(net, seed=seed))


def test_a_rate_in_a_tensor_changes_in_place():
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        each.param_groups[0].update(lr=torch.tensor(0.01, dtype=torch.float64))
    for seed in range(5):
        for each in (optimizer, own):
            each.param_groups[0]["lr"].mul_(0.5)
        take(*pairs, batch(net, seed=seed))


def test_a_rate_in_a_tensor_is_replaced_by_another():
    net, optimizer, twin, own = pairs = made("nesterov")
    for seed, rate in enumerate((0.01, 0.01, 0.002, 0.03, 0.03, 0.001)):
        for each in (optimizer, own):
            each.param_groups[0]["lr"] = torch.tensor(rate, dtype=torch.float64)
        take(*pairs, batch(net, seed=seed))


def test_state_from_json():
    """Tuples come back as lists."""
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        state = copy.deepcopy(each.state_dict())
        for group in state["param_groups"]:
            group["betas"] = list(group["betas"])
        each.load_state_dict(state)
    for seed in range(4):
        if seed == 2:
            for each in (optimizer, own):
                each.param_groups[0]["betas"][0] = 0.1
        take(*pairs, batch(net, seed=seed))


def test_counts_in_float64_for_the_whole_history():
    """As torch makes them where float64 is the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        net, optimizer, twin, own = pairs = made("adam")
        for seed in range(3):
            take(*pairs, batch(net, seed=seed))
        assert {e["step"].dtype for e in optimizer.state.values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)
    take(*pairs, batch(net, seed=9))


def test_many_counts_in_float64_are_exact():
    """A count that float32 could not hold."""
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        for entry in each.state.values():
            entry["step"] = torch.tensor(2.0**24, dtype=torch.float64)
    for seed in range(3):
        take(*pairs, batch(net, seed=seed))
    assert {e["step"].item() for e in optimizer.state.values()} == {2.0**24 + 3}


# ---- state that is given other data ----


@pytest.mark.parametrize("path", ["repeated", "in parts", "in turns"])
@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_state_of_another_layout(kind, path):
    """Which torch's own step takes."""
    net, optimizer, twin, own = pairs = made(kind, widths=(7, 7, 7, 5))
    if path == "in parts":
        for n in (net, twin):
            n.stages[1].append(nn.Softsign())
    masks = [[True, False, True], [True, True, False]] if path == "in turns" else [None]
    for seed in range(4):
        take(*pairs, batch(net, seed=seed) | {"update_mask": masks[seed % len(masks)]})
    for each in (optimizer, own):
        for entry in each.state.values():
            for key, tensor in entry.items():
                if tensor.shape == (7, 7):
                    entry[key].data = tensor.data.t().contiguous().t()
    for seed in range(4):
        take(*pairs, batch(net, seed=seed) | {"update_mask": masks[seed % len(masks)]})


@pytest.mark.parametrize("path", ["repeated", "in turns"])
def test_state_of_another_shape(path):
    net, optimizer, *_ = made("nesterov")
    masks = [[True, False, True], [True, True, False]] if path == "in turns" else [None]
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net), update_mask=masks[seed % len(masks)])
    buffer = optimizer.state[net.stages[0][0].weight]["momentum_buffer"]
    buffer.data = buffer.data[:3]
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"net.step: a parameter's optimizer state .*\(3, 7\)"):
        net.step(optimizer=optimizer, **batch(net), update_mask=masks[0])
    assert all(map(torch.equal, before, net.parameters()))


# ---- weights that are no parameters ----


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("place", ["stage", "head", "synthesizer", "within a synthesizer"])
def test_a_weight_that_is_computed_anew_for_each_step(place, kind):
    net, optimizer, twin, own = pairs = made(kind, n_hidden=2)
    places = {
        "stage": lambda n: n.stages[1][0],
        "head": lambda n: n.stages[2][0],
        "synthesizer": lambda n: n.synthesizers[0].input_trigger,
        "within a synthesizer": lambda n: n.synthesizers[1].layers[0],
    }
    learned = []
    for one, of in ((net, optimizer), (twin, own)):
        layer = places[place](one)
        value = layer.weight.detach().clone()
        learned.append(nn.Parameter(value / 2))
        layer.value = learned[-1]
        of.add_param_group({"params": [learned[-1]]})
        del layer.weight
        hold_its_own(of, one)
    start = learned[0].clone()
    for seed in range(4):
        for one in (net, twin):
            layer = places[place](one)
            layer.weight = layer.value * 2
        take(*pairs, batch(net, seed=seed))
    assert not torch.equal(start, learned[0]), "the parameter behind the weight learns"


@pytest.mark.parametrize("place", ["stage", "synthesizer"])
def test_a_weight_that_is_a_plain_tensor(place):
    """Without a gradient: it is used, and stays."""
    net, optimizer, twin, own = pairs = made("nesterov")
    for seed in range(4):
        for one in (net, twin):
            layer = one.stages[1][0] if place == "stage" else one.synthesizers[1].input_trigger
            if "weight" in layer._parameters:
                layer.kept = layer.weight
                del layer.weight
            layer.weight = layer.kept.detach() * (1 + seed)
        take(*pairs, batch(net, seed=seed))
