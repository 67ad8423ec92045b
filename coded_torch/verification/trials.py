"""The checks and trials of one call: which rows are computed again, and whose result counts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ..scheduling import Ask, Began, Decision, Drop, Ended, Event, Settled, Wait
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
_Doing: TypeAlias = Generator[Decision, Event, None]


class Trials:
    """The waiting policy of one call, after which results are verified until there is a verdict.

    A driver carries out :meth:`decide`, and adds a good result to ``results`` before its event.

    Args:
        record: the record of the pool's workers.
        waiting: the policy that is followed first.
        inputs: floating-point tensors, ``[B, ...]`` each, by which results are scored.

    The attributes from ``verified`` to ``notes`` are of :class:`coded_torch.Report`, sets of rows
    for tensors.
    """

    results: Results
    first: tuple[tuple[int, ...], ...] = ()  #: the parts of the first ask, with their check rows

    def __init__(self, record: Record, waiting: Any = None, inputs: Sequence[Tensor] = ()) -> None:
        self.record, self.waiting, self._inputs = record, waiting, inputs
        self._out = frozenset(record.excluded)
        self.verified, self.unverified, self.corrected = set[int](), set[int](), set[int]()
        self.disputes, self.faults, self.excluded = 0, dict[int, int](), tuple[int, ...]()
        self.notes = tuple[str, ...]()
        self.answers = dict[int, int]()  #: the part whose result counts, by row, where there is one
        self.owners = dict[int, int]()  #: the worker that computed the answer, if it is not doubted
        self.doubted = set[int]()  #: workers at fault, excluded, or in undecided disputes
        self.asked: list[tuple[int, ...]] = []  # the rows of all parts, by number
        self.worker: dict[int, int] = {}  # the worker of each good part
        self.parts: dict[int, list[int]] = {}  # the parts whose result of a row counts, in order
        self.wanted, self.missed = set[int](), set[int]()  # rows to check, and not checked in time
        self.void = set[int]()  # parts whose results do not count
        self.undecided = set[tuple[int, int]]()  # two parts that differ
        self._fresh, self._renewed, self._failed = set[int](), set[int](), set[int]()

    def prepare(self) -> None:
        """Fit the regression that scores results, while workers compute."""
        self.results = Results(self.record.scores, () if self.record.stopped else self._inputs)

    def decide(
        self, history: Any, first: Sequence[Sequence[int]], **options: Any
    ) -> Generator[Decision, Event, Ended]:
        """Decide as the policy does, and then check and try; the arguments are a policy's."""
        record, since, reserve = self.record, options.get("since", 0.0), options.get("reserve", 0.0)
        self.first, rows, self._share = record.draw(first, options["idle"]())
        self.now, self.wanted = since, self.wanted | rows
        ended = yield from self._followed(self.waiting.decide(history, self.first, **options))
        yield from self._wait({-1}, -math.inf)  # results that arrived meanwhile count
        late = ended.hedging_threshold if ended.hedging_threshold < math.inf else -math.inf
        checks = ended.reason in ("complete", "failed")
        self.until = since + ended.deadline - reserve if checks else -math.inf
        bounded = self.waiting.deadline is not None or ended.reason == "error"
        self.end = self.until if bounded else math.inf
        self.patience = _PATIENCE * max(late, self.now - since) or math.inf  # clocks may stand
        before = self._answers()
        # A worker that was excluded before the call, and that has a part, has been restarted.
        record.renew(self._renewed | self._out.intersection(self.worker.values()))
        if not record.stopped:
            yield from self._find(since + late)
        self._conclude(before)
        if ended.reason == "complete" and self.answers.keys() != before.keys():
            return ended._replace(reason="deadline" if self.now >= self.end else "failed")
        return ended

    def _followed(
        self, policy: Generator[Decision, Event, Ended]
    ) -> Generator[Decision, Event, Ended]:
        """Pass on the decisions and events of a policy, and return how it ended."""
        event: Event = None
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: Ended = stop.value
                return ended
            event = None
            if isinstance(decision, Wait):
                event = yield from self._heard(decision)
            elif isinstance(decision, Ask):
                is_first = not self.asked
                yield self._asking(decision.parts)
                if is_first:
                    self.prepare()
            else:
                yield decision

    def _asking(self, parts: tuple[tuple[int, ...], ...]) -> Ask:
        """Return the decision to ask for parts, not of excluded workers if the pool can't tell."""
        self.asked += parts
        out = self.record.excluded if self.record.pool.exclude is None else ()
        return Ask(parts, (frozenset(out),) * len(parts) if out else ())

    def _heard(self, wait: Wait) -> Generator[Decision, Event, Event]:
        """Wait for an event, and note it."""
        event = yield wait
        if event is None:
            self.now = max(self.now, wait.until if wait.until < math.inf else self.now)
            return None
        self.now, part = max(self.now, event.at), event.part
        if isinstance(event, Began):
            self._fresh |= {part} if event.fresh else set()
            return event
        self._renewed |= {event.worker} if part in self._fresh else set()
        if event.ok:
            self.worker[part] = event.worker
            for row in self.asked[part] if part not in self.void else ():
                self.parts.setdefault(row, []).append(part)
        else:
            self._failed.add(part)
            if self.worker.pop(part, None) is not None:  # taken back, as it is unlike most others
                self._remove({part})
        return event

    def _remove(self, parts: set[int]) -> None:
        """Let results no longer count."""
        for row in {row for part in parts for row in self.asked[part]}:
            self.parts[row] = [part for part in self.parts.get(row, ()) if part not in parts]

    def _find(self, soon: float) -> _Doing:
        """Check rows, and settle disputes. Checks in parts of the first ask may come until soon."""
        record = self.record
        for worker in record.excluded & set(self.worker.values()):
            yield from self._expel(worker)  # another call excluded it meanwhile
        if self.until > self.now:
            lacking = self.wanted - self._compared()[0]
            late = {n for n, rows in enumerate(self.asked) if not lacking.isdisjoint(rows)}
            late -= self.worker.keys()
            yield from self._wait(late - self._failed, min(soon, self.until))
            late -= self.worker.keys()
            # A drawn row whose check is late stays unchecked: to ask again would delay the call.
            self.missed = lacking & {row for n in late for row in self.asked[n]}
            more = self._of_fresh() | self.results.odd(self._answers())
            self.wanted |= more
            self.missed -= more
        yield from self._check()
        for _ in range(_ALARMS):
            before = sum(self.faults.values())
            while not record.stopped and (disputes := self._compared()[1]):
                self.disputes += 1
                pair, rows = disputes.popitem()
                possible = len(record.workers) > 2 and self.disputes <= _TRIALS
                if not (possible and (yield from self._trial(*pair, rows))):
                    self._doubt(pair, rows)
            if record.stopped or before == sum(self.faults.values()):
                break
            self.wanted |= self._oddest()
            yield from self._check()  # checks by a worker that is out, too

    def _answers(self) -> dict[int, int]:
        """Return the part whose result counts, by row."""
        return {row: parts[0] for row, parts in self.parts.items() if parts}

    def _compared(self) -> tuple[set[int], dict[tuple[int, int], list[int]]]:
        """Return the rows that another worker computed alike, and the rows that differ.

        The key of rows that differ is two parts, the first of which is the answer.
        """
        answers, worker, asked = self._answers(), self.worker, self.asked
        pairs = {
            (answers[row], other): None
            for row, parts in self.parts.items()
            if len(parts) > 1 and row in answers
            for other in parts
            if worker[other] != worker[answers[row]]
            if not self.record.whole or asked[other] == asked[answers[row]]
        }
        alike, disputes = set[int](), dict[tuple[int, int], list[int]]()
        for pair, by in zip(pairs, self.results.differences(list(pairs)), strict=True):
            for row in by:
                if answers[row] != pair[0]:
                    continue
                if by[row] <= self._tolerance():
                    alike.add(row)
                elif pair not in self.undecided:
                    disputes.setdefault(pair, []).append(row)
        return alike, disputes

    def _tolerance(self) -> float:
        return max(self.record.tolerance, self.results.tolerance)

    def _difference(self, part: int, other: int, rows: Iterable[int]) -> float:
        (by,) = self.results.differences([(part, other)])
        return max(by[row] for row in rows)

    def _agree(self, part: int, other: int, rows: Iterable[int]) -> bool:
        return self._difference(part, other, rows) <= self._tolerance()

    # The checks.

    def _by_worker(self, answers: Mapping[int, int]) -> dict[int, list[int]]:
        rows = defaultdict[int, list[int]](list)
        for row, part in answers.items():
            rows[self.worker[part]].append(row)
        return rows

    def _of_fresh(self) -> set[int]:
        """Draw more rows of the workers in their trial period, if not all are."""
        record, more = self.record, self.record.often - self._share
        if more <= 0 or record.whole:
            return set()
        by_worker = self._by_worker(self._answers()).items()
        some = [sorted(set(rows) - self.wanted) for w, rows in by_worker if record.fresh(w)]
        return {row for rows in some for row in record.sample(rows, more)}

    def _oddest(self) -> set[int]:
        """Return the oddest row of every worker that is not checked yet."""
        answers, done = self._answers(), self._compared()[0] | self.wanted
        scores = self.results.scores(answers)
        left = {row: answers[row] for row in scores if row not in done}
        return {
            max(rows, key=scores.__getitem__)
            for worker, rows in self._by_worker(left).items()
            if worker not in self.faults
        }

    def _check(self) -> _Doing:
        """Have the wanted rows computed by others."""
        answers, (alike, disputes) = self._answers(), self._compared()
        done = alike.union(*disputes.values())
        some = {row: answers[row] for row in self.wanted - done - self.missed if row in answers}
        requests = [((*sorted(rows),), {w}) for w, rows in self._by_worker(some).items()]
        if self.record.whole:
            requests = [(self.asked[part], {self.worker[part]}) for part in {*some.values()}]
        yield from self._ask(requests, min(self.until, self.now + self.patience))

    def _ask(
        self, requests: Sequence[_Request], until: float | None = None, *, aside: bool = False
    ) -> Generator[Decision, Event, list[int | None]]:
        """Have parts computed; return the number of each, None if it has no good result.

        By default they are waited for as trials are. Results ``aside`` do not count.
        """
        until = min(self.end, self.now + self.patience) if until is None else until
        numbers = range(len(self.asked), len(self.asked) + len(requests))
        if not requests or until <= self.now:
            return [None] * len(requests)
        self.void.update(numbers if aside else ())
        avoid = tuple(frozenset(some | self.record.excluded) for _, some in requests)
        yield self._asking(tuple(rows for rows, _ in requests))._replace(avoid=avoid)
        late = yield from self._wait(set(numbers), until)
        if late:
            yield Drop(tuple(sorted(late)))
        return [number if number in self.worker else None for number in numbers]

    def _wait(self, parts: set[int], until: float) -> Generator[Decision, Event, set[int]]:
        """Wait for parts, and return the parts that have not ended."""
        while parts and (event := (yield from self._heard(Wait(until)))) is not None:
            parts -= {event.part} if isinstance(event, Settled) else set()
        return parts

    # The trials.

    def _doubt(self, pair: tuple[int, int], rows: Iterable[int]) -> None:
        self.undecided.add(pair)
        self.unverified.update(rows)
        self.doubted |= {self.worker[part] for part in pair}

    def _trial(self, a: int, b: int, rows: list[int]) -> Generator[Decision, Event, bool]:
        """Have others compute two parts exactly as they were asked; return whether it decided.

        If both parts are confirmed, results depend on the rows beside them.
        """
        record, heard = self.record, {self.worker[a], self.worker[b]}
        # With two votes of five workers, a colluding pair would convict others.
        need = min(2 if len(record.workers) >= 5 else 1, len(record.workers - heard))
        parts = (a,) if self.asked[a] == self.asked[b] else (a, b)
        everyone, many = record.everyone, len(parts)
        votes = defaultdict[str, list[tuple[int, int]]](list)
        while (lacking := need - max(len(votes["a"]), len(votes["b"]))) > 0:
            others = sorted(record.workers - heard)
            if not others or len(votes["both"]) > 1 or len(votes["neither"]) > need:
                break
            some = record.random.sample(others, min(lacking, len(others)))
            heard.update(some)
            replies = yield from self._ask(
                [(self.asked[part], everyone - {other}) for other in some for part in parts]
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

    def _vote(self, p: int, q: int, a: int, b: int, rows: list[int]) -> str:
        """Return which results another worker confirms by its own, p of part a and q of part b."""
        for_a, for_b = self._agree(p, a, rows), self._agree(q, b, rows)
        if for_a and for_b:
            return "both"
        if for_b and self._agree(p, b, rows):
            return "b"
        return "a" if for_a and self._agree(q, a, rows) else "neither"

    def _sentence(self, part: int, truth: int, rows: list[int]) -> _Doing:
        """Let a result no longer count, and ask the worker that was wrong the same again.

        Each time that it is wrong is a fault. The same bits, nearly right, are another hardware.
        """
        record, worker = self.record, self.worker[part]
        request = [(self.asked[part], record.everyone - {worker})]
        (again,) = yield from self._ask(request, aside=True)
        difference = self._difference(part, truth, rows)
        same = again is not None and self._difference(part, again, self.asked[part]) == 0
        if same and difference <= LEARNABLE:
            note = record.learn(difference, LEARNABLE)
            self._note(f"worker {worker} computes otherwise: {note}")
            return
        self.void.add(part)
        self._remove({part})
        self.doubted.add(worker)
        while True:
            self.faults[worker] = self.faults.get(worker, 0) + 1
            if record.add_fault(worker):
                self.excluded += (worker,)
                yield from self._expel(worker)
                return
            if again is None or self._agree(again, truth, rows):
                return
            (again,) = yield from self._ask(request, aside=True)

    def _expel(self, worker: int) -> _Doing:
        """Let no result of a worker count, and have its rows computed by others."""
        self.void |= {part for part, by in self.worker.items() if by == worker}
        self._remove(self.void)
        self.doubted.add(worker)
        for _ in range(_TRIES):
            if lacking := tuple(sorted(self.parts.keys() - self._answers().keys())):
                yield from self._ask([(lacking, {worker})])

    def _note(self, note: str) -> None:
        self.notes += (note,) if note not in self.notes else ()

    def _conclude(self, first: Mapping[int, int]) -> None:
        alike, disputes = self._compared()
        for pair, rows in disputes.items():  # verification has stopped
            self._doubt(pair, rows)
        answers = self.answers = self._answers()
        self.unverified = (self.unverified | (self.wanted - alike)) & answers.keys()
        self.verified = alike - self.unverified
        owners = {row: self.worker[part] for row, part in answers.items()}
        self.owners = {row: w for row, w in owners.items() if w not in self.doubted}
        self.record.passed(self.owners[row] for row in self.verified & self.owners.keys())
        self.corrected = {
            row
            for row, part in first.items()
            if part in self.void & self.worker.keys() and row in answers
            if not self._agree(part, answers[row], [row])
        }
        if self.record.stopped:
            self._note(f"not verified any more: {self.record.stopped}")
        self.results.conclude(self)
