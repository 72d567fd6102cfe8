"""Decoupled stages over slow links, beside a synchronous pipeline on the same channels, and beside
what `fastdni.distributed.plan` says.

    torchrun --standalone --nproc-per-node 4 benchmarks/stages.py [--stage-ms 15] [--batches 60]
        [--json FILE]

A stage's time is emulated (it sleeps, a third of it in the forward pass), so that processes do not
compete for processors; frames are sent late by each latency. The synchronous pipeline is GPipe,
with the best number of microbatches of 1, 2, 4 and 8.
"""

import argparse
import json
import os
import queue
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fastdni
from fastdni import distributed
from fastdni.bench import hardware, header, table
from fastdni.distributed import plan, schedule
from fastdni.distributed.channels import Receiver, Sender

WIDTH, BATCH = 64, 32
LATENCIES = (0.0, 1 / 3, 4 / 3, 4.0)  # in stage times
MICROBATCHES = (1, 2, 4, 8)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds * len(x) / BATCH
        time.sleep(ctx.seconds / 3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds / 3)
        return gradient, None


class Stage(nn.Module):
    """A linear layer that takes a time."""

    def __init__(self, outputs: int, seconds: float):
        super().__init__()
        self.layer, self.seconds = nn.Linear(WIDTH, outputs), seconds

    def forward(self, x):
        return _Sleep.apply(self.layer(x), self.seconds)


class LateSender(Sender):
    """Sends frames after `latency` seconds, in order."""

    latency = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._due: queue.Queue = queue.Queue()
        self._late = threading.Thread(target=self._run, daemon=True)
        self._late.start()

    def _run(self) -> None:
        while (item := self._due.get()) is not None:
            due, frame = item
            time.sleep(max(0.0, due - time.monotonic()))
            super().send(*frame)

    def send(self, number, saved, tensors) -> None:
        own = [None if t is None else t.detach().clone() for t in tensors]
        self._due.put((time.monotonic() + self.latency, (number, saved, own)))

    def end(self) -> None:
        self._due.put(None)
        self._late.join()
        super().end()


def made(stage: int, stages: int, seconds: float) -> nn.Module:
    torch.manual_seed(stage)
    return Stage(10 if stage == stages - 1 else WIDTH, seconds)


def decoupled(mesh, seconds: float, staleness: int, batches: int) -> float:
    """Seconds a batch, of the last half."""
    index = mesh.get_coordinate()[0]
    last = index == mesh.size(0) - 1
    synthesizer = None if last else fastdni.start_at_zero(fastdni.BasicSynthesizer(WIDTH))
    stage = distributed.DecoupledStage(made(index, mesh.size(0), seconds), mesh, synthesizer)
    optimizer = torch.optim.SGD(stage.parameters(), 1e-3)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))
    with distributed.ScheduleDecoupled(
        stage, "cross_entropy", optimizer, staleness=staleness, cap=None
    ) as running:
        for number in range(batches):
            if number == batches // 2:
                begin = time.monotonic()
            running.step(x, target=y)
        taken = time.monotonic() - begin
    return taken / (batches - batches // 2)


def synchronous(mesh, seconds: float, microbatches: int, batches: int) -> float:
    """GPipe: seconds a batch, of the last half."""
    index, stages = mesh.get_coordinate()[0], mesh.size(0)
    module = made(index, stages, seconds)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    device, frames = torch.device("cpu"), queue.Queue()
    senders, receivers = {}, []
    for edge in range(stages - 1):
        for kind in ("input", "feedback"):
            group = dist.new_group([edge, edge + 1])
            source, target = (edge, edge + 1) if kind == "input" else (edge + 1, edge)
            if index == source:
                senders[kind] = LateSender(target, group, microbatches + 2, device)
            if index == target:
                receivers.append(
                    Receiver(source, group, microbatches + 2, device, frames, (kind, source))
                )

    def received():
        (_, frame) = frames.get()
        if isinstance(frame, Exception):
            raise frame
        return frame.tensors[0]

    rows = torch.randn(BATCH, WIDTH).chunk(microbatches)
    labels = torch.randint(10, (BATCH,)).chunk(microbatches)
    for number in range(batches):
        if number == batches // 2:
            begin = time.monotonic()
        inputs, outputs = [], []
        for m in range(microbatches):
            x = rows[m] if index == 0 else received().requires_grad_()
            inputs.append(x)
            outputs.append(module(x))
            if index < stages - 1:
                senders["input"].send(m, 0, [outputs[m]])
        for m in range(microbatches):
            if index == stages - 1:
                (F.cross_entropy(outputs[m], labels[m]) / microbatches).backward()
            else:
                outputs[m].backward(received())
            if index > 0:
                senders["feedback"].send(m, 0, [inputs[m].grad])
        optimizer.step()
        optimizer.zero_grad()
    taken = time.monotonic() - begin
    for sender in senders.values():
        sender.end()
    for receiver in receivers:
        receiver.join(60)
    dist.barrier()
    return taken / (batches - batches // 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--stage-ms", type=float, default=15.0)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.exit(2, "benchmarks/stages.py: error: must be started by torchrun\n")
    torch.set_num_threads(1)
    stages = int(os.environ["WORLD_SIZE"])
    mesh = distributed.init(stages)
    schedule.Sender = LateSender
    seconds = options.stage_ms / 1e3
    talks = dist.get_rank() == stages - 1
    if talks:
        print(f"{stages} stages of {options.stage_ms:g} ms (emulated)\n{header(hardware())}\n")
    rows, found, alone = [], [], None
    for share in LATENCIES:
        LateSender.latency = share * seconds
        case = plan.Case(stages, seconds, LateSender.latency, 0.0, 0.0, 8, 0.0)
        staleness = plan.staleness_for(case)
        own = statistics.median(
            decoupled(mesh, seconds, staleness, options.batches) for _ in range(3)
        )
        few = max(8, options.batches // 5)
        others = {m: synchronous(mesh, seconds, m, few) for m in MICROBATCHES}
        m = min(others, key=others.get)
        alone = alone or own
        planned = plan.decoupled(case, staleness).seconds
        rows.append(
            [
                f"{share:.2f}", str(staleness), f"{1e3 * own:.2f}", f"{1e3 * planned:.2f}",
                f"{1e3 * others[m]:.1f} ({m})", f"{others[m] / own:.2f}", f"{alone / own:.2f}",
                f"{seconds / own:.2f}",
            ]
        )  # fmt: skip
        found.append(
            {"latency": LateSender.latency, "staleness": staleness, "decoupled": own,
             "planned": planned, "synchronous": others}
        )  # fmt: skip
    if talks:
        headers = ["latency / stage", "staleness", "ms a batch", "planned", "best GPipe (of M)",
                   "times faster", "of no latency", "of the stages' own"]  # fmt: skip
        print(table(rows, headers))
        if options.json:
            options.json.write_text(json.dumps({"stages": stages, "found": found}, indent=1))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
