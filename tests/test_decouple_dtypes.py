"""Synthesizers that `decouple` makes follow their stage: dtype, device, mode."""

import copy

import pytest
import torch
from network_cases import OPTIMIZERS
from plain_step import assert_same, plain_step, twin_of
from torch import nn

import fastdni


def model():
    return nn.Sequential(
        nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 5)
    )


def convolutional():
    return nn.Sequential(
        nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5)
    )


HOW = {
    "linear": {},
    "linear with a context": {"context_dim": 5},
    "mlp": {"synthesizer": "mlp", "context_dim": 5},
}
hows = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dtypes_of(modules):
    return {p.dtype for p in modules.parameters()}


@hows
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float32])
def test_the_models_dtype(dtype, how):
    net = fastdni.decouple(model().to(dtype), **how)
    assert dtypes_of(net.synthesizers) == {dtype}
    assert dtypes_of(net.stages) == {dtype}


@hows
@pytest.mark.parametrize("kind", ["nesterov", "adam"])
def test_a_model_in_float64_trains(kind, how):
    layers = model().double()
    layers[0].register_parameter("bias", None)
    net = fastdni.decouple(layers, **how)
    optimizer = OPTIMIZERS[kind](net.parameters())
    twin, own = twin_of(net, optimizer)
    for seed in range(3):
        torch.manual_seed(seed)
        x, target = torch.randn(6, 7).double(), torch.randint(5, (6,))
        net.step(x, target, optimizer)
        plain_step(twin, x, target, own)
    assert_same(net, twin)
    assert net.synthesizers[0].input_trigger.weight.any()


def test_a_model_in_bfloat16_trains():
    net = fastdni.decouple(model().bfloat16())
    before = [p.clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    result = net.step(torch.randn(6, 7).bfloat16(), torch.randint(5, (6,)), optimizer)
    assert result.loss.isfinite()
    assert not all(map(torch.equal, before, net.parameters()))


@hows
def test_a_model_under_another_default_dtype(how, default_float64):
    net = fastdni.decouple(model().float(), **how)
    assert dtypes_of(net) == {torch.float32}
    result = net.step(
        torch.randn(6, 7, dtype=torch.float32),
        torch.randint(5, (6,)),
        torch.optim.SGD(net.parameters(), lr=0.1),
    )
    assert result.output.dtype == torch.float32
    assert dtypes_of(fastdni.decouple(model(), **how)) == {torch.float64}


@hows
def test_a_model_on_meta(how):
    with torch.device("meta"):
        layers = model()
    net = fastdni.decouple(layers, **how)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    net.to_empty(device="cpu")
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_a_model_under_another_default_device():
    layers = model()
    with torch.device("meta"):
        net = fastdni.decouple(layers, context_dim=5)
    assert {p.device.type for p in net.parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
@hows
def test_a_model_on_a_gpu(how):
    net = fastdni.decouple(model().cuda().double(), **how)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("cuda", torch.float64)}


def test_stages_of_several_dtypes():
    """Each synthesizer is of the stage below its boundary, whose output it takes."""
    layers = model()
    layers[3].double()
    net = fastdni.decouple(layers)
    found = [dtypes_of(s) for s in net.synthesizers]
    assert found == [{torch.float32}, {torch.float64}]


@hows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_with_an_example(dtype, how):
    layers = convolutional().to(dtype)
    how = how | {
        "synthesizer": lambda shape: (
            fastdni.BasicSynthesizer(shape[0]) if len(shape) == 1 else Convolution(shape)
        )
    }
    example = torch.randn(2, 1, 7, dtype=dtype)
    net = fastdni.decouple(layers, example_input=example, **how)
    net.to(dtype)  # those of a callable are the user's own
    result = net.step(
        torch.randn(6, 1, 7, dtype=dtype),
        torch.randint(5, (6,)),
        torch.optim.SGD(net.parameters(), lr=0.1),
    )
    assert result.loss.isfinite()


class Convolution(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = nn.Conv1d(shape[0], shape[0], 1)

    def forward(self, trigger, context):
        return self.layer(trigger)


@hows
def test_synthesizers_start_as_ever(how):
    """The same random numbers, in the same order, at zero in the last layer."""
    torch.manual_seed(0)
    net = fastdni.decouple(model(), **how)
    after = torch.rand(1)
    torch.manual_seed(0)
    twin = fastdni.decouple(model().double(), **how)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    for each in (net, twin):
        x = torch.randn(3, 9, dtype=next(each.parameters()).dtype)
        context = torch.randn(3, 5, dtype=x.dtype)
        assert not each.synthesizers[0](x, context).any()


# ---- modes ----


def test_an_eval_model_makes_an_eval_network():
    layers = model().eval()
    net = fastdni.decouple(layers)
    assert not any(m.training for m in net.modules())
    x = torch.randn(6, 7)
    torch.testing.assert_close(net(x), layers(x))
    kept = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="call net.train"):
        net.step(x, torch.randint(5, (6,)), torch.optim.SGD(net.parameters(), lr=0.1))
    for key, value in net.state_dict().items():
        assert torch.equal(value, kept[key])
    net.train()
    assert all(m.training for m in net.modules())
    net.step(x, torch.randint(5, (6,)), torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_training_model_makes_a_training_network():
    assert all(m.training for m in fastdni.decouple(model()).modules())


def test_layers_in_eval_stay_so():
    """A frozen BatchNorm within a training model."""
    layers = model()
    layers[1].eval()
    net = fastdni.decouple(layers)
    assert net.training and not net.stages[0][1].training
    assert all(m.training for m in net.synthesizers.modules())


@pytest.mark.parametrize("training", [True, False])
def test_an_example_leaves_modes_and_statistics(training):
    layers = model().train(training)
    kept = copy.deepcopy(layers.state_dict())
    net = fastdni.decouple(layers, example_input=torch.randn(4, 7))
    assert all(m.training is training for m in net.modules())
    for key, value in layers.state_dict().items():
        assert torch.equal(value, kept[key])
