"""How long parts, calls and predictions took lately, which says what is late."""

from __future__ import annotations

import bisect
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["CHUNKS", "History", "PredictionTimes"]

# None of the numbers of parts below was tuned: more parts follow changes more slowly, fewer make
# thresholds noisier.
_PARTS, _CALLS = 512, 128  # remembered
_LEAST = 32  # parts that have replied before the history is believed
_REFIT = 32  # parts, at most _LEAST, after which the line through sizes is fitted again
_GROUP = 8  # parts of few rows, and of many, that the fit needs at least
_ENDED = 512  # parts of which it is remembered how many failed
# A part is late beyond three standard deviations of a lognormal body (99.9 %), whose lower half
# stragglers do not touch: 3 / 0.6745 = 4.45 in powers of median / lower quartile. 1.5 medians at
# least, which trades work on calm workers against latency: benchmarks/waiting.py has 1.2 to 2.
_TAIL, _LEAST_TAIL = 4.45, 1.5


class _Window:
    """The last latencies, in the order of their ratios to the time their rows should take."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: deque[tuple[int, float, float]] = deque()  # rows, seconds, ratio
        self.ordered: list[float] = []

    def add(self, rows: int, seconds: float, scale: float) -> None:
        ratio = seconds / scale
        self.entries.append((rows, seconds, ratio))
        bisect.insort(self.ordered, ratio)
        if len(self.entries) > self.size:
            del self.ordered[bisect.bisect_left(self.ordered, self.entries.popleft()[2])]

    def rescale(self, scale: Callable[[int], float]) -> None:
        scales = {rows: scale(rows) for rows in {rows for rows, _, _ in self.entries}}
        self.entries = deque([(rows, s, s / scales[rows]) for rows, s, _ in self.entries])
        self.ordered = sorted([ratio for _, _, ratio in self.entries])

    def quantile(self, q: float) -> float:
        return self.ordered[int(q * len(self.ordered))] if self.ordered else math.inf


class History:
    """The latencies of parts and calls of one module on one pool, and the work that was hedged.

    A part never seen to end, or a call that was not complete, counts as infinitely long. Latencies
    are compared after division by ``a + b rows``, a line through the medians of the small and the
    large parts. Fewer rows than ever seen are taken to last as long as the fewest seen, more rows
    proportionally longer. Threads may share a history; a copy, or one that was pickled, is empty.

    Args:
        num_parts: the number of parts that are remembered. Defaults to 512.

    Attributes:
        predictions: the times that predictions took.

    Note:
        Ten microseconds a part.
    """

    def __init__(self, num_parts: int = _PARTS) -> None:
        self._lock = threading.Lock()
        self._parts, self._calls = _Window(num_parts), _Window(_CALLS)
        self._replied = self._unfitted = 0
        self._fewest = self._most = 1  # rows
        self._slope = 0.0  # the share of the time of `_most` rows that grows with the rows
        self._debt = 0.0
        self._failures: deque[bool] = deque(maxlen=_ENDED)
        self.predictions = PredictionTimes()

    def __reduce__(self) -> tuple[Any, ...]:
        return History, ()

    def add(self, parts: Iterable[tuple[int, float]], call: tuple[int, float] | None) -> None:
        """Remember a call.

        Args:
            parts: rows and seconds of the parts that began, infinite if never seen to end.
            call: the rows of its largest part, and seconds, infinite if it was not complete. None
                if the call is no measure of others.
        """
        with self._lock:
            for rows, seconds in parts:
                if not self._parts.entries:
                    self._fewest = self._most = rows
                self._parts.add(rows, seconds, self._scale(rows))
                self._replied += seconds < math.inf
                known = self._fewest <= rows <= self._most
                self._unfitted += 1 if known else _REFIT // _GROUP
            if call is not None:
                self._calls.add(*call, self._scale(call[0]))
            if self._unfitted >= _REFIT:
                self._fit()

    @property
    def most_rows(self) -> int:
        """The rows up to which the line is fitted."""
        return self._most

    def part(self, rows: int, quantile: float = 0.5) -> float:
        """Return a quantile of parts of so many rows in seconds; infinite until 32 have replied."""
        with self._lock:
            return self._parts.quantile(quantile) * self._scale(rows) if self._known() else math.inf

    def hedging_threshold(self, rows: int) -> float:
        r"""Return the seconds after which a part of so many rows is late.

        With the median m and the lower quartile q of parts, :math:`m \max(1.5, (m / q)^{4.45})`.
        Infinite until 32 parts have replied.
        """
        with self._lock:
            median, quartile = self._parts.quantile(0.5), self._parts.quantile(0.25)
            if not self._known() or median == math.inf:
                return math.inf
            tail = (median / quartile) ** _TAIL if quartile else _LEAST_TAIL
            return median * max(_LEAST_TAIL, tail) * self._scale(rows)

    def call(self, rows: int) -> float:
        """Return the median of calls whose largest part has so many rows, in seconds.

        Infinite until a call is known and 32 parts have replied, or if most were not complete.
        """
        with self._lock:
            return self._calls.quantile(0.5) * self._scale(rows) if self._known() else math.inf

    def failed(self, failed: int, ended: int) -> None:
        """Remember how many of the parts that ended failed, for no reason that lies in them."""
        with self._lock:
            self._failures.extend([True] * failed + [False] * (ended - failed))

    def failing(self) -> tuple[int, int]:
        """Return how many parts failed lately, and how many ended."""
        with self._lock:
            return sum(self._failures), len(self._failures)

    def earn(self, budget: float) -> None:
        """Allow ``budget`` of one more call's work to be hedged."""
        with self._lock:
            self._debt = max(0.0, self._debt - budget)

    def spend(self, work: float, most: float) -> bool:
        """Return whether ``work``, in whole calls, may be hedged; ``most`` without any earned."""
        with self._lock:
            if self._debt + work > most:
                return False
            self._debt += work
            return True

    def _known(self) -> bool:
        return self._replied >= _LEAST

    def _scale(self, rows: int) -> float:
        """Return the share of the time of ``_most`` rows that these should take."""
        if rows > self._most:
            return rows / self._most
        return 1.0 + self._slope * (max(rows, self._fewest) / self._most - 1.0)

    def _fit(self) -> None:
        self._unfitted = 0
        parts = sorted([(rows, seconds) for rows, seconds, _ in self._parts.entries])
        sizes = [rows for rows, _ in parts]
        fewest, most = sizes[0], sizes[-1]
        if fewest == most == self._most == self._fewest:
            return
        # Where small parts end: near the middle, but with enough on both sides.
        ends = [i for i in range(_GROUP, len(parts) - _GROUP + 1) if sizes[i - 1] < sizes[i]]
        end = min(ends, key=lambda i: abs(sizes[i - 1] + sizes[i] - fewest - most), default=0)
        x0, y0 = _medians(parts[:end])
        x1, y1 = _medians(parts[end:])
        if end and y1 < math.inf:
            # Of x1 rows, the share of the time that grows, then that of `most` rows.
            share = min(1.0, max(0.0, (1 - y0 / y1) / (1 - x0 / x1))) if y1 else 0.0
            slope = share * most / (share * most + (1 - share) * x1)
        else:
            slope, fewest, most = 0.0, x1, x1
        self._slope, self._fewest, self._most = slope, fewest, most
        self._parts.rescale(self._scale)
        self._calls.rescale(self._scale)


