"""The record of workers over many calls, and the random choice of rows that are checked."""

import contextlib
import math
import random
import secrets
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ._scores import Scores
from ._untuned import OFTEN, TRIAL

# The probability that chance explains faults, below which workers are excluded. A module that does
# not repeat itself excludes an honest worker in one of 700 (24 workers) to 6,000 of its lives.
_CHANCE = 1e-4
_HALVING = 2_000  # calls after which faults count half, so that rare accidents do not add up
#: The largest difference that is taken for rounding, in spreads of the outputs. Half precision
#: differs by up to .01; results that are off by .06 begin to change classes (benchmarks
#: verification, left).
LEARNABLE = 0.03
_UNDECIDED = 10  # trials that showed nothing, after which the module is taken for random


class Record:
    """The faults of the workers of one pool, and facts about the module. Thread-safe.

    Args:
        pool: the pool, whose places are the workers, and which excludes workers if it can.
        share: the share of rows that are checked.
        generator: draws the rows. Defaults to the secret one of the operating system.
    """

    def __init__(self, pool: Any, share: float, generator: random.Random | None = None) -> None:
        self.pool = pool
        self.share = share
        self.random = generator or secrets.SystemRandom()
        self.excluded: set[int] = set()  #: the workers that get no parts until they are restarted
        #: Results of a row agree up to this, in spreads of the outputs.
        self.tolerance = LEARNABLE if pool is not None and pool.mixed else 0.0
        self.whole = False  #: results depend on the rows beside them: whole parts are compared
        self.stopped = ""  #: the reason if nothing is verified any more
        self.scores = Scores()
        self._faults: dict[int, int] = {}
        # The rows of a worker that others confirmed, since its fault; and its parts with checks.
        self._clean = Counter[int]()
        self._checks = Counter[int]()
        self._before = Counter[int]()  # such parts of a worker up to its first fault
        self._calls = self._undecided = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins anew, and holds no rows of users
        return type(self), (self.pool, self.share)

    @property
    def everyone(self) -> set[int]:
        return set(self.pool.places)

    @property
    def workers(self) -> set[int]:
        """The workers that are not excluded."""
        return self.everyone - self.excluded

    @property
    def often(self) -> float:
        """The share of rows that are checked of workers in their trial period."""
        return min(1.0, OFTEN * self.share)

    def fresh(self, worker: int) -> bool:
        """Return whether a worker is in its trial period."""
        return self._clean[worker] < TRIAL

    def sample(self, rows: Sequence[int], share: float) -> list[int]:
        """Draw a share of rows, on average."""
        mean = share * len(rows)
        number = int(mean) + (self.random.random() < mean % 1)
        return self.random.sample(rows, min(number, len(rows)))

    def draw(
        self, parts: Sequence[Sequence[int]], idle: int = 0
    ) -> tuple[tuple[tuple[int, ...], ...], set[int], float]:
        """Begin a call: draw rows, and hide each in another part, so that no round is added.

        Returns the parts with the rows to check, these rows, and their share. The parts are of one
        size, so that no worker can tell whether its part has such a row.
        """
        with self._lock:
            self._calls += 1
            if self._calls % _HALVING == 0:
                self._faults = {w: n // 2 for w, n in self._faults.items() if n > 1}
                for counts in (self._checks, self._before):
                    counts.update({worker: n // 2 - n for worker, n in counts.items()})
                self._undecided //= 2
        plain = tuple(map(tuple, parts))
        if self.stopped or len(self.workers) < 2:
            return plain, set(), 0.0
        # More only if all workers are in trial, as the workers of parts are not known yet.
        share = self.often if all(map(self.fresh, self.workers)) else self.share
        order = [row for part in plain for row in (part[:1] if self.whole else part)]
        rows = self.sample(order, share)
        many = len(plain)
        if not rows or many == 1 or self.whole:  # parts are repeated later
            return plain, {*rows}, share
        if len(order) == many < idle:  # in a part of one row, a check would take as long again
            many += min(idle - many, len(rows))
        # At equal distances, parts hold rows of the others in turn, so that few parts have nothing
        # that is checked, and no few parts have every row.
        first = self.random.randrange(many)
        start = self.random.randrange(many - 1)
        held = Counter((j * many + first) // len(rows) for j in range(len(rows)))
        total = len(order) + len(rows)
        at = 0
        hidden = list[list[int]]()
        for i in range(many):
            end = at + total * (i + 1) // many - total * i // many - held[i]
            hidden.append(order[at:end])
            at = end
        unused = [[*part] for part in hidden]
        for i in range(many):
            wanted = held[i]
            for j in range(many * held[i]):
                rest = unused[((start + j) % (many - 1) + i + 1) % many]
                if wanted and rest:
                    hidden[i].append(rest.pop(self.random.randrange(len(rest))))
                    wanted -= 1
        # A row for which no part was left is checked later.
        left = [row for part in unused for row in part]
        later = self.random.sample(left, len(rows) - len(order) + len(left))
        drawn = {*order}.difference(left).union(later)
        return tuple(tuple(sorted(part)) for part in hidden if part), drawn, share

    def passed(self, clean: Mapping[int, int], checks: Mapping[int, int]) -> None:
        """Note how many rows of each worker others confirmed, and how many parts had checks."""
        with self._lock:
            self._clean.update(clean)
            self._checks.update(checks)

    def renew(self, workers: Collection[int]) -> None:
        """Begin a trial period of workers that were restarted."""
        with self._lock:
            for worker in workers:
                self._clean[worker] = 0
                self._faults.pop(worker, None)
                self.excluded.discard(worker)

    def add_fault(self, worker: int, checks: int = 0) -> bool:
        """Count a wrong result, and return whether its worker is excluded from now on.

        A random module adds faults to all workers alike, as often as their parts are checked. So a
        worker is excluded if it is among the fewest workers, at most half, whose faults, or whose
        faults after the first of each, are more than this explains.

        Args:
            checks: the parts of the worker that were checked since, because it had a fault.
        """
        with self._lock:
            if worker in self.excluded:  # another call was faster
                return True
            faults = self._faults
            workers = self.workers
            parts = self._checks.copy()
            if worker not in faults:
                self._before[worker] = parts[worker]
            parts[worker] += checks
            faults[worker] = faults.get(worker, 0) + 1
            self._clean[worker] = 0
            order = sorted(faults, key=faults.__getitem__, reverse=True)
            all_parts = sum(1 + parts[w] for w in workers)
            total = sum(faults.values())
            for k in range(1, len(workers) // 2 + 1):
                suspects = order[:k]
                their_faults = sum(faults[w] for w in suspects)
                their_parts = sum(1 + parts[w] for w in suspects)
                repeated = their_faults - len(suspects)
                parts_since = their_parts - sum(self._before[w] for w in suspects)
                chance = _tail(total, their_faults, their_parts / all_parts)
                chance *= math.comb(len(workers), k)
                of_repeats = _tail(total, repeated, parts_since / all_parts)
                of_repeats *= math.comb(len(order), len(suspects))
                if repeated > 0 and min(chance, of_repeats) <= _CHANCE:
                    break
            else:
                most = faults[order[0]]
                if len(order) > max(2, len(workers) / 2) and most <= 2 * (total - most):
                    self.stopped = "results of most workers differ from what others compute"
                return False
            if worker not in suspects:
                return False
            # Before the record: an excluded one with a part counts as restarted. It may have left.
            if self.pool.exclude is not None:
                with contextlib.suppress(ValueError):
                    self.pool.exclude(worker)
            self.excluded.add(worker)
            self.scores.forget(worker)
            del faults[worker]
            return True

    def learn(self, difference: float) -> str:
        """Take a difference between honest results for rounding, if it is small; return a note."""
        with self._lock:
            if difference <= LEARNABLE / 2:
                self.tolerance = max(self.tolerance, 2 * difference)
                return f"honest results differ by {difference:.1e} of the outputs' spread"
            self.whole = True
            return f"results depend on the rows beside them, by {difference:.1e} of their spread"

    def undecided(self, count: int = 1) -> None:
        """Count a trial that showed nothing."""
        with self._lock:
            self._undecided += count
            if self._undecided >= _UNDECIDED:
                self.stopped = "the module does not repeat its results"


def _tail(count: int, least: int, share: float) -> float:
    """Return the probability of ``least`` or more of some events that have a probability each."""
    share = min(share, 1.0)
    return sum(
        math.comb(count, n) * share**n * (1 - share) ** (count - n) for n in range(least, count + 1)
    )
