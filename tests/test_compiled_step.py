"""Steps that a compiler or a tracer sees: they train as others do, or are refused with a word."""

import copy

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, assert_same_state, plain_step
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 4


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins(name="adam", make=network, **how):
    """A network, its optimizer, and the same for the oracle."""
    net = make(n_hidden=1, context=True, **how)
    twin = copy.deepcopy(net)
    return net, OPTIMIZERS[name](net.parameters()), twin, OPTIMIZERS[name](twin.parameters())


def expect(net, optimizer, twin, own, step, steps=STEPS):
    """Takes `step(x, target)` and then ordinary steps; the oracle takes the same."""
    for seed in range(steps + 2):
        given = batch(net, seed=seed)
        result = step(given["x"], given["target"]) if seed < steps else None
        if result is None:
            result = net.step(optimizer=optimizer, **given)
        loss, output, _ = plain_step(twin, optimizer=own, **given)
        torch.testing.assert_close(result.loss, loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result.output, output, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)
    assert_same_state(optimizer, own)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_a_compiled_step_trains(name):
    net, optimizer, twin, own = twins(name, norm=True, bias=False)
    compiled = torch.compile(net.step, backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: compiled(x, target, optimizer))


def test_the_default_compiler():
    net, optimizer, twin, own = twins()

    @torch.compile
    def step(x, target):
        return net.step(2 * x, target, optimizer)

    expect(net, optimizer, twin, own, lambda x, target: step(x / 2, target))


def test_a_compiled_function_around_the_step():
    net, optimizer, twin, own = twins()
    seen = []

    @torch.compile(backend="aot_eager")
    def train(x, target):
        result = net.step(x * 2, target, optimizer)
        return result, result.loss * 3 + net(x * 2).sum()

    def step(x, target):
        result, after = train(x / 2, target)
        seen.append(after - 3 * result.loss)
        torch.testing.assert_close(seen[-1], net(x).sum(), rtol=1e-9, atol=1e-9)
        return result

    expect(net, optimizer, twin, own, step)


def test_a_step_before_the_compiled_ones():
    """The network remembers a step of its own when the compiler comes."""
    net, optimizer, twin, own = twins()
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
    compiled = torch.compile(net.step, backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: compiled(x, target, optimizer))


def test_compiled_and_ordinary_steps_in_turns():
    net, optimizer, twin, own = twins()
    compiled = torch.compile(net.step, backend="aot_eager")
    turns = iter([compiled, net.step] * STEPS)
    expect(net, optimizer, twin, own, lambda x, target: next(turns)(x, target, optimizer))


def test_compiled_gradients():
    net, optimizer, twin, own = twins("sgd")

    @torch.compile(backend="aot_eager")
    def gradients(x, target):
        return net.backward(x, target)

    def step(x, target):
        optimizer.zero_grad()
        result = gradients(x, target)
        optimizer.step()
        optimizer.zero_grad()
        return result

    expect(net, optimizer, twin, own, step)


def test_a_compiled_step_of_a_mixed_network():
    net, optimizer, twin, own = twins("sgd")
    net.stages[1][1] = twin.stages[1][1] = nn.GELU()
    compiled = torch.compile(net.step, backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: compiled(x, target, optimizer))


def test_a_compiled_step_in_complete_unlock():
    net, optimizer, twin, own = twins("nesterov", unlocked=True)
    compiled = torch.compile(net.step, backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: compiled(x, target, optimizer))


def test_a_compiled_module_steps():
    net, optimizer, twin, own = twins()
    net.compile(backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: net.step(x, target, optimizer))
    net, optimizer, twin, own = twins()
    whole = torch.compile(net, backend="aot_eager")
    expect(net, optimizer, twin, own, lambda x, target: whole.step(x, target, optimizer))


def test_batch_sizes_that_change():
    net, optimizer, twin, own = twins()
    compiled = torch.compile(net.step, backend="aot_eager", dynamic=True)
    for rows in (6, 4, 9, 6):
        given = batch(net, rows, seed=rows)
        compiled(given["x"], given["target"], optimizer)
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)


# ---- tracers: right, or refused before anything is written ----


def traced(net, optimizer):
    return make_fx(lambda x, target: net.step(x, target, optimizer).loss)


def functionalized(net, optimizer):
    return torch.func.functionalize(lambda x, target: net.step(x, target, optimizer).loss)


def mapped(net, optimizer):
    step = torch.func.vmap(
        lambda x, target: net.step(x[None], target[None], optimizer).loss, randomness="same"
    )
    return lambda x, target: step(x[:1], target[:1])


def whole_graph(net, optimizer):
    return torch.compile(
        lambda x, target: net.step(x, target, optimizer).loss, backend="aot_eager", fullgraph=True
    )


def faked(net, optimizer):
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def step(x, target):
        with mode:
            return net.step(mode.from_tensor(x), mode.from_tensor(target), optimizer)

    return step


def exported(net, optimizer):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, target):
            return self.net.step(x, target, optimizer).loss

    return lambda x, target: torch.export.export(Step(), (x, target)).module()(x, target)


TRACERS = [traced, functionalized, mapped, whole_graph, faked, exported]


@pytest.mark.parametrize("before", [0, 3], ids=["first", "repeated"])
@pytest.mark.parametrize("way", ["step", "local"])
@pytest.mark.parametrize("tracer", TRACERS, ids=lambda t: t.__name__)
def test_a_traced_step_is_right_or_refused(tracer, way, before):
    net, optimizer, twin, own = twins(make=network if way == "step" else locals_)
    rows = 1 if tracer is mapped else 6
    for seed in range(before):
        net.step(optimizer=optimizer, **batch(net, rows, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, rows, seed=seed))
    given = batch(net, rows, seed=7)
    step = tracer(net, optimizer)
    try:
        step(given["x"], given["target"])
    except Exception as error:
        assert str(error).strip(), "refused without a word"
    else:
        plain_step(twin, optimizer=own, **given)
    assert_same(net, twin)
    # What was seen by the tracer must not stay behind.
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, rows, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, rows, seed=seed))
        assert_same(net, twin)
    assert_same_state(optimizer, own)
    assert all(type(p) is nn.Parameter for p in net.parameters())


def locals_(**how):
    return local(network(**how))


def test_a_traced_graph_trains_when_it_runs_or_is_not_made():
    net, optimizer, twin, own = twins("sgd")
    given = batch(net)
    try:
        graph = traced(net, optimizer)(given["x"], given["target"])
    except Exception as error:
        assert "net.step" in str(error), "the refusal names what was called"
        assert_same(net, twin)
        return
    plain_step(twin, optimizer=own, **given)
    assert_same(net, twin)
    for seed in range(2):
        given = batch(net, seed=seed)
        graph(given["x"], given["target"])
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Bystander(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode", [Onlooker, Bystander])
def test_modes_that_only_look_change_nothing(mode):
    net, optimizer, twin, own = twins()

    def step(x, target):
        with mode():
            return net.step(x, target, optimizer)

    expect(net, optimizer, twin, own, step)


def test_interfaces_in_a_traced_function_are_not_lost():
    """Gradients that `backward` adds in a functionalized call are on the real parameters."""
    net, optimizer, twin, own = twins("sgd")
    given = batch(net)
    step = torch.func.functionalize(lambda x, target: net.backward(x, target).loss)
    try:
        step(given["x"], given["target"])
    except Exception as error:
        assert str(error).strip()
        assert all(p.grad is None for p in net.parameters())
    else:
        optimizer.step()
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)
        assert all(type(p.grad) is torch.Tensor for p in net.parameters())
