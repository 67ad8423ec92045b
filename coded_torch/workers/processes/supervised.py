r"""The base of pools whose workers may hang and die: processes and Ray actors."""

from __future__ import annotations

import abc
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..._arguments import count, instance, positive, warn
from ..base import Request, Task
from ..dispatch import DispatchedWorkers
from ..live import Ambient, LiveRequest
from .supervisor import START_SECONDS, Supervisor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SupervisedWorkers"]


class SupervisedWorkers(DispatchedWorkers):
    """A pool whose :class:`Supervisor` starts, watches and replaces the workers."""

    def __init__(self, num_workers: int, *, threads: int, grace: float, timeout: float) -> None:
        self._size = count(self, "num_workers", num_workers)
        self.threads = count(self, "threads", threads)
        self.grace = positive(self, "grace", grace)
        self.timeout = positive(self, "timeout", timeout)
        self._open()

    @abc.abstractmethod
    def _make_supervisor(self) -> Supervisor[Any]:
        """Return a new supervisor."""

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._supervisor: Supervisor[Any] | None = None
        self._closed = False
        self._warned = False

    @property
    def num_workers(self) -> int:  # type: ignore[override]
        return self._size if self._supervisor is None else self._supervisor.size

    def resize(self, num_workers: int) -> None:
        self._size = count(self, "num_workers", num_workers)
        if self._supervisor is not None:
            self._supervisor.resize(self._size)

    def open(self, module: nn.Module, task: Task) -> Request:
        self._check_gradients(module, task)
        return _SupervisedRequest(task, self.timeout, self._dispatcher(module), module)

    def start(
        self,
        module: nn.Module | None = None,
        example: Any = None,
        *,
        timeout: float = START_SECONDS,
    ) -> Self:
        """Start as :meth:`Workers.start` does. The first request starts the pool otherwise."""
        instance(self, "module", module, nn.Module, optional=True)
        end = time.monotonic() + positive(self, "timeout", timeout)
        supervisor = self._dispatcher(module)
        if not supervisor.wait_until_ready(timeout):
            trouble = f"last error: {supervisor.trouble or 'none, they are still starting'}"
            raise RuntimeError(
                f"{type(self).__name__}: only {self.num_ready} of {self.num_workers} workers "
                f"started within {timeout:g} s; {trouble}"
            )
        return super().start(module, example, timeout=end - time.monotonic())

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are up, on their computers."""
        return [] if self._supervisor is None else [w.pid for w in self._supervisor.workers]

    def forget(self, module: nn.Module) -> None:
        """Send ``module`` to the workers again when it is needed next."""
        if self._supervisor is not None:
            self._supervisor.modules.forget(module)

    @property
    def num_ready(self) -> int:
        return 0 if self._supervisor is None else len(self._supervisor.workers)

    @property
    def num_restarts(self) -> int:
        return 0 if self._supervisor is None else self._supervisor.num_lost

    def close(self) -> None:
        """End all workers at once, even during a call. May be called twice."""
        with self._lock:
            self._closed = True
        # Not under the lock, as it may take seconds that others would wait for.
        if self._supervisor is not None:
            self._finalizer()

    def _dispatcher(self, module: nn.Module | None = None) -> Supervisor[Any]:
        """Return the supervisor. If it is new, it knows the module before it starts workers."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{type(self).__name__}: the pool is closed")
            if self._supervisor is None:
                supervisor = self._make_supervisor()
                if module is not None:
                    supervisor.modules.pack(module, Ambient.capture())
                self._supervisor, self._pid = supervisor, os.getpid()
                # The thread knows the supervisor, not the pool: a pool that nothing holds is
                # closed, and so is one that is left at exit.
                self._finalizer = weakref.finalize(self, supervisor.close)
                supervisor.thread.start()
        if self._pid != os.getpid():
            raise RuntimeError(
                f"{type(self).__name__}: the pool must be used in the process that started it; "
                "give a forked process its own pool"
            )
        return self._supervisor

    def _check_gradients(self, module: nn.Module, task: Task) -> None:
        if not torch.is_grad_enabled():
            return
        owner, remedy = type(self).__name__, "call under torch.no_grad(), or use DeviceWorkers"
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in task.leaves):
            raise RuntimeError(
                f"{owner}: inputs must not require gradients, which do not pass through other "
                f"processes; {remedy}"
            )
        if not self._warned and any(p.requires_grad for p in module.parameters()):
            self._warned = True
            warn(
                f"{owner}: answers have no gradients, which do not pass through other processes; "
                f"{remedy} to train"
            )

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_lock", "_supervisor", "_finalizer", "_closed", "_pid", "_warned")
        own = {name: value for name, value in vars(self).items() if name not in hidden}
        return {**own, "_size": max(self.num_workers, 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_workers})"


class _SupervisedRequest(LiveRequest):
    """A request whose module is packed, and whose results go to the device of the task."""

    def __init__(
        self, task: Task, timeout: float, supervisor: Supervisor[Any], module: nn.Module
    ) -> None:
        super().__init__(task, timeout, supervisor, None)
        self.module = supervisor.modules.pack(module, self.ambient)

    def receive(self, value: Any) -> Any:
        if self.task.device.type == "cpu":
            return value
        return pytree.tree_map_only(Tensor, lambda x: x.to(self.task.device), value)
