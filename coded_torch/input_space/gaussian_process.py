r"""FittedRegression in input space: answers from results by the distances of their inputs."""

from __future__ import annotations

import abc
import functools
import math

import torch
from torch import Tensor

from .._arguments import dense, positive
from .._transforms import exactly, on_host
from ..ops import matern52, matern52_among

__all__ = ["MOST_INVERTED", "NUGGET", "FittedRegression", "KernelRegression", "PartialRegression"]
__all__ += ["matern52"]

#: Variance of a result that its input does not explain, relative to the outputs' variance.
NUGGET = 1e-4
_TINY = 1e-12
#: Of more results there is no inverse, and only some are left out, evenly spaced.
MOST_INVERTED = 512
_LEFT_OUT = 256
# Standard errors that a gain must exceed. On outputs of noise, with 6 to 204 results, the mean is
# predicted in 65 to 78 of 100 batches instead of 17 to 60; where inputs explain little, and in what
# students leave, the squared error stays within .2 %. A whole standard error costs up to 7 % there.
_ERRORS = 0.5


class FittedRegression(abc.ABC):
    """A regression given results, and how well it predicts each of them from all others.

    Attributes:
        left_out: ``[n]``, the results that are predicted from all others, each in turn: all, or, of
            more than 512, 256 of them, evenly spaced.
    """

    left_out: Tensor
    _last: tuple[Tensor, Tensor] | None = None

    @abc.abstractmethod
    def weights_at(self, points: Tensor) -> Tensor:
        """The weights of the results in predictions, ``[L, M]``; every row sums to one.

        Args:
            points: ``[L]``, without results, of those that the distances are of.
        """

    @abc.abstractmethod
    def variances_at(self, points: Tensor) -> Tensor:
        """The variances of predictions, ``[L]``, float64, in units of the outputs' variance."""

    @abc.abstractmethod
    def predictions_at(self, points: Tensor, results: Tensor) -> Tensor:
        """Predictions from ``results [M, C]``, ``[L, C]``: where C < L, cheaper than by weights."""

    @property
    @abc.abstractmethod
    def leave_one_out_variances(self) -> Tensor:
        """The variance of each result that is left out, predicted from all others, ``[n]``."""

    @abc.abstractmethod
    def _residuals(self, results: Tensor) -> Tensor:
        """Of centred results ``[M, C]`` of size 1 at most, ``[n, C]``, over their variances."""

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """``results [M, C]`` that are left out less their predictions from all others, ``[n, C]``.

        Those of the same tensor as last time are kept.

        Args:
            results: float64.
        """
        if self._last is not None and self._last[0] is results:
            return self._last[1]
        centred = results - results.mean(0)  # which leaves residuals as they are, and precise
        size = (float(centred.abs().max()) if centred.numel() else 0.0) or 1.0
        residuals = self._residuals(centred.div_(size)).double()
        self._last = results, residuals * (self.leave_one_out_variances[:, None] * size)
        return self._last[1]

    def leave_one_out_error(self, results: Tensor) -> float:
        """The root mean square of the residuals, relative to predicting by the mean of the others.

        NaN where all results are equal.
        """
        deviations = self._deviations(results)
        square = float(deviations.square().sum())
        left = float(self.leave_one_out_residuals(results).square().sum())
        return math.sqrt(left / square) if square > 0 else math.nan

    def trust(self, results: Tensor) -> float:
        r"""How far to follow predictions away from the mean, in [0, 1], by ``results [M, C]``.

        The slope of the regression, through 0, of every result on its prediction from all others,
        both less the mean of the others: about 1 where the covariance describes the outputs, 0
        where the inputs say nothing of them. It is 0 where all that it gains against the mean may
        be chance.
        """
        deviations = self._deviations(results)
        predicted = deviations - self.leave_one_out_residuals(results)
        square = float(predicted.square().sum())
        if not square > 0:
            return 1.0
        slope = min(max(float((predicted * deviations).sum()) / square, 0), 1)
        gains = (predicted * (2 * deviations - slope * predicted)).sum(1) * (slope / square)
        by_chance = _ERRORS * float(gains.std(correction=0)) * math.sqrt(len(gains))
        return slope if float(gains.sum()) > by_chance else 0.0

    def _deviations(self, results: Tensor) -> Tensor:
        """The results that are left out, each less the mean of all others."""
        deviations = results[self.left_out] - results.mean(0)
        return deviations.mul_(len(results) / max(len(results) - 1, 1))

    def output_variance(self, results: Tensor) -> float:
        """The outputs' variance, by which leave-one-out residuals are as large as is expected.

        The sum of the squared residuals of ``results [M, C]`` over that of their variances; 0 where
        there is one result only, which says nothing of it. The restricted likelihood's maximum
        weighs residuals where the variance is small, and is often larger where the kernel does not
        describe the outputs: errors expected by it were up to 1.3 times those measured.
        """
        if len(results) < 2:
            return 0.0
        squares = self.leave_one_out_residuals(results).square().mean(1)
        return float(squares.sum() / self.leave_one_out_variances.sum())


