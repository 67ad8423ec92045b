"""The decisions of one call: hedges, failed parts, and the end, as :class:`Waiting` says.

A row is *refused*, and not asked for again in this call, if the module fails on it. A row that
fails on one broken worker only is given up, but not refused: it is missing.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from . import Ask, Began, Decision, Drop, Ended, Event, Failure, Hedge, Prepare, Settled, Wait

if TYPE_CHECKING:
    from .latency_history import History
    from .waiting import Waiting

_QUEUED, _RUNNING, _GOOD, _FAILED, _DROPPED = range(5)  # states of a part

# Late parts are hedged three times, first split over four idle workers (benchmarks/waiting.py). A
# failed part is cut in four: few workers are lost to a row that ends them (benchmarks resilience).
_HEDGES, _SPLIT = 3, 4
_BURST = 20  # parts that may be hedged at once, beside one whole call; benchmarks/waiting.py
_ESTIMATE_AFTER = 3.0  # median calls, with a code; benchmarks/waiting.py
# Failures in a row of the same rows, which are then given up. A call that may not estimate gives up
# one row of a million at a failure rate of 0.5.
_TRIES, _TRIES_IF_EXACT = 3, 20
# Rows that must raise alike, alone, with no good result, before all rows are refused. If half of
# the rows were bad, 16 bad ones would be picked in one call of 65,536.
_BLAMED = 16
# Probabilities that other parts would have failed as often as this one. Below the first, which four
# others that did not fail reach, a part is cut. Below the second, a row is poison: with a third of
# all parts failing, that is one call of two thousand (benchmarks/resilience.py, "poison").
_SUSPECT, _POISON = 0.2, 1e-5


class _Part:
    """A part, and the part that it stands in for."""

    state = _QUEUED
    due = math.inf  # the time at which it is late
    seconds = math.inf  # a good result's latency
    began = took = math.inf  # the last begin, and the seconds from there to the failure
    fresh: bool | None = None  # None: it has not begun
    worker, failure = -1, Failure()
    replaced = won = False

    def __init__(
        self, number: int, units: tuple[int, ...], of: _Part | None, at: float, tries: int = 0
    ) -> None:
        self.number, self.units, self.of, self.at = number, units, of, at
        self.tries = tries  # failures of exactly these units in a row
        self.hedges: int = of.hedges if of else 0  # including the parts that it stands in for
        self.line: tuple[_Part, ...] = (self, *of.line) if of else (self,)

    @property
    def raised(self) -> bool:
        return self.failure.kind == "raised"

    @property
    def blamed(self) -> bool:  # the module raised on this unit alone
        return self.raised and len(self.units) == 1

    @property
    def suspect(self) -> bool:  # the module raised, or a worker ended, at these units before
        return any(part.failure.kind for part in self.line)

    @property
    def let_down(self) -> bool:  # the worker failed, without an exception of the module
        return self.state == _FAILED and not self.raised


class Call:
    """The state of one call."""

    def __init__(
        self,
        waiting: Waiting,
        history: History,  # the history of the same module on the same pool
        first: Sequence[Sequence[int]],  # the units of each part of the first ask
        *,
        needed: int,  # the number of units that complete the call: B or N - S
        least: int = 1,  # the number of units that can be decoded
        unit_rows: int = 1,
        spare: Sequence[int] | None = None,  # the columns that stand in for any column
        since: float = 0.0,  # the time at which the call began
        idle: Callable[[], int] = lambda: 1,  # returns the number of idle workers
        reserve: float = 0.0,  # seconds before the deadline that estimating takes
    ) -> None:
        self.waiting, self.history, self.needed, self.spare = waiting, history, needed, spare
        self.unit_rows, self.since, self.idle, self.reserve = unit_rows, since, idle, reserve
        self.least = waiting.least(needed, least, spare is None)
        self.may_estimate = waiting.may_estimate(spare is None)
        self.parts = [_Part(i, tuple(units), None, since) for i, units in enumerate(first)]
        self.open = self.num_first = len(first)  # open parts may still settle
        self.num_units, self.rows = sum(map(len, first)), unit_rows * max(map(len, first))
        self.unasked, self.hedged = deque(spare or ()), False
        self.deadline = self.late_at = self.end = self.prepare_at = math.inf
        self.now = self.heard = since  # no event can come any more from before `heard`
        self.good, self.given_up = set[int](), set[int]()
        self.refused: dict[int, int] = {}  # the part that showed it, by unit
        self.timers: list[tuple[float, int]] = []  # the due times and numbers of parts
        half, budget = (waiting.deadline or math.inf) / 2, waiting.hedge_budget
        self.threshold = functools.cache(
            lambda n: history.hedging_threshold(n * unit_rows, budget, half)
        )

    def decisions(self) -> Generator[Decision, Event, Ended]:
        waiting = self.waiting
        after = waiting.estimate_after or (math.inf if self.spare is None else _ESTIMATE_AFTER)
        if waiting.deadline is not None:
            self.deadline = waiting.deadline
        elif self.may_estimate and after < math.inf:
            self.deadline = after * self.history.call(self.rows)
        # From `late_at` on, missing rows are estimated as soon as half of the results are there.
        self.end = self.since + self.deadline
        self.late_at = self.end - self.reserve
        self.history.earn(waiting.hedge_budget)
        yield Ask(tuple([part.units for part in self.parts]))
        while True:
            if reason := self._reason():
                return self._end(reason)
            until = self._until()
            event = yield Wait(until)
            if isinstance(event, Began):
                self._begin(event)
                continue
            if event is not None:
                self._settle(event)
                if len(self.good) < self.needed and (unwanted := self._unwanted()):
                    yield Drop(unwanted)
                if event.ok:
                    continue
            elif until == math.inf:
                return self._end("failed")
            else:
                self.now = self.heard = max(self.now, until)
                if self._reason():
                    continue
            if asked := self._stand_ins():
                yield Ask(asked)
            if self.now >= self.prepare_at:
                self.prepare_at = math.inf
                yield Prepare()

    def _reason(self) -> str:
        """Return why the call ends now, "" if it does not."""
        if len(self.good) >= self.needed:
            is_first = self.waiting.at_once and len(self.good) < self.num_first
            return "first" if is_first else "complete"
        if self.refused and len(self.good | self.refused.keys()) >= self.needed:
            return "error"  # the module itself fails on all missing rows
        how = "deadline" if self.waiting.deadline is not None else "estimate_after"
        is_over = self.heard >= self.end and how == "deadline"
        if is_over or (self.heard >= self.late_at and len(self.good) >= self.least):
            return how
        return "" if self.open else "failed"

    def _until(self) -> float:
        """Return when to act if nothing happens."""
        due = self.prepare_at
        while self.timers:
            at, number = self.timers[0]
            if self.parts[number].state == _RUNNING and self.parts[number].due == at:
                due = min(due, at)
                break
            heapq.heappop(self.timers)
        if self.heard < self.late_at:
            return min(due, self.late_at)
        return due if self.waiting.deadline is None else min(due, self.end)

    def _begin(self, event: Began) -> None:
        part = self.parts[event.part]
        self.now = max(self.now, event.at)
        self.open += part.state == _DROPPED  # the drop came too late
        part.state, part.fresh, part.began = _RUNNING, event.fresh, event.at
        if self.waiting.hedge_budget:
            self._set_due(part, event.at + self.threshold(len(part.units)))

    def _set_due(self, part: _Part, due: float) -> None:
        part.due = due
        if due < math.inf:
            heapq.heappush(self.timers, (due, part.number))

    def _settle(self, event: Settled) -> None:
        part, good = self.parts[event.part], self.good
        self.now = max(self.now, event.at)
        self.open -= part.state <= _RUNNING
        part.state = _GOOD if event.ok else _FAILED
        part.failure, part.worker = event.failure, event.worker
        if event.ok:
            part.won, part.seconds = not good.issuperset(part.units), event.latency
            part.fresh = bool(part.fresh)
            good.update(part.units)
            return
        part.tries, part.took = part.tries + 1, event.latency
        good &= set[int]().union(*(p.units for p in self.parts if p.state == _GOOD))
        first = self.parts[: self.num_first]
        singles = {part.units: part for part in reversed(self.parts) if len(part.units) == 1}
        most = max(3, min(_BLAMED, self.num_units))
        # The first that were asked: rows that raise may be faster than others.
        alone = sorted(singles.values(), key=lambda part: part.number)[:most]
        alike = len({p.failure.cause for p in alone}) == 1 < len({p.worker for p in alone})
        enough = len(alone) == most and all(part.blamed for part in alone)
        if alike and enough and not good and all(part.raised for part in first):
            self.refused |= {unit: other.number for other in first for unit in other.units}

    def _unwanted(self) -> tuple[int, ...]:
        """Drop parts that have not begun, and that other parts have answered."""
        later = self.parts[self.num_first :]
        unwanted = [p for p in later if p.state == _QUEUED and not self._missing(p)]
        for part in unwanted:
            part.state = _DROPPED
        self.open -= len(unwanted)
        return tuple([part.number for part in unwanted])

    def _missing(self, part: _Part) -> list[int]:
        return [u for u in part.units if u not in self.good and u not in self.refused]

    def _stand_ins(self) -> tuple[tuple[int, ...], ...]:
        """Return new parts that stand in for late and failed parts."""
        if self.waiting.at_once:
            return ()
        while self.timers and self.timers[0][0] <= self.now:
            heapq.heappop(self.timers)
        num_parts, idle, lacking = len(self.parts), self.idle(), self.num_units
        if self.spare is not None:  # less the columns that may still come in time
            hopeful = [p for p in self.parts if p.state <= _RUNNING and p.due > self.now]
            lacking = self.needed - len(self.good) - sum(not part.replaced for part in hopeful)
        for part in self.parts[:num_parts]:
            late = part.state == _RUNNING and part.due <= self.now
            if part.replaced or not (late or part.state >= _FAILED):
                continue
            missing = self._missing(part)[: max(0, lacking)]
            asks = missing and (not late or self._may_hedge(part, missing, idle))
            if not asks:
                continue
            part.replaced = True
            part.hedges += late
            rows, most = len(missing) * self.unit_rows, min(_SPLIT, idle)
            num = self.history.num_hedges(rows, most) if late and not part.of else 1
            if part.state == _FAILED:
                num = self._judge(part)
            if num := min(num, len(missing)):
                idle -= num
                lacking -= len(missing) if self.spare is not None else 0
                if num > 1 and part.raised and not self.good:  # does the module fail on all?
                    self._add([missing.pop(0)], 1, part)
                    num -= 1
                self._add(missing, num, part)
        self.open += len(self.parts) - num_parts
        return tuple([part.units for part in self.parts[num_parts:]])

    def _may_hedge(self, part: _Part, missing: Sequence[int], idle: int) -> bool:
        """Return whether to hedge a late part now. If not now, but perhaps later, try again."""
        # A copy of a part that ended a worker would end another worker, too.
        if part.hedges >= _HEDGES or any(other.failure.kind == "died" for other in part.line):
            return False
        if not self.hedged:
            self.hedged, self.prepare_at = True, (self.since + self.late_at) / 2
        # A row that is late on two workers may be slow on all: one worker stays free for others.
        may = part.hedges == 0 or len(missing) > 1 or idle > 1
        if may and self.history.spend(len(missing) / self.num_units, 1 + _BURST / self.num_first):
            return True
        # Where parts take no time, a threshold of 0 would be due for ever.
        self._set_due(part, self.now + (self.threshold(len(part.units)) or math.inf))
        return False

    def _add(self, missing: list[int], num: int, of: _Part) -> None:
        new = [self.unasked.popleft() for _ in range(min(len(self.unasked), len(missing)))]
        units = sorted(new + missing[len(new) :])
        for i in range(num):
            some = tuple(units[i * len(units) // num : (i + 1) * len(units) // num])
            tries = of.tries if len(some) == len(of.units) else 0
            self.parts.append(_Part(len(self.parts), some, of, self.now, tries))

    def _judge(self, part: _Part) -> int:
        """Return into how many parts to cut a failed part; 0 to give up its rows."""
        if self.spare is not None:
            return int(part.tries < _TRIES)
        most, alone = _TRIES if self.may_estimate else _TRIES_IF_EXACT, len(part.units) == 1
        refused = False
        if part.raised:
            if not alone:
                return _SPLIT
            refused = len({p.worker for p in part.line if p.failure == part.failure}) > 1
            good = any(p.state == _GOOD and p.worker != part.worker for p in self.parts)
            others = good or any(p.state <= _RUNNING and not p.suspect for p in self.parts)
            most = _TRIES_IF_EXACT if others else _TRIES
        elif part.fresh is None:  # no worker had it
            most = _TRIES
        else:
            died, chance = part.failure.kind == "died", self._chance(part)
            # Where most parts fail, smaller parts would only lose more workers. But one part alone
            # cannot tell: it is cut once before all of its rows are given up.
            whole = len(part.units) == len(part.line[-1].units) and most > _TRIES
            cut = part.tries >= _TRIES and (whole or not died)
            cut |= part.tries >= most and bool(self.good)  # some workers work: cut to the bad row
            if not alone and (chance <= _SUSPECT or cut):
                return _SPLIT
            refused = alone and died and part.tries >= 2 and chance <= _POISON
        if part.tries < most and not refused:
            return 1
        self.given_up.update(part.units)
        self.refused |= dict.fromkeys(part.units if refused else (), part.number)
        return 0

    def _chance(self, part: _Part) -> float:
        """Return the probability that other rows would have failed as often."""
        # Parts that run for half as long as this one ran have not failed.
        since = self.now - part.took / 2
        others = [
            p
            for p in self.parts
            if (p.state in (_GOOD, _FAILED) or (p.state == _RUNNING and p.began <= since))
            and p not in part.line
        ]
        ended = [p.let_down for p in others if not p.raised]
        return self.history.failure_rate(ended) ** sum(p.let_down for p in part.line)

    def _end(self, reason: str) -> Ended:
        # Rows that the module raised on are refused if no other worker is known to work, or if they
        # raised three times in a row on a worker that computed other rows.
        working = {part.worker for part in self.parts if part.state == _GOOD}
        raised = all(part.raised for part in self.parts if part.state == _FAILED)
        blames = self.spare is None and (working or reason == "failed" or raised)
        for part in reversed(self.parts) if blames else ():
            works = part.worker in working and part.tries >= _TRIES
            lone = part.blamed and part.units[0] not in self.good
            if lone and (works or working <= {part.worker}):
                self.refused.setdefault(part.units[0], part.number)
        reason = "error" if reason == "failed" and self._reason() == "error" else reason
        if not self.waiting.at_once:
            self._remember()
        hedges = [
            Hedge(part.number, part.line[1].number, part.units, part.at - self.since, part.won)
            for part in self.parts[self.num_first :]
        ]
        threshold = self.history.hedging_threshold(self.rows, self.waiting.hedge_budget)
        refused = tuple(sorted({n for unit, n in self.refused.items() if unit not in self.good}))
        return Ended(reason, tuple(hedges), threshold, self.deadline, refused)

    def _remember(self) -> None:
        ran = [part for part in self.parts if part.fresh is not None]
        # If calls that were cut short did not count as infinite, the median would not follow.
        took = self.now - self.since if len(self.good) >= self.needed else math.inf
        is_typical = not any(part.fresh for part in ran)
        innocent = [part for part in ran if self.given_up.isdisjoint(part.units)]
        self.history.add(
            [(self.unit_rows * len(part.units), part.seconds) for part in ran if not part.fresh],
            (self.rows, took) if is_typical else None,
            [p.let_down for p in innocent if p.state in (_GOOD, _FAILED) and not p.raised],
        )
