"""The boundaries of a recurrent network: its synthesizers at the state between two windows.

M(s, ctx)          in the unit in which it learns; u times the gradient of the loss
u = target_scale B where the loss of M is scaled by the batch: the unit of a row's own loss;
    target_scale   in the scales of dni-pytorch ("layers") and DNI-RNN ("mean")
target             target_scale clip(u / target_scale G)
sent               factor M / u
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdni.training.boundary import Boundary, Prediction, learns
from fastdni.training.optimizers import Optimizers
from fastdni.training.recurrent.layouts import Joined, Layout, rows_of
from fastdni.training.recurrent.settings import Settings


class Gathered:
    """Gradients of synthesizers that are handed over once, all of them, through autograd:
    DistributedDataParallel listens there, and waits for every parameter once a backward pass."""

    def __init__(self):
        self._found: dict[int, Tensor] = {}

    def add(self, learning: list[Tensor], gradients: list[Tensor | None]) -> None:
        """More of them."""
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is None:
                continue
            gradient, number = gradient.to(parameter.dtype), id(parameter)
            before = self._found.get(number)
            self._found[number] = gradient if before is None else before + gradient

    def hand_over(self, parameters: list[Tensor]) -> None:
        """To all of these; zeros where nothing was learnt."""
        learning = [p for p in parameters if p.requires_grad]
        if learning:
            known = [self._found.get(id(p)) for p in learning]
            pairs = zip(learning, known, strict=True)
            torch.autograd.backward(
                learning, [torch.zeros_like(p) if g is None else g for p, g in pairs]
            )


class Boundaries:
    """Synthesizers over the state of a recurrent network.

    Args:
        layout: how the state lies before them.
        synthesizers: one for each trigger of the layout.
        settings: of the network; they may change.
    """

    def __init__(self, layout: Layout, synthesizers: list[nn.Module], settings: Settings):
        self.layout, self.synthesizers, self._settings = layout, synthesizers, settings

    @property
    def is_joined(self) -> bool:
        """Whether the state lies in rows before one synthesizer."""
        return isinstance(self.layout, Joined)

    def predicted(self, tensors: list[Tensor]) -> int:
        """How many of a state's tensors do."""
        return self.layout.count or len(tensors)

    # ---- units ----

    def numbers(self, tensors: list[Tensor]) -> tuple[float, float, float, float]:
        """The same as the window's op takes them, for a state that is joined."""
        settings = self._settings
        size = 0
        for tensor in tensors[: self.layout.count]:
            size += tensor.numel()
        return (
            self.unit(rows_of(tensors)) / settings.target_scale,
            settings.target_clip or 0.0,
            settings.target_scale,
            self.scale(tensors, size),
        )

    def unit(self, rows: int) -> float:
        """What the loss's gradient is multiplied by before it is learnt, clip apart."""
        settings = self._settings
        return settings.target_scale * (rows if settings.scale == "batch" else 1)

    def scale(self, tensors: list[Tensor], size: int) -> float:
        """Of the error's gradient, for a trigger of `size` numbers."""
        scale = self._settings.scale
        if scale == "layers":
            return 2 / (len(tensors[0]) if tensors[0].dim() == 3 else 1)
        return 2 / (rows_of(tensors) if scale == "batch" else size)

    def targets(self, gradients: list[Tensor], loss_scale: float = 1.0) -> list[Tensor]:
        """What is learnt of the loss's gradient with respect to a state, a tensor a trigger."""
        clip, unit = self._settings.target_clip, self.unit(rows_of(gradients)) / loss_scale
        found = self.layout.join(gradients)
        if clip is not None:
            per_row = unit / self._settings.target_scale
            norms = [t.norm(dim=-1, keepdim=True) * per_row for t in found]
            pairs = zip(found, norms, strict=True)
            found = [t * (clip / norm.clamp_min(clip)) for t, norm in pairs]
        return found if unit == 1 else [t * unit for t in found]

    def gradients(
        self, messages: list[Tensor], like: list[Tensor], factor: float
    ) -> list[Tensor | None]:
        """`factor` times the gradient that messages stand for, of each tensor of a state."""
        factor = factor / self.unit(rows_of(like))
        messages = messages if factor == 1 else [message * factor for message in messages]
        found = self.layout.split(messages, like)
        pairs = zip(found, like, strict=True)
        return [g if g is None or g.dtype == t.dtype else g.to(t.dtype) for g, t in pairs]

    # ---- the contract, for all of them ----

    def predict(self, tensors: list[Tensor], ctx: Any, learn: bool = True) -> list[Prediction]:
        """What the synthesizers say at a state."""
        triggers = self.layout.join([tensor.detach() for tensor in tensors])
        pairs = zip(self.synthesizers, triggers, strict=True)
        return [Boundary(m).predict(_in_dtype_of(m, t), ctx, learn) for m, t in pairs]

    def regress(
        self,
        predictions: list[Prediction],
        targets: list[Tensor],
        tensors: list[Tensor],
        rows: Tensor | None = None,
        weight: float = 1.0,
        optimizers: Optimizers | None = None,
        gathered: Gathered | None = None,
        windows: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Has the synthesizers learn.

        Args:
            predictions: made where they are to learn; for `rows`, with the parameters of now.
            targets: of each what is learnt.
            tensors: the state they were made at; of one window.
            rows: (B, 1), those that count; None: all. Any other learns nothing.
            weight: of the loss.
            optimizers: as `Prediction.regress`.
            gathered: takes the gradients, which otherwise are added to `p.grad`.
            windows: how many lie one after the other in predictions, targets and rows.

        Returns:
            The loss, scale / 2 sum(e^2); and the same of the targets alone, for comparison.
        """
        loss = energy = 0.0
        for m, p, target in zip(self.synthesizers, predictions, targets, strict=True):
            scale = weight * self.scale(tensors, p.trigger.numel() // windows)
            counting = target if rows is None else torch.where(rows, target, 0)
            energy = energy + counting.square().sum() * (scale / 2)
            if rows is not None:
                target = torch.where(rows, target, p.message)
            if gathered is not None and learns(m):
                p.check(target)
                each, gradients = p.gradients(target, scale)
                gathered.add(p.learning, gradients)
            else:
                each, _ = p.regress(target, scale, optimizers=optimizers, learn=learns(m))
            loss = loss + each
        return loss, energy


def _in_dtype_of(synthesizer: nn.Module, trigger: Tensor) -> Tensor:
    """Under autocast a state may have come out narrower than its synthesizer."""
    own = next((p.dtype for p in synthesizer.parameters() if p.is_floating_point()), trigger.dtype)
    return trigger if trigger.dtype == own else trigger.to(own)
