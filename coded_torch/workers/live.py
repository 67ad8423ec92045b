r"""Requests to workers that compute while real time passes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..table import Began, Failure, Part, Reply, WorkerError
from .base import Request, Task

_AGAIN = 0.1  # seconds between two looks for a worker that may take a failed part; not tuned


class Interruption:
    """Interrupts, from another thread, the requests that one call opens."""

    def __init__(self) -> None:
        self._is_set = False
        self._requests: list[LiveRequest] = []

    def watch(self, request: LiveRequest) -> None:
        self._requests.append(request)
        if self._is_set:
            request.interrupt()

    def set(self, abandon: bool = False) -> None:
        """Interrupt the requests; ``abandon`` ends even the workers that compute their parts."""
        self._is_set = True
        for request in list(self._requests):
            request.interrupt()
            if abandon:
                request.abandoned = True
                request.dispatcher.wake()


#: The interruption of the requests that are opened in this context.
INTERRUPTION: ContextVar[Interruption | None] = ContextVar("INTERRUPTION", default=None)


class LiveRequest(Request):
    """A request whose workers report to a dispatcher, where its parts wait."""

    def __init__(self, task: Task, timeout: float, dispatcher: Any, module: Any) -> None:
        self.task, self.dispatcher, self.module = task, dispatcher, module
        self.timeout, self.ambient = timeout, Ambient()  # the modes of the caller
        self._opened = time.monotonic()
        self._open: OrderedDict[int, Part] = OrderedDict()  # by number, the oldest is first
        self._began: dict[int, Began] = {}  # of open parts
        # None stands for an interruption.
        self._events: queue.SimpleQueue[Began | Reply | None] = queue.SimpleQueue()
        self._closed = self._retries = False  # true if a part may have to wait for some workers
        self.kills = Counter[int]()  # the times that a worker was ended at a unit
        self.abandoned = False  # true if its workers may be ended, as the caller was interrupted
        # Guards _open and _closed. A pool may take it while it holds a lock of its own, never the
        # other way round.
        self._lock = threading.Lock()
        if (interruption := INTERRUPTION.get()) is not None:
            interruption.watch(self)

    # The dispatcher calls these methods, from any thread.

    def awaits(self, part: Part) -> bool:
        return part.number in self._open

    def wants(self, part: Part) -> bool:
        """Return whether a part has still to begin."""
        is_open = part.number in self._open and part.number not in self._began
        return is_open and not self.abandoned

    def begin(self, part: Part, worker: int, fresh: bool = False) -> bool:
        """Note that a worker has got a part. If this returns False, it must not compute it."""
        with self._lock:
            if wanted := self.wants(part):
                began = self._began[part.number] = Began(part, worker, self.now(), fresh)
                self._events.put(began)
            return wanted

    def settle(self, part: Part, result: Any) -> None:
        """End a part, unless it has ended, by a value or a :class:`Failure`."""
        with self._lock:
            if self._open.pop(part.number, None) is not None:
                began, at = self._began.pop(part.number, None), self.now()
                worker, latency = (began.worker, at - began.at) if began else (-1, math.inf)
                error = None
                if isinstance(result, Failure):
                    error, result = WorkerError(part.number, worker, *result), None
                self._events.put(Reply(part, worker, at, latency, result, error))

    def hand_back(self, part: Part) -> None:
        """Note that the worker that has begun a part does not compute it."""
        self._began.pop(part.number, None)

    def interrupt(self) -> None:
        """Have :meth:`wait` raise a CancelledError."""
        self._events.put(None)

    # The caller calls these methods, from one thread.

    def ask(self, parts: Sequence[Part]) -> None:
        now = self.now()
        for part in parts:
            part.request, part.asked = self, now
        self._retries |= any(part.tried for part in parts)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{type(self).__name__}: the request is closed")
            self._open.update((part.number, part) for part in parts)
        self.dispatcher.submit(parts)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        while True:
            with self._lock:
                oldest = next(iter(self._open.values()), None)
            # If nothing is open, all that can happen has happened.
            limit = math.inf if oldest is None else oldest.asked + self.timeout
            seconds = 0.0 if oldest is None else max(min(until, limit) - self.now(), 0.0)
            seconds = min(seconds, _AGAIN) if self._retries else seconds
            try:
                event = self._events.get(timeout=min(seconds, threading.TIMEOUT_MAX))
            except queue.Empty:
                if oldest is not None and self.now() < min(until, limit):
                    self.dispatcher.refuse()  # gives jobs to idle workers
                    continue
                if oldest is None or until < limit:
                    return None
                status = "" if oldest.number in self._began else self.status()
                why = f"did not reply within {self.timeout:g} s{status and f'; {status}'}"
                self.settle(oldest, Failure(why))
                continue
            if event is None:
                raise CancelledError(f"{type(self).__name__}: the call was cancelled")
            if isinstance(event, Reply):
                event.value = self.receive(event.value)
            return event

    def receive(self, value: Any) -> Any:
        """Return the value of a reply, on the device of the task, ready for the caller's thread."""
        if self.task.device.type == "cpu":
            return value
        return pytree.tree_map_only(Tensor, lambda x: x.to(self.task.device), value)

    def drop(self, parts: Iterable[Part]) -> None:
        with self._lock:
            for part in filter(self.wants, parts):
                del self._open[part.number]

    def now(self) -> float:
        return time.monotonic() - self._opened

    @property
    def idle(self) -> int:
        return int(self.dispatcher.num_idle)

    def status(self) -> str:
        with self._lock:
            waiting = not self._open.keys() <= self._began.keys()
        return self.dispatcher.status(self) if waiting else ""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._open.clear()
            self._began.clear()
            self._events = queue.SimpleQueue()  # nothing that has arrived is needed any more

    def abandon(self) -> None:
        self.abandoned = True
        self.close()
        self.dispatcher.wake()


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu", *([accelerator.type] if accelerator else []))
    return tuple((k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k))


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The modes of a thread that a module call depends on, as they are when this is made."""

    grad: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    inference: bool = dataclasses.field(default_factory=torch.is_inference_mode_enabled)
    autocast: tuple[tuple[str, torch.dtype], ...] = dataclasses.field(default_factory=_autocast)
    default_device: torch.device = dataclasses.field(default_factory=torch.get_default_device)

    @contextlib.contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))  # inference mode sets it too
            for kind, dtype in self.autocast:
                # All threads share one cache of cast weights, which knows of no stream.
                cached = device.type == "cpu"
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            # If the default device is an accelerator, it stands for the module's device.
            if self.default_device.type != "cpu":
                stack.enter_context(device)
            yield
