"""How badly the results of machines are predicted by those of others."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .input_space.gaussian_process import KernelRegression

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Predictions", "noise_of", "residuals", "spread_of", "student_quantile", "tails"]

_CLIP = 6.0  # spreads from the median, in what others are predicted from
_RIDGE = 0.05
_FLOOR = 1e-3  # of a squared residual over the usual one: being predicted better says no more
_STEEPEST = 0.6
_STEPS = 12  # of expectation maximisation
_TAIL = 4.0  # standard deviations, at which tails are looked at
_LEAST_SPREAD = 1e-3  # of a column, relative to its median and to the mean spread


class Predictions:
    """Results that are predicted from each other, one a row.

    Args:
        values: ``[n, C]``, float64, about 0, in their spread.
        unit: ``[C]``, theirs, in the outputs' spread.
        machine: ``[n]``, whose they are.
        group: ``[n]``, kept for the caller.
        at: ``[n]``, the inputs of the regression that they are results of.
        regression: of M distinct inputs.
        curve: whether a machine has the same place on a curve in every group.
    """

    def __init__(
        self,
        values: Tensor,
        unit: Tensor,
        machine: Tensor,
        group: Tensor,
        at: Tensor,
        regression: KernelRegression,
        curve: bool = False,
    ) -> None:
        self._unit = unit
        self.values, self.machine, self.group, self.at = values, machine, group, at
        self.num_groups = int(group.max()) + 1 if len(group) else 0
        self._curve, self._regression = curve, regression
        self._projection = regression.projection.double()  # [M, M]

    def log_energies(self, gone: Tensor) -> tuple[Tensor, Tensor]:
        r"""Half the log of the mean square of each result's residual, ``[n]``, and the square.

        Of the residual from what the machines predict that are not ``gone``, leaving out the
        result and its copies, whitened by the residuals' sign covariance; less a slope, fitted,
        times the log of the prediction's variance. Nearly normal, where residuals are not. The
        square is that of the residual as it is, in the outputs' spread.

        Args:
            gone: ``[F]``, bool, by machine.
        """
        alive = ~gone[self.machine]
        predicted, variances = self.predict(alive)
        residuals = self.values - predicted[self.at]
        squares = (residuals * self._unit).square().mean(1)
        some = residuals[alive]
        scale = (1.4826 * some.abs().median(dim=0).values).clamp_(min=_LEAST_SPREAD)
        residuals, some = residuals / scale, some / scale
        num_columns = residuals.shape[1]
        signs = some / some.norm(dim=1, keepdim=True).clamp(min=1e-30)
        covariance = signs.T @ signs * (num_columns / len(signs))
        covariance.diagonal().add_(_RIDGE)
        white = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), residuals.T, upper=False
        )
        logs: Tensor = white.square().mean(0).add_(_FLOOR).log_().mul_(0.5)
        trend = variances.log()[self.at]
        trend = trend - trend[alive].mean()
        if self._curve:
            basis = torch.stack([torch.ones_like(trend), trend, trend.square()], 1)
            fit = torch.linalg.lstsq(basis[alive], logs[alive, None]).solution
            logs -= (basis @ fit)[:, 0]
        else:
            slope = float(trend[alive] @ logs[alive]) / max(
                float(trend[alive].square().sum()), 1e-30
            )
            logs -= min(max(slope, 0.0), _STEEPEST) * trend
        return logs, squares

    def alignments(self, gone: Tensor) -> Tensor:
        """How much longer each result is than usual, along its prediction, ``[n]``.

        The product of the prediction with what the result differs by from it, scaled as it is in
        all others: machines whose results are too small, or too large, have sums far from 0.

        Args:
            gone: ``[F]``, bool, by machine: not predicted from.
        """
        alive = ~gone[self.machine]
        predicted = self.predict(alive)[0][self.at]
        lengths, along = predicted.square().sum(1), (predicted * self.values).sum(1)
        slope = along[alive].sum() / lengths[alive].sum().clamp(min=1e-30)
        return along - slope * lengths

    def typical_error(self) -> float:
        """The median error of predicting a result from all others, in the outputs' spread."""
        predicted, _ = self.predict(torch.ones(len(self.values), dtype=torch.bool))
        errors = (self.values - predicted[self.at]) * self._unit
        return float(errors.square().mean(1).median().sqrt()) if len(errors) else 0.0

    def noise(self, num_machines: int) -> Tensor:
        """Of each machine, see :func:`noise_of`; of results without copies."""
        clipped = self.values.clamp(-_CLIP, _CLIP)
        return noise_of(clipped, self.machine, self.at, self._regression, num_machines)

    def predict(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Each input's result from those of the others, ``[M, C]``, and the variances ``[M]``.

        Args:
            alive: ``[n]``, bool: what is predicted from.
        """
        size = len(self._projection)
        at, clipped = self.at[alive], self.values[alive].clamp(-_CLIP, _CLIP)
        count = torch.bincount(at, minlength=size)
        known = clipped.new_zeros(size, clipped.shape[1]).index_add_(0, at, clipped)
        known /= count.clamp(min=1)[:, None]
        left, lost = (count > 0).nonzero().squeeze(1), (count == 0).nonzero().squeeze(1)
        sums = self._projection @ known  # of what is lost, known is 0
        diagonal = self._projection.diagonal()
        if not len(lost):
            return known - sums / diagonal[:, None], 1 / diagonal
        across = self._projection[lost]  # [L, M]
        factor = torch.linalg.cholesky(across[:, lost])
        predicted, variances = torch.empty_like(known), torch.empty_like(diagonal)
        predicted[lost] = -torch.cholesky_solve(sums[lost], factor)
        variances[lost] = torch.cholesky_inverse(factor).diagonal()
        half = torch.linalg.solve_triangular(factor, across[:, left], upper=False)  # [L, M - L]
        rest = diagonal[left] - half.square().sum(0)
        sums = sums[left] + across[:, left].T @ predicted[lost]
        predicted[left], variances[left] = known[left] - sums / rest[:, None], 1 / rest
        return predicted, variances


def noise_of(
    values: Tensor, machine: Tensor, at: Tensor, regression: KernelRegression, num_machines: int
) -> Tensor:
    """A noise variance for each machine, ``[F]``, in the outputs' variance.

    By expectation maximisation, so that machines which lie together do not hide each other.

    Args:
        values: ``[M, C]``, one result of each input of the regression.
        machine: ``[M]``, whose they are.
        at: ``[M]``, their inputs.
        regression: of M inputs.
        num_machines: F.

    Note:
        :math:`O(M^3)` a step.
    """
    covariance = regression.covariance[at][:, at].double()
    scaled = values / max(math.sqrt(regression.output_variance(values[at.argsort()])), 1e-30)
    count = torch.bincount(machine, minlength=num_machines).clamp(min=1)
    noise = torch.full((num_machines,), 0.01, dtype=values.dtype)
    for _ in range(_STEPS):
        each = noise[machine]
        inverse = torch.linalg.inv(covariance + torch.diag(each))
        mean = inverse.sum(1)
        projection = inverse - torch.outer(mean, mean) / mean.sum()
        squares = (each[:, None] * (projection @ scaled)).square().mean(1)
        squares += each - each.square() * projection.diagonal()
        noise = torch.zeros_like(noise).index_add_(0, machine, squares) / count
    return noise


def residuals(values: Tensor, machine: Tensor, guesses: Sequence[Tensor]) -> Tensor:
    """What guesses leave of values ``[n, C]``, by weights that no few machines can spoil.

    Those of least squares over the results of each machine, of which the median counts.

    Args:
        values: the results.
        machine: ``[n]``, whose each is.
        guesses: ``[n, C]`` each.
    """
    if not guesses or not len(values):
        return values
    y = values - values.median(0).values
    s = torch.stack([guess - guess.median(0).values for guess in guesses])  # [J, n, C]
    size = int(machine.max()) + 1

    def by_machine(products: Tensor) -> Tensor:
        return products.new_zeros(size, *products.shape[1:]).index_add_(0, machine, products)

    system = by_machine(torch.einsum("jnc,knc->njk", s, s))
    right = by_machine(torch.einsum("jnc,nc->nj", s, y))
    squares = system.diagonal(dim1=1, dim2=2)  # a view
    squares += 1e-3 * squares + 1e-30
    known = torch.bincount(machine, minlength=size) > 0
    weights = torch.linalg.solve(system[known], right[known]).median(0).values
    return values - torch.einsum("j,jnc->nc", weights, torch.stack(list(guesses)))


def spread_of(values: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The median and the spread of each column, of which a share of the rows may be anything.

    The median absolute deviation, or, where most rows are equal, as probabilities often are, the
    root mean square of those that are not farthest.
    """
    centre = values.median(dim=0).values
    deviations = (values - centre).abs().sort(dim=0).values
    least = deviations[: max(1, math.ceil(len(values) * (1 - share) - 1))]
    spread = torch.maximum(1.4826 * deviations[len(deviations) // 2], least.square().mean(0).sqrt())
    floor = _LEAST_SPREAD * (centre.abs() + spread.mean())
    spread = torch.maximum(spread, floor)
    return centre, torch.where(spread > 0, spread, 1.0)


def tails(deviations: NDArray[np.float64], machine: NDArray[np.int64], size: int) -> Any:
    """By how much farther out the tail of each machine's mean is than a normal number's, ``[F]``.

    By the expansion of Cornish and Fisher at 4 standard deviations, from the skewness and the
    kurtosis of what deviates at the other machines; 1 where it is no farther.

    Args:
        deviations: ``[n]``, of about unit variance, 0 where they say nothing.
        machine: ``[n]``, whose each is.
        size: F.
    """
    own = np.bincount(machine, minlength=size)
    square, cube, fourth = (
        (sums.sum() - sums) / np.maximum(own.sum() - own, 1)
        for sums in (np.bincount(machine, deviations**k, size) for k in (2, 3, 4))
    )
    square = np.maximum(square, 1e-30)
    skewness = cube / square**1.5 / np.sqrt(np.maximum(own, 1))
    kurtosis = (fourth / square**2 - 3) / np.maximum(own, 1)
    q = _TAIL
    first = (q**2 - 1) * skewness / 6
    second = first + (q**3 - 3 * q) * kurtosis / 24
    third = second - (2 * q**3 - 5 * q) * skewness**2 / 36
    # Of very skew ones the terms do not become smaller: the largest sum is on the safe side.
    return np.maximum(1 + np.maximum(np.maximum(first, second), third) / q, 1)


@functools.lru_cache(256)
def student_quantile(level: float, freedom: int) -> float:
    """Student's t that is exceeded with a probability, by the expansion of Cornish and Fisher.

    From 8 degrees of freedom on within 2 %.
    """
    z = -float(torch.special.ndtri(torch.tensor(level, dtype=torch.float64)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum([float(term / freedom ** (i + 1)) for i, term in enumerate(terms)])
