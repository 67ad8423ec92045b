"""A small pool of its own, as one may write it: it passes the tests of all pools."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import nn

from coded_torch.testing.workers import WorkersTests
from coded_torch.workers import Part, Task, Workers
from coded_torch.workers.live import LiveRequest


class ThreadWorkers(Workers):
    """Threads of this process that share the module."""

    def __init__(self, num_machines: int, timeout: float = 600.0) -> None:
        self.num_machines, self.timeout = num_machines, timeout
        self._threads = ThreadPoolExecutor(num_machines)
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()  # machines
        for machine in range(num_machines):
            self._idle.put(machine)
        self._close = weakref.finalize(self, self._threads.shutdown, cancel_futures=True)

    def open(self, module: nn.Module, task: Task) -> ThreadRequest:
        if not self._close.alive:
            raise RuntimeError("ThreadWorkers: the pool is closed")
        return ThreadRequest(module, task, self.timeout, self._threads, self._idle)

    def close(self) -> None:
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.num_machines, self.timeout)


class ThreadRequest(LiveRequest):
    """Submits parts; holds the threads, not the pool, which may end when nothing else holds it."""

    def __init__(self, module, task, timeout, threads, idle) -> None:
        super().__init__(task, timeout)
        self._module, self._threads, self._idle = module, threads, idle

    def _submit(self, parts: Sequence[Part]) -> None:
        for part in parts:
            try:
                future = self._threads.submit(self._compute, part)
                future.add_done_callback(partial(self._ended, part))
            except RuntimeError:  # they have been shut down
                self.fail(part, "was never begun: the pool was closed")

    def _compute(self, part: Part) -> Any:
        machine = self._idle.get()
        try:
            if self.begin(part, machine):
                args, kwargs = self.task.payload(part.units)
                with self.ambient.restored(self.task.device):
                    if part.fault is None:
                        return self._module(*args, **kwargs)
                    return part.fault.around(lambda: self._module(*args, **kwargs))
        finally:
            self._idle.put(machine)

    def _ended(self, part: Part, future: Future[Any]) -> None:
        if future.cancelled():
            self.fail(part, "was never begun: the pool was closed")
        elif (cause := future.exception()) is not None:
            self.fail(part, f"failed: {type(cause).__name__}: {cause}", cause, kind="raised")
        else:
            self.settle(part, future.result())

    @property
    def idle(self) -> int:
        return self._idle.qsize()

    def _obstacle(self) -> str:
        n = self._threads._max_workers
        return f"{n} of {n} threads are at earlier tasks"


class TestThreadWorkers(WorkersTests):
    def make(self) -> ThreadWorkers:
        return ThreadWorkers(3)
