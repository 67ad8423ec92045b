"""A pool that the tests of the wrapper share."""

from __future__ import annotations

import math
from collections import deque

from torch import nn

from coded_torch.table import Began, Reply, WorkerError
from coded_torch.workers import Workers
from coded_torch.workers.base import Request, Task


class Separate(Workers):
    """Computes every part by itself, at once, when it is asked for; part n is machine n's."""

    simulated = True

    def open(self, module: nn.Module, task: Task) -> Request:
        return _Separate(module, task)


class _Separate(Request):
    def __init__(self, module, task):
        self.module, self.task, self.events = module, task, deque()

    def ask(self, parts):
        self.events += [Began(part, part.number, 0.0) for part in parts]
        for part in parts:
            value = error = None
            args, kwargs = self.task.payload(part.units, True)
            try:
                value = self.module(*args, **kwargs)
            except Exception as cause:
                error = WorkerError(part.number, part.number, f"failed: {cause!r}", "raised")
                error.__cause__ = cause
            self.events.append(Reply(part, part.number, 0.0, 0.0, value, error))

    def wait(self, until=math.inf):
        return self.events.popleft() if self.events else None

    def drop(self, parts):
        pass

    def now(self):
        return 0.0

    @property
    def idle(self):
        return 1

    def close(self):
        self.events.clear()
