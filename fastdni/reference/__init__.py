"""fastdni's mathematics in plain PyTorch: the oracle of the tests, the backend of last resort.

Imports nothing but torch.
"""

from fastdni.reference.regression_loss import (
    accumulate_dtype,
    reduction_divisor,
    regression_loss,
)
from fastdni.reference.synthesizer import synthesizer_bwd, synthesizer_fwd

__all__ = [
    "accumulate_dtype",
    "reduction_divisor",
    "regression_loss",
    "synthesizer_bwd",
    "synthesizer_fwd",
]
