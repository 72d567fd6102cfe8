"""Interfaces at the edges: steps between forward and backward, checkpoints, frozen synthesizers."""

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from interface_cases import Custom, make_synthesizer
from plain_dni import plain_synthesizer
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdni as dni

BATCH, WIDTH, CONTEXT = 6, 5, 3
wraps = pytest.mark.parametrize("wrap", [lambda s: s, Custom], ids=["basic", "custom"])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ---- start_at_zero ----


@pytest.mark.parametrize("n_hidden", [0, 1, 2])
@pytest.mark.parametrize("context", [None, CONTEXT])
def test_start_at_zero_is_public(context, n_hidden):
    assert "start_at_zero" in dni.__all__
    synthesizer = make_synthesizer(n_hidden, context)
    hidden = [p.clone() for p in synthesizer.parameters()]
    assert dni.start_at_zero(synthesizer) is synthesizer
    h, ctx = normal(BATCH, WIDTH), normal(BATCH, CONTEXT)
    assert not synthesizer(h, None if context is None else ctx).any()
    changed = [not torch.equal(a, b) for a, b in zip(hidden, synthesizer.parameters(), strict=True)]
    last = 2 if n_hidden or context is None else 4
    assert sum(changed) == last, "only the last layer"


# ---- words for a missing context ----


@pytest.mark.parametrize("kind", ["backward", "receive", "send", "bidirectional"])
def test_a_missing_context_names_the_thread(kind):
    """A context that was entered in one thread is not there in another."""
    synthesizer = make_synthesizer(1, CONTEXT)
    leaf = normal(BATCH, WIDTH).requires_grad_()
    uses = {
        "backward": lambda: dni.BackwardInterface(synthesizer)(leaf * 1),
        "receive": lambda: dni.ForwardInterface(synthesizer).receive(leaf),
        "send": lambda: dni.ForwardInterface(synthesizer).send(leaf, leaf),
        "bidirectional": lambda: dni.BidirectionalInterface(synthesizer, synthesizer)(
            leaf * 1, leaf
        ),
    }
    found = []

    def work():
        try:
            uses[kind]()
        except RuntimeError as error:
            found.append(str(error))

    with dni.synthesizer_context(normal(BATCH, CONTEXT)):
        uses[kind]()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    (words,) = found
    assert "synthesizer_context" in words and "thread" in words


# ---- frozen synthesizers ----


def unlearning(synthesizer):
    """A BackwardInterface that sends and does not learn, called with the trigger."""
    if "learn" in inspect.signature(dni.BackwardInterface.__init__).parameters:
        return dni.BackwardInterface(synthesizer, learn=False)
    interface = dni.BackwardInterface(synthesizer)
    return lambda trigger, **how: interface(trigger, learn=False, **how)


@wraps
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("factor", [1, 0.5])
def test_a_pretrained_synthesizer_sends_without_learning(factor, frozen, wrap):
    synthesizer = make_synthesizer(1).requires_grad_(not frozen)
    lower, upper = nn.Linear(4, WIDTH).double(), nn.Linear(WIDTH, 3).double()
    x = normal(BATCH, 4)
    h = lower(x)
    received = unlearning(wrap(synthesizer))(h, factor=factor)
    sent = plain_synthesizer(synthesizer, h.detach(), None).detach() * factor
    expected = torch.autograd.grad(lower(x), lower.weight, sent)[0]
    torch.testing.assert_close(lower.weight.grad, expected)
    loss = upper(received).square().sum()
    loss.backward()
    torch.testing.assert_close(lower.weight.grad, expected)  # the true gradient ends here
    assert upper.weight.grad is not None
    assert all(p.grad is None for p in synthesizer.parameters())


@wraps
def test_a_frozen_synthesizer_is_refused_without_a_word_from_the_user(wrap):
    interface = dni.BackwardInterface(wrap(make_synthesizer(1).requires_grad_(False)))
    leaf = normal(BATCH, WIDTH).requires_grad_()
    with pytest.raises(ValueError, match="learn=False"):
        interface(leaf * 1)
    assert leaf.grad is None


# ---- an optimizer that steps between forward and backward ----


def regressed(synthesizer, h, context, target, reduction):
    """The gradients of a regression, with the synthesizer as it is now."""
    prediction = plain_synthesizer(synthesizer, h, context)
    error = (prediction - target).square()
    loss = error.mean() if reduction == "mean" else error.sum() / len(h)
    return torch.autograd.grad(loss, list(synthesizer.parameters()))


