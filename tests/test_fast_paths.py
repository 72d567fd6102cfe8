"""What users write every day takes the fused path: images that are flattened first, schedulers."""

import pytest
import torch
from network_cases import OPTIMIZERS, batch, network
from paths import assert_fused, calls_of, depth_of, take
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from torch import nn
from torch.optim import lr_scheduler

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential

# ---- images ----


def images(net_input, *layers):
    model = [nn.Flatten(*layers), nn.Linear(net_input, 9), nn.ReLU()]
    model += [nn.Linear(9, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)]
    return fastdni.decouple(nn.Sequential(*model), context_dim=5).double()


SHAPES = [(12,), (3, 4), (1, 3, 4), (3, 2, 2), (1, 2, 2, 3)]


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_leading_flatten_is_fused(shape, kind):
    net = images(12)
    net.stages[1][0].register_parameter("bias", None)
    optimizer = OPTIMIZERS[kind](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(4):
        torch.manual_seed(seed)
        x, target = torch.randn(6, *shape).double(), torch.randint(5, (6,))
        assert_fused(net, x, optimizer)
        take(net, optimizer, twin, own, {"x": x, "target": target})
    for memory in (torch.channels_last, torch.contiguous_format):
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory)
        take(net, optimizer, twin, own, {"x": x.transpose(0, 0), "target": target})
    take(net, optimizer, twin, own, {"x": x[:1].expand_as(x), "target": target})


def test_image_shapes_in_turns():
    net = images(12)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for number, shape in enumerate([*SHAPES, *reversed(SHAPES)] * 2):
        torch.manual_seed(number)
        x = torch.randn(6, *shape).double()
        take(net, optimizer, twin, own, {"x": x, "target": torch.randint(5, (6,))})


def test_a_flatten_that_changes():
    net = images(12)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    given = {"x": torch.randn(6, 3, 4).double(), "target": torch.randint(5, (6,))}
    for _ in range(3):
        take(net, optimizer, twin, own, given)
    for one in (net, twin):
        one.stages[0][0].register_forward_hook(lambda module, arguments, output: 2 * output)
    take(net, optimizer, twin, own, given)
    for one in (net, twin):
        one.stages[0][0] = nn.Flatten(0)
    with pytest.raises(RuntimeError):
        net.step(optimizer=optimizer, **given)


@pytest.mark.parametrize(
    "start, end, shape", [(2, -1, (2, 3, 4)), (1, 2, (3, 4, 12)), (0, 1, (12,))]
)
def test_other_flattens(start, end, shape):
    """Each a layer of its own kind: what it gives to the Linear is what torch gives."""
    torch.manual_seed(0)
    net = DecoupledSequential(
        nn.Sequential(nn.Flatten(start, end), nn.Linear(12, 9), nn.ReLU(), nn.Flatten()),
        nn.LazyLinear(5),
        synthesizers=[nn.Identity()],
    )
    x = torch.randn(6, *shape) if start else torch.randn(1, 6, 12)
    net(x)
    width = net.stages[1].in_features
    net.synthesizers[0] = BasicSynthesizer(width)
    net.double()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    given = {"x": x.double(), "target": torch.randint(5, (6,))}
    for _ in range(3):
        take(net, optimizer, twin, own, given) if start else taken_as_torch(net, given)


def taken_as_torch(net, given):
    """A Flatten over the batch: x is (1, 6, 12), and its rows are not the target's."""
    with pytest.raises(RuntimeError, match="net.step: "):
        net.step(optimizer=OPTIMIZERS["sgd"](net.parameters()), **given)


# ---- schedulers ----

SCHEDULERS = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=40),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, 0.01, total_steps=40, three_phase=True, anneal_strategy="linear"
    ),
    "OneCycleLR, no momentum": lambda o: lr_scheduler.OneCycleLR(
        o, 0.01, total_steps=40, cycle_momentum=False
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 4),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}


@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error")
def test_schedulers_cost_nothing(name, kind):
    net = network(context=True)
    optimizer = OPTIMIZERS[kind](net.parameters())
    given = batch(net)
    for _ in range(4):
        net.step(optimizer=optimizer, **given)
    usual = calls_of(lambda: net.step(optimizer=optimizer, **given))
    twin, own = twin_of(net, optimizer)
    schedulers = [SCHEDULERS[name](each) for each in (optimizer, own)]
    counts = []
    for seed in range(12):
        given = batch(net, seed=seed)
        counts.append(calls_of(lambda g=given: net.step(optimizer=optimizer, **g)))
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)
        for scheduler in schedulers:
            scheduler.step()
    assert_fused(net, given["x"], optimizer)
    assert_same_state(optimizer, own)
    # To read a few numbers anew, and not to prepare a step.
    assert max(counts[2:]) <= usual + 20


def test_numbers_changed_by_hand_cost_nothing():
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = batch(net)
    for _ in range(4):
        net.step(optimizer=optimizer, **given)
    usual = calls_of(lambda: net.step(optimizer=optimizer, **given))
    twin, own = twin_of(net, optimizer)
    for number in range(6):
        for each in (optimizer, own):
            group = each.param_groups[0]
            group.update(lr=0.01 / (number + 1), betas=(0.9 - 0.01 * number, 0.99))
            group.update(eps=1e-8 * number + 1e-9, weight_decay=0.01 * number)
        count = calls_of(lambda: net.step(optimizer=optimizer, **given))
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)
        assert count <= usual + 20, number


def test_a_repeated_step_is_reached_in_five_calls():
    net = network(n_hidden=1, context=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = batch(net)
    for _ in range(4):
        net.step(optimizer=optimizer, **given)
    assert 1 <= depth_of(lambda: net.step(optimizer=optimizer, **given)) <= 5
