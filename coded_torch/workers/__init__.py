"""Pools of machines that run a module, part by part.

To add a pool:

1. Read what :class:`Workers` must keep.
2. Subclass :class:`~coded_torch.workers.live.LiveRequest`: ``_submit`` puts parts into the queue of
   the pool, ``idle`` counts the machines that are free, ``_obstacle`` says why parts wait.
3. Where a machine takes a part, call ``begin``, and compute only if it says so, under
   ``ambient.restored``, with ``task.payload`` and the part's fault, if any. Then ``settle`` or
   ``fail``, with ``kind="raised"`` if the module did.
4. Subclass :class:`Workers`: ``num_machines``, ``open``, ``close``, and how it is pickled. Requests
   must not hold the pool, so that it ends when nothing else does.
5. Test it: inherit ``coded_torch.testing.workers.WorkersTests``. ``tests/workers/test_threads.py``
   is a pool of 60 lines.
"""

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
