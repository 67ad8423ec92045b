r"""Pools on real time: parts wait in one queue, and idle workers take them."""

import abc
import dataclasses
import itertools
import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

from .._arguments import MOST_WORKERS, count, shown
from .._table import Began, Failure, Part, Reply, WorkerError
from ._base import Workers
from ._live import LiveRequest
from ._untuned import PATIENCE

# In a forked process nobody would release these locks, which the ends of open requests take.
_locks = weakref.WeakSet[Any]()
os.register_at_fork(after_in_child=lambda: [lock._at_fork_reinit() for lock in _locks])


@dataclasses.dataclass(eq=False)
class Worker:
    """A worker, from its start to its end. Its successor has the same place, ``index``."""

    index: int
    part: Part | None = None  #: the part that it computes
    pid = 0  #: the id of its process; 0 until it is known
    since = 0.0  #: the time when it began its part
    ready = False  #: true if it is up
    fresh = False  #: true if its part's module was new to it, and is not known to be loaded
    excluded = False  #: true if it gets no more parts
    left = False  #: true if it leaves after its part, and has no successor
    unwanted = ""  #: the reason why it is to be ended, which continues its name

    @property
    def is_wanted(self) -> bool:
        return self.ready and not (self.excluded or self.left or self.unwanted)

    def is_new_to(self, module: Any) -> bool:
        return False

    def load(self, part: Part) -> None:
        """Note that the worker gets a part."""

    def __str__(self) -> str:
        return f"worker {self.index}"


