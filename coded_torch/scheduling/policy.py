"""The decisions of one call: hedges, failed parts, and the end, as :class:`Waiting` says.

A row is *refused*, and not asked for again in this call, if the module fails on it. A row that
fails on one broken worker only is given up, but not refused: it is missing.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..table import DROPPED, GOOD, OPEN, Part, Table

if TYPE_CHECKING:
    from .latency_history import History
    from .waiting import Waiting

# Late parts are hedged three times, first split over four idle workers (benchmarks/waiting.py). A
# failed part is cut in four: few workers are lost to a row that ends them (benchmarks resilience).
_HEDGES = 3
_SPLIT = 4
_BURST = 20  # parts that may be hedged at once, beside one whole call; benchmarks/waiting.py
_ESTIMATE_AFTER = 3.0  # median calls, with a code; benchmarks/waiting.py
# Failures in a row of the same rows, which are then given up. A call that may not estimate gives up
# one row of a million at a failure rate of 0.5.
_TRIES = 3
_TRIES_IF_EXACT = 20
# Rows that must raise alike, alone, with no good result, before all rows are refused. If half of
# the rows were bad, 16 bad ones would be picked in one call of 65,536.
_BLAMED = 16
# Probabilities that other parts would have failed as often as this one. Below the first, which four
# others that did not fail reach, a part is cut. Below the second, a row is poison: with a third of
# all parts failing, that is one call of two thousand (benchmarks/resilience.py, "poison").
_SUSPECT = 0.2
_POISON = 1e-5


class Decisions:
    """Decides which parts a call asks for, and when the call ends. The table holds both."""

    def __init__(self, waiting: Waiting, history: History, table: Table) -> None:
        self.waiting = waiting
        self.history = history
        self.table = table
        by_rows = table.spare is None
        budget = waiting.hedge_budget
        self.may_estimate = waiting.may_estimate(by_rows)
        self.least = waiting.least(table.needed, table.least, by_rows)
        self.num_units = sum(map(len, table.first))
        self.rows = max(map(len, table.first))
        self.rows *= table.unit_rows
        self.unasked = deque(table.spare or ())
        after = waiting.estimate_after or (math.inf if by_rows else _ESTIMATE_AFTER)
        if waiting.deadline is not None:
            table.deadline = waiting.deadline
        elif self.may_estimate and after < math.inf:
            table.deadline = after * history.call(self.rows)
        # From `late_at` on, missing rows are estimated as soon as half of the results are there.
        self.end = table.since + table.deadline
        self.late_at = self.end - table.reserve
        self.prepare_at = math.inf
        self.hedged = False
        self.is_remembered = False
        self.timers: list[tuple[float, int]] = []  # the due times and numbers of parts
        self.to_replace: dict[int, Part] = {}  # late and failed parts, by number
        half = (waiting.deadline or math.inf) / 2
        self.threshold = functools.cache(
            lambda n: history.hedging_threshold(n * table.unit_rows, budget, half)
        )
        table.late = (budget and self.threshold(min(map(len, table.first)))) or math.inf
        history.earn(budget)
        for units in table.first:
            table.ask(units)

    def decide(self) -> float:
        """Return when to decide again if nothing happens."""
        table = self.table
        raised = False
        for part in table.changed:
            if part.outcome is OPEN and self.waiting.hedge_budget:
                if not part.verifies:
                    self._set_due(part, part.began + self.threshold(len(part.units)))
            elif part.outcome is not OPEN and part.outcome is not GOOD:
                self.to_replace[part.number] = part
                raised |= part.kind == "raised"
        if raised and not table.answered:
            self._blame()
        table.changed.clear()
        reason = self._reason()
        if not reason and table.is_over:
            reason = "failed"
        elif not reason:
            if len(table.parts) > len(table.first):
                self._drop()
            self._replace()
            reason = self._reason() or ("" if table.open else "failed")
            if table.now >= self.prepare_at:  # but the call must not end later for it
                self.prepare_at = math.inf
                table.prepares = table.now + table.reserve <= self.late_at
        if reason:
            self._end(reason)
        return self._until()

    def _reason(self) -> str:
        """Return why the call ends now, "" if it does not."""
        table = self.table
        if len(table.answered) >= table.needed:
            is_first = self.waiting.at_once and len(table.answered) < len(table.first)
            return "first" if is_first else "complete"
        if table.refused and len(table.answered.keys() | table.refused.keys()) >= table.needed:
            return "error"  # the module itself fails on all missing rows
        how = "deadline" if self.waiting.deadline is not None else "estimate_after"
        is_late = table.heard >= self.late_at and len(table.answered) >= self.least
        return how if is_late or (table.heard >= self.end and how == "deadline") else ""

    def _until(self) -> float:
        due = self.prepare_at
        while self.timers:
            at, number = self.timers[0]
            part = self.table.parts[number]
            if part.outcome is OPEN and part.due == at:
                due = min(due, at)
                break
            heapq.heappop(self.timers)
        if self.table.heard < self.late_at:
            return min(due, self.late_at)
        self.table.late = math.inf  # from now on, each result may end the call
        return due if self.waiting.deadline is None else min(due, self.end)

    def _set_due(self, part: Part, due: float) -> None:
        part.due = due
        if due < math.inf:
            heapq.heappush(self.timers, (due, part.number))

    def _blame(self) -> None:
        """Refuse all rows if single rows raise alike, on several workers."""
        table = self.table
        singles = {part.units: part for part in reversed(table.parts) if len(part.units) == 1}
        most = max(3, min(_BLAMED, self.num_units))
        # The first that were asked: rows that raise may be faster than others.
        alone = sorted(singles.values(), key=lambda part: part.number)[:most]
        if len(alone) < most or not all(part.kind == "raised" for part in alone):
            return
        causes = {p.error and p.error.alike for p in alone}
        workers = {p.worker for p in alone}
        first = table.parts[: len(table.first)]
        if len(causes) == 1 < len(workers) and all(part.kind == "raised" for part in first):
            table.refused |= {unit: part for part in first for unit in part.units}

    def _drop(self) -> None:
        """Drop hedges that have not begun, and that other parts have answered."""
        for part in self.table.parts[len(self.table.first) :]:
            waits = part.of is not None and part.outcome is OPEN and part.began == math.inf
            if waits and not self.table.missing(part):
                self.table.mark(part, DROPPED)

    def _replace(self) -> None:
        """Ask for parts that stand in for late and failed ones."""
        table = self.table
        while table.is_quiet and self.timers and self.timers[0][0] <= table.heard:
            part = table.parts[heapq.heappop(self.timers)[1]]
            self.to_replace[part.number] = part
        if not self.to_replace or self.waiting.at_once:
            return
        idle = table.idle()
        lacking = self.num_units
        if table.spare is not None:  # less the columns that may still come in time
            hopeful = [p for p in table.parts if p.outcome is OPEN and p.due > table.heard]
            lacking = table.needed - len(table.answered)
            lacking -= sum(not part.replaced for part in hopeful)
        for number, part in sorted(self.to_replace.items()):
            late = part.outcome is OPEN
            if part.replaced or part.outcome is GOOD or (late and part.due > table.heard):
                del self.to_replace[number]
                continue
            missing = table.missing(part)[: max(0, lacking)]
            if missing and part.verifies:  # its rows may be asked for by now
                asked = {u for p in table.parts if p.outcome is OPEN for u in p.units}
                missing = [unit for unit in missing if unit not in asked]
            if not missing or (late and not self._may_hedge(part, missing, idle)):
                continue
            part.replaced = True
            rows = len(missing) * table.unit_rows
            most = min(_SPLIT, idle)
            num = self.history.num_hedges(rows, most) if late and part.of is None else 1
            if part.failed:
                num = self._cut(part)
            if num := min(num, len(missing)):
                idle -= num
                lacking -= len(missing) if table.spare is not None else 0
                if num > 1 and part.kind == "raised" and not table.answered:
                    self._ask([missing.pop(0)], 1, part)  # does the module fail on all?
                    num -= 1
                self._ask(missing, num, part)

    def _may_hedge(self, part: Part, missing: Sequence[int], idle: int) -> bool:
        """Return whether to hedge a late part now. If not now, but perhaps later, try again."""
        # A copy of a part that ended a worker would end another worker, too.
        hedges = sum(other.why == "hedge" for other in part.line())
        if hedges >= _HEDGES or any(other.kind == "died" for other in part.line()):
            return False
        if not self.hedged and self.may_estimate:
            self.hedged = True
            self.prepare_at = (self.table.since + self.late_at) / 2
        # A row that is late on two workers may be slow on all: one worker stays free for others.
        may = hedges == 0 or len(missing) > 1 or idle > 1
        work = len(missing) / self.num_units
        if may and self.history.spend(work, 1 + _BURST / len(self.table.first)):
            return True
        self._set_due(part, self.table.now + self.threshold(len(part.units)))
        return False

    def _ask(self, missing: list[int], num: int, of: Part) -> None:
        why = "hedge" if of.outcome is OPEN else "retry"
        new = [self.unasked.popleft() for _ in range(min(len(self.unasked), len(missing)))]
        units = sorted(new + missing[len(new) :])
        again = why == "hedge" and any(other.why == "hedge" for other in of.line())
        for i in range(num):
            share = units[i * len(units) // num : (i + 1) * len(units) // num]
            # Calls that decide at the same time see the same idle workers.
            self.table.ask(share, of, why).spares = again and len(units) == 1

    def _cut(self, part: Part) -> int:
        """Return into how many parts to cut a failed part; 0 to give up its rows."""
        tries = part.tries
        if self.table.spare is not None:
            return int(tries < _TRIES)
        most = _TRIES if self.may_estimate else _TRIES_IF_EXACT
        alone = len(part.units) == 1
        refused = False
        if part.kind == "raised":
            if not alone:
                return _SPLIT
            alike = part.error and part.error.alike
            same = {p.worker for p in part.line() if p.error and p.error.alike == alike}
            refused = len(same) > 1
            good = any(p.worker != part.worker for p in self.table.good)
            opened = [p for p in self.table.parts if p.outcome is OPEN]
            # Others may work, whose units have not raised, or ended a worker.
            good |= any(not any(other.kind for other in p.line()) for p in opened)
            most = _TRIES_IF_EXACT if good else _TRIES
        elif part.worker < 0:  # no worker had it
            most = _TRIES
        else:
            died = part.kind == "died"
            chance = self._chance(part)
            # Where most parts fail, smaller parts would only lose more workers. But one part alone
            # cannot tell: it is cut once before all of its rows are given up.
            *_, first = part.line()
            whole = len(part.units) == len(first.units) and most > _TRIES
            cut = tries >= _TRIES and (whole or not died)
            cut |= tries >= most and bool(self.table.answered)  # some work: cut to the bad row
            if not alone and (chance <= _SUSPECT or cut):
                return _SPLIT
            refused = alone and died and tries >= 2 and chance <= _POISON
        if tries < most and not refused:
            return 1
        self.table.given_up.update(part.units)
        self.table.refused |= dict.fromkeys(part.units if refused else (), part)
        return 0

    def _chance(self, part: Part) -> float:
        """Return the probability that other rows would have failed as often."""
        # Parts that run for half as long as this one ran have not failed.
        since = self.table.now - part.seconds / 2
        line = {*part.line()}
        others = [
            p
            for p in self.table.parts
            if (p.outcome is GOOD or p.failed or (p.outcome is OPEN and p.began <= since))
            and p not in line
        ]
        ended = [(p.failed and p.kind != "raised") for p in others if p.kind != "raised"]
        return self.history.failure_rate(ended) ** sum(
            p.failed and p.kind != "raised" for p in line
        )

    def _end(self, reason: str) -> None:
        table = self.table
        if reason != "complete" and table.spare is None:
            self._refuse(reason)
        reason = "error" if reason == "failed" and self._reason() == "error" else reason
        if not self.waiting.at_once and not self.is_remembered:  # verification may let it go on
            self.is_remembered = True
            self._remember()
        budget = self.waiting.hedge_budget
        table.hedging_threshold = self.history.hedging_threshold(self.rows, budget)
        table.reason = reason

    def _refuse(self, reason: str) -> None:
        """Refuse rows that raised alone and no other worker can try, or three times in a row."""
        table = self.table
        failed = [part for part in self.table.parts if part.failed]
        working = {part.worker for part in table.good}
        if not working and reason != "failed" and any(part.kind != "raised" for part in failed):
            return
        for part in reversed(failed):
            works = part.worker in working and part.tries >= _TRIES
            lone = part.kind == "raised" and len(part.units) == 1
            lone = lone and part.units[0] not in table.answered
            if lone and (works or working <= {part.worker}):
                table.refused.setdefault(part.units[0], part)

    def _remember(self) -> None:
        table = self.table
        is_typical = True
        parts = list[tuple[int, float]]()
        failures = list[bool]()
        for part in table.parts:
            if part.began == math.inf:
                continue
            if part.fresh:
                is_typical = False
            else:
                seconds = part.seconds if part.outcome is GOOD else math.inf
                parts.append((table.unit_rows * len(part.units), seconds))
            ended = part.outcome is GOOD or (part.failed and part.kind != "raised")
            if ended and table.given_up.isdisjoint(part.units):
                failures.append(part.failed)
        # If calls that were cut short did not count as infinite, the median would not follow.
        is_complete = len(table.answered) >= table.needed
        took = table.now - table.since if is_complete else math.inf
        self.history.add(parts, (self.rows, took) if is_typical else None, failures)
