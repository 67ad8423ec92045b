r"""The two ways to divide a batch into the parts that workers are asked for: rows and columns."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..codes.base import Code
from ..scheduling.latency_history import CHUNKS, PredictionTimes
from ..workers.base import Task
from .inputs import Inputs

if TYPE_CHECKING:
    from ..codes.plans import BatchPlan
    from ..input_space.regression import Regression, RowPlan

__all__ = ["Columns", "Division", "Rows"]

# Seconds by which answers are rather late than worse: a busy machine wakes a thread as much too
# late (benchmarks/promises.py, "deadline").
_SLACK = 5e-3


class Division:
    """A batch as units that can be asked for one by one; a part is some of them.

    Args:
        inputs: of the call.
        leaves: of the inputs; what is divided is ``[units, R, ...]``.
        num_units: the number of units.
        unit_rows: R, the rows of a unit.
        out_dims: of the module.

    Attributes:
        task: the call of the module that computes units.
        first: the units of each part that is asked for first.
        spare: the columns that are not among these, and can stand in for any; None for rows.
        needed: the number of units with a result that complete the call.
        least: the number of units that can be decoded at all.
        batch_size: B
        num_groups: G; 0 for rows.
        not_finite: bool ``[units, R]``, the rows of every unit whose inputs are not finite; None if
            there is no such row.
    """

    first: Sequence[Sequence[int]]
    spare: Sequence[int] | None = None
    needed: int
    least: int
    num_groups = 0
    not_finite: Tensor | None = None

    def __init__(
        self, inputs: Inputs, leaves: list[Any], num_units: int, unit_rows: int, out_dims: Any
    ) -> None:
        self.batch_size = inputs.batch_size
        self.task = Task(
            leaves,
            inputs.dims,
            inputs.spec,
            num_units=num_units,
            unit_rows=unit_rows,
            device=inputs.device,
            out_dims=out_dims,
        )

    @property
    def by_rows(self) -> bool:
        return self.spare is None

    def plan(self) -> BatchPlan | RowPlan:
        """Return how results become answers, fitted to the batch."""
        raise NotImplementedError

    def is_whole(self, received: Sequence[int]) -> bool:
        """Return whether the results of these units are the answers as they are."""
        return False

    def of_units(self, values: Tensor, units: Sequence[int]) -> Tensor:
        """Return some values of the batch, ``[B, ...]``, for units that repeat it: [F, R, ...]."""
        raise NotImplementedError


class Columns(Division):
    """The N coded inputs of every group: each column is a row for each of the G groups.

    Args:
        inputs: of the call.
        code: the code.
        num_stragglers: S; N - S results are waited for.
        all_at_once: whether the other S columns are asked for at once too.
        dealer: the order of asking is drawn from it; None: column n is asked for as the n-th.
        out_dims: of the module.
    """

    def __init__(
        self,
        inputs: Inputs,
        code: Code,
        *,
        num_stragglers: int,
        all_at_once: bool,
        dealer: random.Random | None,
        out_dims: Any,
    ) -> None:
        n, floating = code.num_workers, inputs.floating()
        self._plan = plan = code.plan(
            floating,
            num_stragglers,
            batch_size=inputs.batch_size,
            others=[] if floating else inputs.batches(),
        )
        leaves = [
            leaf if dim is None else plan.encode(leaf.movedim(dim, 0) if dim else leaf)
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        super().__init__(inputs, leaves, n, plan.num_groups, out_dims)
        self.num_groups = plan.num_groups
        if inputs.not_finite is not None:
            self.not_finite = plan.encode(inputs.not_finite)
        self.needed, self.least = n - num_stragglers, code.min_received
        # The columns asked for first are spread evenly over the curve.
        chosen = list(range(n))
        if not all_at_once:
            chosen = [i * n // self.needed for i in range(self.needed)]
        spare = [] if len(chosen) == n else sorted(set(range(n)) - set(chosen))
        if dealer is not None:
            dealer.shuffle(chosen)
            dealer.shuffle(spare)
        self.first, self.spare = [(column,) for column in chosen], spare

    def plan(self) -> BatchPlan:
        return self._plan

    def of_units(self, values: Tensor, units: Sequence[int]) -> Tensor:
        return self._plan.encode(values)[list(units)]


class Rows(Division):
    """The rows of the batch, each of which is asked for once.

    Nothing is fitted before a row is missing.

    Args:
        inputs: of the call.
        predictor: of missing rows.
        chunk: rows that are predicted together; 0: each by the mean of all results.
        parts: into how many parts the batch is divided at most.
        out_dims: of the module.
    """

    def __init__(
        self, inputs: Inputs, predictor: Regression, *, chunk: int, parts: int, out_dims: Any
    ) -> None:
        size = inputs.batch_size
        leaves = [
            leaf if dim is None else leaf.movedim(dim, 0).unsqueeze(1)  # [B, 1, ...]
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        super().__init__(inputs, leaves, size, 1, out_dims)
        self._inputs, self._predictor, self.chunk = inputs, predictor, chunk
        self.needed, self.least = size, 1
        if inputs.not_finite is not None:
            self.not_finite = inputs.not_finite[:, None]
        parts = min(parts, size)
        ends = [i * size // parts for i in range(parts + 1)]
        self.first = [range(*ends[i : i + 2]) for i in range(parts)]

    def plan(self) -> RowPlan:
        return self._plan

    @functools.cached_property
    def _plan(self) -> RowPlan:
        size, floating = self.batch_size, self._inputs.floating()
        if not self.chunk:
            return self._predictor.plan([], size)
        others = [] if floating else self._inputs.batches()
        return self._predictor.plan(floating, size, others=others, chunk=self.chunk)

    def keep_deadline(self, seconds: float, times: PredictionTimes) -> str:
        """Predict by less if there is no time for more, and return a note that says so, or ""."""
        is_planned = not self.chunk or "_plan" in vars(self)
        if not is_planned and times.seconds(self.batch_size, self.chunk) > seconds + _SLACK:
            self.chunk = 0
        if not self.chunk:
            return "predicted by the mean of the results, to keep the deadline"
        if self.chunk < min(self.batch_size, CHUNKS[0]):
            return f"predicted {self.chunk} rows at a time, to keep the deadline"
        return ""

    def is_whole(self, received: Sequence[int]) -> bool:
        return len(received) == self.batch_size

    def of_units(self, values: Tensor, units: Sequence[int]) -> Tensor:
        return values[list(units)].unsqueeze(1)
