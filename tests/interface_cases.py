"""What the tests of the interfaces share: synthesizers, triggers, comparison."""

import pytest
import torch
from plain_dni import plain_synthesizer
from torch import nn

import fastdni as dni

BATCH, WIDTH, CONTEXT = 6, 5, 3


def make_synthesizer(n_hidden=1, context_dim=None, width=WIDTH, trigger_dim=None):
    """A BasicSynthesizer in float64 whose last layer no longer predicts almost nothing."""
    synthesizer = dni.BasicSynthesizer(
        width, n_hidden=n_hidden, trigger_dim=trigger_dim, context_dim=context_dim
    ).double()
    with torch.no_grad():
        for p in synthesizer.parameters():
            p.normal_()
    return synthesizer


class Custom(nn.Module):
    """Not a BasicSynthesizer: takes the generic path. Counts its calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, trigger, context):
        self.calls += 1
        return plain_synthesizer(self.inner, trigger, context)


kinds = pytest.mark.parametrize("wrap", [lambda s: s, Custom], ids=["basic", "custom"])


def upstream(*shape):
    """A trigger that something lies before, and that something."""
    leaf = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return torch.tanh(leaf), leaf


def gradients(module):
    return [p.grad for p in module.parameters()]


def expect(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
