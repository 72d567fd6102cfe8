"""DecoupledRNN inside DistributedDataParallel: two processes, gloo."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fastdni

RANKS, WINDOWS, BATCH, STEPS = 2, 5, 4, 3
# Also windows in which the synthesizer does not learn.
CASES = [
    {"first": "train"},
    {"first": "skip"},
    {"horizon": 2, "n_hidden": 1},
    {"trace_lambda": 0.7, "trace_windows": 2},
    {"trace_lambda": 0.7, "trace_view": "online"},
]


class Model(nn.Module):
    """What is wrapped: the loss's graph begins and ends in it."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = fastdni.DecoupledRNN(nn.LSTM(3, 4), factor=0.5, **how)
        self.head = nn.Linear(4, 5)

    def forward(self, x, state):
        output, state = self.rnn(x, state)
        return self.head(output), state


def data(rank):
    generator = torch.Generator().manual_seed(1 + rank)
    for _ in range(WINDOWS):
        x = torch.randn(STEPS, BATCH, 3, generator=generator, dtype=torch.float64)
        yield x, torch.randint(5, (STEPS, BATCH), generator=generator)


def loss_of(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def train(rank, how):
    model = Model(how).double()
    parallel = DistributedDataParallel(model)
    optimizer, state = torch.optim.SGD(model.parameters(), 0.1), None
    for x, y in data(rank):
        output, state = parallel(x, state)
        model.rnn.backward(loss_of(output, y))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def process(rank, address, results):
    sys.path.insert(0, __file__.rsplit("/", 1)[0])
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save([train(rank, case) for case in CASES], f"{results}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    os._exit(0)  # everything is saved


def averaged(how):
    """The same in one process: the ranks' gradients are averaged by hand."""
    models, states = [Model(how).double() for _ in range(RANKS)], [None] * RANKS
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for step in zip(*map(data, range(RANKS)), strict=True):
        for rank, (x, y) in enumerate(step):
            output, states[rank] = models[rank](x, states[rank])
            models[rank].rnn.backward(loss_of(output, y))
        for of_ranks in zip(*(model.parameters() for model in models), strict=True):
            known = [p.grad for p in of_ranks if p.grad is not None]
            for p in of_ranks if known else ():
                p.grad = sum(known) / RANKS
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in models[0].parameters()]


def test_gradients_are_averaged(tmp_path):
    mp.spawn(process, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=RANKS)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for number, how in enumerate(CASES):
        wanted = averaged(how)
        for found in of_ranks:
            torch.testing.assert_close(found[number], wanted, rtol=1e-9, atol=1e-12)
