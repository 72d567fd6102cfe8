"""Trains a fully connected network on handwritten digits with and without synthetic gradients.

    python examples/mnist_fcn.py [--methods backprop dni cdni] [--layers 3] [--data-dir MNIST]

The paper's network (Jaderberg et al. 2016, arXiv 1608.05343, section 3.1): `--layers` counts the
output layer, so 3 layers are two hidden ones of Linear, BatchNorm, ReLU and a Linear output.
`backprop` trains it as usual. `dni` puts an interface after each hidden layer, which then trains
on the synthetic gradient of a linear synthesizer; in `cdni` the synthesizers also see the labels.
All learning rates fall linearly to zero.

Prints a table of test errors and step times, the latter beside the same method in plain PyTorch,
and draws both into a PNG. Without `--data-dir` (or the environment variable FASTDNI_DATA) the
data are scikit-learn's 8x8 digits.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdni as dni
from fastdni import bench
from fastdni.reference.interfaces import EagerBackwardInterface, EagerSynthesizer

try:
    import matplotlib
    import sklearn  # noqa: F401  (digits needs it)
    from tqdm import tqdm

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    print(f"{error}: pip install fastdni[examples]", file=sys.stderr)
    sys.exit(2)

METHODS = {"backprop": "backprop", "dni": "DNI", "cdni": "cDNI (labels)"}
CLASSES = 10


class Network(nn.Module):
    """Hidden layers, each followed by what `make_interface` returns, and a linear output."""

    def __init__(
        self, inputs: int, width: int, layers: int, make_interface: Callable[[], nn.Module]
    ):
        super().__init__()
        sizes = [inputs] + [width] * (layers - 1)
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(below, above, bias=False), nn.BatchNorm1d(above), nn.ReLU())
            for below, above in zip(sizes, sizes[1:], strict=False)
        )
        self.output = nn.Linear(width, CLASSES)
        self.interfaces = nn.ModuleList(make_interface() for _ in self.hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with dni.synthesizer_context(context):
            for hidden, interface in zip(self.hidden, self.interfaces, strict=True):
                x = interface(hidden(x))
        return self.output(x)


class PlainNetwork(Network):
    """The same with the interfaces of `fastdni.reference`, which take the context directly."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for hidden, interface in zip(self.hidden, self.interfaces, strict=True):
            x = interface(hidden(x), context)
        return self.output(x)


def make_network(method: str, inputs: int, options: argparse.Namespace, plain=False) -> Network:
    """A network for one method, with fastdni's interfaces or those in plain PyTorch."""
    interface = EagerBackwardInterface if plain else dni.BackwardInterface
    synthesizer = EagerSynthesizer if plain else dni.BasicSynthesizer

    def make_interface() -> nn.Module:
        if method == "backprop":
            return nn.Identity()
        module = synthesizer(options.width, context_dim=CLASSES if method == "cdni" else None)
        # As in the paper, training starts with synthetic gradients of zero.
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        return interface(module)

    torch.manual_seed(options.seed)
    kind = PlainNetwork if plain else Network
    return kind(inputs, options.width, options.layers, make_interface)


def make_optimizer(
    method: str, network: Network, options: argparse.Namespace
) -> torch.optim.Optimizer:
    """Adam with a lower learning rate for the synthesizers than for the layers."""
    groups = [{"params": [*network.hidden.parameters(), *network.output.parameters()]}]
    if method != "backprop":
        groups.append({"params": network.interfaces.parameters(), "lr": options.synthesizer_lr})
    return torch.optim.Adam(groups, lr=options.lr)