class Dispatcher(abc.ABC):
    """The one queue of a pool: it gives each idle worker the first part that this one may take.

    A part is taken while its request wants it, by a worker that it need not avoid. All requests and
    workers change under one lock. Subclasses :meth:`add` their ``size`` workers, and report results
    by :meth:`settle`. Any thread may call any method.

    An interrupt, such as Ctrl-C, may end any thread between two lines. So the lines that begin or
    end a part are in such an order that the queue or a worker always holds the part, and the next
    thread calls :meth:`recover`.
    """

    kind = "workers"  #: the word for the workers in messages
    hang_timeout = math.inf  #: seconds that a part may take before its worker is ended
    trouble = ""  #: the reason why the last worker did not start
    process = 0  #: the id of the process that has the workers' threads; 0 before there are some

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = set(range(size))  # a place has a worker, or will have one
        self.closed = False
        self.lock = threading.RLock()
        _locks.add(self.lock)
        self._clock = clock
        self._workers: list[Any] = []
        self._parts: deque[Part] = deque()
        self.told: list[Any] = []  #: the workers that are being given a part, under the lock

    def prepare(self, request: LiveRequest, parts: Sequence[Part]) -> Iterable[Sequence[Part]]:
        """Yield parts that are ready to be sent, in the thread that asks for them."""
        return (parts,)

    @abc.abstractmethod
    def send(self, worker: Any, part: Part) -> None:
        """Hand a part to a :class:`Worker`, without waiting. An exception fails the part."""

    def send_all(self) -> None:
        """Hand to workers the parts that they begin. A part that cannot be sent fails."""
        while self.told:
            worker = self.told[0]
            try:
                self.send(worker, worker.part)
            except Exception as cause:  # it fails the part, and is reported
                self.fail(worker, cause)
            del self.told[0]

    def fail(self, worker: Any, cause: Exception) -> None:
        """Fail the part that a worker could not be given."""
        self.reply(worker.part, Failure(f"could not be asked: {cause}", "", cause))
        self._finish(worker)

    def recover(self) -> None:
        """Fail the parts that workers were being given when an interrupt came, under the lock."""
        while self.told:
            worker = self.told[-1]
            if worker.part is not None:
                self.reply(worker.part, Failure("could not be asked: an interrupt came"))
                self._finish(worker)
            self.told.pop()

    @abc.abstractmethod
    def close(self) -> None:
        """Call :meth:`stop`, and end the workers. May be called twice."""

    def may_load(self, module: Any) -> bool:
        """Return whether a worker may take a part whose module is new to it."""
        return True

    def wake(self) -> None:  # noqa: B027 - not all pools start or end workers
        """Hear that workers may have to be started or ended."""

    def retire(self, worker: Any) -> None:
        """Let go of a worker that has left, and is at no part."""
        self._workers.remove(worker)

    def vacant(self) -> list[int]:
        with self.lock:
            return sorted(self.places - {w.index for w in self._workers if not w.left})

    def resize(self, size: int) -> None:
        """Let the workers at the last places leave, or start workers at free places."""
        with self.lock:
            for index in sorted(self.places)[size:]:
                self.leave(index)
            free = (index for index in itertools.count() if index not in self.places)
            self.places.update(itertools.islice(free, size - len(self.places)))
        self.wake()

    def leave(self, index: int) -> None:
        """Let the worker at a place end its part and leave, for good."""
        with self.lock:
            self.hear()
            self.places.discard(index)
            for worker in self.at(index):
                worker.left = True
                if worker.part is None:
                    self.retire(worker)
        self.refuse()

    def hear(self) -> None:  # noqa: B027 - not all pools have such messages
        """Handle the messages of workers that have come."""

    def hear_news(self) -> None:  # noqa: B027
        """Handle the messages that have come, except replies to rounds, which go on."""

    def is_idle(self, worker: Any) -> bool:
        """Return whether a worker is at no part, also of a round."""
        return worker.part is None

    def bell(self) -> Any:
        """Return what :meth:`notify` releases of a request, and :meth:`wait_for` waits for."""
        bell = threading.Lock()
        bell.acquire()
        return bell

    def submit(self, request: LiveRequest, parts: Sequence[Part]) -> None:
        """Put parts of a request in the queue."""
        self.hear()
        with self.lock:
            if request.closed:
                raise RuntimeError(f"{type(request).__name__}: the request is closed")
            request.open |= {part.number: part for part in parts}
        for ready in self.prepare(
            request, parts
        ):  # a worker begins while the next part is prepared
            with self.lock:
                self._parts.extend(ready)
                is_refused = self.closed or any(part.avoid for part in ready)
                self.refuse() if is_refused else self._assign()

    def drop(self, request: LiveRequest, numbers: Collection[int] | None = None) -> None:
        """Drop the parts with some numbers that have not begun or, by default, all of a request."""
        if numbers is None and not request.open:
            return
        with self.lock:
            if numbers is None:  # nothing that has happened is needed any more
                for each in (request.open, request.began, request.events, request.replied):
                    each.clear()
            for number in request.open.keys() & (numbers or ()):
                if request.wants(request.open[number]):
                    del request.open[number]
            # No worker may be idle to find that nobody wants a part any more.
            if any(part.request is request for part in self._parts):
                self._forget()

    def _forget(self) -> None:
        """Take the parts that nobody wants any more out of the queue."""
        self._parts = deque(part for part in self._parts if part.request.wants(part))

    def reply(self, part: Part, result: Any) -> None:
        """End an open part by a value or a :class:`Failure`."""
        request = part.request
        with self.lock:
            if request.awaits(part):
                began = request.began.get(part.number)
                at = request.now()
                worker, latency = (began.worker, at - began.at) if began else (-1, math.inf)
                reply = Reply(part, worker, at, latency, result)
                if isinstance(result, Failure):
                    reply.value, reply.error = None, WorkerError(part.number, worker, *result)
                    request.urgent = True
                request.replied.add(part.number)  # first, as an interrupt may come between them
                request.events[part.number] = reply
                if request.is_notified():
                    self.notify(request)

    def notify(self, request: LiveRequest) -> None:
        """End :meth:`wait_for`, or the next one."""
        with self.lock:
            if request.bell.locked():
                request.bell.release()

    def wait_for(self, request: LiveRequest, seconds: float) -> None:
        """Wait until a request is notified, or for some seconds."""
        request.bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def exclude(self, index: int, excluded: bool = True) -> None:
        with self.lock:
            for worker in self.at(index):
                worker.excluded = excluded
        self.refuse()

    def restart(self, index: int) -> None:
        """Give the worker at a place parts again, or replace it."""
        self.exclude(index, False)

    def at(self, index: int) -> list[Any]:
        """Return the workers at a place, leaving ones too."""
        return [worker for worker in self._workers if worker.index == index]

    @property
    def num_idle(self) -> int:
        self.hear_news()
        with self.lock:
            return sum(w.is_wanted and self.is_idle(w) for w in self._workers)

    def status(self, request: LiveRequest) -> str:
        """Return why parts of a request may not have begun, in words; "" if they have."""
        self.hear()
        with self.lock:
            if not any(map(request.wants, request.open.values())):
                return ""
            workers = [worker for worker in self._workers if not worker.left]
            up = {w.index for w in workers if w.ready}
            free = {w.index for w in workers if w.part is None or w.part.request is request}
            busy = {w.index for w in workers} - free
            excluded = {w.index for w in workers if w.excluded}
        limit = ""
        if self.hang_timeout < math.inf:
            limit = f" (hang timeout {self.hang_timeout:g} s)"
        starting = self.places - up, f"are starting{self.trouble and f'; {self.trouble}'}"
        reasons = (busy, f"are at earlier tasks{limit}"), starting, (excluded, "are excluded")
        many = f"of {len(self.places)} {self.kind}"
        said = [f"{len(some)} {many} {what}" for some, what in reasons if some]
        if self.places:
            return "; ".join(said)
        return f"all {self.kind} have left"

    def states(self) -> dict[int, tuple[str, int]]:
        """Return the state and the process of the worker at each place."""
        self.hear_news()
        with self.lock:
            found = dict.fromkeys(sorted(self.places), ("down", 0))
            for worker in self._workers:
                is_known = (worker.ready or worker.excluded) and not worker.left
                if is_known and found[worker.index][0] != "busy":
                    state = "idle" if self.is_idle(worker) else "busy"
                    if worker.excluded:
                        state = "excluded"
                    found[worker.index] = state, worker.pid
        return found

    def stop(self) -> None:
        """Fail all parts that wait, and all later ones, as the pool is closed."""
        self.closed = True
        self.refuse()

    def add(self, worker: Worker, ready: bool = True) -> None:
        """Add a worker that is up, or one that starts."""
        with self.lock:
            self._workers.append(worker)
            worker.left = worker.index not in self.places  # the pool has shrunk since it started
            if worker.left:
                self.retire(worker)
        if ready:
            self.ready(worker)

    def ready(self, worker: Worker) -> None:
        """Let a worker take parts."""
        with self.lock:
            worker.ready = True
            if not self.vacant() and all(each.ready for each in self._workers):
                self.trouble = ""
            self._assign()

    def settle(self, worker: Worker, part: Part | None, result: Any) -> None:
        """End a worker's part by a value or a :class:`Failure`."""
        with self.lock:
            self.end_part(worker, part, result)
            self._assign()

    def end_part(self, worker: Worker, part: Part | None, result: Any) -> None:
        """End a part as :meth:`settle` does, but begin no other. The caller holds the lock."""
        if part is not None and worker.part is part:  # else it came too late
            self.reply(part, result)
            self._finish(worker)
            part.request = None  # whoever keeps the part need not keep the inputs

    def hand_back(self, worker: Worker, part: Part) -> None:
        """Put a part that a worker did not take first in the queue again."""
        with self.lock:
            if worker.part is part:
                part.request.began.pop(part.number, None)
                self._parts.appendleft(part)
                self._finish(worker)
        self.refuse()

    def refuse(self, why: str = "") -> None:
        """Fail parts that avoid all workers that are left or, given a reason, all that are up."""
        if self.closed:
            why = "the pool was closed"
        with self.lock:
            left = self.places - {w.index for w in self._workers if w.excluded}
            if why:
                left = {w.index for w in self._workers if w.ready}
            for part in [part for part in self._parts if why or part.avoid]:
                if self.closed or left <= part.avoid:
                    reason = why or "it avoids all workers that are left"
                    self.reply(part, Failure(f"did not start: {reason}"))
        self._assign()

    def _finish(self, worker: Worker) -> None:
        worker.part = None
        if worker.left:
            self.retire(worker)

    def _assign(self) -> None:
        """Give parts to idle workers."""
        with self.lock:
            self.recover()
            if self._parts and not self.closed:
                self._begin()
                if self.told:
                    self.send_all()

    def _begin(self) -> None:
        """Begin the parts that idle workers may take, in their order."""
        idle = [w for w in self._workers if w.part is None and w.is_wanted]
        if not idle:
            return
        idle.sort(key=attrgetter("since"))
        busy = Counter[int]()  # parts by place, if a place has several workers
        is_shared = len(self._workers) > len(self.places)
        if is_shared:
            busy.update(w.index for w in self._workers if w.part is not None)
        is_any_unwanted = False
        begun = list[Part]()
        for part in self._parts:
            request = part.request
            if not request.wants(part):
                is_any_unwanted = True
                continue
            if is_shared:  # at the place with the fewest parts
                idle.sort(key=lambda worker: busy[worker.index])
            worker = self._worker_for(part, idle)
            if worker is None:
                continue
            idle.remove(worker)
            busy[worker.index] += 1
            self.told.append(worker)
            worker.fresh = worker.is_new_to(request.module)
            worker.load(part)
            worker.since = self._clock()
            worker.part = part
            began = Began(part, worker.index, request.now(), worker.fresh)
            request.began[part.number] = request.events[~part.number] = began
            if request.is_notified():
                self.notify(request)
            begun.append(part)
            if not idle:
                break
        if is_any_unwanted:
            self._forget()  # the parts that have begun, too
        elif len(begun) == len(self._parts):
            self._parts.clear()
        else:
            for part in begun:
                self._parts.remove(part)

    def _worker_for(self, part: Part, idle: Sequence[Any]) -> Any:
        """Return the first idle worker that may take a part; None if there is none."""
        line = []
        if len(idle) <= part.spares:
            line = [*part.line()]
        out = part.avoid
        if line and any(w.part in line for w in self._workers):
            return None
        if 1 < len(self.places) > sum(w.is_wanted for w in self._workers) and any(
            before.kind == "died" for before in line[1:2]
        ):
            return None  # the worker that ended at it has no successor yet
        if part.tried:
            begun = self._clock() - PATIENCE
            both = out | part.tried
            others = [w for w in self._workers if w.is_wanted and w.index not in both]
            if any(w.part is None or w.since > begun for w in others):
                out = both
        module = part.request.module
        workers = [w for w in idle if w.index not in out]
        loaded = next((w for w in workers if not w.is_new_to(module)), None)
        if loaded is None and workers and self.may_load(module):
            return workers[0]
        return loaded


