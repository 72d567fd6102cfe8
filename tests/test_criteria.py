"""Losses of torch's own are fused; what only looks like one of them goes by its own rules."""

import copy
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from network_cases import OPTIMIZERS, batch, network
from paths import assert_fused, calls_of, take
from plain_step import assert_same_state, twin_of
from torch import nn

FUSED = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), "cross_entropy"),
    "CrossEntropyLoss(mean)": (nn.CrossEntropyLoss(reduction="mean"), "cross_entropy"),
    "CrossEntropyLoss(ignored)": (nn.CrossEntropyLoss(ignore_index=3), "cross_entropy"),
    "CrossEntropyLoss(eval)": (nn.CrossEntropyLoss().eval(), "cross_entropy"),
    "cross_entropy": (F.cross_entropy, "cross_entropy"),
    "MSELoss": (nn.MSELoss(), "mse"),
    "MSELoss(mean)": (nn.MSELoss(reduction="mean"), "mse"),
    "mse_loss": (F.mse_loss, "mse"),
}


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("case", FUSED)
def test_losses_of_torch_are_fused(case, kind):
    criterion, name = FUSED[case]
    net = network(n_hidden=1, context=True)
    optimizer = OPTIMIZERS[kind](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(5):
        given = batch(net, criterion=name, seed=seed) | {"criterion": criterion}
        assert_fused(net, given["x"], optimizer, criterion)
        take(net, optimizer, twin, own, given)
    assert_same_state(optimizer, own)
    named = given | {"criterion": name}
    if "ignored" not in case:
        for _ in range(2):
            net.step(optimizer=optimizer, **named)
        usual = calls_of(lambda: net.step(optimizer=optimizer, **named))
        for _ in range(2):
            net.step(optimizer=optimizer, **given)
        # What tells which loss it is may cost a call or two, not a preparation.
        assert calls_of(lambda: net.step(optimizer=optimizer, **given)) <= usual + 3


def test_rows_that_are_ignored():
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for index in (-100, 2, 0, 255, -1):
        for labels in ([2, 0, 1, index, 4, index], [index] * 6):
            given = batch(net) | {"criterion": nn.CrossEntropyLoss(ignore_index=index)}
            given["target"] = torch.tensor(labels)
            if labels[0] == labels[1]:
                twin, own = twin_of(net, optimizer)
                kept = copy.deepcopy(net.state_dict())
                take(net, optimizer, twin, own, given)  # NaN, as in torch
                net.load_state_dict(kept)
                twin, own = twin_of(net, optimizer)
            else:
                take(net, optimizer, twin, own, given)


class Own(nn.CrossEntropyLoss):
    def forward(self, output, target):
        return 2 * super().forward(output, target)


def patched(loss):
    loss.forward = lambda output, target: 3 * F.cross_entropy(output, target)
    return loss


def hooked(loss):
    loss.register_forward_hook(lambda module, arguments, output: 3 * output)
    return loss


OTHERS = {
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "weights": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4, 5]).double()),
    "smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "smoothing and ignored": lambda: nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1),
    "weights and ignored": lambda: nn.CrossEntropyLoss(
        torch.tensor([1.0, 0, 3, 4, 5]).double(), ignore_index=2
    ),
    "a subclass": Own,
    "a forward of its own": lambda: patched(nn.CrossEntropyLoss()),
    "a hook": lambda: hooked(nn.CrossEntropyLoss()),
    "a partial": lambda: partial(F.cross_entropy, label_smoothing=0.2),
    "a lambda": lambda: lambda output, target: 2 * F.cross_entropy(output, target),
    "another loss": lambda: nn.MultiMarginLoss(),
    "logarithms": lambda: lambda output, target: F.nll_loss(output.log_softmax(1), target),
}


@pytest.mark.parametrize("case", OTHERS)
def test_losses_that_are_something_else(case):
    net = network()
    optimizer = OPTIMIZERS["nesterov"](net.parameters())
    twin, own = twin_of(net, optimizer)
    criterion = OTHERS[case]()
    for seed in range(4):
        take(net, optimizer, twin, own, batch(net, seed=seed) | {"criterion": criterion})


def set_attribute(name, value):
    return lambda loss, undo: setattr(loss, name, value)


CHANGES = {
    "ignore_index": set_attribute("ignore_index", 2),
    "reduction": set_attribute("reduction", "sum"),
    "label_smoothing": set_attribute("label_smoothing", 0.3),
    "weight": set_attribute("weight", torch.tensor([1.0, 2, 3, 4, 5]).double()),
    "forward": lambda loss, undo: patched(loss),
    "hook": lambda loss, undo: hooked(loss),
    "class": set_attribute("__class__", Own),
    "patched class": lambda loss, undo: undo.enter_context(
        mock.patch.object(
            nn.CrossEntropyLoss, "forward", lambda self, output, target: output.square().sum()
        )
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_loss_that_changes_between_steps(change):
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    loss = nn.CrossEntropyLoss()
    for seed in range(4):
        take(net, optimizer, twin, own, batch(net, seed=seed) | {"criterion": loss})
    with ExitStack() as undo:
        CHANGES[change](loss, undo)
        for seed in range(3):
            take(net, optimizer, twin, own, batch(net, seed=seed) | {"criterion": loss})
    take(net, optimizer, twin, own, batch(net, seed=9) | {"criterion": loss})


TARGETS = {
    "probabilities": lambda: (F.cross_entropy, torch.rand(6, 5).double().softmax(1)),
    "probabilities, module": lambda: (nn.CrossEntropyLoss(), torch.rand(6, 5).double().softmax(1)),
    "bytes": lambda: (nn.CrossEntropyLoss(), torch.randint(5, (6,)).byte()),
    "another dtype": lambda: (nn.MSELoss(), torch.randn(6, 5)),
    "integers": lambda: (F.mse_loss, torch.randint(5, (6, 5))),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_torchs_losses_take(case):
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    criterion, target = TARGETS[case]()
    for seed in range(3):
        given = batch(net, seed=seed) | {"criterion": criterion, "target": target}
        take(net, optimizer, twin, own, given, 1e-9 if case != "another dtype" else 1e-6)


def test_a_target_that_is_broadcast():
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    given = batch(net) | {"criterion": F.mse_loss, "target": torch.randn(6, 1).double()}
    with pytest.warns(UserWarning, match="broadcasting"):
        take(net, optimizer, twin, own, given)
