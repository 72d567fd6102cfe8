"""What changes between two steps is heeded: each change, after steps that were repeated, gives the
values of a step that knows nothing of the ones before."""

import copy
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from call_mutations import CALLS
from network_cases import CONTEXT, OPTIMIZERS, batch, network
from network_mutations import NETWORKS
from optimizer_mutations import OPTIMIZERS as CHANGES
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from torch import nn

import fastdni


def made(kind, **how):
    """A network that has repeated a step, its optimizer, and the same for the oracle."""
    options = {"norm": True, "n_hidden": 1, "context": True, "bias": kind == "nesterov"} | how
    net = network(**options)
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(4):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    return net, optimizer, *twin_of(net, optimizer)


def take(net, optimizer, twin, own, given) -> None:
    """A step of both, and whether all of it is the same."""
    results = net.step(optimizer=optimizer, **given)
    expected = plain_step(twin, optimizer=own, **given)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert_same(net, twin)
    assert_same_state(optimizer, own)


def hold_its_own(optimizer, net) -> None:
    """Takes parameters that the network has lost out of the optimizer: it must hold no other."""
    own = set(map(id, net.parameters()))
    for group in optimizer.param_groups:
        if not own.issuperset(map(id, group["params"])):
            group["params"] = [p for p in group["params"] if id(p) in own]


def change_and_compare(change, kind, **how):
    pairs = made(kind, **how)
    net, optimizer, twin, own = pairs
    with ExitStack() as undo:
        for one, of in ((net, optimizer), (twin, own)):
            torch.manual_seed(1)
            with ExitStack() as passing:  # what is process-wide is done once
                change(one, of, undo if one is twin else passing)
            hold_its_own(of, one)
        for seed in range(3):
            take(*pairs, batch(net, seed=10 + seed))
    for seed in range(2):  # and what was undone is heeded, too
        take(*pairs, batch(net, seed=20 + seed))


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("name", NETWORKS | CALLS)
def test_a_changed_network(name, kind):
    change_and_compare((NETWORKS | CALLS)[name], kind)


@pytest.mark.parametrize(
    "name, kind",
    [(name, kind) for name, (kinds, _) in CHANGES.items() for kind in kinds],
)
def test_a_changed_optimizer(name, kind):
    change_and_compare(CHANGES[name][1], kind, norm=name != "eps")


# ---- numbers that change where they are ----


def test_betas_in_a_list_change_in_place():
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        each.param_groups[0]["betas"] = [0.9, 0.99]
    for seed, value in enumerate((0.9, 0.9, 0.1, 0.5, 0.5)):
        for each in (optimizer, own):
            each.param_groups[0]["betas"][seed % 2] = value
        take(*pairs, batch(net, seed=seed))


def test_a_rate_in_a_tensor_changes_in_place():
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        each.param_groups[0].update(lr=torch.tensor(0.01, dtype=torch.float64))
    for seed in range(5):
        for each in (optimizer, own):
            each.param_groups[0]["lr"].mul_(0.5)
        take(*pairs, batch(net, seed=seed))


def test_state_from_json():
    """Tuples come back as lists."""
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        state = copy.deepcopy(each.state_dict())
        for group in state["param_groups"]:
            group["betas"] = list(group["betas"])
        each.load_state_dict(state)
    for seed in range(4):
        if seed == 2:
            for each in (optimizer, own):
                each.param_groups[0]["betas"][0] = 0.1
        take(*pairs, batch(net, seed=seed))