@wraps
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("context", [None, CONTEXT])
@pytest.mark.parametrize("n_hidden", [0, 1, 2])
def test_a_synthesizer_is_stepped_between_forward_and_backward(n_hidden, context, steps, wrap):
    synthesizer = make_synthesizer(n_hidden, context)
    interface = dni.BackwardInterface(wrap(synthesizer))
    leaf = normal(BATCH, WIDTH).requires_grad_()
    given = None if context is None else normal(BATCH, CONTEXT)
    h = leaf * 1
    with dni.synthesizer_context(given):
        sent = plain_synthesizer(synthesizer, h.detach(), given).detach()
        received = interface(h)
    torch.testing.assert_close(leaf.grad, sent)
    sent = leaf.grad.clone()
    optimizer = torch.optim.Adam(synthesizer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        for p in synthesizer.parameters():
            p.grad = normal(*p.shape)
        optimizer.step()
    optimizer.zero_grad()
    true = normal(BATCH, WIDTH)
    received.backward(true)  # in no context: that of the forward pass holds
    expected = regressed(synthesizer, h.detach(), given, true, "batchmean")
    for p, grad in zip(synthesizer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(leaf.grad, sent, rtol=0, atol=0)


@wraps
def test_make_trigger_between_steps(wrap):
    synthesizer = make_synthesizer(1)
    interface = dni.BackwardInterface(wrap(synthesizer))
    h = normal(BATCH, WIDTH)
    copied = interface.make_trigger(h)
    with torch.no_grad():
        for p in synthesizer.parameters():
            p.mul_(0.5)
    true = normal(BATCH, WIDTH)
    copied.backward(true)
    for p, grad in zip(
        synthesizer.parameters(), regressed(synthesizer, h, None, true, "batchmean"), strict=True
    ):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


@wraps
def test_several_predictions_are_open_and_come_back_in_any_order(wrap):
    synthesizer = make_synthesizer(1)
    interface = dni.BackwardInterface(wrap(synthesizer))
    optimizer = torch.optim.SGD(synthesizer.parameters(), lr=0.1)
    triggers = [normal(BATCH, WIDTH) for _ in range(3)]
    copies = [interface.make_trigger(h) for h in triggers]
    for number in (1, 0, 2):
        true = normal(BATCH, WIDTH)
        optimizer.zero_grad()
        copies[number].backward(true)
        expected = regressed(synthesizer, triggers[number], None, true, "batchmean")
        for p, grad in zip(synthesizer.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)
        optimizer.step()


@wraps
def test_a_deferred_send_after_a_step(wrap):
    synthesizer = make_synthesizer(1)
    interface = dni.ForwardInterface(wrap(synthesizer))
    h, message = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    with dni.defer_backward():
        interface.send(message, h)
        with torch.no_grad():
            for p in synthesizer.parameters():
                p.mul_(0.5)
    expected = regressed(synthesizer, h, None, message, "mean")
    for p, grad in zip(synthesizer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


def test_model_parallelism_by_hand():
    """The lower part steps at once, the upper one later, one optimizer over all."""
    torch.manual_seed(0)
    lower, upper = nn.Linear(4, WIDTH).double(), nn.Linear(WIDTH, 3).double()
    synthesizer = make_synthesizer(1)
    twins = copy.deepcopy((lower, upper, synthesizer))
    interface = dni.BackwardInterface(synthesizer)
    optimizer = torch.optim.SGD([*lower.parameters(), *synthesizer.parameters()], lr=0.01)
    own = torch.optim.SGD([*twins[0].parameters(), *twins[2].parameters()], lr=0.01)
    data = [(normal(BATCH, 4), torch.randint(3, (BATCH,))) for _ in range(4)]
    pending = None
    for x, target in data:
        received = interface(lower(x))
        if pending is not None:  # the true gradient is one batch late
            pending.backward()
        optimizer.step()
        optimizer.zero_grad()
        pending = F.cross_entropy(upper(received), target)
    late = None
    for x, target in data:
        h = twins[0](x)
        sent = plain_synthesizer(twins[2], h.detach(), None).detach()
        h.backward(sent)
        if late is not None:
            below, loss = late
            true = torch.autograd.grad(loss, below)[0]
            gradients = regressed(twins[2], below.detach(), None, true, "batchmean")
            for p, grad in zip(twins[2].parameters(), gradients, strict=True):
                p.grad = grad
        own.step()
        own.zero_grad()
        below = h.detach().requires_grad_()
        late = below, F.cross_entropy(twins[1](below), target)
    for a, b in zip((lower, synthesizer), (twins[0], twins[2]), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


# ---- checkpointed segments ----


def segments(wrap):
    torch.manual_seed(0)
    lower, before, after, upper = (nn.Linear(WIDTH, WIDTH).double() for _ in range(4))
    interface = dni.BackwardInterface(wrap(make_synthesizer(1)))
    modules = nn.ModuleList([lower, before, after, upper, interface])

    def segment(h):
        return torch.tanh(after(interface(torch.tanh(before(h)))))

    return modules, segment


@wraps
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("context", [False, True])
def test_a_checkpointed_segment_sends_once(context, reentrant, wrap):
    found = []
    x, given = normal(BATCH, WIDTH), normal(BATCH, CONTEXT)
    for checkpointed in (False, True):
        modules, segment = segments(wrap)
        if context:
            torch.manual_seed(1)
            modules[4].synthesizer = wrap(make_synthesizer(1, CONTEXT))
        with dni.synthesizer_context(given if context else None):
            h = torch.tanh(modules[0](x))
            try:
                how = {"use_reentrant": reentrant}
                h = checkpoint(segment, h, **how) if checkpointed else segment(h)
            except RuntimeError as error:
                # A reentrant checkpoint runs without gradients first: nothing could be sent.
                assert reentrant and checkpointed and "gradients" in str(error)
                assert all(p.grad is None for p in modules.parameters())
                return
            modules[3](h).square().mean().backward()
        found.append([p.grad for p in modules.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@wraps
def test_a_checkpoint_of_every_layer(wrap):
    """Sequential checkpoints, an interface in one of them, several steps."""
    found = []
    for checkpointed in (False, True):
        modules, segment = segments(wrap)
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            h = normal(BATCH, WIDTH)
            for function in (modules[0], segment, modules[3]):
                h = checkpoint(function, h, use_reentrant=False) if checkpointed else function(h)
            h.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in modules.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
