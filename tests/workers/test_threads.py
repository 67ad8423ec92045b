"""A small pool of its own, as one may write it: it passes the tests of all pools."""

from __future__ import annotations

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import nn

from coded_torch.testing.workers import WorkersTests
from coded_torch.workers import Task
from coded_torch.workers.dispatch import (
    DispatchedWorkers,
    Dispatcher,
    Job,
    Worker,
)
from coded_torch.workers.faults import compute
from coded_torch.workers.live import LiveRequest


class ThreadWorkers(DispatchedWorkers):
    """Threads of this process that share the module."""

    def __init__(self, num_workers: int, timeout: float = 600.0) -> None:
        self.timeout = timeout
        self._threads = Threads(num_workers)
        self._close = weakref.finalize(self, self._threads.close)

    def open(self, module: nn.Module, task: Task) -> LiveRequest:
        if not self._close.alive:
            raise RuntimeError("ThreadWorkers: the pool is closed")
        # The request holds the threads, not the pool, which ends when nothing else holds it.
        return LiveRequest(task, self.timeout, self._threads, module)

    def _dispatcher(self) -> Dispatcher:
        return self._threads

    def close(self) -> None:
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_workers, self.timeout)


class Threads(Dispatcher):
    kind = "threads"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._executor = ThreadPoolExecutor(size)
        for place in range(size):
            self.add(Worker(place))

    def send(self, worker: Worker, job: Job) -> None:
        self._executor.submit(self._compute, worker, job)

    def _compute(self, worker: Worker, job: Job) -> None:
        task = job.request.task
        try:
            with job.request.ambient.restored(task.device):
                value = compute(job.module, task.payload(job.part.units), job.part.fault)
        except BaseException as cause:
            reason = f"failed: {type(cause).__name__}: {cause}"
            self.fail(worker, job.number, reason, cause, kind="raised")
        else:
            self.settle(worker, job.number, value)

    def close(self) -> None:
        self.stop()
        self._executor.shutdown()


class TestThreadWorkers(WorkersTests):
    def make(self) -> ThreadWorkers:
        return ThreadWorkers(3)
