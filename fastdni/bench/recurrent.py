"""A decoupled window of an LSTM, in fastdni and in eager PyTorch, beside a plain one.

Each form trains LSTM, head and (but for the plain one) a linear synthesizer of the joined state,
with Adam, on the same window over and over, its state carried on:

    step       DecoupledRNN.step
    eager      the same window by hand: autograd, torch.optim.Adam(fused=True)
    plain      truncated backpropagation through time alone, the same optimizer

The two decoupled ones are compared before anything is timed.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fastdni.bench.report import microseconds, table
from fastdni.bench.timing import BURST, Ratio, Timing, interleave
from fastdni.recurrent import DecoupledRNN

FORMS = ("step", "eager", "plain")
FACTOR, RATE = 0.5, 1e-3
_AGREE = 1e-4  # of parameters after windows in float32


class Window(NamedTuple):
    """A case: sizes of the LSTM's input and state and of the head, rows and steps of a window."""

    inputs: int
    hidden: int
    outputs: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return (
            f"LSTM {self.inputs}-{self.hidden}, head {self.outputs}, batch {self.batch}, "
            f"windows of {self.steps}"
        )


# A small one, where calls are what it costs, and a large one, where products are.
CASES = (Window(3, 32, 2, 64, 3), Window(512, 512, 512, 128, 4))


class _Problem:
    """Modules and data of a case."""

    def __init__(self, case: Window):
        torch.manual_seed(0)
        self.lstm = nn.LSTM(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)
        self.rnn = DecoupledRNN(self.lstm, factor=FACTOR, first="train")
        self.x = torch.randn(case.steps, case.batch, case.inputs)
        self.y = torch.randint(case.outputs, (case.steps, case.batch))
        self.state = tuple(0.1 * torch.randn(1, case.batch, case.hidden) for _ in range(2))

    def parameters(self) -> list[nn.Parameter]:
        return [*self.rnn.parameters(), *self.head.parameters()]


def _step(problem: _Problem) -> Callable[[], object]:
    optimizer = torch.optim.Adam(problem.parameters(), RATE)
    now = [problem.state]

    def window() -> None:
        now[0] = problem.rnn.step(problem.x, problem.y, now[0], problem.head, optimizer).state

    return window


def _eager(problem: _Problem, decoupled: bool = True) -> Callable[[], object]:
    lstm, head, synthesizer = problem.lstm, problem.head, problem.rnn.synthesizer
    chosen = problem.parameters() if decoupled else [*lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(chosen, RATE, fused=True)
    now, batch = [problem.state], problem.x.shape[1]

    def window() -> None:
        h, c = (s.detach().requires_grad_(decoupled) for s in now[0])
        output, (after_h, after_c) = lstm(problem.x, (h, c))
        loss = F.cross_entropy(head(output).flatten(0, 1), problem.y.flatten())
        if decoupled:
            with torch.no_grad():
                sent = synthesizer(torch.cat((after_h[0], after_c[0]), 1)) * (FACTOR / batch)
            sent_h, sent_c = (s.unsqueeze(0) for s in sent.chunk(2, 1))
            torch.autograd.backward([loss, after_h, after_c], [None, sent_h, sent_c])
            target = torch.cat((h.grad[0], c.grad[0]), 1) * batch
            said = synthesizer(torch.cat((h.detach()[0], c.detach()[0]), 1))
            ((said - target).square().sum() / batch).backward()
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        now[0] = after_h, after_c

    return window


def _check(case: Window) -> None:
    """Raises ArithmeticError where the decoupled forms are not the same."""
    one = _Problem(case)
    two = copy.deepcopy(one)
    two.lstm = two.rnn.rnn
    for window in (_step(one), _eager(two)):
        for _ in range(3):
            window()
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        off = (ours - theirs).abs().max().item()
        # A gradient near zero may have Adam's first steps go either way: few elements.
        wrong = ((ours - theirs).abs() > _AGREE).float().mean().item()
        if off > 4 * RATE or wrong > 0.01:
            raise ArithmeticError(f"{case}: parameters differ by {off:.1e} after three windows")


def measure(case: Window, progress: bool = False, **limits) -> dict[str, Timing]:
    """Times the forms of a case in turn; `limits` as those of `interleave`.

    Raises:
        ArithmeticError: the decoupled forms are not the same.
    """
    _check(case)
    steps = {
        "step": _step(_Problem(case)),
        "eager": _eager(_Problem(case)),
        "plain": _eager(_Problem(case), decoupled=False),
    }
    return interleave(steps, burst=BURST, progress=progress, **limits)


def report(found: dict[str, Timing], markdown: bool = False) -> str:
    """The table: a line a form."""
    rows = []
    for name, timing in found.items():
        ratio = Ratio.of(timing, found["step"])
        over = Ratio.of(timing, found["plain"])
        rows.append(
            [
                name,
                f"{microseconds(timing.median)} [{microseconds(timing.p20)} to "
                f"{microseconds(timing.p80)}]",
                ""
                if name == "step"
                else f"{ratio.value:.2f} [{ratio.low:.2f} to {ratio.high:.2f}]",
                "" if name == "plain" else f"{over.value:.2f}",
            ]
        )
    return table(rows, ["window", "us", "time / step's", "time / plain's"], markdown)


def run(markdown: bool, limits: dict) -> list[dict]:
    """Measures and prints every case; what is stored of it."""
    stored = []
    for case in CASES:
        print(case, flush=True)
        found = measure(case, progress=True, **limits)
        print(report(found, markdown) + "\n", flush=True)
        stored.append(
            {"case": case._asdict(), "seconds": {n: t.numbers() for n, t in found.items()}}
        )
    return stored
