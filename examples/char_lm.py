"""Trains a character model on any text file, in short windows, with and without DNI.

    python examples/char_lm.py TEXT [--bptt 4] [--method bptt bptt2 bptt5 dni lambda]
        [--windows 20000] [--seconds S] [--seeds 0] [--resume FOLDER] [--sample 400]

The text is read in `--batch` streams side by side, whose states are carried from window to window.
The last tenth is the test, read once, at the end of a run; the twentieth before it tells how a run
is doing. `bptt2` and `bptt5` backpropagate through windows 2 and 5 times as long, over the same
text. A synthesizer first learns with nothing sent. Prints bits per character and how much of its
target the synthesizer does not explain (1: as much as zero would), lets each model write, and draws
the curves into a PNG.

A calibrated model's expected future gradient is about zero, so that there is little for a
synthesizer to learn here: see the copy task for where it pays.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import OneLineParser, positive, whole
from torch import Tensor, nn
from torch.nn import functional as F

import fastdni
from fastdni.bench import hardware, header, table
from fastdni.bench.progress import Line, bar

try:
    import recurrent_plots
except ImportError as error:
    print(f"{error}: pip install fastdni[examples]", file=sys.stderr)
    sys.exit(2)

LR = 2e-3
WARM_UP = 0.3  # of a run, in which synthesizers learn and send nothing
CHECKS = 20  # looks at the validation text in a run


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        windows: what `--bptt` is multiplied by.
        how: arguments of DecoupledRNN; without any the synthesizer is frozen and sends nothing.
    """

    name: str
    windows: int = 1
    synthesizer_lr: float = 1e-3
    how: dict = field(default_factory=dict)


TRACE = {"discount": 0.7, "trace_lambda": 0.9, "trace_windows": 8}
METHODS = {
    "bptt": Method("BPTT"),
    "bptt2": Method("BPTT, 2 T", windows=2),
    "bptt5": Method("BPTT, 5 T", windows=5),
    "dni": Method("DNI", how={"factor": 0.1, "target_scale": 10.0}),
    "lambda": Method(
        "DNI, lambda-targets", synthesizer_lr=1e-4,
        how={"factor": 0.1, "target_scale": 10.0} | TRACE,
    ),
}  # fmt: skip


class Text:
    """A file's characters as numbers, in three parts.

    Attributes:
        alphabet: its characters; `train`, `valid`, `test`: numbers.
    """

    def __init__(self, path: Path):
        text = path.read_text(encoding="utf-8", errors="replace")
        self.alphabet = sorted(set(text))
        known = {character: number for number, character in enumerate(self.alphabet)}
        numbers = torch.tensor([known[character] for character in text])
        first, second = int(len(numbers) * 0.85), int(len(numbers) * 0.9)
        self.train, self.valid, self.test = numbers.tensor_split((first, second))


def streams(numbers: Tensor, batch: int) -> Tensor:
    """(L, B): as many rows one beside the other, each a stretch of the text."""
    length = len(numbers) // batch
    return numbers[: length * batch].view(batch, length).t().contiguous()


