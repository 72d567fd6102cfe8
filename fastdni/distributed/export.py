"""The parts of all processes as one state dict."""

import json

import torch
import torch.distributed as dist
from torch import Tensor

from fastdni.distributed.channels import DTYPES
from fastdni.distributed.stage import DecoupledStage


def export(stage: DecoupledStage) -> dict[str, Tensor]:
    """What the undivided network loads (`load_state_dict`), on every process; all of them call it.

    The keys are those of the network that `split` was given: of a `DecoupledSequential` with its
    synthesizers, of an nn.Sequential its layers. For parts of your own, those of a
    `DecoupledSequential` of all parts.
    """
    counts = torch.zeros(stage.count, dtype=torch.int64, device=stage.mesh.device_type)
    counts[stage.index] = len(stage.stages)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    own = stage.undivided_state_dict(int(counts[: stage.index].sum()))
    found: dict[str, Tensor] = {}
    for index in range(stage.count):
        source = int(stage.mesh.mesh[index, 0])
        mine = own if dist.get_rank() == source else None
        for name, tensor in _broadcast(mine, source, counts.device).items():
            found[name] = tensor
    return found


def _broadcast(
    own: dict[str, Tensor] | None, source: int, device: torch.device
) -> dict[str, Tensor]:
    """A dict of tensors, of one process to all."""
    said = b""
    if own is not None:
        about = [[n, list(t.shape), DTYPES.index(t.dtype)] for n, t in own.items()]
        said = json.dumps(about).encode()
    size = torch.tensor(len(said), device=device)
    dist.broadcast(size, source)
    told = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if own is not None:
        told.copy_(torch.frombuffer(bytearray(said), dtype=torch.uint8))
    dist.broadcast(told, source)
    found = {}
    for name, shape, code in json.loads(bytes(told.cpu().numpy()).decode()):
        tensor = torch.empty(shape, dtype=DTYPES[code], device=device)
        if own is not None:
            tensor.copy_(own[name])
        dist.broadcast(tensor, source)
        found[name] = tensor
    return found
