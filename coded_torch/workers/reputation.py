r"""What is known of machines after many requests."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping
from typing import Any

from .._arguments import positive, real

__all__ = ["Reputation"]

_LARGEST = 1e9


class Reputation:
    r"""A running sum of scores per machine, which shows lies too small for one request.

    Of each machine the sum :math:`c \leftarrow \max(0, c + z - k)` is kept, Page's CUSUM, where z
    is its score in a request, about standard normal if it is honest. The machine is named when its
    sum exceeds a threshold, so high that it happens to an honest one in ``false_alarms`` of all
    requests at most: to one of 22 machines every 4,500 requests at 1e-5.

    Use it with :attr:`Report.scores <coded_torch.nn.Report.scores>` of a wrapper that looks for
    adversaries::

        def on_run(report):
            for machine in reputation.update(report.scores):
                pool.exclude(machine)

    Args:
        false_alarms: how often an honest machine is named, per request.
        drift: k, half the z that is to be noticed soonest.

    Attributes:
        sums: c by machine.
        threshold: what c must exceed.

    Raises:
        TypeError, ValueError: an argument is no number between 0 and 1, or not positive.

    Note:
        Threads may share it. By Siegmund's approximation of the threshold, normal scores would
        exceed it half as often as it says; real ones have heavier tails.

    References:
        Page, "Continuous inspection schemes", Biometrika 1954. Siegmund, *Sequential Analysis*,
        1985, section 2.6.

    Example:
        >>> from coded_torch.workers import Reputation
        >>> reputation = Reputation()
        >>> [reputation.update({3: 0.2, 7: 4.0}) for _ in range(4)]
        [(), (), (7,), (7,)]
    """

    def __init__(self, false_alarms: float = 1e-5, drift: float = 0.5) -> None:
        self.false_alarms = real(
            self, "false_alarms", false_alarms, "between 0 and 1", lambda p: 0 < p < 1
        )
        self.drift = positive(self, "drift", drift)
        self.threshold = _threshold(self.false_alarms, self.drift)
        self.sums: dict[int, float] = {}
        self._lock = threading.Lock()

    def update(self, scores: Mapping[int, float]) -> tuple[int, ...]:
        """Add the scores of one request; returns the machines that are named now.

        Args:
            scores: z by machine; that of a machine which has none stays as it is.
        """
        with self._lock:
            for machine, z in scores.items():
                total = self.sums.get(machine, 0.0) + min(z, _LARGEST) - self.drift
                self.sums[machine] = max(0.0, total)
            return tuple(sorted(m for m in scores if self.sums[m] > self.threshold))

    def forget(self, machine: int) -> None:
        """Let a machine begin anew, such as one that has been restarted."""
        with self._lock:
            self.sums.pop(machine, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self) -> str:
        return f"Reputation(false_alarms={self.false_alarms:g}, drift={self.drift:g})"


@functools.cache
def _threshold(false_alarms: float, drift: float) -> float:
    """Where the mean number of requests to a false alarm of normal scores is twice as many.

    Those of real machines have heavier tails. Siegmund: it is
    :math:`(e^{2 k b} - 2 k b - 1) / 2 k^2` with :math:`b = h + 1.166`.
    """
    low, high = 0.0, 1.0
    while _run_length(high, drift) < 2 / false_alarms:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _run_length(middle, drift) < 2 / false_alarms else (low, middle)
        )
    return high


def _run_length(threshold: float, drift: float) -> float:
    width = 2 * drift * (threshold + 1.166)
    return math.inf if width > 700 else (math.exp(width) - width - 1) / (2 * drift**2)
