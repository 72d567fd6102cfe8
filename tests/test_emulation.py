"""What the emulated GPU (tests/emulated) makes of faults: run there by test_on_emulated_gpu.py."""

import os
import signal
import sys

import pytest
import torch

ops = sys.modules.get("emulated.ops")
pytestmark = pytest.mark.skipif(ops is None, reason="not on the emulated GPU")


def signal_of(function) -> int:
    """What kills a process that calls it, or 0. (There torch.cuda refuses its own functions.)"""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("waits", [True, False])
def test_streams_are_ordered_by_events_alone(waits):
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    stream = torch.cuda.Stream()
    ops.send(lambda: ops.on_host(x).fill_(5), torch.cuda.current_stream().cuda_stream)
    if waits:
        stream.wait_stream(torch.cuda.current_stream())
    ops.send(lambda: ops.on_host(y).copy_(ops.on_host(x)), stream.cuda_stream)
    stream.synchronize()
    assert y.tolist() == [5 if waits else 1] * 3


def test_a_host_that_follows_a_devices_pointer_faults():
    x = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    assert signal_of(lambda: ops.on_host(x).sum()) == signal.SIGSEGV


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_work_reaches_the_memory_of_its_own_device(device):
    x = torch.ones(3, device=device)
    torch.cuda.synchronize(device)
    stream = torch.cuda.current_stream("cuda:0").cuda_stream

    def work():
        ops.send(lambda: ops.on_host(x).sum(), stream)
        ops.wait_for(stream)

    assert signal_of(work) == (0 if device == "cuda:0" else signal.SIGSEGV)


def test_a_stream_takes_work_of_its_own_device():
    stream = torch.cuda.Stream("cuda:1")
    with pytest.raises(RuntimeError, match="of the emulated GPU"):
        ops.send(lambda: None, stream.cuda_stream)


@pytest.mark.parametrize("forbidden", [lambda x: x.item(), lambda x: x.cpu(), lambda x: x.cuda(1)])
def test_a_capture_refuses_what_waits(forbidden):
    x = torch.ones((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError), torch.cuda.graph(graph):
        forbidden(x)
    assert x.item() == 1


def test_new_memory_is_not_zero():
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert torch.empty(1 << 22, device="cuda").isnan().all()
