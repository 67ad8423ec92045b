"""The record of workers over many calls, and the rows that are checked in any case."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import secrets
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .scores import Scores

# A worker that is new, restarted or at fault is checked so many times as often as others, until so
# many of its rows were clean. More finds faults sooner and costs work at the start; not tuned.
_OFTEN, _TRIAL = 10, 30
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
        self.pool, self.share, self.random = pool, share, generator or secrets.SystemRandom()
        self.excluded: set[int] = set()  #: the workers that get no parts until they are restarted
        self.tolerance = 0.0  #: results of a row agree up to this, in spreads of the outputs
        self.whole = False  #: results depend on the rows beside them: whole parts are compared
        self.stopped = ""  #: the reason if nothing is verified any more
        self.scores = Scores()
        self._faults: dict[int, int] = {}
        self._clean: Counter[int] = Counter()  # the checks that a worker passed since a fault
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
        return min(1.0, _OFTEN * self.share)

    def fresh(self, worker: int) -> bool:
        """Return whether a worker is in its trial period."""
        return self._clean[worker] < _TRIAL

    def sample(self, rows: Sequence[int], share: float) -> list[int]:
        """Draw a share of rows, on average."""
        many = share * len(rows)
        some = int(many) + (self.random.random() < many % 1)
        return self.random.sample(rows, min(some, len(rows)))

    def draw(
        self, parts: Sequence[Sequence[int]], idle: int = 0
    ) -> tuple[tuple[tuple[int, ...], ...], frozenset[int], float]:
        """Begin a call: draw rows, and hide each in another part, so that no round is added.

        Returns the parts with the rows to check, these rows, and their share.
        """
        with self._lock:
            self._calls += 1
            if self._calls % _HALVING == 0:
                self._faults = {w: n // 2 for w, n in self._faults.items() if n > 1}
                self._undecided //= 2
        plain = tuple(map(tuple, parts))
        if self.stopped or len(self.workers) < 2:
            return plain, frozenset(), 0.0
        if self.whole:  # parts are asked for twice
            twice = tuple(part for part in plain if self.random.random() < self.share)
            return (*plain, *twice), frozenset().union(*twice), self.share
        # More only if all workers are in trial, as the workers of parts are not known yet.
        share = self.often if all(map(self.fresh, self.workers)) else self.share
        chosen = [self.sample(part, share) for part in plain]
        rows = frozenset().union(*chosen)
        if rows and idle > len(plain) and max(map(len, plain)) == 1:
            # In a part of one row a check would take as long again, and others are idle.
            return (*plain, tuple(sorted(rows))), rows, share
        hidden = [list(part) for part in plain]
        # In turn, as the part with most rows is waited for.
        holders = itertools.cycle(self.random.sample(range(len(plain)), len(plain)))
        for i, some in enumerate(chosen if len(plain) > 1 else ()):
            for row in some:
                hidden[next(j for j in holders if j != i)].append(row)
        return tuple(tuple(sorted(part)) for part in hidden), rows, share

    def passed(self, workers: Iterable[int]) -> None:
        """Note for each row that another worker agreed on whose result it was."""
        with self._lock:
            self._clean.update(workers)

    def renew(self, workers: Collection[int]) -> None:
        """Begin a trial period of workers that were restarted."""
        with self._lock:
            for worker in workers:
                self._clean[worker] = 0
                self._faults.pop(worker, None)
                self.excluded.discard(worker)

    def add_fault(self, worker: int) -> bool:
        """Count a wrong result, and return whether its worker is excluded from now on.

        A random module adds faults to all workers alike, so it takes many more than the others
        have: by chance an honest worker is out in one of 10,000 modules' lives.
        """
        with self._lock:
            if worker in self.excluded:  # another call was faster
                return True
            own = self._faults[worker] = self._faults.get(worker, 0) + 1
            self._clean[worker] = 0
            others = sum(self._faults.values()) - own
            if own >= 1 + math.ceil(4 / math.log10(max(2, len(self.workers)))) + 2 * others:
                # First, as an excluded one with a part is a new one. It may have left.
                if self.pool.exclude is not None:
                    with contextlib.suppress(ValueError):
                        self.pool.exclude(worker)
                self.excluded.add(worker)
                del self._faults[worker]
                return True
            most = max(self._faults.values())
            if len(self._faults) >= 3 and most <= 2 * (own + others - most):
                self.stopped = "results of several workers differ when they are asked again"
            return False

    def learn(self, difference: float, most: float = LEARNABLE / 2) -> str:
        """Take a difference between honest results for rounding, if it is small; return a note."""
        with self._lock:
            if difference <= most:
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
