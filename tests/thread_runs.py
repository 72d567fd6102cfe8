"""Steps in several threads, to be run in a process of their own: `python thread_runs.py NAME`.

What a step gave says in which order the steps were taken: of the steps that may come next, the loss
of one is the one that was found. `replayed` takes them again in that order, by the oracle.
"""

import copy
import faulthandler
import resource
import sys
import threading
import time

import torch
from network_cases import OPTIMIZERS, batch, local, network
from plain_step import assert_same, assert_same_state, plain_backward, plain_step
from torch import nn

import fastdni

STEPS = 100


def at_once(*functions) -> None:
    """Runs functions in threads that start together; raises what any of them raises."""
    failed, gate = [], threading.Barrier(len(functions))

    def run(function):
        gate.wait()
        try:
            function()
        except BaseException as error:  # noqa: BLE001  to be raised below
            failed.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def replayed(net, optimizers: list, taken: list[list[tuple]]) -> list[int]:
    """Takes each thread's steps on the oracle, in the order that their losses tell.

    Args:
        net, optimizers: as they were before.
        taken: for each thread (arguments, loss found) of its steps.

    Returns:
        Whose step each was.
    """
    order, left = [], [list(each) for each in taken]
    while any(left):
        for number, steps_left in enumerate(left):
            if not steps_left:
                continue
            given, loss = steps_left[0]
            here, *_ = plain_backward(copy.deepcopy(net), **given)
            if torch.allclose(here, loss, rtol=1e-10, atol=1e-10):
                plain_step(net, optimizer=optimizers[number], **given)
                steps_left.pop(0)
                order.append(number)
                break
        else:
            raise AssertionError(
                f"after {len(order)} steps none of those that may come next gives what was found"
            )
    return order


def two_on_one(net, kinds=("adam", "adam"), rows=(6, 6), steps=STEPS) -> None:
    """Two threads, one network, an optimizer each: every step is its caller's own, and whole."""
    twin = copy.deepcopy(net)
    optimizers = [OPTIMIZERS[kind](net.parameters()) for kind in kinds]
    theirs = [OPTIMIZERS[kind](twin.parameters()) for kind in kinds]
    taken = [[], []]

    def work(number):
        for seed in range(steps):
            given = batch(net, rows[number], seed=2 * seed + number)
            result = net.step(optimizer=optimizers[number], **given)
            taken[number].append((given, result.loss))
            if seed % 8 == 7:
                time.sleep(0.002)  # on a busy machine one might be done before the other begins

    at_once(lambda: work(0), lambda: work(1))
    for optimizer in optimizers:
        for entry in optimizer.state.values():
            assert entry.get("step", steps) == steps, entry["step"]
    order = replayed(twin, theirs, taken)
    assert len(order) == 2 * steps and order != sorted(order), "the threads took no turns"
    assert_same(net, twin, 1e-7)  # many steps of rounding
    for a, b in zip(optimizers, theirs, strict=True):
        assert_same_state(a, b, 1e-7)


def one_network():
    for kinds, rows in (
        (("adam", "adam"), (6, 6)),
        (("adamw", "adam"), (32, 32)),
        (("nesterov", "dampened"), (6, 4)),
    ):
        two_on_one(network((7, 40, 30, 5), n_hidden=1, context=True), kinds, rows)


def mixed_network():
    net = network((7, 40, 30, 5), context=True)
    net.stages[1][1] = nn.GELU()
    two_on_one(net)
    two_on_one(local(network(context=True)), ("sgd", "adam"))
    two_on_one(network(unlocked=True), ("sgd", "nesterov"))


def looked_at():
    """`explain`, `state_dict` and copies of a network that trains."""
    net = network((7, 40, 30, 5), norm=True, context=True)
    twin = copy.deepcopy(net)
    optimizer, own = (OPTIMIZERS["nesterov"](n.parameters()) for n in (net, twin))
    done = threading.Event()

    def work():
        try:
            for seed in range(2 * STEPS):
                net.step(optimizer=optimizer, **batch(net, seed=seed))
        finally:
            done.set()

    def look():
        x = batch(net)["x"]
        while not done.is_set():
            rows = fastdni.explain(net, x, optimizer).rows
            assert [row["fused"] for row in rows] == [True] * 3
            net.state_dict()

    at_once(work, look)
    for seed in range(2 * STEPS):
        plain_step(twin, optimizer=own, **batch(twin, seed=seed))
    assert_same(net, twin, 1e-7)


if __name__ == "__main__":
    faulthandler.enable()
    gigabytes = 8
    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30,) * 2)
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
