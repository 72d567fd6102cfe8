"""Dropout in a stage: torch's random numbers, and the stage stays fused."""

from functools import partial

import pytest
import torch
from network_cases import OPTIMIZERS, batch
from plain_step import assert_same, plain_step, twin_of
from torch import nn

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential

DROPPED = {
    "after the activation": lambda p: [nn.Linear(7, 9), nn.ReLU(), nn.Dropout(p)],
    "before the activation": lambda p: [nn.Linear(7, 9), nn.Dropout(p), nn.Tanh()],
    "first": lambda p: [nn.Dropout(p), nn.Linear(7, 9), nn.ReLU()],
    "after a norm": lambda p: [nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(p)],
    "twice": lambda p: [nn.Dropout(p), nn.Linear(7, 9), nn.ReLU(), nn.Dropout(p)],
    "in place": lambda p: [nn.Linear(7, 9), nn.Dropout(p, inplace=True), nn.Tanh()],
}


def dropping(place, p, where=0):
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(7, 9), nn.ReLU()),
        nn.Sequential(nn.Linear(9, 6), nn.ReLU()),
        nn.Linear(6, 5),
    ]
    layers = DROPPED[place](p)
    sizes = [(7, 9), (9, 6)][where]
    for index, layer in enumerate(layers):
        if type(layer) is nn.Linear:
            layers[index] = nn.Linear(*sizes)
        elif type(layer) is nn.BatchNorm1d:
            layers[index] = nn.BatchNorm1d(sizes[1])
    stages[where] = nn.Sequential(*layers)
    return DecoupledSequential(
        *stages, synthesizers=[BasicSynthesizer(n, context_dim=5) for n in (9, 6)]
    ).double()


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("place", DROPPED)
def test_dropout_is_torchs(place, p, where):
    """The same random numbers, so the same values."""
    net = dropping(place, p, where)
    optimizer = OPTIMIZERS["nesterov"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(4):
        given = batch(net, seed=seed)
        torch.manual_seed(seed)
        results = net.step(optimizer=optimizer, **given)
        after = torch.rand(1)
        torch.manual_seed(seed)
        expected = plain_step(twin, optimizer=own, **given)
        assert torch.equal(after, torch.rand(1)), "as many random numbers were drawn"
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)


def test_dropout_in_front_of_the_network_leaves_it_fused():
    net = dropping("first", 0.5)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [True] * 3


@pytest.mark.parametrize("place", ["after the activation", "after a norm"])
def test_dropout_leaves_the_other_stages_fused(place):
    net = dropping(place, 0.5)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [False, True, True]


def test_dropout_that_changes():
    net = dropping("after the activation", 0.5)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed, p in enumerate((0.5, 0.5, 0.1, None, None, 0.9)):
        for one in (net, twin):
            layer = one.stages[0][2]
            layer.train(p is not None)
            layer.p = layer.p if p is None else p
        given = batch(net, seed=seed)
        for of, step in ((optimizer, net.step), (own, partial(plain_step, twin))):
            torch.manual_seed(seed)
            step(optimizer=of, **given)
        assert_same(net, twin)


def test_random_numbers_differ_from_step_to_step():
    net = dropping("after the activation", 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    given = batch(net)
    torch.manual_seed(0)
    losses = {net.step(optimizer=optimizer, **given).loss.item() for _ in range(5)}
    assert len(losses) == 5
