"""One machine of a pool, and the job that it is at."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..base import Arguments, Part
from ..faults import Fault
from ..live import LiveRequest
from .modules import PackedModule

__all__ = ["START_SECONDS", "Job", "Machine"]

START_SECONDS = 120.0  # to be ready; importing torch from a cold disk takes a while


class Machine:
    """One process or actor, from its start to its end; a new one takes its place then.

    Attributes:
        index: its place in the pool, which its successor gets.
        pid: its process id, where it is up; 0 before.
        job: what it is at; None: nothing.
        since: when it began to start, or its job, or had loaded the job's module.
        ready: whether it has come up.
        loading: whether it has still to load the module of its job.
        excluded: whether it gets no more jobs.
        unwanted: whether it is to be replaced by a new one.
        modules: the numbers of those that it holds.
    """

    def __init__(self, index: int) -> None:
        self.index, self.pid = index, 0
        self.job: Job | None = None
        self.since = 0.0
        self.ready = self.loading = self.excluded = self.unwanted = False
        self.modules: frozenset[int] = frozenset()

    def load(self, module: PackedModule) -> None:
        """Note what it holds when it has got a job with this module."""
        self.modules = self.modules & module.alive | {module.number}

    def due(self, grace: float) -> float:
        """When it is to be ended; infinite while it is at nothing."""
        if self._is_useless:
            return -math.inf
        if self.ready and self.job is None:
            return math.inf
        return self.since + self._limit(grace)[0]

    def verdict(self, grace: float) -> str:
        """Why it is ended when it is due, as it goes on after its name."""
        if self._is_useless:
            return "was to be restarted" if self.unwanted else "was at a call that was interrupted"
        limit, what = self._limit(grace)
        return f"was {what} for more than {limit:g} s, and was ended"

    @property
    def _is_useless(self) -> bool:
        return self.unwanted or (self.job is not None and self.job.request.abandoned)

    def _limit(self, grace: float) -> tuple[float, str]:
        """Seconds that it has for what it is at, and what that is."""
        if self.ready and not self.loading:
            return grace, "at one job"
        return max(START_SECONDS, grace), "loading a module" if self.ready else "starting"

    def __str__(self) -> str:
        return f"machine {self.index}"


class Job(NamedTuple):
    """A part of a request, numbered so that no other job is taken for it."""

    number: int
    request: LiveRequest
    module: PackedModule
    part: Part

    def contents(self) -> tuple[bytes, Fault | None, Arguments]:
        """What :class:`~coded_torch.workers._supervised.worker_main.LoadedModules` calls."""
        return self.module.head, self.part.fault, self.request.task.payload(self.part.units)

    def wanted(self) -> bool:
        """Whether it has still to be begun."""
        return self.request.wants(self.part)

    def begin(self, machine: Machine) -> bool:
        """Begin it on a machine, unless it is not wanted any more: whether it has begun."""
        fresh = self.module.number not in machine.modules
        return self.request.begin(self.part, machine.index, fresh)
