"""Decoupled stages in several processes: against the undivided network, and each other."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 100  # seconds
RUN = pathlib.Path(__file__).with_name("distributed_run.py")


def case(mode="fixed", staleness=3, stages=3, activation="relu", steps=20, same=False, fault=""):
    return dict(
        mode=mode, staleness=staleness, stages=stages, activation=activation, steps=steps,
        same=same, fault=fault,
    )  # fmt: skip


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def by_torchrun(folder, processes, *cases):
    """Runs them to their end, started again when a process has died; exit status, and what was
    printed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3",
        f"--nproc-per-node={processes}", str(RUN), str(folder), json.dumps(cases),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    return [done.returncode], done.stdout + done.stderr


def alone(folder, processes, *cases):
    """The same without torchrun, which would end all as soon as one does; an exit status each.
    Their store is here, and outlives them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, str(RUN), str(folder), json.dumps(cases)]
    running = []
    for rank in range(processes):
        own = environment(
            RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )  # fmt: skip
        running.append(
            subprocess.Popen(
                command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [
            each.communicate(timeout=LIMIT)[0]
            for each in running
            if each not in frozen(cases, running)
        ]
    finally:
        for each in running:
            each.kill()
    return [each.wait() for each in running], "".join(said)


def frozen(cases, running):
    """Those that never end by themselves."""
    stops = [case["fault"].split(":") for case in cases if case["fault"].startswith("stop")]
    return [running[int(rank)] for _, rank, _ in stops]


def results(folder, processes, *cases, start=alone):
    """Of every case what each rank has found."""
    folder.mkdir(exist_ok=True)
    statuses, said = start(folder, processes, *cases)
    assert not any(statuses), said[-3000:]
    return [
        [torch.load(folder / f"{n}-{rank}.pt", weights_only=True) for rank in range(processes)]
        for n in range(len(cases))
    ]


def hashes(found):
    return [each["hash"] for each in found]


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    cases = {
        "fused": case(staleness=0),
        "local": case(staleness=0, activation="gelu"),
        "plain": case(),
        "delayed": case(fault="delay:-1:0"),
        "less": case(staleness=1),
        "async": case("async", 4),
    }
    found = results(tmp_path_factory.mktemp("three"), 3, *cases.values())
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", ["fused", "local"])
def test_without_staleness_it_is_the_undivided_network(of_three, name):
    """To the bit, in batches of changing sizes."""
    found = of_three[name]
    assert [each["equal"] for each in found] == [True] * 3
    assert [each["loss"] is None for each in found] == [True, True, False]
    assert [each["next_step"] for each in found] == [20] * 3
    assert found[2]["evaluated"].shape == (4, 5) and found[0]["evaluated"] is None
    assert all(each["synthesis_loss"].isfinite().all() for each in found)


def test_fixed_mode_is_the_same_on_every_link(of_three):
    assert hashes(of_three["plain"]) == hashes(of_three["delayed"])
    assert hashes(of_three["plain"])[0] != hashes(of_three["less"])[0]


def test_the_undivided_network_loads_what_is_exported(of_three):
    """And answers as the parts did."""
    assert all(each["exported"] for each in of_three["plain"] + of_three["local"])


def test_gradients_as_they_come(of_three):
    assert all(p.isfinite().all() for each in of_three["async"] for p in each["parameters"])


def test_replicas_that_are_given_the_same_rows_are_one(tmp_path):
    (one,) = results(tmp_path / "one", 2, case(stages=2))
    same, shared = results(tmp_path / "two", 4, case(stages=2, same=True), case(stages=2))
    assert hashes(same) == [hash for hash in hashes(one) for _ in range(2)]
    below, also, above, also_above = hashes(shared)
    assert below == also and above == also_above and below != hashes(one)[0]


FAULTS = [
    ("exit:1:5", "rank 1"),
    ("raise:0:5", "x must be (B, 20), got (32, 19)"),
    ("disagree:2:0", "staleness must be the same on every process"),
    ("stop:1:5", "stage 1 (rank 1) has not been heard of for 3 s"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_one_error_is_everyones(tmp_path, fault, message):
    """Everyone who is left says whose it was."""
    statuses, _ = alone(tmp_path, 3, case(fault=fault))
    assert all(statuses)
    kind, rank, _ = fault.split(":")
    silent = {int(rank)} if kind in ("exit", "stop") else set()
    for each in {0, 1, 2} - silent:
        said = (tmp_path / f"said-{each}").read_text()
        assert message in said, said


@pytest.mark.parametrize("fault", ["kill:1:6,0:13", "tear:2:8"])
def test_whoever_is_killed_training_ends_the_same(of_three, tmp_path, fault):
    """To the bit: from the newest checkpoint that all stages have."""
    (found,) = results(tmp_path, 3, case(fault=fault), start=by_torchrun)
    assert hashes(found) == hashes(of_three["plain"])
    assert {each["start"] for each in found} == {12 if fault.startswith("kill") else 4}
    assert {each["next_step"] for each in found} == {20}
