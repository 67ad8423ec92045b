"""A test over many calls of whether rows are missing at random."""

import bisect
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

# The probability of a false alarm, ever, and the number of calls by which it is least conservative;
# the second is not tuned.
_FALSE_ALARM = 0.01
_TIGHTEST = 8


class Exchangeability:
    """Tests whether rows that are hard to estimate come later than others.

    In each call, the latencies of parts are ranked, and how odd their results look where they are
    left out. As long as latencies do not depend on content, every order of the latencies among
    parts of one size is equally likely, which gives the rank correlation its mean, 0, and its
    variance. The sum over calls is compared with the boundary of a normal mixture, which it exceeds
    with a probability of about .01, however many calls there are. Threads may share a test.

    Reference:
        Robbins, "Statistical methods related to the law of the iterated logarithm", 1970.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._sum = 0.0

    def add(self, parts: Iterable[tuple[int, float, float]]) -> int:
        """Take the rows, seconds and oddness of the parts of a call.

        Return the number of calls if rows are not missing at random, else 0.
        """
        groups = defaultdict[int, list[tuple[float, float]]](list)
        for rows, *pair in parts:
            groups[rows].append((pair[0], pair[1]))
        product = variance = 0.0
        for pairs in groups.values():
            late, odd = (_ranks(values) for values in zip(*pairs, strict=True))
            product += sum(x * y for x, y in zip(late, odd, strict=True))
            squares = math.prod(sum(x * x for x in ranks) for ranks in (late, odd))
            variance += squares / max(1, len(pairs) - 1)
        with self._lock:
            if variance > 0:
                self._calls += 1
                self._sum += product / math.sqrt(variance)
            total = self._calls + _TIGHTEST
            # On one side, twice the probability of both.
            boundary = math.log(total / _TIGHTEST) - 2 * math.log(2 * _FALSE_ALARM)
            return self._calls if self._sum > math.sqrt(total * boundary) else 0


def _ranks(values: Sequence[float]) -> list[int]:
    """Return twice the ranks of values less their mean; equal values have equal ranks."""
    order = sorted(values)
    ends = bisect.bisect_left, bisect.bisect_right
    return [sum(end(order, x) for end in ends) - len(order) for x in values]
