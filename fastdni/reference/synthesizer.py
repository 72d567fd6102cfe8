"""The synthesizer M(h, ctx) and its regression, written out.

Jaderberg et al. 2016 (arXiv 1608.05343), section 2: M predicts the gradient that the activation h
will get, and is trained to lessen ||M(h, ctx) - dL/dh||^2 when dL/dh arrives.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdni.reference.regression_loss import accumulate_dtype, reduction_divisor

Product = Callable[[Tensor, Tensor], Tensor]


class SynthesizerParameters(NamedTuple):
    """The parameters of a synthesizer: the letters of `synthesizer_fwd`."""

    weights: list[Tensor]
    biases: list[Tensor]
    context_weight: Tensor | None = None
    context_bias: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that there are, in the order of `synthesizer_bwd`'s gradients."""
        tensors = [*self.weights, *self.biases]
        if self.context_weight is not None:
            tensors.append(self.context_weight)
            if self.context_bias is not None:
                tensors.append(self.context_bias)
        return tensors

    def contiguous(self) -> "SynthesizerParameters":
        """The same, copied where they are not contiguous."""
        tensors = [tensor.contiguous() for tensor in self.tensors()]
        return SynthesizerParameters.of(tensors, len(self.weights), len(self.biases) > 0)

    @classmethod
    def of(cls, tensors: list[Tensor], num_layers: int, bias: bool) -> "SynthesizerParameters":
        """From `tensors()`."""
        num_biases = num_layers if bias else 0
        weights, rest = tensors[:num_layers], tensors[num_layers:]
        biases, of_context = rest[:num_biases], rest[num_biases:]
        return cls(list(weights), list(biases), *of_context)


def _rows(tensor: Tensor) -> Tensor:
    """(..., K) -> (rows, K), also where K is 0."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def synthesizer_fwd(
    trigger: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    context_weight: Tensor | None = None,
    context_bias: Tensor | None = None,
    product: Product = torch.matmul,
) -> tuple[Tensor, list[Tensor]]:
    """a_0 = h W_0^T + b_0 + ctx Q^T + q;  a_i = relu(a_{i-1}) W_i^T + b_i;  the prediction is a_n.

    Args:
        trigger: h, (..., K).
        context: ctx, (..., C), or None.
        weights: W_0 (H, K), ..., W_n (N, H); one matrix (N, K) when there is no hidden layer.
        biases: b_0, ..., b_n, or an empty list.
        context_weight: Q, (H, C).
        context_bias: q, (H,).
        product: of two matrices; another one may round its operands.

    Returns:
        The prediction (..., N), and relu(a_0), ..., relu(a_{n-1}), each (rows, H).
    """
    h = _rows(trigger)
    hidden = []
    for i, weight in enumerate(weights):
        a = product(h, weight.t())
        if biases:
            a = a + biases[i]
        if i == 0 and context is not None:
            a = a + product(_rows(context), context_weight.t())
            if context_bias is not None:
                a = a + context_bias
        if i + 1 < len(weights):
            h = torch.relu(a)
            hidden.append(h)
    return a.reshape(*trigger.shape[:-1], a.shape[-1]), hidden


def synthesizer_bwd(
    target: Tensor,
    prediction: Tensor,
    hidden: list[Tensor],
    trigger: Tensor,
    context: Tensor | None,
    weights: list[Tensor],
    bias: bool,
    reduction: str,
    product: Product = torch.matmul,
    scale: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """e = prediction - target;  loss = sum(e^2) / divisor;  and the loss's parameter gradients.

    With d_n = (2 / divisor) e and d_{i-1} = (d_i W_i) * (relu(a_{i-1}) > 0):

        dW_i = d_i^T relu(a_{i-1})  (dW_0 = d_0^T h),   db_i = sum_rows d_i,
        dQ = d_0^T ctx,   dq = sum_rows d_0.

    Args:
        target: what arrived, (..., N).
        prediction, hidden: the results of `synthesizer_fwd`.
        trigger, context, weights: its arguments.
        bias: whether the layers have biases.
        reduction: "batchmean" (the divisor is the first dimension's size) or "mean" (all elements).
        product: of two matrices, as in `synthesizer_fwd`.
        scale: 2 / divisor, in place of the reduction's.

    Returns:
        The loss (0-d), and the gradients: the weights', the biases', Q's, q's.
    """
    wide = accumulate_dtype(prediction.dtype)
    error = prediction.to(wide) - target.to(wide)
    if scale is None:
        divisor = reduction_divisor(error, reduction)
        loss, scale = error.square().sum() / divisor, 2 / divisor
    else:
        loss = error.square().sum() * (scale / 2)

    grad = _rows(scale * error).to(prediction.dtype)
    inputs = [_rows(trigger), *hidden]
    weight_grads, bias_grads = [], []
    for i in reversed(range(len(weights))):
        weight_grads.insert(0, product(grad.t(), inputs[i]))
        if bias:
            bias_grads.insert(0, grad.sum(0))
        if i > 0:
            grad = product(grad, weights[i]).masked_fill(inputs[i] <= 0, 0)
    grads = weight_grads + bias_grads
    if context is not None:
        grads.append(product(grad.t(), _rows(context)))
        if bias:
            grads.append(grad.sum(0))
    return loss, grads
