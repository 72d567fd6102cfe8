"""Faults in the schedule of distributed stages."""

from planted import Mutant

_PROTOCOL = "fastdni/distributed/protocol.py"
_FRAMES = "fastdni/distributed/channels.py"
_RUNS, _OF_FRAMES = "tests/test_distributed_simulation.py", "tests/test_distributed_frames.py"

DISTRIBUTED = [
    Mutant(_PROTOCOL, "        if waiting > self.staleness:", "        if waiting:", _RUNS),
    Mutant(
        _PROTOCOL,
        'return "save" if self.last or self.feedback == self.computed else None',
        'return "save"',
        _RUNS,
    ),
    Mutant(
        _PROTOCOL,
        'if number != wanted or (kind == "feedback" and number >= self.computed):',
        'if kind == "feedback" and number >= self.computed:',
        _RUNS,
    ),
    Mutant(
        _PROTOCOL,
        'if number != wanted or (kind == "feedback" and number >= self.computed):',
        "if number != wanted:",
        _RUNS,
    ),
    Mutant(
        _PROTOCOL,
        "else min(self.saved, self._saved_behind[kind])",
        "else self.saved",
        _RUNS,
    ),
    Mutant(_PROTOCOL, 'if waiting and has_feedback and self.mode == "async":', "if False:", _RUNS),
    Mutant(
        _PROTOCOL,
        "self.applied = number if self.last else applied",
        "self.applied = number",
        _RUNS,
    ),
    Mutant(_FRAMES, "if at + tensor.nbytes > len(buffer):", "if False:", _OF_FRAMES),
    Mutant(_FRAMES, "if magic != MAGIC or version != VERSION:", "if False:", _OF_FRAMES),
    Mutant(
        "fastdni/distributed/safety.py",
        '                group["lr"] = rate\n',
        "                pass\n",
        "tests/test_distributed_plan.py -k capped",
    ),
    Mutant(
        "fastdni/training/piece.py",
        "step.active[-1] = int(has_head or stays_open)",
        "step.active[-1] = 1",
        "tests/test_distributed.py -k fixed",
    ),
]
