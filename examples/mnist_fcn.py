"""Trains a fully connected network on handwritten digits with and without synthetic gradients.

    python examples/mnist_fcn.py [--method backprop dni cdni unlocked] [--layers 3] [--seed 0]
    python examples/mnist_fcn.py --table [--seeds 0 1 2] --data-dir MNIST

The paper's network (Jaderberg et al. 2016, arXiv 1608.05343, section 3.1): `--layers` counts the
output layer, so 3 layers are two hidden ones of Linear, BatchNorm, ReLU and a Linear output.
`backprop` trains it as usual. In `dni` each hidden layer trains on the synthetic gradient that a
small network predicts from its output; in `cdni` the synthesizers also see the labels, and are
linear; `unlocked` predicts each layer's input as well, from the image, so that no layer waits for
another.

Prints a table of test errors and step times, the latter beside the same method through the drop-in
modules and in plain PyTorch, and draws both into a PNG. `--table` trains every method with 3, 4, 5
and 6 layers and prints the test errors beside the paper's. Without `--data-dir` (or the environment
variable FASTDNI_DATA) the data are scikit-learn's 8x8 digits.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import digits
import torch
from arguments import OneLineParser, positive, probability, whole
from methods import RECIPES, interface_step, make_network, make_optimizer, masks, train_step

from fastdni import bench
from fastdni.bench.progress import Line, bar

try:
    import plots
    import sklearn  # noqa: F401  (digits needs it)
except ImportError as error:
    print(f"{error}: pip install fastdni[examples]", file=sys.stderr)
    sys.exit(2)

# Test error in per cent (paper, table of the feed-forward experiments): layers -> method.
PAPER = {
    3: {"backprop": 2.0, "dni": 1.9, "cdni": 2.2},
    4: {"backprop": 1.8, "dni": 2.2, "cdni": 1.9},
    5: {"backprop": 1.8, "dni": 3.4, "cdni": 1.7},
    6: {"backprop": 1.8, "dni": 4.3, "cdni": 1.6},
}


def train(
    method: str, layers: int, seed: int, data: digits.Digits, options: argparse.Namespace
) -> list[float]:
    """Trains with one method; returns the test error in per cent after each epoch."""
    network = make_network(method, data.train_x.shape[1], options.width, layers, seed)
    optimizer = make_optimizer(method, network, options.lr)
    shuffle = torch.Generator().manual_seed(seed)
    batches = len(data.train_x) // options.batch_size
    steps = options.epochs * batches
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    chosen = masks(layers, 1.0 if method == "backprop" else options.update_probability, seed)
    errors = []
    width = max(len(recipe.name) for recipe in RECIPES.values())
    label = f"{RECIPES[method].name:{width}s}  {layers} layers, seed {seed}"
    begin = time.monotonic()
    with Line(keep=True) as line:
        line.show(bar(label, 0))
        for epoch in range(1, options.epochs + 1):
            network.train()
            order = torch.randperm(len(data.train_x), generator=shuffle)
            for batch in order.split(options.batch_size)[:batches]:
                x, y = data.train_x[batch], data.train_y[batch]
                train_step(network, optimizer, x, y, next(chosen))
                decay.step()
            network.eval()
            with torch.no_grad():
                wrong = network(data.test_x).argmax(1) != data.test_y
            errors.append(100 * wrong.float().mean().item())
            note = f"test error {errors[-1]:.2f} %, {time.monotonic() - begin:.0f} s"
            line.show(bar(label, epoch / options.epochs, note))
    return errors


# ---- one depth: errors and step times ----


def time_steps(data: digits.Digits, options: argparse.Namespace) -> dict[str, bench.Timing]:
    """Step times, in turn: each method's `net.step` (or plain training for backprop) under its own
    name, and as `drop-in <method>` and `plain <method>` the same through interfaces."""
    x, y = data.train_x[: options.batch_size], data.train_y[: options.batch_size]
    shape = (x.shape[1], options.width, options.layers)
    steps: dict[str, Callable[[], None]] = {}
    for method in options.method:
        network = make_network(method, *shape, seed=0)
        steps[method] = partial(train_step, network, make_optimizer(method, network), x, y)
        if method in ("dni", "cdni"):
            for kind in ("drop-in", "plain"):
                steps[f"{kind} {method}"] = interface_step(method, *shape, x, y, kind == "plain")
    return bench.interleave(
        steps, seconds=options.bench_seconds, burst=bench.BURST, warmup=10, progress=True
    )


def report(errors: dict[str, list[float]], timings: dict[str, bench.Timing]) -> str:
    """The table: one line a method."""
    rows = []
    for method, curve in errors.items():
        own = timings[method].median
        others = [timings.get(f"{kind} {method}") for kind in ("drop-in", "plain")]
        times = [f"{1e3 * other.median:.3f}" if other else "-" for other in others]
        speed = f"{others[1].median / own:.2f}x" if others[1] else "-"
        cells = [RECIPES[method].name, f"{curve[-1]:.2f}", f"{1e3 * own:.3f}"]
        rows.append([*cells, *times, speed])
    headers = ["method", "test error %", "net.step ms", "drop-in ms", "plain PyTorch ms", "speed"]
    return bench.table(rows, headers)


def compare(data: digits.Digits, options: argparse.Namespace, title: str) -> None:
    """Trains each method at one depth, times its step, prints and draws both."""
    errors = {m: train(m, options.layers, options.seeds[0], data, options) for m in options.method}
    timings = time_steps(data, options)
    print("\n" + report(errors, timings))
    print("speed: of net.step against plain PyTorch (backprop: an ordinary training step)")
    plots.draw(errors, timings, title, options.out)
    save(options, title, {m: {str(options.seeds[0]): curve} for m, curve in errors.items()})


# ---- every depth: the paper's table ----


def table(data: digits.Digits, options: argparse.Namespace, title: str) -> None:
    """Trains every method at every depth and prints the errors beside the paper's."""
    curves: dict[int, dict[str, dict[str, list[float]]]] = {}
    for layers in options.table_layers:
        curves[layers] = {
            method: {str(s): train(method, layers, s, data, options) for s in options.seeds}
            for method in options.method
        }
    # The paper's table is of layers that are updated in every step.
    known = PAPER if options.update_probability == 1 else {}
    rows = []
    for layers, of_layers in curves.items():
        for method, of_method in of_layers.items():
            last = [curve[-1] for curve in of_method.values()]
            paper = known.get(layers, {}).get(method)
            rows.append(
                [
                    f"{layers} layers, {RECIPES[method].name}",
                    f"{sum(last) / len(last):.2f}",
                    f"{max(last):.2f}",
                    "-" if paper is None else f"{paper:.1f}",
                    ", ".join(f"{error:.2f}" for error in last),
                ]
            )
    seeds = ", ".join(map(str, options.seeds))
    print("\n" + bench.table(rows, ["test error %", "mean", "worst", "paper", f"seeds {seeds}"]))
    plots.draw_table(curves, known, title, options.out)
    save(options, title, {str(layers): found for layers, found in curves.items()})


