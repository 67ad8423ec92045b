"""The decisions of one call, and what they answer: the protocol is described in ``waiting.py``."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ._history import History

if TYPE_CHECKING:
    from .waiting import Waiting

__all__ = ["Ask", "Began", "Call", "Decision", "Drop", "Ended", "Event", "Hedge", "Prepare"]
__all__ += ["Settled", "Wait"]

_REASKS = 3
_SPLIT = 4  # machines that the first re-ask of a part is split over
_BURST = 20  # parts, and one whole call, may be asked again before `extra` limits them


class Ask(NamedTuple):
    """Have parts computed, each a tuple of units."""

    parts: tuple[tuple[int, ...], ...]


class Drop(NamedTuple):
    """Parts, by number, that other parts have answered: what has not begun need not begin."""

    parts: tuple[int, ...]


class Prepare(NamedTuple):
    """A fence has fired and half of the time is over: prepare what predictions need."""


class Wait(NamedTuple):
    """Wait for an event, but not beyond a time; ``begins`` if it matters which parts begin."""

    until: float
    begins: bool = True


class Began(NamedTuple):
    """A machine has begun a part; ``fresh`` if it has not run this module before."""

    part: int
    at: float
    fresh: bool = False


class Settled(NamedTuple):
    """A part has ended ``latency`` seconds after it began, with a good result or without.

    A second one for the same part, not ``ok``, takes back what turned out unlike most.
    """

    part: int
    at: float
    latency: float
    ok: bool


class Hedge(NamedTuple):
    """One part that was asked again.

    Attributes:
        part: its number.
        of: that of the part it stands in for.
        units: that it is asked for.
        at: when, in seconds of the call.
        won: whether any of its units were answered by it first.
    """

    part: int
    of: int
    units: tuple[int, ...]
    at: float
    won: bool


Decision: TypeAlias = Ask | Drop | Prepare | Wait
Event: TypeAlias = Began | Settled | None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a call ended.

    Attributes:
        reason: "complete"; "deadline" or "patience", where the rest is to be predicted; "first"
            where those that were wanted first are there; "failed" where nothing more can come.
        hedges: the parts that were asked again.
        fence: seconds after its begin at which the largest part would be asked again; infinite
            while the history is too short.
        median: of whole calls like this one, in seconds; infinite likewise, and where most were
            not complete.
        deadline: of the answer, in seconds of the call; infinite if there was none.
        decodable: when as many results were there as the rest may be predicted from; infinite if
            never.
    """

    reason: str
    hedges: tuple[Hedge, ...]
    fence: float
    median: float
    deadline: float
    decodable: float = math.inf


_QUEUED, _RUNNING, _GOOD, _FAILED, _DROPPED = range(5)


class _Part:
    """A part that was asked, and what stands in for it: parts make a tree, of which leaves count.

    A leaf is hopeful if it waits to begin, or runs and is within its fence.
    """

    __slots__ = (
        "at", "due", "fresh", "number", "of", "replaced", "seconds", "state", "units", "won",
    )  # fmt: skip

    def __init__(self, number: int, units: tuple[int, ...], of: _Part | None, at: float) -> None:
        self.number, self.units, self.of, self.at = number, units, of, at
        self.state = _QUEUED
        self.due = self.seconds = math.inf
        self.fresh: bool | None = None  # until it begins
        self.replaced = self.won = False

    def exhausted(self) -> bool:
        """Whether it must not be asked again."""
        asked, failed, part = 0, 0, self
        while True:
            failed += part.state == _FAILED
            if part.of is None:
                return asked >= _REASKS or failed >= _REASKS
            asked, part = asked + 1, part.of


