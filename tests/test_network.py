"""DecoupledSequential as a module, and the ways around the fused step."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from network_cases import OPTIMIZERS, batch, local, network, state_of, structure, train
from torch import nn
from torch.optim.lr_scheduler import StepLR

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def optimizer_of(net):
    return OPTIMIZERS["sgd"](net.parameters())


def steps_of(net, optimizer, count=3, **how):
    """The parameters, statistics and results after some steps."""
    return train(net, optimizer, steps=count, **how)


def reasons(net, optimizer, **how):
    return [row["reason"] for row in fastdni.explain(net, batch(net)["x"], optimizer, **how).rows]


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


# ---- the user's optimizer ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_go_from_fused_to_unfused_and_back(name):
    bias = not name.startswith("adam")
    net = network(norm=True, context=True, bias=bias)
    plain = local(net)
    optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, plain))
    for _ in range(4):
        same(train(net, optimizer, 2), train(plain, own, 2), 1e-9)
        # Each goes on from the other's checkpoint.
        states = [copy.deepcopy(o.state_dict()) for o in (optimizer, own)]
        optimizer.load_state_dict(states[1])
        own.load_state_dict(states[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_that_of_the_optimizers_own_step(name):
    """Keys, dtypes and shapes, in the order of torch."""
    net = network(dtype=torch.float32)
    plain = local(net)
    optimizer, own = (OPTIMIZERS[name](n.parameters()) for n in (net, plain))
    steps_of(net, optimizer, 1)
    steps_of(plain, own, 1)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        found, wanted = optimizer.state.get(p, {}), own.state.get(q, {})
        assert sorted(found) == sorted(wanted)
        for key in wanted:
            assert (found[key].dtype, found[key].shape) == (wanted[key].dtype, wanted[key].shape)
    assert optimizer.state_dict()["state"].keys() == own.state_dict()["state"].keys()


def test_schedulers_give_no_warning_and_are_heeded():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        scheduler = StepLR(optimizer, 2, gamma=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for seed in range(6):
                twin.step(optimizer=optimizer, **batch(twin, seed=seed))
                scheduler.step()
        values.append([*twin.parameters(), *state_of(optimizer)])
    assert structure(net).reasons == [None] * 3 and not reasons(net, optimizer_of(net))[0]
    same(*values)


def test_groups_options_and_tensors_as_learning_rates():
    net = network(context=True)
    plain = local(net)
    values = []
    for twin in (net, plain):
        rate = torch.tensor(0.002, dtype=torch.float64)
        optimizer = torch.optim.Adam(
            [
                {"params": twin.stage_parameters(), "lr": rate, "betas": (0.8, 0.9)},
                {"params": twin.synthesizer_parameters()[:3], "eps": 1e-4, "weight_decay": 0.1},
            ],
            lr=1e-3,
            foreach=False,
        )
        for seed in range(6):
            twin.step(optimizer=optimizer, **batch(twin, seed=seed))
            rate.mul_(0.5)
            optimizer.param_groups[1]["lr"] *= 0.9
        values.append([*twin.parameters(), *state_of(optimizer)])
    same(*values)
    free = net.synthesizer_parameters()[3]
    assert free not in optimizer.state, "what no optimizer holds is not updated"


def test_a_group_that_is_added():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = torch.optim.SGD(twin.stage_parameters(), lr=0.01, momentum=0.9)
        steps_of(twin, optimizer, 2)
        optimizer.add_param_group({"params": twin.synthesizer_parameters(), "momentum": 0.0})
        steps_of(twin, optimizer, 2)
        optimizer.param_groups[1]["momentum"] = 0.5
        values.append(steps_of(twin, optimizer, 2))
    same(*values)


def test_several_optimizers():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizers = [
            torch.optim.SGD(twin.stage_parameters(), lr=0.01, momentum=0.5, dampening=0.1),
            torch.optim.AdamW(twin.synthesizer_parameters(), lr=0.01),
        ]
        for seed in range(4):
            twin.step(optimizer=optimizers, **batch(twin, seed=seed))
        values.append([*twin.parameters(), *state_of(optimizers[0]), *state_of(optimizers[1])])
        assert twin._trainer._optimizers.reason is None
    same(*values)


def test_masked_parameters_have_no_state_yet():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, dampening=0.5)
    plain = local(net)
    own = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, dampening=0.5)
    masks = [[True, False, True], [True, True, False], [True, True, True]]
    for number, mask in enumerate(masks):
        for twin, each in ((net, optimizer), (plain, own)):
            twin.step(optimizer=each, update_mask=mask, **batch(twin, seed=number))
        assert len(optimizer.state) == len(own.state)
        assert (net.stages[1][0].weight in optimizer.state) == (number > 0)
    same(net.parameters(), plain.parameters())


UNFUSED = {
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.001, amsgrad=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.001, maximize=True),
    "subclass": type("Own", (torch.optim.SGD,), {}),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_other_optimizers_take_their_own_step(name):
    net = network(norm=True, context=True, bias=False)
    plain = local(net)
    make = UNFUSED[name]
    values = []
    for twin in (net, plain):
        optimizer = make(twin.parameters()) if name != "subclass" else make(twin.parameters(), 1e-3)
        values.append(steps_of(twin, optimizer, 5))
        assert all(p.grad is None for p in twin.parameters())
    same(*values, 1e-9)
    said = reasons(net, make(net.parameters()) if name != "subclass" else make(net.parameters(), 1))
    word = {"RMSprop": "the optimizer RMSprop", "subclass": "the optimizer Own"}.get(name, name)
    assert all(word in reason for reason in said)


def test_hooks_of_the_optimizers_step_are_called():
    net = network()
    optimizer = optimizer_of(net)
    steps_of(net, optimizer, 1)
    called = []
    handle = optimizer.register_step_post_hook(lambda *arguments: called.append(1))
    steps_of(net, optimizer, 2)
    assert len(called) == 2 and "has hooks" in reasons(net, optimizer)[0]
    handle.remove()
    steps_of(net, optimizer, 2)
    assert len(called) == 2 and reasons(net, optimizer) == [""] * 3


# ---- what changes between steps ----


def changes(net):
    """Ways to change a network; called between steps of the network and of its local twin."""

    def freeze(n):
        n.stages[1][0].weight.requires_grad_(False)

    def thaw(n):
        freeze(n)
        n.stages[1][0].weight.requires_grad_(True)

    def data(n):
        n.stages[0][0].weight.data = 0.5 * n.stages[0][0].weight.data

    def buffer(n):
        n.stages[0][1].reset_running_stats()

    def momentum(n):
        n.stages[0][1].momentum = 0.3

    def norm_eval(n):
        n.stages[1][1].eval()

    def layer(n):
        n.stages[1][2] = nn.Tanh()

    def parameter(n):
        n.stages[0][0].weight.data = n.stages[0][0].weight.data.t().contiguous().t()

    def load(n):
        state = n.state_dict()
        n.load_state_dict({k: (0.9 * v).to(v.dtype) for k, v in state.items()})

    return [freeze, thaw, data, buffer, momentum, norm_eval, layer, parameter, load]


@pytest.mark.parametrize("number", range(9))
def test_a_change_between_steps_is_heeded(number):
    net = network(norm=True, context=True)
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = OPTIMIZERS["nesterov"](twin.parameters())
        steps_of(twin, optimizer, 2)
        changes(twin)[number](twin)
        values.append(steps_of(twin, optimizer, 3))
    same(*values, 1e-10)


def test_another_dtype_between_steps():
    net = network(dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    steps_of(net, optimizer, 2)
    net.double()
    plain = local(net)
    values = [steps_of(n, torch.optim.SGD(n.parameters(), lr=0.01), 2) for n in (net, plain)]
    assert values[0][0].dtype == torch.float64
    same(*values)


def test_a_changed_loss_of_state_is_heeded():
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    plain = local(net)
    own = OPTIMIZERS["adam"](plain.parameters())
    for twin, each in ((net, optimizer), (plain, own)):
        steps_of(twin, each, 2)
        weight = twin.stages[0][0].weight
        each.state[weight]["exp_avg"] = torch.ones_like(weight)
        del each.state[twin.stages[1][0].weight]
    same(steps_of(net, optimizer, 2), steps_of(plain, own, 2))


def test_versions_are_raised():
    """Autograd refuses a backward pass through what a step has changed."""
    net = network(norm=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    steps_of(net, optimizer, 1)
    written = [*net.parameters(), *net.buffers(), *state_of(optimizer)]
    before = [t._version for t in written]
    given = batch(net)
    loss = net(given["x"]).sum()
    net.step(optimizer=optimizer, **given)
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
