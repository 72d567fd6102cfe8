"""Threads: the steps of one network are taken one after the other, each with its caller's own
optimizer and data; those of different networks side by side."""

import copy
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, plain_backward, plain_step

FOLDER = pathlib.Path(__file__).parent
PATIENCE = 30  # seconds, after which a thread counts as stuck


@pytest.mark.parametrize("run", ["one_network", "mixed_network", "looked_at"])
def test_in_a_process_of_its_own(run):
    found = subprocess.run(
        [sys.executable, FOLDER / "thread_runs.py", run],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr[-3000:]


def started(function):
    """A thread that runs the function, and what it returned or raised."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:  # noqa: BLE001
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def waiting_criterion():
    """A criterion that waits in the middle of a step, and the events of that."""
    inside, released = threading.Event(), threading.Event()

    def criterion(output, target):
        inside.set()
        assert released.wait(PATIENCE)
        return torch.nn.functional.cross_entropy(output, target)

    return criterion, inside, released


def test_networks_run_side_by_side():
    first, second = network(), network()
    twin = copy.deepcopy(second)
    criterion, inside, released = waiting_criterion()
    given = batch(first) | {"criterion": criterion}
    slow, _ = started(lambda: first.step(optimizer=OPTIMIZERS["sgd"](first.parameters()), **given))
    assert inside.wait(PATIENCE)
    optimizer, own = (OPTIMIZERS["adam"](n.parameters()) for n in (second, twin))

    def others():
        for seed in range(4):
            second.step(optimizer=optimizer, **batch(second, seed=seed))

    quick, found = started(others)
    quick.join(PATIENCE)
    assert found == [None], "the step of one network waits for that of another"
    assert slow.is_alive()
    released.set()
    slow.join(PATIENCE)
    for seed in range(4):
        plain_step(twin, optimizer=own, **batch(twin, seed=seed))
    assert_same(second, twin)


@pytest.mark.parametrize("call", ["step", "backward"])
def test_a_step_waits_for_the_one_that_runs(call):
    net = network((7, 9, 5))
    twin = copy.deepcopy(net)
    optimizer, own = (OPTIMIZERS["sgd"](n.parameters()) for n in (net, twin))
    criterion, inside, released = waiting_criterion()
    given = batch(net)
    slow, slowly = started(
        lambda: net.step(optimizer=optimizer, **given | {"criterion": criterion})
    )
    assert inside.wait(PATIENCE)
    arguments = batch(net, seed=1) | ({"optimizer": optimizer} if call == "step" else {})
    second, found = started(lambda: getattr(net, call)(**arguments))
    second.join(0.3)
    waited = second.is_alive()
    released.set()
    slow.join(PATIENCE)
    second.join(PATIENCE)
    for results in (slowly, found):
        assert len(results) == 1
        if isinstance(results[0], BaseException):
            raise results[0]
    plain_step(twin, optimizer=own, **given)
    if call == "backward":
        grads = [p.grad.clone() for p in net.parameters()]
        plain_backward(twin, **batch(net, seed=1))
        for grad, p in zip(grads, twin.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-9)
    else:
        plain_step(twin, optimizer=own, **batch(net, seed=1))
    assert_same(net, twin)
    assert waited


@pytest.mark.parametrize("make", [network, lambda: local(network())], ids=["fused", "local"])
def test_a_step_within_a_step_is_refused_and_does_not_hang(make):
    net = make()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    given = batch(net)
    before = [p.clone() for p in net.parameters()]

    def criterion(output, target):
        net.step(optimizer=optimizer, **given)
        return torch.nn.functional.cross_entropy(output, target)

    thread, found = started(
        lambda: net.step(optimizer=optimizer, **given | {"criterion": criterion})
    )
    thread.join(PATIENCE)
    assert found and isinstance(found[0], RuntimeError), found
    assert "net.step" in str(found[0])
    assert all(map(torch.equal, before, net.parameters()))
    # The network is free again.
    twin = copy.deepcopy(net)
    own = OPTIMIZERS["sgd"](twin.parameters())
    net.step(optimizer=optimizer, **given)
    plain_step(twin, optimizer=own, **given)
    assert_same(net, twin)


@pytest.mark.parametrize("wrong", ["label", "criterion"])
def test_a_step_that_fails_lets_the_next_thread_go_on(wrong):
    net = network()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    given = batch(net)
    net.step(optimizer=optimizer, **given)

    def failing(output, target):
        raise ArithmeticError("the criterion's own")

    changed = {"label": {"target": given["target"] + 100}, "criterion": {"criterion": failing}}
    with pytest.raises((RuntimeError, ArithmeticError)):
        net.step(optimizer=optimizer, **given | changed[wrong])
    thread, found = started(lambda: net.step(optimizer=optimizer, **given))
    thread.join(PATIENCE)
    assert found and not isinstance(found[0], BaseException), found
