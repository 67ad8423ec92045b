"""The table of a call: a row for each part, the events that fill it, and what follows from it.

=========================================================  ==============================
columns of a :class:`Part`                                 written by
=========================================================  ==============================
number, units, of, why, avoid, tried, spares, asked, due,  the policy: :meth:`Table.ask`
replaced
worker, began, fresh, ended, result, error                 the pool: :meth:`Table.hear`
outcome; the result and the error of a judged part         policy, checks: :meth:`Table.mark`
=========================================================  ==============================
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import traceback
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np

#: The outcomes of a part: not known yet; a result that counts; no result; not wanted before it
#: began; and a result that does not count, because its form, its values or others speak against it.
OPEN = "open"
GOOD = "good"
FAILED = "failed"
DROPPED = "dropped"
DISPUTED = "disputed"
_NOBODY = frozenset[int]()


class WorkerError(RuntimeError):
    """The reason why a part has no value. If the module raised, its exception is the cause.

    Attributes:
        part: the number of the part.
        worker: the place of the worker that had the part, or -1.
        reason: the event, in words that continue "worker 3" or "part 3".
        kind: "raised" if the module, its arguments or its result raised; "died" if the worker ended
            while it computed; else "".
    """

    def __init__(self, part: int, worker: int, reason: str, kind: str = "", cause: Any = None):
        self.part = part
        self.worker = worker
        self.reason = reason
        self.kind = kind
        self.__cause__ = cause
        super().__init__(f"part {part} {reason}" if worker < 0 else f"worker {worker} {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.part, self.worker, self.reason, self.kind)

    @functools.cached_property
    def alike(self) -> Hashable:
        """A key that is equal for errors of one kind that differ only in the numbers in them."""
        cause = self.__cause__ or self
        text = ""
        if self.kind == "raised":
            text = "".join(traceback.format_exception_only(cause))
        # Places, sizes and addresses differ between the parts of one batch.
        return self.kind, type(cause), re.sub(r"\b\w*\d\w*", "#", text)


class Units(tuple[int, ...]):
    """The units of a part, increasing. They are kept as an array, too, once one is needed."""

    @functools.cached_property
    def array(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array(self, np.int64)


@dataclasses.dataclass(eq=False, slots=True)
class Part:
    """The units of a task that one worker is asked for, and what came of it.

    The thread of the call writes the columns as events of the pool arrive. The pool reads only the
    columns above the line "---".
    """

    number: int  #: 0, 1, 2, ... within the request, in the order of asking
    units: Units  #: at least one, increasing
    fault: Any = None  #: an injected fault of the pool, or None
    #: The places of workers that must not compute it, and of workers that do if no other is idle.
    avoid: frozenset[int] = frozenset()
    tried: frozenset[int] = frozenset()
    #: Whether another worker must stay idle, while its line is computed or a worker that ended at
    #: it has no successor.
    spares: bool = False
    request: Any = None  #: the request that has asked a dispatcher for it
    content: Any = None  #: what a dispatcher sends to the worker; None until it is ready
    # ---
    of: Part | None = None  #: the part that it stands in for
    #: "first", "hedge" of a late part, "retry" of a failed one; "check" of rows of others, or
    #: "vote" on the part that it repeats
    why: str = "first"
    asked: float = 0.0  #: seconds on the clock of the request, as are all times
    worker: int = -1  #: the place of the worker that had it last; -1 for none
    began: float = math.inf
    fresh: bool = False  #: true if the worker had to load the module
    ended: float = math.inf
    result: Any = None
    error: WorkerError | None = None
    outcome: str = OPEN
    due: float = math.inf  #: the time at which it is late
    replaced: bool = False  #: true if others stand in for it

    def line(self) -> Iterator[Part]:
        """Yield the part, the part that it stands in for, and so on."""
        part: Part | None = self
        while part is not None:
            yield part
            part = part.of

    @property
    def seconds(self) -> float:
        """The seconds that its worker took; infinite if it has not ended, or no worker had it."""
        if self.began < math.inf:
            return self.ended - self.began
        return math.inf

    @property
    def failed(self) -> bool:
        """Whether it has ended without a result that counts."""
        return self.outcome is FAILED or self.outcome is DISPUTED

    @property
    def tries(self) -> int:
        """How often parts of this size failed one after the other, up to this part.

        With a code, these parts may have different units, as spare columns stand in for others.
        """
        same = itertools.takewhile(lambda x: len(x.units) == len(self.units), self.line())
        return sum(other.failed for other in same)

    @property
    def verifies(self) -> bool:
        """Whether it is only for comparison: its rows have an answer from another part."""
        return self.why in ("check", "vote")

    @property
    def kind(self) -> str:
        """The kind of its error; "" if there is none."""
        return "" if self.error is None else self.error.kind


class Began(NamedTuple):
    """A worker has begun a part."""

    part: Part
    worker: int  #: the place of the worker in the pool
    at: float  #: seconds on the clock of the request
    fresh: bool = False  #: true if the worker has to load the module, so that its time is longer


@dataclasses.dataclass(eq=False, slots=True)
class Reply:
    """The end of a part: a value or an error."""

    part: Part
    worker: int  #: the place of the worker that had the part, or -1
    at: float  #: seconds on the clock of the request
    latency: float  #: seconds since the worker began the part; infinite if no worker did
    value: Any = None  #: the module's output for the part, a pytree, on the device of the task
    error: WorkerError | None = None


class Failure(NamedTuple):
    """The end of a part without a result: the last arguments of its :class:`WorkerError`."""

    reason: str
    kind: str = ""
    cause: Any = None


class Hedge(NamedTuple):
    """A part that stands in for a late or failed part."""

    part: int  #: the number of this part
    of: int  #: the number of the part that it stands in for
    units: tuple[int, ...]  #: the units of this part
    at: float  #: seconds from the call to the ask
    won: bool  #: true if this part was the first to answer any of its units


@dataclasses.dataclass(eq=False, kw_only=True)
class Table:
    """The parts of one call. One thread uses a table, and calls a policy's ``decide`` on it.

    A unit is a row of the batch, or a column of a code. All times are seconds on one clock.
    """

    first: Sequence[Sequence[int]]  #: the units of each part that is asked for first
    needed: int  #: the number of units that complete the call: B, or N - S
    least: int = 1  #: the number of units that can be decoded
    unit_rows: int = 1  #: the rows of a unit
    spare: Sequence[int] | None = None  #: the columns that stand in for any; None by rows
    since: float = 0.0  #: the time at which the call began
    idle: Callable[[], int] = lambda: 1  #: returns the number of idle workers
    reserve: float = 0.0  #: seconds before the deadline that estimates take
    #: Marks parts that have ended, perhaps others, too. Defaults to believing the pool.
    judge: Callable[[Sequence[Part]], None] | None = None
    # Indexes, which follow from the columns.
    num_asked: int = 0  #: the units of all parts
    num_good: int = 0  #: the units of the good parts
    open: int = 0  #: parts whose outcome is open
    failed: dict[int, frozenset[int]] = field(default_factory=dict)  #: workers, by unit
    changed: list[Part] = field(default_factory=list)  #: began or failed since the last decision
    now: float = -math.inf
    heard: float = -math.inf  #: no event can come any more from before
    is_quiet: bool = False  #: true if nothing has happened since the last decision
    is_over: bool = False  #: true if nothing can come any more
    # What policies write beside the parts.
    reason: str = ""  #: why the call may end, as :attr:`coded_torch.Report.ended`
    holds: bool = False  #: true while verification goes on, so that the call does not end
    refused: dict[int, Part] = field(default_factory=dict)  #: why the module fails on a unit
    given_up: set[int] = field(default_factory=set)  #: units that are not asked for any more
    avoid: frozenset[int] = _NOBODY  #: workers that no part may have
    unwanted: list[Part] = field(default_factory=list)  #: dropped, and not yet told the pool
    late: float = math.inf  #: seconds after its begin before which no part is late
    prepares: bool = False  #: true if missing rows may soon have to be estimated
    deadline: float = math.inf  #: seconds from the call to its answer
    hedging_threshold: float = math.inf  #: seconds after which the largest part is late
    policy: Any = None  #: what the policy keeps of this call
    verdict: Any = None  #: what verification keeps of this call

    #: Of first parts that have all ended well in a :meth:`Request.round`, the worker of each, and
    #: when it began and ended; else empty.
    times: Sequence[tuple[int, float, float]] = ()
    _result: Callable[[], Any] | None = None  # returns the one of all parts of the round together
    _make: Callable[[], Sequence[Part]] | None = None  # the first parts, until they are read
    _parts: list[Part] = field(default_factory=list)
    _ended: list[Part] = field(default_factory=list)
    # The answers, which are written from the first time that they are read, and the good parts
    # whose units are not written yet: most calls never need them.
    _answered: dict[int, Part] = field(default_factory=dict)
    _unwritten: list[Part] = field(default_factory=list)
    _is_read: bool = False

    def __post_init__(self) -> None:
        self.now = self.heard = self.since

    @property
    def parts(self) -> list[Part]:
        """All parts. The first parts become objects only when this is read."""
        make = self._make
        if make is not None:
            self._make = None
            self._parts = [*make()]
            for part, (worker, began, ended) in zip(self._parts, self.times, strict=False):
                part.worker = worker
                part.began = began
                part.ended = ended
                part.result = self._result and self._result()
                part.outcome = GOOD
            if self.times:
                self._ended = sorted(self._parts, key=lambda part: part.ended)
                self._unwritten = [*self._ended]
        return self._parts

    @property
    def ended(self) -> list[Part]:
        """The parts that have ended, in the order of their ends."""
        return self._ended if self.parts else []

    @property
    def has_later(self) -> bool:
        """Whether parts were asked for after the first ones."""
        return self._make is None and len(self._parts) > len(self.first)

    def ask_first(self) -> None:
        """Add the parts that are asked for first."""
        self.num_asked = sum(map(len, self.first))
        self.open = len(self.first)
        first = self.first
        asked = self.now
        avoid = self.avoid

        def make() -> list[Part]:  # it must not hold the table, which would keep results
            parts = list[Part]()
            for number, units in enumerate(first):
                units = units if isinstance(units, Units) else Units(units)
                parts.append(Part(number, units, avoid=avoid, asked=asked))
            return parts

        self._make = make

    def take(self, parts: Sequence[Part]) -> None:
        """Use the objects that a pool has made as the first parts."""
        self._make = lambda: parts

    def end_first(
        self, times: Sequence[tuple[int, float, float]], result: Callable[[], Any]
    ) -> None:
        """Write that all first parts have ended well, with one result of all their units."""
        self.times = times
        self._result = result
        self.num_good = self.num_asked
        self.open = 0
        self.now = max(self.now, *[ended for _, _, ended in times])
        self.is_quiet = False

    def ask(
        self,
        units: Iterable[int],
        of: Part | None = None,
        why: str = "first",
        avoid: Collection[int] = (),
    ) -> Part:
        """Add a part that workers are to be asked for."""
        if not isinstance(units, Units):
            units = Units(units)
        part = Part(len(self.parts), units, of=of, why=why, asked=self.now)
        part.avoid = self.avoid.union(avoid)
        if self.failed:
            tried = [self.failed.get(unit, _NOBODY) for unit in part.units]
            part.tried = frozenset.intersection(*tried)
        if of is not None and of.outcome is OPEN:  # its worker may take several parts at a time
            part.tried |= {other.worker for other in of.line()}
        self.parts.append(part)
        self.num_asked += len(units)
        self.open += 1
        self.is_over = False
        return part

    def hear(self, events: Iterable[Began | Reply], until: float = -math.inf) -> None:
        """Write events. Without events, nothing has happened before the time ``until``.

        If ``until`` is infinite, nothing more can happen before another part is asked for.
        """
        ended = list[Part]()
        events = [*events]
        parts = self.parts
        for event in events:
            part = parts[event.part.number]  # a pool may report copies
            self.now = max(self.now, event.at)
            if part.ended < math.inf:  # neither a second reply nor a begin after it counts
                continue
            if isinstance(event, Began):
                part.worker = event.worker
                part.began = event.at
                part.fresh = event.fresh
                if part.outcome is DROPPED:  # it was told too late
                    part.outcome = OPEN
                    self.open += 1
                self.changed.append(part)
            else:
                part.worker = event.worker
                part.ended = event.at
                part.began = math.inf
                if event.latency < math.inf:
                    part.began = event.at - event.latency
                part.result = event.value
                part.error = event.error
                ended.append(part)
        self._ended += ended
        if ended and self.judge is not None:
            self.judge(ended)
        elif ended:
            for part in ended:
                self.mark(part, GOOD if part.error is None else FAILED)
        self.is_quiet = not events
        self.is_over = self.is_quiet and until == math.inf
        if self.is_quiet and not self.is_over:
            self.now = self.heard = max(self.now, until)

    def mark(self, part: Part, outcome: str, error: WorkerError | None = None) -> None:
        """Write the outcome of a part, which may change later, and why it is not good."""
        before = part.outcome
        part.outcome = outcome
        if outcome is DROPPED:
            self.unwanted.append(part)
        part.error = error or part.error
        self.open -= before is OPEN
        if outcome is GOOD and before is not GOOD:
            self.num_good += len(part.units)
            self._unwritten.append(part)
        elif outcome is not GOOD and before is GOOD:  # its units may have other answers
            self.num_good -= len(part.units)
            self._answered.clear()
            self._unwritten = self.good
        if self._is_read:
            self._write()
        if outcome is not GOOD:
            self.changed.append(part)
        if outcome is DISPUTED or (outcome is FAILED and part.kind == "raised"):
            for unit in part.units:
                self.failed[unit] = self.failed.get(unit, _NOBODY) | {part.worker}

    def _write(self) -> None:
        answered = self._answered
        for part in self._unwritten:
            units: Sequence[int] = part.units
            if not answered.keys().isdisjoint(units):
                units = [unit for unit in units if unit not in answered]
            answered.update(dict.fromkeys(units, part))
        self._unwritten.clear()

    # Views.

    @property
    def end(self) -> str:
        """Why the call has ended; "" if it goes on."""
        return "" if self.holds else self.reason

    @property
    def answered(self) -> dict[int, Part]:
        """The first good part, by unit."""
        self._is_read = bool(self.parts)
        self._write()
        return self._answered

    @property
    def num_answered(self) -> int:
        """The number of units that have an answer."""
        # If no more units were asked for than are needed, none was asked for twice.
        if self.num_asked == self.needed:
            return self.num_good
        return len(self.answered)

    @property
    def good(self) -> list[Part]:
        """The parts whose results are good, in the order of their ends."""
        return [part for part in self.ended if part.outcome is GOOD]

    def missing(self, part: Part) -> list[int]:
        """Return the units of a part that have no answer, and that the module may compute."""
        answered = self.answered
        return [u for u in part.units if u not in answered and u not in self.refused]

    @property
    def hedges(self) -> tuple[Hedge, ...]:
        """The parts that stand in for others."""
        parts = [part for part in self.parts if part.of is not None]
        won = {part.number for part in self.answered.values()} if parts else ()
        return tuple(
            Hedge(p.number, p.of.number, p.units, p.asked - self.since, p.number in won)
            for p in parts
            if p.of is not None
        )
