r"""Requests to workers that compute while real time passes."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, is_autocast_enabled
from torch.utils import _pytree as pytree

from .._table import Began, Failure, Part, Reply
from ._base import Request, Task
from ._untuned import AGAIN, LOOK

_T = TypeVar("_T")


def in_thread(work: Callable[[], _T], name: str) -> Future[_T]:
    """Return the future result of ``work``, which begins at once in a thread of its own."""
    future = Future[_T]()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()  # from now on, nobody can cancel it
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Work:
    """A function that runs at once in a thread of its own, and its result.

    Unlike a :class:`Future`, an interrupt of one thread that asks never stops the others: the lock
    of a Future stays locked if the interrupt comes while its condition is being entered.
    """

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self._function: Callable[[], Any] | None = function
        self._result: Any = None
        self._error: BaseException | None = None
        self._done = False
        self._running = threading.Lock()  # is released when the function has ended
        self._running.acquire()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        function = self._function
        assert function is not None
        try:
            self._result = function()
        except BaseException as error:  # whoever asks for the result gets it
            self._error = error
        self._function = None
        self._done = True
        self._running.release()

    def done(self) -> bool:
        """Return whether the function has ended."""
        return self._done

    def wait(self, seconds: float) -> None:
        """Wait until the function has ended, for some seconds at most."""
        # An interrupt may leave the lock locked, but only once the function has ended.
        if not self._done and self._running.acquire(timeout=seconds):
            self._running.release()

    def result(self) -> Any:
        """Return the result of a function that has ended, or raise its exception."""
        if self._error is not None:
            raise self._error
        return self._result


class Interruption:
    """Interrupts, from another thread, the requests that one call opens."""

    def __init__(self) -> None:
        self.is_set = False
        self.requests = list[LiveRequest]()

    def set(self, abandon: bool = False) -> None:
        """Interrupt the requests; ``abandon`` ends even the workers that compute their parts."""
        self.is_set = True
        for request in list(self.requests):
            request.interrupt(abandon)


#: The interruption of the requests that are opened in this context.
INTERRUPTION: ContextVar[Interruption | None] = ContextVar("INTERRUPTION", default=None)


class LiveRequest(Request):
    """A view of one request in a dispatcher's queue, which writes its attributes under its lock."""

    def __init__(self, task: Task, timeout: float, dispatcher: Any, module: Any) -> None:
        self.task = task
        self.dispatcher = dispatcher
        self.module = module
        # the modes of the caller
        self.timeout = timeout
        self.ambient = Ambient.here()
        self.opened = time.monotonic()  #: the time when its clock was 0
        #: The parts whose replies were not taken, by number. The oldest is first.
        self.open: OrderedDict[int, Part] = OrderedDict()  # `OrderedDict[...]()` takes longer
        self.began: dict[int, Began] = {}  #: of open parts
        #: What was not taken: replies by the number of the part, and ``~number`` for its begin.
        self.events: dict[int, Began | Reply] = {}
        self.replied: set[int] = set()  #: the parts with replies that were not taken
        self._taken: deque[Began | Reply] = deque()  # events that :meth:`wait` returns next
        self.bell: Any = dispatcher.bell()  #: ends the wait for an event
        self.kills: dict[int, int] = {}  #: the times that a worker was ended at a unit
        self.closed = False
        self.urgent = False  #: true if a part has failed whose reply was not taken
        self.abandoned = False  #: true if its workers may be ended, as the caller was interrupted
        self._retries = False  # true if a part may have to wait for some workers
        if torch._C._are_functorch_transforms_active():
            requirement = "a call must not be under a transform of torch.func"
            raise RuntimeError(
                f"Workers: {requirement}, as other threads ignore it; use LocalWorkers"
            )
        interruption = INTERRUPTION.get()
        if interruption is not None:
            interruption.requests.append(self)
        self.interrupted = interruption is not None and interruption.is_set

    def is_notified(self) -> bool:
        """Return whether :meth:`wait` has something to return."""
        enough = len(self.replied) >= min(self.together, len(self.open))
        return self.interrupted or self.urgent or (enough and bool(self.events))

    def awaits(self, part: Part) -> bool:
        return part.number in self.open and part.number not in self.events

    def wants(self, part: Part) -> bool:
        """Return whether a part has still to begin."""
        # A cancelled call's thread may not have dropped its parts yet.
        is_over = self.interrupted or self.abandoned
        return self.awaits(part) and part.number not in self.began and not is_over

    def interrupt(self, abandon: bool = False) -> None:
        """Have :meth:`wait` raise a CancelledError."""
        self.interrupted = True
        self.abandoned = self.abandoned or abandon
        self.dispatcher.notify(self)
        if abandon:
            self.dispatcher.wake()

    def ask(self, parts: Sequence[Part]) -> None:
        now = self.now()
        for part in parts:
            part.request = self
            part.asked = now
        self._retries |= any(part.tried for part in parts)
        self.dispatcher.submit(self, parts)

    def wait(self, until: float = math.inf) -> Began | Reply | None:
        while True:
            if self.interrupted:
                raise CancelledError(f"{type(self).__name__}: the call was cancelled")
            if self._taken:
                return self._next()
            with self.dispatcher.lock:
                oldest = next(iter(self.open.values()), None)
                limit = math.inf
                if oldest:
                    limit = oldest.asked + self.timeout
                # While no part runs, the call looks from time to time whether one has begun.
                began = (e.at for n, e in self.events.items() if n < 0 and ~n not in self.events)
                now = self.now()
                begun = min(began, default=math.inf)
                due = begun + self.late if begun < math.inf else now + max(self.late, LOOK)
                seconds = min(until, limit, due) - now
                if self.events and (seconds <= 0 or self.is_notified()):
                    for number in self.replied & self.events.keys():
                        del self.open[number]
                        self.began.pop(number, None)
                    self._taken.extend(self.events.values())
                    self.events = {}
                    self.replied = set()
                    self.urgent = False
                    continue
            # If nothing is open, all that can happen has happened.
            if oldest is None:
                return None
            if seconds > 0:
                self.dispatcher.wait_for(self, min(seconds, AGAIN if self._retries else math.inf))
                if self._retries:
                    self.dispatcher.refuse()  # gives parts to idle workers
            elif until < limit:
                return None
            else:
                status = "" if oldest.number in self.began else self.status()
                why = f"did not reply within {self.timeout:g} s{status and f'; {status}'}"
                self.dispatcher.reply(oldest, Failure(why))

    def gather(self, events: list[Began | Reply], until: float, wanted: int) -> None:
        event = self.wait(until)
        while event is not None:
            events.append(event)
            if isinstance(event, Reply):
                wanted -= len(event.part.units)
                if wanted <= 0:
                    return
            event = self._next()

    def _next(self) -> Began | Reply | None:
        """Return the next event of those that were taken together."""
        if not self._taken:
            return None
        event = self._taken.popleft()
        if isinstance(event, Reply):
            self.receive(event)
        return event

    def receive(self, reply: Reply) -> None:
        """Bring the value of a reply to the device of the task, for the caller's thread."""
        device = self.task.device
        if device.type != "cpu":
            reply.value = pytree.tree_map_only(Tensor, lambda x: x.to(device), reply.value)

    def drop(self, parts: Iterable[Part]) -> None:
        self.dispatcher.drop(self, {part.number for part in parts})

    def now(self) -> float:
        return time.monotonic() - self.opened

    @property
    def idle(self) -> int:
        return int(self.dispatcher.num_idle)

    def status(self) -> str:
        return str(self.dispatcher.status(self))

    def close(self) -> None:
        self.closed = True
        self.dispatcher.drop(self)
        self._taken.clear()

    def abandon(self) -> None:
        self.abandoned = True
        self.close()
        self.dispatcher.wake()


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Return the types of devices that a call may compute on."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu", accelerator.type) if accelerator else ("cpu",)


class Ambient(NamedTuple):
    """The modes of a thread that a module call depends on."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_device: torch.device
    default_dtype: torch.dtype

    @classmethod
    def here(cls) -> Ambient:
        cast = tuple([(k, torch.get_autocast_dtype(k)) for k in _kinds() if is_autocast_enabled(k)])
        new = torch.empty(0)  # a tenth of the time of `torch.get_default_device`
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return cls(*modes, cast, new.device, new.dtype)

    def restored(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return a block in which the modes hold; ``device`` computes."""
        is_same = self.inference == torch.is_inference_mode_enabled() and not self.autocast
        if is_same and self.default_device.type == "cpu":  # the common case, at little cost
            return torch.set_grad_enabled(self.grad)
        return self._restored(device)

    @contextlib.contextmanager
    def _restored(self, device: torch.device) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.inference != torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(self.inference))
            if self.grad != torch.is_grad_enabled():  # inference mode sets it, too
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, dtype in self.autocast:
                # All threads share one cache of cast weights, which knows of no stream.
                cached = device.type == "cpu"
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            # If the default device is an accelerator, it stands for the module's device.
            if self.default_device.type != "cpu":
                stack.enter_context(device)
            yield
