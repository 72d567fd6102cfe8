"""A network with interfaces inside DistributedDataParallel: two processes, gloo."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from plain_dni import batches, networks
from torch.nn.parallel import DistributedDataParallel

import fastdni as dni

RANKS = 2
STEPS = 3
CASES = [("backward", False), ("backward", True), ("bidirectional", True)]  # kind, deferred


def optimizer_of(network):
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def data(rank):
    return batches(STEPS * RANKS, size=8)[rank::RANKS]


def train(rank, kind, deferred):
    torch.manual_seed(0)
    network, _ = networks(kind, True, width=16)
    parallel = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = optimizer_of(network)
    for images, labels in data(rank):
        optimizer.zero_grad()
        if deferred:
            with dni.defer_backward():
                dni.backward(F.nll_loss(parallel(images, labels), labels))
        else:
            F.nll_loss(parallel(images, labels), labels).backward()
        optimizer.step()
    return {n: p.detach() for n, p in network.named_parameters()}


def process(rank, address, results):
    sys.path.insert(0, __file__.rsplit("/", 1)[0])
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save([train(rank, *case) for case in CASES], f"{results}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    # Everything is saved. Unloading torch beside its own threads has aborted, once in many runs.
    os._exit(0)


def averaged(kind):
    """The same training in one process: the ranks' gradients are averaged by hand."""
    torch.manual_seed(0)
    _, network = networks(kind, True, width=16)
    optimizer = optimizer_of(network)
    for step in zip(*(data(rank) for rank in range(RANKS)), strict=True):
        optimizer.zero_grad()
        for images, labels in step:
            F.nll_loss(network(images, labels), labels).backward()
        for p in network.parameters():
            p.grad /= RANKS
        optimizer.step()
    return {n: p.detach() for n, p in network.named_parameters()}


def test_gradients_are_averaged(tmp_path):
    mp.spawn(process, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=RANKS)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for (kind, _), *found in zip(CASES, *of_ranks, strict=True):
        wanted = averaged(kind)
        for each in found:
            torch.testing.assert_close(each, wanted, rtol=1e-9, atol=1e-12)


# ---- net.backward ----


def decoupled():
    torch.manual_seed(0)
    layers = torch.nn.Linear(784, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
    return dni.decouple(torch.nn.Sequential(*layers), context_dim=10).double()


def of_network(rank, average):
    """Two steps by `net.backward`, with the two lines of its docstring or without them."""
    net = decoupled()
    optimizer = optimizer_of(net)
    for images, labels in data(rank)[:2]:
        optimizer.zero_grad()
        net.backward(images, labels)
        if average:
            for p in net.parameters():
                dist.all_reduce(p.grad.div_(dist.get_world_size()))
        optimizer.step()
    return {n: p.detach() for n, p in net.named_parameters()}


def backward_process(rank, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.save([of_network(rank, average) for average in (True, False)], f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_net_backward_is_averaged_by_two_lines_and_not_without_them(tmp_path):
    mp.spawn(backward_process, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=RANKS)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    net = decoupled()
    optimizer = optimizer_of(net)
    for step in list(zip(*(data(rank) for rank in range(RANKS)), strict=True))[:2]:
        optimizer.zero_grad()
        for images, labels in step:
            net.backward(images, labels)
        for p in net.parameters():
            p.grad /= RANKS
        optimizer.step()
    wanted = {n: p.detach() for n, p in net.named_parameters()}
    for together, alone in of_ranks:
        torch.testing.assert_close(together, wanted, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(alone["stages.0.0.weight"], wanted["stages.0.0.weight"])


def test_undeferred_gradients_inside_the_forward_are_refused(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        network, _ = networks("bidirectional", True, width=16)
        images, labels = batches(1, size=8)[0]
        with pytest.raises(RuntimeError, match="defer_backward"):
            DistributedDataParallel(network)(images, labels)
        assert all(p.grad is None for p in network.parameters())
    finally:
        dist.destroy_process_group()
