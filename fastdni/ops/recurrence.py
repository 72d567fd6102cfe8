"""recurrence: T steps of recurrent layers in one call, forward and backward.

Equations and letters are those of `fastdni.reference.recurrence`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdni import backend, reference

_DEVICES = backend.kernel_devices("recurrence_fwd")
# (cell, x, state, weights, bias) -> output, state, saved; and back: see csrc/ops/recurrence.cpp.
recurrence_fwd = torch.ops.fastdni.recurrence_fwd.default
recurrence_bwd = torch.ops.fastdni.recurrence_bwd.default


@torch.library.register_fake("fastdni::recurrence_fwd")
def _(cell, x, state, weights, bias):
    output = x.new_empty(*x.shape[:2], state[0].shape[2])
    return output, [*map(torch.empty_like, state)], x.new_empty(0)


@torch.library.register_fake("fastdni::recurrence_bwd")
def _(
    cell, x, state, weights, bias, output, saved, grad_output, grad_state, input_gradient,
    weight_gradients=True,
):  # fmt: skip
    grad_x = torch.empty_like(x) if input_gradient else x.new_empty(0)
    of_weights = [*map(torch.empty_like, weights)] if weight_gradients else []
    return grad_x, [*map(torch.empty_like, state)], of_weights


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, bias, states, x, *tensors):
        state, weights = list(tensors[:states]), list(tensors[states:])
        output, after, saved = recurrence_fwd(cell, x, state, weights, bias)
        ctx.how = cell, bias, states
        ctx.save_for_backward(x, output, saved, *tensors)
        ctx.set_materialize_grads(False)
        return output, *after

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *grad_state):
        cell, bias, states = ctx.how
        x, output, saved, *tensors = ctx.saved_tensors
        state, weights = tensors[:states], tensors[states:]
        given = [] if all(g is None for g in grad_state) else [
            torch.zeros_like(s) if g is None else g
            for g, s in zip(grad_state, state, strict=True)
        ]  # fmt: skip
        wanted = ctx.needs_input_grad[3]
        grad_x, before, own = recurrence_bwd(
            cell, x, state, weights, bias, output, saved, grad_output, given, wanted
        )
        return None, None, None, grad_x if wanted else None, *before, *own


def recurrence_is_compiled(x: Tensor) -> bool:
    """Whether a compiled kernel runs a window of this input."""
    return backend.has_cpu_kernel(x, _DEVICES)


def recurrence(
    cell: str, x: Tensor, state: list[Tensor], weights: list[Tensor], bias: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """A window of torch.nn's LSTM, GRU or RNN; differentiable once.

    Args:
        cell: "lstm", "gru", "tanh" or "relu".
        x: (T, B, K), float32 or float64.
        state: h, (L, B, H), and an LSTM's c.
        weights: of each layer W_ih (G H, K), W_hh (G H, H), and b_ih, b_hh (G H,) where there are
            biases; G is 4, 3 or 1.
        bias: whether there are.

    Returns:
        The top layer's h of every step, (T, B, H), and the state after the last.

    Raises:
        RuntimeError: a shape, dtype or device does not fit. ValueError: no such cell.

    Note:
        Kernels are the CPU's; on a GPU the reference runs, and torch's modules (cuDNN) are faster.
    """
    if not recurrence_is_compiled(x):
        return reference.recurrence(cell, x, state, weights, bias)
    output, *after = _Recurrence.apply(cell, bias, len(state), x, *state, *weights)
    return output, after
