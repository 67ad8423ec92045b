"""What codes raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DeadlineExceeded", "NotEnoughResults"]

_SHOWN = 16  # of the missing results, in the message


class NotEnoughResults(RuntimeError):  # noqa: N818 - the name says what happened
    """Fewer results arrived than can be decoded.

    Results are numbered as what was asked for: those of a code by its workers, those of a call of a
    wrapper by the rows of its batch, or by the columns.

    Args:
        received: the results that arrived, in any order.
        required: how many are needed.
        num_workers: how many there would be: N, or the number of rows.
        reason: why the others did not arrive, in a few words, if that is known.

    Attributes:
        received: the results that arrived, in increasing order.
        required: how many are needed.
        num_workers: as given.
        reason: as given.
        missing: the results that did not arrive, in increasing order.
        report: of the call of a wrapper; None elsewhere.
        answers: what the call has computed, in the structure of its answer, NaN (0 in integers) in
            the other rows; None where nothing is, and by columns.
    """

    def __init__(
        self, received: Sequence[int], required: int, num_workers: int, reason: str = ""
    ) -> None:
        self.received = tuple(sorted(received))
        self.required = required
        self.num_workers = num_workers
        self.reason = reason
        self.missing = tuple(sorted(set(range(num_workers)) - set(received)))
        self.report: Any = None
        self.answers: Any = None
        more = len(self.missing) - _SHOWN
        super().__init__(
            f"decoding needs at least {required} of {num_workers} results, "
            f"got {len(self.received)}; missing: {list(self.missing[:_SHOWN])}"
            + (f" and {more} more" if more > 0 else "")
            + (f"; {reason}" if reason else "")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"report": self.report, "answers": self.answers}
        return type(self), (self.received, self.required, self.num_workers, self.reason), state


class DeadlineExceeded(NotEnoughResults, TimeoutError):  # noqa: N818 - as above
    """The deadline of a call has passed, and too few results are there to predict the others."""
