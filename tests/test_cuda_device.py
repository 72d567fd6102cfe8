"""`net.step` and the sweep on a GPU, against the reference there and the CPU. Skipped without one;
what is shown of the same kernels without a GPU is in test_cuda_sweep.py."""

import copy
import gc
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network, state_of
from synthesizer_problem import Sizes, assert_right, problem

import fastdni
from fastdni import agreement
from fastdni.__main__ import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")

KINDS = {
    "plain": {},
    "mlp, context": {"n_hidden": 2, "context": True},
    "norm": {"norm": True, "context": True},
    "unlocked": {"unlocked": True, "n_hidden": 1},
}


def on_gpu(given: dict, device="cuda") -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}


def trained(net, optimizer, backend, steps=20, device="cuda", masks=(None,), **how):
    """What `steps` steps leave: results, parameters and statistics, optimizer state."""
    results = []
    with fastdni.use_backend(backend):
        for number in range(steps):
            given = on_gpu(batch(net, seed=number, **how), device)
            mask = masks[number % len(masks)]
            results += net.step(optimizer=optimizer, update_mask=mask, **given)
    return [t.cpu() for t in (*results, *net.state_dict().values(), *state_of(optimizer))]


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_equal_the_reference(name, kind, criterion):
    net = network((7, 33, 20, 5), bias=not name.startswith("adam"), **KINDS[kind])
    found = []
    for backend in ("cuda", "reference"):
        twin = copy.deepcopy(net).cuda()
        optimizer = OPTIMIZERS[name](twin.parameters())
        found.append(trained(twin, optimizer, backend, rows=40, criterion=criterion))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind):
    net = network(**KINDS[kind])
    masks = ([True, False, True], [False, True, True], [True] * 3)
    found = []
    for backend in ("cuda", "reference"):
        twin = copy.deepcopy(net).cuda()
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        found.append(trained(twin, optimizer, backend, masks=masks))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("widths", [(784, 256, 256, 10), (100, 1030, 70, 10)])
def test_the_same_bits_twenty_times(widths):
    net = network(widths, norm=True, context=True, n_hidden=1, dtype=torch.float32).cuda()
    given = on_gpu(batch(net, rows=130))
    first = None
    for _ in range(20):
        twin = copy.deepcopy(net)
        optimizer = OPTIMIZERS["sgd"](twin.parameters())
        with fastdni.use_backend("cuda"):
            results = [*twin.step(optimizer=optimizer, **given), *twin.state_dict().values()]
        first = first or results
        assert all(map(torch.equal, first, results))


def test_float32_is_as_near_as_the_cpu():
    net = network((30, 40, 20, 5), n_hidden=1, context=True, dtype=torch.float32)
    found = []
    for backend, twin in (("cuda", copy.deepcopy(net).cuda()), ("cpu", copy.deepcopy(net))):
        optimizer = OPTIMIZERS["sgd"](twin.parameters())
        device = "cuda" if backend == "cuda" else "cpu"
        found.append(trained(twin, optimizer, backend, steps=1, device=device, rows=50))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_steps_on_streams_of_their_own():
    nets = [network(norm=True).cuda() for _ in range(2)]
    alone = [copy.deepcopy(net) for net in nets]
    expected = [trained(net, OPTIMIZERS["sgd"](net.parameters()), "cuda", rows=64) for net in alone]
    streams = [torch.cuda.Stream() for _ in nets]
    optimizers = [OPTIMIZERS["sgd"](net.parameters()) for net in nets]
    torch.cuda.synchronize()
    results: list[list] = [[], []]
    with fastdni.use_backend("cuda"):
        for number in range(20):
            for own, net, stream, optimizer in zip(results, nets, streams, optimizers, strict=True):
                with torch.cuda.stream(stream):
                    own += net.step(optimizer=optimizer, **on_gpu(batch(net, 64, seed=number)))
    torch.cuda.synchronize()
    for own, net, want in zip(results, nets, expected, strict=True):
        found = [t.cpu() for t in (*own, *net.state_dict().values())]
        assert all(map(torch.equal, found, want))


