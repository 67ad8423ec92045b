"""Workers: who computes the coded inputs."""

from .base import Reply, Task, WorkerError, Workers
from .devices import DeviceWorkers
from .faults import Fault
from .faulty import FaultyWorkers
from .local import LocalWorkers
from .processes import ProcessWorkers

__all__ = [
    "DeviceWorkers",
    "Fault",
    "FaultyWorkers",
    "LocalWorkers",
    "ProcessWorkers",
    "Reply",
    "Task",
    "WorkerError",
    "Workers",
]
