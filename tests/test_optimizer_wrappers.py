"""Optimizers that wrap another one, as Accelerate, Lightning and Opacus write them: the wrapper's
own step is taken on the gradients."""

import copy

import pytest
import torch
from network_cases import batch, local, network
from plain_step import assert_same, plain_step
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import SWALR, AveragedModel

import fastdni


class Forwarding(Optimizer):
    """As Accelerate's and Opacus': a subclass without its `__init__`, with properties."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.taken = 0

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    @state.setter
    def state(self, state):
        self.optimizer.state = state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def step(self, closure=None):
        self.taken += 1
        return self.optimizer.step(closure)


class Dictionary(Optimizer):
    """As Fabric's: the wrapped one's dictionary is taken over, `step` is another."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step",)}
        self.optimizer, self.taken = optimizer, 0

    def step(self, closure=None):
        self.taken += 1
        return self.optimizer.step()


def posing(optimizer):
    """As Lightning's: a subclass of the wrapped one's own class, made for it."""

    class Own(Dictionary, type(optimizer)):
        pass

    Own.__name__ = type(optimizer).__name__
    return Own(optimizer)


class Lookahead(Optimizer):
    """Zhang et al. 2019: every third step goes back half the way to slow weights."""

    def __init__(self, optimizer):
        self.optimizer, self.taken = optimizer, 0
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    def step(self, closure=None):
        self.optimizer.step()
        self.taken += 1
        if self.taken % 3 == 0:
            with torch.no_grad():
                for group, slow in zip(self.param_groups, self.slow, strict=True):
                    for p, q in zip(group["params"], slow, strict=True):
                        p.copy_(q.lerp_(p, 0.5))


class Accumulating(Forwarding):
    """A step is skipped while `sync` is off, as Accelerate does."""

    sync = True

    def step(self, closure=None):
        if self.sync:
            super().step(closure)


class Clipping(Forwarding):
    def step(self, closure=None):
        parameters = [p for g in self.param_groups for p in g["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 0.01)
        super().step(closure)


class Reaching(Optimizer):
    """Everything but `step` by `__getattr__`."""

    def __init__(self, optimizer):
        object.__setattr__(self, "optimizer", optimizer)

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "optimizer"), name)

    def step(self, closure=None):
        self.optimizer.step()


def initialised(optimizer):
    """With `__init__` and parameters of its own groups, but the wrapped one's step."""

    class Outer(Optimizer):
        def __init__(self):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step()

    return Outer()


WRAPPERS = {
    "forwarding": Forwarding,
    "dictionary": Dictionary,
    "posing": posing,
    "lookahead": Lookahead,
    "accumulating": Accumulating,
    "clipping": Clipping,
    "reaching": Reaching,
    "initialised": initialised,
    "twice": lambda optimizer: Forwarding(Clipping(optimizer)),
}
KINDS = {
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.003),
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@wrappers
@pytest.mark.parametrize("make", [network, lambda **how: local(network(**how))],
                         ids=["fused", "local"])  # fmt: skip
def test_the_wrappers_own_step_is_taken(wrapper, kind, make):
    net = make(context=True)
    twin = copy.deepcopy(net)
    optimizer, own = (WRAPPERS[wrapper](KINDS[kind](n.parameters())) for n in (net, twin))
    for seed in range(7):
        given = batch(net, seed=seed)
        results = net.step(optimizer=optimizer, **given)
        for a, b in zip(results, plain_step(twin, optimizer=own, **given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same(net, twin)
    assert getattr(optimizer, "taken", 7) == 7
    assert all(p.grad is None for p in net.parameters())


@wrappers
def test_it_is_explained(wrapper):
    net = network()
    optimizer = WRAPPERS[wrapper](SGD(net.parameters(), lr=0.01))
    for row in fastdni.explain(net, batch(net)["x"], optimizer).rows:
        assert row["fused"] and row["reason"].startswith("its gradients; the update is the opt")


@wrappers
def test_the_wrapper_and_the_wrapped_in_turns(wrapper):
    """Between steps of the optimizer itself, which are fused."""
    net = network(context=True)
    twin = copy.deepcopy(net)
    inner, theirs = (KINDS["adam"](n.parameters()) for n in (net, twin))
    outer, their_outer = WRAPPERS[wrapper](inner), WRAPPERS[wrapper](theirs)
    turns = [(inner, theirs)] * 3 + [(outer, their_outer)] * 3 + [(inner, theirs)] * 3
    for seed, (optimizer, own) in enumerate(turns):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)


def test_steps_that_a_wrapper_skips():
    net = network()
    twin = copy.deepcopy(net)
    optimizer, own = (Accumulating(KINDS["adam"](n.parameters())) for n in (net, twin))
    for seed in range(6):
        optimizer.sync = own.sync = seed % 2 == 1
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)
    assert optimizer.taken == 3


