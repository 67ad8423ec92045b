r"""Regression on distances: estimates, their errors, and how well results estimate each other."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import matern52 as matern52

#: The variance of a result that its input does not explain, relative to the outputs' variance. It
#: keeps repeated inputs apart; with 1e-3 the squared error of 3,400 results is .993 to 1.004 times
#: as large (measured once; no benchmark keeps it).
NUGGET = 1e-4


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
        variances: ``[L]``, float64, of estimates, in the outputs'.
        weights_of_left_out: ``[L, n]``, float64, of results that are left out in estimates.
    """

    def __init__(
        self, squared: Tensor, length: float, known: Tensor | None = None, at: Tensor | None = None
    ) -> None:
        known = torch.arange(len(squared)) if known is None else known
        self.tensors = ops.regress(squared, length, known, known[:0] if at is None else at, NUGGET)
        self._count = len(known)
        self.variances, self.leave_one_out_variances, self.weights_of_left_out = self.tensors[6:]

    def estimate(self, results: Tensor, trust: float | None = None) -> Estimates:
        """Return estimates from results ``[M, C]``, float64; the trust is theirs by default."""
        return Estimates(*ops.estimate(self.tensors, results, trust))

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """Return results ``[M, C]`` less their estimates from all others, where they lie."""
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

    def coefficients(self, results: Tensor) -> tuple[Tensor, Tensor]:
        """Return A, ``[C, M]``, and b, ``[C]``, float32: covariances k estimate ``A k + b``."""
        found: tuple[Tensor, Tensor] = ops.coefficients(self.tensors, results)
        return found


def evenly(values: Tensor, most: int) -> Tensor:
    """Return at most so many of the values ``[n, ...]``, evenly spaced."""
    n = len(values)
    return values if n <= most else values.index_select(0, torch.arange(most) * n // most)


def off_mean(results: Tensor) -> Tensor:
    """Return results ``[M, C]`` less the mean of all others."""
    y = results - results[:1]  # equal results become 0, however large
    return (y - y.mean(0)) * (len(y) / max(len(y) - 1, 1))
