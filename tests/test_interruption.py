"""Exceptions that come from outside in the middle of a step: they reach the caller, and the step
was taken once or not at all."""

import copy
import signal
import time

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, assert_same_state, plain_step, twin_of
from torch import nn

import fastdni
from fastdni import reference

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")

FIRES = 1500


class Late(TimeoutError):
    """What the signal's handler raises."""


class Stop(BaseException):
    """The same, as KeyboardInterrupt is."""


def interrupted(step, delay: float) -> tuple[bool, bool]:
    """Takes a step under fire.

    Returns:
        Whether the alarm went off, and whether the step raised what its handler raises.
    """
    fired = []
    kind = (Late, Stop)[round(delay * 1e7) % 2]

    def handler(*arguments):
        fired.append(1)
        raise kind("from outside")

    before = signal.signal(signal.SIGALRM, handler)
    raised = False
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            step()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for _ in range(3):  # an alarm that is pending goes off here
                pass
    except kind:
        raised = True
    signal.signal(signal.SIGALRM, before)
    return bool(fired), raised


def mixed(**how):
    net = network(**how)
    net.stages[1][1] = nn.GELU()
    return net


def values(net, optimizer):
    """All that a step writes, in an order that holds while state appears."""
    parameters = list(net.parameters())
    state = [optimizer.state.get(p, {}) for p in parameters]
    kept = [v.detach().clone() for v in net.state_dict().values()]
    return kept, [{k: v.clone() for k, v in entry.items()} for entry in state]


def equal(one, two) -> bool:
    (kept, state), (others, their_state) = one, two
    if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(kept, others)):  # noqa: B905
        return False
    for a, b in zip(state, their_state, strict=True):
        if a.keys() != b.keys():
            return False
        if not all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-9) for k in a):
            return False
    return True


def delays(step, count: int):
    """Moments spread over the time that a step takes, and a little past it."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    length = 1.2 * sorted(taken)[2]
    return [max(length * (i + 0.5) / count, 1e-6) for i in range(count)]


@pytest.mark.parametrize("make", [network, mixed], ids=["fused", "mixed"])
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
def test_repeated_steps_under_fire(name, make):
    net = make(widths=(7, 40, 30, 5), n_hidden=1, context=True)
    optimizer = OPTIMIZERS[name](net.parameters())
    given = batch(net)
    twin, own = twin_of(net, optimizer)

    def step():
        net.step(optimizer=optimizer, **given)

    fires = FIRES if make is network else FIRES // 5
    moments = delays(step, fires)
    for _ in range(5):
        plain_step(twin, optimizer=own, **given)
    before = values(twin, own)
    swallowed = interruptions = 0
    for number, delay in enumerate(moments):
        # Data of its own: where nothing is left to learn, Adam makes steps of rounding.
        given = batch(net, seed=number)
        fired, raised = interrupted(step, delay)
        swallowed += fired and not raised
        interruptions += raised
        now = values(net, optimizer)
        if equal(now, before):
            continue
        plain_step(twin, optimizer=own, **given)
        before = values(twin, own)
        assert equal(now, before), f"neither once nor not at all ({interruptions=})"
    assert interruptions > fires // 20
    assert swallowed == 0
    net.step(optimizer=optimizer, **given)
    plain_step(twin, optimizer=own, **given)
    assert equal(values(net, optimizer), values(twin, own))


@pytest.mark.parametrize("make", [network, mixed, lambda **how: local(network(**how))],
                         ids=["fused", "mixed", "local"])  # fmt: skip
@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_the_very_first_step_under_fire(name, make):
    """State is made in it, by the step or by the optimizer itself."""
    start = make(context=True)
    given = batch(start)
    twin, own = twin_of(start, OPTIMIZERS[name](start.parameters()))
    nothing = values(twin, own)
    plain_step(twin, optimizer=own, **given)
    once = values(twin, own)
    plain_step(twin, optimizer=own, **given)
    twice = values(twin, own)

    def fresh():
        net = copy.deepcopy(start)
        return net, OPTIMIZERS[name](net.parameters())

    def first():
        net, optimizer = fresh()
        net.step(optimizer=optimizer, **given)

    interruptions = 0
    for delay in delays(first, 150):
        net, optimizer = fresh()
        fired, raised = interrupted(lambda n=net, o=optimizer: n.step(optimizer=o, **given), delay)
        assert raised or not fired, "swallowed"
        interruptions += raised
        now = values(net, optimizer)
        taken = equal((now[0], []), (once[0], []))
        assert taken or equal((now[0], []), (nothing[0], []))
        assert raised or taken
        if taken:
            assert equal(now, once)
        else:  # state that says nothing yet may be there
            assert not any(tensor.any() for entry in now[1] for tensor in entry.values())
        net.step(optimizer=optimizer, **given)
        assert equal(values(net, optimizer), twice if taken else once)
    assert interruptions > 10


def test_alarms_in_steps_that_change_batch_sizes():
    """Where a step is prepared anew each time."""
    net = network((7, 40, 30, 5), n_hidden=1, context=True)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    twin, own = twin_of(net, optimizer)
    sizes = iter(list(range(2, 40)) * 100)
    for delay in [1e-5 * (1 + i % 100) for i in range(500)]:
        given = batch(net, next(sizes))
        before = values(twin, own)
        fired, raised = interrupted(lambda g=given: net.step(optimizer=optimizer, **g), delay)
        assert raised or not fired, "swallowed"
        now = values(net, optimizer)
        if raised and equal(now, before):
            continue
        plain_step(twin, optimizer=own, **given)
        assert equal(now, values(twin, own))


# ---- errors of the user's own code within a step ----


class Mine(Exception):
    """What the user's code raises."""


