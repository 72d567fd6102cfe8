"""Segments under torch.utils.checkpoint, which runs each of them twice.

With use_reentrant=False both runs are under hooks of its own for what autograd saves, and the
second graph is thrown away. With use_reentrant=True the first is without gradients, inside an
autograd function, and the second is like any other.
"""

import sys

import torch
from torch.utils.checkpoint import CheckpointFunction


def _checkpoint_hook() -> str:
    """The name of the hook by which autograd saves tensors for a checkpoint, or nothing (as in a
    compiled graph, which is no checkpoint's own)."""
    if _saving_hooks is None or torch.compiler.is_compiling():
        return ""
    hooks = _saving_hooks(True)
    if hooks is None or hooks[0].__module__ != "torch.utils.checkpoint":
        return ""
    return hooks[0].__qualname__


# Private, as torch's own checkpoint asks it: where torch has none, an interface behaves as outside.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_checkpointed() -> bool:
    """Whether autograd saves for a checkpointed segment."""
    return _checkpoint_hook() != ""


def is_first_run() -> bool:
    """Whether a checkpointed segment is run, without gradients, to be run with them later."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def is_second_run() -> bool:
    """Whether a checkpointed segment is run again, for what autograd saves in it alone."""
    return "recomputation" in _checkpoint_hook()


def sends_in_this_run() -> bool:
    """Whether gradients go out: of the two runs of a checkpointed segment in one."""
    return not is_second_run() and not is_first_run()
