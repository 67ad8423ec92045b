"""The times that estimates of missing rows took, and what to keep for them before a deadline."""

import math
from collections import deque

_REMEMBERED = 16  # estimates; not tuned
# Estimates by the mean, after which the slowest regression is forgotten; not tuned.
_RETRY = 32
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
_RESERVED = 1.25  # times the usual time are kept, so that few estimates are late; not tuned


class EstimationTimes:
    """The times that the latest estimates took, relative to a quiet core.

    Missing rows are estimated by regression or, if the deadline leaves no time, by the mean.
    """

    def __init__(self) -> None:
        self._factors = {by_mean: deque[float](maxlen=_REMEMBERED) for by_mean in (False, True)}
        self._is_warm = False
        self._hurried = 0

    def add(self, seconds: float, rows: int, features: int, by_mean: bool) -> None:
        """Remember an estimate's time. The first one does not count, as it loads code."""
        if self._is_warm:
            self._factors[by_mean].append(seconds / _quiet_seconds(rows, features, by_mean))
        self._is_warm = True
        self._hurried += by_mean
        kept = list(self._factors[False])
        if kept and by_mean and self._hurried % _RETRY == 0:  # one was slow by chance
            kept.remove(max(kept))  # not in place, as other calls may add
            self._factors[False] = deque(kept, _REMEMBERED)

    def seconds(self, rows: int, features: int, by_mean: bool = False) -> float:
        """Return the seconds that estimating takes in 7 of 8 calls."""
        ordered = sorted(self._factors[by_mean])
        factor = ordered[7 * len(ordered) // 8] if ordered else 1.0
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
