"""The auxiliary task: to predict, too, what will be predicted at the next windows' ends.

    A_k(s_w, ctx) learns M(s_{w+k}),   k = 1 .. n

The A_k are last layers on M's last hidden activation, and their loss goes through M's other layers;
where M is linear they are linear maps of their own.

Source: Jaderberg et al. 2016 (arXiv 1608.05343), section 3.1, "auxiliary task".
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdni.synthesizers import BasicSynthesizer, required_context, start_at_zero
from fastdni.training.recurrent.boundaries import Boundaries, Gathered
from fastdni.training.recurrent.layouts import Layout
from fastdni.training.recurrent.settings import Settings


class Met(NamedTuple):
    """A state that was met.

    Attributes:
        tensors: of it, detached.
        ctx: the context there.
        rows: (B, 1), which of them count; None: all.
    """

    tensors: list[Tensor]
    ctx: Any
    rows: Tensor | None


class Branch(nn.Module):
    """A last layer of its own on the last hidden activation of a BasicSynthesizer."""

    def __init__(self, synthesizer: BasicSynthesizer):
        super().__init__()
        last = synthesizer.layers[-1]
        self.layer = nn.Linear(last.in_features, last.out_features).to(last.weight)
        for parameter in self.layer.parameters():
            nn.init.zeros_(parameter)
        self._trunk = (synthesizer,)  # whose parameters are no others'

    def forward(self, trigger: Tensor, context: Tensor | None) -> Tensor:
        """As BasicSynthesizer's, with another last layer."""
        (trunk,) = self._trunk
        a = trunk.input_trigger(trigger)
        if trunk.input_context is not None:
            a = a + trunk.input_context(required_context(context, trunk.input_context.weight))
        for layer in trunk.layers[:-1]:
            a = layer(F.relu(a))
        return self.layer(F.relu(a))


def branches(synthesizer: nn.Module, width: int) -> nn.Module:
    """A_k of a synthesizer."""
    if isinstance(synthesizer, BasicSynthesizer) and len(synthesizer.layers):
        return Branch(synthesizer)
    like = next(synthesizer.parameters(), torch.empty(0))
    context_dim = getattr(synthesizer, "context_dim", None)
    return start_at_zero(BasicSynthesizer(width, context_dim=context_dim)).to(like)


class Horizon:
    """The synthesizers of the auxiliary task.

    Args:
        heads: of each k those that there are, one a trigger.

    Attributes:
        length: n.
    """

    def __init__(self, heads: list[list[nn.Module]], layout: Layout, settings: Settings):
        self.length, self._settings = len(heads), settings
        self._boundaries = [Boundaries(layout, each, settings) for each in heads]

    def learn(
        self,
        met: list[Met | None],
        ended: Tensor | None,
        messages: list[Tensor],
        weight: float,
        gathered: Gathered | None,
    ) -> list[Met | None]:
        """Regresses A_k, for each k, at the k-th last state.

        Args:
            met: the states before a window's end, newest first; None for one that does not count.
            ended: (B, 1), the rows whose episode ended in the window.
            messages: what M says at the window's end.
            weight: of the loss, besides `horizon_weight`.
            gathered: see `Boundaries.regress`.

        Returns:
            The states that are left for the next window's end.
        """
        left: list[Met | None] = []
        weight = weight * self._settings.horizon_weight
        for boundaries, each in zip(self._boundaries, met, strict=False):
            if each is not None and ended is not None:
                each = each._replace(rows=~ended if each.rows is None else each.rows & ~ended)
            left.append(each)
            if each is None:
                continue
            predictions = boundaries.predict(each.tensors, each.ctx)
            boundaries.regress(
                predictions, messages, each.tensors, each.rows, weight, gathered=gathered
            )
        return left[: self.length - 1]
