r"""Pools whose workers may hang and die, whatever they are."""

from __future__ import annotations

import abc
import os
import threading
from collections.abc import Generator
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import count, positive
from ._crew import START_SECONDS, Crew
from ._request import Request
from .base import Reply, Task, WorkerError, Workers
from .live import Ambient

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SupervisedWorkers"]


class SupervisedWorkers(Workers):
    """A pool whose machines are started, watched and replaced by a thread of their own.

    Subclasses say what a :class:`~coded_torch.workers._crew.Crew` of theirs is.
    """

    def __init__(
        self,
        num_workers: int,
        *,
        threads: int,
        grace: float,
        timeout: float,
        max_requests: int,
    ) -> None:
        self.num_workers = count(self, "num_workers", num_workers)
        self.threads = count(self, "threads", threads)
        self.grace = positive(self, "grace", grace)
        self.timeout = positive(self, "timeout", timeout)
        self.max_requests = count(self, "max_requests", max_requests)
        self._open()

    @abc.abstractmethod
    def _crew_of(self) -> Crew:
        """A new crew."""

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._crew: Crew | None = None
        self._room = threading.BoundedSemaphore(self.max_requests)
        self._closed = False

    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        """Run ``module`` for every worker, on whichever machine is free first."""
        self._refuse_gradients(task)
        crew = self._started()
        ambient = Ambient.capture()
        request = Request(crew.modules.question(module, ambient), task, ambient)
        wait = self.timeout if deadline is None else deadline
        if self._room.acquire(timeout=wait):
            try:
                crew.submit(request)
                for reply in request.collect(deadline, self.timeout):
                    yield _to(task, reply)
            finally:
                request.given_up = True
                self._room.release()
        else:
            for worker in range(task.num_workers):
                what = f"was never asked: {self.max_requests} requests were waiting"
                yield Reply(worker, request.age(), error=WorkerError(worker, what))

    def start(self, timeout: float = START_SECONDS) -> Self:
        """Start all workers and wait until they are up; else the first request starts them.

        Args:
            timeout: seconds.

        Raises:
            RuntimeError: not all of them were up in time.
        """
        crew = self._started()
        if not crew.wait_until_ready(timeout):
            raise RuntimeError(
                f"{type(self).__name__}: all {self.num_workers} workers must be up within "
                f"{timeout:g} s, got {self.num_ready}; {crew.trouble or 'they are still starting'}"
            )
        return self

    def forget(self, module: nn.Module) -> None:
        """Send ``module`` to the workers again when it is needed next."""
        if self._crew is not None:
            self._crew.modules.forget(module)

    @property
    def num_ready(self) -> int:
        """How many workers are up now."""
        return 0 if self._crew is None else len(self._crew.machines)

    def close(self) -> None:
        """End all workers at once, whatever they are at; twice is fine."""
        with self._lock:
            self._closed = True
            if self._crew is not None:
                self._finalizer()

    def _started(self) -> Crew:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{type(self).__name__}: the pool is closed")
            if self._crew is None:
                self._crew, self._pid = self._crew_of(), os.getpid()
                # The thread knows the crew, not the pool: a pool that nobody holds is closed.
                # At exit it is closed before multiprocessing waits for the processes to end, which
                # one that is stopped never does.
                self._finalizer = Finalize(self, self._crew.close, exitpriority=0)
                self._crew.thread.start()
        if self._pid != os.getpid():
            raise RuntimeError(
                f"{type(self).__name__}: the pool must be used in the process that started it; "
                "give a forked process one of its own"
            )
        return self._crew

    def _refuse_gradients(self, task: Task) -> None:
        for leaf in task.leaves:
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{type(self).__name__}: inputs must not require gradients, which do not pass "
                    "through other processes; call under torch.no_grad(), or use DeviceWorkers"
                )

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_lock", "_crew", "_room", "_finalizer", "_closed", "_pid")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_workers})"


def _to(task: Task, reply: Reply) -> Reply:
    """The reply with its tensors on the device of the task."""
    if task.device.type == "cpu" or reply.value is None:
        return reply
    value = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(task.device), reply.value)
    return Reply(reply.worker, reply.latency, value, reply.error)
