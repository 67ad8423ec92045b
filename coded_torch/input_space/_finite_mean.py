r"""An interval for the mean of a finite data set, of which few rows, drawn at random, are computed.

Regression estimates the other rows, and is corrected by its mean leave-one-out error (Särndal,
Swensson, Wretman, *Model Assisted Survey Sampling*, 1992). The coefficient of predictions is of
"PPI++", arXiv:2311.01453, the variance of Efron and Stein, Annals of Statistics 1981. Looks that
end by the width need no correction (Chow, Robbins, Annals of Mathematical Statistics 1965).
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import matern52
from ._gaussian_process import evenly
from ._untuned import CENTRES, MEAN, NOISES

# The rows that must differ from the commonest value. Of numbers that are 0 but for lognormal ones
# in 5 % of the rows, intervals from 240 rows held in .984 of the draws or were infinite, and with 5
# in .918. (measured once; no benchmark keeps it)
_OTHERS = 10
_JITTER = 1e-9  # relative; it keeps kernels of repeated rows apart
# Student's 97.5 % quantiles for 1 to 10 degrees of freedom, below which a formula is exact enough.
_EXACT = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814)


class Kernel:
    r"""A Matern 5/2 kernel plus a constant on computed rows ``[n, r]``, as :math:`K = W W^\top`."""

    half: Tensor  #: W
    values: Tensor  #: the eigenvalues of K

    def __init__(self, z: Tensor, length: float) -> None:
        self._centres = evenly(z, CENTRES).double()
        self._length = length
        own = self._of(self._centres)
        own.diagonal().mul_(1 + _JITTER)
        root = torch.linalg.inv(torch.linalg.cholesky(own)).T
        half = self._of(z) @ root
        self.values, vectors = torch.linalg.eigh(half.T @ half)
        self.half = half @ vectors
        self._turn = (root @ vectors).T

    def _of(self, z: Tensor) -> Tensor:
        squared = torch.cdist(z.double(), self._centres).square_()
        found: Tensor = matern52(squared, self._length, out=squared)
        return found.add_(MEAN)

    def sums(self, z: Tensor) -> Tensor:
        """Return the kernel of each computed row, ``[n]``, summed over rows ``[rows, r]``."""
        found: Tensor = self.half @ (self._turn @ self._of(z).sum(0))
        return found


class LowRankRegression:
    r"""Kernel ridge regression of numbers ``[n, C]``, float64, on computed rows.

    It has the ``kernel`` and the noise :math:`\nu` of the least squared leave-one-out ``errors``,
    ``[n, C]``, summed over standardised columns. The ``weights``, ``[n, C]``, are A times the
    numbers, where :math:`A = (K + \nu I)^{-1} = (I - W S W^\top) / \nu` for a diagonal S.
    """

    def __init__(self, kernels: Sequence[Kernel], y: Tensor) -> None:
        spread = y.std(0)
        standard = ((y - y.mean(0)) / spread)[:, spread > 0]

        def loss(pair: tuple[Kernel, float]) -> float:
            self._take(*pair)
            return float((self.times(standard) / self.diagonal[:, None]).square().sum())

        self._take(*min(itertools.product(kernels, NOISES), key=loss))
        self.weights = self.times(y)
        self.errors = self.weights / self.diagonal[:, None]

    def _take(self, kernel: Kernel, noise: float) -> None:
        """Take a kernel and a noise, and find the diagonal of A."""
        self.kernel = kernel
        self._noise = noise
        self._shrunk = 1 / (kernel.values + noise)
        left = 1 - kernel.half.square() @ self._shrunk
        self.diagonal = left.clamp(min=1e-12) / noise  # rounding may leave nothing

    def times(self, x: Tensor) -> Tensor:
        """Return A x, for ``[n, C]``."""
        half = self.kernel.half
        return (x - half @ (self._shrunk[:, None] * (half.T @ x))) / self._noise

    def second_order(self, k: Tensor) -> Tensor:
        r"""Return b, ``[C]``, at least 0, from the mean ``k`` of the kernel of other rows.

        In Hoeffding's decomposition, the variance of leave-one-out errors lacks b. Leaving out row
        j, too, changes the error of row i, less the mean change of these rows, by
        :math:`\Delta_{ij} = P_{ij} e_i - Q_{ij} e_j`. Of many rows, the pairs of some are taken.

        .. math::
            P_{ij} = \frac{A_{ij}^2}{D_{ij}}, \quad
            Q_{ij} = \frac{A_{ij} A_{jj}}{D_{ij}} + (A k)_j, \quad
            D_{ij} = A_{ii} A_{jj} - A_{ij}^2, \quad
            b = \frac{1}{n^2} \sum_{i \ne j} \Delta_{ij} \Delta_{ji} .
        """
        n = len(k)
        some = evenly(torch.arange(len(k)), CENTRES)
        half = self.kernel.half[some]
        d = self.diagonal[some]
        e = self.errors[some]
        a = (torch.eye(len(some)) - half @ (self._shrunk[:, None] * half.T)) / self._noise
        determinants = (d[:, None] * d - a * a).clamp_(min=1e-300).fill_diagonal_(1.0)
        p = (a * a / determinants).fill_diagonal_(0.0)
        q = (a * d / determinants + self.times(k[:, None])[some, 0]).fill_diagonal_(0.0)
        found = ((p * p + q * q.T) @ e * e).sum(0) - 2 * (p * q).sum(0) @ e.square()
        return found.clamp(min=0) * ((n - 1) / (n * len(some) * (len(some) - 1)))


def intervals(
    y: Tensor,
    is_share: Tensor,
    errors: Tensor,
    estimate: Tensor,
    b: Tensor,
    seen: int,
    total: int,
    *,
    level: float,
) -> tuple[Tensor, Tensor]:
    """Return centres and half widths of intervals, ``[2, C]``, and then those of plain sampling.

    Args:
        y: ``[n, C]``, float64, the numbers of the computed rows, at least two, and fewer than all.
        is_share: ``[C]``, bool: the columns that can hold 0 and 1 only.
        errors: ``[n, C]``, of computed rows that are left out.
        estimate: ``[C]``, the mean of the estimates of the rows seen.
        b: ``[C]``, of :meth:`LowRankRegression.second_order`.
        seen: the number of rows that are estimated: of those not computed, all, or some at random.
        total: the number of rows of the data set.
        level: the probability, between 0 and 1, per column.
    """
    n = len(y)
    low = y.amin(0)
    high = y.amax(0)
    # A column with two values is a share. In one with more values, or a single one that is not a
    # share, all rows but a few may be equal. They tell too little of the others: its half width is
    # infinite.
    others = (y != y.median(0).values).sum(0)
    # A value that was drawn once may be one of many, unless it is the 1 of a share.
    is_known = (others > 1) | ((low == 0) & (high == 1))
    has_two = ((y == low) | (y == high)).all(0) & (low < high) & ~is_share & (n > 2) & is_known
    is_unknown = (others < _OTHERS) & (2 * others < n) & ~(is_share | has_two)
    origin = torch.where(has_two, low, 0.0)
    scale = torch.where(has_two, high - low, 1.0)
    is_share = is_share | has_two
    y = (y - origin) / scale
    errors = errors / scale
    estimate = (estimate - origin) / scale
    b = b / scale.square()
    mean = y.mean(0)
    share = 1 - len(y) / total
    off = y - mean
    centre = (y - errors).mean(0)
    predicted = y - errors - centre
    spread = predicted.square().sum(0) / (n - 1)
    more = b + spread * (1 / seen - 1 / (total - n))
    # Estimates count by the coefficient of the least variance.
    u = (off * predicted).sum(0) / (n - 1) / (spread + n * share * more).clamp(min=1e-300)
    u = u.clamp(0, 1)
    remaining = off - u * predicted
    half = torch.where(is_share, 0.5, 0.0)  # half a row that is wrong by 1: errors may be rare
    squares = remaining.square().sum(0) + half
    of_all = off.square().sum(0)
    variance = share / n * squares / (n - 1) + (u * share).square() * more
    t = student_t(level, _freedom(squares, remaining.pow(4).sum(0) + half, n))
    t0 = student_t(level, _freedom(of_all, off.pow(4).sum(0) * ~is_share, n))
    ours = t**2 * variance * (1 + 3 / n)
    plain = t0**2 * share / n * of_all / (n - 1)
    value = mean + share * u * (estimate - centre)
    count = torch.full_like(mean, n / share)
    rows = count * plain / ours.clamp(min=1e-300)
    found = torch.where(is_share, _shares(value, rows, t0), torch.stack([value, ours.sqrt()]))
    sampled = torch.where(is_share, _shares(mean, count, t0), torch.stack([mean, plain.sqrt()]))

    def in_units(interval: Tensor) -> Tensor:
        centre, half = interval
        half = (half * scale).masked_fill(is_unknown, math.inf)
        return torch.stack([centre * scale + origin, half])

    return in_units(torch.where(ours < plain, found, sampled)), in_units(sampled)


def _shares(share: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """Return the interval of Agresti and Coull for a share of so many effective rows."""
    more = rows + t * t
    centre = (share.clamp(0, 1) * rows + t * t / 2) / more
    return torch.stack([centre, t * (centre * (1 - centre) / more).sqrt()])


def _freedom(squares: Tensor, fourth: Tensor, n: int) -> Tensor:
    """Return the degrees of freedom of a variance from n errors, fewer for heavy tails.

    They follow from the sums of squares and of fourth powers.
    """
    kurtosis = n * fourth / squares.square().clamp(min=1e-300)
    return (2 * n / (kurtosis - 1).clamp(min=1e-3)).clamp(2, max(2, n - 1))


def student_t(level: float, freedom: Any) -> Any:
    """Return two-sided quantiles of Student's t (Abramowitz and Stegun, 26.7.5).

    The error is at most 1e-4 from 11 degrees of freedom on. It grows for fewer, but for whole ones
    at the level 0.95, which are exact.
    """
    if level == 0.95 and isinstance(freedom, int) and freedom <= len(_EXACT):
        return _EXACT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
