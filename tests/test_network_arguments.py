"""A step that is refused says why in one line and changes nothing."""

import math

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network, snapshot
from torch import nn

import fastdni
from fastdni.graphs import _Rate

CONTEXT = torch.ones(6, 5, dtype=torch.float64)


def foreign(net):
    return torch.optim.SGD([*net.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)


# What is given, and what is said: net and its arguments -> changed arguments.
REFUSED = {
    "target rows": (lambda n, a: a | {"target": a["target"][:4]}, r"target must .* got \(4,\)"),
    "target dimensions": (
        lambda n, a: a | {"target": a["target"].unsqueeze(1)},
        r"target must be \(B,\) = \(6,\), got \(6, 1\)",
    ),
    "label above": (
        lambda n, a: a | {"target": a["target"] + 5},
        r"target must hold labels from 0 to 4 \(or -100 for rows to ignore\), got \d in row 0",
    ),
    "label below": (lambda n, a: a | {"target": a["target"] - 50}, "target must hold labels"),
    "target dtype": (
        lambda n, a: a | {"target": a["target"].float()},
        "target must be int64 labels for cross_entropy, got torch.float32",
    ),
    "target None": (lambda n, a: a | {"target": None}, "target must be a tensor .* NoneType"),
    "target shape for mse": (
        lambda n, a: a | {"criterion": "mse", "target": torch.ones(6, 4).double()},
        r"target must be \(B, N\) = \(6, 5\), got \(6, 4\)",
    ),
    "context missing": (
        lambda n, a: a | {"criterion": "mse", "target": torch.ones(6, 5).double()},
        r"context must be \(B, C\) = \(6, 5\), got None, and target holds no labels",
    ),
    "context width": (
        lambda n, a: a | {"context": torch.ones(6, 3).double()},
        r"context must be \(B, C\) = \(6, 5\), got \(6, 3\)",
    ),
    "context rows": (
        lambda n, a: a | {"context": torch.ones(7, 5).double()},
        r"context must be \(B, C\) = \(6, 5\), got \(7, 5\)",
    ),
    "context dimensions": (
        lambda n, a: a | {"context": torch.ones(6, 1, 5).double()},
        r"context must be \(B, C\) = \(6, 5\), got \(6, 1, 5\)",
    ),
    "context of no dimension": (
        lambda n, a: a | {"context": torch.ones(()).double()},
        r"context must be \(B, C\) = \(6, 5\), got \(\)",
    ),
    "context dtype": (
        lambda n, a: a | {"context": torch.ones(6, 5)},
        "context must have .* dtype torch.float64, got torch.float32",
    ),
    "context kind": (
        lambda n, a: a | {"context": [[1.0] * 5] * 6},
        "context must be a tensor, got list",
    ),
    "target dtype for mse": (
        lambda n, a: a | {"criterion": "mse", "target": torch.ones(6, 5)} | {"context": CONTEXT},
        "target must have .* dtype torch.float64, got torch.float32",
    ),
    "probabilities as target": (
        lambda n, a: a | {"target": torch.ones(6, 5).double()},
        "target must be int64 labels for cross_entropy, got torch.float64",
    ),
    "x of one dimension": (lambda n, a: a | {"x": a["x"][:, 0]}, r"x must be .*7\), got \(6,\)"),
    "x kind": (lambda n, a: a | {"x": [1.0]}, "x must be a tensor of at least one row, got list"),
    "x width": (lambda n, a: a | {"x": a["x"][:, :3]}, r"x must be .*7\), got \(6, 3\)"),
    "x dtype": (lambda n, a: a | {"x": a["x"].float()}, "x must have the parameters' dtype"),
    "x rows": (lambda n, a: a | {"x": a["x"][:0]}, r"x must be .* one row, got \(0, 7\)"),
    "x device": (
        lambda n, a: a | {"x": a["x"].to("meta")},
        "x must be on the parameters' device cpu, got meta",
    ),
    "target device": (
        lambda n, a: a | {"target": a["target"].to("meta")},
        "target must be on the parameters' device cpu, got meta",
    ),
    "one row": (
        lambda n, a: a | {"x": a["x"][:1], "target": a["target"][:1]},
        "x must have at least 2 rows for BatchNorm in training, got 1",
    ),
    "criterion": (lambda n, a: a | {"criterion": "hinge"}, 'criterion must be "cross_entropy"'),
    "criterion kind": (lambda n, a: a | {"criterion": 3}, 'criterion must be "cross_entropy"'),
    "mask": (
        lambda n, a: a | {"update_mask": [True]},
        "update_mask must be one boolean for each of the 3 stages, got 1",
    ),
    "mask kind": (
        lambda n, a: a | {"update_mask": 5},
        "update_mask must be one boolean .* got int",
    ),
    "mask of dimensions": (
        lambda n, a: a | {"update_mask": torch.ones(3, 2)},
        "update_mask must be one boolean .* got Tensor",
    ),
    "optimizer with a closure": (
        lambda n, a: a | {"optimizer": torch.optim.LBFGS(n.parameters())},
        r"optimizer must need no closure, got LBFGS; call net.backward\(...\) in one",
    ),
    "one of the optimizers has a closure": (
        lambda n, a: (
            a
            | {
                "optimizer": [
                    torch.optim.RMSprop(n.stage_parameters()),
                    torch.optim.LBFGS(n.synthesizer_parameters()),
                ]
            }
        ),
        "optimizer must need no closure, got LBFGS",
    ),
    "capturable optimizer": (
        lambda n, a: a | {"optimizer": torch.optim.Adam(n.parameters(), capturable=True)},
        "optimizer must not be capturable for parameters on the CPU, got Adam",
    ),
    "foreign optimizer": (
        lambda n, a: a | {"optimizer": foreign(n)},
        r"optimizer must hold parameters of the network alone, got 1 .* net.backward\(...\)",
    ),
    "no optimizer": (
        lambda n, a: a | {"optimizer": None},
        "optimizer must be a torch.optim optimizer or a sequence of them, got NoneType",
    ),
}


def assert_refused(net, optimizer, arguments, message):
    before = snapshot(net, optimizer)
    gradients = [p.grad for p in net.parameters()]
    kept = {p: set(entry) for p, entry in optimizer.state.items()}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"net.step: {message}") as said:
        net.step(**{"optimizer": optimizer} | arguments)
    assert "\n" not in str(said.value)
    assert all(map(torch.equal, before, snapshot(net, optimizer)))
    assert all(a is b.grad for a, b in zip(gradients, net.parameters(), strict=True))
    assert {p: set(entry) for p, entry in optimizer.state.items()} == kept


