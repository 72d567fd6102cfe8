"""Trains an LSTM to copy sequences, in windows far shorter than what it must remember.

    python examples/copy_task.py [--task copy|repeat] [--bptt 3] [--method bptt dni lambda]
        [--seeds 0] [--seconds 40] [--resume FOLDER]

An episode shows N symbols, then a delimiter, then the network must say them again (`repeat`: as
often as the delimiter tells). It is cut into windows of `--bptt` steps. `bptt` backpropagates
through one window at a time and so never learns what a window ago was good for; `dni` bootstraps
from a synthetic gradient at each window's end; `lambda` learns its synthesizer from the whole
episode (lambda-targets). N grows by one whenever the mean error of 10 episodes is below 0.15 bits
a symbol: the longest N so solved is the result, under the same budget of processor seconds.

Prints a table, and draws the length over time into a PNG. Rivals: `bptt4` (four times the window),
`horizon` (dni with the auxiliary task), `online` (BP(lambda) by eligibility traces), `onestep`
(one-step truncation with RMSprop).
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from arguments import OneLineParser, positive, whole
from torch import nn

import fastdni
from fastdni.bench import hardware, header, table
from fastdni.bench.progress import Line

try:
    import recurrent_plots
except ImportError as error:
    print(f"{error}: pip install fastdni[examples]", file=sys.stderr)
    sys.exit(2)

SYMBOLS = 2
BATCH, HIDDEN = 64, 32
SOLVED = 0.15  # bits a symbol
EPISODES = 10  # over which the error is averaged


@dataclass(frozen=True)
class Method:
    """A way to train, with the learning rates that go with it (Adam).

    Attributes:
        windows: what `--bptt` is multiplied by; 0: one step.
        how: arguments of `DecoupledRNN`; without any the synthesizer is frozen and sends nothing.
    """

    name: str
    lr: float = 3e-4
    synthesizer_lr: float = 1e-3
    windows: int = 1
    how: dict = field(default_factory=dict)
    optimizer: type = torch.optim.Adam


UNITS = {"target_scale": 10.0, "target_clip": 0.2, "factor": 0.5}
TRACE = {"target_scale": 10.0, "factor": 0.7, "discount": 0.7, "trace_lambda": 0.9}
METHODS = {
    "bptt": Method("BPTT"),
    "bptt4": Method("BPTT, 4 T", windows=4),
    "onestep": Method("one step, RMSprop", windows=0, optimizer=torch.optim.RMSprop),
    "dni": Method("DNI", how=UNITS),
    "horizon": Method("DNI + horizon", how=UNITS | {"horizon": 2}),
    "online": Method("BP(lambda), online", how=TRACE | {"trace_view": "online"}),
    "lambda": Method("DNI, lambda-targets", lr=1e-3, how=TRACE),
}


# ---- the task ----


def episode(task: str, length: int, repeats: int, generator: torch.Generator) -> tuple:
    """Inputs (L, B, K) and labels (L, B), -100 where nothing is asked."""
    symbols = torch.randint(SYMBOLS, (length, BATCH), generator=generator)
    answer = symbols.repeat(repeats, 1)
    steps = length + 1 + len(answer)
    x = torch.zeros(steps, BATCH, SYMBOLS + 1)
    x[:length, :, :SYMBOLS] = nn.functional.one_hot(symbols, SYMBOLS)
    x[length, :, SYMBOLS] = repeats if task == "repeat" else 1
    y = torch.full((steps, BATCH), -100)
    y[length + 1 :] = answer
    return x, y


def windows(steps: int, most: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Begins and ends. The first window's length is random, so that no step of the task always
    comes first in its window."""
    end = 1 + int(torch.randint(min(most, steps), (1,), generator=generator))
    found = [(0, end)]
    while end < steps:
        found.append((end, min(end + most, steps)))
        end = found[-1][1]
    return found


# ---- training ----


