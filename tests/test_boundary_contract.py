"""Boundary: predict now, regress later, and what is sent on."""

import copy

import pytest
import torch
from interface_cases import (
    BATCH,
    CONTEXT,
    WIDTH,
    Custom,
    expect,
    gradients,
    kinds,
    make_synthesizer,
)
from network_cases import OPTIMIZERS
from plain_dni import plain_synthesizer
from plain_step import assert_same_state
from torch import nn

import fastdni as dni
from fastdni import ops, reference
from fastdni.training.boundary import Boundary, context_for
from fastdni.training.optimizers import Optimizers


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def regressed(synthesizer, h, target, ctx=None, scale=None):
    """The loss and every gradient by autograd of the formula."""
    error = plain_synthesizer(synthesizer, h, ctx) - target
    loss = error.square().sum() * ((2 / len(h) if scale is None else scale) / 2)
    return loss.detach(), list(torch.autograd.grad(loss, list(synthesizer.parameters())))


@kinds
@pytest.mark.parametrize("shape", [(BATCH,), (2, BATCH)], ids=str)
@pytest.mark.parametrize("context_dim", [None, CONTEXT], ids=["", "context"])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_predict_and_regress(wrap, shape, context_dim, scale):
    synthesizer = make_synthesizer(1, context_dim)
    h, g = normal(*shape, WIDTH).requires_grad_(), normal(*shape, WIDTH)
    ctx = None if context_dim is None else normal(*shape, CONTEXT)
    p = Boundary(wrap(synthesizer)).predict(h, ctx)
    expect(p.message, plain_synthesizer(synthesizer, h, ctx).detach())
    assert not p.message.requires_grad
    loss, sent = p.regress(g, scale)
    wanted_loss, wanted = regressed(synthesizer, h.detach(), g, ctx, scale)
    expect(loss, wanted_loss)
    expect(gradients(synthesizer), wanted)
    assert loss.shape == () and not loss.requires_grad and h.grad is None
    assert sent.data_ptr() == g.data_ptr()  # the true gradient itself


@kinds
def test_what_is_sent(wrap):
    synthesizer = make_synthesizer()
    p, g = Boundary(wrap(synthesizer)).predict(normal(BATCH, WIDTH)), normal(BATCH, WIDTH)
    shares = {
        (1, 0): g, (0, 1): p.message, (0, 0.25): 0.25 * p.message,
        (0.3, 0.7): 0.3 * g + 0.7 * p.message, (1, 1): g + p.message, (0.5, 0): 0.5 * g,
    }  # fmt: skip
    for send, expected in shares.items():
        expect(p.regress(g, send=send, learn=False)[1], expected)
    assert all(grad is None for grad in gradients(synthesizer))


@kinds
def test_predictions_are_regressed_in_any_order_with_the_synthesizer_as_it_is_then(wrap):
    synthesizer = make_synthesizer()
    boundary = Boundary(wrap(synthesizer))
    optimizer = torch.optim.SGD(synthesizer.parameters(), 0.1)
    triggers, targets = [normal(BATCH, WIDTH) for _ in range(3)], normal(3, BATCH, WIDTH)
    predictions = [boundary.predict(h) for h in triggers]
    messages = [plain_synthesizer(synthesizer, h, None).detach() for h in triggers]
    for i in (1, 2, 0):
        optimizer.zero_grad()
        loss, sent = predictions[i].regress(targets[i], send=(0.0, 1.0))
        wanted_loss, wanted = regressed(synthesizer, triggers[i], targets[i])
        expect(loss, wanted_loss)
        expect(gradients(synthesizer), wanted)
        expect(sent, messages[i])  # what was predicted, not what would be now
        optimizer.step()


