"""The checks and trials of one call: which rows are computed again, and whose result counts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..table import DISPUTED, DROPPED, GOOD, OPEN, Part, Table
from .record import LEARNABLE, Record
from .scores import Results

# Bounds of one call, not tuned.
_ALARMS = 4  # rounds after a fault, in each of which the oddest row of every worker is checked
_TRIALS = 8  # more disputes than faulty workers explain stay undecided
_TRIES = 3  # times that the rows of an excluded worker are asked for
# A part of a trial is waited for as many times as long as a first part until it is late, or as all
# of the call so far: a worker that hangs when it is asked again must not hold the call.
_PATIENCE = 4

_Request: TypeAlias = tuple[tuple[int, ...], set[int]]  # rows, and who must not compute them
_Doing: TypeAlias = Generator[float, None, None]


class Trials:
    """The waiting policy of one call, after which results are verified until there is a verdict.

    Args:
        record: the record of the pool's workers.
        waiting: the policy that is followed first.
        inputs: floating-point tensors, ``[B, ...]`` each, by which results are scored.

    The attributes from ``verified`` to ``notes`` are of :class:`coded_torch.Report`, sets of rows
    for tensors.
    """

    results: Results
    table: Table

    def __init__(self, record: Record, waiting: Any = None, inputs: Sequence[Tensor] = ()) -> None:
        self.record, self.waiting, self._inputs = record, waiting, inputs
        self._out = frozenset(record.excluded)
        self.verified, self.unverified, self.corrected = set[int](), set[int](), set[int]()
        self.disputes, self.faults, self.excluded = 0, dict[int, int](), tuple[int, ...]()
        self.notes = tuple[str, ...]()
        self.answers = dict[int, int]()  #: the number of the part that answers a row, if there is
        self.owners = dict[int, int]()  #: the worker that computed the answer, if it is not doubted
        self.doubted = set[int]()  #: workers at fault, excluded, or in undecided disputes
        self.wanted, self.missed = set[int](), set[int]()  # rows to check, and not checked in time
        self.void = list[Part]()  # parts whose results were good, and do not count
        self.undecided = set[tuple[int, int]]()  # the numbers of two parts that differ
        self._added = set[int]()  # the numbers of parts whose results have been added
        self.steps: _Doing | None = None  #: the decisions to come, which hold the call

    def prepare(self) -> None:
        """Fit the regression that scores results, while workers compute."""
        self.results = Results(self.record.scores, () if self.record.stopped else self._inputs)

    def decide(self, history: Any, table: Table) -> float:
        """Decide as the policy does, and then check and try."""
        if self.steps is None:
            self.steps = self._decisions(history, table)
        # A pool that cannot exclude workers is told to avoid them.
        table.avoid = frozenset(self.record.excluded if self.record.pool.exclude is None else ())
        return next(self.steps, -math.inf)

    def _decisions(self, history: Any, table: Table) -> _Doing:
        record, self.table = self.record, table
        table.first, rows, self._share = record.draw(table.first, table.idle())
        self.wanted = self.wanted | rows
        self.waiting.decide(history, table)
        yield -math.inf  # the parts are asked for
        self.prepare()
        while True:
            self._add()
            until = self.waiting.decide(history, table)
            if table.reason:
                break
            yield until
        reason, table.reason = table.reason, ""
        yield from self._wait(table.parts, -math.inf)  # results that arrived meanwhile count
        late, since = table.hedging_threshold, table.since
        late = late if late < math.inf else -math.inf
        checks = reason in ("complete", "failed")
        self.until = since + table.deadline - table.reserve if checks else -math.inf
        bounded = self.waiting.deadline is not None or reason == "error"
        self.end = self.until if bounded else math.inf
        self.patience = _PATIENCE * max(late, table.now - since) or math.inf  # clocks may stand
        before = dict(table.answered)
        # A worker that was excluded before the call, and that has a part, has been restarted.
        renewed = {part.worker for part in table.ended if part.fresh}
        record.renew(renewed.union(self._out & {part.worker for part in table.good}))
        if not record.stopped:
            yield from self._find(since + late)
        self._conclude(before)
        if reason == "complete" and table.answered.keys() != before.keys():
            reason = "deadline" if table.now >= self.end else "failed"
        table.reason = reason

    def _add(self) -> None:
        """Add the results that are good now, and let none count that is void, or aside."""
        for part in self.table.good:
            if part.number not in self._added:
                self._added.add(part.number)
                divided = part.result.divided if part.result is not None else ()
                leaves = [part.result.rows(i) for i in divided]
                self.results.add(part.number, part.units, leaves)
            if part.why == "aside" or part in self.void:
                self.table.mark(part, DISPUTED)

    def _wait(self, parts: Iterable[Part], until: float) -> Generator[float, None, list[Part]]:
        """Wait for parts, and return the parts that have not ended."""
        while late := [part for part in parts if part.outcome is OPEN]:
            yield until
            self._add()
            if self.table.is_quiet:
                break
        return late

    def _void(self, parts: Iterable[Part]) -> None:
        """Let results no longer count."""
        for part in [part for part in parts if part.outcome is GOOD]:
            self.void.append(part)
            self.table.mark(part, DISPUTED)

    def _find(self, soon: float) -> _Doing:
        """Check rows, and settle disputes. Checks in parts of the first ask may come until soon."""
        record, table = self.record, self.table
        for worker in record.excluded & {part.worker for part in table.good}:
            yield from self._expel(worker)  # another call excluded it meanwhile
        if self.until > table.now:
            lacking = self.wanted - self._compared()[0]
            late = [p for p in table.parts if not lacking.isdisjoint(p.units)]
            yield from self._wait(late, min(soon, self.until))
            # A drawn row whose check is late stays unchecked: to ask again would delay the call.
            self.missed = lacking & {r for p in late if p.outcome is not GOOD for r in p.units}
            answers = {row: part.number for row, part in table.answered.items()}
            more = self._of_fresh() | self.results.odd(answers)
            self.wanted |= more
            self.missed -= more
        yield from self._check()
        for _ in range(_ALARMS):
            before = sum(self.faults.values())
            while not record.stopped and (disputes := self._compared()[1]):
                self.disputes += 1
                (a, b), rows = disputes.popitem()
                possible = len(record.workers) > 2 and self.disputes <= _TRIALS
                if not (possible and (yield from self._trial(a, b, rows))):
                    self._doubt(a, b, rows)
            if record.stopped or before == sum(self.faults.values()):
                break
            self.wanted |= self._oddest()
            yield from self._check()  # checks by a worker that is out, too

    def _compared(self) -> tuple[set[int], dict[tuple[Part, Part], list[int]]]:
        """Return the rows that another worker computed alike, and the rows that differ.

        The key of rows that differ is two parts, the first of which is the answer.
        """
        answered, pairs = self.table.answered, dict[tuple[Part, Part], None]()
        for other in self.table.good:
            for part in dict.fromkeys([answered[row] for row in other.units]):
                is_whole = part.units == other.units or not self.record.whole
                if part.worker != other.worker and is_whole:
                    pairs[part, other] = None
        alike, disputes = set[int](), dict[tuple[Part, Part], list[int]]()
        numbers = [(part.number, other.number) for part, other in pairs]
        for pair, both, by in zip(pairs, numbers, self.results.differences(numbers), strict=True):
            for row in by:
                if answered[row] is not pair[0]:
                    continue
                if by[row] <= self._tolerance():
                    alike.add(row)
                elif both not in self.undecided:
                    disputes.setdefault(pair, []).append(row)
        return alike, disputes

    def _tolerance(self) -> float:
        return max(self.record.tolerance, self.results.tolerance)

    def _difference(self, part: Part, other: Part, rows: Iterable[int]) -> float:
        (by,) = self.results.differences([(part.number, other.number)])
        return max(by[row] for row in rows)

    def _agree(self, part: Part, other: Part, rows: Iterable[int]) -> bool:
        return self._difference(part, other, rows) <= self._tolerance()

    # The checks.

    def _by_worker(self, rows: Iterable[int]) -> dict[int, list[int]]:
        by = defaultdict[int, list[int]](list)
        for row in rows:
            by[self.table.answered[row].worker].append(row)
        return by

    def _of_fresh(self) -> set[int]:
        """Draw more rows of the workers in their trial period, if not all are."""
        record, more = self.record, self.record.often - self._share
        if more <= 0 or record.whole:
            return set()
        by_worker = self._by_worker(self.table.answered).items()
        some = [sorted(set(rows) - self.wanted) for w, rows in by_worker if record.fresh(w)]
        return {row for rows in some for row in record.sample(rows, more)}

    def _oddest(self) -> set[int]:
        """Return the oddest row of every worker that is not checked yet."""
        answers = {row: part.number for row, part in self.table.answered.items()}
        scores, done = self.results.scores(answers), self._compared()[0] | self.wanted
        by_worker = self._by_worker(row for row in scores if row not in done).items()
        return {max(rows, key=scores.__getitem__) for w, rows in by_worker if w not in self.faults}

    def _check(self) -> _Doing:
        """Have the wanted rows computed by others."""
        answered, (alike, disputes) = self.table.answered, self._compared()
        some = self.wanted - alike.union(*disputes.values()) - self.missed & answered.keys()
        requests = [((*sorted(rows),), {w}) for w, rows in self._by_worker(some).items()]
        if self.record.whole:
            parts = dict.fromkeys([answered[row] for row in some])
            requests = [(part.units, {part.worker}) for part in parts]
        yield from self._ask(requests, min(self.until, self.table.now + self.patience), "check")

    def _ask(
        self, requests: Sequence[_Request], until: float | None = None, why: str = "vote"
    ) -> Generator[float, None, list[Part | None]]:
        """Have parts computed; return each, None if it has no good result.

        By default they are waited for as votes are. Results "aside" do not count.
        """
        table = self.table
        until = min(self.end, table.now + self.patience) if until is None else until
        if not requests or until <= table.now:
            return [None] * len(requests)
        out = self.record.excluded
        parts = [table.ask(rows, why=why, avoid=some | out) for rows, some in requests]
        for part in (yield from self._wait(parts, until)):
            table.mark(part, DROPPED)
        good = DISPUTED if why == "aside" else GOOD
        return [p if p.outcome is good and p.number in self._added else None for p in parts]

    # The trials.

    def _doubt(self, a: Part, b: Part, rows: Iterable[int]) -> None:
        self.undecided.add((a.number, b.number))
        self.unverified.update(rows)
        self.doubted |= {a.worker, b.worker}

    def _trial(self, a: Part, b: Part, rows: list[int]) -> Generator[float, None, bool]:
        """Have others compute two parts exactly as they were asked; return whether it decided.

        If both parts are confirmed, results depend on the rows beside them.
        """
        record, heard = self.record, {a.worker, b.worker}
        # With two votes of five workers, a colluding pair would convict others.
        need = min(2 if len(record.workers) >= 5 else 1, len(record.workers - heard))
        parts = (a,) if a.units == b.units else (a, b)
        everyone, many = record.everyone, len(parts)
        votes = defaultdict[str, list[tuple[Part, Part]]](list)
        while (lacking := need - max(len(votes["a"]), len(votes["b"]))) > 0:
            others = sorted(record.workers - heard)
            if not others or len(votes["both"]) > 1 or len(votes["neither"]) > need:
                break
            some = record.random.sample(others, min(lacking, len(others)))
            heard.update(some)
            replies = yield from self._ask(
                [(part.units, everyone - {other}) for other in some for part in parts]
            )
            for p, q in zip(replies[::many], replies[many - 1 :: many], strict=True):
                if p is not None and q is not None:
                    votes[self._vote(p, q, a, b, rows)].append((p, q))
        both, neither = votes["both"], votes["neither"]
        if len(both) > 1 or (both and not (others or neither or votes["a"] or votes["b"])):
            self._note(record.learn(self._difference(a, b, rows)))
        elif any(not self._agree(neither[0][0], p, rows) for p, _ in neither[1:]):
            record.undecided(5)
            return False
        elif len(neither) > need:
            yield from self._sentence(a, neither[0][0], rows)
            yield from self._sentence(b, neither[0][1], rows)
        elif len(votes["b"]) >= need > len(votes["a"]):
            yield from self._sentence(a, votes["b"][0][0], rows)
        elif len(votes["a"]) >= need > len(votes["b"]):
            yield from self._sentence(b, votes["a"][0][1], rows)
        else:
            if sum(map(len, votes.values())) == len(heard) - 2:  # all have answered
                record.undecided()
            return False
        return True

    def _vote(self, p: Part, q: Part, a: Part, b: Part, rows: list[int]) -> str:
        """Return which results another worker confirms by its own, p of part a and q of part b."""
        for_a, for_b = self._agree(p, a, rows), self._agree(q, b, rows)
        if for_a and for_b:
            return "both"
        if for_b and self._agree(p, b, rows):
            return "b"
        return "a" if for_a and self._agree(q, a, rows) else "neither"

    def _sentence(self, part: Part, truth: Part, rows: list[int]) -> _Doing:
        """Let a result no longer count, and ask the worker that was wrong the same again.

        Each time that it is wrong is a fault. The same bits, nearly right, are another hardware.
        """
        record, worker = self.record, part.worker
        request = [(part.units, record.everyone - {worker})]
        (again,) = yield from self._ask(request, why="aside")
        difference = self._difference(part, truth, rows)
        same = again is not None and self._difference(part, again, part.units) == 0
        if same and difference <= LEARNABLE:
            note = record.learn(difference, LEARNABLE)
            self._note(f"worker {worker} computes otherwise: {note}")
            return
        self._void([part])
        self.doubted.add(worker)
        while True:
            self.faults[worker] = self.faults.get(worker, 0) + 1
            if record.add_fault(worker):
                self.excluded += (worker,)
                yield from self._expel(worker)
                return
            if again is None or self._agree(again, truth, rows):
                return
            (again,) = yield from self._ask(request, why="aside")

    def _expel(self, worker: int) -> _Doing:
        """Let no result of a worker count, and have its rows computed by others."""
        self._void([part for part in self.table.good if part.worker == worker])
        self.doubted.add(worker)
        known = {row for part in (*self.void, *self.table.good) for row in part.units}
        for _ in range(_TRIES):
            if lacking := tuple(sorted(known - self.table.answered.keys())):
                yield from self._ask([(lacking, {worker})])

    def _note(self, note: str) -> None:
        self.notes += (note,) if note not in self.notes else ()

    def _conclude(self, first: Mapping[int, Part]) -> None:
        answered, (alike, disputes) = self.table.answered, self._compared()
        for pair, rows in disputes.items():  # verification has stopped
            self._doubt(*pair, rows)
        answers = self.answers = {row: part.number for row, part in answered.items()}
        self.unverified = (self.unverified | (self.wanted - alike)) & answers.keys()
        self.verified = alike - self.unverified
        owners = {row: part.worker for row, part in answered.items()}
        self.owners = {row: w for row, w in owners.items() if w not in self.doubted}
        self.record.passed(self.owners[row] for row in self.verified & self.owners.keys())
        self.corrected = {
            row
            for row, part in first.items()
            if part in self.void and row in answers
            if not self._agree(part, answered[row], [row])
        }
        if self.record.stopped:
            self._note(f"not verified any more: {self.record.stopped}")
        self.results.conclude(self)
