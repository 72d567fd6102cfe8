"""window: what stands around the recurrence in a decoupled window, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdni.reference.synthesizer import SynthesizerParameters, synthesizer_bwd, synthesizer_fwd
from fastdni.reference.update import update_


def joined(state: list[Tensor], predicted: int) -> Tensor:
    """The first tensors of a state side by side, (B, S), layer after layer."""
    rows = [t if t.dim() == 2 else t.transpose(0, 1).flatten(1) for t in state[:predicted]]
    return torch.cat(rows, 1)


def split(message: Tensor, state: list[Tensor], predicted: int) -> list[Tensor]:
    """The reverse; zeros for those that are not predicted."""
    parts = message.split([t.numel() // t.shape[-2] for t in state[:predicted]], 1)
    found = [
        part if t.dim() == 2 else part.unflatten(1, (len(t), -1)).transpose(0, 1).contiguous()
        for part, t in zip(parts, state, strict=False)
    ]
    return found + [torch.zeros_like(t) for t in state[predicted:]]


@torch.enable_grad()
def window_fwd(
    output: Tensor,
    target: Tensor | None,
    criterion: str,
    weight: float,
    head: list[Tensor],
    state: list[Tensor],
    predicted: int,
    context: Tensor | None,
    parameters: SynthesizerParameters,
    factor: float,
    ended: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """See `fastdni.ops.window_fwd`."""
    leaves = [t.detach().requires_grad_() for t in (output, *head)]
    prediction = F.linear(*leaves).flatten(0, -2)
    if target is None:
        loss, grad_output, grad_head = prediction.new_zeros(()), output.new_empty(0), []
    elif criterion == "mse":
        loss = F.mse_loss(prediction, target.reshape(prediction.shape))
    else:
        loss = F.cross_entropy(prediction, target.flatten())
    if target is not None:
        loss = loss * weight
        grad_output, *grad_head = torch.autograd.grad(loss, leaves)
    sent = []
    if factor != 0:
        with torch.no_grad():
            message, _ = synthesizer_fwd(joined(state, predicted), context, *parameters)
            message = message * factor
            if ended is not None:
                message = torch.where(ended.view(-1, 1), 0, message)
            sent = split(message, state, predicted)
    return prediction.detach(), loss.detach(), grad_output, grad_head, sent


@torch.no_grad()
def window_update_(
    start: list[Tensor],
    grad_start: list[Tensor],
    predicted: int,
    context: Tensor | None,
    parameters: SynthesizerParameters,
    learns: bool,
    row_unit: float,
    clip: float,
    target_scale: float,
    scale: float,
    rows: Tensor | None,
    others: list[Tensor],
    gradients: list[Tensor],
    state: list[Tensor],
    groups: list[int],
    settings: list[float],
) -> tuple[Tensor, Tensor]:
    """See `fastdni.ops.window_update_`."""
    loss = energy = others[0].new_zeros(())
    updated, found = others, gradients
    if learns:
        h, target = joined(start, predicted), joined(grad_start, predicted) * row_unit
        if clip > 0:
            target = target * (clip / target.norm(dim=1, keepdim=True).clamp_min(clip))
        target = target * target_scale
        message, hidden = synthesizer_fwd(h, context, *parameters)
        if rows is not None:
            rows = rows.view(-1, 1)
            energy = torch.where(rows, target, 0).square().sum() * (scale / 2)
            target = torch.where(rows, target, message)
        else:
            energy = target.square().sum() * (scale / 2)
        loss, own = synthesizer_bwd(
            target, message, hidden, h, context, parameters.weights, len(parameters.biases) > 0,
            "batchmean", torch.matmul, scale,
        )  # fmt: skip
        updated, found = [*parameters.tensors(), *others], [*own, *gradients]
    update_(updated, found, state, groups, settings)
    return loss, energy