def test_counts_in_float64_for_the_whole_history():
    """As torch makes them where float64 is the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        net, optimizer, twin, own = pairs = made("adam")
        for seed in range(3):
            take(*pairs, batch(net, seed=seed))
        assert {e["step"].dtype for e in optimizer.state.values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)
    take(*pairs, batch(net, seed=9))


def test_many_counts_in_float64_are_exact():
    """A count that float32 could not hold."""
    net, optimizer, twin, own = pairs = made("adam")
    for each in (optimizer, own):
        for entry in each.state.values():
            entry["step"] = torch.tensor(2.0**24, dtype=torch.float64)
    for seed in range(3):
        take(*pairs, batch(net, seed=seed))
    assert {e["step"].item() for e in optimizer.state.values()} == {2.0**24 + 3}


# ---- weights that are no parameters ----


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("place", ["stage", "head", "synthesizer", "within a synthesizer"])
def test_a_weight_that_is_computed_anew_for_each_step(place, kind):
    net, optimizer, twin, own = pairs = made(kind, n_hidden=2)
    places = {
        "stage": lambda n: n.stages[1][0],
        "head": lambda n: n.stages[2][0],
        "synthesizer": lambda n: n.synthesizers[0].input_trigger,
        "within a synthesizer": lambda n: n.synthesizers[1].layers[0],
    }
    learned = []
    for one, of in ((net, optimizer), (twin, own)):
        layer = places[place](one)
        value = layer.weight.detach().clone()
        learned.append(nn.Parameter(value / 2))
        layer.value = learned[-1]
        of.add_param_group({"params": [learned[-1]]})
        del layer.weight
        hold_its_own(of, one)
    start = learned[0].clone()
    for seed in range(4):
        for one in (net, twin):
            layer = places[place](one)
            layer.weight = layer.value * 2
        take(*pairs, batch(net, seed=seed))
    assert not torch.equal(start, learned[0]), "the parameter behind the weight learns"


@pytest.mark.parametrize("place", ["stage", "synthesizer"])
def test_a_weight_that_is_a_plain_tensor(place):
    """Without a gradient: it is used, and stays."""
    net, optimizer, twin, own = pairs = made("nesterov")
    for seed in range(4):
        for one in (net, twin):
            layer = one.stages[1][0] if place == "stage" else one.synthesizers[1].input_trigger
            if "weight" in layer._parameters:
                layer.kept = layer.weight
                del layer.weight
            layer.weight = layer.kept.detach() * (1 + seed)
        take(*pairs, batch(net, seed=seed))


# ---- data that overlaps what a step writes ----

OVERLAPS = {
    "context in a running mean": lambda n: {
        "context": n.stages[0][1].running_mean[:5].expand(6, 5)
    },
    "context in a variance": lambda n: {"context": n.stages[1][1].running_var[:5].expand(6, 5)},
    "context in a weight": lambda n: {"context": n.stages[0][0].weight.detach()[:6, :5]},
    "x in a running mean": lambda n: {"x": n.stages[0][1].running_mean.as_strided((6, 7), (0, 1))},
    "x in a weight": lambda n: {"x": n.stages[0][0].weight.detach()[:6]},
    "x in a synthesizer": lambda n: {"x": n.synthesizers[0].layers[0].weight.detach()[:6, :7]},
    "target in a weight": lambda n: {"target": n.stages[2][0].weight.detach().t()},
    "target in a bias": lambda n: {"target": n.stages[2][0].bias.detach().expand(6, 5)},
}


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("case", OVERLAPS)
def test_data_in_the_memory_of_the_network(case, kind):
    net, optimizer, twin, own = made(kind)
    criterion = "mse" if "target" in case else "cross_entropy"
    for seed in range(3):
        given = batch(net, criterion=criterion, seed=seed)
        given["context"] = torch.randn(6, CONTEXT, dtype=torch.float64)
        results = net.step(optimizer=optimizer, **given | OVERLAPS[case](net))
        expected = plain_step(twin, optimizer=own, **given | OVERLAPS[case](twin))
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)
    assert_same_state(optimizer, own)


# ---- surroundings, and how a step is called ----


def test_another_optimizer_with_the_same_groups():
    net, optimizer, twin, own = made("adam")
    second, theirs = (copy.copy(o) for o in (optimizer, own))
    for each, like in ((second, optimizer), (theirs, own)):
        each.param_groups = [dict(g, lr=0.05) for g in like.param_groups]
    for seed, (one, of) in enumerate(((optimizer, own), (second, theirs)) * 2):
        take(net, one, twin, of, batch(net, seed=seed))


def test_optimizers_in_turns():
    net, optimizer, twin, own = made("adam")
    others = torch.optim.SGD(net.parameters(), lr=0.01), torch.optim.SGD(twin.parameters(), lr=0.01)
    for seed in range(6):
        one, of = (optimizer, own) if seed % 2 else others
        take(net, one, twin, of, batch(net, seed=seed))


def test_a_sequence_of_optimizers_that_changes():
    net, _, twin, _ = made("adam")
    pairs = [
        [
            torch.optim.Adam(n.stage_parameters(), lr=0.01),
            torch.optim.SGD(n.synthesizer_parameters(), lr=0.01),
        ]
        for n in (net, twin)
    ]
    for seed, count in enumerate((2, 2, 1, 2, 1, 1)):
        given = batch(net, seed=seed)
        net.step(optimizer=pairs[0][:count], **given)
        plain_step(twin, optimizer=pairs[1][:count], **given)
        assert_same(net, twin)


def test_a_list_of_optimizers_that_is_changed_in_place():
    net, _, twin, _ = made("adam")
    lists = []
    for n in (net, twin):
        lists.append([torch.optim.SGD(n.stage_parameters(), lr=0.01)])
    for seed in range(5):
        if seed == 3:
            for n, optimizers in zip((net, twin), lists, strict=True):
                optimizers.append(torch.optim.Adam(n.synthesizer_parameters()))
        given = batch(net, seed=seed)
        net.step(optimizer=lists[0], **given)
        plain_step(twin, optimizer=lists[1], **given)
        assert_same(net, twin)


def test_the_criterion_changes():
    net, optimizer, twin, own = pairs = made("nesterov", context=False)
    for seed, criterion in enumerate(("cross_entropy", "mse", "mse", "cross_entropy") * 2):
        take(*pairs, batch(net, criterion=criterion, seed=seed))


def test_a_context_comes_and_goes():
    net, optimizer, twin, own = pairs = made("nesterov")
    for seed, given in enumerate((False, False, True, True, False, True)):
        context = torch.randn(6, CONTEXT, dtype=torch.float64) if given else None
        take(*pairs, batch(net, seed=seed) | {"context": context})


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_masks_in_turns(kind):
    net, optimizer, twin, own = pairs = made(kind)
    masks = [None, None, [True, False, True], None, [False, True, True], [True, True, False]] * 2
    for seed, mask in enumerate(masks):
        take(*pairs, batch(net, seed=seed) | {"update_mask": mask})


def test_layouts_of_the_data():
    """Views, transposed and overlapping memory, another numbering of the same rows."""
    net, optimizer, twin, own = pairs = made("nesterov")
    rows = torch.randn(40, 7, dtype=torch.float64)
    labels = torch.randint(5, (40,))
    contexts = torch.randn(5, 6, dtype=torch.float64).t()
    for x, target in (
        (rows[:6], labels[:6]),
        (rows[6:12], labels[6:12]),
        (rows[::6][:6], labels[::6][:6]),
        (rows.t().contiguous().t()[:6], labels[:6]),
        (rows[:1].expand(6, 7), labels[:1].expand(6)),
        (rows.flatten().as_strided((6, 7), (3, 1)), labels.flip(0)[:6]),
    ):
        take(*pairs, {"x": x, "target": target, "context": contexts})


def test_data_written_in_place_between_steps():
    net, optimizer, twin, own = pairs = made("nesterov")
    given = batch(net) | {"context": torch.randn(6, CONTEXT, dtype=torch.float64)}
    for seed in range(4):
        given["x"].copy_(batch(net, seed=seed)["x"])
        given["target"].copy_(batch(net, seed=seed)["target"])
        given["context"].mul_(0.5)
        take(*pairs, given)


def test_a_neighbours_dtype():
    """A head in float64 over stages in float32: local autograd would refuse it, and so is this."""
    net = network((7, 9, 6, 5), dtype=torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    net.stages[2].double()
    kept = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError):
        net.step(optimizer=optimizer, **batch(net))
    assert all(map(torch.equal, kept, net.parameters()))

    class Cast(nn.Module):
        def forward(self, x):
            return x.double()

    net.stages[2].insert(0, Cast())
    twin, own = twin_of(net, optimizer)
    for seed in range(3):
        given = batch(net, seed=seed)
        net.step(optimizer=optimizer, **given)
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin, 1e-5)


@pytest.mark.parametrize("label", [5, 6, -1, -101, 2**40, -(2**62)])
@pytest.mark.parametrize("where", ["first", "repeated"])
@pytest.mark.parametrize("row", [0, 5])
def test_a_label_out_of_bounds(label, where, row):
    net, optimizer, *_ = made("adam") if where == "repeated" else (network(), None)
    optimizer = optimizer or OPTIMIZERS["adam"](net.parameters())
    kept = [t.clone() for t in net.state_dict().values()]
    given = batch(net)
    given["target"][row] = label
    with pytest.raises(RuntimeError, match=r"net.step: target must .*" + str(label)):
        net.step(optimizer=optimizer, **given)
    assert all(map(torch.equal, kept, net.state_dict().values()))
    given["target"][row] = 4
    net.step(optimizer=optimizer, **given)


def test_the_reason_of_a_step_that_was_repeated():
    """Whoever asks between two repeated steps is told, and the next step is no other."""
    net, optimizer, twin, own = pairs = made("adam")
    for seed in range(4):
        rows = fastdni.explain(net, batch(net)["x"], optimizer).rows
        assert [row["fused"] for row in rows] == [True] * 3
        assert [row["reason"] for row in rows] == [""] * 3
        take(*pairs, batch(net, seed=seed))
    for each in (optimizer, own):
        each.param_groups[0]["weight_decay"] = torch.tensor(0.1, dtype=torch.float64)
        each.param_groups[0]["foreach"] = False
    take(*pairs, batch(net, seed=5))
    for each in (optimizer, own):
        each.param_groups[0]["weight_decay"].fill_(0.7)
    take(*pairs, batch(net, seed=6))
    reason = fastdni.explain(net, batch(net)["x"], optimizer).rows[0]["reason"]
    assert "tensor among" in reason


def test_surroundings_in_turns():
    net, optimizer, twin, own = pairs = made("nesterov")
    for backend in ("auto", "auto", "reference", "auto", "cpu", "reference", "auto"):
        with fastdni.use_backend(backend):
            take(*pairs, batch(net))
    with torch.no_grad():
        take_under_no_grad(pairs)
    take(*pairs, batch(net))


def take_under_no_grad(pairs):
    net, optimizer, twin, own = pairs
    net.step(optimizer=optimizer, **batch(net))
    with torch.enable_grad():
        plain_step(twin, optimizer=own, **batch(net))
    assert_same(net, twin)


def test_gradients_asked_for_between_steps():
    """`net.backward` and an ordinary backward pass leave what they leave, and no step uses it."""
    net, optimizer, twin, own = pairs = made("adam")
    for seed in range(3):
        net.backward(**batch(net, seed=seed))
        F.cross_entropy(net(batch(net)["x"]), batch(net)["target"]).backward()
        twin.load_state_dict(net.state_dict())  # the statistics have moved
        take(*pairs, batch(net, seed=seed))
        assert all(p.grad is None for p in net.parameters())
