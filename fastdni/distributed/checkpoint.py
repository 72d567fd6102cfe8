"""Checkpoints of a stage, by torch.distributed.checkpoint: tensors, and numbers as JSON; nothing
that would have to be unpickled.

A checkpoint of message k holds a stage that has computed the messages below k, and the gradients
that have come for them: FOLDER/stage-S/replica-R/k. The newest that every process has is where
training goes on.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from fastdni.training.piece import Held

_META = "meta"


def _packed(values: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The same as JSON can say it, with tensors put aside under a name."""
    if isinstance(values, Tensor):
        tensors[name] = values.detach()
        return {"tensor": name}
    if isinstance(values, dict):
        items = [[k, _packed(v, tensors, f"{name}.{k}")] for k, v in values.items()]
        return {"dict": items}
    if isinstance(values, list | tuple):
        items = [_packed(v, tensors, f"{name}.{i}") for i, v in enumerate(values)]
        return {"tuple" if isinstance(values, tuple) else "list": items}
    if values is None or isinstance(values, bool | int | float | str):
        return values
    raise TypeError(
        f"a checkpoint must hold tensors and numbers, got {type(values).__name__}: {name}"
    )


def _unpacked(values: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(values, dict):
        return values
    ((kind, found),) = values.items()
    if kind == "tensor":
        return tensors[found]
    if kind == "dict":
        return {k: _unpacked(v, tensors) for k, v in found}
    made = [_unpacked(v, tensors) for v in found]
    return tuple(made) if kind == "tuple" else made


def save(path: Path, values: dict[str, Any]) -> None:
    """Writes nested dicts, lists and tuples of tensors and numbers; complete, or not at all."""
    tensors: dict[str, Tensor] = {}
    told = json.dumps(_packed(values, tensors, "")).encode()
    tensors[_META] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    dcp.save(tensors, checkpoint_id=unfinished, no_dist=True)
    unfinished.rename(path)


def load(path: Path) -> dict[str, Any]:
    """What was saved."""
    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {}
    for name, about in known.items():
        if not isinstance(about, TensorStorageMetadata):
            raise RuntimeError(
                f"{path} must hold tensors alone, got {type(about).__name__}: {name}"
            )
        tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return _unpacked(json.loads(bytes(tensors.pop(_META).numpy()).decode()), tensors)


class Checkpoints:
    """Those of one stage.

    Args:
        folder: of all stages; every process reaches it.
        stage, replica: this one's. Replicas keep what is their own, activations and gradients,
            besides.
    """

    def __init__(self, folder: str | Path, stage: int, replica: int):
        self.folder = Path(folder) / f"stage-{stage}" / f"replica-{replica}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def complete(self) -> list[int]:
        """The messages of those there are."""
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def newest_of_all(self, device: torch.device) -> int:
        """The newest that every process has, 0 for none; those after it are removed."""
        own = self.complete()
        count = torch.tensor(len(own), device=device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        padded = torch.full((int(count),), -1, dtype=torch.int64, device=device)
        padded[: len(own)] = torch.tensor(own, dtype=torch.int64)
        every = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(every, padded)
        common = set.intersection(*(set(each.tolist()) for each in every)) - {-1}
        newest = max(common, default=0)
        for number in own:
            if number > newest:
                self._remove(number)
        return newest

    def save(
        self,
        number: int,
        stage: nn.Module,
        optimizer: Optimizer,
        applied: int,
        held: dict[int, Held],
        feedback: dict[int, Tensor],
    ) -> None:
        """Writes one: of the message `number`, with `applied` gradients applied."""
        known = {j: (h.h, h.ctx, feedback[j]) for j, h in held.items()}
        values = {
            "stage": dict(stage.state_dict()),
            "optimizer": optimizer.state_dict(),
            "applied": applied,
            "held": known,
            "random": torch.get_rng_state(),
        }
        save(self.folder / str(number), values)

    def load(
        self, number: int, stage: nn.Module, optimizer: Optimizer, device: torch.device
    ) -> tuple[int, dict[int, Held], dict[int, Tensor]]:
        """Puts one back; how many gradients were applied, and what waits for theirs with them."""
        values = load(self.folder / str(number))
        stage.load_state_dict(values["stage"])
        optimizer.load_state_dict(values["optimizer"])
        torch.set_rng_state(values["random"])
        logging.getLogger("fastdni.distributed").info("goes on from message %d", number)
        held, feedback = {}, {}
        for j, known in values["held"].items():
            h, ctx, gradient = (None if each is None else each.to(device) for each in known)
            held[j], feedback[j] = Held(h, ctx), gradient
        return values["applied"], held, feedback

    def keep_from(self, number: int) -> None:
        """Removes those that are older."""
        for each in self.complete():
            if each < number:
                self._remove(each)

    def _remove(self, number: int) -> None:
        # A removal may be cut short: what is left of it is no checkpoint.
        path = self.folder / str(number)
        gone = path.with_name(f"{number}.gone")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
