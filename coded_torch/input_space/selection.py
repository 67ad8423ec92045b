"""Regressions from the results that arrived, and which one predicts them best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .distances import Choice, Features, name_of
from .gaussian_process import FittedRegression
from .leave_one_out import LeaveOneOut

if TYPE_CHECKING:
    from .points import Points

__all__ = ["DEFAULT", "LENGTH", "LENGTHS", "Fitted", "Regressions", "among", "key_of"]

_T = TypeVar("_T")

#: The metric and the length where nothing is chosen, as before there are results.
DEFAULT, LENGTH = "shrunk", 2.0
LENGTHS = (1.0, 2.0, 4.0, 8.0)
# Metrics are compared on so many results; lengths, with the best metric, likewise: on all, which
# cost several times as much, no better ones are found. (MKL factorises 144 rows in half the time
# that it takes for 128.)
_ROWS = 144
# Steps of a path through few rows, in median distances from the nearest one.
_STEP = 1.2
# What wins by less than so many standard errors of its gain, from result to result, wins by chance:
# the default stays. On tables, series and pictures that nothing is reported of, one standard error
# let another length lose up to half as much again where results are few; with two hardly any gain
# is left out.
_ERRORS = 2
# Of fewer results, which metric predicts best is chance.
_LEAST = 8


class Fitted(NamedTuple):
    """A regression from results that arrived.

    Attributes:
        choice: the metric and the length.
        regression: from the results.
    """

    choice: Choice
    regression: FittedRegression


class Regressions:
    """Regressions from the results of some points, with the metric and length chosen by these.

    Results, and what surrogates leave of them, are predicted by the same kernels: each is factored
    once.

    Args:
        batch: of the points.
        points: ``[M]``, whose results arrived.
        most: of these, that metrics and lengths are compared on.
    """

    def __init__(self, batch: Points, points: Tensor, most: int = _ROWS) -> None:
        self.points = points
        self._batch = batch
        count = min(len(points), most)
        self._at = torch.arange(count) * len(points) // max(count, 1)
        self._metrics: tuple[list[str | Features], LeaveOneOut] | None = None
        self._compared: dict[Any, LeaveOneOut] = {}
        self._fitted: dict[Any, FittedRegression] = {}

    def fit(self, sample: Tensor | None) -> Fitted:
        """The regression that predicts best.

        Args:
            sample: of the results, ``[M, C]``; None: the metric and length that copies go by.
        """
        batch = self._batch
        metric: str | Features = batch.first
        length = batch.first_length
        competing = batch.metrics != [metric] or len(batch.lengths) > 1
        if sample is not None and competing and len(self.points) >= _LEAST:
            few = _of_unit_size(sample[self._at])
            metric = self._best_metric(few)
            length = self._best_length(metric, few)
        key = key_of(metric), length
        if key not in self._fitted:
            self._fitted[key] = batch.regression(metric, length, self.points)
        regression = self._fitted[key]
        if sample is None:
            return Fitted(Choice(name_of(metric), length, math.nan), regression)
        error, trust = regression.leave_one_out_error(sample), regression.trust(sample)
        return Fitted(Choice(name_of(metric), length, error, trust), regression)

    def _best_metric(self, few: Tensor) -> str | Features:
        """The metric in which few results are predicted best from each other."""
        first = self._batch.first
        if self._batch.metrics == [first]:
            return first
        if self._metrics is None:
            found, squared = self._batch.of_few(self.points[self._at])
            lengths = [LENGTH * _STEP * _nearest(of_metric) for of_metric in squared]
            self._metrics = found, LeaveOneOut(squared, lengths)
        found, kernels = self._metrics
        return _winner(found, kernels.losses(few), first)

    def _best_length(self, metric: str | Features, few: Tensor) -> float:
        """The length, in steps, by which few results are predicted best from each other."""
        lengths = tuple(self._batch.lengths)
        if len(lengths) == 1:
            return lengths[0]
        coarse = self._kernels(metric, lengths).losses(few)
        found = _winner(lengths, coarse, LENGTH)
        if lengths != LENGTHS:
            return found
        half_steps = (found / math.sqrt(2), found * math.sqrt(2))
        fine = self._kernels(metric, half_steps).losses(few)
        of_found = coarse[lengths.index(found)][None]
        return _winner((found, *half_steps), torch.cat([of_found, fine]), found)

    def _kernels(self, metric: str | Features, lengths: tuple[float, ...]) -> LeaveOneOut:
        key = key_of(metric), lengths
        if key not in self._compared:
            squared, step = self._batch.distances(metric)
            few = self.points[self._at]
            of_few = [among(squared, few, few).float()] * len(lengths)
            self._compared[key] = LeaveOneOut(of_few, [step * length for length in lengths])
        return self._compared[key]


def key_of(metric: str | Features) -> str | int:
    """By which what belongs to a metric is kept."""
    return metric if isinstance(metric, str) else id(metric)


def among(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows and columns of a matrix: twice as fast as by indexing."""
    return matrix.index_select(0, rows).index_select(1, columns)


def _nearest(squared_distances: Tensor) -> float:
    """The median distance from the nearest other row; 1 where that says nothing."""
    nearest = squared_distances.clone().fill_diagonal_(math.inf).amin(1).sqrt_()
    nearest = nearest[(nearest > 0) & nearest.isfinite()]
    return float(nearest.median()) if len(nearest) else 1.0


def _of_unit_size(sample: Tensor) -> Tensor:
    """Results in float32, which their squares do not leave; what is chosen stays the same."""
    centred = sample - sample.mean(0)
    largest = float(centred.abs().max()) if centred.numel() else 0.0
    return (centred / (largest or 1.0)).float()


def _winner(candidates: Sequence[_T], losses: Tensor, default: _T) -> _T:
    """The best by the losses ``[candidates, M]``; the default, if the best is so by chance."""
    if not candidates:
        return default
    best = int(losses.mean(1).argmin())
    if default in candidates:
        gain = losses[candidates.index(default)] - losses[best]
        by_chance = _ERRORS * float(gain.std()) / math.sqrt(len(gain))
        # Infinite where the default has no factorisation, and then not by chance.
        if not float(gain.mean()) > (by_chance if math.isfinite(by_chance) else 0.0):
            return default
    return candidates[best]
