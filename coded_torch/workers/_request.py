r"""One call of a pool, as the threads that serve it see it."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Generator
from typing import Any

from .base import Reply, Task, WorkerError
from .live import Ambient

__all__ = ["Request"]


@dataclasses.dataclass(eq=False)
class Request:
    """What is to be computed, for whom, and the replies so far.

    Attributes:
        module: what to run, or what stands for it in the pool.
        task: on what.
        ambient: the caller's modes.
        started: when the call began, on the monotonic clock.
        replies: what has arrived and not been collected.
        given_up: whether nobody waits any more: what has not begun never will.
    """

    module: Any
    task: Task
    ambient: Ambient = dataclasses.field(default_factory=Ambient.capture)
    started: float = dataclasses.field(default_factory=time.monotonic)
    replies: queue.SimpleQueue[Reply] = dataclasses.field(default_factory=queue.SimpleQueue)
    given_up: bool = False

    def age(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def answer(self, worker: int, value: Any = None, error: WorkerError | None = None) -> None:
        """Add a worker's reply, which nobody may be waiting for."""
        self.replies.put(Reply(worker, self.age(), value, error))

    def collect(self, deadline: float | None, timeout: float) -> Generator[Reply, None, None]:
        """The replies as they come, as :meth:`~coded_torch.workers.Workers.run` yields them.

        Args:
            deadline: seconds from the start, after which who is missing is a straggler; None: none.
            timeout: the same where there is no deadline, after which who is missing has failed.
        """
        wait, waiting = timeout if deadline is None else deadline, set(range(self.task.num_workers))
        while waiting:
            try:
                reply = self.replies.get(timeout=max(wait - self.age(), 0.0))
            except queue.Empty:
                break
            waiting.remove(reply.worker)
            yield reply
        if deadline is None:
            for worker in sorted(waiting):
                error = WorkerError(worker, f"did not reply within {wait:g} s")
                yield Reply(worker, self.age(), error=error)
