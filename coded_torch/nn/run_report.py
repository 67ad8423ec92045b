r"""What became of one call of a wrapper."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["RunReport"]


@dataclasses.dataclass(frozen=True)
class RunReport:
    """How one call of a :class:`CodedWrapper` went.

    Attributes:
        num_workers: N.
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
    """

    num_workers: int
    num_groups: int
    received: tuple[int, ...]
    latencies: Mapping[int, float]
    rejected: Mapping[int, str]
    expected_rmse: float | None
    encode_seconds: float
    compute_seconds: float
    decode_seconds: float
    degraded: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        """The workers whose results were not decoded: late, not waited for, or rejected."""
        return tuple(n for n in range(self.num_workers) if n not in self.received)
