"""The ways around the fused step: local stages, gradients alone, mixed precision, backends."""

import copy

import pytest
import torch
import torch.nn.functional as F
from network_cases import (
    OPTIMIZERS,
    batch,
    local,
    network,
    optimizer_of,
    reasons,
    same,
    state_of,
    steps_of,
    train,
)
from torch import nn

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential

# ---- other paths ----


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("unlocked", [False, True], ids=["update unlock", "complete unlock"])
def test_one_local_stage_leaves_the_others_fused(unlocked):
    def make():
        torch.manual_seed(3)
        stages = [
            nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU()),
            nn.Sequential(nn.Linear(9, 8), nn.Tanh()),
            nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()),
            nn.Sequential(nn.Linear(8, 6), nn.Sigmoid()),
            Doubler(),
            nn.Linear(6, 5),
        ]
        widths = (9, 8, 8, 6, 6)
        made = [BasicSynthesizer(n, n_hidden=1, trigger_dim=7) for n in widths]
        net = DecoupledSequential(
            *stages,
            synthesizers=[BasicSynthesizer(n, n_hidden=1, context_dim=5) for n in widths],
            input_synthesizers=made if unlocked else None,
        ).double()
        with torch.no_grad():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return net

    net = make()
    plain = local(net)
    for name in ("nesterov", "adam"):
        for masks in (None, [[True, False, True, True, True, False], [True] * 6]):
            optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, plain))
            same(train(net, optimizer, 4, masks=masks), train(plain, own, 4, masks=masks), 1e-8)
    rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
    assert [row["fused"] for row in rows] == [True, True, False, True, False, True]
    assert "Linear -> LayerNorm -> GELU is not [Flatten] Linear [BatchNorm1d]" in rows[2]["reason"]
    assert rows[4]["stage"] == "Doubler"


def test_a_callable_criterion():
    def weighted(output, target):
        return F.cross_entropy(output, target, label_smoothing=0.1, weight=torch.ones(5).double())

    net = network(norm=True)
    plain = local(net)
    values = [
        train(n, OPTIMIZERS["nesterov"](n.parameters()), 3, criterion=weighted)
        for n in (net, plain)
    ]
    same(*values)
    found = fastdni.explain(net, batch(net)["x"], optimizer_of(net), weighted)
    assert [row["fused"] for row in found.rows] == [True, True, False]
    assert found.rows[2]["reason"] == "the criterion is a callable"
    given = batch(net)
    expected = weighted(net(given["x"]), given["target"])
    torch.testing.assert_close(net.backward(**given | {"criterion": weighted}).loss, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda n: n.stages[0].register_forward_hook(lambda *a: None), "its Sequential has hooks"),
        (lambda n: n.stages[0][0].weight.register_hook(lambda g: g), "a parameter has hooks"),
        (lambda n: nn.utils.parametrizations.weight_norm(n.stages[0][0]), "ParametrizedLinear"),
        (
            lambda n: n.synthesizers[0].register_forward_hook(lambda *a: None),
            "its synthesizer was changed",
        ),
        (
            lambda n: setattr(n.stages[1][0], "weight", n.synthesizers[0].input_trigger.weight),
            "it shares parameters with another module",
        ),
        (lambda n: setattr(n, "bp_lambda", 0.5), "bp_lambda above 0"),
        (
            lambda n: n.synthesizers.__setitem__(0, nn.Bilinear(9, 5, 9).double()),
            "its synthesizer Bilinear is not a BasicSynthesizer",
        ),
    ],
)
def test_what_makes_a_stage_local(change, reason):
    net = network((7, 9, 9, 5), context=True)
    optimizer = optimizer_of(net)
    steps_of(net, optimizer, 1)
    change(net)
    found = reasons(net, optimizer_of(net))
    assert reason in found[0] or reason in found[1]
    plain = local(net) if "hook" not in reason and "changed" not in reason else None
    given = batch(net)
    if "Bilinear" in reason:
        given["context"] = F.one_hot(given["target"], 5).double()
    net.step(optimizer=optimizer_of(net), **given)
    if plain is not None:
        plain.step(optimizer=optimizer_of(plain), **given)
        same(net.parameters(), plain.parameters())


def test_inputs_of_more_than_two_dimensions():
    net = network((7, 9, 5))
    plain = local(net)
    x, target = torch.randn(4, 3, 7).double(), torch.randn(4, 3, 5).double()
    for twin in (net, plain):
        twin.step(x, target, optimizer_of(twin), F.mse_loss)
    same(net.parameters(), plain.parameters())
    assert reasons(net, optimizer_of(net)) == ["", ""]
    found = fastdni.explain(net, x, optimizer_of(net))
    assert {row["reason"] for row in found.rows} == {"the input of these stages is not (B, K)"}


