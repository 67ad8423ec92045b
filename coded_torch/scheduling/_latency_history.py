"""The latencies of parts, calls and estimates of a module on a pool, and the budget of hedges."""

import bisect
import math
import statistics
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._untuned import CALLS, ESTIMATES, PARTS, RETRY

_RESERVED = 1.25  # times the usual time are kept, so that few estimates are late
_LEAST = 32  # parts that have replied before the history is used
_REFIT = 32  # new parts after which the line through sizes is fitted again; a new size counts as 4
_GROUP = 8  # the least number of small parts, and of large parts, of a fit
# A smaller part that takes more than this share of the time is no use, as each may straggle: where
# rows take no time, four straggle four times as often as one (benchmarks/fleet.py).
_SPLIT_SHARE = 0.5
# A regression of n rows of d features, of which up to 4,096 rows are estimated together, takes
# 5e-3 + (3e-8 + 5e-11 d) n^2 seconds on one core (64 to 4,096 rows of 16 to 24,576 features, a
# quarter of them estimated; measured once, no benchmark keeps it). The factor of a machine, a
# module and its surrogates is measured by calls.
_FIT = 5e-3
_FIT_ROWS = 3e-8
_FIT_FEATURES = 5e-11
_TOGETHER = 4096
_FEW = 512  # rows, below which the mean takes as long as none
_LATE = 5e-3  # seconds by which a busy machine wakes a thread late (benchmarks/resilience.py)


class _Window:
    """The last latencies, and their ratios to the expected time of their rows, in order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: deque[tuple[int, float, float]] = deque()  # rows, seconds, ratio
        self.ordered: list[float] = []
        self.sizes = Counter[int]()  # how many entries have so many rows

    def extend(self, latencies: Iterable[tuple[int, float]], scale: Callable[[int], float]) -> None:
        """Add rows and seconds; ``scale`` returns the expected time of so many rows."""
        known: dict[int, float] = {}
        for rows, seconds in latencies:
            if rows not in known:
                known[rows] = scale(rows)
            ratio = seconds / known[rows]
            self.entries.append((rows, seconds, ratio))
            self.sizes[rows] += 1
            bisect.insort(self.ordered, ratio)
            if len(self.entries) > self.size:
                oldest, _, old_ratio = self.entries.popleft()
                self.sizes[oldest] -= 1
                if not self.sizes[oldest]:
                    del self.sizes[oldest]
                del self.ordered[bisect.bisect_left(self.ordered, old_ratio)]

    def rescale(self, scale: Callable[[int], float]) -> None:
        scales = {rows: scale(rows) for rows in self.sizes}
        self.entries = deque([(rows, s, s / scales[rows]) for rows, s, _ in self.entries])
        self.ordered = sorted([ratio for _, _, ratio in self.entries])


class History:
    """The latencies of parts and calls of one module on one pool, and the budget of hedges.

    A part without a good result, or a call that was not complete, counts as infinitely long.
    Latencies are compared after division by ``a + b rows``, a line through the medians of the small
    and the large parts. Fewer rows than ever seen are expected to take as long as the fewest seen,
    more rows proportionally longer. The last ``num_parts`` parts are remembered. Threads may share
    a history. A copy, or a history that was pickled, is empty. The cost is some ten microseconds
    per part.
    """

    def __init__(self, num_parts: int = PARTS) -> None:
        self._lock = threading.Lock()
        self._parts = _Window(num_parts)
        self._calls = _Window(CALLS)
        self._replied = self._unfitted = 0
        self._fewest = self.most_rows = 1  # the rows from, and up to, which the line is fitted
        self._slope = 0.0  # the share of the time of `most_rows` rows that grows with the rows
        self._debt = 0.0
        # The quantiles since parts were last added, by their arguments: a call asks for those of
        # the call before.
        self._known = dict[tuple[int, Sequence[float]], list[float]]()
        self._failures: deque[bool] = deque(maxlen=PARTS)
        self.estimates = EstimationTimes()

    def __reduce__(self) -> tuple[Any, ...]:
        return History, ()

    def add(
        self,
        parts: Sequence[tuple[int, float]],
        call: tuple[int, float] | None,
        failures: Iterable[bool] = (),
    ) -> None:
        """Remember the rows and seconds of each part that began, and whether each part failed.

        ``call`` holds the rows of the call's largest part and the call's seconds. It is None for a
        call that is not typical, which is not remembered. Parts that failed because of their rows
        are not among the ``failures``.
        """
        with self._lock:
            if parts and not self._parts.entries:
                self._fewest = self.most_rows = parts[0][0]
            self._parts.extend(parts, self._scale)
            for rows, seconds in parts:
                self._replied += seconds < math.inf
                is_known = self._fewest <= rows <= self.most_rows
                self._unfitted += 1 if is_known else _REFIT // _GROUP
            if call is not None:
                self._calls.extend([call], self._scale)
            self._known.clear()
            self._failures.extend(failures)
            if self._unfitted >= _REFIT:
                self._fit()

    def part(self, rows: int, quantile: float = 0.5, least: int = _LEAST) -> float:
        """Return a quantile of the durations of parts of ``rows`` rows, in seconds.

        It is infinite until ``least`` parts have replied.
        """
        with self._lock:
            return self._quantile(self._parts, quantile, least) * self._scale(rows)

    def quantiles(self, rows: int, shares: tuple[float, ...]) -> list[float]:
        """Return several quantiles, as :meth:`part` does."""
        with self._lock:
            found = self._known.get((rows, shares))
            if found is None:
                scale = self._scale(rows)
                found = [self._quantile(self._parts, share) * scale for share in shares]
                self._known[rows, shares] = found
            return found

    def num_hedges(self, rows: int, most: int) -> int:
        """Return how many parts to ask for in place of a late one, at most ``most``.

        It is 1 if smaller parts would hardly take less time.
        """
        with self._lock:
            size = -(-rows // max(1, most))
            is_known = self._fewest <= size and self._fewest < self.most_rows
            share = self._scale(size) / self._scale(rows)
            if is_known and share > _SPLIT_SHARE:
                return 1
            return max(1, most)

    def call(self, rows: int) -> float:
        """Return the median of calls whose largest part has so many rows, in seconds.

        Infinite until a call is known and 32 parts have replied, or if most were not complete.
        """
        with self._lock:
            return self._quantile(self._calls, 0.5) * self._scale(rows)

    def failure_rate(self, ended: Sequence[bool]) -> float:
        """Return the share of parts that fail. ``ended`` says which of the newest parts failed."""
        with self._lock:
            failed = sum(self._failures) + sum(ended)
            # One more of each, as a pool without failures may fail. The last parts weigh more, as
            # all workers may have broken now.
            lately = (failed + 1) / (len(self._failures) + len(ended) + 1)
        return max(lately, sum(ended) / len(ended) if ended else 0.0)

    def earn(self, budget: float) -> None:
        """Allow hedges to take ``budget`` of one more call's work."""
        with self._lock:
            self._debt = max(0.0, self._debt - budget)

    def spend(self, work: float, most: float) -> bool:
        """Return whether ``work``, in whole calls, may be hedged, and count it if so.

        Hedges may take at most ``most`` more than the budget that was earned.
        """
        with self._lock:
            is_allowed = self._debt + work <= most
            if is_allowed:
                self._debt += work
            return is_allowed

    def _quantile(self, window: _Window, q: float, least: int = _LEAST) -> float:
        index = int(q * len(window.ordered))
        if self._replied >= least and index < len(window.ordered):
            return window.ordered[index]
        return math.inf

    def _scale(self, rows: int) -> float:
        if rows > self.most_rows:
            return rows / self.most_rows
        return 1.0 + self._slope * (max(rows, self._fewest) / self.most_rows - 1.0)

    def _fit(self) -> None:
        """Fit the line through the medians of small and large parts, and rescale latencies."""
        self._unfitted = 0
        if self._parts.sizes.keys() == {self._fewest} == {self.most_rows}:
            return
        parts = sorted([(rows, seconds) for rows, seconds, _ in self._parts.entries])
        sizes = [rows for rows, _ in parts]
        fewest = sizes[0]
        most = sizes[-1]
        # Small parts end near the middle of all sizes, with enough parts on both sides.
        ends = [i for i in range(_GROUP, len(parts) - _GROUP + 1) if sizes[i - 1] < sizes[i]]
        end = min(ends, key=lambda i: abs(sizes[i - 1] + sizes[i] - fewest - most), default=0)
        x1, y1 = map(statistics.median_high, zip(*parts[end:], strict=True))
        if end and y1 < math.inf:
            x0, y0 = map(statistics.median_high, zip(*parts[:end], strict=True))
            # The share of the time that grows, first for x1 rows, then for `most` rows.
            share = 0.0
            if y1:
                share = min(1.0, max(0.0, (1 - y0 / y1) / (1 - x0 / x1)))
            self._slope = share * most / (share * most + (1 - share) * x1)
            self._fewest = fewest
            self.most_rows = most
        else:
            self._slope = 0.0
            self._fewest = x1
            self.most_rows = x1
        self._parts.rescale(self._scale)
        self._calls.rescale(self._scale)


