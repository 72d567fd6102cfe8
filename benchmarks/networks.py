"""The network the drop-in benchmark trains, in every variant that it compares.

    Linear(784, W), BN, ReLU, Linear(W, W), BN, [interface], ReLU, Linear(W, 10), BN, log_softmax

The interface is dni-pytorch's MNIST example's, in three schemes:

* ``dni``: synthetic gradients from a synthesizer with one hidden layer of W;
* ``cdni``: the same, conditioned on one-hot labels;
* ``unlock``: synthetic gradients and synthetic messages, two hidden layers each, the messages
  predicted from the network's input.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdni as dni
from fastdni.reference.interfaces import (
    EagerBackwardInterface,
    EagerBidirectionalInterface,
    EagerSynthesizer,
)

SCHEMES = ("dni", "cdni", "unlock")
VARIANTS = {
    "backprop": "no interface",
    "eager": "plain PyTorch, the synthesizer evaluated twice a step",
    "easy": "plain PyTorch, one evaluation a step",
    "fastdni": "fastdni's drop-in modules",
}
INPUTS, CLASSES = 784, 10


class Network(nn.Module):
    """The network above around `interface`; None trains by backpropagation."""

    def __init__(self, width: int, scheme: str, make_interface: Callable[[], nn.Module | None]):
        super().__init__()
        self.scheme = scheme
        self.linear1 = nn.Linear(INPUTS, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.linear2 = nn.Linear(width, width, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.linear3 = nn.Linear(width, CLASSES, bias=False)
        self.bn3 = nn.BatchNorm1d(CLASSES)
        # Drawn last, so that one seed gives every variant the same layers.
        self.interface = make_interface()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, 784), labels y (B,), used as context -> log-probabilities (B, 10)."""
        h = F.relu(self.bn1(self.linear1(x)))
        h = self.bn2(self.linear2(h))
        if self.interface is not None:
            context = F.one_hot(y, CLASSES).to(x.dtype) if self.scheme == "cdni" else None
            h = self.cross(h, x, context)
        return F.log_softmax(self.bn3(self.linear3(F.relu(h))), dim=1)

    def cross(self, h: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Takes h through the interface, as each library is used."""
        arguments = (h, x) if self.scheme == "unlock" else (h,)
        if isinstance(self.interface, (dni.BackwardInterface, dni.BidirectionalInterface)):
            with dni.synthesizer_context(context):
                return self.interface(*arguments)
        return self.interface(*arguments, context)


def build(variant: str, scheme: str, width: int, seed: int = 0) -> Network:
    """One variant of the network; the same seed gives the same parameters in all of them."""
    torch.manual_seed(seed)
    return Network(width, scheme, partial(_interface, variant, scheme, width))


def _interface(variant: str, scheme: str, width: int) -> nn.Module | None:
    if variant == "backprop":
        return None
    if variant == "fastdni":
        synthesizer = dni.BasicSynthesizer
        backward, bidirectional = dni.BackwardInterface, dni.BidirectionalInterface
    else:
        synthesizer, shared = EagerSynthesizer, variant == "easy"
        backward = partial(EagerBackwardInterface, shared_forward=shared)
        bidirectional = partial(EagerBidirectionalInterface, shared_forward=shared)

    if scheme == "unlock":
        upward = synthesizer(width, n_hidden=2, trigger_dim=INPUTS)
        return bidirectional(upward, synthesizer(width, n_hidden=2))
    return backward(
        synthesizer(width, n_hidden=1, context_dim=CLASSES if scheme == "cdni" else None)
    )


def train_step(network: Network, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = F.nll_loss(network(x, y), y)
    loss.backward()
    optimizer.step()
    return loss
