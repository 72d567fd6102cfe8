"""`net.backward` in two processes: the gradients are each process's own until they are averaged, as
its documentation shows."""

import inspect
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from network_cases import OPTIMIZERS, batch, network
from plain_step import plain_backward

import fastdni

RANKS, STEPS = 2, 3


def start():
    torch.manual_seed(0)
    net = network(context=True)
    return net, OPTIMIZERS["nesterov"](net.parameters())


def train(rank):
    net, optimizer = start()
    for step in range(STEPS):
        optimizer.zero_grad()
        net.backward(**batch(net, seed=RANKS * step + rank))
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad.div_(RANKS))
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def process(rank, address, results):
    sys.path.insert(0, os.path.dirname(__file__))
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save(train(rank), f"{results}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    os._exit(0)  # everything is saved; unloading torch beside its own threads may abort


def test_averaged_gradients_are_those_of_both_batches(tmp_path):
    mp.spawn(process, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=RANKS)
    net, optimizer = start()
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            plain_backward(net, **batch(net, seed=RANKS * step + rank))
        for parameter in net.parameters():
            parameter.grad /= RANKS
        optimizer.step()
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


def test_the_documentation_shows_how():
    said = inspect.getdoc(fastdni.DecoupledSequential.backward)
    assert "all_reduce" in said and "process" in said
