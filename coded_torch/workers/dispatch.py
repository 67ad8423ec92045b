r"""Pools on real time: parts wait in one queue, and idle workers take them."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from .._arguments import MOST_WORKERS, count, sparing_logger
from ..table import Failure, Part
from .base import Workers
from .live import LiveRequest

logger = sparing_logger("coded_torch.workers")

# Seconds at one job, after which no failed part waits for the worker: it may hang. Not tuned.
_PATIENCE = 0.5


@dataclasses.dataclass(eq=False)
class Worker:
    """A worker, from its start to its end. Its successor has the same place, ``index``."""

    index: int
    job: Part | None = None  #: the part that it computes
    pid = 0  #: the id of its process; 0 until it is known
    since = 0.0  #: the time when it began its job
    ready = False  #: true if it is up
    fresh = False  #: true if its job's module was new to it, and is not known to be loaded
    excluded = False  #: true if it gets no more jobs
    left = False  #: true if it leaves after its job, and has no successor
    unwanted = False  #: true if it is to be ended

    @property
    def is_wanted(self) -> bool:
        return self.ready and not (self.excluded or self.left or self.unwanted)

    @property
    def idle(self) -> bool:
        return self.job is None and self.is_wanted

    def is_new_to(self, module: Any) -> bool:
        return False

    def __str__(self) -> str:
        return f"worker {self.index}"


class Dispatcher(abc.ABC):
    """Gives each idle worker the first job that is still wanted and need not avoid this worker.

    Subclasses :meth:`add` their ``size`` workers, and report results by :meth:`settle`. Any thread
    may call any method.
    """

    kind = "workers"  #: the word for the workers in messages
    grace = math.inf  #: seconds that a job may take before its worker is ended
    trouble = ""  #: the reason why the last worker did not start
    process = 0  #: the id of the process that has the workers' threads; 0 before there are some

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = set(range(size))  # a place has a worker, or will have one
        self.closed = False
        self._clock = clock
        self._lock = threading.RLock()
        self._workers: list[Any] = []
        self._jobs: deque[Part] = deque()

    @abc.abstractmethod
    def send(self, worker: Any, job: Part) -> None:
        """Hand a job to a :class:`Worker`, without waiting. An exception fails the job."""

    @abc.abstractmethod
    def close(self) -> None:
        """Call :meth:`stop`, and end the workers. May be called twice."""

    def may_load(self, module: Any) -> bool:
        """Return whether a worker may take a job whose module is new to it."""
        return True

    def wake(self) -> None:  # noqa: B027 - not all pools start or end workers
        """Hear that workers may have to be started or ended."""

    def retire(self, worker: Any) -> None:
        """Let go of a worker that has left, and is at no job."""
        self._workers.remove(worker)

    def vacant(self) -> list[int]:
        with self._lock:
            return sorted(self.places - {w.index for w in self._workers if not w.left})

    def resize(self, size: int) -> None:
        """Let the workers at the last places leave, or start workers at free places."""
        with self._lock:
            for index in sorted(self.places)[size:]:
                self.leave(index)
            free = (index for index in itertools.count() if index not in self.places)
            self.places.update(itertools.islice(free, size - len(self.places)))
        self.wake()

    def leave(self, index: int) -> None:
        """Let the worker at a place end its job and leave, for good."""
        with self._lock:
            self.places.discard(index)
            for worker in self.at(index):
                worker.left = True
                if worker.job is None:
                    self.retire(worker)
        self.refuse()

    def submit(self, asked: Iterable[Part]) -> None:
        with self._lock:
            # No worker may be idle to find that nobody wants a job any more.
            self._jobs = deque(x for x in (*self._jobs, *asked) if x.request.wants(x))
        self.refuse()

    def exclude(self, index: int, excluded: bool = True) -> None:
        with self._lock:
            for worker in self.at(index):
                worker.excluded = excluded
        self.refuse()

    def restart(self, index: int) -> None:
        """Give the worker at a place jobs again, or replace it."""
        self.exclude(index, False)

    def at(self, index: int) -> list[Any]:
        """Return the workers at a place, leaving ones too."""
        return [worker for worker in self._workers if worker.index == index]

    @property
    def num_ready(self) -> int:
        return sum(state in ("idle", "busy") for state, _ in self.states().values())

    @property
    def num_idle(self) -> int:
        with self._lock:
            return sum(worker.idle for worker in self._workers)

    def status(self, request: LiveRequest) -> str:
        """Return why parts of a request may not have begun, in words."""
        with self._lock:
            workers = [worker for worker in self._workers if not worker.left]
            up = {w.index for w in workers if w.ready}
            free = {w.index for w in workers if w.job is None or w.job.request is request}
            busy = {w.index for w in workers} - free
            excluded = {w.index for w in workers if w.excluded}
        grace = f" (grace {self.grace:g} s)" if self.grace < math.inf else ""
        reasons = (
            (busy, f"are at earlier tasks{grace}"),
            (self.places - up, f"are starting{self.trouble and f'; {self.trouble}'}"),
            (excluded, "are excluded"),
        )
        many = f"of {len(self.places)} {self.kind}"
        said = [f"{len(some)} {many} {what}" for some, what in reasons if some]
        return "; ".join(said) if self.places else f"all {self.kind} have left"

    def states(self) -> dict[int, tuple[str, int]]:
        with self._lock:
            found = dict.fromkeys(sorted(self.places), ("down", 0))
            for worker in self._workers:
                is_known = (worker.ready or worker.excluded) and not worker.left
                if is_known and found[worker.index][0] != "busy":
                    state = "excluded" if worker.excluded else "busy" if worker.job else "idle"
                    found[worker.index] = state, worker.pid
        return found

    def stop(self) -> None:
        """Fail all jobs that wait, and all later ones, as the pool is closed."""
        self.closed = True
        self.refuse()

    def add(self, worker: Worker, ready: bool = True) -> None:
        """Add a worker that is up, or one that starts."""
        with self._lock:
            self._workers.append(worker)
            worker.left = worker.index not in self.places  # the pool has shrunk since it started
            if worker.left:
                self.retire(worker)
        if ready:
            self.ready(worker)

    def ready(self, worker: Worker) -> None:
        worker.ready = True
        if not self.vacant() and all(each.ready for each in self._workers):
            self.trouble = ""
        self._assign()

    def settle(self, worker: Worker, number: int, result: Any) -> None:
        """End a job by a value or a :class:`Failure`."""
        if (job := self._finish(worker, number)) is not None:
            job.request.settle(job, result)
            job.request = None  # whoever keeps the part need not keep the inputs
        self._assign()

    def hand_back(self, worker: Worker, number: int) -> None:
        """Put a job that a worker did not take first in the queue again."""
        if (job := self._finish(worker, number)) is not None:
            with self._lock:
                job.request.hand_back(job)
                self._jobs.appendleft(job)
        self.refuse()

    def refuse(self, why: str = "") -> None:
        """Fail jobs that avoid all workers that are left or, given a reason, all that are up."""
        why = "the pool was closed" if self.closed else why
        with self._lock:
            left = self.places - {w.index for w in self._workers if w.excluded}
            left = {w.index for w in self._workers if w.ready} if why else left
            for job in [job for job in self._jobs if why or job.avoid]:
                if self.closed or left <= job.avoid:
                    self._jobs.remove(job)
                    reason = why or "it avoids all workers that are left"
                    job.request.settle(job, Failure(f"did not start: {reason}"))
        self._assign()

    def _finish(self, worker: Worker, number: int) -> Part | None:
        """Make a worker idle, and return its job; None if that is another one."""
        with self._lock:
            job = worker.job
            if job is None or job.ticket != number or worker not in self._workers:
                logger.warning("%s: dropped the reply to job %d, not its own", worker, number)
                return None
            worker.job = None
            if worker.left:
                self.retire(worker)
            return job

    def _assign(self) -> None:
        while (begun := self._begin()) is not None:
            worker, job = begun
            try:
                self.send(worker, job)
            except BaseException as cause:
                if self._finish(worker, job.ticket) is not None:
                    job.request.settle(job, Failure(f"could not be asked: {cause}", "", cause))
                if not isinstance(cause, Exception):  # an interrupt
                    raise

    def _begin(self) -> tuple[Worker, Part] | None:
        """Begin the first job that an idle worker may take, at the place with the fewest jobs."""
        with self._lock:
            if not self._jobs or not (idle := [w for w in self._workers if w.idle]):
                return None
            busy, at = [w.index for w in self._workers if w.job is not None], 0
            while at < len(self._jobs) and not self.closed:
                job = self._jobs[at]
                out = job.avoid | job.tried
                if job.tried:
                    begun = self._clock() - _PATIENCE
                    others = [w for w in self._workers if w.is_wanted and w.index not in out]
                    if not any(w.job is None or w.since > begun for w in others):
                        out = job.avoid
                workers, module = [w for w in idle if w.index not in out], job.request.module
                known = [w for w in workers if not w.is_new_to(module)]
                workers = known or (workers if self.may_load(module) else [])
                if not workers and job.request.wants(job):
                    at += 1
                    continue
                del self._jobs[at]
                if workers:
                    worker = min(workers, key=lambda w: (busy.count(w.index), w.since))
                    worker.fresh = worker.is_new_to(module)
                    if job.request.begin(job, worker.index, worker.fresh):
                        worker.job, worker.since = job, self._clock()
                        return worker, job
            return None


class DispatchedWorkers(Workers):
    """A pool whose parts wait in the queue of a dispatcher.

    Subclasses call :meth:`_open`, as copies do, which get ``_size``, the number of workers.
    """

    _queue: Any

    @abc.abstractmethod
    def _make(self) -> Dispatcher:
        """Return a dispatcher. It must not hold the pool, which closes when nothing holds it."""

    def _open(self) -> None:
        self._queue = self._make()
        self._finalizer = weakref.finalize(self, self._queue.close)

    def _dispatcher(self) -> Any:
        """Return the dispatcher; a RuntimeError if the pool is closed, or of another process."""
        why = "the pool is closed" if self._queue.closed else ""
        if self._queue.process not in (0, os.getpid()):
            why = "the pool must be used in the process that started it; give a fork its own pool"
        if why:
            raise RuntimeError(f"{type(self).__name__}: {why}")
        return self._queue

    places: Any = property(lambda self: set(self._queue.places))
    num_workers: Any = property(lambda self: len(self._queue.places))
    num_ready: Any = property(attrgetter("_queue.num_ready"))
    states: Any = property(lambda self: self._queue.states())

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
        if worker not in (places := self.places):
            must = f"worker must be one of {sorted(places)}"
            raise ValueError(f"{type(self).__name__}: {must}, got {worker}")
        return worker

    def close(self) -> None:
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_queue": None, "_finalizer": None, "_size": max(self.num_workers, 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()
