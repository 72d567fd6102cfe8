"""Which process is which stage."""

import datetime
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Receives wait for as long as a peer computes: who has died is told otherwise (see `liveness.py`).
_PATIENCE = datetime.timedelta(days=7)


def init(stages: int, device_type: str = "cpu") -> DeviceMesh:
    """The processes as a mesh ("stage", "replica"), from torchrun's environment.

    Args:
        stages: of the network; the number of processes is a multiple, as many for each stage.
        device_type: "cpu" (gloo) or "cuda" (NCCL, a GPU for each process of a machine).

    Raises:
        RuntimeError: torchrun's environment is missing.
        ValueError: the processes cannot be divided among the stages.
    """
    if not dist.is_initialized():
        _start(device_type)
    world = dist.get_world_size()
    if stages < 1 or world % stages:
        raise ValueError(
            f"distributed.init: stages must divide the number of processes, {world}, got {stages}"
        )
    names = ("stage", "replica")
    return init_device_mesh(device_type, (stages, world // stages), mesh_dim_names=names)


def _start(device_type: str) -> None:
    try:
        store, rank, world = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise RuntimeError(
            "distributed.init: the environment must be torchrun's: start the program by "
            f"torchrun --nproc-per-node N program.py ({error})"
        ) from error
    if device_type == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    # A restarted process must not meet the addresses of the one that it replaces.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore(f"fastdni/{restart}", store),
        rank=rank,
        world_size=world,
        timeout=_PATIENCE,
    )
