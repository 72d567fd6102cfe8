"""How `conftest.sample` chooses of a table of cases."""

import itertools

import conftest
import pytest
from conftest import sample

AXES = (["a", "b", "c"], [1, 2], [None, True, False, "x"])
TABLE = list(itertools.product(*AXES))


@pytest.fixture(autouse=True)
def sampled(monkeypatch):
    monkeypatch.setattr(conftest, "_take_all", False)


@pytest.mark.parametrize("every", [1, 2, 5, 6, 12, len(TABLE)])
def test_no_value_of_an_axis_is_left_out(every):
    chosen = sample(TABLE, every)
    assert [set(axis) for axis in zip(*chosen, strict=True)] == [set(axis) for axis in AXES]
    assert set(TABLE[::every]) <= set(chosen)
    assert chosen == sorted(chosen, key=TABLE.index) and len(set(chosen)) == len(chosen)
    # Besides each n-th at most one for a value.
    assert len(chosen) <= len(TABLE[::every]) + sum(map(len, AXES))


def test_kinds_are_what_the_caller_says():
    chosen = sample(range(10), 10, kinds=lambda number: [f"{number % 3}", f"{number > 8}"])
    assert chosen == [0, 1, 2, 9]


def test_cases_without_axes_are_each_nth():
    assert sample(range(15)) == [0, 7, 14]


def test_all_of_it_when_asked(monkeypatch):
    monkeypatch.setattr(conftest, "_take_all", True)
    assert sample(TABLE, 5) == TABLE
