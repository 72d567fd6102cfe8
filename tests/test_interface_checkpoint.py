"""Interfaces in a segment under torch.utils.checkpoint, which runs it twice: each gradient comes
once, with the value that it has without a checkpoint."""

import copy

import pytest
import torch
from interface_cases import BATCH, CONTEXT, WIDTH, expect, gradients, kinds, make_synthesizer
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdni as dni

modes = pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])


class Segment(nn.Module):
    """Layers around an interface, random ones after it."""

    def __init__(self, cross, *interfaces):
        super().__init__()
        self.below, self.above = (nn.Linear(WIDTH, WIDTH).double() for _ in range(2))
        self.interfaces, self.cross = nn.ModuleList(interfaces), cross

    def forward(self, x):
        h = self.cross(torch.tanh(self.below(x)), x, *self.interfaces)
        return self.above(torch.sin(nn.functional.dropout(h)))


def by_forward(h, x, interface):
    return interface(h)


def by_hand(h, x, interface):
    interface.backward(h)
    return interface.make_trigger(h.detach())


def a_message(h, x, interface):
    return interface(h, x) + h


def sent_and_received(h, x, interface):
    interface.send(h, x)
    return interface.receive(x) + h


def with_context(h, x, interface):
    with dni.synthesizer_context(torch.ones(len(h), CONTEXT).double()):
        return interface(h)


CROSSINGS = {
    "forward": (by_forward, dni.BackwardInterface),
    "by hand": (by_hand, dni.BackwardInterface),
    "message": (a_message, dni.ForwardInterface),
    "send": (sent_and_received, dni.UnidirectionalInterface),
    "context": (with_context, dni.BackwardInterface),
    "both": (lambda h, x, interface: interface(h, x), dni.BidirectionalInterface),
}


def segment(crossing, wrap):
    cross, kind = CROSSINGS[crossing]
    context = CONTEXT if crossing == "context" else None
    count = 2 if crossing == "both" else 1
    return Segment(cross, kind(*(wrap(make_synthesizer(1, context)) for _ in range(count))))


def trained(network, x, run):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    run(network, x * 1).square().sum().backward()
    return [x.grad, *gradients(network)]


@modes
@kinds
@pytest.mark.parametrize("crossing", CROSSINGS)
def test_gradients_are_those_without_a_checkpoint(crossing, wrap, reentrant):
    network = segment(crossing, wrap)
    twin = copy.deepcopy(network)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    found = trained(network, x, lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    expect(found, trained(twin, x, lambda net, x: net(x)))


def test_a_context_around_a_checkpoint_reaches_a_basic_synthesizer():
    network = segment("context", lambda s: s)
    network.cross = by_forward
    twin = copy.deepcopy(network)
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)

    def run(net, x, call):
        with dni.synthesizer_context(torch.ones(len(x), CONTEXT).double()):
            return call(net, x)

    def checkpointed(net, x):
        return run(net, x, lambda net, x: checkpoint(net, x, use_reentrant=False))

    found = trained(network, x, checkpointed)
    expect(found, trained(twin, x, lambda net, x: run(net, x, lambda net, x: net(x))))


@modes
def test_a_random_synthesizer_draws_the_same_numbers_in_both_runs(reentrant):
    """Or what is random after it would differ between the output and its gradient."""

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_synthesizer()

        def forward(self, trigger, context):
            return nn.functional.dropout(self.inner(trigger, context))

    for crossing in ("forward", "message", "both"):
        network = segment(crossing, lambda s: Random())
        seen = []
        network.above.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        checkpoint(network, x * 1, use_reentrant=reentrant).sum().backward()
        expect(seen[-1].detach(), seen[0].detach())


def test_without_gradients_an_interface_is_refused_as_ever():
    network = segment("forward", lambda s: s)
    with torch.no_grad(), pytest.raises(RuntimeError, match="call eval"):
        network(torch.randn(BATCH, WIDTH, dtype=torch.float64))
