r"""The codes that repeat inputs: replication, and uneven copies with a regression."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arguments import check, shown
from .._extension import with_copies
from .._torch import to_device
from ..input_space._ordering import Grouping
from ..input_space._regression import Regression, RowPlan
from ..input_space.metrics import METRICS, Features
from ..linear import LinearMap, SelectMap
from ._base import BatchPlan, Code, FixedCode, cut
from ._suspects import Trust
from ._untuned import PRIOR

# The power of the variances that follow from distances with which squared errors grow: 1.0 for a
# LeNet-5 on MNIST, 0.49 for a RepVGG and 0.46 for a vision transformer on Fashion-MNIST (measured
# once, on tuning batches). `benchmarks accuracy` shows the errors at 0.75.
_GROWTH = 0.75
# The weight of the line through a midpoint where no left-out errors tell: of multiples of .25 the
# best, or within 5 % of it, on seven networks at (3, 2, 1) (measured once; no benchmark keeps it).
_WEIGHT = 0.25


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
    defends = True

    def _plan(self, inputs: list[Tensor], size: int, *_: Any) -> BatchPlan:
        return _CopiesPlan(self, self._grouping(inputs, size))

    def _make_encoder(self) -> LinearMap:
        source = torch.arange(self.num_workers) % self.num_data
        return SelectMap(self.num_data, source, source[:0], torch.zeros(0, 0))

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        inputs, first = np.unique(np.array(received) % self.num_data, return_index=True)
        source = torch.full((self.num_data,), -1)
        source[inputs] = torch.from_numpy(first)
        mean = torch.full((1, inputs.size), 1 / inputs.size, dtype=torch.float64)
        return SelectMap(len(received), source, torch.from_numpy(first), mean)


class _CopiesPlan(BatchPlan):
    """Worker n computes input ``n mod K`` of every group."""

    def _trusted(self, results: Sequence[Tensor], received: Sequence[int]) -> Trust:
        points = torch.tensor(received) % self.code.num_data
        return self._compared(self._grouping.rows[points], results, received)


class RegressionCode(Code):
    r"""A code that repeats inputs, unevenly, and estimates missing answers by regression.

    Every worker computes inputs, of any dtype, as they are. The extra N - K workers of a group
    repeat the inputs that are hardest to estimate, or compute midpoints of two inputs that are
    alike. An answer is computed unless all results of its input are missing. Then a
    :class:`~coded_torch.Regression` on all groups' results estimates it. If the results :math:`m`
    of a midpoint and :math:`y` of the other input arrived, it is blended with :math:`2 m - y`.

    Copies and midpoints are planned before there are results, in the given metric if it is one
    name, else in "shrunk". Without floating-point inputs, copies are equal. ``metric``, ``length``
    and ``coverage`` are arguments of :class:`~coded_torch.Regression`.

    Args:
        redundancy: "copies" or "midpoints", which need floating-point inputs and outputs, all
            finite. Midpoints have the smaller error if few workers are to spare and the module is
            nearly linear between inputs that are alike, but they have no error bounds. Let
            :func:`~coded_torch.tune` choose. Defaults to "copies".

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

    uses_geometry = True
    defends = True

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        redundancy: str = "copies",
        metric: str | Features | Sequence[str | Features] = "auto",
        length: float | str = "auto",
        coverage: float = 0.95,
        **options: Any,
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        #: the regression that estimates
        self.regression = Regression(metric, length, self.link, coverage)
        if not isinstance(self.ordering, str):
            raise ValueError(
                f"{type(self).__name__}: ordering must be 'similarity' or 'arrival', as metric= "
                f"takes metrics, got {shown(self.ordering)}"
            )
        self.metric = metric
        self.length = self.regression.length
        self.coverage = self.regression.coverage
        if redundancy not in ("copies", "midpoints"):
            raise ValueError(
                f"{type(self).__name__}: redundancy must be 'copies' or 'midpoints', got "
                f"{shown(redundancy)}"
            )
        if redundancy == "midpoints" and self.adversaries:
            raise ValueError(
                f"{type(self).__name__}: adversaries must be 0 with midpoints, which have no "
                f"copies, got {self.adversaries}"
            )
        self.redundancy = redundancy
        self.mixes = redundancy == "midpoints"

    def candidates(self) -> dict[str, Sequence[Any]]:
        features = ((x,) for x in self.regression.metrics if not isinstance(x, str))
        may_mix = 1 < self.num_data < self.num_workers and not self.adversaries
        kinds = ("copies", "midpoints") if may_mix else ("copies",)
        lengths = 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0
        return {"redundancy": kinds, "metric": (*METRICS, *features), "length": lengths}

    def _plan(self, *batch: Any) -> BatchPlan:
        return (_MidpointPlan if self.mixes else _RepetitionPlan)(self, *batch)


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
        k = code.num_data
        n = code.num_workers
        order = torch.arange(size)
        super().__init__(code.regression, inputs, size, others, cut(order, k))
        self.code = code
        self.num_groups = -(-size // k)
        self._order = self.order if code.ordering == "similarity" else order
        errors = np.ones(size)
        if num_stragglers and self.num_groups * n > size:  # otherwise, copies are equal
            errors = self.leave_one_out_variances().numpy() ** _GROWTH
        points = with_copies(self._order.numpy(), errors, k, n, num_stragglers)
        # Dealt anew for each group, or a lost worker would be the same copy's in all of them.
        self._rows = torch.from_numpy(points.ravel()[_deal(self.num_groups, n)])  # [N, G]

    def encode(self, values: Tensor) -> Tensor:
        requirement = f"values must have size {self.batch_size} along dim 0"
        check(self.code, values.shape[:1] == (self.batch_size,), requirement, [*values.shape])
        (rows,) = to_device([self._rows.flatten()], values.device)
        return values.index_select(0, rows).view(*self._rows.shape, *values.shape[1:])

    def _trusted(self, results: Sequence[Tensor], received: Sequence[int]) -> Trust:
        return self._compared(self._rows[[*received]], results, received)


class _MidpointPlan(_RepetitionPlan):
    """Spare workers compute midpoints, which are further rows of the regression, after the B."""

    def __init__(
        self, code: RegressionCode, inputs: list[Tensor], size: int, num_stragglers: int, *_: Any
    ) -> None:
        super().__init__(code, inputs, size, num_stragglers, ())
        groups = self.num_groups
        k = code.num_data
        n = code.num_workers
        # [G, K]
        rows = Grouping(self._order, k).rows.T
        pairs = torch.arange(max(k - 1, 1))
        # Neighbours in a group, which are of different workers: pairs without common rows first,
        # and of these the most uncertain.
        errors = self.leave_one_out_variances()[rows]
        errors = errors[:, pairs] + errors[:, (pairs + 1).clamp(max=k - 1)]
        errors = errors + 3 * errors.max() * (pairs % 2 == 0)
        order = errors.argsort(dim=1, descending=True, stable=True)
        first = order[:, : n - k]  # each once; further workers repeat midpoints, too
        ends = first, (first + 1).clamp(max=k - 1)
        self._pairs = tuple(rows.gather(1, x).flatten() for x in ends)
        self._size = size
        midpoints = size + torch.arange(first.numel()).view(first.shape)
        points = torch.cat([rows, midpoints[:, torch.arange(n - k) % len(pairs)]], 1)  # [G, N]
        extended = map(self._extended, inputs)
        parts = cut(points.flatten(), n)
        RowPlan.__init__(
            self,
            code.regression,
            [*extended],
            size + midpoints.numel(),
            (),
            [part.unique() for part in parts],
        )
        self.num_groups = groups
        self._rows = points.flatten()[torch.from_numpy(_deal(groups, n))]

    def _extended(self, values: Tensor) -> Tensor:
        """Return values ``[B, ...]`` and those at midpoints, ``[B + P, ...]``."""
        first, second = (values.index_select(0, i.to(values.device)) for i in self._pairs)
        return torch.cat([values, torch.lerp(first, second, 0.5)])

    def encode(self, values: Tensor) -> Tensor:
        if values.shape[:1] != (self._size,):
            return super().encode(values)  # raises
        return super().encode(self._extended(values))

    def source(self, received: Sequence[int]) -> Tensor:
        return super().source(received)[: self._size]

    def decode(self, results: Tensor, received: Sequence[int], search: bool = True) -> Tensor:
        """Return answers, where lines through midpoints share the weight with the regression."""
        answers = super().decode(results, received, search)
        weight = self._weight(results, received)
        source = self._given(received)[0]
        (first, second) = self._pairs
        at = self._size + torch.arange(len(first))
        for row, partner_row in ((first, second), (second, first)):
            fits = (source[row] < 0) & (source[partner_row] >= 0) & (source[at] >= 0)
            places, partner, middle = (x[fits].to(answers.device) for x in (row, partner_row, at))
            line = 2 * answers[middle] - answers[partner]
            answers = answers.index_copy(0, places, torch.lerp(answers[places], line, weight))
        return answers[: self._size]

    def _weight(self, results: Tensor, received: Sequence[int]) -> float:
        """Return the weight of lines by which results are best estimated if they are left out."""
        numbers = 0.0
        squares = 0.0
        count = 0
        for part in self._given(received)[1]:
            rows, y, off = part.left_out(results.flatten(0, 1))
            at = torch.full((self.batch_size,), -1).index_copy(0, rows, torch.arange(len(rows)))
            i = at[self._pairs[0]]
            j = at[self._pairs[1]]
            m = at[self._size :]
            there = (i >= 0) & (j >= 0) & (m >= 0) & (i != j)
            for row, partner in ((i[there], j[there]), (j[there], i[there])):
                lines = 2 * y[m[there]] - y[partner] - (y[row] - off[row])  # less the regression's
                numbers += float((lines * off[row]).sum())
                squares = squares + float(lines.square().sum())
                count = count + len(row)
        prior = 1.0
        if squares:
            prior = PRIOR * squares / count
        return min(max((numbers + _WEIGHT * prior) / (squares + prior), 0.0), 1.0)

    def error_bounds(self, *_: Any, **__: Any) -> None:
        """Return None: midpoints are easier to estimate than rows, and would calibrate badly."""


@functools.lru_cache(8)  # some megabytes each for 200,000 rows
def _deal(groups: int, n: int) -> NDArray[np.int64]:
    """Return the point of each of n workers in each group, ``[N, G]``, of points ``[G, N]``, flat.

    Points side by side, such as copies of one input, go to workers some steps apart, and
    neighbouring workers get no neighbouring points. Steps differ between groups, so two workers
    that are late together lose few inputs.
    """
    far = []
    for step in range(1, n // 2 + 1):
        if math.gcd(step, n) == 1:
            inverse = pow(step, -1, n)
            if n / 8 <= min(step, inverse, n - inverse):
                far.append(step)
    group = np.arange(groups)
    golden = (math.sqrt(5) - 1) / 2
    steps = np.array(far or [1])[group % len(far or [1])]
    shift = np.floor(group * golden % 1 * n).astype(np.int64)
    workers = (steps[:, None] * np.arange(n) + shift[:, None]) % n  # the worker of each point
    flat: NDArray[np.int64] = group * n + workers.argsort(axis=1).T
    return flat
