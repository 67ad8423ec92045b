"""Workers: who computes the coded inputs."""

from .base import Reply, Task, WorkerError, Workers
from .devices import DeviceWorkers
from .local import LocalWorkers

__all__ = ["DeviceWorkers", "LocalWorkers", "Reply", "Task", "WorkerError", "Workers"]
