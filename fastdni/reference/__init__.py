"""fastdni's mathematics in plain PyTorch: the oracle of the tests, the backend of last resort.

Imports nothing but torch.
"""

from fastdni.reference.boundary import boundary_
from fastdni.reference.optimizer import (
    KEPT,
    RULES,
    OptimizerSettings,
    assigned,
    optimizer_update,
)
from fastdni.reference.recurrence import recurrence
from fastdni.reference.regression_loss import (
    accumulate_dtype,
    reduction_divisor,
    regression_loss,
)
from fastdni.reference.sweep import (
    SweepNorm,
    SweepResult,
    SweepStage,
    one_hot,
    sweep,
)
from fastdni.reference.synthesizer import (
    SynthesizerParameters,
    synthesizer_bwd,
    synthesizer_fwd,
)
from fastdni.reference.update import update_
from fastdni.reference.window import window_fwd, window_update_

__all__ = [
    "KEPT",
    "RULES",
    "OptimizerSettings",
    "SweepNorm",
    "SweepResult",
    "SweepStage",
    "SynthesizerParameters",
    "accumulate_dtype",
    "assigned",
    "boundary_",
    "one_hot",
    "optimizer_update",
    "recurrence",
    "reduction_divisor",
    "regression_loss",
    "sweep",
    "synthesizer_bwd",
    "synthesizer_fwd",
    "update_",
    "window_fwd",
    "window_update_",
]
