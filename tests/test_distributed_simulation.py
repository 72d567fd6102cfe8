"""The schedule on virtual time: whatever links, stages, kills and partitions do, it ends alike."""

import random

import pytest
from conftest import takes_all

from fastdni.distributed.protocol import ProtocolError, StageProtocol
from fastdni.distributed.simulation import Fault, Link, Setting, simulate

RUNS = 10_000 if takes_all() else 1000


def drawn(seed: int) -> Setting:
    """A run with 2 to 64 stages of any speed, links of any kind, and up to three faults."""
    r = random.Random(seed)
    stages, messages = r.choice([2, 2, 3, 3, 4, 5, 8, 13, 64]), r.randint(5, 40)
    links = [
        Link(r.choice([0, 0.1, 1, 5]) * r.random(), r.choice([0, 0, 0.5]), r.choice([0, 0, 0.05]))
        for _ in range(stages - 1)
    ]
    span = 2 * messages + 3 * stages
    faults = [
        Fault(r.uniform(0, span), r.randrange(stages), r.choice([None, None, 0.5, 3]))
        for _ in range(r.choice([0, 1, 3]))
    ]
    return Setting(
        compute=[r.uniform(0.5, 1.5) for _ in range(stages)],
        links=links,
        messages=messages,
        staleness=r.choice([0, 1, 4, 8]),
        apply=0.1,
        save=r.choice([0, 0.5]),
        save_every=r.choice([None, 1, 3, 7]),
        spread=0.2,
        faults=faults,
        seed=seed,
    )


def undisturbed(setting: Setting) -> Setting:
    stages = len(setting.compute)
    return Setting(
        [1.0] * stages, [Link()] * (stages - 1), setting.messages, staleness=setting.staleness
    )


def test_nothing_is_lost_doubled_or_reordered():
    expected = {}
    for seed in range(RUNS):
        setting = drawn(seed)
        key = len(setting.compute), setting.messages, setting.staleness
        if key not in expected:
            expected[key] = simulate(undisturbed(setting)).state
        found = simulate(setting)
        assert found.state == expected[key], f"seed {seed}"
        most = setting.staleness + 1
        assert found.most_held <= most and found.most_flying <= most, f"seed {seed}"


def test_a_seed_replays():
    for seed in (3, 11, 40):
        assert simulate(drawn(seed)) == simulate(drawn(seed))


def test_a_run_that_loses_a_message_is_noticed():
    """The numbers of the model tell what happened: any other order of gradients changes them."""
    setting = drawn(7)
    other = simulate(Setting(setting.compute, setting.links, setting.messages, staleness=2))
    least = simulate(Setting(setting.compute, setting.links, setting.messages, staleness=3))
    assert other.state != least.state


def test_gradients_as_they_come_are_never_later_than_they_may_be():
    for seed in range(50):
        setting = drawn(seed)
        setting.mode = "async"
        setting.faults = ()
        assert simulate(setting).most_held <= setting.staleness + 1


def test_a_link_is_hidden_by_enough_staleness():
    """One message a compute time, whatever the latency; without it a round trip each."""

    def seconds(staleness):
        stages = 4
        setting = Setting(
            [1.0] * stages, [Link(4.0)] * (stages - 1), 200, staleness=staleness
        )  # fmt: skip
        return simulate(setting).seconds / 200

    assert seconds(10) < 1.15
    assert seconds(0) > 9


def protocol(stage=1, stages=3, mode="fixed", staleness=1, **how):
    return StageProtocol(stage, stages, mode, staleness, **how)


def test_what_a_protocol_refuses():
    with pytest.raises(ValueError, match="mode must be one of 'fixed', 'async', got 'eager'"):
        protocol(mode="eager")
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="staleness must be an integer from 0 on, got"):
            protocol(staleness=bad)
    p = protocol()
    with pytest.raises(ProtocolError, match="input must come in order, 0 next .* got 1"):
        p.arrive("input", 1, 0)
    with pytest.raises(ProtocolError, match=r"feedback must come in order, 0 next \(0 sent\)"):
        p.arrive("feedback", 0, 0)
    p.arrive("input", 0, 0)
    with pytest.raises(ProtocolError, match="input must come in order, 1 next .* got 0"):
        p.arrive("input", 0, 0)


def test_a_message_in_the_life_of_a_stage():
    p = protocol(staleness=1, save_every=2)

    def runs(kind, number):
        assert p.next() == (kind, number)
        p.complete()

    assert p.next() is None
    for number in range(3):
        p.give()
        p.arrive("input", number, 0)
    runs("compute", 0)
    runs("compute", 1)
    assert p.next() is None and not p.is_idle  # for the gradient of message 0
    p.arrive("feedback", 0, 0)
    runs("apply", 0)
    assert p.next() is None  # a checkpoint waits for what has been sent
    p.arrive("feedback", 1, 0)
    runs("save", 2)
    assert (p.saved, p.saved_by_all) == (2, 0)
    runs("compute", 2)
    runs("apply", 1)
    assert p.is_idle and not p.is_drained
    p.close()
    p.arrive("feedback", 2, 2)
    runs("apply", 2)
    assert p.is_drained


def test_async_applies_what_has_come_before_it_computes():
    kinds = []
    for mode in ("async", "fixed"):
        p = protocol(mode=mode, staleness=3)
        for number in range(2):
            p.give()
            p.arrive("input", number, 0)
        assert p.next().kind == "compute"
        p.complete()
        p.arrive("feedback", 0, 0)
        kinds.append(p.next().kind)
    assert kinds == ["apply", "compute"]
