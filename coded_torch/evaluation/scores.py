r"""Scores of decoded answers against the model's own, with intervals over batches.

Answers are ``[..., C]``: the last dimension is one answer, all others count inputs. An error is a
norm over all C numbers of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import dense

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Interval", "Scores", "half_width", "ratio", "relative_accuracy", "rmse", "rounded"]

Interval = list[float | None]  # a number, and half the width of its interval

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Student's 97.5 % quantiles for 1 to 10 degrees of freedom.
_STUDENT = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058),
    *(2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
)
_NORMAL = 1.959964  # the normal distribution's 97.5 % quantile


def rmse(decoded: Tensor, exact: Tensor) -> float:
    r"""Return the root of the mean squared error of an answer.

    .. math:: \sqrt{\mathrm{E}\,\tfrac1K \sum_k \lVert \hat f(x_k) - f(x_k) \rVert_2^2}

    Args:
        decoded: the decoded answers, ``[..., C]``, floating-point, finite.
        exact: the model's own answers, the same shape.

    Returns:
        The error, computed in float64, in the units of the answers.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ or hold no answer, or an entry is not finite.

    Example:
        >>> import torch
        >>> from coded_torch.evaluation import scores
        >>> scores.rmse(torch.tensor([[7.0], [1.0]]), torch.zeros(2, 1))
        5.0
    """
    _check("rmse", decoded, exact)
    return float(_norms(decoded, exact).square().mean().sqrt())


def relative_accuracy(decoded: Tensor, exact: Tensor, labels: Tensor) -> float:
    r"""Return the accuracy of the decoded answers over the accuracy of the model itself.

    Args:
        decoded: the decoded scores of C classes, ``[..., C]``, floating-point, finite.
        exact: the model's own scores, the same shape.
        labels: the true classes, integers, ``[...]``.

    Returns:
        The ratio, at least 0. It is above 1 if decoding repairs more answers than it spoils.

    Raises:
        TypeError: the scores are not floating-point tensors, or the labels not an integer tensor.
        ValueError: the shapes do not fit or hold no answer, a score is not finite, or the model is
            never right.
    """
    _check("relative_accuracy", decoded, exact)
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise TypeError(
            "relative_accuracy: labels must be an integer tensor, "
            f"got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if labels.shape != exact.shape[:-1]:
        raise ValueError(
            f"relative_accuracy: labels must have shape {tuple(exact.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    right = int((exact.argmax(-1) == labels).sum())
    if not right:
        raise ValueError("relative_accuracy: the model must be right at least once, got never")
    return int((decoded.argmax(-1) == labels).sum()) / right


def _norms(decoded: Tensor, exact: Tensor) -> Tensor:
    """Return the norm of every answer's error: ``[..., C] -> [...]``, float64."""
    return (decoded.detach().double() - exact.detach().double()).square().sum(-1).sqrt()


def _check(score: str, decoded: Tensor, exact: Tensor) -> None:
    for argument, value in (("decoded", decoded), ("exact", exact)):
        dense(score, argument, value)
        if not value.dim() or not value.numel():
            raise ValueError(
                f"{score}: {argument} must have shape [..., C] and hold at least one answer, "
                f"got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{score}: {argument} must be finite, got NaN or infinity")
    if decoded.shape != exact.shape:
        raise ValueError(
            f"{score}: decoded must have the shape of exact, {tuple(exact.shape)}, "
            f"got {tuple(decoded.shape)}"
        )


class Scores:
    """The scores of one code, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(
        self,
        answers: Tensor,
        exact: Tensor,
        labels: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            answers: the decoded answers, ``[B, C]``. A missing one is NaN, and counts as wrong.
            exact: the model's own answers, ``[B, C]``.
            labels: the true classes, ``[B]``, integers, or None.
        """
        answered = answers.isfinite().all(-1)
        found, own = torch.where(answered, answers.argmax(-1), -1), exact.argmax(-1)
        norms, spread = _norms(answers, exact), _norms(exact.mean(0).expand_as(exact), exact)
        mse = norms.square().mean().item()  # NaN where an answer is missing
        right = own_right = math.nan
        if labels is not None:
            labels = labels.to(exact.device)  # files and loaders have them on the host
            right, own_right = ((x == labels).double().mean().item() for x in (found, own))
        agreement = (found == own).double().mean().item()
        errors = mse, norms.mean().item(), spread.square().mean().item()
        self._rows.append((right, own_right, agreement, *errors))

    def __iadd__(self, other: Scores) -> Scores:
        self._rows += other._rows
        return self

    @property
    def columns(self) -> Array:
        """Right, right by the model itself, agreement, MSE, mean error, variance.

        ``[6, batches]``, NaN where a number is not known.
        """
        return np.array(self._rows).T

    def summary(self, others: Mapping[str, Scores] | None = None) -> dict[str, Any]:
        """Return scores with half the width of their intervals, also relative to others."""
        right, own, agreement, mse, mean, variance = self.columns
        root = math.sqrt(mse.mean())
        summary: dict[str, Any] = {
            "relative_accuracy": ratio(right, own),
            "agreement": ratio(agreement, np.ones_like(agreement)),
            "rmse": rounded(root, half_width(mse) / (2 * root) if root else 0.0),
            "rmse_mean": rounded(mean.mean(), half_width(mean)),
            "mse_to_variance": ratio(mse, variance),
        }
        for name, other in (others or {}).items():
            if other is not self:
                their_right, _, _, their_mse, *_ = other.columns
                summary[f"against {name}"] = {
                    "mse": ratio(mse, their_mse) if their_mse.any() else None,
                    "relative_accuracy": ratio(right - their_right, own),
                }
        return summary


def ratio(a: Array, b: Array) -> Interval:
    """Return the ratio of two means over batches, and half the width of its interval.

    Both are None if both means are 0. The ratio is infinite if only the mean of ``b`` is 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = a.mean() / b.mean()
        return rounded(value, half_width(a - value * b) / b.mean())


def half_width(a: Array) -> float:
    """Return half the width of Student's 95 % interval of the mean, NaN of fewer than two."""
    if len(a) < 2:
        return math.nan
    return student(len(a)) * float(a.std(ddof=1)) / math.sqrt(len(a))


def student(count: int) -> float:
    """Return the standard errors that a 95 % interval of a mean of ``count`` numbers reaches."""
    n, z = count - 1, _NORMAL
    if n <= len(_STUDENT):
        return _STUDENT[n - 1]
    # Abramowitz and Stegun, 26.7.5: within 1e-4 of the quantile from 11 degrees of freedom on.
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def rounded(*values: float) -> Interval:
    """Round to four digits; None stands for NaN."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]
