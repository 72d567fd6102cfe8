"""Decoupled stages on several processes and machines."""

from fastdni.distributed.export import export
from fastdni.distributed.mesh import init
from fastdni.distributed.schedule import DistributedError, ScheduleDecoupled, StageResult
from fastdni.distributed.split import split
from fastdni.distributed.stage import DecoupledStage

__all__ = [
    "DecoupledStage",
    "DistributedError",
    "ScheduleDecoupled",
    "StageResult",
    "export",
    "init",
    "split",
]
