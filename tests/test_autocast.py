"""Mixed precision: under autocast products are bfloat16, parameters and gradients float32."""

import copy

import pytest
import torch
import torch.nn.functional as F
from plain_dni import batches, networks

import fastdni as dni


def gradients(network, images, labels, **autocast):
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, **autocast):
        loss = F.nll_loss(network(images, labels), labels)
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("kind", ["backward", "bidirectional"])
def test_autocast_is_as_close_to_float64_as_the_eager_form(kind):
    network, twin = networks(kind, True, torch.float32, width=64)
    with torch.no_grad():  # predictions that are not almost nothing
        for p in network.interface.parameters():
            p.add_(0.05 * torch.randn_like(p))
    twin.load_state_dict(network.state_dict())
    exact = copy.deepcopy(twin).double()
    (images, labels), (single, _) = batches(1)[0], batches(1, dtype=torch.float32)[0]
    wanted = gradients(exact, images, labels, enabled=False)
    eager = gradients(twin, single, labels)
    ours = gradients(network, single, labels)
    for name, grad in ours.items():
        assert grad.dtype == torch.float32, name
        own, theirs = ((g[name] - wanted[name]).norm() for g in (ours, eager))
        # Both round to bfloat16 (8 bits), here and there at different places.
        assert own <= 2 * theirs + 1e-2 * wanted[name].norm(), name


def test_float64_is_left_alone_by_autocast():
    interface = networks("backward", True, width=16)[0].interface
    context = torch.zeros(4, 10, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), dni.synthesizer_context(context):
        assert interface.receive(torch.randn(4, 16).double()).dtype == torch.float64


def test_module_in_bfloat16():
    network, _ = networks("backward", True, torch.bfloat16, width=16)
    images, labels = batches(1, dtype=torch.bfloat16)[0]
    F.nll_loss(network(images, labels), labels).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())