@pytest.mark.parametrize("path", ["fused", "local", "mixed", "reference"])
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_step_changes_nothing(case, trained, path, request):
    change, message = REFUSED[case]
    net = network(norm=True, context=True)
    if path == "local":
        net = local(net)
    elif path == "mixed":
        net.stages[1].register_forward_hook(lambda *arguments: None)
    elif path == "reference":
        fastdni.set_backend("reference")
        request.addfinalizer(lambda: fastdni.set_backend("auto"))
    optimizer = OPTIMIZERS["adam"](net.parameters())
    arguments = batch(net)
    if trained:
        net.step(optimizer=optimizer, **arguments)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
    assert_refused(net, optimizer, change(net, arguments), message)
    net.step(optimizer=optimizer, **arguments)  # and the next one goes


@pytest.mark.parametrize("path", ["fused", "local"])
@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_that_is_not_finite(name, rate, path):
    net = network(norm=True)
    net = local(net) if path == "local" else net
    optimizer = OPTIMIZERS[name](net.parameters())
    optimizer.param_groups[0]["lr"] = rate
    message = f"optimizer must have finite learning rates, got {rate}"
    assert_refused(net, optimizer, batch(net), message)
    with pytest.raises(ValueError, match="finite"):
        net.step(optimizer=[optimizer], **batch(net))


def test_eval_mode():
    net = network(norm=True)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    net.eval()
    assert_refused(net, optimizer, batch(net), r"the network must be in training mode; call net.tr")


def test_backward_is_named_where_it_was_called():
    net = network()
    with pytest.raises(RuntimeError, match=r"net.backward: target must be \(B,\) = \(6,\)"):
        net.backward(**batch(net) | {"target": torch.zeros(4, dtype=torch.int64)})
    assert all(p.grad is None for p in net.parameters())


