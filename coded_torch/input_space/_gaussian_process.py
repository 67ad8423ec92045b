"""Regression on distances: estimates, and the sizes of errors that they expect."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import matern52, squared_distances

#: The variance of a result that its input does not explain, relative to the outputs' variance. It
#: keeps repeated inputs apart; with 1e-3 the squared error of 3,400 results is .993 to 1.004 times
#: as large (measured once; no benchmark keeps it).
NUGGET = 1e-4
#: The length where nothing is chosen, in steps of a path. (benchmarks distances)
LENGTH = 2.0
# The power of the variance by which errors are divided. With .75 every tercile of the standard
# deviation is covered alike; with 1 the first is covered less, with 0 the last. (benchmarks
# coverage)
_GROWTH = 0.75
_PATH = 240  # rows of the path whose steps are the unit of length, as many as batches often have


class Estimates(NamedTuple):
    """The estimates of missing rows, and of results from all others."""

    values: Tensor  # [L, C], shrunk towards the mean
    residuals: Tensor  # [n, C], results less their estimates from all others
    error: float  # the root mean squared residual, relative to the mean's; or NaN
    trust: float  # the slope of results on their estimates; 0 if its gain may be chance


class GaussianProcess:
    r"""The Gaussian process of an unknown constant mean, given results at M points.

    With :math:`C = k(Z, Z) + \nu I` for a Matern 5/2 covariance :math:`k`, the estimate of results
    :math:`y` is :math:`k^T C^{-1} y + (1 - k^T C^{-1} 1) \, 1^T C^{-1} y / 1^T C^{-1} 1`, the best
    linear unbiased one (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006,
    sections 2.7 and 5.4). It costs :math:`O(M^3)` once and :math:`O(M^2)` per estimate.

    Args:
        squared: ``[P, P]``, squared distances of points. In float32, all is computed in float32,
            unless there is no factorisation.
        length: of the covariance, positive.
        known, at: ``[M]``, the points whose results are given, all by default, and ``[L]``, the
            points that are estimated, none by default.

    Attributes:
        tensors: of the process, for operators.
        leave_one_out_variances: ``[n]``, float64, of each result that is left out.
        variances: ``[L]``, float64, of estimates, in units of the outputs' variance.
        weights_of_left_out: ``[L, n]``, float64, in estimates, of the results that are left out in
            turn.
    """

    def __init__(
        self, squared: Tensor, length: float, known: Tensor | None = None, at: Tensor | None = None
    ) -> None:
        if known is None:
            known = torch.arange(len(squared))
        if at is None:
            at = known[:0]
        self.tensors = ops.regress(squared, length, known, at, NUGGET)
        self._count = len(known)
        self.variances, self.leave_one_out_variances, self.weights_of_left_out = self.tensors[6:]

    def estimate(self, results: Tensor, trust: float | None = None) -> Estimates:
        """Return estimates from results ``[M, C]``, float64. They set the trust if it is None."""
        return Estimates(*ops.estimate(self.tensors, results, trust))

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """Return results ``[M, C]`` less their estimates from all others, on the same device."""
        if results.device.type == "cpu" and results.shape[1] < len(results):
            return self.estimate(results.double().contiguous()).residuals
        return self.maps[1].to(results) @ (results - results.mean(0))

    @property
    def weights(self) -> Tensor:
        """The weights of results in estimates, ``[L, M]``, float64: rows that sum to one."""
        known = self.weights_of_left_out  # of all results, or of some of more than 512
        return known if known.shape[1] == self._count else self.maps[0]

    @functools.cached_property
    def maps(self) -> tuple[Tensor, Tensor]:
        """The matrices from results to estimates, ``[L, M]``, and to residuals, ``[n, M]``."""
        weights, residuals, _, _ = ops.estimate(self.tensors)
        return weights, residuals

    @property
    def standardised(self) -> Tensor:
        """The matrix from results to residuals in standard deviations, ``[n, M]``."""
        deviations: Tensor = self.leave_one_out_variances.sqrt()
        return self.maps[1] / deviations[:, None]


class RowProcess(GaussianProcess):
    """The process of results ``[M, C]``, float64, at rows ``[M, r]``, which estimates any others.

    Its length is in median steps of a path through the rows. The first columns are scored.
    """

    def __init__(self, rows: Tensor, results: Tensor, length: float, num_scored: int) -> None:
        squared = squared_distances(rows, 1.0, None, torch.arange(len(rows)))[0]
        self._length = length * squared_distances(evenly(rows, _PATH), 1.0)[3]
        super().__init__(squared, self._length)
        self._rows = rows.T
        self._squares = rows.square().sum(1)
        weights, self._mean = ops.coefficients(self.tensors, results)
        self._weights = weights.T  # column by column: the product takes half the time
        residuals = self.leave_one_out_residuals(results[:, :num_scored])
        left_out = evenly(torch.arange(len(rows)), len(residuals))
        others = squared[left_out]
        others[torch.arange(len(left_out)), left_out] = math.inf  # a row is not its own neighbour
        self._scores = residuals.norm(dim=1) / _expected_error(matern52(others, self._length))

    def estimate_at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return estimates ``[n, C]``, float32, and thresholds of their errors, ``[n, m]``."""
        products = torch.addmm(self._squares, rows, self._rows, alpha=-2)  # |a|^2 + |b|^2 - 2 a.b
        squared = products.add_(rows.square().sum(1, keepdim=True))
        covariances = matern52(squared.clamp_(min=0), self._length, out=squared)
        estimates = torch.addmm(self._mean, covariances, self._weights)
        return estimates, _expected_error(covariances)[:, None] * self._scores


def _expected_error(covariances: Tensor) -> Tensor:
    """Return expected sizes of errors, ``[n]``, from the covariance with the nearest result."""
    nearest = covariances.amax(1).double()
    return (1 + NUGGET - nearest.square()).clamp(min=NUGGET) ** (_GROWTH / 2)


def evenly(values: Tensor, most: int) -> Tensor:
    """Return at most so many of the values ``[n, ...]``, evenly spaced."""
    n = len(values)
    if n <= most:
        return values
    return values.index_select(0, torch.arange(most) * n // most)


def off_mean(results: Tensor) -> Tensor:
    """Return results ``[M, C]`` less the mean of all others."""
    y = results - results[:1]  # equal results become 0, however large
    return (y - y.mean(0)) * (len(y) / max(len(y) - 1, 1))
