"""How kernels are launched, and how ops are made of them."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fastdni.triton import interpreted


class _Inside(threading.local):
    op = False


_inside = _Inside()


def launched(kernel):
    """The kernel, in an op in the form that can be traced; elsewhere that form would be slow."""
    return wrap_triton(kernel) if _inside.op and not interpreted() else kernel


def on_device(tensor: Tensor):
    """Triton launches on the current device: makes a tensor's that."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@contextmanager
def _in_op(tensor: Tensor):
    before, _inside.op = _inside.op, True
    try:
        with on_device(tensor):
            yield
    finally:
        _inside.op = before


def op(name: str, mutates_args: tuple[str, ...] = ()) -> Callable:
    """Registers fastdni::<name>: a function of tensors whose kernels are Triton's."""

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def body(*arguments):
            with _in_op(next(a for a in arguments if isinstance(a, Tensor))):
                return function(*arguments)

        return triton_op(f"fastdni::{name}", body, mutates_args=mutates_args)

    return register
