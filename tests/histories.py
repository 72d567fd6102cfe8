"""Random networks with their optimizers, for a property test of random histories.

Everything is decided by small numbers, so that an example is short to read and to shrink: a
history is a list of (name of a step or of an action, number).
"""

from typing import NamedTuple

import torch
from network_cases import CONTEXT
from torch import nn

from fastdni import BasicSynthesizer, DecoupledSequential

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.GELU)


class Description(NamedTuple):
    """Of a network: what it is made of."""

    widths: list[int]
    norms: list[bool]  # of the stages but the last
    activations: list[int]
    n_hidden: int
    context: bool
    unlocked: bool
    share: float  # bp_lambda
    double: bool
    optimizers: tuple[int, int, int]  # layout, kinds


def network_of(made: Description) -> DecoupledSequential:
    torch.manual_seed(0)
    pairs = list(zip(made.widths, made.widths[1:], strict=False))
    stages = []
    for (k, n), norm, activation in zip(pairs, made.norms, made.activations, strict=False):
        layers = [nn.Linear(k, n)] + [nn.BatchNorm1d(n)] * norm
        stages.append(nn.Sequential(*layers, ACTIVATIONS[activation]()))
    stages.append(nn.Linear(*pairs[-1]))

    def synthesizer(inputs: int, outputs: int) -> BasicSynthesizer:
        return BasicSynthesizer(
            outputs, made.n_hidden, 3, inputs, CONTEXT if made.context else None
        )

    inner = made.widths[1:-1]
    net = DecoupledSequential(
        *stages,
        synthesizers=[synthesizer(n, n) for n in inner],
        input_synthesizers=[synthesizer(made.widths[0], n) for n in inner]
        if made.unlocked and inner
        else None,
        bp_lambda=0.0 if made.unlocked else made.share,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return net.double() if made.double else net


KINDS = (
    lambda groups: torch.optim.SGD(groups, lr=0.02),
    lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.8, dampening=0.3, weight_decay=0.1),
    # A large eps: where a gradient is nothing but rounding, Adam's step would be as long as any.
    lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-3),
    lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3, weight_decay=0.1),
    lambda groups: torch.optim.RMSprop(groups, lr=0.002, eps=1e-3),
    lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-3, amsgrad=True),
)


class Side:
    """A network with its optimizers: one of the two that share a history."""

    def __init__(self, made: Description):
        self.net = network_of(made)
        self.given = optimizers_of(self.net, *made.optimizers)

    @property
    def optimizers(self) -> list:
        return self.given if isinstance(self.given, list) else [self.given]

    def groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def hold_their_own(self) -> None:
        """Optimizers must hold no parameter that the network has lost."""
        own = set(map(id, self.net.parameters()))
        for group in self.groups():
            group["params"] = [p for p in group["params"] if id(p) in own]

    def linears(self) -> list[nn.Linear]:
        return [m for m in self.net.stages.modules() if isinstance(m, nn.Linear)]

    def norms(self) -> list[nn.Module]:
        return [m for m in self.net.modules() if isinstance(m, nn.BatchNorm1d)]


def optimizers_of(net, layout: int, first: int, second: int):
    stages, synthesizers = net.stage_parameters(), net.synthesizer_parameters()
    if layout == 0 or not synthesizers:
        return KINDS[first](list(net.parameters()))
    if layout == 1:
        groups = [{"params": stages}, {"params": synthesizers, "lr": 0.003}]
        return KINDS[first](groups)
    if layout == 2:
        return [KINDS[first](stages), KINDS[second](synthesizers)]
    return KINDS[first](stages)
