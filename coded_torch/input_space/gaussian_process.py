r"""Regression on distances: estimates, their errors, and how well results estimate each other."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from ..ops import matern52 as matern52
from ..ops import matern52_among
from .geometry import evenly

#: The variance of a result that its input does not explain, relative to the outputs' variance. It
#: keeps repeated inputs apart; with 1e-3 the squared error of 3,400 results is .993 to 1.004 times
#: as large (measured once; no benchmark keeps it).
NUGGET = 1e-4
# If there are more results, evenly spaced ones are left out: all of 3,400 take .5 s.
# (benchmarks accuracy)
_ALL_LEFT_OUT = 512
_LEFT_OUT = 256
# Standard errors that a gain must exceed. On outputs of noise, with 6 to 204 results, the mean is
# estimated in 65 to 78 of 100 batches instead of 17 to 60. Where inputs explain little, and in
# residuals of students, the squared error stays within .2 %. A whole standard error costs up to 7 %
# there. (measured once; no benchmark keeps it)
_ERRORS = 0.5


class GaussianProcess:
    r"""The Gaussian process of an unknown constant mean, given results at M points.

    With :math:`C = k(Z, Z) + \nu I` for a Matern 5/2 covariance :math:`k`, the estimate at a
    point of covariances :math:`k` with the results :math:`y` is the best linear unbiased one,

    .. math:: k^T C^{-1} y + (1 - k^T C^{-1} 1) \, \frac{1^T C^{-1} y}{1^T C^{-1} 1} ,

    linear in the results (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006,
    sections 2.7 and 5.4). It costs :math:`O(M^3)` once and :math:`O(M^2)` per estimate. Callers
    leave autocast and default devices, as each context takes 5 us.

    Args:
        squared: ``[P, P]``, squared distances of points. In float32, which estimates as well up to
            4,096 results and takes half the time, all is computed in float32, unless there is no
            factorisation.
        length: of the covariance, positive.
        known: ``[M]``, the points whose results are given, at least one. Defaults to all.
        at: ``[L]``, the points that are estimated. Defaults to none.

    Attributes:
        left_out: ``[n]``, the results that are estimated from all others: all, or 256 of many.
    """

    def __init__(
        self, squared: Tensor, length: float, known: Tensor | None = None, at: Tensor | None = None
    ) -> None:
        known = torch.arange(len(squared)) if known is None else known
        self._at = known[:0] if at is None else at
        dtype, self._nugget = squared.dtype, NUGGET
        while True:  # ends: with a nugget of M at the latest, the diagonal dominates
            self._where = squared.to(dtype), known, length
            # Laid out as LAPACK has it, which is the same, as it is symmetric.
            covariance = matern52_among(self._where[0], known, known, length).mT
            covariance.diagonal().add_(self._nugget)
            failed = covariance.new_empty((), dtype=torch.int32)
            # In its own memory: of many results, new memory takes an eighth as long again.
            torch.linalg.cholesky_ex(covariance, out=(covariance, failed))
            if not failed:
                break
            if bool(squared.isnan().any()):
                raise ValueError("GaussianProcess: squared must be numbers, got NaN")
            if dtype == torch.float64:
                self._nugget *= 10
            dtype = torch.float64
        self._factor = covariance
        # The rows of L^-T, for the factor L, of the results that are left out; and C^-1 1, [M].
        count = len(known)
        self._leaves_all = count <= _ALL_LEFT_OUT
        self.left_out = evenly(count, count if self._leaves_all else _LEFT_OUT)
        some = covariance.new_zeros(len(self.left_out), count)
        self._of_left_out = _solved(some.scatter_(1, self.left_out[:, None], 1), covariance, True)
        self._mean = self._whole(self._half(covariance.new_ones(1, count)))[0]
        self._precision = float(self._mean.sum())
        self._last: tuple[Tensor, tuple[Tensor, Tensor, float]] | None = None

    def _half(self, rows: Tensor) -> Tensor:
        """Return rows times L^-T, by a product if it is known."""
        return rows @ self._of_left_out if self._leaves_all else _solved(rows, self._factor, True)

    def _whole(self, half: Tensor) -> Tensor:
        """Return rows times C^-1, of rows times L^-T."""
        return half @ self._of_left_out.T if self._leaves_all else _solved(half, self._factor)

    @functools.cached_property
    def _toward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances times L^-T, ``[L, M]``, the mean's weights ``[L]``, and variances ``[L]``."""
        squared, known, length = self._where
        covariances = matern52_among(squared, self._at, known, length)
        half = self._half(covariances)
        left = 1 - (covariances @ self._mean).double().numpy()
        explained = torch.linalg.vector_norm(half, dim=1, dtype=torch.float64).numpy()
        variances = 1 + self._nugget - explained**2 + left**2 / self._precision
        variances = np.maximum(variances, self._nugget)
        return half, torch.from_numpy(left), torch.from_numpy(variances)

    @property
    def variances(self) -> Tensor:
        """The variances of estimates, ``[L]``, float64, in the outputs'."""
        return self._toward[2]

    @functools.cached_property
    def weights(self) -> Tensor:
        """The weights of the results, ``[L, M]``, float64: rows that sum to one."""
        half, left, _ = self._toward
        found = self._whole(half).double().numpy()
        found += (left.numpy() / self._precision)[:, None] * self._mean.numpy()
        found += ((1 - found.sum(1)) / found.shape[1])[:, None]  # after rounding
        return torch.from_numpy(found)

    @property
    def weights_of_left_out(self) -> Tensor:
        """The weights of the results that are left out, ``[L, n]``."""
        if self._leaves_all:
            return self.weights
        half, left, _ = self._toward
        weights = (half @ self._of_left_out.T).double()
        return weights.addr_(left, self._mean[self.left_out].double(), alpha=1 / self._precision)

    def estimate(self, results: Tensor, trust: float = 1.0) -> Tensor:
        """Return estimates ``[L, C]``, shrunk towards the mean of the results ``[M, C]``."""
        (half, left, _), (right, mean, size) = self._toward, self._seen(results)
        found = (half @ right.T).addr_(left.to(half), mean).double()
        return found.mul_(trust * size) + results.mean(0)

    def _seen(self, results: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return scaled results times L^-T, ``[C, M]``, their mean ``[C]``, and the scale."""
        if self._last is None or not torch.equal(self._last[0], results):
            y, size = scaled(results)
            y = y.to(self._factor.dtype)
            self._last = results, (self._half(y), y @ self._mean / self._precision, size)
        return self._last[1]

    def coefficients(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, ``[M, C]``, and b, ``[C]``: for covariances k, ``k A + b`` is estimated."""
        y = results.to(self._factor.dtype)
        mean = self._mean @ y / self._precision
        return torch.cholesky_solve(y - mean, self._factor), mean

    # Leaving out: with the projection P = C^-1 - m m' / 1' m, m = C^-1 1, the residual of a result
    # that is left out is (P y) / P_ii, of variance 1 / P_ii.

    @functools.cached_property
    def leave_one_out_variances(self) -> Tensor:
        """The variance of each result that is left out, ``[n]``, float64."""
        squares = self._of_left_out.square().sum(1).numpy()
        mean = self._mean[self.left_out].numpy()
        inverses = (squares - mean**2 / self._precision).astype(np.float64)
        return torch.from_numpy(1 / np.maximum(inverses, 1e-12))  # a single result has 0

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """Return results less their estimates from all others, from ``[M, C]``: ``[n, C]``."""
        right, mean, size = self._seen(results)
        over = (self._of_left_out @ right.T).numpy()  # over variances
        over -= self._mean[self.left_out].numpy()[:, None] * mean.numpy()
        return torch.from_numpy(over * (self.leave_one_out_variances.numpy()[:, None] * size))

    def leave_one_out_error(self, results: Tensor) -> tuple[float, float]:
        r"""Return how well results are estimated from each other, each from all others.

        The first number is the error of a choice. The second is its trust: the slope of every
        result's regression on its estimate, less the others' mean; 0 if its gain may be chance.
        """
        y = results - results[:1]  # equal results have no deviation at all
        deviations = (y[self.left_out] - y.mean(0)).numpy()
        deviations *= len(y) / max(len(y) - 1, 1)  # less the mean of all others
        residuals = self.leave_one_out_residuals(results).numpy()
        estimated = deviations - residuals
        total, left, square = (float(np.vdot(x, x)) for x in (deviations, residuals, estimated))
        error = math.sqrt(left / total) if total > 0 else math.nan
        if not square > 0:
            return error, 1.0
        slope = min(max((total + square - left) / (2 * square), 0), 1)
        gains = (estimated * (2 * deviations - slope * estimated)).sum(1) * (slope / square)
        by_chance = _ERRORS * float(gains.std()) * math.sqrt(len(gains))
        return error, slope if float(gains.sum()) > by_chance else 0.0


def scaled(results: Tensor) -> tuple[Tensor, float]:
    """Return results ``[M, C]`` centred and of size 1 at most, ``[C, M]``, and the size."""
    y = results - results[:1]  # equal results become 0, however large
    y -= y.mean(0)
    size = (float(y.abs().max()) if y.numel() else 0.0) or 1.0
    return y.div_(size).T.contiguous(), size


def _solved(rows: Tensor, factor: Tensor, transposed: bool = False) -> Tensor:
    """Return rows times the inverse of a triangle; solving for columns copies both operands."""
    triangle = factor.mT if transposed else factor
    solved: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=transposed, left=False)
    return solved
