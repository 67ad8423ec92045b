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

# A worker that is new, restarted or struck is checked so many times as often as others, until so
# many of its rows were clean. More finds faults sooner and costs work at the start; not tuned.
_OFTEN, _PROBATION = 10, 30
_HALVING = 2_000  # calls after which strikes count half, so that rare accidents do not add up
#: The largest difference that is taken for rounding, in spreads of the outputs. Half precision
#: differs by up to .01; results that are off by .06 begin to change classes (benchmarks
#: verification, left).
LEARNABLE = 0.03
_UNDECIDED = 10  # trials that showed nothing, after which the module is taken for random


class Strikes:
    """The strikes of the workers of one pool, and facts about the module. Thread-safe.

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
        self._strikes: dict[int, int] = {}
        self._clean: Counter[int] = Counter()  # the checks that a worker passed since a strike
        self._calls = self._undecided = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a copy begins anew, and holds no rows of users
        return type(self), (self.pool, self.share)

    @property
    def exclude(self) -> Any:
        """The pool's method that gives a worker no more parts; None if it has none."""
        return getattr(self.pool, "exclude", None)

    @property
    def everyone(self) -> set[int]:
        return set(self.pool.places)

    @property
    def workers(self) -> set[int]:
        """The workers that are not excluded."""
        return self.everyone - self.excluded

    @property
    def often(self) -> float:
        """The share of rows that are checked of workers on probation."""
        return min(1.0, _OFTEN * self.share)

    def fresh(self, worker: int) -> bool:
        """Return whether a worker is on probation."""
        return self._clean[worker] < _PROBATION

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
                self._strikes = {w: n // 2 for w, n in self._strikes.items() if n > 1}
                self._undecided //= 2
        plain = tuple(map(tuple, parts))
        if self.stopped or len(self.workers) < 2:
            return plain, frozenset(), 0.0
        if self.whole:  # parts are asked for twice
            twice = tuple(part for part in plain if self.random.random() < self.share)
            return (*plain, *twice), frozenset().union(*twice), self.share
        # More only if all workers are on probation, as the workers of parts are not known yet.
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
        """Put workers that were restarted on probation."""
        with self._lock:
            for worker in workers:
                self._clean[worker] = 0
                self._strikes.pop(worker, None)
                self.excluded.discard(worker)

    def strike(self, worker: int) -> bool:
        """Count a wrong result, and return whether its worker is excluded from now on.

        One of n workers has t + 1 strikes in turn by chance once in n^t = 10,000 times. Each other
        worker with strikes adds three, and not all of its own: faulty workers would protect each
        other. If most workers have strikes, the module does not repeat its results. By chance an
        honest worker is out in one of 10,000 lives of such modules.
        """
        with self._lock:
            if worker in self.excluded:  # another call was faster
                return True
            own = self._strikes[worker] = self._strikes.get(worker, 0) + 1
            self._clean[worker] = 0
            workers, struck = len(self.workers), len(self._strikes)
            if own >= math.ceil(4 / math.log10(max(2, workers))) + 3 * struck - 2:
                # First, as an excluded one with a part is a new one. It may have left.
                if self.exclude is not None:
                    with contextlib.suppress(ValueError):
                        self.exclude(worker)
                self.excluded.add(worker)
                del self._strikes[worker]
                return True
            if struck > workers / 2:
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