class KernelRegression(FittedRegression):
    r"""The Gaussian process of an unknown constant mean, given results at M inputs.

    With :math:`C = k(Z, Z) + \nu I`, the prediction at an input of covariances :math:`k` with the
    results :math:`y` is the best linear unbiased one,

    .. math:: k^T C^{-1} y + (1 - k^T C^{-1} 1) \, \frac{1^T C^{-1} y}{1^T C^{-1} 1} ,

    linear in the results, so any number of outputs shares one factorisation.

    Args:
        squared_distances: ``[P, P]``, of some points, P at least 1. In float32, which predicts as
            well up to 4,096 results and takes half the time, all is computed in float32, unless
            there is no factorisation.
        length: of the :func:`matern52` covariance, positive.
        nugget: :math:`\nu`, positive; it also keeps repeated inputs apart. Where the distances are
            so badly rounded that no points have them, it is raised tenfold until there is a
            factorisation, in float64.
        points: ``[M]``, those whose results are given; None: all.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument violates its requirement, or a distance is NaN.

    Note:
        :math:`O(M^3)` once, :math:`O(M^2)` per prediction.

    References:
        Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, sections 2.7, 5.4.

    Example:
        >>> import torch
        >>> from coded_torch.input_space.gaussian_process import KernelRegression
        >>> at = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> fit = KernelRegression((at[:, None] - at).square(), length=2.0)
        >>> fit.weights(torch.tensor([[0.25, 0.25, 2.25]], dtype=torch.float64)).round(decimals=2)
        tensor([[ 0.4500,  0.6800, -0.1300]], dtype=torch.float64)
    """

    @on_host()
    def __init__(
        self,
        squared_distances: Tensor,
        length: float,
        nugget: float = NUGGET,
        points: Tensor | None = None,
    ) -> None:
        dense(self, "squared_distances", squared_distances)
        p, *others = squared_distances.shape or (0,)
        if others != [p] or p == 0:
            raise ValueError(
                "KernelRegression: squared_distances must be [M, M], M at least 1, "
                f"got shape {tuple(squared_distances.shape)}"
            )
        self.length = positive(self, "length", length)
        self.nugget = positive(self, "nugget", nugget)
        self._squared, self._points = squared_distances, points
        self._factor, failed = self._factored(squared_distances.dtype)
        if failed and bool(self._covariance(squared_distances.dtype).isnan().any()):
            raise ValueError("KernelRegression: squared_distances must be numbers, got NaN")
        if failed and squared_distances.dtype != torch.float64:
            self._factor, failed = self._factored(torch.float64)
        while failed:  # ends: with a nugget of M at the latest, the diagonal dominates
            self.nugget *= 10
            self._factor, failed = self._factored(torch.float64)
        m = len(self._factor)
        self.left_out = torch.arange(m)
        if m > MOST_INVERTED:
            self.left_out = torch.arange(_LEFT_OUT) * m // _LEFT_OUT
        self._half_one = _solved(self._factor.new_ones(1, m), self._factor, transposed=True)
        self._mean = _solved(self._half_one, self._factor, transposed=False)  # [1, M], C^-1 1
        self._precision = float(self._mean.sum())
        self._last_half: tuple[Tensor, Tensor] | None = None

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The covariance's lower Cholesky factor, and whether there is none."""
        covariance = self._covariance(dtype).mT  # laid out as LAPACK has it: it is symmetric
        failed = covariance.new_empty((), dtype=torch.int32)
        # In its own memory: where there are many results, new memory takes an eighth as long again.
        torch.linalg.cholesky_ex(covariance, out=(covariance, failed))
        return covariance, failed

    def _covariance(self, dtype: torch.dtype) -> Tensor:
        if self._points is None:
            covariance = matern52(self._squared.to(dtype), self.length)
        else:
            covariance = self._covariances(self._points, dtype)
        covariance.diagonal().add_(self.nugget)
        return covariance

    @on_host()
    def _covariances(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Those of some points with those that have results."""
        points = torch.arange(len(self._squared)) if self._points is None else self._points
        return matern52_among(self._squared.to(dtype), rows, points, self.length)

    def squared_distance(self, i: int, j: int) -> float:
        """That of two inputs with results."""
        at = [i, j] if self._points is None else self._points[[i, j]].tolist()
        return float(self._squared[at[0], at[1]])

    def weights(self, squared_distances: Tensor) -> Tensor:
        """The weights of the results, ``[L, M]``, for inputs at distances ``[L, M]`` from theirs.

        Every row sums to one.
        """
        return self._weights(self._half(self._matern(squared_distances)))

    def variances(self, squared_distances: Tensor) -> Tensor:
        """The predictions' variances ``[L]``, in units of the outputs' variance, likewise."""
        return self._variances(self._half(self._matern(squared_distances)))

    def weights_at(self, points: Tensor) -> Tensor:
        return self._weights(self._half_at(points))

    def variances_at(self, points: Tensor) -> Tensor:
        return self._variances(self._half_at(points))

    @exactly()
    def predictions_at(self, points: Tensor, results: Tensor) -> Tensor:
        coefficients, mean = self.coefficients(results)
        return torch.addmm(mean, self._covariances(points, self._factor.dtype), coefficients)

    def _matern(self, squared_distances: Tensor) -> Tensor:
        return matern52(squared_distances.to(self._factor.dtype), self.length)

    def _half_at(self, points: Tensor) -> Tensor:
        """Of some points, kept for variances beside weights."""
        if self._last_half is None or self._last_half[0] is not points:
            self._last_half = points, self._half(self._covariances(points, self._factor.dtype))
        return self._last_half[1]

    def _half(self, covariances: Tensor) -> Tensor:
        return _solved(covariances, self._factor, transposed=True)

    @exactly()
    def _weights(self, half: Tensor) -> Tensor:
        weights = _solved(half, self._factor, transposed=False)
        left = 1 - weights.sum(1, keepdim=True)
        return weights.addmm_(left, self._mean, alpha=1 / self._precision)

    @exactly()
    def _variances(self, half: Tensor) -> Tensor:
        left = 1 - (half @ self._half_one.T).squeeze(1).double()
        explained = torch.linalg.vector_norm(half, dim=1, dtype=torch.float64).square_()
        explained -= left.square() / self._precision
        variances: Tensor = (1 + self.nugget - explained).clamp_(min=0)
        return variances

    def coefficients(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """A, ``[M, C]``, and b, ``[C]``: where covariances are k, the prediction is ``k A + b``."""
        y = results.to(self._factor.dtype)
        mean = (self._mean @ y / self._precision).squeeze(0)
        return torch.cholesky_solve(y - mean, self._factor), mean

    @functools.cached_property
    def leave_one_out_variances(self) -> Tensor:
        if len(self.left_out) == len(self._factor):
            inverses = self.projection.diagonal().double()
        else:
            mean = self._mean[0, self.left_out].double()
            inverses = self._of_left_out.double().square().sum(1) - mean.square() / self._precision
        return 1 / inverses.clamp(min=_TINY)  # of a single result they are 0

    @exactly()
    def _residuals(self, results: Tensor) -> Tensor:
        results = results.to(self._factor.dtype)
        if len(self.left_out) == len(self._factor):
            return self.projection @ results
        y = results.T.contiguous()  # [C, M]
        mean = y @ self._mean.T / self._precision
        # Long rows, few of them: transposed, it takes seven times as long.
        products = _solved(y, self._factor, transposed=True) @ self._of_left_out.T  # [C, n]
        return products.addmm_(mean, self._mean[:, self.left_out], alpha=-1).T

    @property
    def covariance(self) -> Tensor:
        """C, ``[M, M]``."""
        return torch.mm(self._factor, self._factor.T)

    @functools.cached_property
    def projection(self) -> Tensor:
        r""":math:`P = C^{-1} - m m^\top / 1^\top m`, :math:`m = C^{-1} 1`, ``[M, M]``.

        Leaving a set I of results out, their residuals are :math:`P_{II}^{-1} (P y)_I`, of
        variance :math:`P_{II}^{-1}`.
        """
        mean = self._mean[0]
        inverse = torch.cholesky_inverse(self._factor)
        return torch.addr(inverse, mean, mean, alpha=-1 / self._precision)

    @functools.cached_property
    def _of_left_out(self) -> Tensor:
        """The rows of the factor's inverse, transposed, that belong to what is left out."""
        some = self._factor.new_zeros(len(self.left_out), len(self._factor))
        return _solved(some.scatter_(1, self.left_out[:, None], 1), self._factor, transposed=True)


class PartialRegression(FittedRegression):
    r"""The regression given some of the results of another one, without a new factorisation.

    With the projection P of all inputs, U those with and O those without a result, what is
    predicted for O is :math:`-P_{OO}^{-1} P_{OU} \, y`, of variance :math:`P_{OO}^{-1}`, and the
    projection of U alone is :math:`P_{UU} - P_{UO} P_{OO}^{-1} P_{OU}`.

    Args:
        whole: the regression given the results of all M inputs.
        points: ``[U]``, those whose results are given, at least one.

    Note:
        :math:`O(M^2)` where few are without a result, beside the projection of the whole.
    """

    @exactly()
    def __init__(self, whole: KernelRegression, points: Tensor) -> None:
        projection = whole.projection
        given = torch.zeros(len(projection), dtype=torch.bool).index_fill_(0, points, True)
        self._others = (~given).nonzero().flatten()
        self._points, self._projection = points, projection
        self.left_out = torch.arange(len(points))
        across = projection.index_select(0, self._others)  # [O, M]
        self._factor = torch.linalg.cholesky(across.index_select(1, self._others))
        known = across.index_select(1, points)  # [O, U]
        half = torch.linalg.solve_triangular(self._factor, known, upper=False)
        self._of_others = torch.linalg.solve_triangular(self._factor.mT, half, upper=True).neg_()
        inverses = (projection.diagonal()[points] - half.square_().sum(0)).double()
        self._variances: Tensor = 1 / inverses.clamp_(min=_TINY)  # of a single result they are 0

    @property
    def leave_one_out_variances(self) -> Tensor:
        return self._variances

    def weights_at(self, points: Tensor) -> Tensor:
        weights: Tensor = self._of_others.index_select(0, torch.searchsorted(self._others, points))
        # What rounding leaves of the sum.
        return weights.add_((1 - weights.sum(1, keepdim=True)) / len(self._points))

    def variances_at(self, points: Tensor) -> Tensor:
        variances = torch.cholesky_inverse(self._factor).diagonal()
        return variances.index_select(0, torch.searchsorted(self._others, points)).double()

    @exactly()
    def predictions_at(self, points: Tensor, results: Tensor) -> Tensor:
        weights = self.weights_at(points)  # which are there
        return weights @ results.to(weights.dtype)

    @exactly()
    def _residuals(self, results: Tensor) -> Tensor:
        results = results.to(self._projection.dtype)
        every = results.new_empty(len(self._projection), results.shape[1])
        every.index_copy_(0, self._points, results)
        every.index_copy_(0, self._others, self._of_others @ results)
        return torch.mm(self._projection, every).index_select(0, self._points)


def _solved(rows: Tensor, factor: Tensor, *, transposed: bool) -> Tensor:
    """Rows times the inverse of a lower triangle, or of its transpose.

    So LAPACK takes all as it lies; solving for columns copies both operands.
    """
    triangle = factor.mT if transposed else factor
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=transposed, left=False)
    return solved
