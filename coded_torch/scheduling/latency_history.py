"""How long parts and whole calls took lately, which says what is late."""

from __future__ import annotations

import bisect
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["CHUNKS", "History"]

_PARTS, _CALLS = 512, 128  # that are remembered
_LEAST = 32  # parts that have replied, before the history is believed
_REFIT = 32  # parts, at most _LEAST, after which the time that a row takes is fitted again
_GROUP = 8  # parts of few rows, and of many, at least, that the fit needs
_DECODINGS = 16  # that are remembered
_ENDED = 512  # parts, of which it is remembered how many failed
# Seconds that KernelCode's regression takes for n rows, 5e-3 + 6e-8 n^2 on one quiet core (an x86
# of 2023; 64, 512 and 4,096 rows of 784 features, a third of them predicted). What a machine, a
# module and its surrogates make of it is measured call by call, as a factor.
_FIT, _FIT_ROWS = 5e-3, 6e-8
_RETRY = 32  # calls that had no time for a regression, after which the slowest one is forgotten
_LATE = 5e-3  # seconds by which a busy machine wakes a thread too late
CHUNKS = 4096, 512  # rows of one regression, the most exact first; the last resort is the mean


class _Window:
    """The last so many latencies, in the order of their ratios to what their rows should take."""

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
    """How long parts, calls and predictions took lately, and how much was asked again.

    Remembers the last 512 parts and 128 calls; a part never seen to end, or a call that was not
    complete, counts as infinitely long. Latencies are compared after division by
    ``a + b rows``, a line through the medians of the small and the large parts; fewer rows than
    ever seen are taken to last as long as the fewest seen, more as long in proportion. Threads may
    share it; pickled or copied, it is empty.

    Args:
        num_parts: how many parts are remembered.

    Note:
        Some ten microseconds a part.
    """

    def __init__(self, num_parts: int = _PARTS) -> None:
        self._lock = threading.Lock()
        self._parts, self._calls = _Window(num_parts), _Window(_CALLS)
        self._replied = self._unfitted = 0
        self._fewest = self._most = 1  # rows
        self._slope = 0.0  # the share of the time of `_most` rows that grows with the rows
        self._debt = 0.0
        self._decodings: deque[float] = deque(maxlen=_DECODINGS)
        self._warm, self._hurried = False, 0
        self._failures: deque[bool] = deque(maxlen=_ENDED)

    def __reduce__(self) -> tuple[Any, ...]:
        return History, ()

    def add(self, parts: Iterable[tuple[int, float]], call: tuple[int, float] | None) -> None:
        """Remember a call.

        Args:
            parts: rows and seconds, infinite if never seen to end, of the parts that began.
            call: the rows of its largest part, and seconds, infinite if it was not complete; None
                if it is no measure of others.
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
        """A quantile of parts of so many rows, in seconds; infinite until 32 have replied."""
        with self._lock:
            return self._parts.quantile(quantile) * self._scale(rows) if self._known() else math.inf

    def fence(self, rows: int) -> float:
        r"""Seconds after which a part of so many rows is asked again.

        With the median m and the lower quartile q of parts, :math:`m \max(1.5, (m / q)^{4.45})`:
        the upper tail of a lognormal body, by its lower half, which stragglers do not touch.
        Infinite until 32 parts have replied.
        """
        with self._lock:
            median, quartile = self._parts.quantile(0.5), self._parts.quantile(0.25)
            if not self._known() or median == math.inf:
                return math.inf
            tail = (median / quartile) ** 4.45 if quartile else 1.5
            return median * max(1.5, tail) * self._scale(rows)

    def call(self, rows: int) -> float:
        """The median of calls whose largest part has so many rows, in seconds.

        Infinite until one is known and 32 parts have replied, and where most were not complete.
        """
        with self._lock:
            return self._calls.quantile(0.5) * self._scale(rows) if self._known() else math.inf

    def decoded(self, seconds: float, rows: int, chunk: int) -> None:
        """Remember how long predicting took, as :meth:`decoding` is asked for it.

        But for the first time, when code is loaded.
        """
        with self._lock:
            if self._warm:
                self._decodings.append(seconds / _predicting(rows, chunk))
            self._warm = True

    def hurried(self) -> None:
        """Remember that there was no time for a regression: one that was slow by chance must not
        rule out all others."""
        with self._lock:
            self._hurried += 1
            if self._hurried % _RETRY == 0 and self._decodings:
                self._decodings.remove(max(self._decodings))

    def decoding(self, rows: int, chunk: int = CHUNKS[0]) -> float:
        """Seconds that predicting takes, in seven of eight calls.

        Args:
            rows: B.
            chunk: the rows that a regression is of at most; a larger batch takes several.
        """
        with self._lock:
            ordered = sorted(self._decodings)
        factor = ordered[7 * len(ordered) // 8] if ordered else 1.0
        return factor * _predicting(rows, chunk)

    def reserve(self, rows: int, deadline: float) -> float:
        """Seconds to keep for predicting, before a deadline of so many: at most half of them.

        None where the deadline is infinite, as nothing takes real time then.
        """
        if deadline == math.inf:
            return 0.0
        for chunk in CHUNKS:
            seconds = 1.25 * self.decoding(rows, chunk) + min(_LATE, deadline / 20)
            if seconds <= deadline / 2:
                return seconds
        return min(self.decoding(1), deadline / 2)

    def failed(self, failed: int, ended: int) -> None:
        """Remember how many of the parts that ended failed, for no reason that lies in them."""
        with self._lock:
            self._failures.extend([True] * failed + [False] * (ended - failed))

    def failing(self) -> tuple[int, int]:
        """How many parts failed lately, and how many ended."""
        with self._lock:
            return sum(self._failures), len(self._failures)

    def earn(self, extra: float) -> None:
        """One more call, which allows for ``extra`` of its work to be asked again."""
        with self._lock:
            self._debt = max(0.0, self._debt - extra)

    def spend(self, work: float, most: float) -> bool:
        """Whether ``work``, in whole calls, may be asked again; ``most`` without earning any."""
        with self._lock:
            if self._debt + work > most:
                return False
            self._debt += work
            return True

    def _known(self) -> bool:
        return self._replied >= _LEAST

    def _scale(self, rows: int) -> float:
        """Of the time of ``_most`` rows, the share that these should take."""
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


def _predicting(rows: int, chunk: int) -> float:
    """What a regression takes on a quiet core."""
    chunks = -(-rows // chunk)
    return chunks * _FIT + _FIT_ROWS * rows**2 / chunks


def _medians(parts: list[tuple[int, float]]) -> tuple[int, float]:
    """Of rows and of seconds."""
    if not parts:
        return 0, 0.0
    rows, seconds = map(sorted, zip(*parts, strict=True))
    return rows[len(parts) // 2], seconds[len(parts) // 2]
