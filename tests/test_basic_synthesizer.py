"""The module BasicSynthesizer: its start, its formula, its errors, its copies."""

import copy
import io
import pickle

import pytest
import torch
from tolerances import assert_near
from torch import nn

import fastdni
from fastdni import BasicSynthesizer, reference

ALL = dict(output_dim=3, n_hidden=2, hidden_dim=6, trigger_dim=5, context_dim=4)


def by_hand(seed, *sizes):
    """Linear layers of (inputs, outputs), drawn one after the other."""
    torch.manual_seed(seed)
    return [nn.Linear(k, n) for k, n in sizes]


def drawn(seed, **arguments):
    torch.manual_seed(seed)
    return BasicSynthesizer(**arguments)


def started(**arguments) -> BasicSynthesizer:
    """One whose last layer is not at its start, zero."""
    synthesizer = BasicSynthesizer(**arguments)
    for p in synthesizer.parameters():
        nn.init.normal_(p)
    return synthesizer


def received(synthesizer, trigger, context=None):
    """The prediction as an interface gets it, from the fused op."""
    with fastdni.synthesizer_context(context):
        return fastdni.UnidirectionalInterface(synthesizer).receive(trigger)


def assert_linear(ours: nn.Linear, theirs: nn.Linear, zero=False):
    assert torch.equal(ours.bias, theirs.bias)
    assert torch.equal(ours.weight, torch.zeros_like(ours.weight) if zero else theirs.weight)


# ---- the start ----


@pytest.mark.parametrize("seed", [0, 7])
def test_parameters_are_drawn_in_dni_pytorchs_order(seed):
    synthesizer = drawn(seed, **ALL)
    trigger, context, first, last = by_hand(seed, (5, 6), (4, 6), (6, 6), (6, 3))
    assert_linear(synthesizer.input_trigger, trigger)
    assert_linear(synthesizer.input_context, context)
    assert_linear(synthesizer.layers[0], first)
    assert_linear(synthesizer.layers[1], last, zero=True)
    assert last.bias.all()


def test_without_hidden_layers_both_inputs_start_at_zero():
    synthesizer = drawn(3, output_dim=3, trigger_dim=5, context_dim=4)
    trigger, context = by_hand(3, (5, 3), (4, 3))
    assert_linear(synthesizer.input_trigger, trigger, zero=True)
    assert_linear(synthesizer.input_context, context, zero=True)
    assert torch.equal(
        synthesizer(torch.ones(2, 5), torch.ones(2, 4))[0], trigger.bias + context.bias
    )


def test_the_first_prediction_is_the_last_bias():
    synthesizer = BasicSynthesizer(**ALL)
    prediction = synthesizer(torch.randn(7, 5), torch.randn(7, 4))
    assert torch.equal(prediction, synthesizer.layers[-1].bias.expand(7, 3))


def test_widths_default_to_the_outputs():
    synthesizer = BasicSynthesizer(8, n_hidden=1)
    assert [tuple(p.shape) for p in synthesizer.parameters()] == [(8, 8), (8,), (8, 8), (8,)]


@pytest.mark.parametrize("n_hidden", [0, 2])
def test_start_at_zero_predicts_nothing_at_first(n_hidden):
    synthesizer = BasicSynthesizer(**ALL | dict(n_hidden=n_hidden))
    assert fastdni.start_at_zero(synthesizer) is synthesizer
    assert not synthesizer(torch.randn(7, 5), torch.randn(7, 4)).any()


# ---- the state dict ----


