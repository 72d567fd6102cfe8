"""The timing loop of the project: callables measured in turn.

Machines drift: clocks change, neighbours come and go. Timing A to its end and then B charges
that drift to one of them, so :func:`interleave` runs A B C, B C A, C A B, ... and reports medians
with the 20th and 80th percentiles; :class:`Ratio` compares two of them round by round.

On a GPU a call is launched and waited for in 10 us or more, which are no part of a training loop:
there a sample is the mean of so many calls in a row that this does not show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from time import perf_counter

import torch

from fastdni.bench.progress import Line, bar

BURST = 8  # training steps of one candidate in a row: see `interleave`
GRAPH_WARMUP = 3  # steps before one is captured
_ROW = 2e-3  # seconds of calls in a row on a GPU, beside which one wait for it is nothing


@dataclass(frozen=True)
class Timing:
    """Median and 20th and 80th percentile in seconds over `count` samples."""

    median: float
    p20: float
    p80: float
    count: int
    rounds: tuple[float, ...] = field(default=(), repr=False, compare=False)  # medians

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> "Timing":
        """Summarises samples in seconds, those of each round together."""
        samples = [sample for taken in rounds for sample in taken]
        return cls(*_quantiles(samples, 0.5, 0.2, 0.8), len(samples), tuple(map(median, rounds)))

    def numbers(self) -> dict[str, float]:
        """As results are stored."""
        return {key: getattr(self, key) for key in ("median", "p20", "p80", "count")}


@dataclass(frozen=True)
class Ratio:
    """How many times as long one callable took as another, and the band of that.

    The median over rounds, in which both ran side by side, and the 5th and 95th percentile:
    neighbours on a machine come and go more slowly than rounds, so that the median of another run
    may lie anywhere among the rounds of this one.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, longer: Timing, shorter: Timing) -> "Ratio":
        """Of two timings of one :func:`interleave`."""
        quotients = [a / b for a, b in zip(longer.rounds, shorter.rounds, strict=True)]
        return cls(*_quantiles(quotients, 0.5, 0.05, 0.95))


def _quantiles(values: Sequence[float], *of: float) -> list[float]:
    """With linear interpolation between neighbours."""
    of = torch.tensor(of, dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(of).tolist()


def repeat(call: Callable[[], object], times: int) -> None:
    """Calls `call` so many times."""
    for _ in range(times):
        call()


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """The step as a CUDA graph, which replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeat(step, GRAPH_WARMUP)  # what is allocated once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_owner=step) -> None:  # of the tensors that the graph works on
        graph.replay()

    return replay


def _in_a_row(call: Callable[[], object], seconds: Callable[[Callable], float]) -> int:
    """How many calls take _ROW or longer, a power of two; `seconds` times a callable."""
    times = 1
    while seconds(partial(repeat, call, times)) < _ROW:
        times *= 2
    return times


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int | None = None,
    seconds: float | None = None,
    least: int = 1,
    burst: int = 1,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Timing]:
    """Times callables in turn, the order rotated from round to round.

    A training loop repeats one step; in turn with five others it would find its code and its
    parameters gone from the caches every time. With a burst above one, each turn is one call that
    is not timed and then `burst` calls that are.

    Args:
        steps: name -> callable without arguments.
        rounds: number of timed rounds.
        seconds: instead of `rounds`: no new round starts after this time.
        least: rounds that there are anyhow, where there is a time limit.
        burst: timed calls a turn.
        warmup: rounds that run first and are not timed.
        device: where the callables work. On a CUDA device a call, above, is a row of calls, and the
            device is synchronised around it.
        progress: show the share done, see `progress.Line`.

    Returns:
        name -> Timing, in the order of `steps`.

    Raises:
        ValueError: when not exactly one of `rounds` and `seconds` is given, or one is not
            positive, or `burst` is below one, or `warmup` is negative.
    """
    if (rounds is None) == (seconds is None):
        raise ValueError("interleave: give either rounds or seconds")
    limit = seconds if rounds is None else rounds
    if not limit > 0:
        raise ValueError(f"interleave: rounds or seconds must be positive, got {limit}")
    if burst < 1:
        raise ValueError(f"interleave: burst must be at least 1, got {burst}")
    if warmup < 0:
        raise ValueError(f"interleave: warmup must not be negative, got {warmup}")

    on_cuda = torch.device(device).type == "cuda"
    synchronize = (lambda: torch.cuda.synchronize(device)) if on_cuda else (lambda: None)

    def timed(step: Callable[[], object]) -> float:
        synchronize()
        begin = perf_counter()
        step()
        synchronize()
        return perf_counter() - begin

    for _ in range(warmup):
        for step in steps.values():
            step()
    times = {name: _in_a_row(step, timed) if on_cuda else 1 for name, step in steps.items()}
    if on_cuda:
        steps = {name: partial(repeat, step, times[name]) for name, step in steps.items()}

    order = list(steps)
    samples: dict[str, list[list[float]]] = {name: [] for name in order}
    start = perf_counter()
    done, count = 0, 0
    with Line() as line:
        while done < limit or (seconds is not None and count < least):
            for name in order:
                if burst > 1:
                    steps[name]()
                samples[name].append([timed(steps[name]) / times[name] for _ in range(burst)])
            order.append(order.pop(0))
            count += 1
            done = count if seconds is None else perf_counter() - start
            if progress:
                line.show(bar("timing", done / limit))
    return {name: Timing.of(rounds) for name, rounds in samples.items()}
