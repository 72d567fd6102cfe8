"""The ways in which the MNIST example trains its network, each with its recipe."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdni as dni
from fastdni.bench.eager import EagerBackwardInterface, EagerSynthesizer
from fastdni.synthesizers import start_at_zero

CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """A method and the learning rates that go with it (Adam; all fall to zero along a cosine).

    A synthesizer's learning rate is far below the layers': the gradients that it predicts are about
    1e-4, and Adam's steps are about as large as its rate.
    """

    name: str
    lr: float = 5e-4
    synthesizer_lr: float = 3e-6
    input_lr: float = 1e-3  # of the input synthesizers
    n_hidden: int = 0  # of the synthesizers
    context: bool = True  # whether they see the labels
    unlocked: bool = False


RECIPES = {
    "backprop": Recipe("backprop", context=False),
    "dni": Recipe("DNI", lr=1e-3, synthesizer_lr=3e-5, n_hidden=1, context=False),
    "cdni": Recipe("cDNI (labels)"),
    "unlocked": Recipe("complete unlock", unlocked=True),
}
SYNTHESIZER_WIDTH, INPUT_SYNTHESIZER_WIDTH = 1024, 256


def make_stages(inputs: int, width: int, layers: int) -> list[nn.Module]:
    """Hidden layers of Linear, BatchNorm, ReLU, and a linear output."""
    sizes = [inputs] + [width] * (layers - 1)
    hidden = [
        nn.Sequential(nn.Linear(below, above, bias=False), nn.BatchNorm1d(above), nn.ReLU())
        for below, above in zip(sizes, sizes[1:], strict=False)
    ]
    return [*hidden, nn.Linear(width, CLASSES)]


def make_synthesizer(recipe: Recipe, width: int, kind: type = dni.BasicSynthesizer) -> nn.Module:
    """Predicts the gradient of a hidden layer; zero at first."""
    return start_at_zero(
        kind(
            width,
            n_hidden=recipe.n_hidden,
            hidden_dim=SYNTHESIZER_WIDTH,
            context_dim=CLASSES if recipe.context else None,
        )
    )


def make_input_synthesizer(inputs: int, width: int) -> nn.Module:
    """Predicts a hidden layer's output from the image. Without the labels, which are not there when
    the trained network is used."""
    return start_at_zero(
        dni.BasicSynthesizer(
            width, n_hidden=1, hidden_dim=INPUT_SYNTHESIZER_WIDTH, trigger_dim=inputs
        )
    )


def make_network(method: str, inputs: int, width: int, layers: int, seed: int) -> nn.Module:
    """The network that a method trains: decoupled, or for backprop an nn.Sequential."""
    torch.manual_seed(seed)
    recipe, stages = RECIPES[method], make_stages(inputs, width, layers)
    if method == "backprop":
        return nn.Sequential(*stages)
    boundaries = range(layers - 1)
    made = [make_input_synthesizer(inputs, width) for _ in boundaries if recipe.unlocked]
    return dni.DecoupledSequential(
        *stages,
        synthesizers=[make_synthesizer(recipe, width) for _ in boundaries],
        input_synthesizers=made or None,
    )


def make_optimizer(method: str, network: nn.Module, lr: float | None = None) -> torch.optim.Adam:
    """Adam with a parameter group for the layers and one for each kind of synthesizer."""
    recipe = RECIPES[method]
    if not isinstance(network, dni.DecoupledSequential):
        return torch.optim.Adam(network.parameters(), lr=lr or recipe.lr)
    scale = (lr or recipe.lr) / recipe.lr
    groups = [
        {"params": network.stage_parameters(), "lr": scale * recipe.lr},
        {"params": network.synthesizers.parameters(), "lr": scale * recipe.synthesizer_lr},
    ]
    if network.input_synthesizers is not None:
        made = network.input_synthesizers.parameters()
        groups.append({"params": made, "lr": scale * recipe.input_lr})
    return torch.optim.Adam(groups)


def masks(layers: int, probability: float, seed: int) -> Iterator[list[bool] | None]:
    """For each step which layers are updated: each with the same probability, on its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.rand(layers, generator=generator) < probability
        yield None if probability == 1 else chosen.tolist()


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    mask: list[bool] | None = None,
) -> None:
    """One training step on a batch."""
    if isinstance(network, dni.DecoupledSequential):
        network.step(x, y, optimizer, update_mask=mask)
        return
    optimizer.zero_grad()
    F.cross_entropy(network(x), y).backward()
    optimizer.step()


# ---- the same steps by other means, to compare their speed ----


class InterfaceNetwork(nn.Module):
    """The network with an interface after each hidden layer, as drop-in code is written."""

    def __init__(
        self, stages: list[nn.Module], make_interface: Callable[[], nn.Module], plain: bool
    ):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.interfaces = nn.ModuleList(make_interface() for _ in stages[1:])
        self.plain = plain

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """fastdni's interfaces find the context around them; the plain ones are given it."""
        with nullcontext() if self.plain else dni.synthesizer_context(context):
            for stage, interface in zip(self.stages, self.interfaces, strict=False):
                h = stage(x)
                x = interface(h, context) if self.plain else interface(h)
        return self.stages[-1](x)


def interface_step(
    method: str, inputs: int, width: int, layers: int, x: Tensor, y: Tensor, plain: bool
) -> Callable[[], None]:
    """One step of `method` through interfaces: fastdni's drop-in modules, or plain PyTorch."""
    recipe = RECIPES[method]
    interface = EagerBackwardInterface if plain else dni.BackwardInterface
    kind = EagerSynthesizer if plain else dni.BasicSynthesizer
    network = InterfaceNetwork(
        make_stages(inputs, width, layers),
        lambda: interface(make_synthesizer(recipe, width, kind)),
        plain,
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr)

    def step() -> None:
        optimizer.zero_grad()
        context = F.one_hot(y, CLASSES).float() if recipe.context else None
        F.cross_entropy(network(x, context), y).backward()
        optimizer.step()

    return step
