r"""What became of one call of a wrapper."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["RunReport", "Timed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """How one call of a :class:`CodedWrapper` went; where it raised, as far as it had come.

    Attributes:
        num_workers: how many workers were asked: N, or 0 if it did not come to that, as the batch
            was empty or could not be coded.
        num_groups: G, into how many groups the batch was cut.
        received: the workers whose results were decoded, in increasing order.
        latencies: seconds until each worker that replied or failed had done so, in order.
        rejected: what was wrong with each of them that was not used.
        expected_rmse: the root mean squared error of the answers that the code expects, comparable
            to :func:`coded_torch.metrics.rmse` of the first decoded output; None where it cannot
            tell, and where the wrapper has a link, as it is then not in the units of the answers.
        encode_seconds: time spent on ordering, planning and encoding.
        compute_seconds: time spent on waiting for the workers and checking their results.
        decode_seconds: time spent on decoding and ungrouping.
        degraded: whether every answer is the mean of what was received, as that was not enough to
            decode.
        failed: whether the call raised; ``received`` are then those whose results were good.
    """

    num_workers: int = 0
    num_groups: int = 0
    received: tuple[int, ...] = ()
    latencies: Mapping[int, float] = dataclasses.field(default_factory=dict)
    rejected: Mapping[int, str] = dataclasses.field(default_factory=dict)
    expected_rmse: float | None = None
    encode_seconds: float = 0.0
    compute_seconds: float = 0.0
    decode_seconds: float = 0.0
    degraded: bool = False
    failed: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        """The workers whose results were not decoded: late, not waited for, or rejected."""
        return tuple(n for n in range(self.num_workers) if n not in self.received)


class Timed:
    """Puts the seconds that a block takes into ``facts[name]``, even if it raises."""

    def __init__(self, facts: dict[str, Any], name: str) -> None:
        self._facts, self._name = facts, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._facts[self._name] = time.perf_counter() - self._start
