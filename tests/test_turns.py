"""Steps that differ from the one before in how they are called: data in the network's own memory,
other optimizers, criteria, contexts, masks, layouts, labels and surroundings, in turns."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_cases import CONTEXT, OPTIMIZERS, batch, network
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from repeating import made, take
from torch import nn

import fastdni

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


@pytest.mark.parametrize("path", ["repeated", "in parts", "the reference"])
@pytest.mark.parametrize("kind", ["nesterov", "adam"])
@pytest.mark.parametrize("case", OVERLAPS)
def test_data_in_the_memory_of_the_network(case, kind, path, monkeypatch):
    net, optimizer, twin, own = made(kind)
    if path == "in parts":
        for n in (net, twin):
            n.stages[1].append(nn.Softsign())
    elif path == "the reference":
        monkeypatch.setattr(fastdni.backend, "_default", "reference")
    criterion = "mse" if "target" in case else "cross_entropy"
    for seed in range(3):
        given = batch(net, criterion=criterion, seed=seed)
        given["context"] = torch.randn(6, CONTEXT, dtype=torch.float64)
        results = net.step(optimizer=optimizer, **given | OVERLAPS[case](net))
        # The data is what it was when the step was called.
        copied = {name: data.clone() for name, data in OVERLAPS[case](twin).items()}
        expected = plain_step(twin, optimizer=own, **given | copied)
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)
    assert_same_state(optimizer, own)


def test_a_context_in_the_memory_of_a_running_mean():
    """Read once more after the statistics have moved."""
    net = network((7, 6 * CONTEXT, 6, 5), norm=True, context=True, bias=False)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(5):
        given, expected = batch(net, seed=seed), batch(net, seed=seed)
        given["context"] = net.stages[0][1].running_mean.view(6, CONTEXT)
        expected["context"] = twin.stages[0][1].running_mean.view(6, CONTEXT).clone()
        net.step(optimizer=optimizer, **given)
        plain_step(twin, optimizer=own, **expected)
        assert_same(net, twin)


# ---- surroundings, and how a step is called ----


def test_another_optimizer_with_the_same_groups():
    net, optimizer, twin, own = made("adam")
    second, theirs = (copy.copy(o) for o in (optimizer, own))
    for each, like in ((second, optimizer), (theirs, own)):
        each.param_groups = [dict(g, lr=0.05) for g in like.param_groups]
    for seed, (one, of) in enumerate(((optimizer, own), (second, theirs)) * 2):
        take(net, one, twin, of, batch(net, seed=seed))


def test_parameters_that_change_their_groups():
    """In the groups' own lists, which stay as long as they were."""
    net = network(n_hidden=1, context=True)
    twin = copy.deepcopy(net)
    optimizer, own = (
        torch.optim.SGD(
            [
                {"params": n.stage_parameters(), "lr": 0.01},
                {"params": n.synthesizer_parameters(), "lr": 0.001},
            ]
        )
        for n in (net, twin)
    )
    for seed in range(6):
        if seed == 4:
            for each in (optimizer, own):
                one, other = (group["params"] for group in each.param_groups)
                one[0], other[0] = other[0], one[0]
        take(net, optimizer, twin, own, batch(net, seed=seed))


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


@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_a_mask_that_stays(kind):
    """However it is written down."""
    net, optimizer, twin, own = pairs = made(kind)
    mask = [True, False, True]
    for seed, given in enumerate(
        (mask, mask, tuple(mask), mask[:], [1, 0, 2], mask, np.array(mask), mask, mask)
    ):
        take(*pairs, batch(net, seed=seed) | {"update_mask": given})
    assert net._trainer._last is not None  # it is repeated
    mask[:] = [False, True, True]
    for seed in range(2):
        take(*pairs, batch(net, seed=seed) | {"update_mask": mask})
    for wrong in ([False, True], [], "yes", [torch.ones(2), True, True]):
        take(*pairs, batch(net) | {"update_mask": mask})
        with pytest.raises(ValueError, match="update_mask must be one boolean for each of the 3"):
            net.step(optimizer=optimizer, **batch(net), update_mask=wrong)
    net.step(optimizer=optimizer, **batch(net), update_mask=(m for m in mask))
    plain_step(twin, optimizer=own, **batch(net), update_mask=mask)
    assert_same(net, twin)


def test_a_sparse_target():
    net, optimizer, twin, own = pairs = made("nesterov")
    for seed in range(3):
        given = batch(net, criterion="mse", seed=seed)
        given["context"] = torch.randn(6, CONTEXT, dtype=torch.float64)
        take(*pairs, given)
        net.step(optimizer=optimizer, **given | {"target": given["target"].to_sparse()})
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)


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


@pytest.mark.parametrize("repeated", [False, True])
def test_a_label_beyond_the_context(repeated):
    """The first that has no place in it, among the classes that the network knows."""
    net = network((7, 9, 6, CONTEXT + 3), context=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = batch(net)
    for _ in range(3 if repeated else 0):
        net.step(optimizer=optimizer, **given)
    kept = [t.clone() for t in net.state_dict().values()]
    given["target"][2] = CONTEXT
    with pytest.raises(RuntimeError, match=f"label {CONTEXT} has no place"):
        net.step(optimizer=optimizer, **given)
    assert all(map(torch.equal, kept, net.state_dict().values()))


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
