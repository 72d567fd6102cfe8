"""What is measured: a network and how it is trained."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastdni as dni

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
PRECISIONS = ("fp32", "tf32", "bf16")
# So low that thousands of steps on one batch leave the network where it began (a loss near zero
# would bring denormal numbers, which are slow), and yet one step shows in float32.
_OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 1e-5}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-5}),
}
OPTIMIZERS = tuple(_OPTIMIZERS)


class Case(NamedTuple):
    """A network of Linear stages, and how it is trained.

    Attributes:
        widths: of the input, of every stage's output.
        batch: number of rows B.
        optimizer: one of OPTIMIZERS.
        activation: one of ACTIVATIONS, below the top.
        norm: BatchNorm1d in front of the activations.
        context: whether the synthesizers take one-hot labels as context.
        hidden: widths of the synthesizers' hidden layers; none: linear ones.
        precision: "fp32"; "tf32" (CUDA: the operands of products); "bf16" (autocast).
        device: where it is trained.
    """

    widths: tuple[int, ...]
    batch: int = 256
    optimizer: str = "adam"
    activation: str = "relu"
    norm: bool = False
    context: bool = True
    hidden: tuple[int, ...] = ()
    precision: str = "fp32"
    device: str = "cpu"

    def __str__(self) -> str:
        parts = ["-".join(map(str, self.widths)), f"batch {self.batch}", self.optimizer]
        parts += [self.activation] if self.activation != "relu" else []
        parts += ["BatchNorm"] if self.norm else []
        kind = "MLP " + "-".join(map(str, self.hidden)) if self.hidden else "linear"
        parts += [f"{kind} synthesizers{' with label context' if self.context else ''}"]
        return ", ".join([*parts, self.precision, self.device])

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A random batch: inputs (B, K) and labels (B,)."""
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, self.widths[0], generator=generator).to(self.device, dtype)
        y = torch.randint(self.widths[-1], (self.batch,), generator=generator)
        return x, y.to(self.device)

    def build(self, dtype: torch.dtype = torch.float32) -> dni.DecoupledSequential:
        """The network, the same in each call; no parameter is zero, so that all of them matter."""
        torch.manual_seed(0)
        stages = []
        for number, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            top = number == len(self.widths) - 2
            # A bias in front of a BatchNorm has the gradient zero, and rounding decides its update.
            layers = [nn.Linear(inputs, outputs, bias=top or not self.norm)]
            if not top:
                layers += [nn.BatchNorm1d(outputs)] if self.norm else []
                layers.append(ACTIVATIONS[self.activation]())
            stages.append(nn.Sequential(*layers))
        context_dim = self.widths[-1] if self.context else None
        how = {"n_hidden": len(self.hidden), "hidden_dim": self.hidden[0]} if self.hidden else {}
        synthesizers = [
            dni.BasicSynthesizer(width, context_dim=context_dim, **how)
            for width in self.widths[1:-1]
        ]
        net = dni.DecoupledSequential(*stages, synthesizers=synthesizers)
        with torch.no_grad():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.copy_(0.01 * torch.randn(parameter.shape))
        return net.to(self.device, dtype)

    def make_optimizer(self, parameters: list[Tensor], **how: bool | None) -> Optimizer:
        """torch's; `fused=None` is its default, which is not the fused form."""
        kind, numbers = _OPTIMIZERS[self.optimizer]
        return kind(parameters, **numbers, **how)

    def autocast(self) -> torch.autocast:
        """What a training loop of this precision runs its forward and backward passes in."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


def parse_net(text: str) -> tuple[int, ...]:
    """`784-256-256-10` as widths.

    Raises:
        ValueError: it is something else, has fewer than three widths, or a width below 1.
    """
    try:
        widths = tuple(map(int, text.split("-")))
    except ValueError:
        widths = ()
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(
            f"a network is three or more widths of at least 1, such as 784-256-256-10, got {text!r}"
        )
    return widths


def parse_synthesizer(text: str) -> tuple[int, ...]:
    """`linear` or `mlp:1024` (two hidden layers, as in the paper) as widths of hidden layers;
    `mlp:1024x1` for another number of them.

    Raises:
        ValueError: it is something else.
    """
    if text == "linear":
        return ()
    kind, _, numbers = text.partition(":")
    width, _, count = numbers.partition("x")
    found = (width, count or "2")
    if kind != "mlp" or not all(number.isdecimal() and int(number) > 0 for number in found):
        raise ValueError(
            f"a synthesizer is linear, mlp:WIDTH (two hidden layers) or mlp:WIDTHxLAYERS, "
            f"got {text!r}"
        )
    return (int(width),) * int(found[1])
