"""A training step with the drop-in modules, in every variant, and any other library's modules.

The network is that of dni-pytorch's MNIST examples, of any widths:

    Linear(K, W), BN, ReLU, ..., Linear(W, W), BN, [interface], ReLU, Linear(W, N), BN, log_softmax

The interface is that of the example, in three schemes:

* ``dni``: synthetic gradients from a synthesizer with one hidden layer of W;
* ``cdni``: the same, conditioned on one-hot labels;
* ``unlock``: synthetic gradients and synthetic messages, two hidden layers each, the messages
  predicted from the network's input.

Variants:

* backprop: no interface;
* eager: plain PyTorch, the synthesizer evaluated twice a step, as dni-pytorch does it;
* easy: plain PyTorch, one evaluation a step;
* fastdni, and as "peer ..." any module with dni-pytorch's names: the library's own modules.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdni as dni
from fastdni.bench.eager import (
    EagerBackwardInterface,
    EagerBidirectionalInterface,
    EagerSynthesizer,
)
from fastdni.bench.network import LEAST_ROUNDS, Result
from fastdni.bench.timing import BURST, interleave

SCHEMES = {"dni": "DNI", "cdni": "cDNI (label context)", "unlock": "complete unlock"}
# What a library must have to be measured beside fastdni.
NAMES = ("BasicSynthesizer", "BackwardInterface", "BidirectionalInterface", "synthesizer_context")
# What is compared under Adam as it comes, and under Adam(fused=True).
VARIANTS = {"Adam": ("fastdni", "eager", "backprop"), "fused Adam": ("fastdni", "easy", "backprop")}
# Agreement in float64, relative to a gradient's largest element; and in float32, as what is timed,
# an error of at most so many times the error that eager PyTorch itself makes against float64.
FLOAT64_TOLERANCE, FLOAT32_FACTOR = 1e-10, 3


class Network(nn.Module):
    """The network above around `interface`; None trains by backpropagation.

    Args:
        widths: of the input, of every layer's output.
        scheme: one of SCHEMES.
        make_interface: () -> the interface, called when the layers are made: one seed gives every
            variant the same layers.
        context: (ctx) -> what the interface must be called in; None: ctx is an argument.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        scheme: str,
        make_interface: Callable[[], nn.Module | None],
        context: Callable | None = None,
    ):
        super().__init__()
        self.scheme, self.classes, self._context = scheme, widths[-1], context
        pairs = list(zip(widths, widths[1:], strict=False))
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=False) for k, n in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(n) for _, n in pairs)
        self.interface = make_interface()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, K), labels y (B,), used as context -> log-probabilities (B, N)."""
        h = x
        for linear, norm in zip(self.linears[:-1], self.norms[:-1], strict=True):
            h = norm(linear(h if h is x else F.relu(h)))
        if self.interface is not None:
            context = F.one_hot(y, self.classes).to(x.dtype) if self.scheme == "cdni" else None
            h = self.cross(h, x, context)
        return F.log_softmax(self.norms[-1](self.linears[-1](F.relu(h))), dim=1)

    def cross(self, h: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """Takes h through the interface, as each library is used."""
        arguments = (h, x) if self.scheme == "unlock" else (h,)
        if self._context is None:
            return self.interface(*arguments, context)
        if context is None:
            return self.interface(*arguments)
        with self._context(context):
            return self.interface(*arguments)


def build(
    variant: str | ModuleType, scheme: str, widths: tuple[int, ...], seed: int = 0
) -> Network:
    """One variant of the network, or that of a library; the same seed gives all of them the same
    parameters."""
    torch.manual_seed(seed)
    library = dni if variant == "fastdni" else variant
    context = library.synthesizer_context if isinstance(library, ModuleType) else None
    return Network(widths, scheme, partial(_interface, library, scheme, widths), context)


def _interface(library: str | ModuleType, scheme: str, widths: tuple[int, ...]) -> nn.Module | None:
    if library == "backprop":
        return None
    if isinstance(library, ModuleType):
        synthesizer = library.BasicSynthesizer
        backward, bidirectional = library.BackwardInterface, library.BidirectionalInterface
    else:
        synthesizer, shared = EagerSynthesizer, library == "easy"
        backward = partial(EagerBackwardInterface, shared_forward=shared)
        bidirectional = partial(EagerBidirectionalInterface, shared_forward=shared)

    width, inputs, classes = widths[-2], widths[0], widths[-1]
    if scheme == "unlock":
        upward = synthesizer(width, n_hidden=2, trigger_dim=inputs)
        return bidirectional(upward, synthesizer(width, n_hidden=2))
    return backward(
        synthesizer(width, n_hidden=1, context_dim=classes if scheme == "cdni" else None)
    )


def train_step(network: Network, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = F.nll_loss(network(x, y), y)
    loss.backward()
    optimizer.step()
    return loss


def data(widths: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    """A random batch: inputs (B, K) and labels (B,)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, widths[0], generator=generator)
    return x, torch.randint(widths[-1], (batch,), generator=generator)


