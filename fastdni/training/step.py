"""What one step is given."""

from collections.abc import Callable

from torch import Tensor

from fastdni.training.criteria import Labels
from fastdni.training.optimizers import Optimizers


class Step:
    """The arguments of a step, checked.

    Attributes:
        caller: whom messages name.
        x, target, context: the data, as a sweep takes it.
        given: target and context before `labels`.
        criterion: what was given; `name`: "cross_entropy" or "mse", or None for any other callable.
        active: for each stage, and one above, whether (1) or not (0) it is updated.
        optimizers: what makes the updates; None: gradients go to p.grad.
        labels: how target and context were brought into the form that a sweep takes; None: as they
            were.
    """

    __slots__ = (
        "caller", "x", "target", "criterion", "name", "context", "active", "optimizers", "labels",
        "given",
    )  # fmt: skip

    def __init__(
        self,
        caller: str,
        x: Tensor,
        target,
        criterion: Callable,
        name: str | None,
        context: Tensor | None,
        active: list[int],
    ):
        self.caller, self.x, self.target = caller, x, target
        self.given = target, context
        self.criterion, self.name = criterion, name
        self.context, self.active = context, active
        self.optimizers: Optimizers | None = None
        self.labels: Labels | None = None
