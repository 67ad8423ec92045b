"""How long batches take: the median, by their rows."""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Durations"]

_BATCHES = 64  # that are remembered
_LEAST = 8  # before anything is said


class Durations:
    """The line ``a n + b`` through the medians of small and of large batches, of recent ones.

    The median, not a line that most stay below: what is refused by that is refused too early.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[int, float]] = deque(maxlen=_BATCHES)
        self._slope = self._at_zero = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """Remember a batch."""
        self._batches.append((rows, seconds))
        if len(self._batches) < _LEAST:
            return
        ordered = sorted(self._batches)
        half = len(ordered) // 2
        (x0, y0), (x1, y1) = (
            (statistics.median(x for x, _ in part), statistics.median(y for _, y in part))
            for part in (ordered[:half], ordered[half:])
        )
        self._slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
        middle = statistics.median(y - self._slope * x for x, y in ordered)
        self._at_zero = max(0.0, middle)

    def __call__(self, rows: int) -> float:
        """The median of batches of so many rows, in seconds; 0 until eight are known."""
        return self._at_zero + self._slope * rows