def test_it_is_evaluated_again_if_and_only_if_it_has_changed(monkeypatch):
    from fastdni.ops import synthesizer as op

    calls, forward = [], op._fwd
    monkeypatch.setattr(op, "_fwd", lambda *a: calls.append(1) or forward(*a))
    synthesizer = make_synthesizer()
    p, q = (Boundary(synthesizer).predict(normal(BATCH, WIDTH)) for _ in range(2))
    g = normal(BATCH, WIDTH)
    p.gradients(g)
    p.regress(g)
    assert len(calls) == 2
    with torch.no_grad():
        synthesizer.layers[0].bias.add_(1)
    q.gradients(g)
    assert len(calls) == 3
    custom = Custom(make_synthesizer())
    p, q = (Boundary(custom).predict(normal(BATCH, WIDTH)) for _ in range(2))
    p.regress(g)
    assert custom.calls == 2
    with torch.no_grad():
        custom.inner.layers[0].bias.add_(1)
    q.regress(g)
    assert custom.calls == 3


def test_a_replaced_parameter_is_the_one_that_learns():
    synthesizer = make_synthesizer()
    h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    p = Boundary(synthesizer).predict(h)
    old = synthesizer.input_trigger.weight
    synthesizer.input_trigger.weight = nn.Parameter(normal(WIDTH, WIDTH))
    p.regress(g)
    expect(gradients(synthesizer), regressed(synthesizer, h, g)[1])
    assert old.grad is None


def test_a_synthesizer_that_became_another_one_takes_its_own_autograd():
    synthesizer = make_synthesizer()
    h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    p = Boundary(synthesizer).predict(h)
    synthesizer.register_forward_hook(lambda module, args, output: 2 * output)
    loss, _ = p.regress(g)
    error = 2 * plain_synthesizer(synthesizer, h, None) - g
    expect(loss, error.square().sum().detach() / BATCH)
    wanted = torch.autograd.grad(error.square().sum() / BATCH, list(synthesizer.parameters()))
    expect(gradients(synthesizer), list(wanted))


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@kinds
def test_gradients_are_added_and_frozen_parameters_get_none(wrap):
    synthesizer = make_synthesizer()
    synthesizer.layers[0].weight.requires_grad_(False)
    first, second = synthesizer.input_trigger.weight, synthesizer.input_trigger.bias
    first.grad, before = normal(WIDTH, WIDTH).t(), first.detach().clone()  # not contiguous
    second.grad = torch.ones_like(second)
    start = [first.grad.clone(), second.grad.clone()]
    kept = second.grad
    h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    p = Boundary(wrap(synthesizer)).predict(h)
    p.regress(g)
    twin = copy.deepcopy(synthesizer).requires_grad_()
    names = [n for n, _ in twin.named_parameters()]
    wanted = dict(zip(names, regressed(twin, h, g)[1], strict=True))
    expect(first.grad, start[0] + wanted["input_trigger.weight"])
    expect(second.grad, start[1] + wanted["input_trigger.bias"])
    assert second.grad is kept
    assert synthesizer.layers[0].weight.grad is None
    assert torch.equal(first, before)


