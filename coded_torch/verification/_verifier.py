"""The verification of one call: rows are computed again by others, and majorities judge."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from .._table import DISPUTED, DROPPED, FAILED, GOOD, OPEN, Part, Table, Units
from ._record import Record
from ._scores import Results
from ._untuned import DISPUTES, PATIENCE


class Verifier:
    """A policy of one call beside a waiting policy, which decides first: it verifies results.

    It lets the call end when it is done. A check is a part with rows of others. If two results of a
    row differ, other workers repeat both parts whole, as results may depend on the rows beside
    them: these parts are votes. A result that a majority contradicts is a part that failed, which
    the waiting policy asks for again. Its worker does not get its own rows again, but is checked by
    parts of others: an accident does not come again.

    Args:
        record: the record of the pool's workers.
        inputs: floating-point tensors, ``[B, ...]`` each, by which results are scored. Defaults to
            none.
        bounded: true if the call has to end at the deadline in the table. Defaults to False.

    The attributes from ``verified`` to ``notes`` are of :class:`coded_torch.Report`, sets of rows
    for tensors.
    """

    table: Table

    def __init__(
        self, record: Record, inputs: Sequence[Tensor] = (), bounded: bool = False
    ) -> None:
        self.record = record
        self._inputs = inputs
        self._bounded = bounded
        self._out = frozenset(record.excluded)
        self.verified = set[int]()
        self.unverified = set[int]()
        self.corrected = set[int]()
        self.faults = dict[int, int]()
        self.excluded = tuple[int, ...]()
        self.notes = dict[str, None]()
        self.credible = dict[int, Part]()  #: the answers of workers that are not doubted
        self.doubted = set[int]()  #: workers at fault, excluded, or in undecided disputes
        # rows to check, and not checked in time
        self.wanted = set[int]()
        self.missed = set[int]()
        self.disputes = dict[tuple[Part, Part], bool]()  #: two parts, and if it stays undecided
        self._undecided = set[tuple[Part, Part]]()  # votes told nothing of the first
        self._added = set[Part]()  # parts whose results have been good, and were added
        self._probes = dict[Part, int]()  # checks by workers at fault, and these workers
        self._first: dict[int, Part] | None = None  # what answered when the call might have ended
        self._is_drawn = False
        self._is_asked = False

    @functools.cached_property
    def is_scored(self) -> bool:
        """Whether results are scored, by a regression that takes time."""
        record = self.record
        return not record.stopped and (record.pool.simulated or record.scores.has_time)

    @functools.cached_property
    def results(self) -> Results:
        """The results so far; the regression that scores them, if any, is fitted at first use."""
        return Results(self.record.scores, self._inputs if self.is_scored else ())

    def begin(self, table: Table) -> None:
        """Draw rows to check of the parts that a table without parts will ask for first."""
        self.table = table
        # The call goes on until its checks are decided, and not only until it has its answers.
        table.holds = True
        idle = 0
        if max(map(len, table.first)) == 1:  # else it is not asked for, as looking takes time
            idle = table.idle()
        first, self.wanted, self._share = self.record.draw(table.first, idle)
        table.first = [*map(Units, first)]
        self._avoid()

    def decide(self, history: Any, table: Table) -> float:
        """Check rows and settle disputes once the other policy would end the call.

        Return when to decide again: -inf for at once, and inf for at the next event.
        """
        if not self._is_asked:
            self._is_asked = True
            # Workers get their parts after this decision. If results are scored, the next one comes
            # at once: it fits the regression while workers compute.
            return -math.inf if self.is_scored or table.reason else math.inf
        until = math.inf
        if self._add():
            until = -math.inf
        elif table.reason:
            until = self._verify(table.reason)
        elif self._first is not None:
            until = min(self._due(), default=math.inf)
        self._avoid()
        return until

    def _avoid(self) -> None:
        """Give no part to workers at fault, nor to excluded ones if the pool cannot exclude."""
        record = self.record
        excluded = record.excluded if record.pool.exclude is None else ()
        self.table.avoid = frozenset({*excluded, *self.faults})

    def _add(self) -> bool:
        """Add the good results, and drop the answers of workers at fault.

        Return whether an answer was dropped.
        """
        self.results.learnt_tolerance = self.record.tolerance
        good = self.table.good
        answered = self.table.answered
        # A worker that was excluded before the call, and that has a part, has been restarted.
        if renewed := self._out.intersection(map(attrgetter("worker"), good)):
            self.record.renew(renewed)
            self._out -= renewed
        # Another call may have excluded a worker meanwhile.
        out = self.faults.keys() | (self.record.excluded - self._out)
        is_dropped = False
        for part in good:
            counts = part not in self._probes or any(answered[u] is part for u in part.units)
            if part.worker in out and (counts or part.worker in self.record.excluded):
                self.doubted.add(part.worker)
                self.table.mark(part, DISPUTED)
                is_dropped = True
            elif part not in self._added:
                self._added.add(part)
                self.results.add(part)
        return is_dropped

    def _begin(self) -> None:
        """Note the answers at the time when the call could end, and which workers are new."""
        table = self.table
        late = self.table.hedging_threshold
        self._first = dict(table.answered)
        self._end = math.inf
        if self._bounded:
            self._end = table.since + table.deadline - table.reserve
        if late == math.inf:
            late = -math.inf
        self._soon = min(table.since + late, self._end)
        self._patience = PATIENCE * max(late, table.now - table.since) or math.inf
        # A new worker, unless the module is new to all, or another call has excluded it meanwhile.
        fresh = map(attrgetter("worker"), filter(attrgetter("fresh"), table.ended))
        if not all(map(attrgetter("fresh"), table.ended)):
            self.record.renew({*fresh} - (self.record.excluded - self._out))

    def _verify(self, reason: str) -> float:
        """Ask for checks and votes until none can decide any more, and let the call end then."""
        table = self.table
        record = self.record
        if self._first is None:
            self._begin()
        if not (self._is_drawn or table.is_quiet):
            return -math.inf  # results that arrived meanwhile count
        if reason in ("deadline", "error") or record.stopped or table.now >= self._end:
            return self._conclude()
        alike, disputes = self._compared()
        if not self._is_drawn and reason in ("complete", "failed"):
            lacking = self.wanted - alike.union(*disputes.values())
            is_late = table.now >= self._soon or table.is_over
            missed = set[int]()
            for part in table.parts if lacking else ():
                late = lacking.intersection(part.units)
                if late and part.outcome is not GOOD:
                    if part.outcome is OPEN and not is_late:
                        return self._soon
                    missed |= late
            self._is_drawn = True
            more = self._of_fresh() | self.results.odd(table.answered)
            self.wanted |= more
            # To ask for late checks again would delay the call. The rows stay unchecked.
            self.missed = missed - more
        self._due()
        if self._is_drawn:
            self._check(alike.union(*disputes.values()))
        busy = set[Part]()
        for (a, b), rows in disputes.items():
            if busy.isdisjoint((a, b)) and self._settle(a, b, rows):
                return -math.inf  # rows may be missing, or agree, now
            busy |= {a, b}
        due = self._due()
        return min(due) if due else self._conclude()

    def _due(self) -> list[float]:
        """Drop checks and votes that are late, and return the times at which the others will be."""
        due = []
        for part in self.table.parts:
            if part.verifies and part.outcome is OPEN:
                due.append(min(part.asked + self._patience, self._end))
                if self.table.now >= due[-1] or self.table.is_over:
                    self.table.mark(part, DROPPED)
                    due.pop()
        return due

    def _compared(self) -> tuple[set[int], dict[tuple[Part, Part], list[int]]]:
        """Return the rows that another worker computed alike, and the rows that differ.

        The key of rows that differ is two parts, the first of which is the answer.
        """
        self.results.doubt(self.doubted)
        answered = self.table.answered
        pairs = dict[tuple[Part, Part], None]()
        for other in self.table.good:
            for part in dict.fromkeys(map(answered.__getitem__, other.units)):
                is_whole = part.units == other.units or not self.record.whole
                if part.worker != other.worker and is_whole:
                    pairs[part, other] = None
        tolerance = self.results.tolerance
        alike = set[int]()
        disputes = dict[tuple[Part, Part], list[int]]()
        for pair, by in zip(pairs, self.results.differences(pairs), strict=True):
            for row in by:
                if answered[row] is not pair[0]:
                    continue
                if by[row] <= tolerance:
                    if not self.doubted >= {pair[0].worker, pair[1].worker}:
                        alike.add(row)
                elif not self.disputes.get(pair):
                    disputes.setdefault(pair, []).append(row)
        return alike, disputes

    def _difference(self, part: Part, other: Part, rows: Iterable[int]) -> float:
        (by,) = self.results.differences([(part, other)])
        return max(by[row] for row in rows)

    def _agree(self, part: Part, other: Part, rows: Iterable[int]) -> bool:
        return self._difference(part, other, rows) <= self.results.tolerance

    # The checks.

    def _of_fresh(self) -> set[int]:
        """Draw more rows of workers in their trial period, of which a larger share is checked."""
        record = self.record
        more = self.record.often - self._share
        fresh = {*filter(record.fresh, record.workers)}
        answers = self.table.answered.items()
        if not fresh or more <= 0 or record.whole:
            return set()
        rows = [row for row, part in answers if part.worker in fresh and row not in self.wanted]
        return {*record.sample(rows, more / (1 - self._share))}

    def _check(self, done: set[int]) -> None:
        """Have the wanted rows computed by others."""
        table = self.table
        able = self.record.workers - self.faults.keys()
        groups = defaultdict[tuple[int, tuple[int, ...]], list[int]](list)
        asked = defaultdict[int, list[Part]](list)
        most = len(self.record.everyone)
        for part in table.parts:
            for row in part.units if part.why == "check" else ():
                asked[row].append(part)
        for row in sorted((self.wanted & table.answered.keys()) - done - self.missed):
            # A row that all workers fail to check, such as alone, is not asked for again and again.
            if len(asked[row]) < most and all(part.outcome is DISPUTED for part in asked[row]):
                part = table.answered[row]
                groups[part.worker, part.units if self.record.whole else ()].append(row)
        for (worker, units), rows in groups.items():
            units = units or tuple(rows)
            seen = {p.worker for p in table.parts if not {*units}.isdisjoint(p.units)}
            table.ask(units, why="check", avoid=seen if able - seen else {worker})

    # The disputes.

    def _settle(self, a: Part, b: Part, rows: list[int]) -> bool:
        """Settle a dispute, or ask for votes. Return whether it is settled."""
        self.disputes.setdefault((a, b), False)
        outcomes = [FAILED]
        if len(self.record.workers) > 2 and len(self.disputes) <= DISPUTES + len(self._probes):
            outcomes = [self._judge(b, a, rows)]
            if b not in self._probes or outcomes[0] in (GOOD, FAILED):
                outcomes.append(self._judge(a, b, rows))
        if DISPUTED in outcomes:
            for part, outcome in zip((b, a), outcomes, strict=False):
                out = self.faults.keys() | {part.worker}
                if outcome is DISPUTED and len(out) <= len(self.record.workers - out):
                    self._fault(part)
                elif outcome is DISPUTED:  # others would not be enough, so the module is to blame
                    self.record.undecided(3)
                    self._doubt(a, b, rows)
        elif OPEN in outcomes:
            return False
        elif FAILED in outcomes or a.units == b.units:
            self._doubt(a, b, rows)
        else:  # both are confirmed, so results depend on the rows beside them
            self.notes[self.record.learn(self._difference(a, b, rows))] = None
        return True

    def _judge(self, part: Part, other: Part, rows: list[int]) -> str:
        """Return the outcome of a part by votes; OPEN if votes lack, FAILED without a majority."""
        table = self.table
        record = self.record
        votes = [p for p in table.parts if p.why == "vote" and p.units == part.units]
        good = [p for p in votes if p.outcome is GOOD]
        good = [p for p in good if p.worker not in (part.worker, other.worker)]
        voices = [part, other, *good]
        camps = [[q for q in voices if self._agree(p, q, rows)] for p in voices]
        most = max(camps, key=len)
        # With two results of five workers, a colluding pair would convict others.
        majority = 3 if len(record.workers) >= 5 else 2
        if len(most) >= majority:
            return GOOD if part in most else DISPUTED
        lacking = majority - len(most) - sum(p.outcome is OPEN for p in votes)
        heard = {part.worker, other.worker}.union(*(record.everyone - p.avoid for p in votes))
        able = record.workers - heard - self.faults.keys()
        late = {p.worker for p in table.parts if p.replaced and p.outcome is OPEN}
        others = sorted(able - late or able)  # a worker that hangs would hang at the vote, too
        may_ask = len(votes) < len(record.everyone) and len(good) < 2 * majority - 1
        if may_ask and lacking > 0 and others:
            for juror in record.random.sample(others, min(lacking, len(others))):
                table.ask(part.units, None, "vote", record.everyone - {juror})
        elif lacking == majority - len(most):  # none is open
            if (part, other) not in self._undecided:
                self._undecided.add((part, other))
                record.undecided(3 if len(most) == 1 < len(good) else min(1, len(good)))
            return FAILED
        return OPEN

    def _doubt(self, a: Part, b: Part, rows: Iterable[int]) -> None:
        self.disputes[a, b] = True
        self.unverified.update(rows)
        self.doubted |= {a.worker, b.worker}

    def _fault(self, part: Part) -> None:
        """Note a wrong result: no answer of its worker in this call counts any more."""
        worker = part.worker
        self.faults[worker] = self.faults.get(worker, 0) + 1
        self.doubted.add(worker)
        self.table.mark(part, DISPUTED)
        probes = [probe for probe, other in self._probes.items() if other == worker]
        waiting = [probe for probe in probes if probe.outcome is OPEN]
        if self.record.add_fault(worker, len(probes) - len(waiting)):
            self.excluded += (worker,)
            for probe in waiting:
                self.table.mark(probe, DROPPED)
        elif not waiting and 2 * len(self.faults) + 2 <= len(self.record.workers):
            self._probe(worker)  # the others are enough to find a fault of theirs, too

    def _probe(self, worker: int) -> None:
        """Have a worker at fault compute rows of others that it has not seen, a part per fault."""
        table = self.table
        probes = self._probes
        unasked = self.faults[worker]  # a probe per fault
        seen = {u for p in table.parts if worker in (p.worker, probes.get(p)) for u in p.units}
        candidates = list({part.units for part in table.answered.values()})
        self.record.random.shuffle(candidates)
        for units in sorted(candidates, key=lambda units: len(seen.intersection(units))):
            unseen = [unit for unit in units if unit not in seen]
            if unasked and unseen and (len(unseen) == len(units) or not self.record.whole):
                probe = table.ask(unseen, why="check")
                probe.avoid = frozenset(self.record.everyone - {worker})
                probes[probe] = worker
                unasked -= 1
                seen.update(unseen)

    def _conclude(self) -> float:
        """Note which rows are verified, and let the call end."""
        answered = self.table.answered
        for (a, b), rows in self._compared()[1].items():  # no time, or verification has stopped
            self._doubt(a, b, rows)
        alike, _ = self._compared()  # two workers that are doubted may agree
        self.credible = {u: part for u, part in answered.items() if part.worker not in self.doubted}
        doubtful = self.wanted | (answered.keys() - self.credible.keys())
        if self.record.stopped:
            doubtful = {*answered}
        self.unverified = (self.unverified | (doubtful - alike)) & answered.keys()
        self.verified = alike - self.unverified
        clean = Counter[int]()
        checks = Counter[int]()
        for part in self._added:  # but of votes, which others seldom contradict
            confirmed = self.verified.intersection(part.units)
            if confirmed and part.why != "vote":
                checks[part.worker] += 1
                clean[part.worker] += len(confirmed) * (part.worker not in self.doubted)
        self.record.passed(clean, checks)
        self.corrected = {
            row
            for row, part in (self._first or {}).items()
            if part.outcome is DISPUTED and row in answered
            if not self._agree(part, answered[row], [row])
        }
        if self.record.stopped:
            self.notes[f"not verified any more: {self.record.stopped}"] = None
        self.results.conclude(self.credible, None if self.doubted else self.unverified)
        self.table.holds = False
        return -math.inf
