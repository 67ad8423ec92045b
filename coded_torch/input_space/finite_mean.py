r"""An interval for the mean of a finite data set, of which few rows are computed.

These rows are drawn at random without replacement, which is all that is assumed. Regression
estimates the other rows, and is corrected by its mean leave-one-out error.

References:
    Särndal, Swensson, Wretman, *Model Assisted Survey Sampling*, 1992 (difference estimators).
    Angelopoulos et al., "Prediction-Powered Inference", Science 2023, and "PPI++",
    arXiv:2311.01453 (the coefficient of predictions).
    Efron, Stein, "The Jackknife Estimate of Variance", Annals of Statistics 1981.
    Agresti, Coull, "Approximate Is Better than 'Exact'", The American Statistician 1998.
    Pocock, "Group Sequential Methods in the Design and Analysis of Clinical Trials", 1977.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .geometry import evenly, matern52

# The variances of numbers that inputs do not explain, over the kernel's, that compete; not tuned.
_NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_MEAN = 30.0  # the variance of the unknown mean, over the kernel's: large; not tuned
# The most rows that have a kernel of their own. More rows share these kernels (low rank), since
# the time of the exact regression grows with the cube. It was not tuned.
_KERNELS = 1024
_JITTER = 1e-9  # relative; it keeps kernels of repeated rows apart
# The ratio of variances of two looks: the regression learns from a quarter more rows. With 1.25
# instead, all looks together held .937 of the time. (measured once; no benchmark keeps it)
_RATIO = 1.5


class KernelRegression:
    r"""Kernel ridge regression of numbers ``[n, C]``, float64, on coordinates ``[n, r]``.

    The kernel is Matern 5/2 plus a constant. Of some lengths and noises, the regression has those
    of the least squared leave-one-out errors, summed over standardised columns. With
    :math:`K = W W^\top`, from eigenvectors, :math:`A = (K + \nu I)^{-1} = (I - W S W^\top) / \nu`
    for a diagonal S.
    """

    def __init__(self, z: Tensor, y: Tensor, lengths: tuple[float, ...]) -> None:
        self._centres, spread, least = z[evenly(len(z), _KERNELS)].double(), y.std(0), math.inf
        y = ((y - y.mean(0)) / spread)[:, spread > 0]
        for length in dict.fromkeys(lengths):
            half, turn, values = self._factored(z, length)
            for noise in _NOISES:
                shrunk = 1 / (values + noise)
                left = (1 - half.square() @ shrunk).clamp(min=1e-12)  # rounding may leave nothing
                errors = (y - half @ (shrunk[:, None] * (half.T @ y))) / left[:, None]
                if not (loss := float(errors.square().sum())) >= least:
                    least, self._length, self._noise = loss, length, noise
                    self._half, self._turn, self._shrunk = half, turn, shrunk
                    self.diagonal = left / noise

    def _factored(self, z: Tensor, length: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return W, ``[n, m]``, the map from kernels of centres to W if they are few, and W'W."""
        kernel = self._kernel(z, length)
        if len(self._centres) == len(z):
            values, vectors = torch.linalg.eigh(kernel)
            return vectors * (values := values.clamp(min=0)).sqrt(), None, values
        own = self._kernel(self._centres, length)
        own.diagonal().mul_(1 + _JITTER)
        root = torch.linalg.inv(torch.linalg.cholesky(own))
        values, vectors = torch.linalg.eigh((half := kernel @ root.T).T @ half)
        return half @ vectors, vectors.T @ root, values.clamp(min=0)

    def _kernel(self, z: Tensor, length: float) -> Tensor:
        squared = torch.cdist(z.double(), self._centres).square_()
        return matern52(squared, length, out=squared).add_(_MEAN)

    def sums(self, z: Tensor) -> Tensor:
        """Return the kernels of the centres, summed over rows ``[rows, r]``: ``[m]``."""
        return self._kernel(z, self._length).sum(0)

    def of_rows(self, sums: Tensor) -> Tensor:
        """Return the kernels of all n rows, from those of the centres."""
        return sums if self._turn is None else self._half @ (self._turn @ sums)

    def times(self, x: Tensor) -> Tensor:
        """Return A x, for ``[n, C]``."""
        return (x - self._half @ (self._shrunk[:, None] * (self._half.T @ x))) / self._noise

    def second_order(self, errors: Tensor, kernel: Tensor) -> Tensor:
        """Return b of :func:`intervals`, at least 0; of many rows, from the pairs of some."""
        n, some = len(errors), evenly(len(errors), _KERNELS)
        half, d, e = self._half[some], self.diagonal[some], errors[some]
        a = (torch.eye(len(some)) - half @ (self._shrunk[:, None] * half.T)) / self._noise
        determinants = (d[:, None] * d - a * a).clamp_(min=1e-300).fill_diagonal_(1.0)
        p = (a * a / determinants).fill_diagonal_(0.0)
        q = (a * d / determinants + self.times(kernel[:, None])[some, 0]).fill_diagonal_(0.0)
        found = ((p * p + q * q.T) @ e * e).sum(0) - 2 * (p * q).sum(0) @ e.square()
        return found.clamp(min=0) * ((n - 1) / (n * len(some) * (len(some) - 1)))


class Rows(NamedTuple):
    """What is known of a data set of ``total`` rows."""

    y: Tensor  # [n, C], float64, the numbers of computed rows
    is_share: Tensor  # [C], bool: of columns of 0 and 1
    total: int
    seen: (
        int  # of the rows that are not computed, those that were looked at: all, or some at random
    )
    offsets: Tensor  # [n, C], what surrogates give of the computed rows
    offset: Tensor  # [C], and on average over the rows looked at


