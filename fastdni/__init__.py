"""fastdni: decoupled neural interfaces for PyTorch, in fused kernels.

A synthesizer predicts the gradient that a layer will get, so that the layer updates at once and
need not wait for backpropagation (Jaderberg et al. 2016, arXiv 1608.05343).
"""

import importlib

import torch  # noqa: F401  first: the extension finds torch's libraries already loaded

try:
    from fastdni import _C
except ImportError as error:
    raise ImportError(
        "fastdni: the compiled extension did not load; build it with "
        f"`pip install --no-build-isolation -e .` ({error})"
    ) from error

from fastdni import agreement  # noqa: F401  has `backend` compare a GPU's kernels by it
from fastdni.backend import backends, set_backend, set_fp32_precision, use_backend
from fastdni.conversion import decouple
from fastdni.explain import explain
from fastdni.graphs import make_graphed_step
from fastdni.interfaces import (
    BackwardInterface,
    BidirectionalInterface,
    ForwardInterface,
    UnidirectionalInterface,
)
from fastdni.network import DecoupledSequential, StepResult
from fastdni.ops import regression_loss
from fastdni.recurrent import DecoupledRNN
from fastdni.scopes import backward, defer_backward, synthesizer_context
from fastdni.synthesizers import BasicSynthesizer, start_at_zero
from fastdni.training.recurrent.steps import RecurrentResult


def __getattr__(name: str):
    # Not loaded by those who have one process: torch.distributed.checkpoint takes a while.
    if name == "distributed":
        return importlib.import_module("fastdni.distributed")
    raise AttributeError(f"module 'fastdni' has no attribute {name!r}")


__version__ = _C.build_info()["version"]

__all__ = [
    "BackwardInterface",
    "BasicSynthesizer",
    "BidirectionalInterface",
    "DecoupledRNN",
    "DecoupledSequential",
    "ForwardInterface",
    "RecurrentResult",
    "StepResult",
    "UnidirectionalInterface",
    "backends",
    "backward",
    "decouple",
    "defer_backward",
    "distributed",
    "explain",
    "make_graphed_step",
    "regression_loss",
    "set_backend",
    "set_fp32_precision",
    "start_at_zero",
    "synthesizer_context",
    "use_backend",
]