def test_wrappers_in_a_sequence_and_beside_a_plain_optimizer():
    net = network()
    twin = copy.deepcopy(net)
    pairs = [
        [Clipping(SGD(n.stage_parameters(), lr=0.1)), Adam(n.synthesizer_parameters(), lr=0.01)]
        for n in (net, twin)
    ]
    for seed in range(4):
        net.step(optimizer=pairs[0], **batch(net, seed=seed))
        plain_step(twin, optimizer=pairs[1], **batch(net, seed=seed))
        assert_same(net, twin)


def test_a_wrapper_over_other_parameters_is_refused():
    net = network()
    optimizer = Forwarding(SGD([*net.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match="optimizer must hold parameters of the network alone"):
        net.step(optimizer=optimizer, **batch(net))


def test_a_wrapper_of_nothing_is_refused_with_a_word():
    class Empty(Optimizer):
        def __init__(self):
            pass

    net = network()
    kept = [p.clone() for p in net.parameters()]
    with pytest.raises((TypeError, ValueError), match="net.step: optimizer must"):
        net.step(optimizer=Empty(), **batch(net))
    assert all(map(torch.equal, kept, net.parameters()))


@wrappers
def test_schedulers_of_a_wrapper(wrapper):
    if wrapper in ("initialised",):
        pytest.skip("groups of its own: a scheduler of it moves nothing")
    net = network()
    twin = copy.deepcopy(net)
    optimizer, own = (WRAPPERS[wrapper](KINDS["adam"](n.parameters())) for n in (net, twin))
    inner = [StepLR(o.optimizer, 2, 0.5) for o in (optimizer, own)]
    for seed in range(6):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        for scheduler in inner:
            scheduler.step()
        assert_same(net, twin)


def test_stochastic_weight_averaging():
    """torch's own: an average of a network that trains, and the average's rates."""
    net = network(norm=True)
    twin = copy.deepcopy(net)
    pairs = [(n, SGD(n.parameters(), lr=0.05), AveragedModel(n)) for n in (net, twin)]
    rates = [SWALR(optimizer, swa_lr=0.01, anneal_epochs=3) for _, optimizer, _ in pairs]
    for seed in range(6):
        net.step(optimizer=pairs[0][1], **batch(net, seed=seed))
        plain_step(twin, optimizer=pairs[1][1], **batch(net, seed=seed))
        for (n, _, average), rate in zip(pairs, rates, strict=True):
            average.update_parameters(n)
            rate.step()
    assert_same(net, twin)
    assert_same(pairs[0][2], pairs[1][2])
    assert not torch.equal(net.stages[0][0].weight, pairs[0][2].module.stages[0][0].weight)


def test_post_local_sgd():
    distributed = pytest.importorskip("torch.distributed.optim")
    averagers = pytest.importorskip("torch.distributed.algorithms.model_averaging.averagers")
    if not hasattr(distributed, "PostLocalSGDOptimizer"):
        pytest.skip("this torch has no PostLocalSGDOptimizer")

    class Halving(averagers.ModelAverager):
        """Without processes: what an average of several would do to the parameters."""

        def __init__(self):
            self.step = 0

        def average_parameters(self, params):
            with torch.no_grad():
                for group in params:
                    for parameter in group["params"]:
                        parameter.mul_(0.9)

    net = network()
    twin = copy.deepcopy(net)
    optimizer, own = (
        distributed.PostLocalSGDOptimizer(SGD(n.parameters(), lr=0.01), Halving())
        for n in (net, twin)
    )
    for seed in range(3):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
        assert_same(net, twin)
