r"""The code that looks at the batch: placed by distances, decoded by regression in input space."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._arguments import positive, real
from .._extension import spline_plan
from ..decoders.kernel import KernelRegression
from ..linear import SelectMap, accumulation_dtype
from ..points import chord_length, placed
from .base import BatchPlan, Code, few_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from ..geometry import Geometry
    from ..grouping import Grouping

__all__ = ["KernelCode"]

# Predicting an input from more than its neighbours on the path changes its variance little.
_NEIGHBOURHOOD = 512
# Errors grow more slowly than the variances that distances tell: with their power 1.0 for a LeNet-5
# on MNIST, 0.5 for a RepVGG and a vision transformer on Fashion-MNIST.
_GROWTH = 0.75
# Points farther from the batch's centre than so many times the root mean square of its inputs tell
# nothing of the others, and their results may be so large that the mean does not either.
_FAR = 8
# The least median distance between neighbours, in the same unit: with less for its length, as noisy
# copies of a few images have, a kernel sees next to nothing of the others, and all of rounding.
_SHORTEST = 0.01


_NUMBERS = ("placement", "exponent", "shrinkage", "length")


class KernelCode(Code):
    r"""Coding by the distances between inputs: the default way to use this package.

    The paper lays a curve through the inputs in the order of their arrival and interpolates the
    results of each group along it. But whoever encodes knows every input that was sent, so results
    can be interpolated in *input space*, over all groups at once: the answers are the posterior
    means of a Gaussian process, given the results at the coded inputs,
    :class:`~coded_torch.decoders.kernel.KernelRegression`. Inputs whose own result arrived are
    answered by that result, bit for bit. Where the batch's own results are predicted badly from
    each other, predictions are shrunk towards the mean of the results:
    :meth:`~coded_torch.decoders.kernel.KernelRegression.trust`.

    ``placement`` says how far inputs are mixed, along the spline through a group's inputs, by how
    the worker points move from 0, *repeated*: data points only, so no mixing, the extra N - K
    workers repeating the inputs that the others tell least about; over 1/2, *systematic*: every
    data point, and the extra ones in the largest gaps; to 1, *spread*: evenly. One decoder serves
    all of them. Without mixing, a batch is answered exactly up to the inputs that nobody answered.

    Args:
        num_data: K, at least 1.
        num_workers: N, at least K.
        placement: in [0, 1]. Where many of many workers are lost, a little mixing helps some
            modules and harms others; :func:`coded_torch.tuning.tune` finds out which.
        exponent: of the distances between inputs that data points are placed at: 0 equidistant,
            0.5 centripetal, 1 chord length. It matters where inputs are mixed.
        shrinkage: of the metric, at least 0, see :class:`~coded_torch.geometry.Geometry`.
        length: of the kernel, positive, in median distances between neighbours on the path through
            the batch. The error is flat around the default: some 5 % more at half and at twice.

    Raises:
        TypeError: a count is not an integer, or another argument not real.
        ValueError: an argument violates its requirement.

    Note:
        Planning a batch of B and decoding M distinct results cost :math:`O(B^3 + M^3)` on the host;
        :class:`~coded_torch.nn.CodedWrapper` cuts large batches into runs of at most 4,096 results.
        What is encoded and decoded are whole batches, through :meth:`fit`: there is no encoder
        without a batch to look at.

        Gradients take as constant what the code has chosen by looking at inputs and results: order,
        distances, points, weights and trust. Those of answers that are an input's own result are
        exact. Those of lost answers are not the derivatives of these answers in the inputs, which
        move the distances too; in the module's parameters they are, but for the trust.

        Inputs more than 8 times as far from the centre as is usual in the batch, and what is mixed
        with so much of one, predict nothing; without a result of their own they are answered by
        what the batch has in the mean.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> x = torch.linspace(0, 3, 64, dtype=torch.float64)[:, None]
        >>> coded = CodedWrapper(torch.nn.Tanh(), KernelCode(8, 12), stragglers=Uniform(4, seed=0))
        >>> bool((coded(x) - x.tanh()).abs().max() < 0.1)
        True
    """

    uses_geometry = True

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        placement: float = 0.0,
        exponent: float = 0.5,
        shrinkage: float = 0.01,
        length: float = 2.0,
    ) -> None:
        super().__init__(num_data, num_workers)
        if self.num_workers < self.num_data:
            raise ValueError(
                f"KernelCode: num_workers must be at least num_data, {self.num_data}, "
                f"got {self.num_workers}"
            )
        self.placement = real(self, "placement", placement, "in [0, 1]", lambda p: 0 <= p <= 1)
        self.exponent = real(self, "exponent", exponent, "in [0, 1]", lambda e: 0 <= e <= 1)
        self.shrinkage = real(self, "shrinkage", shrinkage, "at least 0", lambda s: s >= 0)
        self.length = positive(self, "length", length)
        self.max_run = type(self).max_run
        if self.placement > 0:  # results that mix are all distinct, N / K times as many
            self.max_run = max(1, self.max_run // self.num_workers) * self.num_data

    def replace(self, **numbers: float) -> Self:
        """A copy with other numbers: ``placement``, ``exponent``, ``shrinkage`` or ``length``.

        Raises:
            TypeError, ValueError: as making one.
        """
        kept = {name: getattr(self, name) for name in _NUMBERS}
        twin = copy.copy(self)
        KernelCode.__init__(twin, self.num_data, self.num_workers, **(kept | numbers))
        return twin

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Place the workers of every group by the geometry of the batch."""
        if geometry is None:
            raise ValueError("KernelCode: geometry must be given to fit, got None")
        return _KernelPlan(self, grouping, geometry, num_stragglers)