class DispatchedWorkers(Workers):
    """A pool with the queue of a dispatcher. Subclasses, and copies, call :meth:`_open`."""

    _queue: Any

    @abc.abstractmethod
    def _make(self) -> Dispatcher:
        """Return a dispatcher. It must not hold the pool, which closes when nothing holds it."""

    def _open(self) -> None:
        self._queue = self._make()
        self._finalizer = weakref.finalize(self, self._queue.close)

    def _dispatcher(self) -> Any:
        """Return the dispatcher; a RuntimeError if the pool is closed, or of another process."""
        why = ""
        if self._queue.closed:
            why = "the pool is closed"
        if self._queue.process not in (0, os.getpid()):
            why = "the pool must be used in the process that started it; give a fork its own pool"
        if why:
            raise RuntimeError(f"{type(self).__name__}: {why}")
        return self._queue

    places: Any = property(lambda self: set(self._queue.places))
    num_workers: Any = property(lambda self: len(self._queue.places))
    states: Any = property(lambda self: self._queue.states())
    num_ready: Any = property(
        lambda self: sum(s in ("idle", "busy") for s, _ in self.states.values())
    )

    def resize(self, num_workers: int) -> None:
        self._dispatcher().resize(count(self, "num_workers", num_workers, most=MOST_WORKERS))

    def exclude(self, worker: int) -> None:
        """Give the worker at a place in the pool no more parts until it is restarted."""
        self._dispatcher().exclude(self._place(worker))

    def restart(self, worker: int) -> None:
        """Replace the worker at a place in the pool, excluded or not; a thread gets parts again."""
        self._dispatcher().restart(self._place(worker))

    def drain(self, worker: int) -> None:
        self._dispatcher().leave(self._place(worker))

    def _place(self, worker: int) -> int:
        worker = count(self, "worker", worker, least=0)
        places = self.places
        if worker not in places:
            raise ValueError(
                f"{type(self).__name__}: worker must be one of {sorted(places)}, got "
                f"{shown(worker)}"
            )
        return worker

    def close(self) -> None:
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_queue": None, "_finalizer": None, "_size": max(self.num_workers, 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
