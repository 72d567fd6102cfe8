"""What a decoupled recurrent network is told, checked."""

import math
from dataclasses import dataclass, fields

SCALES = ("batch", "layers", "mean")
FIRSTS = ("skip", "train")
ENDS = (None, "zero")
VIEWS = ("forward", "online")


@dataclass
class Settings:
    """See `fastdni.DecoupledRNN`, whose arguments these are.

    Raises:
        ValueError: one is out of its range, or two do not go together.
    """

    factor: float = 0.1
    scale: str = "batch"
    first: str = "skip"
    end: str | None = None
    horizon: int = 0
    horizon_weight: float = 1.0
    trace_lambda: float | None = None
    trace_view: str = "forward"
    trace_windows: int | None = None
    discount: float | None = None
    target_clip: float | None = None
    target_scale: float = 1.0

    def __post_init__(self):
        for field in fields(self):
            self.check(field.name)
        if self.trace_lambda is None and self.trace_windows is not None:
            raise ValueError("DecoupledRNN: trace_windows is for a trace_lambda, got None for that")
        if self.trace_view == "online" and self.trace_windows is not None:
            raise ValueError('DecoupledRNN: trace_windows is for trace_view="forward"')

    def check(self, name: str) -> None:
        """Refuses a value that is none for an argument."""
        value = getattr(self, name)
        choices = {"scale": SCALES, "first": FIRSTS, "end": ENDS, "trace_view": VIEWS}.get(name)
        if choices is not None:
            if value not in choices:
                raise ValueError(
                    f"DecoupledRNN: {name} must be one of {', '.join(map(repr, choices))}, got "
                    f"{value!r}"
                )
            return
        wanted = _wanted(name, value)
        if wanted is not None:
            raise ValueError(f"DecoupledRNN: {name} must be {wanted}, got {value!r}")

    @property
    def bootstrap(self) -> float:
        """What the prediction at a window's end counts in the target at its start."""
        return self.factor if self.discount is None else self.discount


def _wanted(name: str, value) -> str | None:
    """What a number must be, where it is not."""
    if value is None:
        optional = ("trace_lambda", "trace_windows", "discount", "target_clip")
        return None if name in optional else "a number"
    try:
        finite = math.isfinite(value)
    except TypeError:
        return "a number"
    if name == "horizon":
        return None if isinstance(value, int) and value >= 0 else "an integer from 0 on"
    if name == "trace_windows":
        return None if isinstance(value, int) and value > 0 else "a positive integer"
    if name == "trace_lambda":
        return None if 0 <= value <= 1 else "from 0 to 1"
    if name in ("target_clip", "target_scale"):
        return None if finite and value > 0 else "positive"
    return None if finite else "finite"
