r"""Machines that may die: who is at what, who is replaced, and nothing about how."""

from __future__ import annotations

import abc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ._modules import Modules
from ._request import Request
from .base import Arguments, WorkerError
from .faults import Fault

__all__ = ["START_SECONDS", "Crew", "Job", "Machine"]

logger = logging.getLogger("coded_torch.workers")

START_SECONDS = 120.0  # to be ready; importing torch from a cold disk takes a while
_CLOSING_SECONDS = 10.0
_FAILED_STARTS = 3  # in a row, until requests are told instead of kept waiting
_LONGEST_PAUSE = 5.0  # between attempts to start


class Job(NamedTuple):
    """One worker's part of a request, numbered so that no other job is taken for it."""

    number: int
    request: Request
    worker: int

    def contents(self) -> tuple[bytes, Fault | None, Arguments]:
        """What a :class:`~coded_torch.workers._serving.Desk` answers."""
        task = self.request.task
        fault = None if task.faults is None else task.fault(self.worker)
        return self.request.module.head, fault, task.payload(self.worker)


class Machine:
    """One process or actor, from its start to its end; a new one takes its place then.

    Attributes:
        index: its place among those of the crew, which its successor gets.
        job: what it is at; None: nothing.
        since: when it began to start, or began its job.
        ready: whether it has come up.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.job: Job | None = None
        self.since = 0.0
        self.ready = False

    def __str__(self) -> str:
        return f"machine {self.index}"


class Crew(abc.ABC):
    """The machines of a pool and the jobs that wait for them.

    Each machine is at one job at a time, and takes the next one that anybody still waits for when
    it has ended the last: so a machine that is slow or stopped holds up the one job that it is at.
    A machine that is lost is replaced; its job has failed. Whoever is at one job for longer than
    ``grace`` seconds is ended.

    Subclasses say how a machine is started, asked and ended, and report what it does to
    :meth:`ready`, :meth:`deliver` and :meth:`lost`. One thread calls :meth:`tend` and
    :meth:`wait`; everything else may be called from any.

    Args:
        size: how many machines.
        grace: seconds, positive.
        clock: what the time is, in seconds.
    """

    def __init__(
        self, size: int, grace: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.size = size
        self.grace = grace
        self.closed = False
        self.modules = Modules(self.pack)
        self.thread = threading.Thread(target=self.serve, name=f"coded_torch-{size}", daemon=True)
        self._clock = clock
        self._changed = threading.Condition()
        self._machines: list[Machine] = []
        self._idle: deque[Machine] = deque()
        self._jobs: deque[Job] = deque()
        self._numbers = itertools.count()
        self._failed_starts = 0
        self._start_again = 0.0
        self.trouble = ""  # why the last one that did not come up did not

    # What a kind of machine does.

    @abc.abstractmethod
    def pack(self, module: nn.Module) -> Any:
        """A module as machines get it."""

    @abc.abstractmethod
    def launch(self, index: int) -> Machine:
        """Begin to start the machine at a place."""

    @abc.abstractmethod
    def send(self, machine: Machine, job: Job) -> None:
        """Hand a job to an idle machine. What is raised is the job's error."""

    @abc.abstractmethod
    def end(self, machine: Machine) -> None:
        """End a machine at once, whatever state it is in."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait for news of the machines, or a call of :meth:`wake`; then report the news."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Make :meth:`wait` return."""

    def let_go(self) -> None:  # noqa: B027 - most crews hold nothing else
        """Let go of all but the machines, which have ended."""

    # What happens to it.

    def submit(self, request: Request) -> None:
        """Have every worker's part of a request done."""
        with self._changed:
            if self.closed:
                raise RuntimeError("the pool is closed")
            for worker in range(request.task.num_workers):
                self._jobs.append(Job(next(self._numbers), request, worker))
        self._assign()

    def ready(self, machine: Machine) -> None:
        """A machine has come up."""
        with self._changed:
            self._failed_starts = 0
            machine.ready = True
            self._idle.append(machine)
            self._changed.notify_all()
        self._assign()

    def deliver(
        self, machine: Machine, number: int, value: Any = None, error: WorkerError | None = None
    ) -> None:
        """A machine has ended a job. What is not about the job that it is at is dropped."""
        self._end_job(machine, number, value, error)
        self._assign()

    def _end_job(
        self, machine: Machine, number: int, value: Any = None, error: WorkerError | None = None
    ) -> None:
        with self._changed:
            job = machine.job
            if job is None or job.number != number or machine not in self._machines:
                logger.warning("%s: dropped a result that nobody waits for", machine)
                return
            machine.job = None
            self._idle.append(machine)
        if not job.request.given_up:
            job.request.answer(job.worker, value, error)

    def lost(self, machine: Machine, reason: str) -> None:
        """A machine has ended; ``reason`` goes on after its name."""
        with self._changed:
            if machine not in self._machines:
                return
            self._machines.remove(machine)
            if machine in self._idle:
                self._idle.remove(machine)
            name, job, failed = str(machine), machine.job, []
            if job is not None:
                failed.append(job)
            if not machine.ready:
                self._failed_starts += 1
                self.trouble = f"{name} {reason}"
                pause = min(0.1 * 2**self._failed_starts, _LONGEST_PAUSE)
                self._start_again = self._clock() + pause
                if self._failed_starts >= _FAILED_STARTS and not any(
                    other.ready for other in self._machines
                ):
                    failed += self._jobs
                    self._jobs.clear()
            self._changed.notify_all()
        if not self.closed:
            logger.warning("%s %s", name, reason)
        for job in failed:
            job.request.answer(job.worker, error=WorkerError(job.worker, f"{name} {reason}"))
        self.wake()

    def _assign(self) -> None:
        """Give idle machines what waits."""
        while True:
            with self._changed:
                while self._jobs and self._jobs[0].request.given_up:
                    self._jobs.popleft()
                if not (self._jobs and self._idle):
                    return
                job, machine = self._jobs.popleft(), self._idle.popleft()
                machine.job, machine.since = job, self._clock()
            try:
                self.send(machine, job)
            except BaseException as cause:
                error = WorkerError(job.worker, f"could not be asked: {cause}")
                error.__cause__ = cause
                self._end_job(machine, job.number, error=error)
                if not isinstance(cause, Exception):  # an interrupt
                    raise

    # What the one thread does.

    def tend(self) -> None:
        """End who is overdue, and start who is missing."""
        now = self._clock()
        with self._changed:
            overdue = [machine for machine in self._machines if self._due(machine) <= now]
        for machine in overdue:
            self.end(machine)
            limit = self.grace if machine.ready else START_SECONDS
            what = "at one job" if machine.ready else "starting"
            self.lost(machine, f"was {what} for more than {limit:g} s, and was ended")
        if now < self._start_again:
            return
        for index in sorted(set(range(self.size)) - {m.index for m in self._machines}):
            try:
                machine = self.launch(index)
            except Exception as cause:  # too many processes, files: it may be better later
                machine = Machine(index)
                with self._changed:
                    self._machines.append(machine)
                self.lost(machine, f"could not be started: {type(cause).__name__}: {cause}")
                return
            machine.since = self._clock()
            with self._changed:
                self._machines.append(machine)

    def pause(self) -> float:
        """Seconds until :meth:`tend` has something to do, at most ``grace``."""
        with self._changed:
            due = [self._due(machine) for machine in self._machines]
            if len(due) < self.size:
                due.append(self._start_again)
        return max(0.0, min([self.grace, *(time - self._clock() for time in due)]))

    def serve(self) -> None:
        """The one thread: until the pool is closed."""
        try:
            while not self.closed:
                self.tend()
                self.wait(self.pause())
        except BaseException as cause:
            self.trouble = f"{type(cause).__name__}: {cause}"
            raise
        finally:
            with self._changed:
                self.closed = True
                self._changed.notify_all()
                machines, jobs = list(self._machines), list(self._jobs)
                self._jobs.clear()
            for machine in machines:
                self.end(machine)
                self.lost(machine, "was ended: the pool was closed")
            for job in jobs:
                error = WorkerError(job.worker, "was never asked: the pool was closed")
                job.request.answer(job.worker, error=error)
            self.modules.clear()
            self.let_go()

    def close(self) -> None:
        """End the machines and the thread; twice is fine."""
        self.closed = True
        self.wake()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(_CLOSING_SECONDS)

    def _due(self, machine: Machine) -> float:
        if not machine.ready:
            return machine.since + START_SECONDS
        return float("inf") if machine.job is None else machine.since + self.grace

    # What others want to know.

    @property
    def machines(self) -> list[Machine]:
        """Those that are up."""
        with self._changed:
            return [machine for machine in self._machines if machine.ready]

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait until all machines are up; whether they are."""

        def settled() -> bool:
            up = sum(machine.ready for machine in self._machines)
            return up == self.size or self.closed or self._failed_starts >= _FAILED_STARTS

        with self._changed:
            self._changed.wait_for(settled, timeout)
        return len(self.machines) == self.size