def intervals(
    rows: Rows, regression: KernelRegression, sums: Tensor, level: float, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return centres and half widths ``[C]`` of intervals, and then those of plain sampling.

    With :math:`w = A r` for what surrogates leave, :math:`r`, leave-one-out errors are
    :math:`e_i = w_i / A_{ii}` and predictions :math:`p = y - e`. With :math:`k_j`, the kernel of
    row j, on average over rows that are not computed, the mean of these rows is estimated by
    :math:`k^\top w + \bar e`. Leave-one-out errors vary by :math:`S_{ee}`, but rows that are near
    err alike. Leaving out row j, too, changes the error of row i, less the mean change of rows that
    are not computed, by :math:`\Delta_{ij} = P_{ij} e_i - Q_{ij} e_j`,

    .. math::
        P_{ij} = \frac{A_{ij}^2}{D_{ij}}, \quad Q_{ij} = \frac{A_{ij} A_{jj}}{D_{ij}} + (A k)_j,
        \quad D_{ij} = A_{ii} A_{jj} - A_{ij}^2, \quad
        b = \frac{1}{n^2} \sum_{i \ne j} \Delta_{ij} \Delta_{ji} .

    In Hoeffding's decomposition, b is the second-order part that the variance of leave-one-out
    errors lacks; the delete-one jackknife has it twice. Predictions count by a coefficient u in
    [0, 1] per column, of the least variance; where sampling's interval is narrower, it is taken.

    Args:
        rows: the computed rows, at least two, and fewer than all.
        regression: of ``y - offsets``.
        sums: the kernels of the centres, summed over the rows looked at.
        level: the probability, between 0 and 1, per column.
        factor: of Student's t.
    """
    y, is_share, total, seen, offsets, offset = rows
    n, mean, share = len(y), y.mean(0), 1 - len(y) / total
    kernel, weights = regression.of_rows(sums) / seen, regression.times(y - offsets)
    errors, off = weights / regression.diagonal[:, None], y - mean
    predicted = y - errors - (centre := (y - errors).mean(0))
    spread = predicted.square().sum(0) / (n - 1)
    more = regression.second_order(errors, kernel) + spread * (1 / seen - 1 / (total - n))
    u = (off * predicted).sum(0) / (n - 1) / (spread + n * share * more).clamp(min=1e-300)
    remaining = off - (u := u.clamp(0, 1)) * predicted
    half = torch.where(is_share, 0.5, 0.0)  # half a row that is wrong by 1: errors may be rare
    squares, of_all = remaining.square().sum(0) + half, off.square().sum(0)
    variance = share / n * squares / (n - 1) + (u * share).square() * more
    t = factor * _student_t(level, squares, remaining.pow(4).sum(0) + half, n)
    t0 = factor * _student_t(level, of_all, off.pow(4).sum(0) * ~is_share, n)
    ours, plain = t**2 * variance * (1 + 3 / n), t0**2 * share / n * of_all / (n - 1)
    value, count = mean + share * u * (offset + kernel @ weights - centre), mean * 0 + n / share
    shares = _shares(value, count * plain / ours.clamp(min=1e-300), t0), _shares(mean, count, t0)
    others = (value, ours.sqrt()), (mean, plain.sqrt())
    found, sampled = (
        [torch.where(is_share, *pair) for pair in zip(*kinds, strict=True)]
        for kinds in zip(shares, others, strict=True)
    )
    found = [torch.where(ours < plain, *pair) for pair in zip(found, sampled, strict=True)]
    return found[0], found[1], sampled[0], sampled[1]


def _shares(share: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval of Agresti and Coull for a share of so many effective rows."""
    more = rows + t * t
    centre = (share.clamp(0, 1) * rows + t * t / 2) / more
    return centre, t * (centre * (1 - centre) / more).sqrt()


def _student_t(level: float, squares: Tensor, fourth: Tensor, n: int) -> Tensor:
    """Return quantiles of Student's t for a variance from n errors (Abramowitz, Stegun, 26.7.5).

    Sums of squares and fourth powers give the degrees of freedom, fewer for heavy tails.
    """
    kurtosis = n * fourth / squares.square().clamp(min=1e-300)
    freedom = (2 * n / (kurtosis - 1).clamp(min=1e-3)).clamp(2, max(2, n - 1))
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@functools.cache
def boundary(looks: int, level: float) -> float:
    """Return the factor of t by which all of so many looks hold together, by Pocock's boundary.

    The density of normal numbers within the boundary is carried from look to look.
    """
    correlation, one = _RATIO**-0.5, statistics.NormalDist().inv_cdf(0.5 + level / 2)
    low, high = one, one + 6.0
    while high - low > 1e-4 and looks > 1:
        limit = (low + high) / 2
        x, step = np.linspace(-limit, limit, 401, retstep=True)
        weights = np.full(401, step / math.sqrt(2 * math.pi))
        weights[[0, -1]] /= 2
        moves = np.exp((x[:, None] - correlation * x) ** 2 / (2 / _RATIO - 2))
        moves, density = moves / math.sqrt(1 - 1 / _RATIO), np.exp(-x * x / 2)
        for _ in range(looks - 1):
            density = moves @ (density * weights)
        low, high = (low, limit) if density @ weights > level else (limit, high)
    return low / one
