"""Networks that have repeated a step, beside the oracle, and steps of both."""

import torch
from network_cases import OPTIMIZERS, batch, network
from plain_step import assert_same, assert_same_state, plain_step, twin_of


def made(kind, **how):
    """A network that has repeated a step, its optimizer, and the same for the oracle."""
    options = {"norm": True, "n_hidden": 1, "context": True, "bias": kind == "nesterov"} | how
    net = network(**options)
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    return net, optimizer, *twin_of(net, optimizer)


def take(net, optimizer, twin, own, given) -> None:
    """A step of both, and whether all of it is the same."""
    results = net.step(optimizer=optimizer, **given)
    expected = plain_step(twin, optimizer=own, **given)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert_same(net, twin)
    assert_same_state(optimizer, own)


def hold_its_own(optimizer, net) -> None:
    """Takes parameters that the network has lost out of the optimizer: it must hold no other."""
    own = set(map(id, net.parameters()))
    for group in optimizer.param_groups:
        if not own.issuperset(map(id, group["params"])):
            group["params"] = [p for p in group["params"] if id(p) in own]
