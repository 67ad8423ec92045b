"""Errors and accuracies batch by batch, and what they say of all batches, with intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["Interval", "Scores", "half_width", "ratio", "rounded", "student"]

Interval = list[float | None]  # a number, and half the width of its interval


class Scores:
    """What one code did, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(
        self,
        answers: Tensor,
        exact: Tensor,
        labels: Tensor | None = None,
        expected: float | None = None,
    ) -> None:
        """Add a batch.

        Args:
            answers: decoded, ``[B, C]``; of NaN where there is none, which counts as wrong.
            exact: the model's own, ``[B, C]``.
            labels: true classes, ``[B]``, integers; None: not known.
            expected: the root mean squared error that the code expects; None: it cannot say.
        """
        answered = answers.isfinite().all(-1)
        found, own = torch.where(answered, answers.argmax(-1), -1), exact.argmax(-1)
        error = mean = spread = right = own_right = math.nan
        if bool(answered.all()):
            error, mean = scores.rmse(answers, exact), scores.rmse_mean(answers, exact)
            spread = scores.rmse(exact.mean(0).expand_as(exact), exact)
        if labels is not None:
            labels = labels.to(exact.device)  # files and loaders have them on the host
            right, own_right = ((x == labels).double().mean().item() for x in (found, own))
        agreement = (found == own).double().mean().item()
        foreseen = expected if expected is not None and error > 0 else math.nan
        self._rows.append(
            (right, own_right, agreement, error**2, mean, spread**2, foreseen**2),
        )

    def __iadd__(self, other: Scores) -> Scores:
        self._rows += other._rows
        return self

    @property
    def columns(self) -> Array:
        """Right, right by the model itself, agreement, MSE, mean error, variance, expected MSE.

        ``[7, batches]``; NaN where it is not known. Errors are norms over all outputs of one input.
        """
        return np.array(self._rows).T

    def summary(self, others: Mapping[str, Scores] | None = None) -> dict[str, Any]:
        """Numbers with half the width of their interval, also relative to those of others."""
        right, own, agreement, mse, mean, variance, expected = self.columns
        root = math.sqrt(mse.mean())
        summary: dict[str, Any] = {
            "relative_accuracy": ratio(right, own),
            "agreement": ratio(agreement, np.ones_like(agreement)),
            "rmse": rounded(root, half_width(mse) / (2 * root) if root else 0.0),
            "rmse_mean": rounded(mean.mean(), half_width(mean)),
            "mse_to_variance": ratio(mse, variance),
        }
        foreseen = ~np.isnan(expected)
        if foreseen.any():
            each = np.sqrt(expected[foreseen] / mse[foreseen])
            summary["predicted_to_measured"] = ratio(each, np.ones_like(each))
            summary["prediction_off_by"] = rounded(float(np.abs(each - 1).mean()))[0]
        for name, other in (others or {}).items():
            if other is not self:
                their_right, _, _, their_mse, *_ = other.columns
                summary[f"against {name}"] = {
                    "mse": ratio(mse, their_mse) if their_mse.any() else None,
                    "relative_accuracy": ratio(right - their_right, own),
                }
        return summary


def ratio(a: Array, b: Array) -> Interval:
    """The ratio of two means over batches, and half the width of its interval.

    None and None where both are 0; infinite where only that of ``b`` is.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = a.mean() / b.mean()
        return rounded(value, half_width(a - value * b) / b.mean())


def half_width(a: Array) -> float:
    """Half the width of the 95 % interval of the mean, Student's; NaN of fewer than two."""
    if len(a) < 2:
        return math.nan
    return float(student(len(a)) * a.std(ddof=1) / math.sqrt(len(a)))


@functools.cache
def student(count: int) -> float:
    """How many standard errors a 95 % interval of the mean of ``count`` numbers reaches, each way.

    By bisection of the share of Student's distribution within it, which for whole degrees of
    freedom is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    freedom = count - 1

    def share(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        start = 2 if freedom % 2 else 1
        total = term = math.cos(angle) if freedom % 2 else 1.0
        for i in range(start, freedom - 2, 2):
            term *= math.cos(angle) ** 2 * i / (i + 1)
            total += term
        if freedom % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0))

    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < 0.95 else (low, middle)
    return low


def rounded(*values: float) -> Interval:
    """Four digits; None for what is not known."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]
