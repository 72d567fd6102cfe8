"""How far a long work has come, in one line on standard error.

On a terminal the line is drawn again and again. Anywhere else, in a log say, nothing is written but
the last one.
"""

import shutil
import sys

_CELLS = 25


def bar(label: str, share: float, note: str = "") -> str:
    """`label [#####     ]  20 % note`, for a share done of 0 to 1."""
    share = min(max(share, 0.0), 1.0)
    cells = "#" * int(_CELLS * share)
    return f"{label} [{cells:{_CELLS}s}] {int(100 * share):3d} % {note}".rstrip()


class Line:
    """A line that is drawn over until its `with` block ends.

    Args:
        keep: whether the last one stays, and is written where there is no terminal; without it
            nothing is left behind.
    """

    def __init__(self, keep: bool = False):
        self._keep = keep
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()
        self._text = ""

    def __enter__(self) -> "Line":
        return self

    def show(self, text: str) -> None:
        """Draws the text in the place of the one before."""
        if self._terminal and text != self._text:
            width = shutil.get_terminal_size().columns - 1  # the last column would begin a new line
            shown, before = text[:width], len(self._text[:width])
            self._stream.write(f"\r{shown:{before}s}")
            self._stream.flush()
        self._text = text

    def __exit__(self, *error: object) -> None:
        if self._keep and self._text:
            self._stream.write("\n" if self._terminal else f"{self._text}\n")
        elif self._terminal and self._text:
            self.show("")
            self._stream.write("\r")
        self._stream.flush()