def save(options: argparse.Namespace, title: str, curves: dict) -> None:
    """Writes the curves, if asked to."""
    if options.json:
        settings = {
            name: value
            for name, value in vars(options).items()
            if name not in ("out", "json", "data_dir")
        }
        found = {"title": title, "settings": settings, "test error %": curves}
        options.json.write_text(json.dumps(found, indent=1))


# ---- arguments ----


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, digits.Digits]:
    """Reads the arguments and the data they name; ends the program when either is bad."""
    parser = OneLineParser(prog="mnist_fcn.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--method", nargs="+", choices=RECIPES, default=list(RECIPES), help="what to train (all)")
    add("--layers", type=whole(2), default=3, help="layers, the output layer included (3)")
    add("--table", action="store_true", help="train with 3, 4, 5 and 6 layers, beside the paper")
    add("--table-layers", nargs="+", type=whole(2), default=list(PAPER), help="other depths for it")
    add("--width", type=whole(1), default=256, help="units in a hidden layer (256)")
    add("--batch-size", type=whole(2), help="256 on MNIST, 64 on the 8x8 digits")
    add("--epochs", type=whole(1), help="20 on MNIST, 100 on the 8x8 digits")
    add("--seed", "--seeds", dest="seeds", nargs="+", type=whole(0), default=[0],
        help="of parameters and shuffling (0); --table takes several")  # fmt: skip
    add("--lr", type=positive, help="of the layers; the synthesizers' keep their ratio to it")
    add("--update-probability", type=probability, default=1.0, metavar="P",
        help="update each layer with this probability in each step (1)")  # fmt: skip
    add("--bench-seconds", type=positive, default=15.0, help="time spent on step times (15)")
    add("--data-dir", default=os.environ.get("FASTDNI_DATA") or None, help="folder with MNIST")
    add("--out", type=Path, default=Path("out/mnist_fcn.png"), help="where the PNG goes")
    add("--json", type=Path, metavar="FILE", help="also write the error curves here")
    options = parser.parse_args(arguments)

    options.method = list(dict.fromkeys(options.method))
    for path in filter(None, (options.out, options.json)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --out or --json: {error}")
    if options.out.suffix != ".png" or options.out.is_dir():
        parser.error(f"argument --out: must name a .png file, got {options.out}")
    if len(options.seeds) > 1 and not options.table:
        parser.error("argument --seed: several seeds are for --table")
    try:
        data = digits.load(options.data_dir)
    except digits.DataError as error:
        parser.error(f"--data-dir / FASTDNI_DATA: {error}")
    small = options.data_dir is None
    options.batch_size = options.batch_size or (64 if small else 256)
    options.epochs = options.epochs or (100 if small else 20)
    if options.batch_size > len(data.train_x):
        parser.error(f"argument --batch-size: must be <= {len(data.train_x)}, the training images")
    return options, data


def main(arguments: list[str] | None = None) -> int:
    options, data = parse(arguments)
    depth = "every depth" if options.table else f"{options.layers} layers"
    subject = (
        f"{data.name}, {len(data.train_x)} training and {len(data.test_x)} test images; "
        f"{depth} of width {options.width}, batch {options.batch_size}, {options.epochs} epochs"
    )
    if options.update_probability < 1:
        subject += f", layers updated with probability {options.update_probability}"
    machine = bench.header(bench.hardware())
    print(f"{subject}\n{machine}", flush=True)
    (table if options.table else compare)(data, options, f"{subject}\n{machine}")
    print(f"\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