def test_convolutions_embeddings_and_dropout_are_stages():
    torch.manual_seed(0)
    net = DecoupledSequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten()),
        nn.Sequential(nn.Linear(64, 9), nn.ReLU()),
        nn.Linear(9, 5),
        synthesizers=[BasicSynthesizer(64), BasicSynthesizer(9)],
    )
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(3):
        result = net.step(torch.randn(6, 1, 6, 6), torch.randint(5, (6,)), optimizer)
    assert result.output.shape == (6, 5) and result.synthesis_loss.shape == (2,)
    assert all((p != q).any() for p, q in zip(before, net.parameters(), strict=True))
    words = DecoupledSequential(
        nn.Sequential(nn.Embedding(10, 4), nn.Flatten()), nn.Linear(12, 5),
        synthesizers=[BasicSynthesizer(12)],
    )  # fmt: skip
    optimizer = torch.optim.SGD(words.parameters(), lr=0.1)
    for _ in range(2):
        words.step(torch.randint(10, (6, 3)), torch.randint(5, (6,)), optimizer)
    rows = fastdni.explain(words, torch.ones(2, 3).long(), optimizer).rows
    assert [row["fused"] for row in rows] == [False, True]


# ---- backward ----


@pytest.mark.parametrize("unlocked", [False, True])
def test_backward_adds_the_gradients_of_a_step(unlocked):
    net = network(norm=True, context=True, n_hidden=1, unlocked=unlocked)
    plain = local(net)
    before = [p.clone() for p in net.parameters()]
    for seed in range(2):
        a, b = (n.backward(**batch(n, seed=seed)) for n in (net, plain))
        same(a, b)
    same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    same(before, list(net.parameters()), 0)
    net.stages[0][0].weight.grad = net.stages[0][0].weight.grad.t().contiguous().t()
    plain.backward(**batch(net))
    net.backward(**batch(net))
    same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_backward_and_the_optimizers_step_are_a_step():
    net = network(norm=True, context=True, bias=False)
    twin = copy.deepcopy(net)
    optimizer, own = (OPTIMIZERS["adam"](n.parameters()) for n in (net, twin))
    for seed in range(5):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        own.zero_grad()
        twin.backward(**batch(net, seed=seed))
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e9)
        own.step()
    same([*net.parameters(), *state_of(optimizer)], [*twin.parameters(), *state_of(own)], 1e-9)


def test_masked_and_frozen_parameters_keep_their_gradients():
    net = network()
    net.stages[2][0].bias.requires_grad_(False)
    net.backward(update_mask=[False, True, True], **batch(net))
    grads = {name: p.grad is not None for name, p in net.named_parameters()}
    assert not grads["stages.0.0.weight"] and not grads["stages.2.0.bias"]
    assert grads["stages.1.0.weight"] and grads["synthesizers.0.input_trigger.weight"]


def test_a_step_drops_gradients_and_does_not_use_them():
    net = network()
    twin = copy.deepcopy(net)
    net.backward(**batch(net, seed=7))
    for n in (net, twin):
        n.step(optimizer=optimizer_of(n), **batch(n))
        assert all(p.grad is None for p in n.parameters())
    same(net.parameters(), twin.parameters(), 0)


# ---- mixed precision, backends ----


def test_autocast_rounds_the_operands_of_products():
    net = network((7, 40, 30, 5), norm=True, context=True, dtype=torch.float32)
    outcomes = {}
    for how in ("float32", "bfloat16", "local"):
        twin = local(net) if how == "local" else copy.deepcopy(net)
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "float32"):
            values = train(twin, optimizer, 3, rows=30)
        if how != "local":
            assert {v.dtype for v in values} == {torch.float32, torch.int64}
        outcomes[how] = [v.double() for v in values[9:]]

    def off(a, b):
        return sum((x - y).square().sum() for x, y in zip(a, b, strict=True)) ** 0.5

    rounding = off(outcomes["bfloat16"], outcomes["float32"])
    assert 1e-4 < rounding < 3 * off(outcomes["local"], outcomes["float32"])


def test_autocast_to_float16_takes_the_local_path():
    net = network((7, 9, 5), dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        result = net.step(optimizer=optimizer_of(net), **batch(net))
    assert result.loss.isfinite()


def test_the_reference_backend_runs_the_equations():
    net = network(norm=True, context=True)
    with fastdni.use_backend("reference"):
        found = fastdni.explain(net, batch(net)["x"], optimizer_of(net))
    assert {row["backend"] for row in found.rows} == {"reference"}


def test_a_fixed_backend_that_is_not_there():
    net = network().to("meta")
    x, target = torch.ones(2, 7, device="meta").double(), torch.zeros(2, device="meta").long()
    with fastdni.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' has no"):
        net.step(x, target, optimizer_of(net))