def _medians(parts: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the medians of rows and of seconds."""
    if not parts:
        return 0, 0.0
    rows, seconds = map(sorted, zip(*parts, strict=True))
    return rows[len(parts) // 2], seconds[len(parts) // 2]


#: Rows that are predicted together, the most exact first; 0: each by the mean of all results.
CHUNKS = 4096, 512, 0
_REMEMBERED = 16  # predictions; not tuned
_RETRY = 32  # calls without time for a regression, after which the slowest one is forgotten
# Seconds that a regression of n rows takes, 5e-3 + 6e-8 n^2 on one quiet core (an x86 of 2023; 64,
# 512 and 4,096 rows of 784 features, a third of them predicted; benchmarks/batches.py). The factor
# of a worker, a module and its surrogates is measured call by call.
_FIT, _FIT_ROWS = 5e-3, 6e-8
# A busy worker wakes a thread up to 5 ms late (benchmarks/promises.py, "deadline").
_LATE = 5e-3
_RESERVED = 1.25  # of the usual time, so that few predictions are late


class PredictionTimes:
    """How long predictions took lately, in proportion to those of a quiet core."""

    def __init__(self) -> None:
        self._factors: deque[float] = deque(maxlen=_REMEMBERED)
        self._warm, self._hurried = False, 0

    def add(self, seconds: float, rows: int, chunk: int) -> None:
        """Remember how long it took to predict; not for the first time, as code is loaded then."""
        if not chunk:
            # A regression that was slow by chance must not rule out all others.
            self._hurried += 1
            if self._hurried % _RETRY == 0 and self._factors:
                self._factors.remove(max(self._factors))
            return
        if self._warm:
            self._factors.append(seconds / _quiet_seconds(rows, chunk))
        self._warm = True

    def seconds(self, rows: int, chunk: int = CHUNKS[0]) -> float:
        """Return the seconds that predicting takes in seven of eight calls.

        Args:
            rows: B.
            chunk: rows that are predicted together.
        """
        ordered = sorted(self._factors)
        factor = ordered[7 * len(ordered) // 8] if ordered else 1.0
        return factor * _quiet_seconds(rows, chunk)

    def reserve(self, rows: int, deadline: float) -> tuple[int, float]:
        """Return how many rows to predict together, and how many seconds to keep for that.

        At most half of the time to the deadline is kept; none if that is infinite.
        """
        if deadline == math.inf:
            return CHUNKS[0], 0.0
        for chunk in CHUNKS[:-1]:
            seconds = _RESERVED * self.seconds(rows, chunk) + min(_LATE, deadline / 20)
            if seconds <= deadline / 2:
                return chunk, seconds
        return 0, min(self.seconds(1), max(deadline, 0.0) / 2)


def _quiet_seconds(rows: int, chunk: int) -> float:
    chunks = -(-rows // chunk)
    return chunks * _FIT + _FIT_ROWS * rows**2 / chunks
