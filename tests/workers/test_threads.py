"""A small pool of its own, as one may write it: it passes the tests of all pools."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
        self.size, self.timeout = num_workers, timeout
        self._open()

    def _make(self) -> Threads:
        return Threads(self.size)

    def open(self, module: nn.Module, task: Task) -> LiveRequest:
        # The request holds the threads, not the pool, which ends when nothing else holds it.
        return LiveRequest(task, self.timeout, self._dispatcher(), module)


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
                value = compute(job.request.module, task.payload(job.part.units), job.part.fault)
        except BaseException as cause:
            reason = f"failed: {type(cause).__name__}: {cause}"
            self.fail(worker, job.number, reason, "raised", cause)
        else:
            self.settle(worker, job.number, value)

    def close(self) -> None:
        self.stop()
        self._executor.shutdown()


class TestThreadWorkers(WorkersTests):
    def make(self) -> ThreadWorkers:
        return ThreadWorkers(3)
