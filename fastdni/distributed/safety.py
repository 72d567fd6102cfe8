"""What keeps late gradients from doing harm: smaller steps, and a look at the loss."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

_log = logging.getLogger("fastdni.distributed")
_EVERY = 20  # losses between two looks: to look at one is to wait for a GPU
_SMOOTH = 0.8  # of the mean of those
_GROWN = 2.0  # times the lowest mean


class Diverged(RuntimeError):
    """A loss that is not finite."""


class Safety:
    """Of one process; it changes nothing while gradients are not late.

    Args:
        optimizer: whose learning rates are capped.
        staleness: of the schedule.
        cap: see `ScheduleDecoupled`; `alarm`: whether losses are looked at.
    """

    def __init__(self, optimizer: Optimizer, staleness: int, cap: int | None, alarm: bool):
        if cap is not None and not cap > 0:
            raise ValueError(f"ScheduleDecoupled: cap must be positive or None, got {cap!r}")
        self._optimizer, self._staleness, self._alarm = optimizer, staleness, alarm
        self.factor = 1.0 if cap is None or staleness <= cap else cap / staleness
        if self.factor < 1:
            _log.warning(
                "learning rates count %.3g times, for gradients are up to %d messages late; "
                "cap=None takes them as they are",
                self.factor,
                staleness,
            )
        self._seen = 0
        self._mean = self._lowest = math.inf

    @contextmanager
    def capped(self) -> Iterator[None]:
        """Within it the learning rates are those that count."""
        if self.factor == 1:
            yield
            return
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self.factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def look_at(self, loss: Tensor) -> None:
        """Now and then.

        Raises:
            Diverged: the loss is not finite.
        """
        self._seen += 1
        if not self._alarm or self._seen % _EVERY:
            return
        value = float(loss)
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} after {self._seen} messages: smaller learning rates or less "
                f"staleness ({self._staleness}) are needed; alarm=False goes on all the same"
            )
        before = self._mean
        self._mean = value if before == math.inf else _SMOOTH * before + (1 - _SMOOTH) * value
        self._lowest = min(self._lowest, self._mean)
        if self._mean > _GROWN * self._lowest and self._alarm:
            self._alarm = False  # once
            _log.warning(
                "the loss has grown to %.3g from %.3g at its lowest (%d messages): smaller "
                "learning rates, or less staleness than %d, may be needed; alarm=False keeps this "
                "quiet",
                self._mean,
                self._lowest,
                self._seen,
                self._staleness,
            )
