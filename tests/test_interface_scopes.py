"""What surrounds the interfaces: their mode, contexts, and gradients that are deferred."""

import copy
import threading

import pytest
import torch
from interface_cases import (
    BATCH,
    WIDTH,
    expect,
    gradients,
    make_synthesizer,
    upstream,
)
from plain_dni import batches, networks, plain_synthesizer, train
from torch import nn

import fastdni as dni

# ---- modes ----


def test_eval_mode_returns_the_very_input():
    trigger, leaf = upstream(BATCH, WIDTH)
    backward = dni.BackwardInterface(make_synthesizer()).eval()
    both = dni.BidirectionalInterface(make_synthesizer(), make_synthesizer()).eval()
    assert backward(trigger) is trigger
    assert backward.make_trigger(trigger) is trigger
    assert backward.backward(trigger) is None and leaf.grad is None
    assert dni.ForwardInterface(make_synthesizer()).eval()(trigger, trigger) is trigger
    assert both(trigger, trigger) is trigger
    assert leaf.grad is None


def test_send_and_receive_do_not_look_at_the_mode():
    synthesizer = make_synthesizer()
    interface = dni.ForwardInterface(synthesizer).eval()
    trigger = upstream(BATCH, WIDTH)[0]
    interface.send(trigger, trigger)
    assert all(g is not None for g in gradients(synthesizer))
    expect(interface.receive(trigger), synthesizer(trigger).detach())


def test_eval_mode_works_without_gradients():
    interface = dni.BackwardInterface(make_synthesizer()).eval()
    with torch.inference_mode():
        interface(torch.randn(BATCH, WIDTH, dtype=torch.float64))


# ---- contexts ----


def seen_contexts(interface, trigger):
    seen = []

    class Look(nn.Module):
        def forward(self, trigger, context):
            seen.append(context)
            return trigger

    interface.synthesizer = Look()
    interface.receive(trigger)
    return seen


def test_contexts_nest_default_to_none_and_survive_exceptions():
    interface = dni.UnidirectionalInterface(nn.Identity())
    trigger = torch.zeros(1)
    outer, inner = torch.ones(1), torch.ones(2)
    assert seen_contexts(interface, trigger) == [None]
    with dni.synthesizer_context(outer):
        with pytest.raises(KeyError), dni.synthesizer_context(inner):
            assert seen_contexts(interface, trigger)[0] is inner
            raise KeyError
        with dni.synthesizer_context(None):
            assert seen_contexts(interface, trigger) == [None]
        assert seen_contexts(interface, trigger)[0] is outer
    assert seen_contexts(interface, trigger) == [None]


def test_context_as_a_decorator():
    interface = dni.UnidirectionalInterface(nn.Identity())
    context = torch.ones(1)

    @dni.synthesizer_context(context)
    def look():
        return seen_contexts(interface, torch.zeros(1))

    assert look()[0] is context and look()[0] is context
    assert seen_contexts(interface, torch.zeros(1)) == [None]


def test_context_and_deferral_belong_to_the_thread():
    interface = dni.UnidirectionalInterface(nn.Identity())
    found = {}

    def work():
        found["context"] = seen_contexts(interface, torch.zeros(1))
        leaf = torch.ones(1, requires_grad=True)
        dni.backward(leaf * 2)
        found["grad"] = leaf.grad

    with dni.synthesizer_context(torch.ones(1)), dni.defer_backward():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found["context"] == [None]
    assert found["grad"].item() == 2


def test_two_threads_train_two_networks_as_one_thread_does():
    def run(network, results, i):
        results[i] = train(network, batches(5, size=8))

    pairs = [networks("backward", True, width=16) for _ in range(2)]
    threaded, serial = {}, {}
    threads = [
        threading.Thread(target=run, args=(network, threaded, i))
        for i, (network, _) in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (_, twin) in enumerate(pairs):
        run(twin, serial, i)
        expect(threaded[i], serial[i])


# ---- deferral ----


def test_deferred_gradients_come_at_the_end_and_all_at_once():
    interface = dni.BackwardInterface(make_synthesizer())
    twin = copy.deepcopy(interface)
    trigger, leaf = upstream(BATCH, WIDTH)
    twin_leaf = leaf.detach().clone().requires_grad_()
    with dni.defer_backward():
        dni.backward((interface(trigger) ** 2).sum())
        # A second gradient through the same graph, which would be an error without deferral.
        dni.backward(trigger, torch.ones_like(trigger))
        assert leaf.grad is None and all(g is None for g in gradients(interface))
    twin_trigger = torch.tanh(twin_leaf)
    synthetic = plain_synthesizer(twin.synthesizer, twin_trigger, None).detach()
    (twin(twin_leaf.detach().tanh().requires_grad_()) ** 2).sum().backward()
    twin_trigger.backward(synthetic + 1)
    expect(leaf.grad, twin_leaf.grad)
    expect(gradients(interface), gradients(twin))


def test_deferred_sends_add_up():
    forward = dni.ForwardInterface(make_synthesizer())
    twin = copy.deepcopy(forward)
    pairs = [(upstream(BATCH, WIDTH)[0], upstream(BATCH, WIDTH)[0]) for _ in range(2)]
    with dni.defer_backward():
        for message, trigger in pairs:
            forward(message, trigger)
    for message, trigger in pairs:
        twin(message, trigger)
    expect(gradients(forward), gradients(twin))


def test_a_received_message_may_be_changed_in_place_under_deferral():
    interface = dni.ForwardInterface(make_synthesizer())
    twin = copy.deepcopy(interface)
    message, trigger = upstream(BATCH, WIDTH)[0], upstream(BATCH, WIDTH)[0]
    with dni.defer_backward():
        torch.relu_(interface(message, trigger))
    twin(message, trigger)
    expect(gradients(interface), gradients(twin))


def test_an_exception_drops_what_was_deferred():
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(KeyError), dni.defer_backward():
        dni.backward(leaf * 2)
        raise KeyError
    assert leaf.grad is None
    with dni.defer_backward():
        pass
    dni.backward(leaf * 2)  # deferral is over; ones of any shape by default
    expect(leaf.grad, torch.full((3,), 2.0))


def test_deferral_does_not_nest():
    with dni.defer_backward():
        second = dni.defer_backward()
        with pytest.raises(RuntimeError, match="cannot nest defer_backward"):
            second.__enter__()
