"""Ways a tensor may lie in memory."""

import torch
from torch import Tensor


def transposed(tensor: Tensor) -> Tensor:
    """The dimensions in reverse order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def strided(tensor: Tensor) -> Tensor:
    """Every second element, with NaN between."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, but one element into its memory, so that no vector load is aligned."""
    return torch.cat([tensor.new_full((1,), float("nan")), tensor.flatten()])[1:].view_as(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """One element for all, with stride 0, as the gradient of a sum comes."""
    return tensor.flatten()[0].expand(tensor.shape) if tensor.numel() else tensor


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": transposed,
    "strided": strided,
    "offset": offset,
    "expanded": expanded,
}
