"""DecoupledSequential as a module: saved, copied, resumed, explained, and what it keeps."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from network_cases import (
    OPTIMIZERS,
    batch,
    network,
    optimizer_of,
    same,
    state_of,
    steps_of,
    structure,
)
from torch import nn
from torch.optim.lr_scheduler import StepLR

import fastdni

# ---- an ordinary module ----


def test_the_forward_pass_is_that_of_the_stages():
    net = network(norm=True)
    x = batch(net)["x"]
    for mode in (True, False):
        net.train(mode)
        expected = copy.deepcopy(net)
        y = x
        for stage in expected.stages:
            y = stage(y)
        assert torch.equal(net(x), y)
    x = x.requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None and net.stages[0][0].weight.grad is not None


def test_state_dicts_deepcopies_and_pickles_go_on():
    net = network(norm=True, context=True, unlocked=True, n_hidden=1)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps_of(net, optimizer)
    other = network(norm=True, context=True, unlocked=True, n_hidden=1)
    other.load_state_dict(net.state_dict())
    twins = [other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    expected = steps_of(net, OPTIMIZERS["sgd"](net.parameters()))
    for twin in twins:
        same(steps_of(twin, OPTIMIZERS["sgd"](twin.parameters())), expected, 0)


def test_parameters_fall_into_two_groups():
    net = network(unlocked=True)
    stages, synthesizers = net.stage_parameters(), net.synthesizer_parameters()
    assert [id(p) for p in stages + synthesizers] == [id(p) for p in net.parameters()]
    assert len(stages) == 6 and len(synthesizers) == 8


def test_a_network_is_freed():
    """A look at what changed must not keep what it looks at."""
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps_of(net, optimizer)
    alive = weakref.ref(net)
    del net, optimizer
    gc.collect()
    assert alive() is None


def test_the_result_is_fresh_and_detached():
    net = network(context=True)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    given = batch(net)
    expected = net(given["x"])
    first = net.step(optimizer=optimizer, **given)
    torch.testing.assert_close(first.output, expected)
    torch.testing.assert_close(first.loss, F.cross_entropy(expected, given["target"]))
    kept = [t.clone() for t in first]
    net.step(optimizer=optimizer, **batch(net, seed=1))
    assert all(map(torch.equal, kept, first))
    assert not any(t.requires_grad for t in first)
    assert [tuple(t.shape) for t in first] == [(), (6, 5), (2,)]
    unlocked = network(unlocked=True)
    result = unlocked.step(optimizer=OPTIMIZERS["sgd"](unlocked.parameters()), **given)
    assert result.synthesis_loss.shape == (2, 2)


def test_the_loss_falls():
    torch.manual_seed(0)
    layers = [nn.Linear(7, 32), nn.BatchNorm1d(32), nn.ReLU()]
    layers += [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)]
    net = fastdni.decouple(nn.Sequential(*layers), context_dim=5)
    groups = [
        {"params": net.stage_parameters(), "lr": 3e-3},
        {"params": net.synthesizer_parameters(), "lr": 3e-5},
    ]
    optimizer = torch.optim.Adam(groups)
    x = torch.randn(256, 7)
    target = (x @ torch.randn(7, 5)).argmax(1)
    losses = [net.step(x, target, optimizer).loss.item() for _ in range(300)]
    assert losses[-1] < 0.3 * losses[0]


# ---- decouple ----


def test_decouple_shares_the_layers_of_the_model():
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Linear(8, 6),
        nn.Tanh(),
        nn.Linear(6, 5),
    )
    x = torch.randn(4, 3, 4)
    expected = model.train()(x)
    model[1][1].reset_running_stats()
    net = fastdni.decouple(model, context_dim=5)
    assert [len(stage) if isinstance(stage, nn.Sequential) else 1 for stage in net.stages] == [
        4,
        2,
        1,
    ]
    torch.testing.assert_close(net(x), expected)
    assert {id(p) for p in net.stage_parameters()} == {id(p) for p in model.parameters()}
    assert not any(p.any() for p in net.synthesizer_parameters()), "linear ones start at zero"


def test_decouple_makes_the_synthesizers_asked_for():
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    (mlp,) = fastdni.decouple(model, "mlp", context_dim=3).synthesizers
    assert [layer.out_features for layer in mlp.layers] == [1024, 8]
    assert mlp.input_context.in_features == 3
    assert mlp.input_trigger.weight.any() and not mlp.layers[-1].bias.any()
    seen = []

    def factory(shape):
        seen.append(shape)
        return nn.Linear(*shape, *shape)

    fastdni.decouple(model, factory)
    convolutions = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(convolutions, nn.Linear(12, 5))
    mean = convolutions[1].running_mean.clone()
    fastdni.decouple(model, factory, example_input=torch.randn(2, 1, 4, 4))
    assert seen == [torch.Size([8]), torch.Size([12])]
    assert torch.equal(mean, convolutions[1].running_mean), "a look moves no statistics"
    assert model.training and all(m.training for m in model.modules())


# ---- stop and resume ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_from_a_checkpoint_to_the_bit(name):
    def make():
        torch.manual_seed(1)
        net = network(norm=True, context=True, n_hidden=1, dtype=torch.float32)
        optimizer = OPTIMIZERS[name](net.parameters())
        return net, optimizer, StepLR(optimizer, 3, 0.5)

    def go(net, optimizer, scheduler, seeds):
        for seed in seeds:
            net.step(optimizer=optimizer, **batch(net, 30, seed=seed))
            scheduler.step()

    net, optimizer, scheduler = make()
    go(net, optimizer, scheduler, range(4))
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    go(net, optimizer, scheduler, range(4, 9))

    resumed = make()
    file.seek(0)
    for each, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    go(*resumed, range(4, 9))
    found, wanted = (
        [*n.state_dict().values(), *state_of(o)] for n, o in (resumed[:2], (net, optimizer))
    )
    assert all(map(torch.equal, found, wanted))


# ---- explain, memory ----


def test_explain_is_a_table():
    net = network(norm=True)
    text = str(fastdni.explain(net, batch(net)["x"], optimizer_of(net)))
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "fused", "backend", "kernel", "reason"]
    assert lines[1].split() == [
        "0",
        "Linear",
        "->",
        "BatchNorm1d",
        "->",
        "ReLU",
        "True",
        "cpu",
        "sweep",
    ]
    assert len(lines) == 4


def test_memory_does_not_grow():
    net = network((7, 300, 300, 5), dtype=torch.float32)
    optimizer = OPTIMIZERS["adam"](net.parameters())

    def steps(count):
        for seed in range(count):
            net.step(optimizer=optimizer, **batch(net, 60 + seed % 3, seed=seed))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    steps(30)
    before = resident()
    steps(300)
    assert resident() - before < 2 << 20


def test_many_batch_sizes_keep_few_plans():
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for rows in range(2, 40):
        net.step(optimizer=optimizer, **batch(net, rows))
    (part,) = structure(net).parts("cross_entropy", None, 32)
    assert len(part._plans) <= 8