class Call:
    """One call, as far as it has come."""

    def __init__(
        self,
        waiting: Waiting,
        history: History,
        first: Sequence[tuple[int, ...]],
        needed: int,
        least: int,
        unit_rows: int,
        spare: Sequence[int] | None,
        since: float,
        idle: Callable[[], int],
    ) -> None:
        self.waiting, self.history, self.needed = waiting, history, needed
        half = -(-needed // 2)
        self.least = 0 if waiting.at_once else half if waiting.deadline else max(least, half)
        self.unit_rows, self.since, self.now = unit_rows, since, since
        self.idle = idle
        self.by_columns = spare is not None
        self.spare = deque(spare or ())
        self.parts = [_Part(i, units, None, since) for i, units in enumerate(first)]
        self.num_first, self.num_units = len(first), sum(map(len, first))
        self.open = len(first)  # parts of which something may come
        self.unbegun = 0  # of those asked again
        self.good: set[int] = set()
        self.decodable = math.inf
        self.timers: list[tuple[float, int]] = []  # when parts are due, and their numbers
        self.late = self.lost = self.fenced = self.prepared = False
        self.rows = unit_rows * max(map(len, first))
        self.fences: dict[int, float] = {}
        self.hedges = not waiting.at_once and waiting.extra > 0
        self.median = history.call(self.rows)
        if waiting.deadline is not None:
            # Where calls often need all of it, more predictions would take more time from all.
            usual = min(waiting.deadline, 2 * self.median)
            self.deadline = max(waiting.deadline - history.decoding(), usual)
        else:
            never = waiting.at_once or waiting.patience == math.inf
            self.deadline = math.inf if never else waiting.patience * self.median
        if self.hedges:
            history.earn(waiting.extra)

    def decisions(self) -> Generator[Decision, Event, Ended]:
        yield Ask(tuple([part.units for part in self.parts]))
        begins, wait = not self.waiting.at_once, Wait(-math.inf)
        while (reason := self._reason()) is None:
            until = self._until()
            if until != wait.until:
                wait = Wait(until, begins)
            event = yield wait
            if isinstance(event, Began):
                self._begin(event)
                continue
            if event is not None:
                self._settle(event)
                wanting = len(self.good) < self.needed
                if wanting and self.unbegun and (unwanted := self._unwanted()):
                    yield Drop(unwanted)
                if not self.lost:
                    continue
            elif until == math.inf:
                reason = "failed"
                break
            else:
                # Only now, when no event was there to come before it.
                self.now = max(self.now, until)
                self.late |= self.now >= self.since + self.deadline
            if asked := self._again():
                yield Ask(asked)
            if self.now >= self._preparing():
                self.prepared = True
                yield Prepare()
        return self._end(reason)

    def _reason(self) -> str | None:
        """Why the call ends now; None if it does not."""
        good, at_once = len(self.good), self.waiting.at_once
        if good >= self.needed:
            return "first" if at_once and good < self.num_units else "complete"
        if self.late and good >= self.least:
            return "patience" if self.waiting.deadline is None else "deadline"
        return None if self.open else "failed"

    def _until(self) -> float:
        """When something is to be done if nothing happens."""
        timers, parts = self.timers, self.parts
        while timers:
            due, number = timers[0]
            if parts[number].state == _RUNNING and parts[number].due == due:
                break
            heapq.heappop(timers)
        due = min(timers[0][0] if timers else math.inf, self._preparing())
        return due if self.late else min(due, self.since + self.deadline)

    def _preparing(self) -> float:
        """When it is probable enough that something will have to be predicted."""
        if self.prepared or not self.fenced:
            return math.inf
        return self.since + self.deadline / 2

    def _fence(self, num_units: int) -> float:
        fence = self.fences.get(num_units)
        if fence is None:
            fence = self.fences[num_units] = self.history.fence(num_units * self.unit_rows)
        return fence

    def _begin(self, event: Began) -> None:
        part = self.parts[event.part]
        self.now = max(self.now, event.at)
        if part.state == _DROPPED:  # too late
            self.open += 1
        elif part.number >= self.num_first:
            self.unbegun -= 1
        part.state, part.fresh = _RUNNING, event.fresh
        if self.hedges and (fence := self._fence(len(part.units))) < math.inf:
            part.due = event.at + fence
            heapq.heappush(self.timers, (part.due, part.number))

    def _settle(self, event: Settled) -> None:
        part, good = self.parts[event.part], self.good
        self.now = max(self.now, event.at)
        before, part.state = part.state, _GOOD if event.ok else _FAILED
        if before <= _RUNNING:
            self.open -= 1
            self.unbegun -= before == _QUEUED and part.number >= self.num_first
        if event.ok:
            num_good = len(good)
            good.update(part.units)
            part.won, part.seconds = len(good) > num_good, event.latency
            if len(good) >= self.least:
                self.decodable = min(self.decodable, event.at)
            part.fresh = bool(part.fresh)
        else:
            self.lost = True
            if before == _GOOD:
                good.clear()
                good.update(*(other.units for other in self.parts if other.state == _GOOD))

    def _unwanted(self) -> tuple[int, ...]:
        """Parts asked again that have not begun, and have been answered by others."""
        unwanted = []
        for part in self.parts[self.num_first :]:
            if part.state == _QUEUED and self.good.issuperset(part.units):
                part.state = _DROPPED
                unwanted.append(part.number)
        self.open -= len(unwanted)
        self.unbegun -= len(unwanted)
        return tuple(unwanted)

    def _again(self) -> tuple[tuple[int, ...], ...]:
        """What is to be asked again now."""
        self.lost = False
        if self.waiting.at_once:
            return ()
        while self.timers and self.timers[0][0] <= self.now:
            heapq.heappop(self.timers)
        num_parts, idle = len(self.parts), self.idle()
        lacking = (
            self.needed - len(self.good) - self._hopeful() if self.by_columns else self.num_units
        )
        for part in self.parts[:num_parts]:
            late = part.state == _RUNNING and part.due <= self.now
            if part.replaced or not (late or part.state >= _FAILED) or part.exhausted():
                continue
            missing = [unit for unit in part.units if unit not in self.good][: max(0, lacking)]
            if not missing:
                continue
            self.fenced |= late
            if late and not self._afford(missing):
                fence = self._fence(len(part.units))
                # On a clock that stands still, where parts take no time, it would be due for ever.
                part.due = self.now + fence if fence else math.inf
                heapq.heappush(self.timers, (part.due, part.number))
                continue
            part.replaced = True
            pieces = 1 if part.of else max(1, min(_SPLIT, idle, len(missing)))
            idle, lacking = idle - pieces, lacking - len(missing) * self.by_columns
            self._ask(self._stand_ins(missing), pieces, part)
        return tuple([part.units for part in self.parts[num_parts:]])

    def _hopeful(self) -> int:
        """Columns that may still come in time."""
        return sum(
            not part.replaced
            and (part.state == _QUEUED or (part.state == _RUNNING and part.due > self.now))
            and len(part.units)
            for part in self.parts
        )

    def _afford(self, units: Sequence[int]) -> bool:
        most = 1 + _BURST / self.num_first
        return self.history.spend(len(units) / self.num_units, most)

    def _stand_ins(self, missing: list[int]) -> list[int]:
        """Columns not asked yet, as long as there are some, else the same ones again."""
        fresh = [self.spare.popleft() for _ in range(min(len(self.spare), len(missing)))]
        return sorted(fresh + missing[len(fresh) :])

    def _ask(self, units: list[int], pieces: int, of: _Part) -> None:
        for i in range(pieces):
            piece = units[i * len(units) // pieces : (i + 1) * len(units) // pieces]
            self.parts.append(_Part(len(self.parts), tuple(piece), of, self.now))
        self.open += pieces
        self.unbegun += pieces

    def _end(self, reason: str) -> Ended:
        ran = [part for part in self.parts if part.fresh is not None]
        if not self.waiting.at_once:
            # Calls that were cut short count as infinite: left out, they would keep the median,
            # and so the patience, at what calls took before the machines became slow.
            took = self.now - self.since if len(self.good) >= self.needed else math.inf
            typical = not any(part.fresh for part in ran)
            self.history.add(
                [(self.unit_rows * len(p.units), p.seconds) for p in ran if not p.fresh],
                (self.rows, took) if typical else None,
            )
        hedges = tuple(
            Hedge(
                part.number,
                part.of.number,
                part.units,
                part.at - self.since,
                part.won,
            )
            for part in self.parts[self.num_first :]
            if part.of is not None
        )
        fence = self._fence(self.rows // self.unit_rows)
        deadline, decodable = self.waiting.deadline or self.deadline, self.decodable - self.since
        return Ended(reason, hedges, fence, self.median, deadline, decodable)
