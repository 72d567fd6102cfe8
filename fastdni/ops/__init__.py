"""The ops: one file each, with the public function, its autograd and the choice of a backend."""

from fastdni.ops.boundary import boundary_
from fastdni.ops.recurrence import (
    recurrence,
    recurrence_bwd,
    recurrence_fwd,
    recurrence_is_compiled,
)
from fastdni.ops.regression_loss import regression_loss
from fastdni.ops.sweep import (
    SweepPlan,
    flat,
    sweep_,
    sweep_backend,
    sweep_check_target,
    sweep_forward_,
    sweep_repeat_,
    sweep_takes_dropout,
    sweep_update_,
)
from fastdni.ops.synthesizer import (
    FROZEN,
    SynthesizerParameters,
    cast,
    synthesizer_bwd,
    synthesizer_fwd,
)
from fastdni.ops.update import update_, update_is_compiled
from fastdni.ops.window import window_fwd, window_is_compiled, window_step_, window_update_

__all__ = [
    "FROZEN",
    "SweepPlan",
    "SynthesizerParameters",
    "boundary_",
    "cast",
    "flat",
    "recurrence",
    "recurrence_bwd",
    "recurrence_fwd",
    "recurrence_is_compiled",
    "regression_loss",
    "sweep_",
    "sweep_backend",
    "sweep_check_target",
    "sweep_forward_",
    "sweep_repeat_",
    "sweep_takes_dropout",
    "sweep_update_",
    "synthesizer_bwd",
    "synthesizer_fwd",
    "update_",
    "update_is_compiled",
    "window_fwd",
    "window_is_compiled",
    "window_step_",
    "window_update_",
]
