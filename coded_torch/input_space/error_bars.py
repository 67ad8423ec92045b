r"""Error bars with a guarantee: conformal prediction by leaving one out, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .geometry import evenly

if TYPE_CHECKING:
    from .gaussian_process import GaussianProcess

__all__ = ["GROWTH", "Bars", "ErrorBars", "bars", "label_risks"]

#: The power of the variance by which errors are divided. With .75 every tercile of the standard
# deviation is covered alike; with 1 the first is covered less, with 0 the last. (benchmarks
# coverage)
GROWTH = 0.75
# If more rows are missing, 200 results calibrate, so that 1,024 rows take some ms. (benchmarks
# coverage)
_MISSING, _CALIBRATING = 256, 200
_BLOCK = 8192  # outputs whose residuals are in memory together, float64


class Bars(NamedTuple):
    """The error bars of rows that are predicted from the same results."""

    rows: Tensor  # [L], of the batch
    thresholds: Tensor  # [S, L, n]
    risks: Tensor | None  # [L]; None if outputs are no [B, C]

    def widened(self, by: Tensor) -> Bars:
        """Return error bars of answers that are off by so much more, ``[L]``; infinity: unknown."""
        risks = None if self.risks is None else self.risks.masked_fill(by.isinf(), 1.0)
        return Bars(self.rows, self.thresholds + by[:, None], risks)


def bars(
    rows: Tensor,
    results: Tensor,
    predicted: Tensor,
    regression: tuple[GaussianProcess, float, Tensor] | None,
    offsets: Sequence[Tensor] = (),
    *,
    labels: bool = False,
) -> Bars:
    """Return the error bars of missing rows.

    Args:
        rows: ``[L]``, of the batch.
        results: ``[M, C]``, that predict them.
        predicted: ``[L, C]``, predictions of the missing rows.
        regression: that predicted; how far it went away from the mean of the results, in (0, 1];
            and its points of the missing rows. None if predictions are the mean.
        offsets: surrogates at the results ``[M, C]`` and at the missing rows ``[L, C]``; or none.
        labels: whether outputs are scores of classes.
    """
    count, signed = len(results), results.shape[1] == 1
    if regression is None:
        trust, left_out = 0.0, torch.arange(count)
        weights = torch.zeros(len(rows), count, dtype=torch.float64)
        variances, of_left_out = weights.new_ones(len(rows)), weights.new_ones(count)
    else:
        process, trust, points = regression
        weights, variances = process.at(points)
        left_out, of_left_out = process.left_out, process.leave_one_out_variances
        weights = weights if len(left_out) == count else weights[:, left_out]
    norms = torch.zeros(3, len(left_out), dtype=torch.float64)
    moved = torch.zeros(len(rows), dtype=torch.float64)
    errors = []
    for y, answers in zip(results.split(_BLOCK, 1), predicted.split(_BLOCK, 1), strict=True):
        y, answers = y.double(), answers.double()
        mean = y.mean(0)
        deviations = y[left_out] - mean
        residuals = shrunk = deviations * (count / max(count - 1, 1))  # less the others' mean
        if regression is not None:
            residuals = process.leave_one_out_residuals(y)
            shrunk = torch.lerp(shrunk, residuals, trust)
        each, off = torch.stack([residuals, shrunk, deviations]), answers - mean
        norms += each[:, :, 0] if signed else each.square_().sum(2)
        moved += off[:, 0] if signed else off.square_().sum(1)
        errors.append(shrunk)
    if not signed:
        norms, moved = norms.sqrt_(), moved.sqrt_()
    risks = None
    if labels and not signed:
        outputs, answers = results.double(), predicted.double()
        if offsets:
            outputs, answers = outputs + offsets[0], answers + offsets[1]
        of_results = outputs[left_out]
        known = of_results - (errors[0] if len(errors) == 1 else torch.cat(errors, 1))
        wrong = known.argmax(1) != of_results.argmax(1)
        margins = _margins(answers) / variances.sqrt()
        risks = label_risks(margins, _margins(known) / of_left_out.sqrt(), wrong)
    found = of_left_out, *norms
    if len(rows) > _MISSING:
        some = evenly(len(left_out), _CALIBRATING)
        weights, found = weights[:, some], tuple(x[some] for x in found)
    limits = _thresholds(weights, variances, moved, found, trust, count, signed=signed)
    return Bars(rows, limits, risks)


def _thresholds(
    weights: Tensor,
    variances: Tensor,
    moved: Tensor,
    left_out: Sequence[Tensor],
    trust: float,
    count: int,
    *,
    signed: bool,
) -> Tensor:
    r"""Return the errors of missing rows up to which results look as odd as these rows.

    A missing row i and the n results are exchangeable. With row i among the results, each of the
    n + 1 has a residual and a variance that leave it out, and the score
    :math:`|e| / v^{3/8}`. The score of result j is at least the score of row i as long as the error
    of row i is at most

    .. math:: \frac{h_{ij} |e_j|}{q_{ij}^{3/8} - |w_{ij}| q_{ij}}, \qquad
        h_{ij} = \frac{1}{1 + w_{ij}^2 v_j / v_i}, \quad q_{ij} = h_{ij} v_j / v_i,

    for predictions that are not shrunk; it is infinite if the denominator is not positive. If k - 1
    thresholds are larger than a radius, the error of row i exceeds it with probability
    :math:`k / (n + 1)` at most. The thresholds of a single output are exact, and others hold by the
    triangle inequality.

    Args:
        weights: ``[L, n]``, of the results that are left out, before shrinking.
        variances: ``[L]``, of the predictions, before shrinking.
        moved: ``[L]``, the norms of the shrunk predictions less the mean of the results.
        left_out: ``[n]`` each, of the n results: variances and norms of residuals before shrinking,
            norms of residuals after it, and norms of results less the mean of all.
        trust: how far predictions go away from the mean, in [0, 1].
        count: the number of all results, at least n.
        signed: whether there is one output, and numbers instead of norms are given.

    Returns:
        ``[1, L, n]``, float64; or ``[2, L, n]``, for positive and for negative errors.
    """
    of_left_out, residuals, shrunk, deviations = left_out
    rest, moved = 1 - trust, moved[:, None]
    w, ratio = weights if signed else weights.abs(), of_left_out / variances[:, None]
    # The variance of j shrinks once row i is among the results.
    shrink = w.square().mul_(ratio).add_(1).reciprocal_()
    ratio *= shrink
    score, pull = ratio.pow(GROWTH / 2), (w * ratio).mul_(trust).add_(rest / count)
    after = shrink * (trust * residuals)
    if rest:  # the mean of the others has row i in it, too
        of_mean = rest * deviations
        after += (1 + 1 / count) * of_mean
        if signed:
            after += rest * (w * ratio - 1 / count) * moved
        else:  # both are at least as large as the norm
            other = shrunk + trust * (1 - shrink) * residuals
            after = torch.minimum(after, other + of_mean / (count * max(count - 1, 1)))
            after += rest * (w * ratio + 1 / count) * moved
    never = score <= pull.abs()  # no error makes row i odder
    gaps = score[None] - pull
    if signed:
        pull *= after.sign()
        gaps = torch.stack([score + pull, score - pull])
    return (after.abs_() / gaps).masked_fill_(never, math.inf)


def label_risks(margins: Tensor, left_out: Tensor, wrong: Tensor) -> Tensor:
    """Return the estimated probabilities that predicted labels are wrong, ``[L]``, float64.

    Args:
        margins: ``[L]``, of the largest output over the second, in standard deviations.
        left_out: ``[n]``, margins of the predictions of results that are left out.
        wrong: ``[n]``, bool: whether such a prediction has another label than the result.
    """
    worse = left_out[wrong].sort().values
    larger = len(worse) - torch.searchsorted(worse, margins)
    return (1 + larger).double() / (len(wrong) + 1)


def _margins(outputs: Tensor) -> Tensor:
    """Return how much the largest output is over the second, ``[n]``."""
    largest = outputs.topk(2, 1).values
    return largest[:, 0] - largest[:, 1]


class ErrorBars:
    """The error bars of a batch, at any level.

    Args:
        batch_size: B.
        bars: of the predicted rows. All other rows are exact.
    """

    def __init__(self, batch_size: int, bars: Sequence[Bars] = ()) -> None:
        self.batch_size, self._bars = batch_size, bars

    @classmethod
    def unknown(cls, missing: Tensor) -> ErrorBars:
        """Return infinite error bars for missing rows, bool ``[B]``."""
        rows = missing.nonzero().flatten()
        risks = torch.ones(len(rows), dtype=torch.float64)
        return cls(len(missing), [Bars(rows, risks.new_empty(1, len(rows), 0), risks)])

    def radii(self, coverage: float | Tensor) -> Tensor:
        """Return the radii, ``[B]``, float64: 0 for exact rows, infinite for too few results.

        Args:
            coverage: the probability that an error is at most its radius, in (0, 1); or one for
                each row, ``[B]``.
        """
        radii = torch.zeros(self.batch_size, dtype=torch.float64)
        levels = torch.as_tensor(coverage, dtype=torch.float64).expand(self.batch_size)
        for rows, found, _ in self._bars:
            n = found.shape[2]
            outside = ((1 - levels[rows]) * (n + 1) + 1e-9).floor().long().clamp(max=n)
            largest = found.topk(int(outside.max()), 2).values.amax(0)
            largest = torch.cat([found.new_full((len(rows), 1), math.inf), largest], 1)
            radii[rows] = largest.gather(1, outside[:, None]).squeeze(1)
        return radii

    def enough(self, coverage: float) -> bool:
        """Return whether results are as many as the level needs."""
        return all((1 - coverage) * (x.thresholds.shape[2] + 1) >= 1 - 1e-9 for x in self._bars)

    def calibrated(self, thresholds: Tensor, off: Tensor) -> ErrorBars:
        """Return error bars that other predictions have, by the triangle inequality.

        Args:
            thresholds: ``[B, m]``, of the errors of the other predictions.
            off: ``[B]``, the norms of the predictions less the other predictions.
        """
        limits = (thresholds + off[:, None])[None]
        bars = [Bars(x.rows, limits[:, x.rows], x.risks) for x in self._bars]
        return ErrorBars(self.batch_size, bars)

    def widened(self, by: Tensor) -> ErrorBars:
        """Return error bars of answers that are off by so much more, ``[B]``; infinity: unknown."""
        return ErrorBars(self.batch_size, [x.widened(by[x.rows]) for x in self._bars])

    @property
    def label_risks(self) -> Tensor | None:
        """The estimated risks of the labels, ``[B]``, float64; 0 for exact rows."""
        risks = torch.zeros(self.batch_size, dtype=torch.float64)
        for rows, _, of_rows in self._bars:
            if of_rows is None:
                return None
            risks[rows] = of_rows
        return risks
