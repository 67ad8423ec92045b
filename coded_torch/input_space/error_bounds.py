r"""Error bounds with a guarantee: conformal prediction by leaving one out, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .gaussian_process import GaussianProcess, off_mean
from .geometry import evenly

Array = npt.NDArray[np.float64]

#: The power of the variance by which errors are divided. With .75 every tercile of the standard
# deviation is covered alike; with 1 the first is covered less, with 0 the last. (benchmarks
# coverage)
GROWTH = 0.75
# If more rows are missing, 200 results calibrate, so that 1,024 rows take some ms. (benchmarks
# coverage)
_MISSING, _CALIBRATING = 256, 200
_BLOCK = 8192  # outputs whose residuals are in memory together, float64


class Bounds(NamedTuple):
    """The error bounds of rows that are estimated from the same results."""

    rows: Tensor  # [L], of the batch
    thresholds: Tensor  # [S, L, n]
    p_values: Tensor | None  # [L], of labels; None if outputs are not [B, C]


def bounds(
    rows: Tensor,
    results: Tensor,
    estimated: Tensor,
    process: GaussianProcess | None = None,
    trust: float = 0.0,
    labels: tuple[Tensor, Tensor] | None = None,
) -> Bounds:
    """Return the error bounds of missing rows ``[L]``.

    Args:
        results, estimated: ``[M, C]``, and estimates of the missing rows, ``[L, C]``.
        process: the regression, which has a trust in (0, 1]. None if estimates are the mean.
        labels: results and estimates with their surrogates, if they are scores of classes.
    """
    left_out, of_left_out = torch.arange(len(results)), np.ones(len(results))
    weights, variances = np.zeros((len(rows), len(results))), np.ones(len(rows))
    if process is not None:
        left_out, of_left_out = process.left_out, process.leave_one_out_variances.numpy()
        weights, variances = process.weights_of_left_out.numpy(), process.variances.numpy()
    signed, errors = results.shape[1] == 1, list[Array]()
    norms, moved = np.zeros((3, len(left_out))), np.zeros(len(rows))
    for y, answers in zip(results.split(_BLOCK, 1), estimated.split(_BLOCK, 1), strict=True):
        y = y.double()
        residuals = deviations = off_mean(y)[left_out].numpy()
        if process is not None:
            residuals = process.leave_one_out_residuals(y).numpy()
        errors.append(deviations + trust * (residuals - deviations))
        off = (answers.double() - y.mean(0)).numpy()
        for total, x in zip((*norms, moved), (residuals, errors[-1], deviations, off), strict=True):
            total += x[:, 0] if signed else np.einsum("ij,ij->i", x, x)
        errors = errors if labels else []  # they may be large
    if not signed:
        norms, moved = np.sqrt(norms), np.sqrt(moved)
    p_values = None
    if labels is not None and not signed:
        outputs, answered = labels[0][left_out].double().numpy(), labels[1].double().numpy()
        found = outputs - np.concatenate(errors, 1)
        wrong = found.argmax(1) != outputs.argmax(1)
        margins = _margins(answered) / np.sqrt(variances)
        of_results = _margins(found) / np.sqrt(of_left_out)
        p_values = torch.from_numpy(label_p_values(margins, of_results, wrong))
    calibrating = np.stack([of_left_out, *norms])
    if len(rows) > _MISSING:
        some = evenly(len(left_out), _CALIBRATING).numpy()
        weights, calibrating = weights[:, some], calibrating[:, some]
    limits = _thresholds(weights, variances, moved, calibrating, trust, len(results), signed)
    return Bounds(rows, torch.from_numpy(limits), p_values)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _thresholds(
    w: Array, variances: Array, moved: Array, known: Array, trust: float, count: int, signed: bool
) -> Array:
    r"""Return the errors of missing rows up to which results look as odd as these rows.

    A missing row i and the n results are exchangeable. With row i among the results, each of the
    n + 1 has a residual and a variance that leave it out, and the score
    :math:`|e| / v^{3/8}`. The score of result j is at least the score of row i as long as the error
    of row i is at most

    .. math:: \frac{h_{ij} |e_j|}{q_{ij}^{3/8} - |w_{ij}| q_{ij}}, \qquad
        h_{ij} = \frac{1}{1 + w_{ij}^2 v_j / v_i}, \quad q_{ij} = h_{ij} v_j / v_i,

    for estimates that are not shrunk; it is infinite if the denominator is not positive. If k - 1
    thresholds are larger than a bound, the error of row i exceeds it with probability
    :math:`k / (n + 1)` at most. Thresholds of one output are exact, others by triangle inequality.

    Args:
        w, variances: ``[L, n]`` and ``[L]``, weights and variances before shrinking.
        moved: ``[L]``, the norms of the shrunk estimates less the mean of the results.
        known: ``[4, n]``, of each result the variance and the norms of its residual before
            shrinking, of its residual after it, and of itself less the mean of all others.
        count: the number of results.
        signed: whether there is one output, and numbers instead of norms are given. Then thresholds
            are ``[2, L, n]``, for positive and for negative errors, instead of ``[1, L, n]``.
    """
    of_left_out, residuals, shrunk, deviations = known
    rest, moved, w = 1 - trust, moved[:, None], w if signed else np.abs(w)
    ratio = of_left_out / variances[:, None]
    # The variance of j shrinks once row i is among the results.
    shrink = 1 / (w * w * ratio + 1)
    ratio *= shrink
    pull = w * ratio
    after = shrink * (trust * residuals)
    if rest:  # the mean of the others has row i in it, too
        after += (1 - 1 / count**2) * rest * deviations
        if signed:
            after += rest * (pull - 1 / count) * moved
        else:  # both are at least as large as the norm
            other = shrunk + trust * (1 - shrink) * residuals
            after = np.minimum(after, other + rest * deviations / count**2)
            after += rest * (pull + 1 / count) * moved
    score, pull = ratio ** (GROWTH / 2), trust * pull + rest / count
    never = score <= np.abs(pull)  # no error makes row i odder
    gaps = (score - pull)[None]
    if signed:
        pull *= np.sign(after)
        gaps = np.stack([score + pull, score - pull])
    limits: Array = np.abs(after) / gaps
    limits[:, never] = math.inf
    return limits


def label_p_values(margins: Array, left_out: Array, wrong: npt.NDArray[np.bool_]) -> Array:
    """Return the p-values ``[L]`` of labels being wrong, from ``[n]`` left out, some of them wrong.

    If a missing row and the results are exchangeable, its label is wrong with a p-value of at most
    p with probability p at most.
    """
    worse = np.sort(left_out[wrong])
    larger = len(worse) - np.searchsorted(worse, margins)
    return (1.0 + larger) / (len(wrong) + 1)


def _margins(outputs: Array) -> Array:
    """Return how much the largest output is over the second, ``[n]``."""
    largest = np.partition(outputs, -2, 1)
    return largest[:, -1] - largest[:, -2]


class ErrorBounds:
    """The error bounds of a batch, at any level; rows without are computed."""

    def __init__(self, batch_size: int, bounds: Sequence[Bounds] = ()) -> None:
        self.batch_size, self._bounds = batch_size, bounds

    @classmethod
    def unknown(cls, missing: Tensor) -> ErrorBounds:
        """Return infinite error bounds for missing rows, bool ``[B]``."""
        rows = missing.nonzero().flatten()
        p = torch.ones(len(rows), dtype=torch.float64)
        return cls(len(missing), [Bounds(rows, p.new_empty(1, len(rows), 0), p)])

    def radii(self, coverage: float | Tensor) -> Tensor:
        """Return the bounds, ``[B]``, float64: 0 for computed rows, infinite for too few results.

        The ``coverage`` is one probability that an error is at most its bound, or ``[B]``.
        """
        radii = np.zeros(self.batch_size)
        for rows, found, _ in self._bounds:
            at, n = rows.numpy(), found.shape[2]
            levels = np.broadcast_to(np.asarray(coverage, dtype=np.float64), self.batch_size)[at]
            outside = np.minimum(np.floor((1 - levels) * (n + 1) + 1e-9).astype(np.int64), n)
            limits = np.full((*found.shape[:2], n + 1), math.inf)
            limits[:, :, :n] = np.sort(found.numpy(), 2)
            radii[at] = np.take_along_axis(limits, (n - outside)[None, :, None], 2).max(0)[:, 0]
        return torch.from_numpy(radii)

    def enough(self, coverage: float) -> bool:
        """Return whether results are as many as the level needs."""
        return all((1 - coverage) * (x.thresholds.shape[2] + 1) >= 1 - 1e-9 for x in self._bounds)

    def calibrated(self, thresholds: Tensor, off: Tensor) -> ErrorBounds:
        """Return error bounds by thresholds ``[B, m]`` of estimates that are ``off``, ``[B]``."""
        limits = (thresholds + off[:, None])[None]
        bounds = [Bounds(x.rows, limits[:, x.rows], x.p_values) for x in self._bounds]
        return ErrorBounds(self.batch_size, bounds)

    def widened(self, by: Tensor) -> ErrorBounds:
        """Return error bounds of answers that are off by so much more, ``[B]``, inf if unknown."""
        wider = []
        for rows, thresholds, p in self._bounds:
            p = None if p is None else p.masked_fill(by[rows].isinf(), 1.0)
            wider.append(Bounds(rows, thresholds + by[rows, None], p))
        return ErrorBounds(self.batch_size, wider)

    @property
    def label_p_values(self) -> Tensor | None:
        """The p-values of the labels, ``[B]``, float64; 0 for computed rows."""
        values = torch.zeros(self.batch_size, dtype=torch.float64)
        for rows, _, of_rows in self._bounds:
            if of_rows is None:
                return None
            values[rows] = of_rows
        return values
