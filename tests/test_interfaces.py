"""The drop-in modules, semantics by semantics: those of dni-pytorch, and the repairs."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from interface_cases import (
    BATCH,
    CONTEXT,
    WIDTH,
    Custom,
    expect,
    gradients,
    kinds,
    make_synthesizer,
    upstream,
)
from plain_dni import plain_backward_interface, plain_synthesizer
from torch import nn

import fastdni as dni

# ---- BackwardInterface ----


@kinds
@pytest.mark.parametrize("context_dim", [None, CONTEXT], ids=["", "context"])
@pytest.mark.parametrize("n_hidden", [0, 1, 3])
def test_backward_interface_equals_the_formula(wrap, context_dim, n_hidden):
    synthesizer = make_synthesizer(n_hidden, context_dim)
    twin = copy.deepcopy(synthesizer)
    interface = dni.BackwardInterface(wrap(synthesizer))
    context = torch.randn(BATCH, CONTEXT, dtype=torch.float64) if context_dim else None
    trigger, leaf = upstream(BATCH, WIDTH)
    twin_leaf = leaf.detach().clone().requires_grad_()

    with dni.synthesizer_context(context):
        out = interface(trigger)
    sent = leaf.grad.clone()
    assert out.requires_grad and torch.equal(out, trigger)
    (out**3).sum().backward()

    twin_out = plain_backward_interface(twin, torch.tanh(twin_leaf), context)
    expect(sent, twin_leaf.grad)
    (twin_out**3).sum().backward()
    expect(leaf.grad, sent)  # the true gradient does not reach what lies before
    expect(gradients(synthesizer), gradients(twin))


def test_upstream_gradients_exist_before_the_users_backward():
    lower, upper = (dni.BackwardInterface(make_synthesizer()) for _ in range(2))
    first, second = (nn.Linear(WIDTH, WIDTH).double() for _ in range(2))
    x = lower(torch.relu(first(torch.randn(BATCH, WIDTH, dtype=torch.float64))))
    upper(torch.relu(second(x)))
    for module in (first, second, lower):
        assert all(g is not None for g in gradients(module))
    assert all(g is None for g in gradients(upper))


@pytest.mark.parametrize("shape", [(WIDTH,), (2, BATCH, WIDTH), (2, 3, BATCH, WIDTH)], ids=str)
def test_triggers_of_any_number_of_dimensions(shape):
    synthesizer = make_synthesizer()
    twin = copy.deepcopy(synthesizer)
    trigger, leaf = upstream(*shape)
    twin_leaf = leaf.detach().clone().requires_grad_()
    (dni.BackwardInterface(synthesizer)(trigger) ** 2).sum().backward()
    (plain_backward_interface(twin, torch.tanh(twin_leaf), None) ** 2).sum().backward()
    expect(leaf.grad, twin_leaf.grad)
    expect(gradients(synthesizer), gradients(twin))


def test_context_is_broadcast_over_the_leading_dimensions():
    synthesizer = make_synthesizer(context_dim=CONTEXT)
    twin = copy.deepcopy(synthesizer)
    context = torch.randn(BATCH, CONTEXT, dtype=torch.float64)
    trigger, leaf = upstream(2, BATCH, WIDTH)
    twin_leaf = leaf.detach().clone().requires_grad_()
    with dni.synthesizer_context(context):
        (dni.BackwardInterface(synthesizer)(trigger) ** 2).sum().backward()
    twin_out = plain_backward_interface(twin, torch.tanh(twin_leaf), context)
    (twin_out**2).sum().backward()
    expect(leaf.grad, twin_leaf.grad)
    expect(gradients(synthesizer), gradients(twin))


@kinds
def test_factor_scales_what_is_sent_and_not_the_target(wrap):
    synthesizer = make_synthesizer()
    interface = dni.BackwardInterface(wrap(synthesizer))
    trigger, leaf = upstream(BATCH, WIDTH)
    found = []
    for factor in (1, 0.25, torch.tensor(0.25)):
        leaf.grad = None
        interface.zero_grad()
        (interface(torch.tanh(leaf), factor=factor) ** 2).sum().backward()
        found.append((leaf.grad, gradients(synthesizer)))
    for sent, grads in found[1:]:
        expect(sent, 0.25 * found[0][0])
        expect(grads, found[0][1])
    leaf.grad = None
    interface.backward(trigger, factor=0.25)
    expect(leaf.grad, 0.25 * found[0][0])


@kinds
def test_make_trigger_passes_the_true_gradient_and_leaks_nothing(wrap):
    interface = dni.BackwardInterface(wrap(make_synthesizer()))
    trigger, leaf = upstream(BATCH, WIDTH)
    true_gradient = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    interface.make_trigger(trigger).backward(true_gradient)
    expect(leaf.grad, true_gradient * (1 - torch.tanh(leaf.detach()) ** 2))


def test_output_may_be_changed_in_place():
    interface = dni.BackwardInterface(make_synthesizer())
    trigger, leaf = upstream(BATCH, WIDTH)
    before = trigger.detach().clone()
    torch.relu_(interface(trigger)).sum().backward()
    expect(trigger.detach(), before)


def test_expanded_and_non_contiguous_gradients_and_triggers():
    synthesizer = make_synthesizer()
    twin = copy.deepcopy(synthesizer)
    trigger, leaf = upstream(WIDTH, BATCH)
    twin_leaf = leaf.detach().clone().requires_grad_()
    dni.BackwardInterface(synthesizer)(trigger.t()).sum().backward()  # a stride-0 gradient
    plain_backward_interface(twin, torch.tanh(twin_leaf).t(), None).sum().backward()
    expect(leaf.grad, twin_leaf.grad)
    expect(gradients(synthesizer), gradients(twin))


def test_a_true_gradient_that_never_comes_leaves_the_synthesizer_alone():
    interface = dni.BackwardInterface(make_synthesizer())
    trigger, leaf = upstream(BATCH, WIDTH)
    interface(trigger)
    assert leaf.grad is not None
    assert all(g is None for g in gradients(interface))


def test_gradients_accumulate_over_micro_batches():
    interface = dni.BackwardInterface(make_synthesizer(context_dim=None))
    leaf = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
    sums = None
    for scale in (1.0, 2.0):
        (interface(leaf * scale) ** 2).sum().backward()
        alone = dni.BackwardInterface(copy.deepcopy(interface.synthesizer))
        alone.zero_grad()
        (alone(leaf.detach().requires_grad_() * scale) ** 2).sum().backward()
        new = gradients(alone)
        sums = new if sums is None else [a + b for a, b in zip(sums, new, strict=True)]
    expect(gradients(interface), sums)


def test_gradients_are_visible_to_autograd_grad_and_hooks():
    synthesizer = make_synthesizer()
    interface = dni.BackwardInterface(synthesizer)
    trigger, _ = upstream(BATCH, WIDTH)
    loss = (interface(trigger) ** 2).sum()
    asked = torch.autograd.grad(loss, list(synthesizer.parameters()), retain_graph=True)
    assert all(g is None for g in gradients(synthesizer))
    seen = []
    for p in synthesizer.parameters():
        p.register_hook(lambda grad: seen.append(grad))
    loss.backward()
    expect(gradients(synthesizer), list(asked))
    assert len(seen) == len(asked)


def test_partly_frozen_synthesizer():
    synthesizer = make_synthesizer(2)
    synthesizer.layers[0].requires_grad_(False)
    (dni.BackwardInterface(synthesizer)(upstream(BATCH, WIDTH)[0]) ** 2).sum().backward()
    assert synthesizer.layers[0].weight.grad is None
    assert synthesizer.layers[1].weight.grad is not None
    assert synthesizer.input_trigger.weight.grad is not None


@kinds
@pytest.mark.parametrize("n_hidden", [0, 1])
def test_a_synthesizer_stepped_between_forward_and_backward_learns_as_it_is_then(wrap, n_hidden):
    """What was sent is what was predicted; what arrives is compared with what it says now."""
    synthesizer = make_synthesizer(n_hidden)
    twin = copy.deepcopy(synthesizer)
    trigger, leaf = upstream(BATCH, WIDTH)
    out = dni.BackwardInterface(wrap(synthesizer))(trigger)
    sent = plain_synthesizer(twin, trigger.detach(), None).detach()
    expect(leaf.grad, sent * (1 - trigger.detach() ** 2))
    with torch.no_grad():
        for p in (*synthesizer.parameters(), *twin.parameters()):
            p.add_(0.5)
    (out**2).sum().backward()
    error = plain_synthesizer(twin, trigger.detach(), None) - 2 * trigger.detach()
    (error.square().sum() / BATCH).backward()
    expect(gradients(synthesizer), gradients(twin))


@kinds
def test_a_trigger_changed_in_place_before_the_gradient_comes_is_an_error(wrap):
    interface = dni.BackwardInterface(wrap(make_synthesizer()))
    trigger = upstream(BATCH, WIDTH)[0].detach().requires_grad_()
    out = interface(trigger)
    with torch.no_grad():
        trigger.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@kinds
def test_a_gradient_that_is_none_is_zero(wrap):
    class GivesNone(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    synthesizer = make_synthesizer()
    twin = copy.deepcopy(synthesizer)
    trigger, leaf = upstream(BATCH, WIDTH)
    out = dni.BackwardInterface(wrap(synthesizer)).make_trigger(trigger)
    GivesNone.apply(out).sum().backward()
    plain_synthesizer(twin, trigger.detach(), None).square().sum().div(BATCH).backward()
    expect(gradients(synthesizer), gradients(twin))


@kinds
def test_a_graph_that_is_kept_takes_the_gradient_twice_and_another_lets_go(wrap):
    synthesizer = make_synthesizer()
    interface = dni.BackwardInterface(wrap(synthesizer))
    trigger = upstream(BATCH, WIDTH)[0].detach()
    loss = (interface.make_trigger(trigger) ** 2).sum()
    loss.backward(retain_graph=True)
    once = [g.clone() for g in gradients(synthesizer)]
    loss.backward()
    expect(gradients(synthesizer), [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    out = interface.make_trigger(trigger)
    held = weakref.ref(out.grad_fn.prediction)
    out.sum().backward()
    assert held() is None and out.grad_fn is not None


def test_a_custom_synthesizers_gradients_are_visible_to_autograd_grad_and_hooks():
    synthesizer = make_synthesizer()
    interface = dni.BackwardInterface(Custom(synthesizer))
    trigger, _ = upstream(BATCH, WIDTH)
    loss = (interface(trigger) ** 2).sum()
    asked = torch.autograd.grad(loss, list(synthesizer.parameters()), retain_graph=True)
    assert all(g is None for g in gradients(synthesizer))
    seen = []
    for p in synthesizer.parameters():
        p.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    loss.backward()
    expect(gradients(synthesizer), [2 * grad for grad in asked])
    assert len(seen) == len(asked)


@kinds
def test_second_derivative_is_refused(wrap):
    interface = dni.BackwardInterface(wrap(make_synthesizer()))
    trigger, leaf = upstream(BATCH, WIDTH)
    out = interface.make_trigger(trigger)
    (grad,) = torch.autograd.grad((out**3).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- UnidirectionalInterface, ForwardInterface, BidirectionalInterface ----


@kinds
def test_send_is_a_mean_squared_error_over_all_elements(wrap):
    synthesizer = make_synthesizer(trigger_dim=4)
    twin = copy.deepcopy(synthesizer)
    interface = dni.UnidirectionalInterface(wrap(synthesizer))
    trigger, leaf = upstream(BATCH, 4)
    message, message_leaf = upstream(BATCH, WIDTH)
    assert interface.send(message, trigger) is None
    F.mse_loss(plain_synthesizer(twin, trigger.detach(), None), message.detach()).backward()
    expect(gradients(synthesizer), gradients(twin))
    assert leaf.grad is None and message_leaf.grad is None
    received = interface.receive(trigger)
    assert not received.requires_grad
    expect(received, plain_synthesizer(twin, trigger, None).detach())


@kinds
def test_a_message_of_another_dtype_is_compared_in_the_synthesizers(wrap):
    synthesizer = make_synthesizer()
    twin = copy.deepcopy(synthesizer)
    trigger, message = upstream(BATCH, WIDTH)[0], torch.randn(BATCH, WIDTH)
    dni.UnidirectionalInterface(wrap(synthesizer)).send(message, trigger)
    F.mse_loss(plain_synthesizer(twin, trigger.detach(), None), message.double()).backward()
    expect(gradients(synthesizer), gradients(twin))


@kinds
def test_forward_interface_sends_then_receives(wrap):
    synthesizer = make_synthesizer(trigger_dim=4)
    twin = copy.deepcopy(synthesizer)
    message, trigger = upstream(BATCH, WIDTH)[0], upstream(BATCH, 4)[0]
    out = dni.ForwardInterface(wrap(synthesizer))(message, trigger)
    other = dni.UnidirectionalInterface(twin)
    other.send(message, trigger)
    expect(out, other.receive(trigger))
    expect(gradients(synthesizer), gradients(twin))


@kinds
def test_bidirectional_interface_is_its_two_halves(wrap):
    forward, backward = make_synthesizer(trigger_dim=4), make_synthesizer()
    one = dni.BidirectionalInterface(wrap(copy.deepcopy(forward)), wrap(copy.deepcopy(backward)))
    two = dni.BidirectionalInterface(forward, backward)
    (message, leaf), (trigger, _) = upstream(BATCH, WIDTH), upstream(BATCH, 4)
    twin_leaf = leaf.detach().clone().requires_grad_()
    (one(message, trigger) ** 2).sum().backward()
    two.send(torch.tanh(twin_leaf), trigger)
    (two.receive(trigger) ** 2).sum().backward()
    expect(leaf.grad, twin_leaf.grad)
    expect(gradients(one), gradients(two))


def test_bidirectional_interface_with_its_backward_half_in_eval_mode():
    both = dni.BidirectionalInterface(make_synthesizer(), make_synthesizer())
    both.backward_interface.eval()
    trigger, leaf = upstream(BATCH, WIDTH)
    out = both(trigger, trigger)
    assert not out.requires_grad and leaf.grad is None
    assert all(g is not None for g in gradients(both.forward_interface))


def test_steps_that_a_subclass_replaces_are_taken():
    class Scaled(dni.BackwardInterface):
        def receive(self, trigger):
            return super().receive(trigger)

        def backward(self, trigger, factor=1):
            super().backward(trigger, factor * 0.5)

    class Doubled(dni.ForwardInterface):
        def receive(self, trigger):
            return 2 * super().receive(trigger)

    class Silent(dni.BidirectionalInterface):
        def send(self, message, trigger):
            pass

    synthesizer = make_synthesizer()
    trigger, leaf = upstream(BATCH, WIDTH)
    Scaled(synthesizer)(trigger)
    prediction = synthesizer(trigger).detach()
    expect(leaf.grad, 0.5 * prediction * (1 - trigger.detach() ** 2))
    expect(Doubled(synthesizer)(trigger, trigger), 2 * prediction)
    silent = Silent(make_synthesizer(), make_synthesizer())
    silent(torch.tanh(leaf), trigger)
    assert all(g is None for g in gradients(silent))


def test_basic_synthesizer_is_evaluated_once_and_a_custom_one_twice(monkeypatch):
    from fastdni.ops import synthesizer

    calls = []
    forward = synthesizer._fwd
    monkeypatch.setattr(synthesizer, "_fwd", lambda *a: calls.append(1) or forward(*a))
    trigger = upstream(BATCH, WIDTH)[0]
    dni.BackwardInterface(make_synthesizer())(trigger)
    assert len(calls) == 1
    dni.ForwardInterface(make_synthesizer())(trigger, trigger)
    assert len(calls) == 2
    custom = Custom(make_synthesizer())
    dni.BackwardInterface(custom)(upstream(BATCH, WIDTH)[0])
    assert custom.calls == 2
