"""The faults: one line each, such as an edit in haste may leave behind."""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str  # what stands there, once
    new: str
    tests: str  # arguments of pytest: those of the subject, one of which must fail


MUTANTS = [
    Mutant(
        "fastdni/watch.py",
        '_NORM_OPTIONS = ("training", "momentum", "eps", "track_running_stats")',
        '_NORM_OPTIONS = ("training", "momentum", "track_running_stats")',
        "tests/test_stale.py -k norm",
    ),
    Mutant(
        "fastdni/watch.py",
        'entries.append((own, "forward"))',
        "pass",
        "tests/test_stale.py -k a_forward_attribute",
    ),
    Mutant(
        "csrc/ops/sweep.cpp",
        "",
        "",
        "tests/test_turns.py -k label",
    ),
]
