r"""The units that machines are asked for: rows of the batch, or coded columns."""

from __future__ import annotations

import abc
import functools
import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..codes.base import Code
from ..codes.batch_plan import BatchPlan, plan_batch, plan_rows
from ..codes.replication import ReplicationCode
from ..input_space.ordering import Ordering
from ..scheduling.latency_history import CHUNKS, History
from ..scheduling.waiting import Waiting
from ..workers.base import Task
from ._inputs import Inputs
from .report import Report

__all__ = ["Columns", "Rows", "Units", "check_waiting", "most_stragglers"]

# Seconds by which answers are rather late than worse: what a busy machine wakes a thread too late.
_SLACK = 5e-3


class Units(abc.ABC):
    """A batch as units that can be asked for one by one.

    Attributes:
        task: the call of the module that computes them.
        first: the parts that are asked for first, each some units.
        spare: of columns, which can stand in for each other, those not among these; None of rows,
            which cannot.
        needed: how many units with a result complete the call.
        least: how many can be decoded at all.
        batch_size: B.
        num_groups: G; 0 for rows.
        regresses: whether answers are predicted by a regression, which takes time.
        not_finite: bool ``[units, R]``, the rows of every unit whose inputs are not finite; None:
            there is none.
    """

    task: Task
    first: Sequence[Sequence[int]]
    spare: Sequence[int] | None = None
    needed: int
    least: int
    batch_size: int
    num_groups = 0
    regresses: bool
    not_finite: Tensor | None = None

    @property
    def by_rows(self) -> bool:
        """Whether units are rows."""
        return self.spare is None

    @property
    @abc.abstractmethod
    def plan(self) -> BatchPlan:
        """The code fitted to the batch; made when it is first needed."""

    def is_whole(self, received: Sequence[int]) -> bool:
        """Whether the results of these units are the answers as they are."""
        return False

    def prepare(self, seconds: float, history: History) -> None:  # noqa: B027 - most have a plan
        """Make what predictions need, if predicting takes no longer than that."""

    def hasten(self, seconds: float, history: History, report: Report) -> int:
        """Choose predictions that take no longer than that; the report says if they are worse.

        Returns:
            The rows of a regression; 0: none is made.
        """
        return CHUNKS[0]


