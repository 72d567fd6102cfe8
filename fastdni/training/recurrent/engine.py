"""What the windows of a network share, and what one hands to the next."""

import weakref
from functools import partial
from typing import Any

from torch import Tensor

from fastdni.training.boundary import Prediction, learns
from fastdni.training.recurrent.boundaries import Boundaries
from fastdni.training.recurrent.horizon import Horizon, Met
from fastdni.training.recurrent.layouts import State, are_zero, tensors_of
from fastdni.training.recurrent.settings import Settings
from fastdni.training.recurrent.unroll import Unroller


class Passed:
    """What is known of a state that one window hands to the next.

    Attributes:
        fresh: (B, 1), the rows that begin an episode there; None: none does.
        is_used: whether a window has started from it.
        predictions: what was predicted there; `ctx`, by which context; `engine`, by whose
            synthesizers.
        met: the states before it, newest first, for the auxiliary task.
        trace: of the windows before it.
    """

    def __init__(self, fresh: Tensor | None):
        self.fresh = fresh
        self.is_used = False
        self.predictions: list[Prediction] | None = None
        self.ctx: Any = None
        self.engine: Engine | None = None
        self.met: list[Met | None] = []
        self.trace: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What cannot be found out again."""
        met = [None if each is None else tuple(each) for each in self.met]
        return {"fresh": self.fresh, "met": met, "trace": self.trace}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Passed":
        """The reverse."""
        passed = cls(state["fresh"])
        passed.met = [None if each is None else Met(*each) for each in state["met"]]
        passed.trace = state["trace"]
        return passed


class Handed:
    """What is known of states that were handed out, for as long as these live."""

    def __init__(self):
        self._known: dict[int, tuple[weakref.ref, Passed]] = {}

    def at(self, tensor: Tensor) -> Passed | None:
        """Of the state that begins with a tensor."""
        found = self._known.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1]

    def put(self, tensor: Tensor, passed: Passed) -> None:
        """Remembers what is known of it."""
        number = id(tensor)
        gone = partial(_forget, self._known, number)
        self._known[number] = weakref.ref(tensor, gone), passed


def _forget(known: dict, number: int, ref: weakref.ref) -> None:
    if number in known and known[number][0] is ref:  # and not that of another with its id
        del known[number]


class Engine:
    """What all windows of a network share.

    Args:
        unroller: runs them.
        boundaries, horizon: the synthesizers, and those of the auxiliary task.
        settings: see `fastdni.DecoupledRNN`; `layout_name`: its layout.

    Attributes:
        spare: what was kept of windows, and is no longer needed.
    """

    def __init__(
        self, unroller: Unroller, boundaries: Boundaries, horizon: Horizon, settings: Settings,
        layout_name: str,
    ):  # fmt: skip
        self.unroller, self.boundaries = unroller, boundaries
        self.horizon, self.settings, self.layout_name = horizon, settings, layout_name
        self.spare: list[Any] = []

    @property
    def is_plain(self) -> bool:
        """Whether nothing is sent and nothing learnt: truncated backpropagation through time."""
        frozen = self.settings.factor == 0 and not self.horizon.length
        return frozen and not any(map(learns, self.boundaries.synthesizers))


def who_learns(
    engine: Engine, state: State | None, passed: Passed | None
) -> tuple[bool, Tensor | None]:
    """Whether synthesizers learn at a window's start, and at which of its rows, (B, 1); None: at
    all. A row of zeros is the start of an episode.

    Args:
        state: the window's; `passed`: what is known of it, None where the caller made it.
    """
    if engine.is_plain:
        return False, None
    if engine.settings.first == "train":
        return True, None
    if state is None:
        return False, None
    fresh = are_zero(tensors_of(state)) if passed is None else passed.fresh
    return True, None if fresh is None else ~fresh