class _KernelPlan(BatchPlan):
    """One batch on :class:`KernelCode`.

    Coded inputs are points, ``_point [N, G]``: an input of the batch, 0..B-1, or one of the points
    behind these, each a mixture of its group. ``_squared [P, P]`` are the points' distances, and
    ``_telling [P]`` says from whose results others are predicted.
    """

    def __init__(
        self, code: KernelCode, grouping: Grouping, geometry: Geometry, num_stragglers: int
    ) -> None:
        self.code: KernelCode = code
        self.num_groups = grouping.num_groups
        self._grouping = grouping
        self._squared = geometry.squared_distances()  # [B, B]
        self._length = code.length * path_step(self._squared, grouping.order)
        self._telling = geometry.finite & (geometry.gram.diagonal() <= _FAR**2)
        self._spline: list[Tensor] | None = None
        copies = self._copies(num_stragglers)  # [G, K]
        if code.placement == 0:
            points = np.stack([np.repeat(np.arange(len(c)), c) for c in copies])
            at = torch.from_numpy(_rotated(points)).T  # [N, G], data points
            self._point = grouping.rows.gather(0, at)
        else:
            self._place(copies, geometry)
        self._last: tuple[tuple[int, ...], _Received, KernelRegression | None] | None = None

    def encode(self, values: Tensor) -> Tensor:
        self._grouping.check(values)
        if self._spline is None:
            rows = self._point.to(values.device)
            return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])
        coefficients, schedule = (t.to(values.device) for t in self._spline)
        coded = ops.spline_apply(  # reads the rows where they lie
            values.reshape(len(values), values.shape[1:].numel()),
            coefficients.to(accumulation_dtype(values.dtype)),
            schedule,
            gather=self._grouping.to(values.device).rows,
        )
        return coded.reshape(*coded.shape[:2], *values.shape[1:])

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        found, regression = self._regression(tuple(received))
        weights = torch.zeros(0, len(found.used), dtype=torch.float64)
        if regression is not None:
            trust = regression.trust(_sample(results, found))
            mean = (1 - trust) / len(found.used)
            weights = regression.weights(self._to_inputs(found)).mul_(trust).add_(mean)
        map = SelectMap(results.shape[0] * results.shape[1], found.source, found.used, weights)
        return map(results.flatten(0, 1))

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        found, regression = self._regression(tuple(received))
        if regression is None:
            return 0.0
        variances = regression.variances(self._to_inputs(found))
        share = float(variances.sum()) / self._grouping.batch_size
        if results is None:
            return math.sqrt(share)
        variance = regression.output_variance(_sample(results, found))
        return math.sqrt(share * variance * results.shape[2:].numel())

    def _copies(self, num_stragglers: int) -> NDArray[np.int64]:
        """How many workers each data point gets if every worker sits at one, ``[G, K]``.

        Greedy, one at a time, where it lowers the expected squared error most: the probability that
        all copies are lost times what the variance given all other inputs lets expect. It is convex
        in the copies, so greedy is best.
        """
        n, grouping = self.code.num_workers, self._grouping
        lost = np.ones(n + 2)
        for i in range(n):
            lost[i + 1] = lost[i] * max(num_stragglers - i, 0) / (n - i)
        gain = lost[:-1] - lost[1:]
        errors = self._leave_one_out_variances()[grouping.rows.T].numpy() ** _GROWTH  # [G, K]
        real = (grouping.targets.T >= 0).numpy()
        copies = real.astype(np.int64)
        groups = np.arange(len(copies))
        while (active := copies.sum(axis=1) < n).any():
            # Between equals, the one with fewer copies.
            score = np.where(real, gain[copies] * errors - 1e-12 * copies, -np.inf)
            copies[groups, score.argmax(axis=1)] += active
        return copies

    def _leave_one_out_variances(self) -> Tensor:
        variances = torch.empty(len(self._squared), dtype=torch.float64)
        all_near = len(variances) <= _NEIGHBOURHOOD
        for rows in [slice(None)] if all_near else self._grouping.order.split(_NEIGHBOURHOOD):
            block = self._squared[rows][:, rows]
            variances[rows] = KernelRegression(block, self._length).leave_one_out_variances
        return variances

    def _place(self, copies: NDArray[np.int64], geometry: Geometry) -> None:
        num_data, rows, gram = self.code.num_data, self._grouping.rows.T, geometry.gram  # [G, K]
        steps = self._squared[rows[:, :-1], rows[:, 1:]].sqrt().numpy()
        # To inputs that are far, maybe infinitely, no farther than between the others.
        near = (self._telling[rows[:, :-1]] & self._telling[rows[:, 1:]]).numpy()
        longest = steps.max(axis=1, keepdims=True, initial=0, where=near)
        steps = np.where(near, steps, longest)
        knots = np.stack([chord_length(s, self.code.exponent) for s in steps])
        points = np.stack(
            [placed(t, c, self.code.placement) for t, c in zip(knots, copies, strict=True)]
        )
        coefficients, schedule = spline_plan(knots, np.zeros_like(knots), _rotated(points))
        self._spline = [torch.from_numpy(coefficients), torch.from_numpy(schedule)]
        eye = torch.eye(num_data, dtype=torch.float64)[:, None].expand(-1, len(rows), -1)
        mixing = ops.spline_apply(eye, *self._spline)  # [N, G, K]
        # At zero smoothing a curve passes through its values bit for bit.
        hits = mixing == 1
        mixed = ~hits.any(dim=2) | ((mixing != 0).sum(dim=2) > 1)  # [N, G]
        self._point = self._grouping.rows.gather(0, hits.to(torch.int64).argmax(dim=2))
        self._point[mixed] = len(gram) + torch.arange(int(mixed.sum()))
        # Inner products group by group, as the weights are zero in all others.
        inner = torch.einsum("ngk,gkb->ngb", mixing, gram[rows])[mixed]  # [P - B, B]
        among = torch.einsum("pgk,ngk->png", inner[:, rows], mixing)[:, mixed]  # [P - B, P - B]
        squares = among.diagonal()
        inner = (squares[:, None] + gram.diagonal()).sub_(inner, alpha=2).clamp_(min=0)
        among = (squares[:, None] + squares).sub_(among, alpha=2).clamp_(min=0)
        # What an input that is infinitely far has been mixed into is, too.
        lost = ~geometry.finite
        nowhere = ((mixing != 0) & lost[rows]).any(dim=2)[mixed]  # [P - B]
        inner.masked_fill_(nowhere[:, None] | lost, math.inf)
        among.masked_fill_(nowhere[:, None] | nowhere, math.inf).fill_diagonal_(0)
        upper, lower = torch.cat([self._squared, inner.T], 1), torch.cat([inner, among], 1)
        self._squared = torch.cat([upper, lower])
        self._telling = torch.cat([self._telling, (squares <= _FAR**2) & ~nowhere])

    def _regression(self, received: tuple[int, ...]) -> tuple[_Received, KernelRegression | None]:
        if self._last is None or self._last[0] != received:
            found = _Received(self._point, received, self._grouping.batch_size, self._telling)
            regression = None
            if len(found.lost):
                among = self._squared[found.points][:, found.points]
                regression = KernelRegression(among, self._length)
            # For outputs of several leaves, and the error to expect of them; not a history.
            self._last = received, found, regression
        return self._last[1:]

    def _to_inputs(self, found: _Received) -> Tensor:
        """Squared distances of the lost inputs from those of the results, ``[L, M]``."""
        return self._squared[found.lost][:, found.points]


