"""Whether a device's kernels compute there what plain PyTorch computes.

Kernels are proven where they are built. Whether a GPU that they have never run on does with them
what is meant can be seen on that GPU alone: so it is looked at, once, before they serve there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastdni import backend, ops
from fastdni.reference import OptimizerSettings, SweepNorm, SweepStage, SynthesizerParameters

_ROWS, _CONTEXT = 33, 10
# Rows, widths of a network, BatchNorm, hidden layers of its synthesizers: every instruction of the
# sweep, and every way to spread them over a GPU with clusters.
_OF_CUDA = (
    (_ROWS, (70, 36, 10), False, 1),
    (_ROWS, (70, 36, 10), True, 0),
    (_ROWS, (20, 10), False, 0),
    (_ROWS, (20, 520, 10), False, 0),
)
# A long batch, and products that torch's library makes: in TF32 where torch is told to.
_LARGE_OF_CUDA = ((4100, (70, 36, 10), False, 0), (1024, (512, 512, 10), False, 0))
# The smallest tiles, and the largest: of a layer, a synthesizer and their updates.
_OF_TRITON = ((_ROWS, (70, 36, 10), True, 1),)
_LARGE_OF_TRITON = ((2048, (1024, 2048, 1024, 10), False, 0),)
# The largest error allowed, relative to the largest value. Faults of a kernel are of the size of
# the values.
_TOLERANCES = {"exact": 1e-4, "tf32x3": 1e-3, "tf32": 3e-2, "bfloat16": 0.2}


def disagreement(device: torch.device, name: str) -> str | None:
    """What differs between the kernels of the backend of that name on a device and plain PyTorch
    there in float64, in words, or None."""
    modes = [torch.autocast(kind, enabled=False) for kind in {"cpu", device.type}]
    modes += [torch.inference_mode(False), torch.no_grad(), _not_deterministic()]
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        for what, tolerance, found, truth in _comparisons(device, name):
            for ours, true in zip(found, truth, strict=True):
                if true.numel() == 0:  # synthesis losses without a synthesizer
                    continue
                error, largest = (ours.double() - true).abs().max(), true.abs().max()
                if not error <= tolerance * largest:  # nor where it is NaN
                    return f"{what}: an error of {error:.2g} in values up to {largest:.2g}"
    return None


@contextmanager
def _not_deterministic() -> Iterator[None]:
    """Of torch's products in float64 nothing is asked here that they would refuse."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _comparisons(
    device: torch.device, name: str
) -> Iterator[tuple[str, float, list[Tensor], list[Tensor]]]:
    """Of each computation what it is, what it may be off by, the device's results, the truth."""
    random = torch.Generator().manual_seed(0)
    own = backend.precision(device, None)
    every, asked = list(_TOLERANCES), [own, "bfloat16"]
    small, large = _OF_CUDA, _LARGE_OF_CUDA
    if name == "triton":  # where each kernel is compiled when it is first launched
        small, large, every = _OF_TRITON, _LARGE_OF_TRITON, asked
    networks = [(network, every) for network in small]
    if device.type != "cpu":  # in tests a large one takes too long
        networks += [(network, asked) for network in large]
    for (rows, widths, norm, hidden), precisions in networks:
        given = _step(random, rows, widths, norm, hidden)
        truth = _sweep(given, device, "reference", "exact", torch.float64)
        for precision in precisions:
            what = f"a step of {'-'.join(map(str, widths))} with {precision} products"
            found = _sweep(given, device, name, precision, torch.float32)
            yield what, _TOLERANCES[precision], found, truth
    parameters = _synthesizer(random, 70, 36, 1)
    given = (
        _normal(random, _ROWS, 70), _normal(random, _ROWS, _CONTEXT), parameters,
        _normal(random, _ROWS, 36),
    )  # fmt: skip
    truth = _regress(given, device, "reference", torch.float64)
    found = _regress(given, device, name, torch.float32)
    yield "a synthesizer", _TOLERANCES[own], found, truth


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    values = torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
    return values / shape[-1] ** 0.5


def _synthesizer(random, inputs: int, outputs: int, hidden: int) -> SynthesizerParameters:
    widths = [inputs, *[outputs + 3] * hidden, outputs]
    weights = [_normal(random, n, k) for k, n in zip(widths, widths[1:], strict=False)]
    biases = [_normal(random, n) for n in widths[1:]]
    of_context = _normal(random, widths[1], _CONTEXT), _normal(random, widths[1])
    return SynthesizerParameters(weights, biases, *of_context)


def _step(random, rows: int, widths, norm: bool, hidden: int) -> tuple:
    """Stages, input and labels."""
    stages = []
    for k, n in zip(widths, widths[1:], strict=False):
        top = n == widths[-1]
        of_norm = None
        if norm and not top:
            count = torch.zeros((), dtype=torch.int64, device="cpu")
            statistics = _normal(random, n), _normal(random, n).abs(), count
            of_norm = SweepNorm(_normal(random, n) + 1, _normal(random, n), statistics, 0.1, 1e-5)
        stages.append(
            SweepStage(
                _normal(random, n, k),
                # In front of a BatchNorm its gradient would be nothing but rounding.
                None if of_norm else _normal(random, n),
                of_norm,
                "identity" if top else "tanh",
                None if top else _synthesizer(random, n, n, hidden),
            )
        )
    x = _normal(random, rows, widths[0]) * widths[0] ** 0.5
    return stages, x, torch.arange(rows, device="cpu") % widths[-1]


def _on(device: torch.device, value, floating: torch.dtype):
    """Copies on a device."""

    def copied(t: Tensor) -> Tensor:
        return t.to(device, floating if t.is_floating_point() else t.dtype, copy=True)

    return tree_map_only(Tensor, copied, value)


def _sweep(
    given: tuple, device: torch.device, name: str, precision: str, floating: torch.dtype
) -> list[Tensor]:
    """Output, losses, every gradient and running statistic of a step."""
    stages, x, target = _on(device, given, floating)
    with backend.use_backend(name):
        plan = ops.SweepPlan(stages, len(x), "cross_entropy", precision=precision)
    gradients = [torch.zeros_like(p) for p in plan.parameters]
    settings = ops.flat([OptimizerSettings("gradient")])
    groups, active = [0] * len(gradients), [1] * (len(stages) + 1)
    results = ops.sweep_(plan, x, target, None, gradients, groups, settings, active)
    return [*results, *gradients, *plan.statistics]


def _regress(given: tuple, device: torch.device, name: str, floating: torch.dtype) -> list[Tensor]:
    """A synthesizer's prediction, its loss and gradients."""
    trigger, context, parameters, target = _on(device, given, floating)
    with backend.use_backend(name):
        prediction, hidden = ops.synthesizer_fwd(trigger, context, parameters)
        loss, gradients = ops.synthesizer_bwd(
            target, prediction, hidden, trigger, context, parameters.weights, bias=True
        )
        alone, error = ops.regression_loss(prediction, target)
    return [prediction, loss, *gradients, alone, error]


backend.compare_by(disagreement)