class Run:
    """One model in training, which can be saved and gone on with.

    Attributes:
        curve: (processor seconds, windows, bits on the validation text).
        unexplained: relative synthesis losses, means between looks; `seen`: since the last look.
    """

    def __init__(self, key: str, text: Text, seed: int, options: argparse.Namespace):
        self.method, self.text, self.options, self.seed = METHODS[key], text, options, seed
        self.steps = self.method.windows * options.bptt
        torch.manual_seed(seed)
        size = len(text.alphabet)
        how = self.method.how | {"factor": 0.0}
        self.rnn = fastdni.DecoupledRNN(nn.LSTM(size, options.hidden), **how)
        self.head = nn.Linear(options.hidden, size)
        layers = [*self.rnn.rnn.parameters(), *self.head.parameters()]
        groups = [{"params": layers, "lr": LR}]
        if self.method.how:
            own = [*self.rnn.synthesizer.parameters()]
            groups.append({"params": own, "lr": self.method.synthesizer_lr})
        else:
            self.rnn.synthesizer.requires_grad_(False)
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in groups]
        self.streams, self.eye = streams(text.train, options.batch), torch.eye(size)
        self.state, self.place, self.windows, self.seconds = None, 0, 0, 0.0
        self.curve: list[tuple[float, int, float]] = []
        self.unexplained: list[float] = []
        self.seen: list[float] = []

    def share(self) -> float:
        """How much of the run is done."""
        if self.options.seconds:
            return self.seconds / self.options.seconds
        return self.windows * self.method.windows / self.options.windows

    def train_window(self) -> fastdni.RecurrentResult:
        """The next window of all streams."""
        begin = time.process_time()
        if self.share() >= WARM_UP:
            self.rnn.factor = self.method.how.get("factor", 0.0)
        end = self.place + self.steps
        if end + 1 > len(self.streams):
            self.state, self.place, end = None, 0, self.steps
        decay = max((1 + math.cos(math.pi * min(self.share(), 1.0))) / 2, 0.02)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * decay
        result = self.rnn.step(
            self.eye[self.streams[self.place : end]],
            self.streams[self.place + 1 : end + 1],
            self.state,
            self.head,
            self.optimizer,
        )
        self.state, self.place = result.state, end
        self.windows += 1
        self.seconds += time.process_time() - begin
        return result

    @torch.no_grad()
    def bits(self, numbers: Tensor) -> float:
        """Per character of a part of the text."""
        rows, state, nats = streams(numbers, 50), None, 0.0
        self.rnn.eval()
        for first in range(0, len(rows) - 1, 100):
            part = rows[first : first + 101]
            output, state = self.rnn(self.eye[part[:-1]], state)
            wanted = part[1:].flatten()
            nats += F.cross_entropy(self.head(output).flatten(0, 1), wanted, reduction="sum").item()
        self.rnn.train()
        return nats / (rows[1:].numel()) / math.log(2)

    @torch.no_grad()
    def write(self, length: int) -> str:
        """Text of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        number, state, written = torch.zeros(1, dtype=torch.long), None, []
        self.rnn.eval()
        for _ in range(length):
            output, state = self.rnn(self.eye[number][None], state)
            odds = self.head(output[0, 0]).softmax(0)
            number = torch.multinomial(odds, 1, generator=generator)
            written.append(self.text.alphabet[number])
        self.rnn.train()
        return "".join(written)

    def state_dict(self) -> dict:
        """All that the run goes on from."""
        own = ("state", "place", "windows", "seconds", "curve", "unexplained", "seen")
        parts = {name: getattr(self, name).state_dict() for name in ("rnn", "head", "optimizer")}
        carried = self.rnn.carried(self.state) if self.state else {}
        return parts | {"carried": carried} | {name: getattr(self, name) for name in own}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""
        for name in ("rnn", "head", "optimizer"):
            getattr(self, name).load_state_dict(state.pop(name))
        carried = state.pop("carried")
        vars(self).update(state)
        if self.state is not None:
            self.rnn.resume(self.state, carried)


def train(run: Run, path: Path | None) -> None:
    """Trains to the end of the budget; saves at every look."""
    if path is not None and path.exists():
        run.load_state_dict(torch.load(path, weights_only=True))
    label = f"{run.method.name:20s} T {run.steps:2d}, seed {run.seed}"
    with Line(keep=True) as line:
        while run.share() < 1:
            result = run.train_window()
            if math.isfinite(result.relative_synthesis_loss):
                run.seen.append(float(result.relative_synthesis_loss))
            if run.share() * CHECKS < len(run.curve) + 1 and run.share() < 1:
                continue
            run.curve.append((run.seconds, run.windows, run.bits(run.text.valid)))
            if run.seen:
                run.unexplained.append(sum(run.seen) / len(run.seen))
                run.seen = []
            note = f"{run.curve[-1][2]:.3f} bits, {run.seconds:.0f} s"
            line.show(bar(label, run.share(), note))
            if path is not None:
                torch.save(run.state_dict(), path)


def report(runs: dict[str, list[Run]]) -> tuple[str, dict]:
    """The table: one line a method; and the numbers."""
    rows, found = [], {}
    for key, of_method in runs.items():
        bits = [run.bits(run.text.test) for run in of_method]
        known = [u for run in of_method for u in run.unexplained[1:]]
        windows = sum(run.windows for run in of_method)
        seconds = sum(run.seconds for run in of_method)
        rows.append(
            [
                of_method[0].method.name,
                f"{sum(bits) / len(bits):.3f}",
                " ".join(f"{b:.3f}" for b in bits),
                f"{sum(known) / len(known):.4f}" if known else "-",
                f"{windows // len(of_method):,}",
                f"{1e6 * seconds / windows:.0f}",
            ]
        )
        curves, unexplained = zip(*((run.curve, run.unexplained) for run in of_method), strict=True)
        found[key] = {"test bits": bits, "curves": curves, "unexplained": unexplained}
    headers = ["method", "test bits", "by seed", "unexplained", "windows", "us a window"]
    return table(rows, headers), found


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Text]:
    """Reads the arguments and the text; ends the program when either is bad."""
    parser = OneLineParser(prog="char_lm.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("text", type=Path, help="a text file")
    add("--bptt", type=whole(1), default=4, metavar="T", help="steps of a window (4)")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="what to train (all)")
    add("--windows", type=whole(1), default=20000, help="of T steps that each run sees (20000)")
    add("--seconds", type=positive, help="processor seconds of each run, instead of windows")
    add("--hidden", type=whole(1), default=128, help="units of the LSTM (128)")
    add("--batch", type=whole(1), default=64, help="streams (64)")
    add("--seeds", nargs="+", type=whole(0), default=[0], help="of the weights (0)")
    add("--sample", type=whole(0), default=300, help="characters that each model writes (300)")
    add("--resume", type=Path, metavar="FOLDER", help="save runs here, and go on with those in it")
    add("--out", type=Path, default=Path("out/char_lm.png"), help="where the PNG goes")
    add("--json", type=Path, metavar="FILE", help="also write the curves here")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".png" or options.out.is_dir():
        parser.error(f"argument --out: must name a .png file, got {options.out}")
    for path in filter(None, (options.out.parent, options.resume,
                              options.json and options.json.parent)):  # fmt: skip
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot make a folder: {error}")
    try:
        text = Text(options.text)
    except OSError as error:
        parser.error(f"cannot read {options.text}: {error.strerror}")
    longest = max(METHODS[key].windows for key in options.method)
    least = 20 * options.batch * (options.bptt * longest + 1)
    if len(text.train) < least:
        parser.error(f"{options.text} must have {2 * least} characters for such windows")
    return options, text


def main(arguments: list[str] | None = None) -> int:
    options, text = parse(arguments)
    torch.set_num_threads(1)
    budget = f"{options.seconds:g} processor seconds" if options.seconds else (
        f"{options.windows:,} windows")  # fmt: skip
    subject = (
        f"{options.text.name}, {len(text.alphabet)} characters, windows of {options.bptt}, LSTM "
        f"{options.hidden}, batch {options.batch}, {budget} a run"
    )
    title = f"{subject}\n{header(hardware())}"
    print(title, flush=True)
    runs: dict[str, list[Run]] = {}
    for key in dict.fromkeys(options.method):
        runs[key] = []
        for seed in options.seeds:
            run = Run(key, text, seed, options)
            train(run, options.resume and options.resume / f"{key}-{options.bptt}-{seed}.pt")
            runs[key].append(run)
    shown, found = report(runs)
    print("\n" + shown)
    for of_method in runs.values():
        if options.sample:
            print(f"\n{of_method[0].method.name} writes:\n{of_method[0].write(options.sample)}")
    recurrent_plots.draw_bits(
        {of[0].method.name: [run.curve for run in of] for of in runs.values()}, title, options.out
    )
    if options.json:
        options.json.write_text(json.dumps({"title": title} | found, indent=1))
    print(f"\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