def test_one_network_on_two_streams_in_turn():
    net = network(norm=True).cuda()
    twin = copy.deepcopy(net)
    expected = trained(twin, OPTIMIZERS["sgd"](twin.parameters()), "cuda", rows=64)
    streams = [torch.cuda.Stream() for _ in range(2)]
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    found = []
    for number in range(20):
        stream = streams[number % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), fastdni.use_backend("cuda"):
            found += net.step(optimizer=optimizer, **on_gpu(batch(net, 64, seed=number)))
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    found = [t.cpu() for t in (*found, *net.state_dict().values())]
    assert all(map(torch.equal, found, expected))


def test_a_plans_memory_is_kept_while_its_stream_works():
    """Of a network that is gone: torch would hand it out again to the stream it was taken for."""
    net = network((7, 33, 20, 5), norm=True, context=True).cuda()
    twin = copy.deepcopy(net)
    expected = trained(twin, OPTIMIZERS["sgd"](twin.parameters()), "cuda", steps=2, rows=64)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    batches = [on_gpu(batch(net, 64, seed=seed)) for seed in range(2)]
    stream = torch.cuda.Stream()
    with fastdni.use_backend("cuda"):
        found = [*net.step(optimizer=optimizer, **batches[0])]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found += net.step(optimizer=optimizer, **batches[1])
    found += net.state_dict().values()
    del net, optimizer
    gc.collect()
    others = [torch.full((64, n), torch.nan, device="cuda") for n in range(8, 400, 8)]
    torch.cuda.current_stream().synchronize()
    stream.synchronize()
    assert len(others) and all(map(torch.equal, [t.cpu() for t in found], expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    net = network()
    found = []
    for device in ("cuda:0", "cuda:1"):
        twin = copy.deepcopy(net).to(device)
        found.append(trained(twin, OPTIMIZERS["sgd"](twin.parameters()), "cuda", device=device))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("precision", ["exact", "tf32", "tf32x3", "bf16"])
def test_every_precision_is_as_near_as_torchs(precision):
    net = network((70, 130, 65, 10), n_hidden=1, context=True)
    given = on_gpu(batch(net, rows=50))
    exact = [t.cpu() for t in trained_once(copy.deepcopy(net).cuda(), "reference", given)]
    single = {k: v.float() if v.is_floating_point() else v for k, v in given.items()
              if isinstance(v, torch.Tensor)}  # fmt: skip
    fastdni.set_fp32_precision("tf32x3" if precision == "tf32x3" else "torch")
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            found = trained_once(copy.deepcopy(net).float().cuda(), "cuda", {**given, **single})
    finally:
        fastdni.set_fp32_precision("torch")
        torch.backends.cuda.matmul.allow_tf32 = False
    bound = {"exact": 1e-5, "tf32x3": 1e-4, "tf32": 1e-2, "bf16": 5e-2}[precision]
    for a, b in zip(found, exact, strict=True):
        assert (a.double().cpu() - b).norm() <= bound * (b.norm() + 1)


def trained_once(net, backend, given):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    with fastdni.use_backend(backend):
        results = net.step(optimizer=optimizer, **given)
    return [*results, *net.state_dict().values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n_hidden", [0, 2])
def test_a_synthesizers_ops_equal_the_reference(dtype, n_hidden):
    p = problem((37,), Sizes(70, 65, 10), n_hidden, dtype=dtype, device="cuda")
    with fastdni.use_backend("cuda"):
        assert_right(p)


def test_both_hold_where_torchs_library_makes_the_products():
    """In a process of their own: from which size on it does is asked once."""
    plugins = ["-p", "emulated.plugin"] if "emulated.plugin" in sys.modules else []
    chosen = "every_precision or synthesizers_ops"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *plugins, __file__, "-k", chosen],
        capture_output=True,
        text=True,
        env=os.environ | {"FASTDNI_LIBRARY_FROM": "1"},
    )
    assert done.returncode == 0 and " PASSED" in done.stdout, done.stdout[-3000:]


@pytest.mark.parametrize("backend", ["cuda", "triton", "auto", "reference"])
@pytest.mark.parametrize("rates", ["tensor", "number"])
def test_a_step_is_captured_in_a_graph_and_replayed(rates, backend):
    net = network((7, 33, 20, 5), dtype=torch.float32).cuda()
    twin = copy.deepcopy(net)
    given = on_gpu(batch(net, rows=16))
    optimizers = [
        torch.optim.Adam(n.parameters(), lr=lr, capturable=True)
        for n, lr in ((net, tensor_or_number(rates)), (twin, 1e-3))
    ]
    with fastdni.use_backend(backend):
        step = fastdni.make_graphed_step(net, optimizers[0], given["x"], given["target"])
        for _ in range(4):  # the warm-up's three, and the capture runs nothing
            step(given["x"], given["target"])
        if rates == "tensor":
            optimizers[0].param_groups[0]["lr"].fill_(1e-2)
        else:
            optimizers[0].param_groups[0]["lr"] = 1e-2
        step(given["x"], given["target"])
        for lr in [1e-3] * 7 + [1e-2]:
            optimizers[1].param_groups[0]["lr"] = lr
            twin.step(given["x"], given["target"], optimizers[1])
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_is_not_fused_is_captured_too():
    """Then the kernels write gradients, whose memory is the graph's."""
    net = network((7, 33, 5), dtype=torch.float32).cuda()
    twin = copy.deepcopy(net)
    given = on_gpu(batch(net, rows=16))
    optimizers = [torch.optim.NAdam(n.parameters(), capturable=True) for n in (net, twin)]
    with fastdni.use_backend("cuda"):
        step = fastdni.make_graphed_step(net, optimizers[0], given["x"], given["target"])
        for _ in range(2):
            step(given["x"], given["target"])
            net.backward(given["x"], given["target"])  # the same plans' memory is not the graph's
            net.zero_grad()
        for _ in range(5):
            twin.step(given["x"], given["target"], optimizers[1])
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warm", [True, False], ids=["on its stream", "on another"])
def test_a_graph_of_ones_own_keeps_what_it_was_captured_with(warm):
    """Also while ordinary steps with other settings are taken in its stream."""
    net = network((7, 33, 5), context=True).cuda()
    twin = copy.deepcopy(net)
    given = on_gpu(batch(net, rows=16))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    with fastdni.use_backend("cuda"):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if warm else torch.cuda.current_stream()):
            net.step(optimizer=optimizer, **given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            net.step(optimizer=optimizer, **given)
        optimizer.param_groups[0]["lr"] = 1e-2
        with torch.cuda.stream(stream):
            net.step(optimizer=optimizer, **given)
            graph.replay()
            graph.replay()
        torch.cuda.synchronize()
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3, momentum=0.9)
        for rate in (1e-3, 1e-2, 1e-3, 1e-3):
            optimizer.param_groups[0]["lr"] = rate
            twin.step(optimizer=optimizer, **given)
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_graphs_memory_is_kept_however_many_streams_come_after():
    net = network((7, 33, 5)).cuda()
    twin = copy.deepcopy(net)
    given = on_gpu(batch(net, rows=16))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    optimizers = [OPTIMIZERS["sgd"](n.parameters()) for n in (net, twin)]
    with fastdni.use_backend("cuda"):
        with torch.cuda.stream(stream):
            net.step(optimizer=optimizers[0], **given)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            net.step(optimizer=optimizers[0], **given)
        for _ in range(6):
            with torch.cuda.stream(torch.cuda.Stream()):
                net.step(optimizer=optimizers[0], **given)
            torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            others = [torch.full((n,), torch.nan, device="cuda") for n in range(64, 8192, 64)]
            graph.replay()
        torch.cuda.synchronize()
        for _ in range(8):
            twin.step(optimizer=optimizers[1], **given)
    assert len(others) and all(map(torch.equal, net.parameters(), twin.parameters()))