@kinds
def test_hooks_on_parameters_run(wrap):
    synthesizer = make_synthesizer()
    h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    seen, wanted = [], regressed(synthesizer, h, g)[1]
    wanted[2] = 2 * wanted[2]
    synthesizer.layers[0].weight.register_hook(lambda grad: 2 * grad)
    synthesizer.layers[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    Boundary(wrap(synthesizer)).predict(h).regress(g)
    expect(gradients(synthesizer), wanted)
    expect(seen, [wanted[3]])


def test_a_plain_tensor_in_a_parameters_place_learns():
    synthesizer = make_synthesizer(0)
    leaf = synthesizer.input_trigger.weight
    del synthesizer.input_trigger.weight
    synthesizer.input_trigger.weight = 2 * leaf
    h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
    (dni.BackwardInterface(synthesizer).make_trigger(h) * g).sum().backward()
    error = h @ (2 * leaf).t() + synthesizer.input_trigger.bias - g
    (wanted,) = torch.autograd.grad(error.square().sum() / BATCH, [leaf])
    expect(leaf.grad, wanted)


# ---- updates ----


def optimizers_of(synthesizer, kind="nesterov"):
    optimizer = OPTIMIZERS[kind](synthesizer.parameters())
    return optimizer, Optimizers("regress", optimizer, list(synthesizer.parameters()))


@kinds
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_are_made_in_the_same_call(wrap, kind):
    synthesizer = make_synthesizer()
    twin = copy.deepcopy(synthesizer)
    (optimizer, optimizers), (own, _) = (optimizers_of(s, kind) for s in (synthesizer, twin))
    boundary = Boundary(wrap(synthesizer))
    for _ in range(3):
        h, g = normal(BATCH, WIDTH), normal(BATCH, WIDTH)
        boundary.predict(h).regress(g, optimizers=optimizers)
        for p, grad in zip(twin.parameters(), regressed(twin, h, g)[1], strict=True):
            p.grad = grad
        own.step()
        expect(list(synthesizer.parameters()), list(twin.parameters()))
    assert_same_state(optimizer, own)
    assert all(grad is None for grad in gradients(synthesizer))


def test_updates_under_autocast():
    """Of gradients that are worked out in bfloat16."""
    synthesizer = make_synthesizer().float()
    twin = copy.deepcopy(synthesizer)
    (optimizer, optimizers), (own, _) = (optimizers_of(s, "adam") for s in (synthesizer, twin))
    for _ in range(3):
        h, g = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            Boundary(synthesizer).predict(h).regress(g, optimizers=optimizers)
            Boundary(twin).predict(h).regress(g)
        own.step()
        own.zero_grad()
        torch.testing.assert_close(list(synthesizer.parameters()), list(twin.parameters()))
    assert optimizer.state.keys() == set(synthesizer.parameters())


def test_what_has_no_part_in_a_prediction_is_not_updated():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(1, 1)

        def forward(self, trigger, context):
            return self.used(trigger)

    synthesizer = Half()
    optimizer, optimizers = optimizers_of(synthesizer)
    before = [p.clone() for p in synthesizer.parameters()]
    Boundary(synthesizer).predict(normal(BATCH, WIDTH)).regress(
        normal(BATCH, WIDTH), optimizers=optimizers
    )
    changed = [not torch.equal(p, b) for p, b in zip(synthesizer.parameters(), before, strict=True)]
    assert changed == [True, True, False, False] and len(optimizer.state) == 2


@kinds
def test_what_no_optimizer_holds_is_not_updated(wrap):
    synthesizer = make_synthesizer()
    first, *others = synthesizer.parameters()
    optimizer = torch.optim.SGD([first], 0.1)
    optimizers = Optimizers("regress", optimizer, [first, *others])
    before = [p.clone() for p in synthesizer.parameters()]
    Boundary(wrap(synthesizer)).predict(normal(BATCH, WIDTH)).regress(
        normal(BATCH, WIDTH), optimizers=optimizers
    )
    changed = [not torch.equal(p, b) for p, b in zip(synthesizer.parameters(), before, strict=True)]
    assert changed == [True] + [False] * len(others)


@kinds
@pytest.mark.parametrize("case", ["RMSprop", "amsgrad", "one state for two"])
def test_an_update_that_cannot_be_fused_is_refused(wrap, case):
    synthesizer = make_synthesizer()
    parameters = list(synthesizer.parameters())
    if case == "RMSprop":
        optimizer = torch.optim.RMSprop(parameters)
    elif case == "amsgrad":
        optimizer = torch.optim.Adam(parameters, amsgrad=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        buffer = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for parameter in parameters:
            if parameter.shape == buffer.shape:
                optimizer.state[parameter]["momentum_buffer"] = buffer
    optimizers = Optimizers("regress", optimizer, parameters)
    before = [p.clone() for p in parameters]
    p = Boundary(wrap(synthesizer)).predict(normal(BATCH, WIDTH))
    with pytest.raises(ValueError, match="regress: the update must be one that can be fused: "):
        p.regress(normal(BATCH, WIDTH), optimizers=optimizers)
    assert all(map(torch.equal, before, parameters))


@kinds
def test_an_open_prediction_sees_an_update(wrap):
    synthesizer = make_synthesizer()
    boundary, (_, optimizers) = Boundary(wrap(synthesizer)), optimizers_of(synthesizer)
    h, g = normal(2, BATCH, WIDTH), normal(2, BATCH, WIDTH)
    p, q = boundary.predict(h[0]), boundary.predict(h[1])
    p.regress(g[0], optimizers=optimizers)
    loss, _ = q.regress(g[1])
    expect(loss, regressed(synthesizer, h[1], g[1])[0])
    expect(gradients(synthesizer), regressed(synthesizer, h[1], g[1])[1])


# ---- what is refused ----


@kinds
def test_another_shape_is_one_error_before_anything_is_written(wrap):
    synthesizer = make_synthesizer()
    p = Boundary(wrap(synthesizer)).predict(normal(BATCH, WIDTH))
    optimizer, optimizers = optimizers_of(synthesizer)
    for how in ({}, {"optimizers": optimizers}, {"learn": False}):
        with pytest.raises(RuntimeError, match=r"must have the shape \(6, 4\)"):
            p.regress(normal(BATCH, WIDTH - 1), **how)
    assert all(grad is None for grad in gradients(synthesizer)) and not optimizer.state


@kinds
def test_a_frozen_synthesizer_predicts_and_sends_but_does_not_learn(wrap):
    p = Boundary(wrap(make_synthesizer().requires_grad_(False))).predict(normal(BATCH, WIDTH))
    g = normal(BATCH, WIDTH)
    with pytest.raises(ValueError, match="should need gradient"):
        p.regress(g)
    loss, sent = p.regress(g, send=(0.0, 1.0), learn=False)
    expect(sent, p.message)
    expect(loss, (p.message - g).square().sum() / BATCH)


# ---- contexts ----


def test_a_synthesizer_says_the_width_of_its_context():
    assert make_synthesizer(context_dim=CONTEXT).context_dim == CONTEXT
    assert make_synthesizer().context_dim is None


def test_labels_become_the_context_of_who_names_a_width():
    class Own(nn.Module):
        context_dim = 4

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    labels, like, given = torch.tensor([1, 3]), torch.ones(1), object()
    found = context_for(Own(), None, labels, like)
    assert found.dtype == torch.float64 and found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    own = torch.float64
    assert context_for(make_synthesizer(context_dim=4), None, labels.byte(), like).dtype == own
    for synthesizer, context, target in (
        (Own(), given, labels),  # what is given stays
        (Own(), None, torch.ones(2, 3)),  # no labels
        (Own(), None, torch.ones(2)),
        (make_synthesizer(), None, labels),  # names none
        (nn.Identity(), None, labels),  # says nothing
    ):
        assert context_for(synthesizer, context, target, like) is context


def test_autocast_forms_the_error_in_float32():
    synthesizer = make_synthesizer().float()
    h, g = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        p = Boundary(synthesizer).predict(h)
    assert p.message.dtype == torch.bfloat16
    loss, _ = p.regress(g)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (p.message.float() - g).square().sum() / BATCH)
    assert all(grad.dtype == torch.float32 for grad in gradients(synthesizer))


def test_float16_parameters_are_served_by_the_reference():
    synthesizer = make_synthesizer().half()
    h, g = (torch.randn(BATCH, WIDTH).half() for _ in range(2))
    loss, _ = Boundary(synthesizer).predict(h).regress(g)
    parameters = ops.SynthesizerParameters.of(
        [p.detach() for p in (synthesizer.input_trigger.weight, synthesizer.layers[0].weight,
                              synthesizer.input_trigger.bias, synthesizer.layers[0].bias)], 2, True
    )  # fmt: skip
    prediction, _ = reference.synthesizer_fwd(h, None, *parameters)
    torch.testing.assert_close(loss, reference.regression_loss(prediction, g)[0])
