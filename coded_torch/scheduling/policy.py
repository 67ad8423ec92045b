"""The decisions of one call; ``waiting.py`` describes the protocol."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from .blame import ALONE, EXACT, judge, raised_alike
from .latency_history import History
from .protocol import (
    Ask,
    Began,
    Decision,
    Drop,
    Ended,
    Event,
    Failure,
    Hedge,
    Prepare,
    Settled,
    Wait,
)

if TYPE_CHECKING:
    from .waiting import Waiting

__all__ = ["Call", "Part"]

# A part that is late is hedged three times, the first time split over up to four idle workers: that
# cuts the tail of three hedges of whole parts (benchmarks/waiting.py, "three re-asks").
_HEDGES, _SPLIT = 3, 4
_BURST = 20  # parts, and one whole call, that may be hedged before `hedge_budget` limits them

_QUEUED, _RUNNING, _GOOD, _FAILED, _DROPPED = range(5)


class Part:
    """A part that was asked, and the part it stands in for: parts make a tree, leaves count."""

    __slots__ = (
        "at", "due", "explained", "failure", "fresh", "lates", "number", "of", "replaced",
        "seconds", "state", "tries", "units", "won", "worker",
    )  # fmt: skip

    def __init__(self, number: int, units: tuple[int, ...], of: Part | None, at: float) -> None:
        self.number, self.units, self.of, self.at = number, units, of, at
        self.state = _QUEUED
        self.due = self.seconds = math.inf
        self.fresh: bool | None = None  # until it begins
        self.worker = -1  # the worker that computed it; -1: unknown
        self.failure = Failure()
        self.replaced = self.won = False
        self.explained = False  # whether its failure is known to be its rows' fault
        # Failures of exactly these units in a row, and how often they were hedged.
        self.tries: int = of.tries if of is not None and len(of.units) == len(units) else 0
        self.lates: int = of.lates if of is not None else 0

    def line(self) -> Iterator[Part]:
        """Yield this part and those that it stands in for, the last first."""
        part: Part | None = self
        while part is not None:
            yield part
            part = part.of

    @property
    def failed(self) -> bool:
        return self.state == _FAILED


class Call:
    """One call, as far as it has come; for its arguments see ``decide``."""

    def __init__(
        self,
        waiting: Waiting,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        least: int,
        unit_rows: int,
        spare: Sequence[int] | None,
        since: float,
        idle: Callable[[], int],
        reserve: float,
    ) -> None:
        self.waiting, self.history, self.needed = waiting, history, needed
        self.least = max(least, -(-needed // 2) if waiting.predict else needed)
        self.unit_rows, self.since, self.now = unit_rows, since, since
        self.idle = idle
        self.by_columns = spare is not None
        self.spare = deque(spare or ())
        self.parts = [Part(i, tuple(units), None, since) for i, units in enumerate(first)]
        self.num_first, self.num_units = len(first), sum(map(len, first))
        self.open = len(first)  # parts that may still settle
        self.unbegun = 0  # parts that stand in for others and have not begun
        self.good: set[int] = set()
        self.refused: dict[int, int] = {}  # by the unit, the part that showed it
        self.doubtful: dict[int, int] = {}  # the same, but only one worker has raised
        self.raised: dict[int, Failure] = {}  # by the number of a part of the first ask
        self.ended = self.failed = 0  # parts, without those that the module raised on
        self.decodable = math.inf
        self.timers: list[tuple[float, int]] = []  # when parts are due, and their numbers
        self.late = self.over = self.lost = self.hedged = self.prepared = False
        self.rows = unit_rows * max(map(len, first))
        self.thresholds: dict[int, float] = {}
        self.hedges = waiting.hedge_budget > 0
        self.median = history.call(self.rows)
        if waiting.deadline is not None:
            self.deadline, self.end = waiting.deadline - reserve, waiting.deadline
        else:
            never = not waiting.predict or waiting.predict_after == math.inf
            self.deadline = math.inf if never else waiting.predict_after * self.median
            self.end = 2 * self.deadline  # of the search for the rows on which the module fails
        if self.hedges:
            history.earn(waiting.hedge_budget)

    def decisions(self) -> Generator[Decision, Event, Ended]:
        yield Ask(tuple([part.units for part in self.parts]))
        wait = Wait(-math.inf)
        while (reason := self._reason()) is None:
            until = self._until()
            if until != wait.until:
                wait = Wait(until)
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
                return self._end("failed")
            else:
                # Only now, when no event was there to come before it.
                self.now = max(self.now, until)
                self.late |= self.now >= self.since + self.deadline
                self.over |= self.now >= self.since + self.end
                if self._reason() is not None:
                    continue
            if asked := self._stand_ins():
                yield Ask(asked)
            if self.now >= self._preparing():
                self.prepared = True
                yield Prepare()
        return self._end(reason)

    def _reason(self) -> str | None:
        """Return why the call ends now, None if it does not."""
        good = len(self.good)
        if good >= self.needed:
            return "complete"
        if self.refused and good + len(self.refused.keys() - self.good) >= self.needed:
            return "error"
        enough = self.late and good >= self.least
        if self.waiting.deadline is not None:
            if self.over or enough:
                return "deadline"
        elif enough and not (self.now < self.since + self.end and self._searching()):
            return "predict_after"
        return None if self.open else "failed"

    def _searching(self) -> bool:
        """Return whether a row on which the module fails is looked for: no time to predict it."""
        return any(
            part.state <= _RUNNING
            and not self.good.issuperset(part.units)
            and any(other.failure.kind for other in part.line())
            for part in self.parts[self.num_first :]
        )

    def _until(self) -> float:
        """Return when something is to be done if nothing happens."""
        timers, parts = self.timers, self.parts
        while timers:
            due, number = timers[0]
            if parts[number].state == _RUNNING and parts[number].due == due:
                break
            heapq.heappop(timers)
        due = min(timers[0][0] if timers else math.inf, self._preparing())
        if not self.late:
            return min(due, self.since + self.deadline)
        if self.waiting.deadline is None and len(self.good) < self.least:
            return due  # the rest could not be predicted
        return min(due, self.since + self.end)

    def _preparing(self) -> float:
        """Return when it is probable enough that something will have to be predicted."""
        if self.prepared or not self.hedged:
            return math.inf
        return self.since + self.deadline / 2

    def _threshold(self, num_units: int) -> float:
        seconds = self.thresholds.get(num_units)
        if seconds is None:
            seconds = self.history.hedging_threshold(num_units * self.unit_rows)
            self.thresholds[num_units] = seconds
        return seconds

    def _begin(self, event: Began) -> None:
        part = self.parts[event.part]
        self.now = max(self.now, event.at)
        if part.state == _DROPPED:  # too late
            self.open += 1
        elif part.number >= self.num_first:
            self.unbegun -= 1
        part.state, part.fresh = _RUNNING, event.fresh
        if self.hedges and (threshold := self._threshold(len(part.units))) < math.inf:
            part.due = event.at + threshold
            heapq.heappush(self.timers, (part.due, part.number))

    def _settle(self, event: Settled) -> None:
        part, good = self.parts[event.part], self.good
        self.now = max(self.now, event.at)
        before, part.state = part.state, _GOOD if event.ok else _FAILED
        part.failure, part.worker = event.failure, event.worker
        if before <= _RUNNING:
            self.open -= 1
            self.unbegun -= before == _QUEUED and part.number >= self.num_first
            self.ended += event.failure.kind != "raised"
        if event.ok:
            num_good = len(good)
            good.update(part.units)
            part.won, part.seconds = len(good) > num_good, event.latency
            if len(good) >= self.least:
                self.decodable = min(self.decodable, event.at)
            part.fresh = bool(part.fresh)
            return
        self.lost = True
        part.tries += 1
        if before == _GOOD:
            good.clear()
            good.update(*(other.units for other in self.parts if other.state == _GOOD))
            if len(good) < self.least:
                self.decodable = math.inf
        if event.failure.kind != "raised":
            self.failed += 1
        elif part.number < self.num_first:
            self.raised[part.number] = part.failure
            if not good and raised_alike(self.raised, self.num_first):
                for other in self.parts[: self.num_first]:
                    self.refused |= dict.fromkeys(other.units, other.number)

    def _unwanted(self) -> tuple[int, ...]:
        """Drop parts that have not begun, and have been answered by others."""
        unwanted, answered = [], self.good | self.refused.keys()
        for part in self.parts[self.num_first :]:
            if part.state == _QUEUED and answered.issuperset(part.units):
                part.state = _DROPPED
                unwanted.append(part.number)
        self.open -= len(unwanted)
        self.unbegun -= len(unwanted)
        return tuple(unwanted)

    def _stand_ins(self) -> tuple[tuple[int, ...], ...]:
        """Ask for what is late or failed, and return the new parts."""
        self.lost = False
        while self.timers and self.timers[0][0] <= self.now:
            heapq.heappop(self.timers)
        num_parts, idle = len(self.parts), self.idle()
        lacking = self.num_units
        if self.by_columns:
            lacking = self.needed - len(self.good) - self._hopeful()
        for part in self.parts[:num_parts]:
            late = part.state == _RUNNING and part.due <= self.now
            if part.replaced or not (late or part.state >= _FAILED):
                continue
            missing = [u for u in part.units if u not in self.good and u not in self.refused]
            missing = missing[: max(0, lacking)]
            if not missing or (late and not self._may_hedge(part, missing)):
                continue
            part.replaced = True
            pieces = min(self._pieces(part, late, idle), len(missing))
            if pieces:
                part.lates += late
                idle, lacking = idle - pieces, lacking - len(missing) * self.by_columns
                self._ask(missing, pieces, part)
        return tuple([part.units for part in self.parts[num_parts:]])

    def _may_hedge(self, part: Part, missing: Sequence[int]) -> bool:
        """Return whether a late part is hedged now; if only the budget forbids it, try later."""
        if part.lates >= _HEDGES:
            return False
        if any(other.failure.kind == "died" for other in part.line()):
            return False  # a copy of it would end another worker, too
        self.hedged = True
        most = 1 + _BURST / self.num_first
        if self.history.spend(len(missing) / self.num_units, most):
            return True
        # On a clock that stands still, where parts take no time, it would be due for ever.
        part.due = self.now + (self._threshold(len(part.units)) or math.inf)
        heapq.heappush(self.timers, (part.due, part.number))
        return False

    def _pieces(self, part: Part, late: bool, idle: int) -> int:
        """Return how many parts stand in for one; 0 if it is given up."""
        if late:
            return 1 if part.of else max(1, min(_SPLIT, idle))
        if part.state == _DROPPED:
            return 1
        if self.by_columns:
            return int(part.tries < ALONE)
        raised = part.failure.kind == "raised"
        others = raised and not self._sound() <= {part.failure.worker}
        most = ALONE if self.waiting.predict else EXACT
        verdict = judge(part, self._rate(part), most, others)
        if not verdict.pieces:
            for failed in part.line():  # its failures say nothing of the workers
                failed.explained = True
        if verdict.refused:
            self.refused |= dict.fromkeys(part.units, part.number)
        elif raised and not verdict.pieces:
            self.doubtful |= dict.fromkeys(part.units, part.number)
        return verdict.pieces

    def _sound(self) -> set[int]:
        """Return the workers that have returned good results."""
        return {part.worker for part in self.parts if part.state == _GOOD}

    def _rate(self, part: Part) -> float:
        """Return the share of other parts that fail, other than by an exception of the module."""
        own = sum(other.failed and other.failure.kind != "raised" for other in part.line())
        ended, failed = self.ended - own, self.failed - own
        known_failed, known_ended = self.history.failing()
        # One more of each, as what was never seen to fail may fail. This call weighs more: all
        # workers may have broken just now.
        lately = (known_failed + failed + 1) / (known_ended + ended + 1)
        return max(lately, failed / ended if ended else 0.0)

    def _hopeful(self) -> int:
        """Return the number of columns that may still come in time."""
        return sum(
            len(part.units)
            for part in self.parts
            if not part.replaced
            and (part.state == _QUEUED or (part.state == _RUNNING and part.due > self.now))
        )

    def _ask(self, missing: list[int], pieces: int, of: Part) -> None:
        # Columns not asked yet, as long as there are some, else the same ones again.
        fresh = [self.spare.popleft() for _ in range(min(len(self.spare), len(missing)))]
        units = sorted(fresh + missing[len(fresh) :])
        for i in range(pieces):
            piece = units[i * len(units) // pieces : (i + 1) * len(units) // pieces]
            self.parts.append(Part(len(self.parts), tuple(piece), of, self.now))
        self.open += pieces
        self.unbegun += pieces

    def _end(self, reason: str) -> Ended:
        if self.doubtful:
            reason = self._blame_doubtful(reason)
        self._remember()
        return Ended(
            reason,
            tuple(
                Hedge(part.number, part.of.number, part.units, part.at - self.since, part.won)
                for part in self.parts[self.num_first :]
                if part.of is not None
            ),
            self._threshold(self.rows // self.unit_rows),
            self.median,
            self.waiting.deadline or self.deadline,
            self.decodable - self.since,
            tuple(sorted(set(self.refused.values()))),
        )

    def _blame_doubtful(self, reason: str) -> str:
        """Refuse the rows that failed on one worker, if no other worker is known to work.

        The call may end before any worker has returned a result. Then nothing is known.
        """
        sound = self._sound()
        for unit, number in self.doubtful.items():
            known = sound or reason == "failed"
            if unit not in self.good and known and sound <= {self.parts[number].failure.worker}:
                self.refused.setdefault(unit, number)
        lacking = self.needed - len(self.good)
        complete = len(self.refused.keys() - self.good) >= lacking
        return "error" if reason == "failed" and self.refused and complete else reason

    def _remember(self) -> None:
        ran = [part for part in self.parts if part.fresh is not None]
        # Calls that were cut short count as infinite: without them the median would stay at what
        # calls took before the workers became slow.
        took = self.now - self.since if len(self.good) >= self.needed else math.inf
        typical = not any(part.fresh for part in ran)
        self.history.add(
            [(self.unit_rows * len(p.units), p.seconds) for p in ran if not p.fresh],
            (self.rows, took) if typical else None,
        )
        told = [p for p in ran if p.state in (_GOOD, _FAILED)]
        told = [p for p in told if not (p.explained or p.failure.kind == "raised")]
        self.history.failed(sum(p.failed for p in told), len(told))
