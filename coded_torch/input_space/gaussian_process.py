r"""Regression on distances: predictions, their errors, and how well results predict each other."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import matern52, matern52_among
from .geometry import evenly

__all__ = ["NUGGET", "Comparison", "GaussianProcess", "matern52", "scaled"]

#: The variance of a result that its input does not explain, relative to the outputs' variance. It
#: keeps repeated inputs apart; with 1e-3 the squared error of 3,400 results is .993 to 1.004 times
#: as large (theory, section 10).
NUGGET = 1e-4
# If there are more results, evenly spaced ones are left out: all of 3,400 take .5 s.
# (benchmarks accuracy)
_ALL_LEFT_OUT = 512
_LEFT_OUT = 256
# Standard errors that a gain must exceed. On outputs of noise, with 6 to 204 results, the mean is
# predicted in 65 to 78 of 100 batches instead of 17 to 60. Where inputs explain little, and in
# residuals of students, the squared error stays within .2 %. A whole standard error costs up to 7 %
# there. (benchmarks learning)
_ERRORS = 0.5


class GaussianProcess:
    r"""The Gaussian process of an unknown constant mean, given results at M points.

    With :math:`C = k(Z, Z) + \nu I` for a Matern 5/2 covariance :math:`k`, the prediction at a
    point of covariances :math:`k` with the results :math:`y` is the best linear unbiased one,

    .. math:: k^T C^{-1} y + (1 - k^T C^{-1} 1) \, \frac{1^T C^{-1} y}{1^T C^{-1} 1} ,

    linear in the results, so any number of outputs shares one factorisation.

    Args:
        squared_distances: ``[P, P]``, of some points, float32 or float64. In float32, which
            predicts as well up to 4,096 results and takes half the time, all is computed in
            float32, unless there is no factorisation.
        length: of the covariance, positive.
        points: ``[M]``, the points whose results are given, at least one. Defaults to all.

    Attributes:
        left_out: ``[n]``, the results that are predicted from all others, each in turn: all, or, of
            more than 512, 256 of them, evenly spaced.

    Note:
        :math:`O(M^3)` once, :math:`O(M^2)` per prediction. Callers leave autocast and default
        devices: it is made eight times a call, and each context takes 5 us.

    References:
        Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, sections 2.7, 5.4.

    Example:
        >>> import torch
        >>> from coded_torch.input_space.gaussian_process import GaussianProcess
        >>> at = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
        >>> squares = (at[:, None] - at).square()
        >>> process = GaussianProcess(squares, 2.0, points=torch.arange(3))
        >>> process.at(torch.tensor([3]))[0].round(decimals=2)
        tensor([[ 0.4500,  0.6800, -0.1300]], dtype=torch.float64)
    """

    def __init__(
        self, squared_distances: Tensor, length: float, points: Tensor | None = None
    ) -> None:
        self._squared, self._length, self._nugget = squared_distances, length, NUGGET
        self._points = torch.arange(len(squared_distances)) if points is None else points
        self._factor, failed = self._factored(squared_distances.dtype)
        while failed:  # ends: with a nugget of M at the latest, the diagonal dominates
            if bool(squared_distances.isnan().any()):
                raise ValueError("GaussianProcess: squared_distances must be numbers, got NaN")
            if self._factor.dtype == torch.float64:
                self._nugget *= 10
            self._factor, failed = self._factored(torch.float64)
        # The rows of L^-T, for the factor L, of the results that are left out; and 1' C^-1, [1, M].
        count = len(self._factor)
        self._leaves_all = count <= _ALL_LEFT_OUT
        if self._leaves_all:
            self.left_out = torch.arange(count)
            self._of_left_out = self._solved(torch.eye(count, dtype=self._factor.dtype), True)
            self._mean = self._of_left_out.sum(0, keepdim=True) @ self._of_left_out.T
        else:
            self.left_out = evenly(count, _LEFT_OUT)
            some = self._factor.new_zeros(len(self.left_out), count)
            self._of_left_out = self._solved(some.scatter_(1, self.left_out[:, None], 1), True)
            self._mean = self._solved(self._solved(self._factor.new_ones(1, count), True))
        self._precision = float(self._mean.sum())
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
        self._last_residuals: tuple[Tensor, Tensor] | None = None

    def _factored(self, dtype: torch.dtype) -> tuple[Tensor, bool]:
        """Return the covariance's lower Cholesky factor, and whether there is none."""
        # Laid out as LAPACK has it, which is the same, as it is symmetric.
        covariance = self._covariances(self._points, dtype).mT
        covariance.diagonal().add_(self._nugget)
        failed = covariance.new_empty((), dtype=torch.int32)
        # In its own memory: of many results, new memory takes an eighth as long again.
        torch.linalg.cholesky_ex(covariance, out=(covariance, failed))
        return covariance, bool(failed)

    def _covariances(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the covariances of some points with the points that have results."""
        return matern52_among(self._squared.to(dtype), rows, self._points, self._length)

    def _solved(self, rows: Tensor, transposed: bool = False) -> Tensor:
        return _solved(rows, self._factor, transposed=transposed)

    def _half(self, rows: Tensor) -> Tensor:
        """Return rows times L^-T, by a product if it is known."""
        return rows @ self._of_left_out if self._leaves_all else self._solved(rows, True)

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights ``[L, M]`` of the results at points ``[L]``, and variances ``[L]``.

        Both are float64. The weights of a point sum to one, and variances are in the outputs'.
        """
        if self._last is None or not torch.equal(self._last[0], points):
            covariances = self._covariances(points, self._factor.dtype)
            half = self._half(covariances)
            left = 1 - (covariances @ self._mean.T).double()
            explained = torch.linalg.vector_norm(half, dim=1, dtype=torch.float64).square_()
            explained -= left.squeeze(1).square() / self._precision
            weights = half @ self._of_left_out.T if self._leaves_all else self._solved(half)
            weights = weights.double().addmm_(left, self._mean.double(), alpha=1 / self._precision)
            weights += (1 - weights.sum(1, keepdim=True)) / weights.shape[1]  # after rounding
            self._last = points, weights, (1 + self._nugget - explained).clamp_(min=self._nugget)
        return self._last[1:]

    def coefficients(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, ``[M, C]``, and b, ``[C]``: for covariances k, ``k A + b`` is predicted."""
        y = results.to(self._factor.dtype)
        mean = (self._mean @ y / self._precision).squeeze(0)
        return torch.cholesky_solve(y - mean, self._factor), mean

    # Leaving out: with the projection P = C^-1 - m m' / 1' m, m = C^-1 1, the residual of a result
    # that is left out is (P y) / P_ii, of variance 1 / P_ii.

    @functools.cached_property
    def leave_one_out_variances(self) -> Tensor:
        """The variance of each result that is left out, ``[n]``, float64."""
        mean = self._mean[0, self.left_out]
        squares = self._of_left_out.square().sum(1)
        inverses = squares.addcmul_(mean, mean, value=-1 / self._precision).double()
        return 1 / inverses.clamp_(min=1e-12)  # a single result has 0

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """Return the results that are left out less their predictions from all others.

        Args:
            results: ``[M, C]``, float64. The residuals of the last tensor are kept.

        Returns:
            ``[n, C]``, float64.
        """
        if self._last_residuals is not None and torch.equal(self._last_residuals[0], results):
            return self._last_residuals[1]
        y, size = scaled(results)
        y = y.to(self._factor.dtype)
        mean = y @ self._mean.T / self._precision
        residuals = self._of_left_out @ self._half(y).T
        residuals.addmm_(self._mean.T[self.left_out], mean.T, alpha=-1)  # over variances
        residuals = residuals.double() * (self.leave_one_out_variances[:, None] * size)
        self._last_residuals = results, residuals
        return residuals

    def leave_one_out_error(self, results: Tensor) -> tuple[float, float]:
        r"""Return how well results are predicted from each other, each from all others.

        Returns:
            The root mean square of the residuals, relative to the mean of the others', NaN if all
            results are equal; and how far to follow predictions away from the mean, in [0, 1]: the
            slope of the regression, through 0, of every result on its prediction, both less the
            mean of the others; 0 if its gain against the mean may be chance.
        """
        deviations, residuals = self.deviations(results), self.leave_one_out_residuals(results)
        predicted = deviations - residuals
        total, left, square = (float(x.square().sum()) for x in (deviations, residuals, predicted))
        error = math.sqrt(left / total) if total > 0 else math.nan
        if not square > 0:
            return error, 1.0
        slope = min(max((total + square - left) / (2 * square), 0), 1)
        gains = (predicted * (2 * deviations - slope * predicted)).sum(1) * (slope / square)
        by_chance = _ERRORS * float(gains.std(correction=0)) * math.sqrt(len(gains))
        return error, slope if float(gains.sum()) > by_chance else 0.0

    def deviations(self, results: Tensor) -> Tensor:
        """Return the results that are left out, each less the mean of all others."""
        some = results if self._leaves_all else results[self.left_out]
        return (some - results.mean(0)).mul_(len(results) / max(len(results) - 1, 1))


class Comparison:
    """Several regressions of the same results, by how well results predict each other.

    Args:
        squared: ``[K, n, n]``, float32, the squared distances in each.
        lengths: of the covariances.
    """

    def __init__(self, squared: Tensor, lengths: Sequence[float]) -> None:
        scales = squared.new_tensor([length**-2 for length in lengths])
        covariance = squared * scales.view(-1, 1, 1)
        matern52(covariance, 1.0, out=covariance)
        covariance.diagonal(dim1=1, dim2=2).add_(NUGGET)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        self._failed = failed > 0
        half = _solved(torch.eye(factor.shape[1]).expand_as(factor), factor, transposed=True)
        # A product of matrices would take longer: they lie in memory by columns.
        mean = (half * half.sum(1, keepdim=True)).sum(2)
        precision = mean.sum(1, keepdim=True)
        precisions = half.square().sum(2).addcdiv_(mean.square(), precision, value=-1)
        self._half, self._weights = half, mean / precision
        self._precisions = precisions.double().clamp_(min=1e-12)
        self._logarithms = self._precisions.log()

    def losses(self, y: Tensor) -> Tensor:
        r"""Return how badly each result is predicted from all others, ``[K, n]``: less is better.

        The loss is the negative logarithm of the density that the others' prediction and its
        variance give to each number of a result, on average and but for a constant, at the best
        variance of the outputs: with the residuals e, their variances v, and the mean q of
        :math:`e^2 / v` over all numbers,

        .. math:: \tfrac12 \log q + \tfrac12 \left(\overline{e^2 / (q v)} - 1\right)
            + \tfrac12 \log v .

        So a few inputs far from all others do not decide.

        Args:
            y: ``[C, n]``, results as :func:`scaled` returns them.
        """
        y = y.to(self._half.dtype)
        centred = y - (self._weights @ y.T).unsqueeze(2)  # [K, C, n]
        residuals = torch.bmm(torch.bmm(centred, self._half), self._half.mT)
        squares = residuals.square_().mean(1).double().div_(self._precisions)
        mean = squares.mean(1, keepdim=True).clamp_(min=1e-300)
        losses: Tensor = squares.div_(mean).add_(mean.log_() - 1).sub_(self._logarithms).div_(2)
        return losses.masked_fill_(self._failed[:, None], math.inf)


def scaled(results: Tensor) -> tuple[Tensor, float]:
    """Return results ``[M, C]`` centred and of size 1 at most, ``[C, M]``, and the size.

    Residuals stay as they are, but for the size, and precise.
    """
    y = results - results.mean(0)
    size = (float(y.abs().max()) if y.numel() else 0.0) or 1.0
    return y.div_(size).T.contiguous(), size


def _solved(rows: Tensor, factor: Tensor, *, transposed: bool = False) -> Tensor:
    """Return rows times the inverse of a lower triangle, or of its transpose.

    So LAPACK takes all as it lies; solving for columns copies both operands.
    """
    triangle = factor.mT if transposed else factor
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=transposed, left=False)
    return solved
