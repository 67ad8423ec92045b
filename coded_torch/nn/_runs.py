r"""Planning a batch of any size: in runs, each small enough to compare all of its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from ..codes.base import BatchPlan, Code
from ..geometry import Geometry
from ..grouping import Grouping, Ordering, order_of

__all__ = ["MeanPlan", "check_ordering", "fit_batch"]


def check_ordering(ordering: Ordering) -> None:
    """Raise an error for what can order no batch at all."""
    if isinstance(ordering, str):
        if ordering not in ("similarity", "arrival"):
            raise ValueError(
                "CodedWrapper: ordering must be 'similarity', 'arrival', a permutation or a "
                f"callable, got {ordering!r}"
            )
    elif not (callable(ordering) or isinstance(ordering, Sized)):
        raise TypeError(
            "CodedWrapper: ordering must be a name, a permutation or a callable that returns one, "
            f"got {ordering!r}"
        )


def fit_batch(
    code: Code, ordering: Ordering, inputs: Sequence[Tensor], num_stragglers: int
) -> BatchPlan:
    """Order a batch, cut it into groups, and fit the code to it.

    Args:
        code: the code.
        ordering: "similarity", "arrival", a permutation, or a callable that gives one.
        inputs: the coded inputs, each ``[B, ...]``, B at least 1.
        num_stragglers: how many workers are expected to be late.
    """
    check_ordering(ordering)
    by_similarity = isinstance(ordering, str) and ordering == "similarity"
    if not (by_similarity or code.uses_geometry):
        if isinstance(ordering, str) and ordering == "arrival":
            grouping = Grouping.arrival(len(inputs[0]), code.num_data)
        else:
            grouping = Grouping(order_of(ordering, inputs, None), code.num_data)
        return code.fit(grouping, None, num_stragglers)

    def fit_run(inputs: Sequence[Tensor], ordering: Ordering) -> BatchPlan:
        geometry = Geometry(inputs, shrinkage=code.shrinkage)
        order = order_of(ordering, inputs, geometry.distances)
        return code.fit(Grouping(order, code.num_data), geometry, num_stragglers)

    inputs = [leaf.detach() for leaf in inputs]
    batch_size = len(inputs[0])
    if batch_size <= code.max_run:
        return fit_run(inputs, ordering)
    order = torch.arange(batch_size)
    if not by_similarity:
        order, ordering = Grouping(order_of(ordering, inputs, None), 1).order, "arrival"
    runs = order.split(code.max_run)
    plans = [fit_run([leaf[rows.to(leaf.device)] for leaf in inputs], ordering) for rows in runs]
    return _Runs(code, runs, plans)


class _Runs(BatchPlan):
    """Several plans side by side, each for its own rows of the batch."""

    def __init__(self, code: Code, runs: Sequence[Tensor], plans: Sequence[BatchPlan]) -> None:
        self.code = code
        self._runs = runs
        self._plans = plans
        self.num_groups = sum(plan.num_groups for plan in plans)

    def encode(self, values: Tensor) -> Tensor:
        parts = zip(self._plans, self._runs, strict=True)
        coded = [plan.encode(values[rows.to(values.device)]) for plan, rows in parts]
        return torch.cat(coded, dim=1)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        parts = zip(self._plans, self._split(results), strict=True)
        answers = torch.cat([plan.decode(part, received) for plan, part in parts])
        return answers[torch.cat(list(self._runs)).argsort().to(answers.device)]

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        parts = [None] * len(self._plans) if results is None else self._split(results)
        total = 0.0
        for plan, rows, part in zip(self._plans, self._runs, parts, strict=True):
            error = plan.expected_rmse(received, part)
            if error is None:
                return None
            total += len(rows) * error**2
        return math.sqrt(total / sum(map(len, self._runs)))

    def _split(self, results: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = results.split([p.num_groups for p in self._plans], dim=1)
        return parts


class MeanPlan(BatchPlan):
    """Answers everything with the mean of the results: what can be done with too few of them."""

    def __init__(self, plan: BatchPlan, batch_size: int) -> None:
        self.code, self.num_groups = plan.code, plan.num_groups
        self._batch_size = batch_size

    def encode(self, values: Tensor) -> Tensor:
        raise NotImplementedError("results are decoded only")

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        return results.mean((0, 1)).expand(self._batch_size, *results.shape[2:]).clone()
