"""What a process of the distributed tests does; started by torchrun.

    distributed_run.py FOLDER CASES

CASES: of JSON, a list of {stages, mode, staleness, activation, steps, same, fault}, run one after
the other; results go into FOLDER as CASE-RANK.pt. `same`: every replica has all rows. `fault`, of
rank R at step K: "exit:R:K" ends without a word; "raise:R:K" has bad data; "stop:R:K" freezes;
"disagree:R:0" has another staleness; "delay:-1:0": everyone is late now and then. "kill:R:K,R:K",
of the first start, the second ...: rank R is killed with -9 at step K; "tear:...": while it saves.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fastdni
from fastdni import distributed
from fastdni.distributed.split import balanced

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}  # what a sweep runs, and what it does not
CLASSES = 5


def model(activation: str) -> fastdni.DecoupledSequential:
    torch.manual_seed(0)
    phi, layers = ACTIVATIONS[activation], []
    for inputs, outputs in ((20, 16), (16, 16), (16, 16)):
        layers += [nn.Linear(inputs, outputs), phi()]
    return fastdni.decouple(nn.Sequential(*layers, nn.Linear(16, CLASSES)), context_dim=CLASSES)


def batches(steps: int, share: slice = slice(None)):
    """Of changing sizes, even ones."""
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        rows = 32 if number % 7 else 14
        x = torch.randn(rows, 20, generator=generator)
        y = torch.randint(CLASSES, (rows,), generator=generator)
        yield x[share], y[share]


def undivided(activation: str, steps: int) -> fastdni.DecoupledSequential:
    net = model(activation)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for x, y in batches(steps):
        net.step(x, y, optimizer)
    return net


def parameters_of(net, stages: int, index: int) -> list[torch.Tensor]:
    """A stage's share of an undivided network."""
    costs = [1 + sum(p.numel() for p in stage.parameters()) for stage in net.stages]
    begin, end = balanced(costs, stages)[index : index + 2]
    modules = [*net.stages[begin:end], *list(net.synthesizers)[begin:end]]
    return [p for module in modules for p in module.parameters()]


def kill(kind: str, places: list[str], rank: int) -> int | None:
    """At which step this process is to be killed; or, once and for all, within which save."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt >= len(places):
        return None
    victim, at = map(int, places[attempt].split(":"))
    if victim != rank:
        return None
    if kind == "tear":
        save = dcp.save

        def torn(values, checkpoint_id, **how):
            if int(checkpoint_id.name.partition(".")[0]) >= at:
                checkpoint_id.mkdir()
                (checkpoint_id / "half").write_text("a half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(values, checkpoint_id=checkpoint_id, **how)

        dcp.save = torn
        return None
    return at


def train(case: dict, folder: Path) -> dict:
    kind, _, places = case["fault"].partition(":")
    where = places.split(":") if places and "," not in places else []
    killed, checkpoint = None, None
    if kind in ("kill", "tear", "saves"):
        checkpoint, where = folder / "checkpoints", []
        killed = kill(kind, places.split(",") if places else [], int(os.environ["RANK"]))
    rank, steps, staleness = int(os.environ["RANK"]), case["steps"], case["staleness"]
    own, at = where and int(where[0]) == rank, int(where[-1]) if where else None
    mesh = distributed.init(case["stages"])
    part, synthesizer = distributed.split(model(case["activation"]), mesh)
    stage = distributed.DecoupledStage(part, mesh, synthesizer)
    optimizer = torch.optim.Adam(stage.parameters(), 1e-2)
    staleness += bool(kind == "disagree" and own)
    share = slice(None) if case["same"] else slice(stage.replica, None, mesh.size(1))
    with distributed.ScheduleDecoupled(
        stage, "cross_entropy", optimizer, case["mode"], staleness, heartbeat=3.0,
        checkpoint=checkpoint, save_every=4,
    ) as schedule:  # fmt: skip
        start = schedule.next_step
        for number, (x, y) in enumerate(batches(steps, share)):
            if number < schedule.next_step:
                continue
            if number == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if own and number == at:
                (folder / "fault").write_text(repr(time.time()))
                if kind == "exit":
                    os._exit(9)
                if kind == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if kind == "raise":
                    x = x[:, :-1]
            if kind == "delay":
                time.sleep(0.01 * ((number + rank) % 3))
            result = schedule.step(x, target=y)
        output = schedule.evaluate(torch.ones(4, 20))
    whole = model(case["activation"])
    whole.load_state_dict(distributed.export(stage))
    exported = output is None or torch.equal(whole.eval()(torch.ones(4, 20)), output)
    found, equal = list(stage.parameters()), None
    if case["mode"] == "fixed" and staleness == 0 and mesh.size(1) == 1:
        theirs = parameters_of(undivided(case["activation"], steps), mesh.size(0), stage.index)
        mine = [p for m in (stage.stages, stage.synthesizers) for p in m.parameters()]
        equal = all(map(torch.equal, mine, theirs))
    return {
        "parameters": [p.detach() for p in found],
        "hash": hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in found)).hexdigest(),
        "equal": equal,
        "loss": result.loss,
        "synthesis_loss": result.synthesis_loss,
        "evaluated": output,
        "next_step": schedule.next_step,
        "exported": exported,
        "start": start,
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        try:
            found = train(case, folder)
        except RuntimeError as error:
            (folder / f"said-{os.environ['RANK']}").write_text(f"{time.time()} {error}")
            raise
        torch.save(found, folder / f"{number}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
