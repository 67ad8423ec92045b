"""Pools of workers that run a module, part by part.

To add a pool on real time:

1. Read the rules of :class:`Workers`.
2. Subclass :class:`~coded_torch.workers._dispatch.Dispatcher`: ``send`` hands a part to a worker.
   It calls :func:`~coded_torch.workers._base.compute` under ``part.request.ambient.restored``, and
   reports to ``settle``: a value or, if the module raised, a ``Failure`` of the kind "raised".
3. Subclass :class:`~coded_torch.workers._dispatch.DispatchedWorkers`: ``_make`` returns the
   dispatcher, and ``open`` a :class:`~coded_torch.workers._live.LiveRequest`.
4. Inherit ``coded_torch.testing.workers.WorkersTests``, as ``tests/workers/test_threads.py`` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .._table import Began, Part, Reply, WorkerError
from ._base import Fault, Request, Task, Workers
from ._devices import DeviceWorkers
from ._local import LocalWorkers
from ._processes import ProcessWorkers
from ._ray import RayWorkers

if TYPE_CHECKING:
    from ..experiments._faults import FaultyWorkers
    from ..open_inference._client import RemoteModule
    from ._endpoints import EndpointWorkers

__all__ = ["Began", "DeviceWorkers", "EndpointWorkers", "Fault", "FaultyWorkers", "LocalWorkers"]
__all__ += ["Part", "ProcessWorkers", "RayWorkers", "RemoteModule", "Reply", "Request", "Task"]
__all__ += ["WorkerError", "Workers"]


def __getattr__(name: str) -> Any:
    # aiohttp, an extra, takes .1 s to import. The product does not need the experiments.
    if name in ("EndpointWorkers", "RemoteModule"):
        return getattr(import_module(f"{__name__}._endpoints"), name)
    if name == "FaultyWorkers":
        return import_module("coded_torch.experiments._faults").FaultyWorkers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