@contextmanager
def nothing_waits():
    """Fails where the host waits for the GPU inside."""
    emulated = sys.modules.get("emulated.ops")
    before = emulated and emulated.count("waits")
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert emulated is None or emulated.count("waits") == before


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing_and_allocates_its_results_alone(kind, capturable):
    net = network((7, 33, 20, 5), **KINDS[kind]).cuda()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, capturable=capturable)
    given = on_gpu(batch(net, rows=16))
    with fastdni.use_backend("cuda"):
        for _ in range(2):  # the plan, the optimizer's state, the tables
            net.step(optimizer=optimizer, **given)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with nothing_waits():
            results = net.step(optimizer=optimizer, **given)
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert made == len([t for t in results if t.numel()])


@pytest.mark.skipif("emulated.ops" not in sys.modules, reason="counted on an emulated GPU")
@pytest.mark.parametrize("name, launches", [("sgd", 2), ("adam", 3)])
def test_a_step_is_two_launches(name, launches):
    """And a small one for Adam's numbers, where they are on the GPU."""
    net = network((7, 33, 20, 5), n_hidden=1, context=True).cuda()
    optimizer = OPTIMIZERS[name](net.parameters())
    for group in optimizer.param_groups:
        group["capturable"] = name == "adam"
    given = on_gpu(batch(net, rows=40))
    count = sys.modules["emulated.ops"].count
    with fastdni.use_backend("cuda"):
        for _ in range(2):
            net.step(optimizer=optimizer, **given)
        before = count("launches")
        net.step(optimizer=optimizer, **given)
    assert count("launches") - before == launches


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_network_with_an_interface_compiles_to_one_graph(backend):
    """By torch's tracing alone: what its compiler makes of it is not in question."""
    torch.manual_seed(1)
    layer, head = torch.nn.Linear(7, 9), torch.nn.Linear(9, 5)
    interface = fastdni.BackwardInterface(fastdni.BasicSynthesizer(9, n_hidden=1))
    net = torch.nn.Sequential(layer, torch.nn.ReLU(), interface, head).cuda()
    twin = copy.deepcopy(net)
    x = torch.randn(6, 7).cuda()
    labels = (torch.arange(6) % 5).cuda()
    with fastdni.use_backend(backend):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for model in (compiled, twin):
            torch.nn.functional.cross_entropy(model(x), labels).backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad.cpu())


