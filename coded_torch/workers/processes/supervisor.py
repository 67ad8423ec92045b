r"""The supervisor of workers that may hang or die: it starts, watches and replaces them."""

from __future__ import annotations

import abc
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..dispatch import Dispatcher, Worker, logger
from .modules import ModuleStore, PackedModule, remote_cause

__all__ = ["START_SECONDS", "Supervisor", "WatchedWorker"]

# Seconds that a worker has to start, or to load a module. Importing torch from a cold disk takes
# tens of seconds. Not tuned: a lower value ends healthy workers, a higher one finds hung ones late.
START_SECONDS = 120.0
# Seconds that closing a pool waits for its thread. Not tuned.
_CLOSING_SECONDS = 10.0
# Failed starts in a row after which waiting jobs fail, instead of at their timeout. Not tuned.
_FAILED_STARTS = 3
# Seconds between attempts to start: .2, .4, ..., at most this. Not tuned.
_LONGEST_PAUSE = 5.0
# Seconds to wait for news: selectors count milliseconds in 31 bits.
_LONGEST_WAIT = 3600.0
# Seconds until the thread goes on after an unexpected exception, so that it does not spin.
_REPAIR_SECONDS = 1.0
_pools = itertools.count()


class WatchedWorker(Worker):
    """A process or an actor. It is starting, loading a module, at a job, or idle since a time."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.pid = 0  # 0 until it is known
        self.loading = False  # true until it has loaded the module of its job
        self.unwanted = False  # true if it is to be ended
        self.modules: frozenset[int] = frozenset()  # the numbers of its modules

    def is_new_to(self, module: PackedModule) -> bool:
        return module.number not in self.modules

    def load(self, module: PackedModule) -> None:
        """Note which modules the worker holds once it has a job with this one."""
        self.modules = self.modules & module.alive | {module.number}

    def end_by(self, grace: float) -> tuple[float, str]:
        """Return when the worker is to be ended, and why, in words that continue its name."""
        if self.unwanted:
            return -math.inf, "was to be restarted"
        if self.job is not None and self.job.request.abandoned:
            return -math.inf, "was at a call that was interrupted"
        if self.ready and self.job is None:
            return math.inf, ""
        seconds, what = grace, "at one job"
        if self.loading or not self.ready:
            seconds = max(START_SECONDS, grace)
            what = "loading a module" if self.ready else "starting"
        return self.since + seconds, f"was {what} for more than {seconds:g} s, and was ended"


V = TypeVar("V", bound=WatchedWorker)


class Supervisor(Dispatcher[V]):
    """The workers of a pool, and the jobs that wait for them.

    A worker that is lost is replaced, and its job fails. A worker that computes a job for longer
    than ``grace`` seconds is ended. Loading the module does not count where it is reported.

    Subclasses start, ask and end workers, and report to :meth:`ready`, :meth:`take`, :meth:`fail`
    and :meth:`lost`. One thread calls :meth:`tend` and :meth:`wait`; any thread calls the rest.

    Args:
        size: the number of workers.
        grace: seconds, positive.
        clock: returns the time in seconds.
    """

    def __init__(
        self, size: int, grace: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(size, clock)
        self.grace = grace
        self.modules = ModuleStore(self.pack)
        self.thread = threading.Thread(target=self.serve, name=f"coded_torch-{size}", daemon=True)
        self.num_lost = 0  # workers, while the pool is open
        self._failed_starts = 0
        self._start_again = -math.inf
        self._pool, self._starts = next(_pools), Counter[int]()  # the number of starts by place

    @abc.abstractmethod
    def pack(self, module: nn.Module) -> Any:
        """Return a module in the form in which workers get it."""

    @abc.abstractmethod
    def launch(self, index: int) -> V:
        """Begin to start the worker at a place."""

    @abc.abstractmethod
    def end(self, worker: V) -> None:
        """End a worker at once, in any state."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait for news of the workers, or a call of :meth:`wake`, and report the news."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Make :meth:`wait` return."""

    def let_go(self) -> None:
        """Release everything but the workers, which have ended."""

    def seed(self, index: int) -> int:
        """Return the seed of the next worker at a place, different from all others."""
        key = torch.initial_seed() % 2**64, self._pool, index, self._starts[index]
        self._starts[index] += 1
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

    # The workers call these methods, through the thread that hears them.

    def ready(self, worker: V) -> None:
        self._failed_starts = 0
        super().ready(worker)

    def loaded(self, worker: V) -> None:
        """Note that a worker has loaded the module of its job, or, before it is up, the last."""
        with self._changed:
            worker.loading, worker.since = False, self._clock()
        if not worker.ready:
            self.ready(worker)

    def take(self, worker: V, number: int, succeeded: bool, read: Callable[[], Any]) -> None:
        """Take the result of a job: a value, or the argument of :func:`remote_cause`.

        If nobody waits for the result, it is not even read.
        """
        job, value = worker.job, None
        if job is not None and job.request.awaits(job.part):
            try:
                value = read()
            except Exception as cause:  # unpickling may raise anything
                self.fail_to_read(worker, number, cause)
                return
            if not succeeded:
                reason = f"failed in {worker}: {value[0]}"
                self.fail(worker, number, reason, remote_cause(value), "raised")
                return
        self.settle(worker, number, value)

    def fail_to_read(self, worker: V, number: int, cause: Exception) -> None:
        """Fail a job whose result cannot be read."""
        self.fail(worker, number, f"sent what cannot be read, from {worker}: {cause}", cause)

    def lost(self, worker: V, reason: str) -> None:
        """Note that a worker has ended; ``reason`` continues its name."""
        with self._changed:
            if worker not in self._workers:
                return
            self._remove(worker)
        self._replace(worker, reason)

    def _remove(self, worker: V) -> None:
        """Take a worker out, under the lock: it gets no job, and none of its results counts."""
        self._workers.remove(worker)
        self.num_lost += not (self.closed or worker.left)
        if worker in self._idle:
            self._idle.remove(worker)

    def _replace(self, worker: V, reason: str) -> None:
        """Fail the job of a worker that was taken out, and have a new one started."""
        what, now, hopeless = f"{worker} {reason}", self._clock(), False
        with self._changed:
            if not (worker.ready or worker.left):
                self.trouble = what
                if now >= self._start_again:  # workers that fail together fail once
                    self._failed_starts += 1
                    self._start_again = now + min(0.1 * 2**self._failed_starts, _LONGEST_PAUSE)
                up = any(other.ready for other in self._workers)
                hopeless = self._failed_starts >= _FAILED_STARTS and not up
            self._changed.notify_all()
        if not (self.closed or worker.left):
            logger.warning("a worker was lost and is replaced: %s", what)
        if (job := worker.job) is not None:
            job.request.fail(job.part, f"was lost: {what}", kind="died")
        if hopeless:
            self._strand(what)
        self.wake()

    def retire(self, worker: V) -> None:
        worker.unwanted = True
        self.wake()  # the thread ends the worker

    def restart(self, index: int) -> None:
        """Have the worker at a place ended and replaced."""
        with self._changed:
            for worker in self._workers:
                worker.unwanted |= worker.index == index and not worker.left
        self.wake()

    # The thread calls these methods.

    def tend(self) -> None:
        """End overdue workers, and start missing ones."""
        now = self._clock()
        with self._changed:
            overdue = [worker for worker in self._workers if worker.end_by(self.grace)[0] <= now]
            # Taken out here: a worker that got its next job now would end with that one.
            for worker in overdue:
                self._remove(worker)
        for worker in overdue:
            self._try_to_end(worker)
            self._replace(worker, worker.end_by(self.grace)[1])
        if now < self._start_again:
            return
        for index in self.vacant():
            try:
                worker = self.launch(index)
            except Exception as cause:  # too many processes or files: later it may succeed
                reason = f"could not be started: {type(cause).__name__}: {cause}"
                self._replace(WatchedWorker(index), reason)  # type: ignore[arg-type]
                return
            worker.since = self._clock()
            self.add(worker, ready=False)

    def pause(self) -> float:
        """Return the seconds until :meth:`tend` has something to do, at most ``grace``."""
        with self._changed:
            due = [worker.end_by(self.grace)[0] for worker in self._workers]
            if self.vacant():
                due.append(self._start_again)
        # A job that begins meanwhile is due no earlier than a grace from now.
        longest = min(self.grace, _LONGEST_WAIT)
        return max(0.0, min([longest, *(time - self._clock() for time in due)]))

    def serve(self) -> None:
        """Tend the workers until the pool is closed."""
        try:
            while not self.closed:
                try:
                    self.tend()
                    self.wait(self.pause())
                except Exception as cause:
                    # The pool goes on: workers and requests are as they were.
                    logger.exception("%s: the thread of the pool goes on", self.thread.name)
                    self.trouble = f"{type(cause).__name__}: {cause}"
                    time.sleep(_REPAIR_SECONDS)
        finally:
            with self._changed:
                self.closed = True
                self._changed.notify_all()
                workers = list(self._workers)
            for worker in workers:
                self._try_to_end(worker)
                self.lost(worker, "was ended: the pool was closed")
            self.stop()
            self.modules.clear()
            self.let_go()

    def _try_to_end(self, worker: V) -> None:
        try:
            self.end(worker)
        except Exception:  # the other workers must be ended, too
            logger.exception("%s could not be ended", worker)

    # The pool calls these methods.

    def close(self) -> None:
        """End the workers and the thread. May be called twice."""
        self.closed = True
        self.wake()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(_CLOSING_SECONDS)

    @property
    def workers(self) -> list[V]:
        """The workers that are up, and have not left."""
        with self._changed:
            return [worker for worker in self._workers if worker.ready and not worker.left]

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait until all workers are up, and return whether they are."""

        def settled() -> bool:
            up = len(self.workers) >= self.size
            return up or self.closed or self._failed_starts >= _FAILED_STARTS

        with self._changed:
            self._changed.wait_for(settled, timeout)
        return len(self.workers) >= self.size
