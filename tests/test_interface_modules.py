"""The drop-in modules as PyTorch's modules: state, copies, hooks, parametrizations, clipping."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from interface_cases import (
    BATCH,
    CONTEXT,
    WIDTH,
    expect,
    gradients,
    make_synthesizer,
    upstream,
)
from plain_dni import batches, networks
from torch import nn
from torch.nn.utils import prune

import fastdni as dni


def test_state_dict_keys_and_round_trip():
    both = dni.BidirectionalInterface(make_synthesizer(2, CONTEXT), make_synthesizer(0))
    assert sorted(both.state_dict()) == sorted(
        f"{half}_interface.synthesizer.{name}"
        for half, names in {
            "forward": [
                "input_trigger.weight",
                "input_trigger.bias",
                "input_context.weight",
                "input_context.bias",
                "layers.0.weight",
                "layers.0.bias",
                "layers.1.weight",
                "layers.1.bias",
            ],
            "backward": ["input_trigger.weight", "input_trigger.bias"],
        }.items()
        for name in names
    )
    other = dni.BidirectionalInterface(make_synthesizer(2, CONTEXT), make_synthesizer(0))
    file = io.BytesIO()
    torch.save(both.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expect(other.state_dict(), both.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(duplicate):
    interface = dni.BackwardInterface(make_synthesizer(context_dim=CONTEXT))
    twin = duplicate(interface)
    trigger, context = torch.randn(BATCH, WIDTH).double(), torch.randn(BATCH, CONTEXT).double()
    with dni.synthesizer_context(context):
        expect(twin.receive(trigger), interface.receive(trigger))
    assert twin.synthesizer.input_trigger.weight is not interface.synthesizer.input_trigger.weight


def test_functional_call():
    interface = dni.BackwardInterface(make_synthesizer())
    values = {
        name: torch.randn_like(p).requires_grad_() for name, p in interface.named_parameters()
    }
    twin = copy.deepcopy(interface)
    twin.load_state_dict(values)
    trigger, leaf = upstream(BATCH, WIDTH)
    twin_leaf = leaf.detach().clone().requires_grad_()
    (torch.func.functional_call(interface, values, (trigger,)) ** 2).sum().backward()
    (twin(torch.tanh(twin_leaf)) ** 2).sum().backward()
    expect(leaf.grad, twin_leaf.grad)
    expect([v.grad for v in values.values()], gradients(twin))
    assert all(g is None for g in gradients(interface))


def hooked(synthesizer):
    synthesizer.register_forward_hook(lambda module, args, output: output * 2)


def inner_hooked(synthesizer):
    synthesizer.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def parametrized(synthesizer):
    torch.nn.utils.parametrizations.weight_norm(synthesizer.layers[0])


def pruned(synthesizer):
    prune.random_unstructured(synthesizer.layers[0], "weight", 0.5)


def replaced(synthesizer):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    synthesizer.layers[0] = Doubled(WIDTH, WIDTH).double()


def patched(synthesizer):
    forward = synthesizer.layers[0].forward
    synthesizer.layers[0].forward = lambda x: 2 * forward(x)


def without_one_bias(synthesizer):
    synthesizer.layers[0].bias = None


@pytest.mark.parametrize(
    "change",
    [hooked, inner_hooked, parametrized, pruned, replaced, patched, without_one_bias],
    ids=lambda change: change.__name__,
)
def test_a_changed_basic_synthesizer_keeps_its_meaning(change):
    synthesizer = make_synthesizer()
    change(synthesizer)
    interface = dni.BackwardInterface(synthesizer)
    trigger, leaf = upstream(BATCH, WIDTH)
    expected = synthesizer(trigger.detach())
    out = interface(trigger)
    expect(leaf.grad, expected.detach() * (1 - torch.tanh(leaf.detach()) ** 2))
    true_gradient = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    out.backward(true_gradient)
    parameters = list(synthesizer.parameters())
    wanted = torch.autograd.grad((expected - true_gradient).square().sum() / BATCH, parameters)
    expect([p.grad for p in parameters], list(wanted))


def test_gradient_clipping():
    network, twin = networks("backward", True, width=16)
    norms = []
    for model in (network, twin):
        images, labels = batches(1, size=8)[0]
        F.nll_loss(model(images, labels), labels).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    expect(norms[0], norms[1])
    expect(gradients(network), gradients(twin))


def test_float16_has_no_kernels_and_is_served_by_the_reference():
    interface = dni.BackwardInterface(make_synthesizer().half())
    leaf = torch.randn(BATCH, WIDTH, dtype=torch.float16, requires_grad=True)
    interface(leaf * 1).sum().backward()
    assert leaf.grad.dtype == torch.float16
    assert all(g.dtype == torch.float16 for g in gradients(interface))


def test_empty_batch():
    interface = dni.BackwardInterface(make_synthesizer())
    trigger, leaf = upstream(0, WIDTH)
    interface(trigger).sum().backward()
    assert leaf.grad.shape == (0, WIDTH)
    assert all(torch.all(g == 0) for g in gradients(interface))
