"""What interfaces act within: a context, deferral, a compiled graph, a data-parallel forward pass.

Contexts and deferral belong to the thread.
"""

import threading
from collections.abc import Iterator
from contextlib import ContextDecorator, contextmanager

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastdni.checkpoint import is_checkpointed


class _ThreadState(threading.local):
    def __init__(self):
        self.contexts: list[Tensor | None] = []
        self.deferred: list[tuple[Tensor, Tensor]] | None = None


_state = _ThreadState()


class synthesizer_context(ContextDecorator):  # noqa: N801  (a context manager, named as in dni-pytorch)
    """Gives the synthesizers called within the `with` block a context; blocks may be nested.

    Also a decorator: the context is then that of every call of the function.

    Args:
        context: handed to each synthesizer as its second argument, (B, C); None for no context.

    Example:
        >>> with fastdni.synthesizer_context(torch.nn.functional.one_hot(labels, 10).float()):
        ...     output = network(images)
    """

    def __init__(self, context: Tensor | None):
        self.context = context

    def __enter__(self) -> None:
        _state.contexts.append(self.context)

    def __exit__(self, *exception) -> None:
        _state.contexts.pop()


def current_context() -> Tensor | None:
    """The context of the innermost `synthesizer_context`; None outside of any."""
    return _state.contexts[-1] if _state.contexts else None


@contextmanager
def defer_backward() -> Iterator[None]:
    """Collects what is backpropagated within the block, and does it all at once at its end.

    Use it, with `fastdni.backward` in place of `loss.backward()`, where several gradients go
    through the same graph, or where gradients must not exist before the whole forward pass is over
    (`DistributedDataParallel`, without find_unused_parameters: it would take for unused what only
    the deferred gradients reach). An exception in the block drops what was collected.

    Raises:
        RuntimeError: the block is inside another one.
    """
    if _state.deferred is not None:
        raise RuntimeError("cannot nest defer_backward")
    _state.deferred = []
    try:
        yield
        if _state.deferred:
            variables, gradients = zip(*_state.deferred, strict=True)
            torch.autograd.backward(variables, gradients)
    finally:
        _state.deferred = None


def backward(variable: Tensor, gradient: Tensor | None = None) -> None:
    """`torch.autograd.backward`, which waits for the end of a `defer_backward` block.

    Args:
        variable: of any shape.
        gradient: of the same shape; ones by default.
    """
    if gradient is None:
        gradient = torch.ones_like(variable)
    if _state.deferred is not None:
        _state.deferred.append((variable, gradient))
    elif in_data_parallel_forward():
        raise RuntimeError(
            "fastdni.backward: gradients made inside DistributedDataParallel's forward would not "
            "be averaged; wrap the forward and fastdni.backward(loss) in fastdni.defer_backward()"
        )
    else:
        torch.autograd.backward(variable, gradient)


def is_deferred() -> bool:
    """Whether the calling thread is in a `defer_backward` block."""
    return _state.deferred is not None


def send_gradient(trigger: Tensor, gradient: Tensor) -> None:
    """`backward(trigger, gradient)` for a gradient that is known to fit.

    `torch.autograd.backward` looks over its arguments for as long as the engine then works on a
    small layer; past them it does what this calls. Where this torch has no such function, or the
    trigger is no plain tensor, it is called after all.
    """
    if _run_backward is None or type(trigger) is not Tensor or _state.deferred is not None:
        backward(trigger, gradient)
    else:
        _run_backward(
            (trigger,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)


def in_data_parallel_forward() -> bool:
    """Whether DistributedDataParallel's forward is under way, which averages what comes by
    autograd."""
    # A private attribute: where torch has none, an interface behaves as outside.
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def sends_with_backward_pass() -> bool:
    """Whether a synthetic gradient must ride on the backward pass instead of going out at once.

    A compiled graph holds no backward call, DistributedDataParallel only averages gradients that
    come after its forward, and a checkpointed segment would be computed once more for it.
    """
    if torch.compiler.is_compiling() or is_checkpointed():
        return True
    return _state.deferred is None and in_data_parallel_forward()


def sends_by_autograd() -> bool:
    """Whether gradients must go through `backward`, and not straight to the parameters."""
    return _state.deferred is not None or in_data_parallel_forward()


# Gradients go out inside these functions: in a compiled graph they would run through a part of it
# that the user's own backward pass needs later. torch.compile goes around them. (torch.optim wraps
# its methods in the same lazy form; the public one loads the compiler when fastdni is imported.)
outside_compiled_graphs = getattr(torch, "_disable_dynamo", torch.compiler.disable)
