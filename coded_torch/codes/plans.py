"""Plans: a code fitted to one batch, and the errors of a batch that cannot be decoded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import outside
from ..input_space.error_bounds import ErrorBounds
from ..input_space.gaussian_process import off_mean
from ..input_space.metrics import Choice
from ..input_space.ordering import Grouping
from ..input_space.regressor import MOST_ROWS

_SHOWN = 16  # missing results that the message lists


class NotEnoughResults(RuntimeError):  # noqa: N818 - the name says what happened
    """Fewer results arrived than can be decoded.

    A code numbers results by its workers, the call of a wrapper by rows of the batch or by columns.

    Attributes:
        received, missing: the results that arrived, and the others, in increasing order.
        required, num_workers: the number of results that are needed, and of all: N, or the rows.
        reason: why the others did not arrive, in a few words, if that is known.
        report: the report of a wrapper's call. Defaults to None.
        answers: the answers that a wrapper's call has computed by rows, in the structure of the
            answer. The other rows are NaN, or 0 in integers. Defaults to None.
    """

    def __init__(
        self, received: Sequence[int], required: int, num_workers: int, reason: str = ""
    ) -> None:
        self.received, self.required = tuple(sorted(received)), required
        self.num_workers, self.reason = num_workers, reason
        self.missing = tuple(sorted(set(range(num_workers)) - set(received)))
        self.report: Any = None
        self.answers: Any = None
        more = len(self.missing) - _SHOWN
        super().__init__(
            (f"{reason}; " if reason else "")  # first, as the cause
            + f"at least {required} of {num_workers} results are needed, got {len(self.received)}; "
            f"missing: {list(self.missing[:_SHOWN])}" + (f" and {more} more" if more > 0 else "")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"report": self.report, "answers": self.answers}
        return type(self), (self.received, self.required, self.num_workers, self.reason), state


class DeadlineExceeded(NotEnoughResults, TimeoutError):  # noqa: N818 - as above
    """The deadline of a call has passed before enough results arrived to estimate the others."""


class BatchPlan:
    """A code fitted to one batch; this class is the plan of a :class:`FixedCode`.

    Attributes:
        code: the code.
        batch_size, num_groups: B and G.
        choices: the choices by which missing answers of the output decoded last were estimated.
    """

    choices: tuple[Choice, ...] = ()

    def __init__(self, code: Any, grouping: Grouping) -> None:
        self.code, self._grouping = code, grouping
        self.batch_size, self.num_groups = grouping.batch_size, grouping.num_groups

    @property
    def note(self) -> str:
        """A warning about the plan, in one line, or an empty text."""
        return ""

    def encode(self, values: Tensor) -> Tensor:
        """Return every worker's coded inputs, ``[N, G, ...]``, of the batch, ``[B, ...]``."""
        coded: Tensor = self.code.encoder.gathered(values, self._grouping)
        return coded

    def decode(self, results: Tensor, received: Any, search: bool = True) -> Tensor:
        """Return the answers of the batch, ``[B, ...]``.

        ``received`` are the workers of the results, ``[|F|, G, ...]``: strictly increasing, and at
        least :attr:`~coded_torch.codes.Code.min_received`.
        """
        answered: Tensor = self.code.decoder(received).scattered(results, self._grouping)
        return answered

    def source(self, received: Sequence[int]) -> Tensor:
        """Return the result that is each input's own, ``[B]``: a flat index ``[|F|, G]``, or -1."""
        with outside():
            of_group = self.code.source(received)[:, None]  # [K, 1]
            flat = of_group * self.num_groups + torch.arange(self.num_groups)
            return self._grouping.scatter(torch.where(of_group >= 0, flat, -1))

    def left_out_squares(self, received: Sequence[int], *values: Tensor) -> list[float]:
        """Return the sums of squared errors of estimating values ``[|F| G, C]`` by their mean."""
        with outside():
            return [float(off_mean(x).square().sum()) for x in values]

    def error_bounds(self, *_: Any, **__: Any) -> ErrorBounds | None:
        """Return the error bounds of estimated answers, as a ``RowPlan``; None without any."""
        return None


def cut(rows: Tensor, multiple: int) -> list[Tensor]:
    """Cut rows into as few parts of at most 4,096 as whole groups of ``multiple`` allow."""
    if len(rows) <= MOST_ROWS:
        return [rows]
    groups = -(-len(rows) // multiple)
    parts = -(-groups // max(1, MOST_ROWS // multiple))
    ends = [multiple * (groups * i // parts) for i in range(1, parts)]
    return [*rows.tensor_split(ends)]
