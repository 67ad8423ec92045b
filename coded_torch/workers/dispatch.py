r"""The queue of a pool: parts of all requests, and the idle workers that take them."""

from __future__ import annotations

import abc
import itertools
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from .._arguments import count, sparing_logger
from .base import Part, Workers
from .live import LiveRequest

__all__ = ["DispatchedWorkers", "Dispatcher", "Job", "Worker"]

logger = sparing_logger("coded_torch.workers")


class Worker:
    """A worker, from its start to its end. Its successor has the same place, ``index``."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.job: Job | None = None
        self.since = 0.0  # the time when it began its job
        self.ready = False  # true if it is up
        self.excluded = False  # true if it gets no more jobs
        self.left = False  # true if it leaves after its job, and has no successor

    def is_new_to(self, module: Any) -> bool:
        """Return whether the worker would have to load a module first."""
        return False

    def __str__(self) -> str:
        return f"worker {self.index}"


class Job(NamedTuple):
    """A part of a request. Its number tells it from all other jobs of the pool."""

    number: int
    request: LiveRequest
    module: Any
    part: Part

    def wanted(self) -> bool:
        """Return whether the job has still to begin."""
        return self.request.wants(self.part)


W = TypeVar("W", bound=Worker)


class Dispatcher(abc.ABC, Generic[W]):
    """Gives each idle worker the first job that is still wanted and need not avoid this worker.

    Subclasses implement :meth:`send` and :meth:`close`, :meth:`add` their ``size`` workers, and
    report results by :meth:`settle` and :meth:`fail`. Any thread may call any method.
    """

    kind = "workers"  #: the word for the workers in messages
    grace = math.inf  #: seconds that a job may take before its worker is ended
    trouble = ""  #: the reason why the last worker did not start

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.places = set(range(size))  # a place has a worker, or will have one
        self.closed = False
        self._clock = clock
        self._changed = threading.Condition()  # a lock that its thread may take again
        self._workers: list[W] = []
        self._idle: deque[W] = deque()
        self._jobs: deque[Job] = deque()
        self._numbers = itertools.count()

    @abc.abstractmethod
    def send(self, worker: W, job: Job) -> None:
        """Hand a job to a worker, without waiting for it. An exception fails the job."""

    def wake(self) -> None:
        """Hear that workers may have to be started or ended."""

    def retire(self, worker: W) -> None:
        """Let go of a worker that has left, and is at no job."""
        self._workers.remove(worker)

    # The pool calls these methods.

    @property
    def size(self) -> int:
        """The number of workers, when all are up."""
        return len(self.places)

    def vacant(self) -> list[int]:
        """Return the places where a worker is missing."""
        with self._changed:
            return sorted(self.places - {w.index for w in self._workers if not w.left})

    def resize(self, size: int) -> None:
        """Let the workers at the last places leave, or start workers at free places."""
        with self._changed:
            for index in sorted(self.places)[size:]:
                self.leave(index)
            free = (index for index in itertools.count() if index not in self.places)
            self.places.update(itertools.islice(free, size - self.size))
        self.wake()

    def leave(self, index: int) -> None:
        """Let the worker at a place end its job and leave, for good."""
        with self._changed:
            self.places.discard(index)
            for worker in [w for w in self._workers if w.index == index]:
                worker.left = True
                if worker in self._idle:
                    self._idle.remove(worker)
                if worker.job is None:
                    self.retire(worker)
        self._refuse()

    def submit(self, request: LiveRequest, module: Any, parts: Sequence[Part]) -> None:
        """Have parts of a request computed."""
        with self._changed:
            self._jobs += [Job(next(self._numbers), request, module, part) for part in parts]
        if self.closed:
            self.stop()
        self._refuse()
        self._assign()

    def exclude(self, index: int) -> None:
        """Give the worker at a place no more jobs."""
        with self._changed:
            for worker in self._workers:
                worker.excluded |= worker.index == index
            self._idle = deque(worker for worker in self._idle if not worker.excluded)
        self._refuse()

    def restart(self, index: int) -> None:
        """Give the worker at a place jobs again, or replace it."""
        with self._changed:
            for worker in self._workers:
                if worker.index == index and worker.excluded:
                    worker.excluded = False
                    self._rest(worker)
        self._assign()

    @property
    def num_ready(self) -> int:
        """The number of workers that are up and get jobs."""
        with self._changed:
            up = (w.index for w in self._workers if w.ready and not w.excluded and not w.left)
            return len(set(up))

    @property
    def num_idle(self) -> int:
        """The number of workers that would begin a job at once."""
        return len(self._idle)

    def status(self, request: LiveRequest) -> str:
        """Return why parts of a request may not have begun, in words."""
        with self._changed:
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
        many = f"of {self.size} {self.kind}"
        said = [f"{len(some)} {many} {what}" for some, what in reasons if some]
        return "; ".join(said) if self.places else f"all {self.kind} have left"

    def states(self) -> dict[int, tuple[str, int]]:
        """Return the state of each place, as :attr:`DispatchedWorkers.states` does."""
        with self._changed:
            found = dict.fromkeys(sorted(self.places), ("down", 0))
            for worker in self._workers:
                if worker.ready and not worker.left and found[worker.index][0] != "busy":
                    state = "idle" if worker.job is None else "busy"
                    state = "excluded" if worker.excluded else state
                    found[worker.index] = state, getattr(worker, "pid", 0)
        return found

    # The workers call these methods.

    def add(self, worker: W, ready: bool = True) -> None:
        """Add a worker that is up, or one that starts."""
        with self._changed:
            self._workers.append(worker)
            worker.left = worker.index not in self.places  # the pool has shrunk since it started
            if worker.left:
                self.retire(worker)
            elif ready:
                self.ready(worker)

    def ready(self, worker: W) -> None:
        """Note that a worker is up, and give it jobs."""
        with self._changed:
            worker.ready = True
            self._rest(worker)
            self._changed.notify_all()
        self._assign()

    def settle(self, worker: W, number: int, value: Any) -> None:
        """End a job by a value."""
        if (job := self._finish(worker, number)) is not None:
            job.request.settle(job.part, value)
        self._assign()

    def fail(self, worker: W, number: int, *why: Any, **more: Any) -> None:
        """End a job by an error, of the arguments of :meth:`LiveRequest.fail`."""
        if (job := self._finish(worker, number)) is not None:
            job.request.fail(job.part, *why, **more)
        self._assign()

    def hand_back(self, worker: W, number: int) -> None:
        """Put a job that a worker did not take first in the queue again."""
        if (job := self._finish(worker, number)) is not None:
            with self._changed:
                job.request.put_back(job.part)
                self._jobs.appendleft(job)
            if self.closed:
                self.stop()
        self._refuse()
        self._assign()

    def load(self, worker: W) -> int:
        """Return a number; the idle worker with the least one takes the next job."""
        return 0

    def _rest(self, worker: W) -> None:
        """Note that a worker is idle, if it can get jobs."""
        if worker.ready and worker.job is None and not (worker.excluded or worker.left):
            self._idle.append(worker)

    def _finish(self, worker: W, number: int) -> Job | None:
        """Make a worker idle, and return its job; None if that is another one."""
        with self._changed:
            job = worker.job
            if job is None or job.number != number or worker not in self._workers:
                logger.warning("%s: dropped the reply to job %d, not its own", worker, number)
                return None
            worker.job = None
            if worker.left:
                self.retire(worker)
            self._rest(worker)
            return job

    def _assign(self) -> None:
        """Send idle workers the jobs that are still wanted."""
        while (begun := self._begin()) is not None:
            worker, job = begun
            try:
                self.send(worker, job)
            except BaseException as cause:
                if self._finish(worker, job.number) is not None:
                    job.request.fail(job.part, f"could not be asked: {cause}", cause)
                if not isinstance(cause, Exception):  # an interrupt
                    raise

    def _begin(self) -> tuple[W, Job] | None:
        """Begin the first job that an idle worker may take."""
        with self._changed:
            at = 0
            while at < len(self._jobs):
                job = self._jobs[at]
                others = (worker for worker in self._idle if worker.index not in job.part.avoid)
                worker = min(others, key=self.load, default=None)
                if worker is None and job.wanted():
                    if not self._idle:
                        return None
                    at += 1
                    continue
                del self._jobs[at]
                if worker is not None and job.request.begin(
                    job.part, worker.index, worker.is_new_to(job.module)
                ):
                    self._idle.remove(worker)
                    worker.job, worker.since = job, self._clock()
                    return worker, job
            return None

    def _refuse(self) -> None:
        """Fail the jobs that must avoid all workers that are left."""
        with self._changed:
            left = self.places - {w.index for w in self._workers if w.excluded}
            refused = [job for job in self._jobs if job.part.avoid and left <= job.part.avoid]
            for job in refused:
                self._jobs.remove(job)
        for job in refused:
            job.request.fail(job.part, "did not start: it avoids all workers that are left")

    @abc.abstractmethod
    def close(self) -> None:
        """Call :meth:`stop`, and end the workers. May be called twice."""

    def stop(self) -> None:
        """Fail all jobs that wait, and all later ones, as the pool is closed."""
        with self._changed:
            self.closed = True
        self._strand("the pool was closed")

    def _strand(self, reason: str) -> None:
        """Fail all jobs that wait."""
        with self._changed:
            jobs, self._jobs = self._jobs, deque()
        for job in jobs:
            job.request.fail(job.part, f"did not start: {reason}")


class DispatchedWorkers(Workers):
    """A pool whose parts wait in the queue of a dispatcher.

    Subclasses implement :meth:`_open`, which calls :meth:`_start`; copies of the pool call it anew.
    """

    #: The attributes that copies have anew.
    _live: tuple[str, ...] = ("_queue", "_finalizer")
    _queue: Any = None  # None until the pool starts

    @abc.abstractmethod
    def _open(self) -> None:
        """Set the attributes that copies have anew."""

    def _start(self, dispatcher: Dispatcher[Any]) -> None:
        """Use a dispatcher. It must not hold the pool, which closes when nothing holds it."""
        self._queue = dispatcher
        self._finalizer = weakref.finalize(self, dispatcher.close)

    def _dispatcher(self) -> Any:
        """Return the dispatcher, started if it was not; a RuntimeError if the pool is closed."""
        if self._queue.closed:
            raise RuntimeError(f"{type(self).__name__}: the pool is closed")
        return self._queue

    @property
    def places(self) -> set[int]:
        return set(self._queue.places)

    @property
    def num_workers(self) -> int:  # type: ignore[override]
        return len(self.places)

    @property
    def num_ready(self) -> int:
        return 0 if self._queue is None else self._queue.num_ready

    @property
    def states(self) -> dict[int, tuple[str, int]]:
        """The state by place: "idle", "busy", "excluded" or "down"; and the process id or 0."""
        found: dict[int, tuple[str, int]] = self._dispatcher().states()
        return found

    def exclude(self, worker: int) -> None:
        """Give the worker at a place in the pool no more parts until it is restarted."""
        self._dispatcher().exclude(self._place(worker))

    def restart(self, worker: int) -> None:
        """Replace the worker at a place in the pool, excluded or not.

        A thread cannot be ended: it only gets parts again.
        """
        self._dispatcher().restart(self._place(worker))

    def drain(self, worker: int) -> None:
        self._dispatcher().leave(self._place(worker))

    def _place(self, worker: int) -> int:
        return count(self, "worker", worker, least=0, most=max(self.places, default=0))

    def close(self) -> None:
        if self._queue is not None:
            self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._live}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
