"""What the machine allows: a step's arithmetic and memory traffic at rates measured beside it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from fastdni.bench.cases import Case
from fastdni.bench.products import product_calls, step_products, time_calls
from fastdni.bench.report import microseconds
from fastdni.bench.timing import Timing, graphed, repeat

_STATE = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}  # tensors that a parameter drags along
_LARGE = {"cpu": 512, "cuda": 4096}  # size of the product whose rate counts as the machine's
# Copies that are one call: to launch one on a GPU may take longer than to make it.
_COPIES = {"cpu": 1, "cuda": 20}
PRODUCT, COPY = "a large product", "a copy"


class Limit(NamedTuple):
    """The least time of a decoupled step.

    Attributes:
        flop: multiplications and additions of its matrix products.
        bytes: parameters and optimizer state, each read once and written once.
        flop_per_second: of a large matrix product of the precision, by the fastest library.
        bytes_per_second: of a copy that moves as many bytes, from wherever they stay: caches where
            they fit.
    """

    flop: float
    bytes: float
    flop_per_second: float
    bytes_per_second: float

    @property
    def arithmetic(self) -> float:
        """Seconds for the products alone."""
        return self.flop / self.flop_per_second

    @property
    def memory(self) -> float:
        """Seconds for the memory traffic alone."""
        return self.bytes / self.bytes_per_second

    @property
    def seconds(self) -> float:
        """The larger of the two: they may run side by side."""
        return max(self.arithmetic, self.memory)

    def __str__(self) -> str:
        bound = "arithmetic" if self.arithmetic >= self.memory else "memory"
        return (
            f"{microseconds(self.seconds)} us, by {bound}: "
            f"{self.flop / 1e6:.3g} MFLOP at {self.flop_per_second / 1e9:.3g} GFLOP/s "
            f"({microseconds(self.arithmetic)} us), {self.bytes / 1e6:.3g} MB at "
            f"{self.bytes_per_second / 1e9:.3g} GB/s ({microseconds(self.memory)} us)"
        )


def work(case: Case) -> tuple[int, int]:
    """FLOP and bytes of a decoupled step: see :class:`Limit`."""
    flop = sum(2 * case.batch * inputs * outputs for _, inputs, outputs in step_products(case))
    count = sum(parameter.numel() for parameter in case.build().parameters())
    return flop, 4 * count * 2 * (1 + _STATE[case.optimizer])


def rates(case: Case) -> dict[str, Callable[[], object]]:
    """What :func:`limit` needs timed, beside the steps."""
    size = _LARGE[case.device]
    dtypes = [torch.float32] + [torch.bfloat16] * (case.precision == "bf16")
    calls = {
        (dtype, name): call
        for dtype in dtypes
        for name, call in product_calls(size, "forward", size, size, dtype, case.device).items()
    }
    taken = time_calls(calls, size**3, 0.1, case.device)
    source = torch.zeros(max(1, work(case)[1] // 8), device=case.device)  # read what is written
    copy = partial(torch.empty_like(source).copy_, source)
    if case.device == "cuda":
        copy = graphed(partial(repeat, copy, _COPIES["cuda"]))
    return {PRODUCT: calls[min(taken, key=taken.__getitem__)], COPY: copy}


def limit(case: Case, timings: Mapping[str, Timing]) -> Limit:
    """From the timings of :func:`rates`."""
    flop, traffic = work(case)
    product_rate = 2 * _LARGE[case.device] ** 3 / timings[PRODUCT].median
    copied = traffic * _COPIES[case.device]
    return Limit(flop, traffic, product_rate, copied / timings[COPY].median)
