"""Parts of a network: where it is cut, what they are worth together, and what is refused."""

import pytest
import torch
from torch import nn

import fastdni
from fastdni import distributed
from fastdni.distributed.split import balanced


class Mesh:
    """One process of a mesh that nobody has started."""

    def __init__(self, stage: int, stages: int):
        self.shape = (stages, 1)
        self._stage = stage

    def get_coordinate(self):
        return self._stage, 0

    def size(self, axis):
        return self.shape[axis]


def layers():
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 8), nn.Linear(8, 3)
    )


def decoupled(hidden=0):
    def synthesizer(shape):
        return fastdni.BasicSynthesizer(shape[-1], hidden, 7, context_dim=3)

    return fastdni.decouple(layers(), synthesizer, example_input=torch.ones(2, 6))


def stages_of(make, count, **how):
    """The stages of all processes, each of which makes the network anew."""
    found = []
    for number in range(count):
        mesh = Mesh(number, count)
        found.append(distributed.DecoupledStage(*_split(make(), mesh, **how)))
    return found


def _split(model, mesh, **how):
    part, synthesizer = distributed.split(model, mesh, **how)
    return part, mesh, synthesizer


def together(stages):
    """What `export` gathers."""
    first, found = 0, {}
    for stage in stages:
        found |= stage.undivided_state_dict(first)
        first += len(stage.stages)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["decoupled", "plain"])
def test_the_parts_are_the_network(kind, count):
    torch.manual_seed(0)
    model = decoupled() if kind == "decoupled" else layers()
    x = torch.randn(7, 6)
    how = {} if kind == "decoupled" else {"example_input": x}
    stages = stages_of(lambda: model, count, **how)
    h = x
    for stage in stages:
        h = stage.eval()(h)
    assert torch.equal(h, model.eval()(x))
    torch.manual_seed(1)
    other = decoupled() if kind == "decoupled" else layers()
    other.load_state_dict(together(stages))
    assert torch.equal(other.eval()(x), h)


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_seed_makes_the_same_weights_on_every_mesh(hidden):
    found = []
    for count in (1, 2, 4):
        torch.manual_seed(count)  # each process has its own random numbers
        found.append(together(stages_of(lambda: decoupled(hidden), count, seed=5)))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name])
    assert not torch.equal(found[0]["stages.0.0.weight"], decoupled().stages[0][0].weight)


def test_parts_are_balanced():
    assert balanced([1, 1, 1, 1], 2) == [0, 2, 4]
    assert balanced([9, 1, 1, 1], 2) == [0, 1, 4]
    assert balanced([1, 2, 3, 4, 5], 3) == [0, 3, 4, 5]
    assert balanced([5, 1, 5], 3) == [0, 1, 2, 3]


def test_costs_of_the_callers_own():
    lengths = [len(s.stages) for s in stages_of(decoupled, 2, costs=[1, 1, 1, 9])]
    assert lengths == [3, 1]


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (nn.Linear(2, 2), {}, "model must be a DecoupledSequential or an nn.Sequential, got Lin"),
        (nn.Sequential(nn.Linear(2, 2)), {}, "as many stages as the mesh, 2, or more, got 1"),
        (layers(), {}, "example_input must be given for an nn.Sequential"),
        (layers(), {"costs": [1.0]}, "costs must be 6, got 1"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 3)),
            {"example_input": torch.ones(2, 6)},
            r"must be \(B, features\) for a linear synthesizer, got \(2, 2, 3\)",
        ),
        (
            fastdni.DecoupledSequential(
                nn.Linear(2, 2),
                nn.Linear(2, 2),
                synthesizers=[fastdni.BasicSynthesizer(2)],
                bp_lambda=0.5,
            ),
            {},
            "no input_synthesizers and a bp_lambda of 0",
        ),
    ],
)
def test_what_a_split_refuses(model, how, message):
    with pytest.raises((TypeError, ValueError), match=message):
        distributed.split(model, Mesh(0, 2), **how)


def test_what_a_stage_refuses():
    synthesizer = fastdni.BasicSynthesizer(2)
    with pytest.raises(ValueError, match=r"be given for all but the last \(stage 0\)"):
        distributed.DecoupledStage(nn.Linear(2, 2), Mesh(0, 2))
    with pytest.raises(ValueError, match=r"be None for the last stage \(stage 1\)"):
        distributed.DecoupledStage(nn.Linear(2, 2), Mesh(1, 2), synthesizer)
