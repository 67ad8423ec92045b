r"""The units that machines are asked for: rows of the batch, or coded columns."""

from __future__ import annotations

import abc
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._transforms import differentiated
from ..codes.base import Code
from ..codes.batch_plan import BatchPlan
from ..codes.plans import plan_batch, plan_rows
from ..codes.replication import ReplicationCode
from ..input_space.ordering import Ordering
from ..scheduling.latency_history import CHUNKS, History
from ..scheduling.waiting import Waiting
from ..workers.base import Task
from ._inputs import Inputs
from .report import Report

__all__ = ["Columns", "Rows", "Units", "check_waiting", "most_stragglers"]

_LEAST_BYTES = 1 << 16  # of coded inputs, for which memory is worth looking for
_ALIGNMENT = 64
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
        audit: the row of every unit that is the same input for all, which answers nothing; None:
            there is none.
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
    audit: int | None = None
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

    def answering(self, results: Tensor) -> Tensor:
        """Results ``[F, R, ...]`` without the audit row."""
        if self.audit is None:
            return results
        return torch.cat([results[:, : self.audit], results[:, self.audit + 1 :]], dim=1)


class Columns(Units):
    """The N coded inputs of every group: each column is a row for each of the G groups.

    Args:
        inputs: of the call.
        code: the code.
        ordering: of the batch.
        num_stragglers: S: N - S results are waited for.
        num_adversaries: A: the results of as many more may count as missing.
        dealer: the order of asking is drawn from it; None: column n is asked for as the n-th.
        all_at_once: whether the other S columns are asked for at once too.
        out_dims: of the module.
        audit: whether every column gets one common input, in a place drawn from ``dealer``.
        memory: that the coded inputs may be written to, of so many bytes; see
            :meth:`~coded_torch.workers.Workers.memory`.
    """

    def __init__(
        self,
        inputs: Inputs,
        code: Code,
        ordering: Ordering,
        *,
        num_stragglers: int,
        num_adversaries: int,
        dealer: random.Random | None,
        all_at_once: bool,
        out_dims: Any,
        audit: bool,
        memory: Callable[[int], Tensor | None],
    ) -> None:
        n, floating = code.num_workers, inputs.floating()
        self.regresses = code.uses_geometry
        self._plan = plan_batch(
            code,
            ordering,
            floating,
            num_stragglers + num_adversaries,
            batch_size=inputs.batch_size,
            others=[] if floating else inputs.batches(),
        )
        self.num_groups = self._plan.num_groups
        leaves = _encode(self._plan, inputs, (lambda _: None) if audit else memory)
        rows = self.num_groups
        if inputs.not_finite is not None:
            self.not_finite = self._plan.encode(inputs.not_finite)
        if audit and dealer is not None:
            self.audit, rows = dealer.randrange(rows + 1), rows + 1
            common = dealer.randrange(n), dealer.randrange(self.num_groups)
            leaves = [
                leaf if dim is None else _insert(leaf, leaf[common], self.audit)
                for leaf, dim in zip(leaves, inputs.dims, strict=True)
            ]
            if self.not_finite is not None:
                own = self.not_finite[common]
                self.not_finite = _insert(self.not_finite, own, self.audit)
        self.task = _task(inputs, leaves, n, rows, out_dims)
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
        return plan_rows(
            self._code,
            self._ordering,
            floating,
            batch_size=inputs.batch_size,
            others=[] if floating else inputs.batches(),
        )


def most_stragglers(code: Code, liars: int) -> int:
    """How many columns can be done without, beside those of so many machines that lie."""
    return code.num_workers - code.min_received - 2 * liars


def check_waiting(code: Code, liars: int, waiting: Waiting | None) -> None:
    """Raise a ValueError unless a code can do without what the policy does not wait for."""
    if waiting is not None and not waiting.predict and code.mixes:
        raise ValueError(
            "CodedWrapper: waiting.predict must be True with a code that mixes inputs, as all that "
            f"it decodes is estimated, got False with {code}"
        )
    lost = (waiting.num_stragglers if waiting is not None else None) or 0
    most, needs = most_stragglers(code, liars), f"{code} needs {code.min_received} results"
    if most < 0:
        raise ValueError(
            f"CodedWrapper: max_adversaries must be at most {liars + most // 2}, as {needs} "
            f"beside those of twice as many machines, got {liars}"
        )
    if lost > most:
        beside = f" beside twice max_adversaries={liars}" if liars else ""
        raise ValueError(
            f"CodedWrapper: waiting.num_stragglers must be at most {most}, as {needs}{beside}, "
            f"got {lost}"
        )


def _encode(plan: BatchPlan, inputs: Inputs, memory: Callable[[int], Tensor | None]) -> list[Any]:
    """The leaves of the inputs, those that are divided coded: ``[N, G, ...]``.

    What no derivative is asked of is written to one piece of ``memory``, where it is worth that.
    """
    units = plan.code.num_workers, plan.num_groups
    leaves = [
        leaf.movedim(dim, 0) if dim else leaf
        for leaf, dim in zip(inputs.leaves, inputs.dims, strict=True)
    ]
    ends, total = {}, 0
    for i, (leaf, dim) in enumerate(zip(leaves, inputs.dims, strict=True)):
        if dim is not None and leaf.device.type == "cpu" and not differentiated(leaf):
            size = math.prod(units) * leaf.shape[1:].numel() * leaf.element_size()
            ends[i] = total, total + size
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
    whole = memory(total) if total >= _LEAST_BYTES else None
    places = {}
    if whole is not None:
        for i, (start, end) in ends.items():
            flat = whole[start:end].view(leaves[i].dtype)
            places[i] = flat.view(*units, *leaves[i].shape[1:])
    return [
        leaf if dim is None else plan.encode(leaf, out=places.get(i))
        for i, (leaf, dim) in enumerate(zip(leaves, inputs.dims, strict=True))
    ]


def _insert(columns: Tensor, row: Tensor, place: int) -> Tensor:
    """Columns ``[N, G, ...]`` with one more row, the same in all: ``[N, G + 1, ...]``."""
    row = row.expand(len(columns), 1, *row.shape)
    return torch.cat([columns[:, :place], row, columns[:, place:]], dim=1)


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
