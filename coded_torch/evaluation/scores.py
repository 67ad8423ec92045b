r"""Scores of answers against the module's own, and the statistics of their comparison.

Answers are ``[..., C]``: the last dimension is one answer, all others count rows. An error is a
norm over all C numbers of an answer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arguments import dense

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Interval", "Score", "half_width", "paired_p", "ratio", "relative_accuracy"]
__all__ += ["rmse", "root", "rounded", "score"]

Interval = list[float | None]  # a number, and half the width of its 95 % interval

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Student's 97.5 % quantiles for 1 to 10 degrees of freedom.
_STUDENT = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216, 2.22814)
_NORMAL = 1.959964  # the normal distribution's 97.5 % quantile
_FLIPS = 20_000  # random signs of a paired test, enough for two digits of a p-value of .01


class Score(NamedTuple):
    """The numbers of a scheme's answers, means over rows.

    Attributes:
        mse, error: the means of an answer's squared error, and of its norm; NaN if one is missing.
        variance: the mean squared norm of an exact answer less their mean.
        right, exact_right: the shares of rows that the answers, and the module's own, name rightly.
        agreement: the share of rows that have the class of the module's own answer.
    """

    mse: float
    error: float
    variance: float
    right: float
    exact_right: float
    agreement: float


def score(decoded: Tensor, exact: Tensor, labels: Tensor | None = None) -> Score:
    """Return the scores of answers.

    Args:
        decoded: the answers, ``[..., C]``, floating-point; a row with NaN is missing and wrong.
        exact: the model's own answers, the same shape.
        labels: the true classes, integers, ``[...]``. Defaults to None, unknown.

    Raises:
        TypeError, ValueError: a tensor has another dtype or shape, or holds no answer.
    """
    for argument, value in (("decoded", decoded), ("exact", exact)):
        dense("score", argument, value)
    if decoded.shape != exact.shape or not exact.dim() or not exact.numel():
        must = "decoded must have the shape [..., C] of exact and hold at least one answer"
        raise ValueError(f"score: {must}, got {tuple(decoded.shape)} and {tuple(exact.shape)}")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
            got = getattr(labels, "dtype", type(labels).__name__)
            raise TypeError(f"score: labels must be an integer tensor, got {got}")
        if labels.shape != exact.shape[:-1]:
            must = f"labels must have shape {tuple(exact.shape[:-1])}"
            raise ValueError(f"score: {must}, got {tuple(labels.shape)}")
        labels = labels.to(exact.device)  # loaders have labels on the host
    answered = decoded.isfinite().all(-1)
    found, own = torch.where(answered, decoded.argmax(-1), -1), exact.argmax(-1)
    squares, mean = _squares(decoded, exact), exact.double().reshape(-1, exact.shape[-1]).mean(0)
    right = own_right = math.nan
    if labels is not None:
        right, own_right = ((x == labels).double().mean().item() for x in (found, own))
    agreement = (found == own).double().mean().item()
    variance = _squares(mean.expand_as(exact), exact).mean().item()
    errors = squares.mean().item(), squares.sqrt().mean().item()
    return Score(*errors, variance, right, own_right, agreement)


def rmse(decoded: Tensor, exact: Tensor) -> float:
    """Return the root of the mean squared norm of an answer's error; see :func:`score`."""
    return math.sqrt(score(decoded, exact).mse)


def relative_accuracy(decoded: Tensor, exact: Tensor, labels: Tensor) -> float:
    """Return the accuracy of decoded answers over the model's own; see :func:`score`."""
    found = score(decoded, exact, labels)
    if not found.exact_right:
        raise ValueError("relative_accuracy: the model must be right at least once, got never")
    return found.right / found.exact_right


def _squares(decoded: Tensor, exact: Tensor) -> Tensor:
    """Return the squared norm of every answer's error: ``[..., C] -> [...]``, float64."""
    return (decoded.detach().double() - exact.detach().double()).square().sum(-1)


def ratio(a: Array, b: Array) -> Interval:
    """Return the ratio of two means over batches, and half the width of its interval.

    Both are None if both means are 0. The ratio is infinite if only the mean of ``b`` is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = a.mean() / b.mean()
        return rounded(value, half_width(a - value * b) / b.mean())


def root(squares: Array) -> Interval:
    """Return the root of the mean of squares, and half the width of its interval."""
    value = math.sqrt(squares.mean())
    return rounded(value, half_width(squares) / (2 * value) if value else 0.0)


def half_width(a: Array) -> float:
    """Return half the width of Student's 95 % interval of the mean, NaN of fewer than two."""
    n, z = len(a) - 1, _NORMAL
    if n < 1:
        return math.nan
    # Abramowitz and Stegun, 26.7.5: within 1e-4 of the quantile from 11 degrees of freedom on.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    expansion = z + sum(x / n ** (i + 1) for i, x in enumerate(terms))
    quantile = _STUDENT[n - 1] if n <= len(_STUDENT) else expansion
    return quantile * float(a.std(ddof=1)) / math.sqrt(n + 1)


def paired_p(differences: Array) -> float:
    """Return the two-sided p-value of paired differences, one a batch, under a mean of 0.

    The test flips the signs of the differences, in all ways for up to 14 batches, else at random.
    The p-value is NaN if a difference is.
    """
    if np.isnan(differences).any():
        return math.nan
    n = len(differences)
    if 2**n <= _FLIPS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_FLIPS, n))
        signs[0] = 1.0
    return float((np.abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12)).mean())


def rounded(*values: float) -> Interval:
    """Round to four digits; NaN becomes None."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]