def train_step(
    method: str, network: Network, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """One training step on a batch."""
    optimizer.zero_grad()
    context = F.one_hot(y, CLASSES).float() if method == "cdni" else None
    F.cross_entropy(network(x, context), y).backward()
    optimizer.step()


def train(method: str, data: digits.Digits, options: argparse.Namespace) -> list[float]:
    """Trains with one method; returns the test error in per cent after each epoch."""
    network = make_network(method, data.train_x.shape[1], options)
    optimizer = make_optimizer(method, network, options)
    shuffle = torch.Generator().manual_seed(options.seed)
    batches = len(data.train_x) // options.batch_size
    steps = options.epochs * batches
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    errors = []
    with tqdm(total=steps, desc=METHODS[method], unit="step") as bar:
        for _ in range(options.epochs):
            network.train()
            order = torch.randperm(len(data.train_x), generator=shuffle)
            for batch in order.split(options.batch_size)[:batches]:
                train_step(method, network, optimizer, data.train_x[batch], data.train_y[batch])
                decay.step()
                bar.update()
            network.eval()
            with torch.no_grad():
                wrong = network(data.test_x).argmax(1) != data.test_y
            errors.append(100 * wrong.float().mean().item())
            bar.set_postfix_str(f"test error {errors[-1]:.2f} %")
    return errors


def time_steps(data: digits.Digits, options: argparse.Namespace) -> dict[str, bench.Timing]:
    """Step times of every method, and as `plain <method>` of its plain-PyTorch form, in turn."""
    x, y = data.train_x[: options.batch_size], data.train_y[: options.batch_size]
    steps = {}
    for method in options.methods:
        for plain in (False, True):
            if not (plain and method == "backprop"):
                network = make_network(method, x.shape[1], options, plain)
                optimizer = make_optimizer(method, network, options)
                name = f"plain {method}" if plain else method
                steps[name] = partial(train_step, method, network, optimizer, x, y)
    return bench.interleave(
        steps, seconds=options.bench_seconds, burst=bench.BURST, warmup=10, progress=True
    )


def report(errors: dict[str, list[float]], timings: dict[str, bench.Timing]) -> str:
    """The table: one line a method."""
    rows = []
    for method, curve in errors.items():
        own, plain = timings[method].median, timings.get(f"plain {method}")
        against = ["-", "-"]
        if plain:
            against = [f"{1e3 * plain.median:.2f}", f"{plain.median / own:.2f}x"]
        rows.append([METHODS[method], f"{curve[-1]:.2f}", f"{1e3 * own:.2f}", *against])
    return bench.table(rows, ["method", "test error %", "ms/step", "plain PyTorch ms", "speed"])


def draw(
    errors: dict[str, list[float]], timings: dict[str, bench.Timing], title: str, path: Path
) -> None:
    """Test-error curves and step times, side by side, into a PNG."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    colours = {method: f"C{i}" for i, method in enumerate(METHODS)}
    for method, curve in errors.items():
        epochs = range(1, len(curve) + 1)
        label = f"{METHODS[method]}: {curve[-1]:.2f} %"
        curves.plot(
            epochs,
            curve,
            label=label,
            color=colours[method],
            marker="." if len(curve) == 1 else None,
        )
    curves.set(xlabel="epoch", ylabel="test error (%)", title="Test error", yscale="log")
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_formatter("{x:g}")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.grid(alpha=0.3, which="both")
    curves.legend()

    names, middle, spread, shades = [], [], [], []
    for name, timing in timings.items():
        method = name.removeprefix("plain ")
        library = "plain PyTorch" if name != method else "fastdni"
        names.append(METHODS[method] + ("" if method == "backprop" else f"\n{library}"))
        middle.append(1e3 * timing.median)
        spread.append((1e3 * (timing.median - timing.p20), 1e3 * (timing.p80 - timing.median)))
        shades.append((colours[method], 0.4 if name != method else 1.0))
    drawn = bars.barh(names, middle, xerr=list(zip(*spread, strict=True)), color=shades, capsize=3)
    bars.bar_label(drawn, labels=[f"{value:.2f} ms" for value in middle], padding=6)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(xlabel="milliseconds per training step", title="Step time (median, 20-80 %)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage text."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole(minimum: int) -> Callable[[str], int]:
    """Argument type: an integer that is at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        # The upper bound is torch's: sizes and seeds are 64-bit integers.
        if not minimum <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """Argument type: a finite number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")
    return value


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, digits.Digits]:
    """Reads the arguments and the data they name; ends the program when either is bad."""
    parser = OneLineParser(prog="mnist_fcn.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare")
    add("--layers", type=whole(2), default=3, help="layers, the output layer included (3)")
    add("--width", type=whole(1), default=256, help="units in a hidden layer (256)")
    add("--batch-size", type=whole(2), help="256 on MNIST, 64 on the 8x8 digits")
    add("--epochs", type=whole(1), help="5 on MNIST, 100 on the 8x8 digits")
    add("--seed", type=whole(0), default=0, help="of parameters and shuffling (0)")
    add("--lr", type=positive, default=1e-3, help="Adam's rate for the layers (1e-3)")
    add("--synthesizer-lr", type=positive, help="and for the synthesizers (a tenth of --lr)")
    add("--bench-seconds", type=positive, default=15.0, help="time spent on step times (15)")
    add("--data-dir", default=os.environ.get("FASTDNI_DATA") or None, help="folder with MNIST")
    add("--out", type=Path, default=Path("out/mnist_fcn.png"), help="where the PNG goes")
    options = parser.parse_args(arguments)

    options.methods = list(dict.fromkeys(options.methods))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    if options.out.suffix != ".png" or options.out.is_dir():
        parser.error(f"argument --out: must name a .png file, got {options.out}")
    try:
        data = digits.load(options.data_dir)
    except digits.DataError as error:
        parser.error(f"--data-dir / FASTDNI_DATA: {error}")
    small = options.data_dir is None
    options.batch_size = options.batch_size or (64 if small else 256)
    options.epochs = options.epochs or (100 if small else 5)
    options.synthesizer_lr = options.synthesizer_lr or options.lr / 10
    if options.batch_size > len(data.train_x):
        parser.error(f"argument --batch-size: must be <= {len(data.train_x)}, the training images")
    return options, data


def main(arguments: list[str] | None = None) -> int:
    options, data = parse(arguments)
    subject = (
        f"{data.name}, {len(data.train_x)} training and {len(data.test_x)} test images; "
        f"{options.layers} layers of width {options.width}, batch {options.batch_size}"
    )
    machine = bench.header(bench.hardware())
    print(f"{subject}\n{machine}", flush=True)
    errors = {method: train(method, data, options) for method in options.methods}
    timings = time_steps(data, options)
    print("\n" + report(errors, timings))
    draw(errors, timings, f"{subject}\n{machine}", options.out)
    print(f"\n{options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