def test_a_context_too_narrow_for_the_labels():
    net = network((7, 9, 8), context=True)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    arguments = batch(net) | {"target": torch.tensor([0, 1, 7, 2, 3, 4])}
    message = "context must be given, because the label 7 has no place in a one-hot context of w"
    assert_refused(net, optimizer, arguments, message)
    twin = local(net)
    assert_refused(twin, OPTIMIZERS["sgd"](twin.parameters()), arguments, message)


@pytest.mark.parametrize("hooked", [None, 1])
def test_optimizers_state_of_another_shape(hooked):
    net = network(norm=True)
    if hooked is not None:
        net.stages[hooked].register_forward_hook(lambda *arguments: None)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    net.step(optimizer=optimizer, **batch(net))
    optimizer.state[net.stages[0][0].weight]["exp_avg"] = torch.ones(3).double()
    message = "a parameter's optimizer state .* must be .*torch.float64 .*9, 7"
    assert_refused(net, optimizer, batch(net), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: fastdni.DecoupledSequential(synthesizers=[]), "stages must be at least one"),
        (
            lambda s: fastdni.DecoupledSequential(*s, synthesizers=[]),
            "synthesizers must be one for each of the 1 boundaries between stages, got 0",
        ),
        (
            lambda s: fastdni.DecoupledSequential(*s, synthesizers=[s[0]], input_synthesizers=s),
            "input_synthesizers must be one for each of the 1 boundaries between stages, got 2",
        ),
        (
            lambda s: fastdni.DecoupledSequential(*s, synthesizers=[s[0]], bp_lambda=1.5),
            "bp_lambda must be from 0 to 1, got 1.5",
        ),
        (lambda s: fastdni.decouple(s[0]), "model must be an nn.Sequential, got Linear"),
        (
            lambda s: fastdni.decouple(nn.Sequential(s[0], nn.ReLU())),
            "at least two layers .* got 1",
        ),
        (
            lambda s: fastdni.decouple(nn.Sequential(*s), "deep"),
            'must be "linear", "mlp" or a call',
        ),
        (
            lambda s: fastdni.decouple(nn.Sequential(nn.Conv1d(2, 3, 1), *s)),
            "example_input must be given, because the shape of stage 0's output cannot be read off",
        ),
        (
            lambda s: fastdni.decouple(
                nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), *s),
                example_input=torch.ones(1, 2, 1),
            ),
            None,
        ),
        (
            lambda s: fastdni.decouple(
                nn.Sequential(nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, 1)),
                example_input=torch.ones(1, 2, 4),
            ),
            r'synthesizer "linear" is for boundaries of shape \(features,\), got \(3, 4\)',
        ),
    ],
)
def test_networks_that_cannot_be_made(make, message):
    stages = [nn.Linear(3, 3), nn.Linear(3, 2)]
    if message is None:
        make(stages)
        return
    with pytest.raises(ValueError, match=message) as said:
        make(stages)
    assert "\n" not in str(said.value)


def test_a_graphed_step_needs_a_gpu():
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    given = batch(net)
    with pytest.raises(
        RuntimeError, match="make_graphed_step: x must be on a CUDA device, got cpu"
    ):
        fastdni.make_graphed_step(net, optimizer, given["x"], given["target"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_a_graphed_step_needs_a_capturable_optimizer():
    net = network().cuda()
    given = batch(net)
    with pytest.raises(RuntimeError, match="Adam must be made with capturable=True"):
        fastdni.make_graphed_step(
            net, OPTIMIZERS["adam"](net.parameters()), given["x"].cuda(), given["target"].cuda()
        )


def test_a_graphs_learning_rates_follow_the_optimizers():
    """The hand-over alone: captures and replays are in test_cuda_device.py."""
    group, own = {"lr": 0.5}, {"lr": torch.tensor(0.25)}
    rates = [_Rate(g, torch.device("cpu")) for g in (group, own)]
    kept = own["lr"]
    for rate in rates:
        rate.take()
    read = group["lr"]  # where a graph would read it
    assert read == 0.5 and own["lr"] is kept
    for rate in rates:
        rate.give_back()
    assert group["lr"] == 0.5 and not isinstance(group["lr"], torch.Tensor)
    group["lr"] = 0.125  # as a scheduler does
    for rate in rates:
        rate.refresh()
    assert read == 0.125 and own["lr"] is kept
