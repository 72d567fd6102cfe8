"""One process's part of a network."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastdni.network import DecoupledSequential
from fastdni.training.piece import Piece

CALLER = "schedule.step"


class Slice(nn.Sequential):
    """Consecutive layers of an nn.Sequential, under the names that they have there."""


class DecoupledStage(nn.Module):
    """The stages of a network that this process trains, and the synthesizer above them.

    Args:
        part: a module; or a `DecoupledSequential`, whose stages then learn decoupled from each
            other, too. What `DecoupledSequential` would fuse runs fused.
        mesh: of `init`.
        synthesizer: M(h, ctx), predicts the gradient of the part's output; the last stage has none.

    Attributes:
        index, count: this stage, and how many there are; `replica`: which of those that share it.
        stages, synthesizers: modules.

    Raises:
        ValueError: the last stage has a synthesizer, or another one has none.
    """

    def __init__(self, part: nn.Module, mesh: DeviceMesh, synthesizer: nn.Module | None = None):
        super().__init__()
        self.mesh = mesh
        self.index, self.replica = mesh.get_coordinate()
        self.count = mesh.size(0)
        self.is_first, self.is_last = self.index == 0, self.index == self.count - 1
        if (synthesizer is None) != self.is_last:
            rule = "be None for the last stage" if self.is_last else "be given for all but the last"
            raise ValueError(f"DecoupledStage: synthesizer must {rule} (stage {self.index})")
        whole = isinstance(part, DecoupledSequential)
        if whole and (part.input_synthesizers or part.bp_lambda):
            raise ValueError(
                "DecoupledStage: part must have no input_synthesizers and a bp_lambda of 0"
            )
        self.stages = nn.ModuleList(part.stages if whole else [part])
        between = list(part.synthesizers) if whole else []
        self.synthesizers = nn.ModuleList(between + [synthesizer] * (not self.is_last))
        # What the engine looks at besides.
        self.input_synthesizers, self.bp_lambda, self.below = None, 0.0, not self.is_first

    def forward(self, x: Tensor) -> Tensor:
        """The part's output."""
        for stage in self.stages:
            x = stage(x)
        return x

    def _reduce(self, parameters: list[Tensor]) -> None:
        """Means of the gradients over the replicas, of a dtype all in one message."""
        group, replicas = self.mesh.get_group("replica"), self.mesh.size(1)
        found = [p.grad for p in parameters if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in found):
            own = [g for g in found if g.dtype == dtype]
            joined = torch.cat([g.flatten() for g in own])
            dist.all_reduce(joined, group=group)
            parts = (joined / replicas).split([g.numel() for g in own])
            torch._foreach_copy_(own, [p.view_as(g) for p, g in zip(parts, own, strict=True)])

    def undivided_state_dict(self, first: int) -> dict[str, Tensor]:
        """Its state under the names that the undivided network has for it.

        Args:
            first: the number of its first stage there.
        """
        (part, *others) = self.stages
        if isinstance(part, Slice) and not others:
            return dict(part.state_dict())
        found = {}
        for name, tensor in self.state_dict().items():
            kind, number, rest = name.split(".", 2)
            found[f"{kind}.{int(number) + first}.{rest}"] = tensor
        return found

    def piece(self, waits: bool) -> Piece:
        """Who trains it; see `Piece`."""
        reduce = self._reduce if self.mesh.size(1) > 1 else None
        return Piece(self, CALLER, waits, reduce)
