"""What torch takes, a step takes, with torch's values; what torch refuses, a step refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from torch import nn

import fastdni
from fastdni import BasicSynthesizer, DecoupledSequential

MAKERS = {"fused": network, "local": lambda **how: local(network(**how))}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def compare(net, optimizer, steps=4, tolerance=1e-9, change=None, convert=dict, **how):
    """Steps of a network and of the oracle; `change(optimizer, net)` before the third."""
    twin, own = twin_of(net, optimizer)
    for seed in range(steps):
        if seed == 2 and change is not None:
            change(optimizer, net)
            change(own, twin)
        given = convert(batch(net, seed=seed, **how))
        results = net.step(optimizer=optimizer, **given)
        for a, b in zip(results, plain_step(twin, optimizer=own, **given), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert_same(net, twin, tolerance)
    assert_same_state(optimizer, own, tolerance)


# ---- numbers of the optimizer ----

# What torch takes, and how far its own arithmetic in that type is from exact: numpy's and torch's
# numbers keep their type in what is computed from them.
RATES = {
    "np.float32": (np.float32(0.01), 1e-6),
    "np.float64": (np.float64(0.01), 1e-9),
    "np.float16": (np.float16(0.01), 1e-3),
    "np.int64": (np.int64(1), 1e-7),
    "int": (1, 1e-7),
    "bool": (True, 1e-7),
    "float32 tensor": (torch.tensor(0.01), 1e-6),
    "float64 tensor": (torch.tensor(0.01, dtype=torch.float64), 1e-9),
    "float16 tensor": (torch.tensor(0.01, dtype=torch.float16), 1e-3),
    "bfloat16 tensor": (torch.tensor(0.01, dtype=torch.bfloat16), 1e-2),
    "int64 tensor": (torch.tensor(1), 1e-5),
    "one-element tensor": (torch.tensor([0.01]), 1e-6),
    "parameter": (nn.Parameter(torch.tensor(0.01), requires_grad=False), 1e-6),
}


@makers
@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("rate", RATES)
def test_learning_rates(rate, kind, make):
    net = make(activation="tanh")
    optimizer = OPTIMIZERS[kind](net.parameters())
    given, tolerance = RATES[rate]
    compare(net, optimizer, 3, tolerance, lambda of, _: of.param_groups[0].update(lr=given))


NUMBERS = {
    "momentum": ("sgd", np.float32(0.9)),
    "weight_decay": ("nesterov", np.int64(1)),
    "dampening": ("dampened", np.float32(0.1)),
    "nesterov": ("nesterov", np.bool_(True)),
    "betas": ("adam", (np.float64(0.8), np.float64(0.9))),
    "beta of zero": ("adam", (0, 0.5)),
    "eps": ("adam", np.float32(1e-3)),
    "eps of an integer": ("adam", 1),
    "decay": ("adamw", np.float32(0.1)),
}


@makers
@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers(name, make):
    kind, value = NUMBERS[name]
    key = {"beta of zero": "betas", "eps of an integer": "eps", "decay": "weight_decay"}
    net = make()
    optimizer = OPTIMIZERS[kind](net.parameters())
    change = {key.get(name, name): value}
    compare(net, optimizer, 4, 1e-6, lambda of, _: of.param_groups[0].update(change))


@makers
@pytest.mark.parametrize("before", [0, 3], ids=["first", "repeated"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_rate_in_a_tensor_that_is_not_finite_any_more(kind, bad, before, make):
    net = make()
    optimizer = OPTIMIZERS[kind](net.parameters())
    rate = torch.tensor(0.01)
    optimizer.param_groups[0]["lr"] = rate
    for seed in range(before):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    kept = [t.clone() for t in net.state_dict().values()]
    rate.fill_(bad)
    with pytest.raises(ValueError, match="net.step: optimizer must have finite learning rates"):
        net.step(optimizer=optimizer, **batch(net))
    assert all(map(torch.equal, kept, net.state_dict().values()))
    rate.fill_(0.02)
    compare(net, optimizer, 2)


@pytest.mark.parametrize("rate", ["0.1", None, 1j, [0.1], np.float32("nan")], ids=repr)
def test_what_torch_cannot_step_with_is_refused(rate):
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    net.step(optimizer=optimizer, **batch(net))
    optimizer.param_groups[0]["lr"] = rate
    kept = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="net.step: optimizer must have finite learning rates"):
        net.step(optimizer=optimizer, **batch(net))
    assert all(map(torch.equal, kept, net.parameters()))


@makers
def test_a_rate_that_is_not_finite_where_the_optimizers_own_step_is_taken(make):
    net = make()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=0.001)
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    optimizer.param_groups[0]["lr"] = float("nan")
    kept = [t.clone() for t in net.state_dict().values()]
    with pytest.raises(ValueError, match="net.step: optimizer must have finite learning rates"):
        net.step(optimizer=optimizer, **batch(net))
    assert all(map(torch.equal, kept, net.state_dict().values()))
    optimizer.param_groups[0]["lr"] = 0.002
    compare(net, optimizer, 2)


# ---- layouts of state and parameters ----


def transposed(tensor):
    return tensor.t().contiguous().t()


def spaced(tensor):
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@makers
@pytest.mark.parametrize("layout", [transposed, spaced])
@pytest.mark.parametrize("kind", ["nesterov", "adam", "adamw"])
def test_state_that_is_not_contiguous(kind, layout, make):
    def change(optimizer, net):
        for parameter, entry in optimizer.state.items():
            for key, value in entry.items():
                if key != "step" and (parameter.dim() == 2 or layout is spaced):
                    entry[key] = layout(value)

    net = make()
    optimizer = OPTIMIZERS[kind](net.parameters())
    compare(net, optimizer, 5, change=change)
    entry = optimizer.state[net.stages[0][0].weight]
    assert not any(v.is_contiguous() for k, v in entry.items() if k != "step")


@makers
@pytest.mark.parametrize("place", ["stage", "head", "synthesizer"])
@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_biases_of_one_row(place, kind, make):
    net = make(n_hidden=1, context=True)
    places = {
        "stage": [net.stages[0][0]],
        "head": [net.stages[-1][0]],
        "synthesizer": [net.synthesizers[0].input_trigger, net.synthesizers[1].layers[0]],
    }
    for layer in places[place]:
        layer.bias = nn.Parameter(layer.bias.detach()[None])
    compare(net, OPTIMIZERS[kind](net.parameters()))


# ---- data ----


@makers
@pytest.mark.parametrize("layout", ["sparse", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_inputs(layout, make):
    def convert(given):
        x = given["x"].relu()
        return given | {"x": x.to_sparse() if layout == "sparse" else x.to_sparse_csr()}

    net = make(context=True)
    compare(net, OPTIMIZERS["nesterov"](net.parameters()), convert=convert)


@makers
@pytest.mark.parametrize("context", [False, True])
def test_labels_of_one_byte(context, make):
    net = make(context=context)
    twin, own = twin_of(net, OPTIMIZERS["adam"](net.parameters()))
    optimizer = OPTIMIZERS["adam"](net.parameters())
    for seed in range(4):
        given = batch(net, seed=seed)
        net.step(optimizer=optimizer, **given | {"target": given["target"].byte()})
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.bool])
def test_labels_that_torch_refuses(dtype):
    net = network()
    kept = [p.clone() for p in net.parameters()]
    given = batch(net)
    with pytest.raises(RuntimeError, match="net.step: target must"):
        net.step(
            optimizer=OPTIMIZERS["sgd"](net.parameters()),
            **given | {"target": given["target"].to(dtype)},
        )
    assert all(map(torch.equal, kept, net.parameters()))


@makers
def test_data_that_requires_grad(make):
    """No gradient goes to it."""
    net = make(context=True)

    def convert(given):
        context = torch.randn(6, 5, dtype=torch.float64)
        return given | {"x": given["x"].requires_grad_(), "context": context.requires_grad_()}

    twin, own = twin_of(net, OPTIMIZERS["adam"](net.parameters()))
    optimizer = OPTIMIZERS["adam"](net.parameters())
    for seed in range(3):
        given = convert(batch(net, seed=seed))
        net.step(optimizer=optimizer, **given)
        assert given["x"].grad is None and given["context"].grad is None
        plain_step(twin, optimizer=own, **given)
        assert_same(net, twin)


# ---- layers that do not know their sizes yet ----


def lazy_model():
    return nn.Sequential(nn.LazyLinear(9), nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(5))


@pytest.mark.parametrize("make", [lambda: fastdni.decouple(lazy_model()), lambda: lazy_network()],
                         ids=["decouple", "by hand"])  # fmt: skip
def test_lazy_layers_before_a_dry_run(make):
    try:
        net = make()
    except Exception as error:
        assert type(error) is ValueError
        assert "example_input" in str(error) or "dry run" in str(error)
        return
    x, target = torch.randn(6, 7), torch.randint(5, (6,))
    with pytest.raises(RuntimeError, match=r"net\.step: .*dry run"):
        net.step(x, target, torch.optim.SGD(net.parameters(), lr=0.1))


def lazy_network():
    layers = list(lazy_model())
    stages = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:4]), layers[4]
    return DecoupledSequential(*stages, synthesizers=[BasicSynthesizer(9), BasicSynthesizer(6)])


def test_lazy_layers_after_a_dry_run():
    net = lazy_network()
    net(torch.randn(2, 7))
    net.double()
    compare(net, OPTIMIZERS["adam"](net.parameters()))


def test_lazy_layers_with_an_example():
    x = torch.randn(4, 7)
    try:
        net = fastdni.decouple(lazy_model(), example_input=x)
    except ValueError as error:
        assert "dry run" in str(error)
        return
    net.double()
    compare(net, OPTIMIZERS["adam"](net.parameters()))


# ---- losses without a graph ----

LOSSES = {
    "detached": lambda output, target: F.cross_entropy(output, target).detach(),
    "counted": lambda output, target: (output.argmax(1) != target).double().mean(),
    "constant": lambda output, target: torch.tensor(1.0, dtype=torch.float64),
    "without gradients": torch.no_grad()(F.cross_entropy),
    "of another tensor": lambda output, target: F.cross_entropy(output.detach(), target),
    "of every row": lambda output, target: F.cross_entropy(output, target, reduction="none"),
}


@makers
@pytest.mark.parametrize("before", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize("call", ["step", "backward"])
@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_torch_refuses(case, call, before, make):
    net = make(n_hidden=1)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    for seed in range(before):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
    kept = [t.clone() for t in net.state_dict().values()]
    given = batch(net) | {"criterion": LOSSES[case]}
    if call == "step":
        given["optimizer"] = optimizer
    words = "scalar outputs" if case == "of every row" else "does not require grad"
    with pytest.raises(RuntimeError, match=words):
        getattr(net, call)(**given)
    assert all(map(torch.equal, kept, net.state_dict().values()))
    net.zero_grad()
    compare(net, optimizer, 2)


@pytest.mark.parametrize("case", ["detached", "counted"])
def test_a_masked_head_needs_no_graph(case):
    net = network()
    twin, own = twin_of(net, OPTIMIZERS["sgd"](net.parameters()))
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    how = {"criterion": LOSSES[case], "update_mask": [True, True, False]}
    net.step(optimizer=optimizer, **batch(net) | how)
    plain_step(twin, optimizer=own, **batch(net) | how)
    assert_same(net, twin)
    assert not torch.equal(net.stages[0][0].weight, network().stages[0][0].weight)


@pytest.mark.parametrize("value", [1.0, None, "loss"])
def test_a_criterion_that_returns_no_tensor(value):
    net = network()
    kept = [p.clone() for p in net.parameters()]
    with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError)):
        net.step(
            optimizer=OPTIMIZERS["sgd"](net.parameters()),
            **batch(net) | {"criterion": lambda output, target: value},
        )
    assert all(map(torch.equal, kept, net.parameters()))


# ---- the reference backend under autocast ----


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("case", ["callable", "local head", "local stage", "fused"])
def test_the_reference_under_autocast(case, kind):
    """As close to float32 as three times what autocast costs the step that is written out."""
    net = network((7, 30, 20, 5), context=True, dtype=torch.float32)
    optimizer = OPTIMIZERS[kind](net.parameters())
    exact, rounded = twin_of(net, optimizer), twin_of(net, optimizer)
    given = batch(net, 30)
    if case == "callable":
        given["criterion"] = F.cross_entropy
    elif case.startswith("local"):
        net.stages[2 if case == "local head" else 1].register_forward_hook(lambda *given: None)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            with fastdni.use_backend("reference"):
                net.step(optimizer=optimizer, **given)
            plain_step(rounded[0], optimizer=rounded[1], **given)
        plain_step(exact[0], optimizer=exact[1], **given)

    def off(read):
        truth = read(*exact)
        errors = [(read(n, o) - truth).norm() for n, o in ((net, optimizer), rounded)]
        assert errors[0] <= 3 * errors[1] + 1e-6 * truth.norm()

    for number, parameter in enumerate(net.parameters()):
        assert parameter.dtype == torch.float32
        assert all(v.dtype == torch.float32 for v in optimizer.state.get(parameter, {}).values())
        if kind.startswith("adam"):  # its steps are as long where a gradient is rounding
            off(lambda n, o, i=number: o.state[list(n.parameters())[i]]["exp_avg"])
        else:
            off(lambda n, o, i=number: list(n.parameters())[i].detach())
