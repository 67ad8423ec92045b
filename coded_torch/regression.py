r"""Regression in input space: answers from results by the distances of their inputs."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import dense, positive

__all__ = ["NUGGET", "KernelRegression", "leave_one_out_losses", "matern52"]

#: Variance of a result that its input does not explain, relative to the outputs' variance.
NUGGET = 1e-4


def matern52(squared_distances: Tensor, length: float) -> Tensor:
    r"""The Matern covariance of smoothness 5/2.

    .. math:: (1 + s + s^2 / 3) \, e^{-s}, \qquad s = \sqrt 5 \, r / l

    Args:
        squared_distances: :math:`r^2`, any shape, at least 0; infinite gives 0.
        length: :math:`l`, positive.
    """
    # Bounded, or an infinite distance would be infinity times 0. In place, as fresh memory costs
    # more than the arithmetic.
    scale = 5 / max(length * length, sys.float_info.min)
    s = (squared_distances * scale).sqrt_().clamp_(max=700)
    polynomial = (s / 3).add_(1).mul_(s).add_(1)
    return polynomial.mul_(s.neg_().exp_())


class KernelRegression:
    r"""The Gaussian process of an unknown constant mean, given results at M inputs.

    With :math:`C = k(Z, Z) + \nu I`, the prediction at an input of covariances :math:`k` with the
    results :math:`y` is the best linear unbiased one,

    .. math:: k^T C^{-1} y + (1 - k^T C^{-1} 1) \, \frac{1^T C^{-1} y}{1^T C^{-1} 1} ,

    linear in the results, so any number of outputs shares one factorisation.

    Args:
        squared_distances: ``[M, M]``, float64, of the inputs of the results, M at least 1.
        length: of the :func:`matern52` covariance, positive.
        nugget: :math:`\nu`, positive; it also keeps repeated inputs apart. Where the distances are
            so badly rounded that no points have them, it is raised tenfold until there is a
            factorisation.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument violates its requirement, or a distance is NaN.

    Note:
        :math:`O(M^3)` once, :math:`O(M^2)` per prediction.

    References:
        Rasmussen and Williams, *Gaussian Processes for Machine Learning*, 2006, sections 2.7, 5.4.

    Example:
        >>> import torch
        >>> from coded_torch.regression import KernelRegression
        >>> at = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        >>> fit = KernelRegression((at[:, None] - at).square(), length=2.0)
        >>> fit.weights(torch.tensor([[0.25, 0.25, 2.25]], dtype=torch.float64)).round(decimals=2)
        tensor([[ 0.4500,  0.6800, -0.1300]], dtype=torch.float64)
    """

    def __init__(self, squared_distances: Tensor, length: float, nugget: float = NUGGET) -> None:
        dense(self, "squared_distances", squared_distances)
        m, *others = squared_distances.shape or (0,)
        if others != [m] or m == 0:
            raise ValueError(
                "KernelRegression: squared_distances must be [M, M], M at least 1, "
                f"got shape {tuple(squared_distances.shape)}"
            )
        self.length = positive(self, "length", length)
        self.nugget = positive(self, "nugget", nugget)
        covariance = matern52(squared_distances, length)
        covariance.diagonal().add_(self.nugget)
        self._factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed and not bool(covariance.isfinite().all()):
            raise ValueError("KernelRegression: squared_distances must be numbers, got NaN")
        while failed:  # ends: with a nugget of M at the latest, the diagonal dominates
            covariance.diagonal().add_(9 * self.nugget)
            self.nugget *= 10
            self._factor, failed = torch.linalg.cholesky_ex(covariance)
        ones = torch.ones(len(covariance), 1, dtype=covariance.dtype)
        self._mean = torch.cholesky_solve(ones, self._factor)  # [M, 1], C^-1 1
        self._precision = float(self._mean.sum())

    def weights(self, squared_distances: Tensor) -> Tensor:
        """The weights of the results, ``[L, M]``, for inputs at distances ``[L, M]`` from theirs.

        Every row sums to one.
        """
        k = matern52(squared_distances, self.length)
        solved: Tensor = torch.cholesky_solve(k.T, self._factor).T
        return solved + (1 - k @ self._mean) * (self._mean.T / self._precision)

    def variances(self, squared_distances: Tensor) -> Tensor:
        """The predictions' variances, ``[L]``, in units of the outputs' variance."""
        k = matern52(squared_distances, self.length)
        half = torch.linalg.solve_triangular(self._factor, k.T, upper=False)
        left = (1 - k @ self._mean).squeeze(1)
        explained: Tensor = half.square().sum(0) - left.square() / self._precision
        return 1 + self.nugget - explained

    @functools.cached_property
    def leave_one_out_variances(self) -> Tensor:
        """The variance of each result predicted from all others, ``[M]``, likewise."""
        return 1 / (self._inverse.diagonal() - self._mean.square().squeeze(1) / self._precision)

    def leave_one_out_residuals(self, results: Tensor) -> Tensor:
        """``results [M, C]`` less the prediction of each from all others, ``[M, C]``."""
        mean = self._mean.T @ results / self._precision
        residuals: Tensor = self._inverse @ results - self._mean @ mean
        return residuals.mul_(self.leave_one_out_variances[:, None])

    def leave_one_out_error(self, results: Tensor) -> float:
        """The root mean square of the residuals, relative to predicting by the mean of the others.

        NaN where all results are equal.
        """
        centred = results - results.mean(0)
        square = float(centred.square().sum()) * (len(results) / max(len(results) - 1, 1)) ** 2
        left = float(self.leave_one_out_residuals(centred).square().sum())
        return math.sqrt(left / square) if square > 0 else math.nan

    def trust(self, results: Tensor) -> float:
        r"""How far to follow predictions away from the mean, in [0, 1], by ``results [M, C]``.

        The slope of the regression, through 0, of every result on its prediction from all others,
        both less the mean of the others: about 1 where the covariance describes the outputs, 0
        where the inputs say nothing of them.
        """
        centred = results - results.mean(0)
        deviations = centred * (len(results) / max(len(results) - 1, 1))
        predicted = deviations - self.leave_one_out_residuals(centred)
        square = float(predicted.square().sum())
        return min(max(float((predicted * deviations).sum()) / square, 0), 1) if square > 0 else 1.0

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

    @property
    def covariance(self) -> Tensor:
        """C, ``[M, M]``."""
        covariance: Tensor = self._factor @ self._factor.T
        return covariance

    @functools.cached_property
    def projection(self) -> Tensor:
        r""":math:`P = C^{-1} - m m^\top / 1^\top m`, :math:`m = C^{-1} 1`, ``[M, M]``.

        Leaving a set I of results out, their residuals are :math:`P_{II}^{-1} (P y)_I`, of
        variance :math:`P_{II}^{-1}`.
        """
        return torch.addr(
            self._inverse, self._mean[:, 0], self._mean[:, 0], alpha=-1 / self._precision
        )

    @functools.cached_property
    def _inverse(self) -> Tensor:
        return torch.cholesky_inverse(self._factor)


def leave_one_out_losses(
    squared_distances: Sequence[Tensor], lengths: Sequence[float], results: Tensor
) -> list[float]:
    r"""How badly every result is predicted from all others, by several kernels: less is better.

    The negative logarithm of the density that the others' prediction and its variance give to each
    number of the results, on average, but for a constant, at the best variance of the outputs,

    .. math:: \tfrac12 \log \overline{e^2 / v} + \tfrac12 \overline{\log v} ,

    with the leave-one-out residuals e and variances v. It weighs down residuals where the kernel
    knows that it cannot predict, so a few inputs far from all others do not decide.

    Args:
        squared_distances: ``[M, M]`` each, finite or infinite.
        lengths: of each kernel, positive.
        results: ``[M, C]``, of the same dtype.

    Returns:
        One number for each; infinite where there is no factorisation in this dtype.
    """
    if not squared_distances:
        return []
    scaled = torch.stack([d / n**2 for d, n in zip(squared_distances, lengths, strict=True)])
    covariance = matern52(scaled, 1.0)  # [kernels, M, M]
    covariance.diagonal(dim1=-2, dim2=-1).add_(NUGGET)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    inverse = torch.cholesky_inverse(factor)
    mean = inverse.sum(-1, keepdim=True)  # [kernels, M, 1]
    precision = mean.sum(1, keepdim=True)
    centred = results - results.mean(0)
    residuals = inverse @ centred
    residuals -= mean * (mean.mT @ centred / precision)
    inverses = inverse.diagonal(dim1=-2, dim2=-1) - (mean.square() / precision).squeeze(-1)
    tiny = torch.finfo(results.dtype).tiny
    inverses = inverses.clamp(min=tiny)
    # e = r / p and v = 1 / p, so e^2 / v = r^2 / p.
    square = (residuals.square() / inverses[..., None]).mean((1, 2)).clamp(min=tiny)
    losses = (square.log() - inverses.log().mean(1)) / 2
    return losses.masked_fill(losses.isnan() | (failed > 0), math.inf).tolist()
