"""Workers: who computes the coded inputs."""

from .base import Reply, Task, WorkerError, Workers
from .devices import DeviceWorkers
from .faults import Fault
from .faulty import FaultyWorkers
from .local import LocalWorkers
from .processes import ProcessWorkers
from .ray import RayWorkers

__all__ = [
    "DeviceWorkers",
    "Fault",
    "FaultyWorkers",
    "LocalWorkers",
    "ProcessWorkers",
    "RayWorkers",
    "Reply",
    "Task",
    "WorkerError",
    "Workers",
]
