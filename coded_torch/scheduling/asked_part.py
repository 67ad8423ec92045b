"""A part of one call, as a policy sees it."""

from __future__ import annotations

import math

from . import Failure

__all__ = ["DROPPED", "FAILED", "GOOD", "QUEUED", "RUNNING", "AskedPart"]

QUEUED, RUNNING, GOOD, FAILED, DROPPED = range(5)  #: states of a part


class AskedPart:
    """A part, and the part that it stands in for."""

    state = QUEUED
    due = math.inf  # the time at which it is late
    seconds = math.inf  # a good result's latency
    fresh: bool | None = None  # None: it has not begun
    worker = -1
    failure = Failure()
    replaced = won = blamed = False  # blamed: the module raised on this unit alone

    def __init__(
        self, number: int, units: tuple[int, ...], of: AskedPart | None, at: float, tries: int = 0
    ) -> None:
        self.number, self.units, self.of, self.at = number, units, of, at
        self.tries = tries  # failures of exactly these units in a row
        self.hedges: int = of.hedges if of else 0  # including the parts that it stands in for
        self.line: tuple[AskedPart, ...] = (self, *of.line) if of else (self,)

    @property
    def raised(self) -> bool:
        return self.failure.kind == "raised"

    @property
    def raised_twice(self) -> bool:  # alike, on two workers
        return len({part.worker for part in self.line if part.failure == self.failure}) > 1

    @property
    def is_unsuspected(self) -> bool:  # open, and nothing failed at its units before
        return self.state < GOOD and not self.suspect

    @property
    def suspect(self) -> bool:  # the module raised, or a worker ended, at these units before
        return any(part.failure.kind for part in self.line)

    @property
    def let_down(self) -> bool:  # the worker failed, without an exception of the module
        return self.state == FAILED and not self.raised
