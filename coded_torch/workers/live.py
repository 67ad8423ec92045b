r"""Requests of pools whose machines compute while real time passes."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import Any

import torch

from .base import Began, Part, Reply, Request, Task, WorkerError

__all__ = ["INTERRUPTION", "Ambient", "Interruption", "LiveRequest"]


class Interruption:
    """Interrupts, from another thread, the requests that one call has opened."""

    def __init__(self) -> None:
        self._is_set = False
        self._requests: list[LiveRequest] = []

    def watch(self, request: LiveRequest) -> None:
        """Interrupt this one, too."""
        self._requests.append(request)
        if self._is_set:
            request.interrupt()

    def set(self) -> None:
        """Interrupt all requests, now and later."""
        self._is_set = True
        for request in list(self._requests):
            request.interrupt()


#: What interrupts the requests that are opened in this context.
INTERRUPTION: ContextVar[Interruption | None] = ContextVar("INTERRUPTION", default=None)


class LiveRequest(Request):
    """All of a request but the machines, whose threads report to :meth:`begin` and :meth:`settle`.

    Subclasses put parts into the queue of their pool, in ``_submit``, and say how many machines
    are :attr:`idle`.

    Args:
        task: what the parts are of.
        timeout: seconds after which a part that was asked for has failed.

    Attributes:
        task: the same.
        ambient: the modes of the caller.
        abandoned: whether its caller was interrupted, so that not even its machines go on.
    """

    def __init__(self, task: Task, timeout: float) -> None:
        self.task = task
        self.ambient = Ambient.capture()
        self._timeout = timeout
        self._opened = time.monotonic()
        # By the number of the part; None until it begins. What has its reply is not there any more.
        self._open: dict[int, Began | None] = {}
        self._asked: deque[tuple[float, Part]] = deque()  # when each was, the oldest first
        # None is an interruption.
        self._events: queue.SimpleQueue[Began | Reply | None] = queue.SimpleQueue()
        self._closed = False
        self.abandoned = False
        # Guards what is open and closed. A pool may take it under a lock of its own, never the
        # other way round.
        self._lock = threading.Lock()
        if (interruption := INTERRUPTION.get()) is not None:
            interruption.watch(self)

    @abc.abstractmethod
    def _submit(self, parts: Sequence[Part]) -> None:
        """Put the parts into the queue of the pool."""

    def _obstacle(self) -> str:
        """Why parts may not have begun, as :meth:`status` says it."""
        return ""

    # What the machines call, from any thread.

    def wants(self, part: Part) -> bool:
        """Whether a part has still to be begun."""
        return self._open.get(part.number, part) is None

    def awaits(self, part: Part) -> bool:
        """Whether the reply to a part is still awaited."""
        return part.number in self._open

    def begin(self, part: Part, machine: int, fresh: bool = False) -> bool:
        """A machine has got a part. Returns whether it is wanted; if not, it must not begin."""
        with self._lock:
            if not self.wants(part):
                return False
            began = self._open[part.number] = Began(part, machine, self.now(), fresh)
            self._events.put(began)
            return True

    def settle(self, part: Part, value: Any = None, error: WorkerError | None = None) -> None:
        """A part has ended, begun or not. Dropped if nothing waits for it."""
        with self._lock:
            if part.number in self._open:
                began, at = self._open.pop(part.number), self.now()
                machine, latency = (began.machine, at - began.at) if began else (-1, math.inf)
                self._events.put(Reply(part, machine, at, latency, value, error))

    def fail(
        self, part: Part, reason: str, cause: BaseException | None = None, kind: str = ""
    ) -> None:
        """A part has ended by an error; its arguments are those of :class:`WorkerError`."""
        began = self._open.get(part.number)
        error = WorkerError(part.number, began.machine if began else -1, reason, kind)
        error.__cause__ = cause
        self.settle(part, error=error)

    def interrupt(self) -> None:
        """Have :meth:`wait` raise a CancelledError, from any thread."""
        self._events.put(None)

    # What the caller calls, from one thread.

    def ask(self, parts: Sequence[Part]) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{type(self).__name__}: the request is closed")
            self._open |= {part.number: None for part in parts}
        now = self.now()
        self._asked.extend((now, part) for part in parts)
        self._submit(parts)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        while True:
            if not self._events.empty():  # nobody else takes from it
                return self._next(0.0)
            limit = self._limit()
            try:
                if limit == math.inf:  # nothing is open: what has happened is here already
                    return self._next(0.0)
                seconds = max(min(until, limit) - self.now(), 0.0)
                return self._next(min(seconds, threading.TIMEOUT_MAX))
            except queue.Empty:
                if until < limit or limit == math.inf:
                    return None
                self._expire(limit)

    def _next(self, seconds: float) -> Began | Reply:
        event = self._events.get(timeout=seconds)
        if event is None:
            raise CancelledError(f"{type(self).__name__}: the call was cancelled")
        return event

    def drop(self, parts: Iterable[Part]) -> None:
        with self._lock:
            for part in filter(self.wants, parts):
                del self._open[part.number]

    def now(self) -> float:
        return time.monotonic() - self._opened

    def status(self) -> str:
        with self._lock:
            waiting = None in self._open.values()
        return self._obstacle() if waiting else ""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._open.clear()
            self._events = queue.SimpleQueue()  # nothing that has arrived is needed any more

    def _limit(self) -> float:
        """When the oldest part that is open fails."""
        with self._lock:
            while self._asked and self._asked[0][1].number not in self._open:
                self._asked.popleft()
        return self._asked[0][0] + self._timeout if self._asked else math.inf

    def _expire(self, limit: float) -> None:
        """Let the oldest part fail."""
        status = self.status()
        _, part = self._asked.popleft()
        why = f"; {status}" if status and self.wants(part) else ""
        self.fail(part, f"did not reply within {self._timeout:g} s{why}")


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The caller's modes that a module call depends on, to hold in another thread as well."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    autocast_cache: bool
    default_device: torch.device

    @classmethod
    def capture(cls) -> Ambient:
        """The modes of this thread."""
        accelerator = torch.accelerator.current_accelerator()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (kind, torch.get_autocast_dtype(kind))
                for kind in ("cpu", *([accelerator.type] if accelerator else []))
                if torch.is_autocast_enabled(kind)
            ),
            torch.is_autocast_cache_enabled(),
            torch.get_default_device(),
        )

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        """Let the modes hold in this thread, for a module on ``device``."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))  # inference mode sets it too
            for kind, dtype in self.autocast:
                # The cache of cast weights is one for all threads, and knows of no stream.
                cached = self.autocast_cache and device.type == "cpu"
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            # A default device that is an accelerator means the one that the module is on.
            if self.default_device.type != "cpu":
                stack.enter_context(device)
            yield