class EstimationTimes:
    """The times that the latest estimates took, relative to a quiet core.

    Missing rows are estimated by regression or, if the deadline leaves no time, by the mean.
    """

    def __init__(self) -> None:
        self._factors = {by_mean: deque[float](maxlen=ESTIMATES) for by_mean in (False, True)}
        self._is_warm = False
        self._hurried = 0

    def add(self, seconds: float, rows: int, features: int, by_mean: bool) -> None:
        """Remember an estimate's time. The first one does not count, as it loads code."""
        if self._is_warm:
            self._factors[by_mean].append(seconds / _quiet_seconds(rows, features, by_mean))
        self._is_warm = True
        self._hurried += by_mean
        kept = list(self._factors[False])
        if kept and by_mean and self._hurried % RETRY == 0:  # one was slow by chance
            kept.remove(max(kept))  # not in place, as other calls may add
            self._factors[False] = deque(kept, ESTIMATES)

    def seconds(self, rows: int, features: int, by_mean: bool = False) -> float:
        """Return the seconds that estimating takes in 7 of 8 calls."""
        ordered = sorted(self._factors[by_mean])
        factor = 1.0
        if ordered:
            factor = ordered[7 * len(ordered) // 8]
        return factor * _quiet_seconds(rows, features, by_mean)

    def reserve(self, rows: int, features: int, deadline: float) -> tuple[bool, float]:
        """Return whether the mean must estimate, and the seconds to keep for estimates.

        At most half of the time to the deadline is kept; none if the deadline is infinite.
        """
        if deadline == math.inf:
            return False, 0.0
        for by_mean in (False, True):
            seconds = _RESERVED * self.seconds(rows, features, by_mean) + min(_LATE, deadline / 20)
            if seconds <= deadline / 2:
                return by_mean, seconds
        return True, max(deadline, 0.0) / 2


def _quiet_seconds(rows: int, features: int, by_mean: bool) -> float:
    if by_mean:
        return _FIT * max(1.0, rows / _FEW)
    blocks = -(-rows // _TOGETHER)
    return blocks * _FIT + (_FIT_ROWS + _FIT_FEATURES * features) * rows**2 / blocks
