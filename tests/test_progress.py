"""The line that shows progress: drawn over on a terminal, only its last text anywhere else."""

import io
from contextlib import redirect_stderr

import pytest

from fastdni import bench
from fastdni.bench.progress import Line, bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")


def drawn(written: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines = []
    for line in written.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_bar_says_the_share_that_is_done():
    assert bar("timing", 0.2) == "timing [#####                    ]  20 %"
    assert bar("timing", 1.3, "2 s") == "timing [#########################] 100 % 2 s"
    assert bar("timing", -1).endswith("]   0 %")


@pytest.mark.parametrize("keep, expected", [(True, "3 of 3\n"), (False, "")])
def test_a_log_holds_the_last_line_alone(keep, expected):
    with redirect_stderr(io.StringIO()) as stderr, Line(keep) as line:
        for number in range(1, 4):
            line.show(f"{number} of 3")
    assert stderr.getvalue() == expected


@pytest.mark.parametrize("keep, expected", [(True, ["short", ""]), (False, [""])])
def test_a_terminal_shows_each_line_in_the_place_of_the_one_before(keep, expected):
    long = "a long one, which " * 5
    with redirect_stderr(Terminal()) as stderr, Line(keep) as line:
        line.show(long)
        written = stderr.getvalue()
        assert drawn(written) == [long[:49]]
        line.show(long)
        assert stderr.getvalue() == written
        line.show("short")
        assert drawn(stderr.getvalue()) == ["short"]
    assert drawn(stderr.getvalue()) == expected
    assert stderr.getvalue()[-1] == ("\n" if keep else "\r")


def test_what_ends_early_says_how_far_it_came():
    stderr = io.StringIO()
    with pytest.raises(KeyboardInterrupt), redirect_stderr(stderr), Line(keep=True) as line:
        line.show("1 of 3")
        raise KeyboardInterrupt
    assert stderr.getvalue() == "1 of 3\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("keep", [True, False])
def test_a_line_that_shows_nothing_writes_nothing(stream, keep):
    with redirect_stderr(stream()) as stderr, Line(keep):
        pass
    assert stderr.getvalue() == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_interleave_shows_its_share_when_asked(stream, capsys):
    with redirect_stderr(stream()) as stderr:
        bench.interleave({"step": lambda: None}, rounds=2)
        assert stderr.getvalue() == ""
        bench.interleave({"step": lambda: None}, rounds=2, progress=True)
    written = stderr.getvalue()
    assert drawn(written) == [""]
    assert (bar("timing", 0.5) in written and bar("timing", 1) in written) == (stream is Terminal)
    assert (written == "") == (stream is not Terminal)
    assert capsys.readouterr().out == ""
