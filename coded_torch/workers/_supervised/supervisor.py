r"""Machines that may die: which is at what, which is replaced, and nothing about how."""

from __future__ import annotations

import abc
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._logging import sparing_logger
from ..base import Part
from ..live import LiveRequest
from .machine import START_SECONDS, Job, Machine
from .modules import ModuleStore, PackedModule
from .worker_main import RESULT, remote_cause

__all__ = ["START_SECONDS", "Supervisor"]

logger = sparing_logger("coded_torch.workers")

_CLOSING_SECONDS = 10.0
_FAILED_STARTS = 3  # in a row, until what waits fails
_LONGEST_PAUSE = 5.0  # between attempts to start
_LONGEST_WAIT = 3600.0  # for news; selectors count in milliseconds, of which 2^31 are too many
_REPAIR_SECONDS = 1.0  # until the thread goes on after an exception that nobody expected
_pools = itertools.count()


class Supervisor(abc.ABC):
    """The machines of a pool and the jobs that wait for them.

    Each machine is at one job at a time, and takes the next one that is still wanted when it has
    ended the last: so a machine that is slow or stopped holds up the one job that it is at. A
    machine that is lost is replaced; its job has failed. One that is at a job for longer than
    ``grace`` seconds is ended; loading the module is no part of that where it is reported.

    Subclasses say how a machine is started, asked and ended, and report what it does to
    :meth:`ready`, :meth:`deliver`, :meth:`fail` and :meth:`lost`. One thread calls :meth:`tend` and
    :meth:`wait`; everything else may be called from any.

    Args:
        size: how many machines.
        grace: seconds, positive.
        clock: what the time is, in seconds.
    """

    #: What the machines are, in messages.
    noun = "machines"

    def __init__(
        self, size: int, grace: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.size = size
        self.grace = grace
        self.closed = False
        self.modules = ModuleStore(self.pack)
        self.thread = threading.Thread(target=self.serve, name=f"coded_torch-{size}", daemon=True)
        self._clock = clock
        self._changed = threading.Condition()
        self._machines: list[Machine] = []
        self._idle: deque[Machine] = deque()
        self._jobs: deque[Job] = deque()
        self._numbers = itertools.count()
        self.num_lost = 0  # machines, while the pool is open
        self._failed_starts = 0
        self._start_again = -math.inf
        self._pool, self._starts = next(_pools), [0] * size  # how often each place was taken
        self.trouble = ""  # why the last one that did not come up did not
        self.refusal = ""  # why none can ever come up

    # What a kind of machine does.

    @abc.abstractmethod
    def pack(self, module: nn.Module) -> Any:
        """A module as machines get it."""

    @abc.abstractmethod
    def launch(self, index: int) -> Machine:
        """Begin to start the machine at a place."""

    @abc.abstractmethod
    def send(self, machine: Machine, job: Job) -> None:
        """Hand a job to a machine, and note its module there. What is raised fails the job."""

    @abc.abstractmethod
    def end(self, machine: Machine) -> None:
        """End a machine at once, whatever state it is in."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> None:
        """Wait for news of the machines, or a call of :meth:`wake`; then report the news."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Make :meth:`wait` return."""

    def memory(self, num_bytes: int) -> Tensor | None:
        """As :meth:`~coded_torch.workers.Workers.memory`."""
        return None

    def let_go(self) -> None:  # noqa: B027 - most hold nothing else
        """Let go of all but the machines, which have ended."""

    def seed(self, index: int) -> int:
        """The seed of the next machine at a place; no other one in this process gets it."""
        key = torch.initial_seed() % 2**64, self._pool, index, self._starts[index]
        self._starts[index] += 1
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

    # What happens to it.

    def submit(self, request: LiveRequest, module: PackedModule, parts: Sequence[Part]) -> None:
        """Have parts of a request done."""
        with self._changed:
            closed = self.closed
            if not closed:
                for part in parts:
                    self._jobs.append(Job(next(self._numbers), request, module, part))
        if closed:
            for part in parts:
                request.fail(part, f"was never begun: {self._end()}")
        self._assign()

    def ready(self, machine: Machine) -> None:
        """A machine has come up."""
        with self._changed:
            self._failed_starts = 0
            machine.ready = True
            if not machine.excluded:
                self._idle.append(machine)
            self._changed.notify_all()
        self._assign()

    def loaded(self, machine: Machine) -> None:
        """A machine has loaded a module: that of its job, or, not up yet, the last one's."""
        with self._changed:
            machine.loading, machine.since = False, self._clock()
        if not machine.ready:
            self.ready(machine)

    def take(self, machine: Machine, number: int, kind: int, read: Callable[[], Any]) -> None:
        """A machine has sent what came of a job. If nothing waits for it, it is not even read.

        Args:
            machine: that sent it.
            number: of the job.
            kind: RESULT or FAILURE.
            read: the value, or what :func:`remote_cause` is made of.
        """
        job, value = machine.job, None
        if job is not None and job.request.awaits(job.part):
            try:
                value = read()
            except Exception as cause:  # whatever unpickling raises
                return self.fail_to_read(machine, number, cause)
            if kind != RESULT:
                reason = f"failed in {machine}: {value[0]}"
                return self.fail(machine, number, reason, remote_cause(value), "raised")
        if (job := self._finish(machine, number)) is not None:
            job.request.settle(job.part, value)
        return self._assign()

    def fail_to_read(self, machine: Machine, number: int, cause: Exception) -> None:
        """What a machine has sent for a job is in no form that can be read."""
        self.fail(machine, number, f"sent what cannot be read, from {machine}: {cause}", cause)

    def fail(
        self,
        machine: Machine,
        number: int,
        reason: str,
        cause: BaseException | None = None,
        kind: str = "",
    ) -> None:
        """A machine has ended a job without a value."""
        if (job := self._finish(machine, number)) is not None:
            job.request.fail(job.part, reason, cause, kind)
        self._assign()

    def _finish(self, machine: Machine, number: int) -> Job | None:
        """The job that a machine was at, which is idle now; None if it is at another one."""
        with self._changed:
            job = machine.job
            if job is None or job.number != number or machine not in self._machines:
                logger.warning(
                    "%s: dropped the reply to job %d, which it is not at", machine, number
                )
                return None
            machine.job, machine.loading = None, False
            if not machine.excluded:
                self._idle.append(machine)
            return job

    def lost(self, machine: Machine, reason: str) -> None:
        """A machine has ended; ``reason`` goes on after its name."""
        with self._changed:
            if machine not in self._machines:
                return
            self._remove(machine)
        self._replace(machine, reason)

    def _remove(self, machine: Machine) -> None:
        """Take a machine out, under the lock: no reply of it counts, and it begins nothing more."""
        self._machines.remove(machine)
        self.num_lost += not self.closed
        if machine in self._idle:
            self._idle.remove(machine)

    def _replace(self, machine: Machine, reason: str) -> None:
        """Fail the job of a machine that has been taken out, and have a new one started."""
        with self._changed:
            what, job, stranded = f"{machine} {reason}", machine.job, []
            now = self._clock()
            if not machine.ready:
                self.trouble = what
                if now >= self._start_again:  # machines that fail together fail once
                    self._failed_starts += 1
                    self._start_again = now + min(0.1 * 2**self._failed_starts, _LONGEST_PAUSE)
                if self._failed_starts >= _FAILED_STARTS and not any(
                    other.ready for other in self._machines
                ):
                    stranded = list(self._jobs)
                    self._jobs.clear()
            self._changed.notify_all()
        if not self.closed:
            logger.warning("a worker was lost and is replaced: %s", what)
        if job is not None:
            job.request.fail(job.part, f"was lost: {what}", kind="died")
        for job in stranded:
            job.request.fail(job.part, f"was never begun: {what}")
        self.wake()

    def exclude(self, index: int) -> None:
        """Give the machine at a place no more jobs; one that is not there yet is as good as new."""
        with self._changed:
            for machine in self._machines:
                if machine.index == index:
                    machine.excluded = True
                    if machine in self._idle:
                        self._idle.remove(machine)

    def restart(self, index: int) -> None:
        """Have the machine at a place ended; one that is new takes it."""
        with self._changed:
            for machine in self._machines:
                if machine.index == index:
                    machine.unwanted = True
        self.wake()

    def _assign(self) -> None:
        """Give idle machines what is still wanted."""
        while (begun := self._begin()) is not None:
            machine, job = begun
            try:
                self.send(machine, job)
            except BaseException as cause:
                if self._finish(machine, job.number) is not None:
                    job.request.fail(job.part, f"could not be asked: {cause}", cause)
                if not isinstance(cause, Exception):  # an interrupt
                    raise

    def _begin(self) -> tuple[Machine, Job] | None:
        """An idle machine and the job that it is at from now on."""
        with self._changed:
            while self._jobs and (self._idle or not self._jobs[0].wanted()):
                job = self._jobs.popleft()
                if self._idle and job.begin(self._idle[0]):
                    machine = self._idle.popleft()
                    machine.job, machine.since = job, self._clock()
                    return machine, job
            return None

    # What the one thread does.

    def tend(self) -> None:
        """End the machines that are overdue, and start those that are missing."""
        now = self._clock()
        with self._changed:
            overdue = [machine for machine in self._machines if machine.due(self.grace) <= now]
            # Taken out here: a machine that begins its next job now would end with that one.
            for machine in overdue:
                self._remove(machine)
        for machine in overdue:
            try:
                self.end(machine)
            except Exception:  # The other machines must be ended and replaced, too.
                logger.exception("%s could not be ended", machine)
            self._replace(machine, machine.verdict(self.grace))
        if now < self._start_again or len(self._machines) == self.size:
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
        """Seconds until :meth:`tend` has something to do, at most ``grace`` and an hour."""
        with self._changed:
            due = [machine.due(self.grace) for machine in self._machines]
            if len(due) < self.size:
                due.append(self._start_again)
        # A job that begins meanwhile is due no earlier than a grace from now.
        longest = min(self.grace, _LONGEST_WAIT)
        return max(0.0, min([longest, *(time - self._clock() for time in due)]))

    def serve(self) -> None:
        """The one thread: until the pool is closed."""
        try:
            while not self.closed:
                try:
                    self.tend()
                    self.wait(self.pause())
                except Exception as cause:
                    # The pool goes on, as machines and requests are as they were.
                    logger.exception("%s: the thread of the pool goes on", self.thread.name)
                    self.trouble = f"{type(cause).__name__}: {cause}"
                    time.sleep(_REPAIR_SECONDS)
        finally:
            with self._changed:
                self.closed = True
                self._changed.notify_all()
                machines, jobs = list(self._machines), list(self._jobs)
                self._jobs.clear()
            for machine in machines:
                try:
                    self.end(machine)
                except Exception:  # the others have to end, and requests their errors
                    logger.exception("%s could not be ended", machine)
                self.lost(machine, f"was ended: {self._end()}")
            for job in jobs:
                job.request.fail(job.part, f"was never begun: {self._end()}")
            self.modules.clear()
            self.let_go()

    def refuse(self, reason: str) -> None:
        """Close, as no machine can ever come up."""
        self.trouble = self.refusal = reason
        self.closed = True

    def _end(self) -> str:
        return self.refusal or "the pool was closed"

    def close(self) -> None:
        """End the machines and the thread; twice is fine."""
        self.closed = True
        self.wake()
        if self.thread.ident is not None and self.thread is not threading.current_thread():
            self.thread.join(_CLOSING_SECONDS)

    # What others ask for.

    @property
    def num_idle(self) -> int:
        """How many machines would begin a job at once."""
        with self._changed:
            return len(self._idle)

    def obstacle(self, request: LiveRequest) -> str:
        """Why parts of a request may not have begun."""
        with self._changed:
            jobs = [machine.job for machine in self._machines if machine.job is not None]
            starting = self.size - sum(machine.ready for machine in self._machines)
            excluded = sum(machine.excluded for machine in self._machines)
        earlier = sum(job.request is not request for job in jobs)
        reasons = [
            (earlier, f"are at earlier tasks (grace {self.grace:g} s)"),
            (starting, f"are starting{self.trouble and f'; {self.trouble}'}"),
            (excluded, "are excluded"),
        ]
        return "; ".join(f"{n} of {self.size} {self.noun} {what}" for n, what in reasons if n)

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
