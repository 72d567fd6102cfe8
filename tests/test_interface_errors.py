"""What the drop-in modules refuse: each with one clear error, before anything is written."""

import threading

import pytest
import torch
from interface_cases import (
    BATCH,
    CONTEXT,
    WIDTH,
    expect,
    gradients,
    kinds,
    make_synthesizer,
    upstream,
)

import fastdni as dni


def frozen():
    synthesizer = make_synthesizer()
    return synthesizer.requires_grad_(False)


def assert_refused(call, kind, message, *written):
    with pytest.raises(kind, match=message):
        call()
    for tensor in written:
        assert tensor.grad is None, "a gradient was written before the error"


@kinds
def test_frozen_synthesizer(wrap):
    trigger, leaf = upstream(BATCH, WIDTH)
    message = "synthetic_gradient should need gradient but it does not"
    interface = dni.BackwardInterface(wrap(frozen()))
    for call in (lambda: interface(trigger), lambda: interface.make_trigger(trigger)):
        assert_refused(call, ValueError, message, leaf)
    sender = dni.ForwardInterface(wrap(frozen()))
    assert_refused(lambda: sender(trigger, trigger), ValueError, message)
    assert_refused(lambda: sender.send(trigger, trigger), ValueError, message)
    both = dni.BidirectionalInterface(wrap(make_synthesizer()), wrap(frozen()))
    assert_refused(lambda: both(trigger, trigger), ValueError, message, leaf, *both.parameters())


@kinds
def test_a_frozen_synthesizer_may_send_without_learning(wrap):
    trained, synthesizer = make_synthesizer(), frozen()
    synthesizer.load_state_dict(trained.state_dict())
    interface = dni.BackwardInterface(wrap(synthesizer), learn=False)
    trigger, leaf = upstream(BATCH, WIDTH)
    out = interface(trigger, factor=0.5)
    sent = 0.5 * trained(trigger.detach()).detach() * (1 - trigger.detach() ** 2)
    expect(leaf.grad, sent)
    torch.relu_(out).sum().backward()  # the true gradient goes nowhere
    expect(leaf.grad, sent)
    true_gradient = torch.ones_like(trigger)
    interface.make_trigger(torch.tanh(leaf)).backward(true_gradient)
    expect(leaf.grad - sent, true_gradient * (1 - trigger.detach() ** 2))
    assert interface.make_trigger(trigger.detach()).requires_grad
    unfrozen = dni.BackwardInterface(wrap(trained), learn=False)
    unfrozen(torch.tanh(leaf)).sum().backward()
    assert all(grad is None for grad in gradients(unfrozen))


def test_a_context_of_another_thread_is_named():
    """Contexts and deferral are the thread's own."""
    interface = dni.UnidirectionalInterface(make_synthesizer(context_dim=CONTEXT))
    trigger, errors = torch.randn(BATCH, WIDTH, dtype=torch.float64), []

    def receive():
        try:
            interface.receive(trigger)
        except RuntimeError as error:
            errors.append(str(error))

    with dni.synthesizer_context(torch.zeros(BATCH, CONTEXT, dtype=torch.float64)):
        thread = threading.Thread(target=receive)
        thread.start()
        thread.join()
    assert "contexts and deferral belong to the thread that entered them" in errors[0]


def test_gradients_disabled():
    trigger, leaf = upstream(BATCH, WIDTH)
    backward = dni.BackwardInterface(make_synthesizer())
    forward = dni.ForwardInterface(make_synthesizer())
    both = dni.BidirectionalInterface(make_synthesizer(), make_synthesizer())
    calls = {
        "BackwardInterface.forward": lambda: backward(trigger),
        "BackwardInterface.backward": lambda: backward.backward(trigger),
        "BackwardInterface.make_trigger": lambda: backward.make_trigger(trigger),
        "ForwardInterface.forward": lambda: forward(trigger, trigger),
        "ForwardInterface.send": lambda: forward.send(trigger, trigger),
        "BackwardInterface.forward:": lambda: both(trigger, trigger),
    }
    for name, call in calls.items():
        with torch.no_grad():
            assert_refused(call, RuntimeError, f"{name}.*call eval", leaf)


def test_trigger_without_gradient():
    trigger = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    interface = dni.BackwardInterface(make_synthesizer())
    both = dni.BidirectionalInterface(make_synthesizer(), make_synthesizer())
    message = "trigger must require grad"
    assert_refused(lambda: interface(trigger), RuntimeError, message)
    assert_refused(lambda: interface.backward(trigger), RuntimeError, message)
    assert_refused(lambda: both(trigger, trigger), RuntimeError, message, *both.parameters())
    interface.make_trigger(trigger)  # needs none: the synthesizer is trained all the same


def test_wrong_context():
    trigger, leaf = upstream(BATCH, WIDTH)
    interface = dni.BackwardInterface(make_synthesizer(context_dim=CONTEXT))
    assert_refused(
        lambda: interface(trigger), RuntimeError, "context must be .*synthesizer_context", leaf
    )
    for shape in [(BATCH, CONTEXT + 1), (BATCH + 1, CONTEXT), (2, BATCH, CONTEXT)]:
        with dni.synthesizer_context(torch.zeros(shape, dtype=torch.float64)):
            expected = (
                rf"context must be \({BATCH}, {CONTEXT}\), got \({', '.join(map(str, shape))}\)"
            )
            assert_refused(lambda: interface(trigger), RuntimeError, expected, leaf)
    labels = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    with dni.synthesizer_context(labels):
        assert_refused(
            lambda: interface(trigger),
            RuntimeError,
            "context must have trigger's dtype torch.float64, got torch.int64",
            leaf,
        )


def test_wrong_trigger():
    interface = dni.BackwardInterface(make_synthesizer())
    wide, leaf = upstream(BATCH, WIDTH + 1)
    expected = rf"trigger must be \(\.\.\., {WIDTH}\).*got \({BATCH}, {WIDTH + 1}\)"
    assert_refused(lambda: interface(wide), RuntimeError, expected, leaf)
    single = torch.randn(BATCH, WIDTH, requires_grad=True)
    assert_refused(
        lambda: interface(single * 1),
        RuntimeError,
        "must have trigger's dtype torch.float32, got torch.float64",
        single,
    )
    meta = torch.randn(BATCH, WIDTH, device="meta", requires_grad=True)
    assert_refused(lambda: interface(meta * 1), RuntimeError, "must be on trigger's device meta")


@kinds
def test_synthesizer_of_another_width(wrap):
    interface = dni.BackwardInterface(wrap(make_synthesizer(width=WIDTH + 1, trigger_dim=WIDTH)))
    trigger, leaf = upstream(BATCH, WIDTH)
    expected = rf"shape \({BATCH}, {WIDTH}\) .*, got \({BATCH}, {WIDTH + 1}\)"
    assert_refused(lambda: interface(trigger), RuntimeError, expected, leaf)


@kinds
def test_message_of_another_shape(wrap):
    interface = dni.ForwardInterface(wrap(make_synthesizer()))
    trigger = upstream(BATCH, WIDTH)[0]
    for message in (trigger[:1], trigger[:, :2]):
        assert_refused(
            lambda message=message: interface.send(message, trigger),
            RuntimeError,
            "prediction must have the shape",
            *interface.parameters(),
        )