def _gradients(network: Network, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """The loss, and every parameter's gradient in a step that changes none of them."""
    network = copy.deepcopy(network).to(dtype)
    x, y = data((network.linears[0].in_features, network.classes), batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    loss = train_step(network, optimizer, x.to(dtype), y)
    return [loss.detach(), *(p.grad for p in network.parameters())]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, each relative to the tensor's largest element."""
    pairs = zip(found, expected, strict=True)
    errors = [(a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(errors).max().item()  # NaN, if there is one


def check(
    scheme: str, widths: tuple[int, ...], batch: int, others: tuple[ModuleType, ...] = ()
) -> None:
    """Compares the variants, and other libraries, with plain PyTorch, by the loss and by every
    parameter's gradient.

    Raises:
        ArithmeticError: one differs, or its parameters have other shapes.
    """
    oracle = build("eager", scheme, widths)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in oracle.parameters():
            # The zero start would hide the synthesizer from the layers below.
            if not parameter.any():
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    expected = _gradients(oracle, batch, torch.float64)
    own = _error(_gradients(oracle, batch, torch.float32), expected)
    bounds = {torch.float64: FLOAT64_TOLERANCE, torch.float32: FLOAT32_FACTOR * own}
    shapes = [p.shape for p in oracle.parameters()]
    for variant in ("easy", "fastdni", *others):
        name = variant.__name__ if isinstance(variant, ModuleType) else variant
        case = f"{name}, {scheme}, {'-'.join(map(str, widths))}, batch {batch}"
        try:
            network = build(variant, scheme, widths)
            if [p.shape for p in network.parameters()] != shapes:
                raise ArithmeticError("its modules have other parameters than dni-pytorch's")
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), oracle.parameters(), strict=True):
                    parameter.copy_(value)
            errors = {d: _error(_gradients(network, batch, d), expected) for d in bounds}
        except Exception as reason:  # another library may do anything
            raise ArithmeticError(f"{case}: {str(reason).partition(chr(10))[0]}") from reason
        for dtype, bound in bounds.items():
            off = errors[dtype]
            # Written so that NaN fails too.
            if not off <= bound:
                raise ArithmeticError(f"{case}, {dtype}: off by {off:.1e}, allowed {bound:.1e}")


def measure(
    scheme: str,
    widths: tuple[int, ...],
    batch: int,
    others: tuple[ModuleType, ...] = (),
    progress: bool = False,
    **limits: float,
) -> list[Result]:
    """Checks, and then times a training step of every variant, in turn.

    Args:
        scheme: one of SCHEMES.
        widths, batch: of the network.
        others: libraries to be measured, too.
        progress: show how far it is, see `progress.Line`.
        limits: `rounds` or `seconds`, for `interleave`.

    Returns:
        For each optimizer of VARIANTS the times under it; ratios are to fastdni under the same one.

    Raises:
        ArithmeticError: two variants do not agree.
    """
    check(scheme, widths, batch, others)
    x, y = data(widths, batch)
    steps = {}
    for optimizer, variants in VARIANTS.items():
        named = {name: name for name in variants} | {f"peer {o.__name__}": o for o in others}
        for name, variant in named.items():
            network = build(variant, scheme, widths)
            fused = True if optimizer == "fused Adam" else None
            adam = torch.optim.Adam(network.parameters(), fused=fused)
            steps[optimizer, name] = partial(train_step, network, adam, x, y)
    timings = interleave(steps, burst=BURST, least=LEAST_ROUNDS, progress=progress, **limits)
    results = []
    for optimizer in VARIANTS:
        case = {"scheme": SCHEMES[scheme], "net": "-".join(map(str, widths)), "batch": batch}
        own = {name: timing for (of, name), timing in timings.items() if of == optimizer}
        results.append(Result(case | {"optimizer": optimizer}, own))
    return results
