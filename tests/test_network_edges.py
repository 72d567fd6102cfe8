"""Networks, optimizers and surroundings at the edges of what a sweep can run."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from network_cases import OPTIMIZERS, batch, local, network, structure, train
from torch import nn

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential, ops


def same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def explained(net, optimizer, **how):
    return fastdni.explain(net, batch(net)["x"], optimizer, **how).rows


def sgd(net):
    return OPTIMIZERS["nesterov"](net.parameters())


# ---- what BatchNorm may be ----

NORMS = {
    "bias alone": lambda norm: setattr(norm, "weight", None),
    "weight alone": lambda norm: setattr(norm, "bias", None),
    "statistics stopped": lambda norm: setattr(norm, "track_running_stats", False),
    "no counter": lambda norm: setattr(norm, "num_batches_tracked", None),
    "negative momentum": lambda norm: setattr(norm, "momentum", -0.1),
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("case", NORMS)
def test_norms_that_torch_treats_on_their_own(case, when):
    net = network(norm=True)
    plain = local(net)
    values = []
    for twin in (net, plain):
        if when == "between":
            train(twin, sgd(twin), 2)
        NORMS[case](twin.stages[0][1])
        values.append(train(twin, sgd(twin), 2))
    same(*values)
    assert "BatchNorm1d" in explained(net, sgd(net))[0]["reason"]


# ---- infinities ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_infinite_bias_masks_a_class(name):
    net = network()
    with torch.no_grad():
        net.stages[-1][0].bias[4] = -torch.inf
    plain = local(net)
    given = batch(net) | {"target": torch.tensor([0, 1, 2, 3, 0, 1])}
    decay = {"weight_decay": 0.0}
    for twin in (net, plain):
        optimizer = OPTIMIZERS[name](twin.parameters())
        optimizer.param_groups[0].update(decay)
        twin.step(optimizer=optimizer, **given)
    assert net.stages[-1][0].bias[4] == -torch.inf
    same(net.parameters(), plain.parameters())


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_infinite_inputs_spread_as_in_torch(activation):
    net = network(activation=activation)
    plain = local(net)
    given = batch(net)
    given["x"][1, 2] = torch.inf
    given["x"][3, 4] = -torch.inf
    for twin in (net, plain):
        twin.backward(**given)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad.isnan(), q.grad.isnan())


# ---- a public attribute, hooks on everything, inference mode ----


def test_bp_lambda_may_change():
    net = network()
    optimizer = sgd(net)
    train(net, optimizer, 1)
    twin = copy.deepcopy(net)
    own = sgd(twin)
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    net.bp_lambda = 1.0
    assert "bp_lambda" in explained(net, optimizer)[0]["reason"]
    net.step(optimizer=optimizer, **batch(net))
    twin.bp_lambda = 1.0
    twin.step(optimizer=own, **batch(net))
    same(net.parameters(), twin.parameters(), 0)


def test_hooks_on_all_modules_are_called():
    net = network()
    train(net, sgd(net), 1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m)))
    try:
        train(net, sgd(net), 1)
        assert seen.count(nn.Linear) == 3 + 2, "those of the stages and of the synthesizers"
        assert not any(row["fused"] for row in explained(net, sgd(net)))
    finally:
        handle.remove()
    assert all(row["fused"] for row in explained(net, sgd(net)))


@pytest.mark.parametrize("make", [copy.deepcopy, local])
def test_inference_mode(make):
    net = make(network())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.inference_mode"):
        net.step(optimizer=sgd(net), **batch(net))
    with torch.no_grad():
        before = [p.clone() for p in net.parameters()]
        net.step(optimizer=sgd(net), **batch(net))
        assert not all(map(torch.equal, before, net.parameters()))


# ---- mixed precision ----


def test_a_local_stage_below_a_fused_one_under_autocast():
    net = network((7, 9, 8, 5), norm=True, dtype=torch.float32)
    net.stages[0].register_forward_hook(lambda *arguments: None)
    with torch.autocast("cpu", torch.bfloat16):
        result = net.step(optimizer=sgd(net), **batch(net))
        assert result.loss.isfinite()
        # An input that autocast made is taken, too.
        fused = network((7, 9, 5), dtype=torch.float32)
        given = batch(fused)
        given["x"] = given["x"].bfloat16()
        assert fused.step(optimizer=sgd(fused), **given).output.dtype == torch.float32
    assert [row["fused"] for row in explained(net, sgd(net))] == [False, True, True]


def test_explain_names_autocast_and_the_reference():
    net = network(dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        assert {row["reason"] for row in explained(net, sgd(net))} == {"autocast to torch.float16"}
    with fastdni.use_backend("reference"):
        rows = explained(net, sgd(net))
    assert not any(row["fused"] for row in rows)
    assert all("plain PyTorch" in row["reason"] for row in rows)


# ---- numbers of the optimizer ----


def adam(net, **how):
    return torch.optim.Adam(net.parameters(), **how)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_learning_rate_in_a_tensor_is_read_at_every_step(name):
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        rate = torch.tensor(0.01, dtype=torch.float64)
        optimizer = kinds[name](twin.parameters(), lr=rate, foreach=False)
        found = train(twin, optimizer, 3)
        rate.fill_(0.02)
        found += train(twin, optimizer, 2)
        optimizer.param_groups[0]["lr"] = 0.02  # as large, and no tensor
        found += train(twin, optimizer, 1)
        optimizer.param_groups[0]["lr"] = rate
        rate.fill_(0.005)
        values.append(found + train(twin, optimizer, 2))
    same(*values)
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.01))
    assert not explained(net, optimizer)[0]["reason"]


def test_tensors_among_the_numbers_take_the_optimizers_own_step():
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        betas = (torch.tensor(0.8), torch.tensor(0.9))
        optimizer = adam(twin, betas=betas, foreach=False)
        train(twin, optimizer, 2)
        optimizer.param_groups[0]["weight_decay"] = decay = torch.tensor(0.1)
        train(twin, optimizer, 1)
        decay.fill_(0.2)
        values.append(train(twin, optimizer, 2))
    same(*values)
    assert "a tensor among its numbers" in explained(net, optimizer_of(net))[0]["reason"]


def optimizer_of(net):
    return adam(net, betas=(torch.tensor(0.8), torch.tensor(0.9)), foreach=False)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_decoupled_weight_decay_is_the_groups(make):
    net = network()
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = make(twin.parameters(), lr=0.01, weight_decay=0.1)
        train(twin, optimizer, 2)
        group = optimizer.param_groups[0]
        group["decoupled_weight_decay"] = not group["decoupled_weight_decay"]
        values.append(train(twin, optimizer, 2))
    same(*values, 1e-9)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}])
def test_torchs_ways_to_take_the_same_step(how):
    net = network(dtype=torch.float32)
    plain = local(net)
    values = []
    for twin in (net, plain):
        optimizer = adam(twin, **how)
        values.append(train(twin, optimizer, 2))
    same(*values, 1e-5)


def test_the_state_is_in_torchs_order():
    net = network()
    plain = local(net)
    orders = []
    for twin in (net, plain):
        optimizer = adam(twin)
        train(twin, optimizer, 1)
        orders.append(list(optimizer.state_dict()["state"]))
    assert orders[0] == orders[1]


def test_groups_whose_parameters_are_a_tuple():
    net = network()
    optimizer = sgd(net)
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    assert net.step(optimizer=optimizer, **batch(net)).loss.isfinite()
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:2]
    before = net.stages[1][0].weight.clone()
    net.step(optimizer=optimizer, **batch(net))
    assert torch.equal(before, net.stages[1][0].weight)


def test_state_that_lacks_something():
    net = network()
    optimizer = adam(net)
    train(net, optimizer, 1)
    del optimizer.state[net.stages[0][0].weight]["exp_avg"]
    with pytest.raises(RuntimeError, match="net.step: optimizer state must hold exp_avg, exp_avg_"):
        net.step(optimizer=optimizer, **batch(net))


def test_masks_make_no_plans():
    net = network((5,) * 18)
    optimizer = sgd(net)
    generator = torch.Generator().manual_seed(0)
    for seed in range(200):
        mask = torch.rand(17, generator=generator) < 0.5
        net.step(optimizer=optimizer, update_mask=mask.tolist(), **batch(net, seed=seed))
    (part,) = structure(net).parts("cross_entropy", None, 32)
    assert len(part._plans) == 1


def test_three_hundred_stages():
    net = network((4,) * 300 + (5,))
    twin = copy.deepcopy(net)
    found = train(net, sgd(net), 2)
    assert structure(net).reasons == [None] * 300
    same(found, train(twin, sgd(twin), 2, backend="reference"), 1e-9)


# ---- stages of other kinds ----


def test_heads_that_are_not_what_they_begin_with():
    for head, target, criterion in (
        (nn.Sequential(nn.Linear(9, 10), nn.GLU()), torch.randn(6, 5).double(), "mse"),
        (
            nn.Sequential(nn.Linear(9, 10), nn.Unflatten(1, (2, 5))),
            torch.ones(6, 5).long(),
            "cross_entropy",
        ),
    ):
        net = DecoupledSequential(
            nn.Linear(7, 9), head, synthesizers=[BasicSynthesizer(9)]
        ).double()
        assert net.step(torch.randn(6, 7).double(), target, sgd(net), criterion).loss.isfinite()


def test_a_norm_over_positions_takes_one_row():
    net = DecoupledSequential(
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Flatten()),
        nn.Linear(12, 5),
        synthesizers=[BasicSynthesizer(12)],
    )
    assert net.step(torch.randn(1, 8), torch.tensor([2]), sgd(net)).loss.isfinite()


def test_layers_that_work_in_place_may_come_first():
    def make():
        torch.manual_seed(0)
        return DecoupledSequential(
            nn.Linear(7, 9),
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(9, 5)),
            synthesizers=[BasicSynthesizer(9)],
        )

    net, plain = make(), make()
    plain.stages[1][0].inplace = False
    for twin in (net, plain):
        torch.manual_seed(1)
        twin.step(torch.randn(6, 7), torch.randint(5, (6,)), sgd(twin))
    same(net.parameters(), plain.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_stage():
    stage = torch.jit.script(nn.Sequential(nn.Linear(7, 9), nn.ReLU()))
    net = DecoupledSequential(stage, nn.Linear(9, 5), synthesizers=[BasicSynthesizer(9)])
    before = [p.clone() for p in net.parameters()]
    for _ in range(2):
        net.step(torch.randn(6, 7), torch.randint(5, (6,)), sgd(net))
    assert not torch.equal(before[0], next(net.parameters()))


def test_one_stage_is_a_network():
    for how in ({}, {"input_synthesizers": []}):
        net = DecoupledSequential(nn.Linear(7, 5), synthesizers=[], **how).double()
        plain = local_linear(net)
        values = [train(n, sgd(n), 3) for n in (net, plain)]
        same(*values)
        assert values[0][2].shape == (0,)


def local_linear(net):
    twin = copy.deepcopy(net)
    twin.stages[0].register_forward_hook(lambda *arguments: None)
    return twin


def test_decouple_knows_what_keeps_a_shape():
    model = nn.Sequential(nn.Linear(7, 9), nn.PReLU(), nn.Dropout(), nn.Linear(9, 8), nn.GLU())
    model.append(nn.Linear(4, 5))
    with pytest.raises(ValueError, match="the shape of stage 1's output"):
        fastdni.decouple(model)
    net = fastdni.decouple(model, example_input=torch.ones(2, 7))
    assert [len(stage) for stage in net.stages[:2]] == [3, 2]
    assert [s.input_trigger.in_features for s in net.synthesizers] == [9, 4]


# ---- threads ----


def test_threads_that_step_one_network_do_not_crash():
    net = network((7, 60, 60, 5), context=True, dtype=torch.float32)
    optimizer = sgd(net)
    failed = []

    def work(seed):
        try:
            for number in range(60):
                net.step(optimizer=optimizer, **batch(net, 20 + seed, seed=number))
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_networks_in_threads_of_their_own_are_independent():
    nets = [network((7, 40, 30, 5), norm=True, dtype=torch.float32) for _ in range(3)]
    expected = [train(twin, sgd(twin), 20) for twin in map(copy.deepcopy, nets)]
    found = [None] * 3

    def work(number):
        found[number] = train(nets[number], sgd(nets[number]), 20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert all(map(torch.equal, a, b))


# ---- the ops ----


def test_parts_of_networks_are_not_stepped_as_a_whole():
    from sweep_problem import OPTIMIZERS as SETTINGS
    from sweep_problem import stages

    plan = ops.SweepPlan(stages(), 4, "cross_entropy", input_gradient=True)
    x, target = torch.randn(4, 7).double(), torch.zeros(4).long()
    given = ([], [0] * len(plan.parameters), ops.flat([SETTINGS["sgd"]]), [1] * 4)
    with pytest.raises(RuntimeError, match="plan must be one of a whole network"):
        ops.sweep_(plan, x, target, None, *given)
    part = ops.SweepPlan(stages((7, 9), top=True), 4)
    ops.sweep_forward_(part, x, None, None, [1, 1])
    with pytest.raises(RuntimeError, match="gradient must be given for the topmost synthesizer"):
        ops.sweep_update_(
            part, None, [], [0] * len(part.parameters), ops.flat([SETTINGS["sgd"]]), [1, 1]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_over_the_whole_range(activation, dtype):
    """Through an identity layer, so that h is phi(x): within 4 units of torch's in float64."""
    from sweep_problem import stages

    magnitudes = torch.logspace(-40, 3, 4001, dtype=torch.float64)
    special = torch.tensor([0.0, torch.inf, 87.0, 88.5, 708.0, 709.5, 745.0], dtype=torch.float64)
    points = torch.cat([magnitudes, special])
    points = torch.cat([points, -points, torch.tensor([torch.nan])]).to(dtype)[:, None]
    (stage,) = stages((1, 1), activation=activation, top=True)
    stage = stage._replace(weight=torch.ones(1, 1, dtype=dtype), bias=torch.zeros(1, dtype=dtype))
    stage = stage._replace(
        synthesizer=type(stage.synthesizer)(
            [torch.zeros(1, 1, dtype=dtype)], [torch.zeros(1, dtype=dtype)]
        )
    )
    plan = ops.SweepPlan([stage], len(points))
    found, *_ = ops.sweep_forward_(plan, points, None, None, [1, 1])
    oracle = getattr(torch, activation)(points.double())
    assert torch.equal(found.isnan(), oracle.isnan())
    off = (found.double() - oracle).abs().nan_to_num()
    unit = torch.finfo(dtype).eps * oracle.abs().nan_to_num()
    tiny = torch.finfo(dtype).tiny  # below it numbers lose digits
    assert (off <= 4 * unit + 2 * tiny).all()
    assert F.relu(found).nan_to_num().max() == 1
