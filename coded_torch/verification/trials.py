"""The checks and trials of one call: which rows are computed again, and whose result counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..scheduling.protocol import Ask, Decision, Drop, Event, Settled, Wait
from .strikes import LEARNABLE, Drawn, Strikes

if TYPE_CHECKING:
    from .results import Results

__all__ = ["Trials", "Verdict"]

_ALARMS = 4  # rounds after a strike, in each of which the oddest row of every worker is checked
_TRIALS = 8  # of one call; more disputes than faulty workers explain stay undecided
_OWNERS = 3  # workers whose rows one part checks, so that it takes a fraction of a first part

_Request: TypeAlias = tuple[tuple[int, ...], frozenset[int]]  # rows, and who must not compute them
_Asking: TypeAlias = Generator[Decision, Event, list[int | None]]
_Doing: TypeAlias = Generator[Decision, Event, None]


@dataclasses.dataclass
class Verdict:
    """What verification found in one call.

    Attributes:
        answers: by row, the number of the part whose result counts. A row is missing if only a
            worker computed it that is now excluded.
        verified: rows that two workers computed alike.
        unverified: rows whose check did not come in time, or was not decided.
        disputes: how often the results of two workers differed.
        corrected: rows whose first result was wrong.
        strikes: wrong results by worker.
        excluded: workers that are out.
        doubted: workers that were struck or excluded, or are party to an undecided dispute.
        notes: what else the caller should know.
    """

    answers: dict[int, int] = dataclasses.field(default_factory=dict)
    verified: set[int] = dataclasses.field(default_factory=set)
    unverified: set[int] = dataclasses.field(default_factory=set)
    disputes: int = 0
    corrected: set[int] = dataclasses.field(default_factory=set)
    strikes: dict[int, int] = dataclasses.field(default_factory=dict)
    excluded: tuple[int, ...] = ()
    doubted: set[int] = dataclasses.field(default_factory=set)
    notes: tuple[str, ...] = ()


class Trials:
    """The checks and trials of one call, as far as they have come.

    Args:
        strikes: of the pool.
        results: of the call. The driver adds to them before it tells of a part.
        asked: the rows of every part that was asked for, by number.
        replies: ``(part, worker)`` of the good results, in the order in which they arrived.
        drawn: the rows that are to be checked in any case.
        soon: when a part that was asked for first is late. Until then its checks may still come.
        until: when checks are waited for no longer; ``-math.inf``: no more are asked for.
        end: when trials are waited for no longer.
    """

    def __init__(
        self,
        strikes: Strikes,
        results: Results,
        asked: Sequence[tuple[int, ...]],
        replies: Iterable[tuple[int, int]],
        drawn: Drawn,
        *,
        soon: float = -math.inf,
        until: float = math.inf,
        end: float = math.inf,
    ) -> None:
        self.strikes, self.results, self.drawn = strikes, results, drawn
        self.asked, self.soon, self.until, self.end = list(asked), soon, until, end
        self.wanted = set(drawn.rows)
        self.worker: dict[int, int] = {}  # by part with a good result
        self.parts: dict[int, list[int]] = {}  # by row, those with its result: the first counts
        self.void: set[int] = set()  # parts whose results do not count
        self.agreed: dict[tuple[int, int], list[int]] = {}  # by two parts, the rows that are alike
        self.disputes: dict[tuple[int, int], list[int]] = {}  # likewise those that differ
        self.late, self.trials, self.verdict = False, 0, Verdict()
        self.replies, self.first = list(replies), dict[int, int]()

    def decisions(self) -> Generator[Decision, Event, Verdict]:
        strikes, verdict = self.strikes, self.verdict
        for part, worker in self.replies:
            self._arrived(part, worker)
        self.first = self._answers()
        if strikes.stopped:
            return self._end()
        for worker in strikes.excluded & set(self.worker.values()):
            yield from self._expel(worker)  # another call excluded it meanwhile
        if self.until > -math.inf:
            lacking = self.wanted - self._verified()
            coming = {n for n, rows in enumerate(self.asked) if not lacking.isdisjoint(rows)}
            yield from self._wait(coming - self.worker.keys(), min(self.soon, self.until))
            self.wanted |= self._of_fresh() | set(self.results.odd(self._answers()))
        yield from self._check(self.wanted)
        for _ in range(_ALARMS):
            before = sum(verdict.strikes.values())
            yield from self._try()
            if strikes.stopped or before == sum(verdict.strikes.values()):
                break
            self.wanted |= self._oddest()
            yield from self._check(self.wanted)  # checks by a worker that is out, too
        return self._end()

    # What is checked.

    def _of_fresh(self) -> set[int]:
        """Draw more rows of the workers on probation, if not all are."""
        more, rows = self.strikes.often - self.drawn.rate, set[int]()
        for worker, own in self._by_worker(self._answers()).items():
            if more > 0 and self.strikes.fresh(worker) and not self.strikes.whole:
                rows.update(self.strikes.sample(sorted(set(own) - self.wanted), more))
        return rows

    def _oddest(self) -> set[int]:
        """Return the oddest row of every worker that is not checked yet."""
        answers, oddest = self._answers(), set()
        scores, done = self.results.scores(answers), self._verified() | self.wanted
        for worker, own in self._by_worker(answers).items():
            rows = [row for row in own if row in scores and row not in done]
            if rows and worker not in self.verdict.strikes:
                oddest.add(max(rows, key=scores.__getitem__))
        return oddest

    def _check(self, rows: Iterable[int]) -> _Doing:
        """Have rows computed by others, a few workers' rows in one part."""
        answers, verified = self._answers(), self._verified()
        some = {row: answers[row] for row in rows if row in answers and row not in verified}
        requests: list[_Request] = []
        if self.strikes.whole:
            for part in set(some.values()):
                requests.append((self.asked[part], frozenset({self.worker[part]})))
        else:
            owned = list(self._by_worker(some).items())
            step = max(1, min(_OWNERS, len(self.strikes.workers) // 2))
            for i in range(0, len(owned), step):
                owners, own = zip(*owned[i : i + step], strict=True)
                requests.append((tuple(sorted(itertools.chain(*own))), frozenset(owners)))
        yield from self._ask(requests, self.until)

    def _ask(self, requests: Sequence[_Request], until: float, *, aside: bool = False) -> _Asking:
        """Have parts computed; return the number of each, None if it has no good result.

        Args:
            requests: the parts.
            until: when they are waited for no longer.
            aside: whether their results can be no answers.
        """
        numbers = range(len(self.asked), len(self.asked) + len(requests))
        self.late = until == -math.inf
        if not requests or self.late:
            return [None] * len(requests)
        self.asked += [rows for rows, _ in requests]
        self.void.update(numbers if aside else ())
        out = frozenset(self.strikes.excluded)
        yield Ask(tuple(rows for rows, _ in requests), tuple(avoid | out for _, avoid in requests))
        waiting = set(numbers)
        yield from self._wait(waiting, until)
        if waiting:
            self.late = True
            yield Drop(tuple(sorted(waiting)))
        return [number if number in self.worker else None for number in numbers]

    def _wait(self, parts: set[int], until: float) -> _Doing:
        """Wait for parts, and take out those that have ended."""
        while parts and (event := (yield Wait(until))) is not None:
            if isinstance(event, Settled):
                parts.discard(event.part)
                if event.ok:
                    self._arrived(event.part, event.worker)
                elif event.part in self.worker:  # taken back
                    self.void.add(event.part)

    def _arrived(self, part: int, worker: int) -> None:
        self.worker[part] = worker
        if part not in self.void:
            for row in self.asked[part]:
                self.parts.setdefault(row, []).append(part)
            self._compare(part)

    def _compare(self, part: int) -> None:
        """Compare a result with what other workers returned for the same rows."""
        for other in {other for row in self.asked[part] for other in self.parts[row]} - self.void:
            pair = min(part, other), max(part, other)
            if self.worker[part] == self.worker[other] or pair in self.agreed:
                continue
            if self.strikes.whole and self.asked[part] != self.asked[other]:
                continue
            differences = self.results.differences(*pair)
            self.agreed[pair] = [row for row in differences if self._agree(*pair, [row])]
            for row in self.agreed[pair]:
                self.strikes.passed(self.worker[self.parts[row][0]])
            if len(self.agreed[pair]) < len(differences):
                self.disputes[pair] = sorted(differences.keys() - set(self.agreed[pair]))

    def _agree(self, part: int, other: int, rows: Iterable[int]) -> bool:
        differences = self.results.differences(part, other)
        tolerance = max(self.strikes.tolerance, self.results.tolerance)
        return all(differences[row] <= tolerance for row in rows)

    # Who is right.

    def _try(self) -> _Doing:
        """Settle all disputes."""
        while self.disputes and not self.strikes.stopped:
            (a, b), rows = self.disputes.popitem()
            alike = self.asked[a] == self.asked[b]
            if self.void & {a, b} or (self.strikes.whole and not alike):
                continue
            if self._agree(a, b, rows):  # by what was learnt meanwhile
                self.agreed[a, b] += rows
                continue
            self.verdict.disputes += 1
            decided = False
            if len(self.strikes.workers) > 2 and self.trials < _TRIALS:
                self.trials += 1
                decided = yield from self._trial(a, b, rows)
            if not decided:
                self.verdict.unverified.update(rows)
                self.verdict.doubted |= {self.worker[a], self.worker[b]}

    def _trial(self, a: int, b: int, rows: list[int]) -> Generator[Decision, Event, bool]:
        """Have others compute two parts exactly as they were asked; return whether it decided.

        The batches are those of before, so results differ only if they are wrong or random. Where
        both parts are confirmed, results depend on the rows beside them.
        """
        heard = {self.worker[a], self.worker[b]}
        need = min(self.strikes.jury - 1, len(self.strikes.workers - heard))
        votes: dict[str, list[tuple[int, int]]] = {x: [] for x in ("a", "b", "both", "neither")}
        while (lacking := need - max(len(votes["a"]), len(votes["b"]))) > 0:
            jurors = self.strikes.workers - heard
            if not jurors or len(votes["both"]) > 1 or len(votes["neither"]) > need:
                break
            for pair in (yield from self._jury(a, b, jurors, lacking, heard)):
                votes[self._vote(*pair, a, b, rows)].append(pair)
            if self.late:
                return False
        both, neither = votes["both"], votes["neither"]
        if len(both) > 1 or (both and not (jurors or neither or votes["a"] or votes["b"])):
            differences = self.results.differences(a, b)
            self._note(self.strikes.learn(max(differences[row] for row in rows)))
            self.agreed[a, b] += rows
        elif any(not self._agree(neither[0][0], p, rows) for p, _ in neither[1:]):
            self.strikes.undecided(5)
            return False
        elif len(neither) > need:
            yield from self._sentence(a, neither[0][0], rows)
            yield from self._sentence(b, neither[0][1], rows)
        elif len(votes["b"]) >= need > len(votes["a"]):
            yield from self._sentence(a, votes["b"][0][0], rows)
        elif len(votes["a"]) >= need > len(votes["b"]):
            yield from self._sentence(b, votes["a"][0][1], rows)
        else:
            self.strikes.undecided()
            return False
        return True

    def _vote(self, p: int, q: int, a: int, b: int, rows: list[int]) -> str:
        """Return which results a juror confirms who computed part a as p, and part b as q."""
        for_a, for_b = self._agree(p, a, rows), self._agree(q, b, rows)
        if for_a and for_b:
            return "both"
        if for_b and self._agree(p, b, rows):
            return "b"
        return "a" if for_a and self._agree(q, a, rows) else "neither"

    def _jury(
        self, a: int, b: int, jurors: set[int], size: int, heard: set[int]
    ) -> Generator[Decision, Event, list[tuple[int, int]]]:
        """Ask so many jurors to compute both parts; return their pairs of results.

        Any of a few workers may take each copy, so that a late one is not waited for. The groups
        are disjoint, so that no worker votes twice.
        """
        order = self.strikes.random.sample(sorted(jurors), len(jurors))
        many = max(1, len(order) // (2 * size))  # half of them stay in reserve
        groups = [set(order[i : i + many]) for i in range(0, len(order), many)][:size]
        everyone, same = frozenset(range(self.strikes.num_workers)), self.asked[a] == self.asked[b]
        replies = yield from self._ask(
            [(self.asked[x], everyone - g) for g in groups for x in ((a,) if same else (a, b))],
            self.end,
        )
        found = [(x, x) for x in replies] if same else list(zip(*[iter(replies)] * 2, strict=True))
        pairs = [(p, q) for p, q in found if p is not None and q is not None]
        heard |= {self.worker[part] for pair in pairs for part in pair}
        for group, pair in zip(groups, found, strict=True):
            heard |= group if None in pair else set()
        return pairs

    def _sentence(self, part: int, truth: int, rows: list[int]) -> _Doing:
        """Let the jury's result count, and ask the worker that was wrong the same again.

        Each time that it is wrong is a strike, until it is out. The same bits, nearly right, are
        another kind of hardware.
        """
        strikes, worker = self.strikes, self.worker[part]
        request = [(self.asked[part], frozenset(range(strikes.num_workers)) - {worker})]
        (again,) = yield from self._ask(request, self.end, aside=True)
        difference = max(self.results.differences(part, truth)[row] for row in rows)
        same = again is not None and not any(self.results.differences(part, again).values())
        if same and difference <= LEARNABLE:
            note = strikes.learn(difference, LEARNABLE)
            self._note(f"worker {worker} computes otherwise: {note}")
            return
        self.void.add(part)
        self.verdict.doubted.add(worker)
        for row in self.asked[truth]:
            self.parts[row].remove(truth)
            self.parts[row].insert(0, truth)
        self._compare(truth)
        while True:
            self.verdict.strikes[worker] = self.verdict.strikes.get(worker, 0) + 1
            if strikes.strike(worker):
                self.verdict.excluded += (worker,)
                yield from self._expel(worker)
                return
            if again is None or self._agree(again, truth, rows):
                return
            (again,) = yield from self._ask(request, self.end, aside=True)

    def _expel(self, worker: int) -> _Doing:
        """Let no result of a worker count, and have its rows computed by others."""
        self.void |= {part for part, by in self.worker.items() if by == worker}
        self.verdict.doubted.add(worker)
        if lacking := tuple(sorted(self.parts.keys() - self._answers().keys())):
            yield from self._ask([(lacking, frozenset({worker}))], self.end)

    # What comes of it.

    def _answers(self) -> dict[int, int]:
        """Return the part whose result counts, by row."""
        if not self.void:
            return {row: parts[0] for row, parts in self.parts.items()}
        left = {row: [x for x in parts if x not in self.void] for row, parts in self.parts.items()}
        return {row: parts[0] for row, parts in left.items() if parts}

    def _by_worker(self, answers: Mapping[int, int]) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {}
        for row, part in answers.items():
            rows.setdefault(self.worker[part], []).append(row)
        return rows

    def _verified(self) -> set[int]:
        alike = (rows for pair, rows in self.agreed.items() if not self.void.intersection(pair))
        return set().union(*alike)

    def _note(self, note: str) -> None:
        self.verdict.notes += (note,) if note not in self.verdict.notes else ()

    def _end(self) -> Verdict:
        verdict = self.verdict
        verdict.answers = answers = self._answers()
        verified = self._verified()
        verdict.unverified = (verdict.unverified | (self.wanted - verified)) & answers.keys()
        verdict.verified = verified - verdict.unverified
        for row, part in self.first.items():
            replaced = part in self.void and row in answers
            if replaced and not self._agree(part, answers[row], [row]):
                verdict.corrected.add(row)
        if self.strikes.stopped:
            self._note(f"not verified any more: {self.strikes.stopped}")
        return verdict
