"""The waiting policy: when a call hedges, how it treats failed parts, and when it ends.

A row is *refused*, and not asked for again in this call, if the module fails on it. A row that
fails on one broken worker only is given up, but not refused: it is missing.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import statistics
from collections import deque
from collections.abc import Sequence

from .._arguments import count, instance, real, shown
from .._table import DROPPED, GOOD, OPEN, Part, Table
from ._latency_history import History
from ._untuned import SOONEST_IF_NEW

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
# A part is late beyond three standard deviations of a lognormal body (99.9 %), whose lower half
# stragglers do not touch: 3 / 0.6745 = 4.45 in powers of median / lower quartile. At least 1.5
# medians, which trades work on calm workers against latency (1.2 to 2 in benchmarks/waiting.py). At
# most 8 medians, which .4 % of exponential latencies exceed: where a third of the workers are ten
# times as fast as the others, the quartile is that fast, and no part would be late. Where the body
# is wide, that tail comes after the hedges that the budget allows (benchmarks/fleet.py). Without
# the power, p99 is 1.1 times as long where workers are slow for a fifth of the time; 1.5 medians
# alone make it 1.4 times as long where the body is wide (simulated once; no benchmark keeps it).
_SPREAD_EXPONENT = 4.45
_LEAST_MEDIANS = 1.5
_MOST_MEDIANS = 8.0
# Seconds before which no part is late, once parts have replied: threads of a busy machine are held
# up for longer, so a hedge brings nothing and costs .1 ms (benchmarks against, "calls, 4 x 40 B").
_SOONEST = 2e-3
_NEVER = 1e9  # seconds until a part is late that is never hedged; less than infinity, by which each
# event of a call has to be decided on


def hedging_threshold(history: History, rows: int, budget: float = 0.0) -> float:
    r"""Return the seconds after which a part of so many rows is late.

    With the median m and the lower quartile q of the times of parts, it is the smaller of
    :math:`m (m / q)^{4.45}` and their quantile 1 - ``budget``, kept between 1.5 m and 8 m, and
    never below 2 ms. It is infinite until 32 parts have replied.
    """
    shares = (0.5, 0.25, max(0.0, 1.0 - budget))
    median, quartile, spent = history.quantiles(rows, shares)
    most = _MOST_MEDIANS
    if quartile > 0 and median < math.inf:
        most = min(most, (median / quartile) ** _SPREAD_EXPONENT)
    threshold = max(_LEAST_MEDIANS * median, min(most * median, spent))
    return max(_SOONEST, threshold)


def _threshold_if_new(history: History, table: Table, units: int) -> float:
    """Return the threshold that holds until 32 parts have replied, from the replies so far."""
    median = history.part(units * table.unit_rows, least=1)
    if median == math.inf:
        good = [part.seconds * max(1.0, units / len(part.units)) for part in table.good]
        median = statistics.median_high(good) if good else math.inf
    return max(SOONEST_IF_NEW, _MOST_MEDIANS * median)


@dataclasses.dataclass(frozen=True, repr=False)
class Waiting:
    r"""A policy that asks for each part once, hedges late parts, and decides about missing rows.

    By rows, a row is estimated only if the caller asked for it: by a deadline, a number
    ``estimate_after``, or ``on_error="estimate"``. Otherwise every answer is computed, or the call
    raises :class:`~coded_torch.codes.NotEnoughResults` with the rows that nobody could compute.

    - A part is late when its running time exceeds the hedging threshold
      (:func:`~coded_torch.scheduling.policy.hedging_threshold`). It is hedged at most three times.
      Until 32 parts have replied, a part is late at half of the deadline. If there is no deadline
      and no row may be estimated, a part is late after eight times the median duration of a part,
      and after at least 2 s.
    - A part that failed is asked again at once, in smaller parts, until the rows that fail stand
      alone. If a row raises alike on two workers, the module fails on it.
    - The call answers or raises at its deadline. If half of the results are there, missing rows are
      estimated in time. Otherwise a surrogate answers, if this or an earlier call had a result,
      or else the call raises :class:`~coded_torch.codes.DeadlineExceeded`.

    The guide on waiting has more rules. Instances are immutable. :meth:`first` is the paper's.

    Example:
        >>> from coded_torch import Waiting
        >>> Waiting(deadline=0.05)
        Waiting(deadline=0.05)
        >>> Waiting.first(2)
        Waiting.first(num_stragglers=2)
    """

    #: Seconds from the call to its answer, positive. The time of a surrogate or of a callable
    #: metric is not bounded. Defaults to None, no deadline.
    deadline: float | None = None
    #: Without a deadline, the number of median calls after which missing rows are estimated, once
    #: half of the results are there; positive. With infinity, rows are estimated when no more
    #: results can come. Defaults to None: never by rows, 3 with a code.
    estimate_after: float | None = None
    #: The work that hedges of late parts may take, as a share of all work, at least 0. Unused work
    #: is saved, up to 20 parts and one whole call. A larger budget hedges earlier where latencies
    #: vary widely. At 0 only failed parts are asked again. Defaults to 0.25.
    hedge_budget: float = 0.25
    #: Whether rows may be estimated at all, even at a deadline. Must be True with codes that mix
    #: inputs. Defaults to True.
    estimate: bool = True
    #: The end of a call by rows if the module fails on a row. "raise" computes the other rows and
    #: raises the module's exception, with ``rows``, ``answers`` and ``report``. "estimate"
    #: estimates such a row, and any other that nobody could compute. Defaults to "raise".
    on_error: str = "raise"
    #: Set by :meth:`first`, as ``num_stragglers`` is: the call ends with the first results.
    at_once: bool = dataclasses.field(default=False, kw_only=True)
    num_stragglers: int | None = dataclasses.field(default=None, kw_only=True)
    #: The most rows of a part that, if it is late or has ended its worker, is asked for again only
    #: while a further worker is idle, and is hedged once, by one worker. Set by servers, so that
    #: rows that hang or end any worker leave others. Defaults to 0.
    spares: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for argument, requirement, valid in (
            ("deadline", "a positive and finite number of seconds", lambda x: 0 < x < math.inf),
            ("estimate_after", "positive", lambda x: x > 0),
            ("hedge_budget", "at least 0 and finite", lambda x: 0 <= x < math.inf),
        ):
            value = getattr(self, argument)
            if value is not None or argument == "hedge_budget":
                object.__setattr__(
                    self, argument, real("Waiting", argument, value, requirement, valid)
                )
        for argument in ("estimate", "at_once"):
            instance("Waiting", argument, getattr(self, argument), bool)
        count("Waiting", "spares", self.spares, least=0)
        instance("Waiting", "on_error", self.on_error, str)
        if self.on_error not in ("raise", "estimate"):
            raise ValueError(
                f"Waiting: on_error must be 'raise' or 'estimate', got {shown(self.on_error)}"
            )
        if self.num_stragglers is not None:
            count("Waiting.first", "num_stragglers", self.num_stragglers, least=0)

    def may_estimate(self, by_rows: bool) -> bool:
        """Return whether answers may be estimated: by rows, only if the caller asked for it."""
        is_asked = (self.deadline, self.estimate_after, self.on_error) != (None, None, "raise")
        return self.estimate and (is_asked or not by_rows)

    def _least(self, needed: int, decodable: int, by_rows: bool) -> int:
        """Return how many results suffice for an answer, if all are ``needed`` to complete it."""
        if self.at_once:
            return decodable
        if self.may_estimate(by_rows):
            return max(decodable, -(-needed // 2))
        return needed

    def decide(self, history: History, table: Table) -> float:
        """Write the parts to ask for into the table of a call, and return when to decide again.

        The history is of the same module on the same pool.
        """
        if table.policy is None:
            table.policy = _Decisions(self, history, table)
        return float(table.policy.decide())

    @staticmethod
    def first(num_stragglers: int | None = None, *, deadline: float | None = None) -> Waiting:
        """Return a policy that asks all N columns at once and takes the first N - S good results.

        Args:
            num_stragglers: S, at least 0. Defaults to the number that the delay distribution of the
                pool loses, or 0.
            deadline: seconds from the call, positive, after which the results that arrived are
                decoded, if the code can. Defaults to None, no deadline.
        """
        return Waiting(deadline, math.inf, 0.0, at_once=True, num_stragglers=num_stragglers)

    def __repr__(self) -> str:
        names = ["deadline", "num_stragglers"]
        if not self.at_once:
            names = [*vars(self)]
        values = {name: getattr(self, name) for name in names}
        changed = [f"{x}={v!r}" for x, v in values.items() if v != getattr(type(self), x)]
        return f"Waiting{'.first' if self.at_once else ''}({', '.join(changed)})"


class _Decisions:
    """Decides which parts a call asks for, and when the call ends. The table holds both."""

    def __init__(self, waiting: Waiting, history: History, table: Table) -> None:
        self.waiting = waiting
        self.history = history
        self.table = table
        by_rows = table.spare is None
        budget = waiting.hedge_budget
        self.may_estimate = waiting.may_estimate(by_rows)
        self.least = waiting._least(table.needed, table.least, by_rows)
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
        self.thresholds: dict[int, float] = {}  # by units, as they were when first asked for
        self.new_thresholds: dict[int, float] = {}  # the same until 32 parts have replied
        self.is_unknown = history.part(1, least=1) == math.inf  # how long any part takes
        table.late = math.inf
        if waiting.at_once:
            table.late = _NEVER
        elif budget:
            table.late = self.threshold(min(map(len, table.first)))
        history.earn(budget)
        table.ask_first()

    def decide(self) -> float:
        """Decide, and return when to decide again if nothing happens."""
        table = self.table
        raised = False
        if self.is_unknown and 2 * table.num_good >= self.num_units:
            self.is_unknown = False
            table.changed += [p for p in table.parts if p.outcome is OPEN and p.began < math.inf]
        for part in table.changed:
            if part.outcome is OPEN and self.waiting.hedge_budget:
                if not part.verifies:
                    self._set_due(part, part.began + self.threshold(len(part.units)))
            elif part.outcome is not OPEN and part.outcome is not GOOD:
                self.to_replace[part.number] = part
                raised |= part.kind == "raised"
        if raised and not table.num_answered:
            self._blame()
        table.changed.clear()
        reason = self._reason()
        if not reason and table.is_over:
            reason = "failed"
        elif not reason:
            if table.has_later:
                self._drop()
            self._replace()
            reason = self._reason() or ("" if table.open else "failed")
            if table.now >= self.prepare_at:  # but the call must not end later for it
                self.prepare_at = math.inf
                table.prepares = table.now + table.reserve <= self.late_at
        if reason:
            table.reason = self._end(reason)
            return math.inf
        table.reason = ""
        return self._until()

    def threshold(self, units: int) -> float:
        """Return the seconds after which a part of so many units is late."""
        if units not in self.thresholds:
            rows = units * self.table.unit_rows
            budget = self.waiting.hedge_budget
            self.thresholds[units] = hedging_threshold(self.history, rows, budget)
        known = self.thresholds[units]
        if known < math.inf:
            return known
        if self.waiting.deadline is not None:
            return self.waiting.deadline / 2
        if self.is_unknown or self.may_estimate:
            return math.inf
        if units not in self.new_thresholds:
            self.new_thresholds[units] = _threshold_if_new(self.history, self.table, units)
        return self.new_thresholds[units]

    def _reason(self) -> str:
        """Return why the call ends now, "" if it does not."""
        table = self.table
        if table.num_answered >= table.needed:
            is_first = self.waiting.at_once and table.num_answered < len(table.first)
            return "enough_results" if is_first else "complete"
        if table.refused and len(table.answered.keys() | table.refused.keys()) >= table.needed:
            return "error"  # the module itself fails on all missing rows
        how = "deadline" if self.waiting.deadline is not None else "estimate_after"
        is_late = table.heard >= self.late_at and table.num_answered >= self.least
        if is_late or (table.heard >= self.end and how == "deadline"):
            return how
        return ""

    def _until(self) -> float:
        """Return the time of the next part that is late, or of the next step to the deadline."""
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
        if self.waiting.deadline is None:
            return due
        return min(due, self.end)

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
            lacking = table.needed - table.num_answered
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
            num = 1
            if late and part.of is None and len(missing) > self.waiting.spares:
                num = self.history.num_hedges(rows, most)
            if part.failed:
                num = self._cut(part)
            num = min(num, len(missing))
            if num:
                idle -= num
                if table.spare is not None:
                    lacking -= len(missing)
                if num > 1 and part.kind == "raised" and not table.num_answered:
                    self._ask([missing.pop(0)], 1, part)  # does the module fail on all?
                    num -= 1
                self._ask(missing, num, part)

    def _may_hedge(self, part: Part, missing: Sequence[int], idle: int) -> bool:
        """Return whether to hedge a late part now. If it may be hedged later, set the next try."""
        # A copy of a part that ended a worker would end another worker, too.
        hedges = sum(other.why == "hedge" for other in part.line())
        if hedges >= _HEDGES or any(other.kind == "died" for other in part.line()):
            return False
        if hedges and len(part.units) <= self.waiting.spares:
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
        """Ask for missing units, or for spare columns in their place, in ``num`` parts."""
        why = "hedge" if of.outcome is OPEN else "retry"
        new = [self.unasked.popleft() for _ in range(min(len(self.unasked), len(missing)))]
        units = sorted(new + missing[len(new) :])
        spares = 0  # the most rows of a part that spares a worker
        if why == "hedge" or of.kind == "died":
            spares = self.waiting.spares
        if why == "hedge" and any(other.why == "hedge" for other in of.line()):
            spares = max(1, spares)
        for i in range(num):
            share = units[i * len(units) // num : (i + 1) * len(units) // num]
            # Calls that decide at the same time see the same idle workers.
            self.table.ask(share, of, why).spares = len(units) <= spares

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
            cut |= tries >= most and self.table.num_answered > 0  # some work: cut to the bad row
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

    def _end(self, reason: str) -> str:
        """Prepare the end of the call for a reason, and return the reason or "error" instead."""
        table = self.table
        if reason != "complete" and table.spare is None:
            self._refuse(reason)
        if reason == "failed" and self._reason() == "error":
            reason = "error"
        if not self.waiting.at_once and not self.is_remembered:  # verification may let it go on
            self.is_remembered = True
            self._remember()
        budget = self.waiting.hedge_budget
        table.hedging_threshold = hedging_threshold(self.history, self.rows, budget)
        return reason

    def _refuse(self, reason: str) -> None:
        """Refuse rows that raised alone three times, or that no other worker can try."""
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
        """Add the seconds of the call and of its parts to the history."""
        table = self.table
        is_typical = True
        parts = list[tuple[int, float]]()
        failures = [False] * len(table.times)
        for units, (_, began, ended) in zip(table.first, table.times, strict=False):
            parts.append((table.unit_rows * len(units), ended - began))
        for part in table.parts if not parts else ():
            if part.began == math.inf:
                continue
            if part.fresh:
                is_typical = False
            else:
                seconds = math.inf
                if part.outcome is GOOD:
                    seconds = part.seconds
                parts.append((table.unit_rows * len(part.units), seconds))
            ended = part.outcome is GOOD or (part.failed and part.kind != "raised")
            if ended and not (table.given_up and table.given_up.intersection(part.units)):
                failures.append(part.failed)
        # If calls that were cut short did not count as infinite, the median would not follow.
        is_complete = table.num_answered >= table.needed
        took = math.inf
        if is_complete:
            took = table.now - table.since
        self.history.add(parts, (self.rows, took) if is_typical else None, failures)
