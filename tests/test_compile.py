"""torch.compile: a network with a BackwardInterface is one graph, with the same gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import sample
from plain_dni import batches, networks
from torch import nn

import fastdni as dni


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters()}


def loss_of(network, images, labels):
    return F.nll_loss(network(images, labels), labels)


# The compiler of C++ is what takes the time: in a sample it compiles static shapes alone.
@pytest.mark.parametrize(
    "dynamic, backend",
    sample([(False, "inductor"), (True, "aot_eager"), (True, "inductor"), (False, "aot_eager")]),
)
def test_network_compiles_to_one_graph(dynamic, backend):
    network, twin = networks("backward", True, width=16)
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in (8, 12) if dynamic else (8,):
        images, labels = batches(1, size=size)[0]
        for model in (network, twin):
            model.zero_grad()
        loss = loss_of(compiled, images, labels)
        assert all(g is None for g in gradients(network).values())  # not before the backward pass
        loss.backward(retain_graph=True)
        loss_of(twin, images, labels).backward()
        torch.testing.assert_close(gradients(network), gradients(twin), rtol=1e-9, atol=1e-12)
    loss.backward()
    doubled = {name: 2 * g for name, g in gradients(twin).items()}
    torch.testing.assert_close(gradients(network), doubled, rtol=1e-9, atol=1e-12)


def test_complete_unlock_compiles_around_the_interface():
    network, twin = networks("bidirectional", True, width=16)
    compiled = torch.compile(network, backend="aot_eager")
    images, labels = batches(1, size=8)[0]
    loss_of(compiled, images, labels).backward()
    loss_of(twin, images, labels).backward()
    torch.testing.assert_close(gradients(network), gradients(twin), rtol=1e-9, atol=1e-12)


def test_steps_by_hand_compile_around_the_interface():
    def use(interface, linear, x):
        h = torch.tanh(linear(x))
        interface.send(h, h)
        interface.backward(h)
        return interface.make_trigger(h.detach()) * 2

    linear = nn.Linear(4, 5).double()
    interface = dni.BackwardInterface(dni.BasicSynthesizer(5, n_hidden=1).double())
    twins = copy.deepcopy(interface), copy.deepcopy(linear)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compile(use, backend="aot_eager")(interface, linear, x).sum().backward()
    use(*twins, x).sum().backward()
    torch.testing.assert_close(gradients(interface), gradients(twins[0]))
    torch.testing.assert_close(gradients(linear), gradients(twins[1]))


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, trigger, context):
        return torch.tanh(self.linear(trigger))


def test_custom_synthesizer_compiles_too():
    network = nn.Sequential(nn.Linear(4, 5), dni.BackwardInterface(Custom()), nn.Linear(5, 2))
    network.double()
    twin = copy.deepcopy(network)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compile(network, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(gradients(network), gradients(twin))


@pytest.mark.parametrize("custom", [False, True], ids=["basic", "custom"])
def test_sending_without_learning_compiles(custom):
    synthesizer = (Custom() if custom else dni.BasicSynthesizer(5)).requires_grad_(False)
    interface = dni.BackwardInterface(synthesizer, learn=False)
    network = nn.Sequential(nn.Linear(4, 5), interface, nn.Linear(5, 2)).double()
    twin = copy.deepcopy(network)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.compile(network, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(gradients(network), gradients(twin))


def test_eval_mode_compiles():
    network = nn.Sequential(nn.Linear(4, 5), dni.BackwardInterface(Custom())).eval()
    x = torch.randn(3, 4)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