class Run:
    """One network in training, which can be saved and gone on with.

    Attributes:
        length, repeats: of the episodes now.
        solved: (processor seconds, windows, length in symbols to say), one a length.
    """

    def __init__(self, key: str, task: str, bptt: int, seed: int, lr: float | None = None):
        method = METHODS[key]
        self.method = method if lr is None else replace(method, lr=lr)
        self.task, self.seed = task, seed
        self.most = self.method.windows * bptt or 1
        torch.manual_seed(seed)
        lstm = nn.LSTM(SYMBOLS + 1, HIDDEN)
        with torch.no_grad():
            lstm.bias_ih_l0[HIDDEN : 2 * HIDDEN] += 1.0  # to remember, at first
        self.rnn = fastdni.DecoupledRNN(lstm, **({"factor": 0.0} | self.method.how))
        self.head = nn.Linear(HIDDEN, SYMBOLS)
        self.plain = not self.method.how
        if self.plain:
            self.rnn.synthesizer.requires_grad_(False)
        layers = [*self.rnn.rnn.parameters(), *self.head.parameters()]
        others = [*self.rnn.synthesizer.parameters(), *self.rnn.ahead.parameters()]
        groups = [{"params": layers, "lr": self.method.lr}]
        if not self.plain:
            groups.append({"params": others, "lr": self.method.synthesizer_lr})
        self.optimizer = self.method.optimizer(groups)
        self.generator = torch.Generator().manual_seed(seed)
        self.length = self.repeats = 1
        self.seconds, self.windows, self.errors = 0.0, 0, []
        self.solved: list[tuple[float, int, int]] = []

    def train_episode(self) -> None:
        """One episode; the next is longer if the last ten were solved."""
        begin = time.process_time()
        x, y = episode(self.task, self.length, self.repeats, self.generator)
        last = torch.ones(BATCH, dtype=torch.bool)
        nats, state = 0.0, None
        for first, end in windows(len(x), self.most, self.generator):
            asked = int((y[first:end, 0] >= 0).sum())
            done = last if end == len(x) and not self.plain else None
            if self.plain and not asked:  # nothing to learn from
                with torch.no_grad():
                    _, state = self.rnn(x[first:end], state)
                continue
            result = self.rnn.step(
                x[first:end],
                y[first:end] if asked else None,
                state,
                self.head,
                self.optimizer,
                done=done,
                loss_weight=float(asked),  # a sum over time
            )
            state = result.state
            self.windows += 1
            nats += float(result.loss)
        self.errors.append(nats / (self.length * self.repeats) / torch.tensor(2.0).log().item())
        self.seconds += time.process_time() - begin
        if len(self.errors) == EPISODES:
            if sum(self.errors) < SOLVED * EPISODES:
                self.solved.append((self.seconds, self.windows, self.length * self.repeats))
                longer = self.task == "copy" or self.length <= self.repeats
                self.length, self.repeats = self.length + longer, self.repeats + (not longer)
            self.errors = []

    @property
    def longest(self) -> int:
        """Symbols to say of the longest episodes that were solved."""
        return self.solved[-1][2] if self.solved else 0

    def state_dict(self) -> dict:
        """All that the run goes on from."""
        own = ("length", "repeats", "seconds", "windows", "errors", "solved")
        return {
            "rnn": self.rnn.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            **{name: getattr(self, name) for name in own},
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        for name in ("rnn", "head", "optimizer"):
            getattr(self, name).load_state_dict(state.pop(name))
        self.generator.set_state(state.pop("generator"))
        vars(self).update(state)


def train(run: Run, seconds: float, path: Path | None) -> None:
    """Trains until the budget is spent; saves now and then, and at the end."""
    if path is not None and path.exists():
        run.load_state_dict(torch.load(path, weights_only=True))
    label, saved = f"{run.method.name:20s} T {run.most:2d}, seed {run.seed}", run.seconds
    with Line(keep=True) as line:
        while run.seconds < seconds:
            run.train_episode()
            line.show(
                f"{label}  solved {run.longest:3d}  {run.seconds:5.0f} s  {run.windows} windows"
            )
            if path is not None and run.seconds - saved > 20:
                torch.save(run.state_dict(), path)
                saved = run.seconds
    if path is not None:
        torch.save(run.state_dict(), path)


# ---- results ----


def report(runs: dict[str, list[Run]]) -> str:
    """The table: one line a method."""
    rows = []
    for of_method in runs.values():
        longest = [run.longest for run in of_method]
        per_window = sum(r.seconds for r in of_method) / max(sum(r.windows for r in of_method), 1)
        first = [next((w for _, w, n in run.solved if n >= 6), None) for run in of_method]
        known = [w for w in first if w is not None]
        rows.append(
            [
                of_method[0].method.name,
                " ".join(map(str, longest)),
                f"{sum(longest) / len(longest):.2f}",
                f"{sum(known) / len(known):,.0f}" if len(known) == len(first) else "-",
                f"{1e6 * per_window:.0f}",
            ]
        )
    return table(rows, ["method", "solved, by seed", "mean", "windows to 6", "us a window"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the arguments; ends the program when one is bad."""
    parser = OneLineParser(prog="copy_task.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--task", choices=("copy", "repeat"), default="copy", help="what to learn (copy)")
    add("--bptt", type=whole(1), default=3, metavar="T", help="steps of a window (3)")
    add("--method", nargs="+", choices=METHODS, default=["bptt", "dni", "lambda"], metavar="M",
        help=f"of {', '.join(METHODS)} (bptt dni lambda)")  # fmt: skip
    add("--seeds", nargs="+", type=whole(0), default=[0], help="of weights and episodes (0)")
    add("--seconds", type=positive, default=40.0, help="processor seconds of each run (40)")
    add("--lr", type=positive, help="of the layers, for all methods instead of each one's own")
    add("--resume", type=Path, metavar="FOLDER", help="save runs here, and go on with those in it")
    add("--out", type=Path, default=Path("out/copy_task.png"), help="where the PNG goes")
    add("--json", type=Path, metavar="FILE", help="also write the lengths over time here")
    options = parser.parse_args(arguments)
    for path in filter(None, (options.out.parent, options.resume, options.json and
                              options.json.parent)):  # fmt: skip
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot make a folder: {error}")
    if options.out.suffix != ".png" or options.out.is_dir():
        parser.error(f"argument --out: must name a .png file, got {options.out}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)  # a window is too small for two
    subject = (
        f"{options.task} task, windows of {options.bptt} steps, LSTM {HIDDEN}, batch {BATCH}, "
        f"{options.seconds:g} processor seconds a run"
    )
    title = f"{subject}\n{header(hardware())}"
    print(title, flush=True)
    runs: dict[str, list[Run]] = {}
    for key in dict.fromkeys(options.method):
        runs[key] = []
        for seed in options.seeds:
            run = Run(key, options.task, options.bptt, seed, options.lr)
            rate = "" if options.lr is None else f"-{options.lr:g}"
            name = f"{options.task}-{options.bptt}-{key}-{seed}{rate}.pt"
            train(run, options.seconds, options.resume and options.resume / name)
            runs[key].append(run)
    print("\n" + report(runs))
    recurrent_plots.draw_lengths(
        {of[0].method.name: [run.solved for run in of] for of in runs.values()},
        options.seconds, title, options.out,
    )  # fmt: skip
    if options.json:
        found = {key: {str(run.seed): run.solved for run in of} for key, of in runs.items()}
        options.json.write_text(json.dumps({"title": title, "solved": found}, indent=1))
    print(f"\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
