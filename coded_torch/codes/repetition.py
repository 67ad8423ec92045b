r"""The codes that repeat inputs: replication, and uneven copies with a regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._torch import to_device
from ..input_space.metrics import METRICS, Features
from ..input_space.ordering import Grouping
from ..input_space.regression import Regression, RowPlan
from ..linear import LinearMap, SelectMap
from .base import Code, FixedCode
from .plans import BatchPlan, cut

# The power of the variances that follow from distances with which squared errors grow. Measured in
# November 2026, on tuning batches: 1.0 for a LeNet-5 on MNIST, 0.49 for a RepVGG and 0.46 for a
# vision transformer on Fashion-MNIST, which the benchmarks no longer have. `benchmarks accuracy`
# shows the errors at 0.75.
_GROWTH = 0.75


class ReplicationCode(FixedCode):
    r"""Replication, the baseline without mixing: worker n computes input ``n mod K``.

    Answered inputs come back bit for bit as their first received worker computed them. Inputs
    without an answer get the mean of the group's answered ones, every input counted once.
    ``ReplicationCode(K, K)`` is uncoded inference.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> code = ReplicationCode(num_data=3, num_workers=6)
        >>> code.encode(torch.tensor([1.0, 2.0, 6.0]))
        tensor([1., 2., 6., 1., 2., 6.])
        >>> code.decode(torch.tensor([6.0, 2.0]), received=[2, 4])
        tensor([4., 2., 6.])
        >>> code.source([2, 4])
        tensor([-1,  1,  0])
    """

    mixes = False

    def _make_encoder(self) -> LinearMap:
        source = torch.arange(self.num_workers) % self.num_data
        return SelectMap(self.num_data, source, source[:0], torch.zeros(0, 0))

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        inputs, first = np.unique(np.array(received) % self.num_data, return_index=True)
        source = torch.full((self.num_data,), -1)
        source[inputs] = torch.from_numpy(first)
        mean = torch.full((1, inputs.size), 1 / inputs.size, dtype=torch.float64)
        return SelectMap(len(received), source, torch.from_numpy(first), mean)


class RegressionCode(Code):
    r"""A code that repeats inputs, unevenly, and estimates missing answers by regression.

    Every worker computes inputs, of any dtype, as they are. The extra N - K workers of a group
    repeat the inputs that are hardest to estimate. An answer is computed unless all results of its
    input are missing. Then a :class:`~coded_torch.Regression` on all groups' results estimates it.

    Copies are planned before there are results: by the metric that is given, if it is one name,
    else by "shrunk". Without floating-point inputs, copies are equal. ``metric``, ``length`` and
    ``coverage`` are arguments of :class:`~coded_torch.Regression`.

    Example:
        >>> import torch
        >>> from coded_torch.codes import RegressionCode
        >>> x = torch.linspace(0, 1, 6)[:, None]
        >>> plan = RegressionCode(3, 4).plan([x], num_stragglers=1)
        >>> plan.encode(x).shape
        torch.Size([4, 2, 1])
        >>> plan.decode(plan.encode(x)[1:], received=[1, 2, 3]).shape
        torch.Size([6, 1])
    """

    mixes = False
    uses_geometry = True

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str = "auto",
        coverage: float = 0.95,
        **options: Any,
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        #: the regression that estimates
        self.regression = Regression(metric, length, self.link, coverage)
        self.metric, self.length = metric, self.regression.length
        self.coverage = self.regression.coverage

    def candidates(self) -> dict[str, Sequence[Any]]:
        own = ((x,) for x in self.regression.metrics if not isinstance(x, str))
        return {"metric": (*METRICS, *own), "length": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)}

    def _plan(self, *batch: Any) -> _RepetitionPlan:
        return _RepetitionPlan(self, *batch)


class _RepetitionPlan(RowPlan, BatchPlan):
    """Workers compute inputs as they are; missing answers are estimated by a regression."""

    def __init__(
        self,
        code: RegressionCode,
        inputs: list[Tensor],
        size: int,
        num_stragglers: int,
        others: Sequence[Tensor],
    ) -> None:
        grouping = code._grouping([], size)
        super().__init__(code.regression, inputs, size, others, cut(grouping.order, code.num_data))
        if isinstance(code.ordering, str) and code.ordering == "similarity":
            grouping = Grouping(self.order, code.num_data)
        errors, is_spare = np.ones(size), grouping.num_groups * code.num_workers > size
        if num_stragglers and is_spare:  # copies are equal if there are no stragglers
            errors = self.leave_one_out_variances().numpy() ** _GROWTH
        copies = _copies(grouping, code.num_workers, num_stragglers, errors)  # [G, K]
        points = np.stack([np.repeat(np.arange(len(c)), c) for c in copies])  # [G, N]
        # Dealt anew for each group, or a lost worker would be the same copy's in all of them.
        self._rows = grouping.rows.gather(0, torch.from_numpy(_dealt(points)).T)  # [N, G]
        self.code, self.num_groups = code, grouping.num_groups

    def encode(self, values: Tensor) -> Tensor:
        if values.shape[:1] != (self.batch_size,):
            must = f"values must have size {self.batch_size} along dim 0"
            got = tuple(values.shape)
            raise ValueError(f"{type(self.code).__name__}: {must}, got shape {got}")
        (rows,) = to_device([self._rows.flatten()], values.device)
        return values.index_select(0, rows).view(*self._rows.shape, *values.shape[1:])

    def _source(self, received: Tensor) -> Tensor:
        arrived = self._rows[received].flatten()  # [F G]
        # The first result of each input, whichever worker repeats it.
        first = torch.full((self.batch_size,), len(arrived))
        first.scatter_reduce_(0, arrived, torch.arange(len(arrived)), "amin")
        return torch.where(first < len(arrived), first, -1)


def _copies(
    grouping: Grouping, num_workers: int, num_stragglers: int, errors: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the number of workers of each input of each group, ``[G, K]``.

    Each copy goes where it lowers the expected squared error most. This is the probability that all
    copies are missing, times ``errors [B]``, and convex in the copies, so greedy is best.
    """
    # lost[c] is the probability that all of c workers are among the S lost ones of N.
    lost = np.ones(num_workers + 2)
    for i in range(num_workers):
        lost[i + 1] = lost[i] * max(num_stragglers - i, 0) / (num_workers - i)
    gain = lost[:-1] - lost[1:]
    of_group = errors[grouping.rows.T.numpy()]  # [G, K]
    real = (grouping.targets.T >= 0).numpy()  # the last group may be filled up
    copies, whole = real.astype(np.int64), real.all(axis=1)
    for some in filter(np.any, (whole, ~whole)):  # the last group may have more to spare
        more = np.arange(1, num_workers - real[some][0].sum() + 1)[:, None]
        # Of each further copy, [., C, K]. Between equals, the one with fewer copies.
        scores = gain[more] * of_group[some][:, None] - 1e-12 * more
        scores = np.where(real[some][:, None], scores, -np.inf).reshape(len(scores), -1)
        best = (-scores).argsort(axis=1, kind="stable")[:, : len(more)]
        np.add.at(copies, (np.flatnonzero(some)[:, None], best % real.shape[1]), 1)
    return copies


def _dealt(points: NDArray[Any]) -> NDArray[Any]:
    """Deal each group's points ``[G, N]`` to other workers, so that a late one is late elsewhere.

    Points side by side, such as copies of one input, go to workers some steps apart. The number of
    steps differs between groups, so two workers that are late together lose few inputs.
    Neighbouring workers get no neighbouring points.
    """
    groups, n = points.shape
    steps = [
        step
        for step in range(1, n // 2 + 1)
        if math.gcd(step, n) == 1 and all(n / 8 <= x <= n - n / 8 for x in (step, pow(step, -1, n)))
    ] or [1]
    golden = (math.sqrt(5) - 1) / 2
    group = np.arange(groups)
    step = np.array(steps)[group % len(steps)]
    shift = np.floor(group * golden % 1 * n).astype(np.int64)
    workers = (step[:, None] * np.arange(n) + shift[:, None]) % n  # the worker of each point
    return np.take_along_axis(points, workers.argsort(axis=1), axis=1)