def raising(where: str, net, optimizer):
    """Arguments of a step that raises there, and how to undo it."""

    def fail(*arguments):
        raise Mine(where)

    if where == "criterion":
        return {"criterion": fail}, lambda: None
    if where == "context":
        return {
            "context": torch.zeros(6, 5, dtype=torch.float64).as_subclass(Raising)
        }, lambda: None
    if where == "forward hook":
        return {}, net.stages[1].register_forward_hook(fail).remove
    if where == "backward hook":
        return {}, net.stages[1][0].weight.register_hook(fail).remove
    if where == "synthesizer hook":
        return {}, net.synthesizers[1].register_forward_pre_hook(fail).remove
    if where == "optimizer hook":
        return {}, optimizer.register_step_pre_hook(fail).remove
    raise AssertionError(where)


class Raising(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in ("t", "linear", "matmul", "addmm"):
            raise Mine("context")
        return super().__torch_function__(function, types, arguments, options or {})


PLACES = [
    "criterion",
    "context",
    "forward hook",
    "backward hook",
    "synthesizer hook",
    "optimizer hook",
]


@pytest.mark.parametrize("before", [0, 3], ids=["first", "later"])
@pytest.mark.parametrize("name", ["nesterov", "adam"])
@pytest.mark.parametrize("where", PLACES)
def test_what_the_users_code_raises_arrives_and_nothing_was_updated(where, name, before):
    net = network(context=True)
    optimizer = OPTIMIZERS[name](net.parameters())
    twin, own = twin_of(net, optimizer)
    given = batch(net)
    for _ in range(before):
        net.step(optimizer=optimizer, **given)
        plain_step(twin, optimizer=own, **given)
    kept = values(net, optimizer)
    grad = torch.ones_like(net.stages[0][0].weight)
    net.stages[0][0].weight.grad = grad
    changed, undo = raising(where, net, optimizer)
    if where == "context":
        try:
            net.step(optimizer=optimizer, **given | changed)
        except Mine:
            pass
        else:  # taken as the plain tensor that it is
            plain_step(twin, optimizer=own, **given | {"context": torch.zeros(6, 5).double()})
            kept = values(twin, own)
    else:
        with pytest.raises(Mine, match=where):
            net.step(optimizer=optimizer, **given | changed)
        assert net.stages[0][0].weight.grad is grad
    assert equal(values(net, optimizer), kept)
    undo()
    for seed in range(2):
        net.step(optimizer=optimizer, **batch(net, seed=seed))
        plain_step(twin, optimizer=own, **batch(net, seed=seed))
    assert_same(net, twin)
    assert_same_state(optimizer, own)


def test_an_error_while_a_step_is_repeated_is_not_taken_for_a_refusal():
    """An alarm before anything is written must not send the step the long way."""
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    given = batch(net)
    for _ in range(4):
        net.step(optimizer=optimizer, **given)
    kept = [p.clone() for p in net.parameters()]

    class Group(dict):
        def __getitem__(self, key):
            if key == "lr":
                raise Mine("lr")
            return super().__getitem__(key)

    optimizer.param_groups[0] = Group(optimizer.param_groups[0])
    with pytest.raises(Mine):
        net.step(optimizer=optimizer, **given)
    assert all(map(torch.equal, kept, net.parameters()))


def test_a_first_step_that_is_broken_off_in_the_reference(monkeypatch):
    """In the middle of its updates: the next one begins with state of its own."""
    net = network()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    update, calls = reference.optimizer_update, []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Stop
        update(*arguments)

    with fastdni.use_backend("reference"):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "optimizer_update", broken)
            with pytest.raises(Stop):
                net.step(optimizer=optimizer, **batch(net))
        assert not optimizer.state
        net.step(optimizer=optimizer, **batch(net))
    assert {entry["step"].item() for entry in optimizer.state.values()} == {1.0}