def test_the_kernels_agree_with_plain_pytorch():
    assert agreement.disagreement(torch.device("cuda"), "cuda") is None


def tensor_or_number(rates):
    return torch.tensor(1e-3, device="cuda") if rates == "tensor" else 1e-3


@pytest.mark.parametrize("path", ["cuda", "reference", "local"])
@pytest.mark.parametrize("criterion, shape", [("mse", (6, 4)), ("cross_entropy", (6, 1))])
def test_a_target_of_another_shape_is_refused(path, criterion, shape):
    """As on the CPU: it would be broadcast."""
    net = (local if path == "local" else copy.deepcopy)(network()).cuda()
    given = on_gpu(batch(net, criterion=criterion))
    given["target"] = given["target"].new_zeros(shape)
    refused = pytest.raises(RuntimeError, match="net.step: target must be")
    with fastdni.use_backend("auto" if path == "local" else path), refused:
        net.step(optimizer=OPTIMIZERS["sgd"](net.parameters()), **given)


@pytest.mark.parametrize("bad", [5, 10**9, -1])
def test_a_label_that_is_none_makes_the_loss_nan(bad):
    """Nothing is read out of bounds, and the host does not wait for the device to look."""
    net = network().cuda()
    given = on_gpu(batch(net))
    given["target"][2] = bad
    with fastdni.use_backend("cuda"):
        result = net.step(optimizer=OPTIMIZERS["sgd"](net.parameters()), **given)
    assert result.loss.isnan() and result.output.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_bench_measures_every_form_in_graphs_too(capsys, precision):
    size = ["--net", "70-64-64-10", "--batch", "64", "--rounds", "2", "--quick"]
    assert main(["bench", *size, "--device", "cuda", "--precision", precision]) == 0
    out = capsys.readouterr().out
    for form in ("fastdni cuda", "fastdni reference", "graphed", "backprop graphed", "products"):
        assert f"\n{form}  " in out
    assert "not measured" not in out
