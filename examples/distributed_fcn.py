"""Trains a network on handwritten digits whose stages are a process each, and wait for nobody.

    torchrun --nproc-per-node 3 examples/distributed_fcn.py [--stages 3] [--staleness 4]
        [--mode fixed async] [--epochs 10] [--data-dir MNIST] [--checkpoint FOLDER]

On two machines, with 2 stages: on each of them

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/distributed_fcn.py --stages 2

The network is that of mnist_fcn.py with linear synthesizers that see the labels (cDNI). Activations
go up from process to process, their true gradients come back later, and a synthesizer has said
before what they will be. More processes than stages are replicas, which share each batch. With
`--checkpoint` and torchrun's `--max-restarts`, training goes on by itself when a process has died.

Prints test errors, and what each stage spent its time on; draws the last messages, stage by stage.
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path

import digits
import torch
import torch.distributed as dist
from arguments import OneLineParser, positive, whole
from torch import nn

import fastdni
from fastdni import distributed
from fastdni.bench import hardware, header, table
from fastdni.bench.progress import Line, bar

try:
    import distributed_plots
    import sklearn  # noqa: F401  (digits needs it)
except ImportError as error:
    print(f"{error}: pip install fastdni[examples]", file=sys.stderr)
    sys.exit(2)

CLASSES = 10
LR, SYNTHESIZER_LR = 5e-4, 3e-6
SHOWN = 12  # messages in the picture


def network(pixels: int, width: int, layers: int) -> fastdni.DecoupledSequential:
    """Linear, BatchNorm, ReLU, layer after layer, and a linear synthesizer above each."""
    torch.manual_seed(0)
    sizes = [pixels, *[width] * (layers - 1)]
    modules: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        modules += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    modules.append(nn.Linear(sizes[-1], CLASSES))
    return fastdni.decouple(nn.Sequential(*modules), context_dim=CLASSES)


def train(options: argparse.Namespace, data: digits.Digits, mesh) -> None:
    """What every process does."""
    part, synthesizer = distributed.split(network(data.train_x.shape[1], options.width,
                                                  options.layers), mesh)  # fmt: skip
    stage = distributed.DecoupledStage(part, mesh, synthesizer)
    rates = [{"params": list(stage.stages.parameters()), "lr": options.lr}]
    if len(stage.synthesizers):
        rates.append({"params": list(stage.synthesizers.parameters()), "lr": SYNTHESIZER_LR})
    optimizer = torch.optim.Adam(rates)
    batches = len(data.train_x) // options.batch_size
    steps = options.epochs * batches
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
    )
    shuffle = torch.Generator().manual_seed(0)
    talks = stage.is_last and stage.replica == 0
    begin, errors = time.monotonic(), []
    with distributed.ScheduleDecoupled(
        stage, "cross_entropy", optimizer, options.mode, options.staleness,
        checkpoint=options.checkpoint, save_every=max(batches // 2, 1),
    ) as schedule, Line(keep=talks) as line:  # fmt: skip
        for epoch in range(options.epochs):
            order = torch.randperm(len(data.train_x), generator=shuffle)
            for number, rows in enumerate(order.split(options.batch_size)[:batches]):
                if epoch * batches + number < schedule.next_step:  # done before a restart
                    decay.step()
                    continue
                own = rows[stage.replica :: mesh.size(1)]
                schedule.step(data.train_x[own], target=data.train_y[own])
                decay.step()
            output = schedule.evaluate(data.test_x)
            if talks:
                errors.append(100 * (output.argmax(1) != data.test_y).float().mean().item())
                note = f"test error {errors[-1]:.2f} %, {time.monotonic() - begin:.0f} s"
                line.show(bar(f"{options.mode}, staleness {options.staleness}",
                              (epoch + 1) / options.epochs, note))  # fmt: skip
    seconds = time.monotonic() - begin
    report(options, stage, schedule, steps / seconds, talks)


def report(options, stage, schedule, rate: float, talks: bool) -> None:
    """The table, and the picture, of all stages."""
    spent = schedule.seconds
    newest = max(n for kind, n, *_ in schedule.timeline if kind == "compute")
    shown = [e for e in schedule.timeline if e[1] > newest - SHOWN][-distributed_plots.MOST :]
    kinds = list(spent)
    mine = torch.zeros(distributed_plots.MOST, 4, dtype=torch.float64)
    for row, (kind, number, begin, end) in enumerate(shown):
        facts = (kinds.index(kind) + 1, number, begin, end)
        mine[row] = torch.tensor(facts, dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    own = torch.tensor([spent[kind] for kind in kinds], dtype=torch.float64)
    all_spent = [torch.empty_like(own) for _ in every]
    dist.all_gather(all_spent, own)
    if not talks:
        return
    rows = []
    for index in range(stage.count):
        found = all_spent[int(stage.mesh.mesh[index, 0])]
        rows.append([f"stage {index}", *(f"{100 * x / found.sum():.0f} %" for x in found.tolist())])
    print("\n" + table(rows, ["", "own step", "regression", "saving", "waiting"]))
    print(f"{rate:.0f} batches a second")
    lines = [every[int(stage.mesh.mesh[index, 0])] for index in range(stage.count)]
    distributed_plots.draw(lines, kinds, options.title, options.out)
    print(f"\nwrote {options.out}")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, digits.Digits]:
    """Reads the arguments and the data they name; ends the program when either is bad."""
    parser = OneLineParser(prog="distributed_fcn.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--stages", type=whole(1), help="processes that the network is cut into (all of them)")
    add("--layers", type=whole(2), default=4, help="layers, the output layer included (4)")
    add("--width", type=whole(1), default=256, help="units in a hidden layer (256)")
    add("--batch-size", type=whole(2), help="256 on MNIST, 64 on the 8x8 digits")
    add("--epochs", type=whole(1), help="5 on MNIST, 60 on the 8x8 digits")
    add("--mode", choices=("fixed", "async"), default="fixed", help="of the schedule (fixed)")
    add("--staleness", type=whole(0), default=4, help="messages a gradient may be late (4)")
    add("--lr", type=positive, default=LR, help=f"of the layers ({LR:g})")
    add("--checkpoint", type=Path, metavar="FOLDER", help="save here, and go on from there")
    add("--data-dir", default=os.environ.get("FASTDNI_DATA") or None, help="folder with MNIST")
    add("--out", type=Path, default=Path("out/distributed_fcn.png"), help="where the PNG goes")
    options = parser.parse_args(arguments)
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
    options.epochs = options.epochs or (60 if small else 5)
    if options.batch_size > len(data.train_x):
        parser.error(f"argument --batch-size: must be <= {len(data.train_x)}, the training images")
    return options, data


def main(arguments: list[str] | None = None) -> int:
    options, data = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        print(
            "distributed_fcn.py: error: must be started by torchrun: torchrun --nproc-per-node 3 "
            "examples/distributed_fcn.py",
            file=sys.stderr,
        )
        return 2
    stages = options.stages or int(os.environ["WORLD_SIZE"])
    try:
        mesh = distributed.init(stages)
    except ValueError as error:
        print(f"distributed_fcn.py: error: {error}", file=sys.stderr)
        return 2
    subject = (
        f"{data.name}; {options.layers} layers of width {options.width} on {stages} stages, batch "
        f"{options.batch_size}, {options.epochs} epochs, staleness {options.staleness}"
    )
    options.title = f"{subject}\n{header(hardware())}"
    if dist.get_rank() == 0:
        print(options.title, flush=True)
    train(options, data, mesh)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
