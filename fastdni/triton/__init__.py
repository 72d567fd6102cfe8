"""The Triton backend: a step's kernels for any GPU that Triton knows.

Of its modules this one alone is imported where Triton is missing.
"""

import functools
import importlib
import importlib.util
import re

import torch

from fastdni.traced import constant

# The oldest Triton that the kernels are for; pyproject.toml asks for it (tests/test_build.py).
OLDEST = "3.6"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# What was found out already (functools.cache is something that torch.compile warns of).
_found: dict[str, object] = {}


@constant
def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if "unavailable" not in _found:
        _found["unavailable"] = _why_unavailable()
    return _found["unavailable"]


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install fastdni[triton])"
    import triton

    if _numbers(triton.__version__) < _numbers(OLDEST):
        return f"Triton must be {OLDEST} or later, this is {triton.__version__}"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no GPU"
    return None


@constant
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    if "interpreted" not in _found:
        import triton

        _found["interpreted"] = triton.knobs.runtime.interpret
    return _found["interpreted"]


@functools.cache
def load() -> None:
    """Registers the ops, for which Triton is imported: torch.ops.fastdni.triton_..."""
    for name in ("regression_loss", "synthesizer", "sweep", "boundary"):
        importlib.import_module(f"fastdni.triton.{name}")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