class _Received:
    """What arrived: which result answers which input, and which ones to predict the others from.

    Attributes:
        source: ``[B]``, the flat index ``[|F|, G]`` of the result that is an input's own, or -1.
        lost: ``[L]``, the inputs without one.
        used: ``[M]``, flat indices ``[|F|, G]`` of the distinct results to predict the others from:
            those of points that are ``telling``, if there are any.
        points: ``[M]``, the points that these are results of.
    """

    def __init__(
        self, point: Tensor, received: Sequence[int], batch_size: int, telling: Tensor
    ) -> None:
        arrived = point[torch.tensor(received)].flatten()  # [F G]
        index = torch.arange(len(arrived))
        # The first result of each input, whoever else repeats it.
        own = arrived < batch_size
        first = torch.full((batch_size,), len(arrived), dtype=torch.int64)
        first.scatter_reduce_(0, arrived[own], index[own], "amin")
        answered = first < len(arrived)
        self.source = torch.where(answered, first, -1)
        self.lost = (~answered).nonzero().flatten()
        self.used = torch.cat([first[answered], index[~own]])
        tells = telling[arrived[self.used]]
        if bool(tells.any()):
            self.used = self.used[tells]
        self.points = arrived[self.used]


def _sample(results: Tensor, found: _Received) -> Tensor:
    """Some columns of the distinct results, ``[M, C]``, float64 on the host."""
    columns = few_columns(results).flatten(0, 1)  # [F G, C]
    return columns.index_select(0, found.used.to(columns.device)).to("cpu", torch.float64)


def path_step(squared_distances: Tensor, order: Tensor) -> float:
    """The median distance between neighbours on the path; 1 where that says nothing."""
    steps = squared_distances[order[:-1], order[1:]].sqrt()
    steps = steps[(steps > 0) & steps.isfinite()]
    return max(float(steps.median()), _SHORTEST) if len(steps) else 1.0


def _rotated(points: NDArray[Any]) -> NDArray[Any]:
    """``[G, N]``, each group's points dealt to other workers, so that a late one is late elsewhere.

    Golden-ratio steps keep neighbouring workers away from neighbouring points, such as copies of
    one input, and consecutive groups apart.
    """
    groups, n = points.shape
    golden = (math.sqrt(5) - 1) / 2
    stride = next(s for s in range(max(1, round(golden * n)), 2 * n) if math.gcd(s, n) == 1)
    shift = np.floor(np.arange(groups) * golden % 1 * n).astype(np.int64)
    return np.take_along_axis(points, (stride * np.arange(n) + shift[:, None]) % n, axis=1)