class Columns(Units):
    """The N coded inputs of every group: each column is a row for each of the G groups.

    Args:
        inputs: of the call.
        code: the code.
        ordering: of the batch.
        num_stragglers: S: N - S results are waited for.
        dealer: the order of asking is drawn from it; None: column n is asked for as the n-th.
        all_at_once: whether the other S columns are asked for at once too.
        out_dims: of the module.
    """

    def __init__(
        self,
        inputs: Inputs,
        code: Code,
        ordering: Ordering,
        *,
        num_stragglers: int,
        dealer: random.Random | None,
        all_at_once: bool,
        out_dims: Any,
    ) -> None:
        n, floating = code.num_workers, inputs.floating()
        self.regresses = code.uses_geometry
        self._plan = plan_batch(
            code,
            ordering,
            floating,
            num_stragglers,
            batch_size=inputs.batch_size,
            others=[] if floating else inputs.batches(),
        )
        self.num_groups = self._plan.num_groups
        leaves = [
            leaf if dim is None else self._plan.encode(leaf.movedim(dim, 0) if dim else leaf)
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        if inputs.not_finite is not None:
            self.not_finite = self._plan.encode(inputs.not_finite)
        self.task = _task(inputs, leaves, n, self.num_groups, out_dims)
        self.needed, self.least = n - num_stragglers, code.min_received
        self.batch_size = inputs.batch_size
        # Those asked for first are spread evenly over the curve.
        chosen = (
            list(range(n)) if all_at_once else [i * n // self.needed for i in range(self.needed)]
        )
        spare = [] if len(chosen) == n else sorted(set(range(n)) - set(chosen))
        if dealer is not None:
            dealer.shuffle(chosen)
            dealer.shuffle(spare)
        self.first, self.spare = [(column,) for column in chosen], spare

    @property
    def plan(self) -> BatchPlan:
        return self._plan


class Rows(Units):
    """The rows of the batch, of a code that does not mix them: each is asked for once.

    Nothing is fitted before something is missing.

    Args:
        inputs: of the call.
        code: the code; its K says into how many parts the batch is divided at most.
        ordering: of the batch, where it has to be fitted.
        num_machines: of the pool; None: as many as are asked.
        out_dims: of the module.
    """

    def __init__(
        self,
        inputs: Inputs,
        code: Code,
        ordering: Ordering,
        num_machines: int | None,
        out_dims: Any,
    ) -> None:
        size = inputs.batch_size
        self._inputs, self._code, self._ordering = inputs, code, ordering
        self.regresses = code.uses_geometry
        leaves = [
            leaf if dim is None else leaf.movedim(dim, 0).unsqueeze(1)  # [B, 1, ...]
            for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
        ]
        self.task = _task(inputs, leaves, size, 1, out_dims)
        self.needed, self.least, self.batch_size = size, 1, size
        if inputs.not_finite is not None:
            self.not_finite = inputs.not_finite[:, None]
        parts = min(code.num_data, size, num_machines or size)
        ends = [i * size // parts for i in range(parts + 1)]
        self.first = [range(*ends[i : i + 2]) for i in range(parts)]

    def is_whole(self, received: Sequence[int]) -> bool:
        return len(received) == self.batch_size

    def prepare(self, seconds: float, history: History) -> None:
        if history.decoding(self.batch_size) <= seconds:
            _ = self.plan

    def hasten(self, seconds: float, history: History, report: Report) -> int:
        code, size = self._code, self.batch_size
        if not self.regresses:
            return CHUNKS[0]
        made = "plan" in vars(self)
        for chunk in CHUNKS[:1] if made else CHUNKS:
            chunk = min(chunk, code.max_chunk)
            # A third of it is the plan's (benchmarks/batches.py).
            if history.decoding(size, chunk) * (2 / 3 if made else 1) <= seconds + _SLACK:
                if chunk < min(size, code.max_chunk):
                    self._code = code.replace()
                    self._code.max_chunk = chunk
                    report.notes += (f"predicted {chunk} rows at a time, to keep the deadline",)
                return chunk
        history.hurried()
        vars(self).pop("plan", None)
        self._code = ReplicationCode(code.num_data, code.num_workers)
        report.notes += ("predicted by the mean of the results, to keep the deadline",)
        return 0

    @functools.cached_property
    def plan(self) -> BatchPlan:
        inputs, floating = self._inputs, self._inputs.floating()
        plan: BatchPlan = plan_rows(
            self._code,
            self._ordering,
            floating,
            batch_size=inputs.batch_size,
            others=[] if floating else inputs.batches(),
        )
        return plan


def most_stragglers(code: Code) -> int:
    """Return how many columns the code can do without."""
    return code.num_workers - code.min_received


def check_waiting(code: Code, waiting: Waiting | None) -> None:
    """Raise a ValueError unless a code can do without what the policy does not wait for."""
    if waiting is not None and not waiting.predict and code.mixes:
        raise ValueError(
            "CodedWrapper: waiting.predict must be True with a code that mixes inputs, as all that "
            f"it decodes is estimated, got False with {code}"
        )
    lost = (waiting.num_stragglers if waiting is not None else None) or 0
    if lost > (most := most_stragglers(code)):
        raise ValueError(
            f"CodedWrapper: waiting.num_stragglers must be at most {most}, as {code} needs "
            f"{code.min_received} results, got {lost}"
        )


def _task(
    inputs: Inputs, leaves: list[Tensor], num_units: int, unit_rows: int, out_dims: Any
) -> Task:
    return Task(
        leaves,
        inputs.dims,
        inputs.spec,
        num_units=num_units,
        unit_rows=unit_rows,
        device=inputs.device,
        out_dims=out_dims,
    )
