"""Pools of machines that run a module, part by part."""

from .base import Began, Part, Reply, Request, Task, WorkerError, Workers
from .devices import DeviceWorkers
from .faults import Fault, FaultyWorkers
from .local import LocalWorkers
from .processes import ProcessWorkers
from .ray import RayWorkers
from .reputation import Reputation

__all__ = [
    "Began",
    "DeviceWorkers",
    "Fault",
    "FaultyWorkers",
    "LocalWorkers",
    "Part",
    "ProcessWorkers",
    "RayWorkers",
    "Reply",
    "Reputation",
    "Request",
    "Task",
    "WorkerError",
    "Workers",
]
