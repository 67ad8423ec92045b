r"""The code that looks at the batch: results are interpolated by the distances of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import instance, positive, real, shown
from ..regression import KernelRegression
from .base import Code, FixedCode, unit_rows
from .batch_plan import Arrived, BatchPlan, SelectionPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..geometry import Geometry
    from ..grouping import Grouping

__all__ = ["KernelCode", "path_step"]

# Predicting an input from more than its neighbours on the path changes its variance little.
_NEIGHBOURHOOD = 512
# Errors grow more slowly than the variances that follow from distances: with their power 1.0 for a
# LeNet-5 on MNIST, 0.5 for a RepVGG and a vision transformer on Fashion-MNIST.
_GROWTH = 0.75
# Points farther from the batch's centre than so many times the root mean square of its inputs say
# nothing of the others, and their results may be so large that the mean does not either.
_FAR = 8
# The least median distance between neighbours, in the same unit: with less for its length, as noisy
# copies of a few images have, a regression sees next to nothing of the others, and all of rounding.
_SHORTEST = 0.01


class KernelCode(Code):
    r"""Coding by the distances between inputs: the recommended code.

    The paper lays a curve through the inputs in the order of their arrival and interpolates the
    results of each group along it. But the decoder may know every input that was sent, so results
    can be interpolated in *input space*, over all groups at once: the answers are the posterior
    means of a Gaussian process, given the results at the coded inputs,
    :class:`~coded_torch.regression.KernelRegression`. Inputs whose own result arrived are answered
    by that result, bit for bit. Where the batch's own results are predicted badly from each other,
    predictions are shrunk towards the mean of the results:
    :meth:`~coded_torch.regression.KernelRegression.trust`.

    ``KernelCode(K, N)`` mixes nothing. The extra N - K workers of a group repeat the inputs that
    the others say least about, so a batch is answered exactly up to the inputs that nobody
    answered. It is recommended as it is the most accurate in nearly every measurement, says which
    of its answers are exact, and carries inputs of any dtype.

    ``KernelCode(encoder=code)`` has the encoder of another code and decodes in input space: with
    the encoder E of a group and the inner products M of its inputs, those of its coded inputs are
    :math:`E M E^\top`. Workers whose row of E picks one input give that input's own result. So
    ``KernelCode(encoder=SplineCode(K, N))`` is the paper's encoder with the better decoder, and
    ``KernelCode(encoder=ReplicationCode(K, N))`` is replication that predicts what is lost.

    Args:
        num_data, num_workers: K and N, as for every :class:`~coded_torch.codes.Code`.
        encoder: the code whose encoder it has, and K and N; excludes these.
        shrinkage: of the metric, at least 0, see :class:`~coded_torch.geometry.Geometry`.
        length: of the regression, positive, in median distances between neighbours on the path
            through the batch. The error is flat around the default: some 5 % more at half and at
            twice.

    Raises:
        TypeError: a count is not an integer, ``encoder`` is no
            :class:`~coded_torch.codes.FixedCode`, or another argument is not real.
        ValueError: an argument violates its requirement.

    Note:
        Planning a batch of B and decoding M distinct results cost :math:`O(B^3 + M^3)` on the host;
        batches of more than 4,096 distinct results are planned in chunks. What is encoded and
        decoded are whole batches, through :meth:`fit`: there is no encoder without a batch to look
        at. Without distances, as for token ids, copies are equal and lost answers are the mean.

        Gradients take as constant what the code has chosen by looking at inputs and results: order,
        distances, copies, weights and trust. Those of answers that are an input's own result are
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
        num_data: int | None = None,
        num_workers: int | None = None,
        *,
        encoder: FixedCode | None = None,
        shrinkage: float = 0.01,
        length: float = 2.0,
    ) -> None:
        instance(self, "encoder", encoder, FixedCode, optional=True)
        if encoder is not None:
            if num_data is not None or num_workers is not None:
                raise ValueError(
                    "KernelCode: encoder must be given without num_data and num_workers, which it "
                    f"has, got {shown(num_data)} and {shown(num_workers)}"
                )
            num_data, num_workers = encoder.num_data, encoder.num_workers
        super().__init__(num_data, num_workers)  # type: ignore[arg-type]  # which refuses None
        self.encoder = encoder
        self.shrinkage = real(self, "shrinkage", shrinkage, "at least 0", lambda s: s >= 0)
        self.length = positive(self, "length", length)
        self.mixes = encoder is not None and encoder.mixes
        self.max_chunk = type(self).max_chunk
        if self.mixes:  # results of mixtures are all distinct, N / K times as many
            self.max_chunk = max(1, self.max_chunk // self.num_workers) * self.num_data

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {
            "length": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
            "shrinkage": (0.0, 0.00125, 0.004, 0.0125, 0.04, math.inf),
        }

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Code the inputs, or copy those that need it most, and measure what workers compute."""
        if geometry is None and self.mixes:
            raise ValueError("KernelCode: geometry must be given to fit mixtures, got None")
        batch = None if geometry is None else _Batch(self, grouping, geometry)
        if self.encoder is not None:
            encoder = self.encoder.encoder.matrix()
            own = unit_rows(encoder)
            point = grouping.rows[own]  # [N, G]; what stands at -1 is replaced below
            if batch is not None and self.mixes:
                mixed = own < 0
                point[mixed] = batch.add_mixtures(encoder[mixed], grouping.rows.T)
            return self._plan(point, grouping, batch)
        errors = np.ones(grouping.batch_size)
        if batch is not None and num_stragglers:  # else copies are equal, whatever the errors
            errors = batch.leave_one_out_variances(grouping.order).numpy() ** _GROWTH
        copies = _copies(grouping, self.num_workers, num_stragglers, errors)  # [G, K]
        points = np.stack([np.repeat(np.arange(len(c)), c) for c in copies])  # [G, N]
        # Dealt anew for each group, or a lost worker would be the same copy's in all of them.
        point = grouping.rows.gather(0, torch.from_numpy(_rotated(points)).T)
        return self._plan(point, grouping, batch)

    def fit_rows(self, grouping: Grouping, geometry: Geometry | None = None) -> BatchPlan:
        batch = None if geometry is None else _Batch(self, grouping, geometry)
        return self._plan(torch.arange(grouping.batch_size)[:, None], grouping, batch)

    def _plan(self, point: Tensor, grouping: Grouping, batch: _Batch | None) -> BatchPlan:
        if batch is None:
            return SelectionPlan(self, point, grouping.batch_size)
        return _KernelPlan(self, point, grouping, batch)


class _Batch:
    """The points that workers may compute: the inputs of a batch, and mixtures of them behind.

    Attributes:
        squared: ``[P, P]``, the squared distances of the points.
        usable: ``[P]``, bool: whether others are predicted from the results of the point.
        length: of the regression, in the same unit as distances.
    """

    def __init__(self, code: KernelCode, grouping: Grouping, geometry: Geometry) -> None:
        self.squared = geometry.squared_distances()
        self.usable = geometry.finite & (geometry.gram.diagonal() <= _FAR**2)
        self.length = code.length * path_step(self.squared, grouping.order)
        self._geometry = geometry

    def leave_one_out_variances(self, order: Tensor) -> Tensor:
        """Of each input predicted from all others, or, in large batches, those near in order."""
        variances = torch.empty(len(order), dtype=torch.float64)
        all_near = len(order) <= _NEIGHBOURHOOD
        for rows in [slice(None)] if all_near else order.split(_NEIGHBOURHOOD):
            block = self.squared[rows][:, rows]
            variances[rows] = KernelRegression(block, self.length).leave_one_out_variances
        return variances

    def add_mixtures(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Add the mixtures of every group as points.

        Args:
            weights: ``[Q, K]``, of the mixtures, the same in every group; each row sums to 1.
            rows: ``[G, K]``, the inputs of each group.

        Returns:
            ``[Q, G]``, the points that they are.
        """
        gram, lost = self._geometry.gram, ~self._geometry.finite
        # W M and W M W', group by group, as the weights are zero in all other groups.
        inner = torch.einsum("qk,gkb->qgb", weights, gram[rows]).flatten(0, 1)  # [Q G, B]
        among = torch.einsum("pgk,qk->pqg", inner[:, rows], weights).flatten(1)  # [Q G, Q G]
        squares = among.diagonal()
        inner = (squares[:, None] + gram.diagonal()).sub_(inner, alpha=2).clamp_(min=0)
        among = (squares[:, None] + squares).sub_(among, alpha=2).clamp_(min=0)
        # What an input that is infinitely far has been mixed into is infinitely far, too.
        nowhere = ((weights != 0)[:, None] & lost[rows]).any(dim=2).flatten()  # [Q G]
        inner.masked_fill_(nowhere[:, None] | lost, math.inf)
        among.masked_fill_(nowhere[:, None] | nowhere, math.inf).fill_diagonal_(0)
        first = len(self.squared)
        upper, lower = torch.cat([self.squared, inner.T], 1), torch.cat([inner, among], 1)
        self.squared = torch.cat([upper, lower])
        self.usable = torch.cat([self.usable, (squares <= _FAR**2) & ~nowhere])
        return torch.arange(first, len(self.squared)).view(len(weights), len(rows))


class _KernelPlan(SelectionPlan):
    """Answers lost inputs by regression on the distinct results of all groups.

    The points of :class:`_Batch` are what workers compute, ``point [N, G]``.
    """

    code: KernelCode

    def __init__(self, code: KernelCode, point: Tensor, grouping: Grouping, batch: _Batch) -> None:
        super().__init__(code, point, grouping.batch_size, batch.usable)
        self._grouping, self._batch = grouping, batch
        self._fitted: tuple[Arrived, KernelRegression] | None = None

    def encode(self, values: Tensor) -> Tensor:
        if not self.code.mixes:
            return super().encode(values)
        assert self.code.encoder is not None
        self.code.check_values(values)
        return self.code.encoder.encoder.gathered(values, self._grouping)

    def _weights(self, arrived: Arrived, results: Tensor) -> Tensor:
        regression = self._regression(arrived)
        trust = regression.trust(arrived.sample(results))
        # Shrunk towards the mean of the results as far as these are not predicted by each other.
        mean = (1 - trust) / len(arrived.used)
        return regression.weights(self._to_lost(arrived)).mul_(trust).add_(mean)

    def _left_out_square(self, arrived: Arrived, sample: Tensor) -> float:
        residuals = self._regression(arrived).leave_one_out_residuals(sample)
        return float(residuals.square().sum())

    def _variances(self, arrived: Arrived, results: Tensor | None) -> Tensor:
        regression = self._regression(arrived)
        variances = regression.variances(self._to_lost(arrived))
        if results is not None:
            variances *= regression.output_variance(arrived.sample(results))
        return variances

    def _regression(self, arrived: Arrived) -> KernelRegression:
        # Kept for outputs of several leaves, and the errors to expect of them; not a history.
        if self._fitted is None or self._fitted[0] is not arrived:
            among = self._batch.squared[arrived.points][:, arrived.points]
            self._fitted = arrived, KernelRegression(among, self._batch.length)
        return self._fitted[1]

    def _to_lost(self, arrived: Arrived) -> Tensor:
        """Squared distances of the lost inputs from those of the used results, ``[L, M]``."""
        return self._batch.squared[arrived.lost][:, arrived.points]


def _copies(
    grouping: Grouping, num_workers: int, num_stragglers: int, errors: NDArray[np.float64]
) -> NDArray[np.int64]:
    """How many workers each input of each group gets, ``[G, K]``.

    Greedy, one at a time, where it lowers the expected squared error most: the probability that
    all copies are lost times ``errors [B]``, what is to be expected then. It is convex in the
    copies, so greedy is best.
    """
    # lost[c] is the probability that all of c workers are among the S lost ones of N.
    lost = np.ones(num_workers + 2)
    for i in range(num_workers):
        lost[i + 1] = lost[i] * max(num_stragglers - i, 0) / (num_workers - i)
    gain = lost[:-1] - lost[1:]
    of_group = errors[grouping.rows.T.numpy()]  # [G, K]
    real = (grouping.targets.T >= 0).numpy()  # not what fills up the last group
    copies = real.astype(np.int64)
    groups = np.arange(len(copies))
    while (active := copies.sum(axis=1) < num_workers).any():
        # Between equals, the one with fewer copies.
        score = np.where(real, gain[copies] * of_group - 1e-12 * copies, -np.inf)
        copies[groups, score.argmax(axis=1)] += active
    return copies


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
