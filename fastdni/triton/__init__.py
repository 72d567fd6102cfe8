"""The Triton backend: a step's kernels for any GPU that Triton knows.

Of its own modules only `unavailable` is safe to call without Triton.
"""

import importlib
import importlib.metadata
import importlib.util
import re

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install fastdni[triton])"
    import triton

    needed = next(r for r in importlib.metadata.requires("fastdni") or [] if "triton" in r)
    least = re.search(r">=([\d.]+)", needed).group(1)
    if _numbers(triton.__version__) < _numbers(least):
        return f"Triton must be {least} or later, this is {triton.__version__}"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no GPU"
    return None


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1."""
    import triton

    return triton.knobs.runtime.interpret


def load() -> None:
    """Registers the ops, for which Triton is imported: torch.ops.fastdni.triton_..."""
    for name in ("regression_loss", "synthesizer", "sweep"):
        importlib.import_module(f"fastdni.triton.{name}")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