def test_state_dict_keys_are_dni_pytorchs():
    linear = ["input_trigger.weight", "input_trigger.bias"]
    context = ["input_context.weight", "input_context.bias"]
    layers = [f"layers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert list(BasicSynthesizer(4).state_dict()) == linear
    assert list(BasicSynthesizer(4, context_dim=2).state_dict()) == linear + context
    assert list(BasicSynthesizer(**ALL).state_dict()) == linear + context + layers
    assert BasicSynthesizer(4).input_context is None


def test_without_biases_there_are_weights_only():
    keys = list(BasicSynthesizer(**ALL, bias=False).state_dict())
    names = ["input_trigger", "input_context", "layers.0", "layers.1"]
    assert keys == [f"{name}.weight" for name in names]


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save", "state dict"])
def test_copies_predict_the_same_and_are_their_own(through):
    synthesizer = started(**ALL)
    trigger, context = torch.randn(2, 5), torch.randn(2, 4)
    if through == "deepcopy":
        twin = copy.deepcopy(synthesizer)
    elif through == "pickle":
        twin = pickle.loads(pickle.dumps(synthesizer))
    elif through == "torch.save":
        torch.save(synthesizer, memory := io.BytesIO())
        memory.seek(0)
        twin = torch.load(memory, weights_only=False)
    else:
        twin = BasicSynthesizer(**ALL)
        twin.load_state_dict(synthesizer.state_dict())
    expected = synthesizer(trigger, context)
    assert torch.equal(twin(trigger, context), expected)
    assert torch.equal(
        received(twin, trigger, context),
        received(synthesizer, trigger, context),
    )
    with torch.no_grad():
        twin.layers[-1].bias += 1
    assert torch.equal(synthesizer(trigger, context), expected)


# ---- the formula ----


def oracle(synthesizer, trigger, context):
    """The reference in float64."""
    linears = [synthesizer.input_trigger, *synthesizer.layers]
    has_bias = linears[0].bias is not None
    q = synthesizer.input_context
    prediction, _ = reference.synthesizer_fwd(
        trigger.double(),
        None if context is None else context.double(),
        [x.weight.double() for x in linears],
        [x.bias.double() for x in linears] if has_bias else [],
        None if q is None else q.weight.double(),
        q.bias.double() if q is not None and has_bias else None,
    )
    return prediction.detach()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context_dim", [4, None])
@pytest.mark.parametrize("n_hidden", [0, 1, 2])
def test_module_and_fused_evaluation_are_the_formula(n_hidden, context_dim, bias):
    synthesizer = started(**ALL | dict(n_hidden=n_hidden, context_dim=context_dim), bias=bias)
    trigger = torch.randn(7, 5)
    context = None if context_dim is None else torch.randn(7, 4)
    expected = oracle(synthesizer, trigger, context)
    assert_near(synthesizer(trigger, context).detach(), expected)
    fused = received(synthesizer, trigger, context)
    assert not fused.requires_grad
    assert_near(fused, expected)


@pytest.mark.parametrize("shape", [(7, 4), (1, 4), (4,), (2, 1, 4), (1, 7, 4), (2, 7, 4)], ids=str)
def test_a_context_is_broadcast_over_a_hidden_state(shape):
    """(layers, B, H), the hidden state of a recurrent network, with one context per example."""
    synthesizer = started(**ALL)
    trigger, context = torch.randn(2, 7, 5), torch.randn(shape)
    expected = oracle(synthesizer, trigger, context.expand(2, 7, 4))
    assert_near(synthesizer(trigger, context).detach(), expected)
    assert_near(received(synthesizer, trigger, context), expected)


def test_a_call_is_differentiable_in_every_argument():
    synthesizer = started(**ALL).double()
    trigger, context = (torch.randn(2, n, dtype=torch.float64) for n in (5, 4))
    inputs = [trigger.requires_grad_(), context.requires_grad_()]
    assert torch.autograd.gradcheck(synthesizer, inputs)
    synthesizer(trigger, context).sum().backward()
    assert all(p.grad is not None for p in synthesizer.parameters())


def test_a_context_that_was_not_asked_for_is_not_looked_at():
    synthesizer = started(output_dim=3)
    trigger = torch.randn(2, 3)
    for context in (None, torch.randn(9), "anything"):
        assert torch.equal(synthesizer(trigger, context), synthesizer(trigger))
    assert_near(received(synthesizer, trigger, torch.randn(9)), oracle(synthesizer, trigger, None))


# ---- errors ----


@pytest.mark.parametrize("size", [0, -1, 2.0, "3"])
@pytest.mark.parametrize("argument", ["output_dim", "hidden_dim", "trigger_dim", "context_dim"])
def test_sizes_are_positive_integers(argument, size):
    message = f"BasicSynthesizer: {argument} must be a positive integer, got {size!r}"
    with pytest.raises(ValueError, match=message):
        BasicSynthesizer(**ALL | {argument: size})


@pytest.mark.parametrize("n_hidden", [-1, 1.0, None])
def test_n_hidden_is_an_integer_from_0_on(n_hidden):
    message = f"BasicSynthesizer: n_hidden must be an integer from 0 on, got {n_hidden!r}"
    with pytest.raises(ValueError, match=message):
        BasicSynthesizer(3, n_hidden=n_hidden)


@pytest.mark.parametrize("call", [lambda s, x: s(x), received])
def test_a_missing_context_is_named(call):
    message = r"BasicSynthesizer: context must be \(\.\.\., 4\), got None; wrap the call in"
    with pytest.raises(RuntimeError, match=message):
        call(BasicSynthesizer(**ALL), torch.randn(2, 5))


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (2, 2, 4)], ids=str)
def test_a_context_that_does_not_fit_is_refused(shape):
    with pytest.raises(RuntimeError, match=r"context must be \(2, 4\), got"):
        received(BasicSynthesizer(**ALL), torch.randn(2, 5), torch.randn(shape))
