"""Regressions from results, with the metric and the length that predict them best."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .gaussian_process import GaussianProcess, scaled
from .geometry import evenly
from .metrics import Choice, Distances, Features, key_of, name_of

__all__ = ["LENGTH", "LENGTHS", "Fits", "Fitted"]

_T = TypeVar("_T")

#: The length where nothing is chosen, in steps of a path, and the lengths that compete. With a half
#: step to both sides of the best, no others are found to be better. (theory, section 11; benchmarks
#: distances)
LENGTH = 2.0
LENGTHS = (1.0, 2.0, 4.0, 8.0)
# Metrics and lengths are compared on so many results, or on an eighth of them if that is more: on
# all of 204, which cost several times as much, no better ones are found. (benchmarks distances)
_COMPARED = 144
# In batches of more rows, metrics are compared in the distances of the compared rows alone.
_MEASURED = 1024
# Choices that gain less than so many standard errors, from result to result, gain by chance: the
# default stays. With one standard error another length lost up to half as much again where results
# are few; with two hardly any gain is left out. (benchmarks distances)
_ERRORS = 2
# Of fewer results, which metric predicts best is chance. (benchmarks distances)
_LEAST = 8
# Few results are farther apart than all: by how much a length is longer there, of 144 of 204. It is
# for metrics only; lengths that are compared with it come out too short. (benchmarks distances)
_SPARSER = 1.25


class Fitted(NamedTuple):
    """A regression from results.

    Attributes:
        choice: the metric and the length.
        process: the regression.
        sample: of the results, whose residuals the regression keeps; None if there are none.
    """

    choice: Choice
    process: GaussianProcess
    sample: Tensor | None


class Fits:
    """Regressions from the results of some rows. Results, and what surrogates leave of them, share
    the factors.

    Args:
        distances: of all rows.
        lengths: that compete, in steps of the path.
        points: ``[M]``, the rows with results.
        compared: how many of them metrics and lengths are compared on, or more.
    """

    def __init__(
        self,
        distances: Distances,
        lengths: Sequence[float],
        points: Tensor,
        compared: int = _COMPARED,
    ) -> None:
        self.points = points
        self._distances, self._lengths = distances, lengths
        self._processes: dict[Any, GaussianProcess] = {}
        self._few = evenly(len(points), max(compared, len(points) // 8))

    def fit(self, sample: Tensor | None) -> Fitted:
        """Return the regression that predicts results best.

        Args:
            sample: of the results, ``[M, C]``, float64; None for the metric and the length that
                copies go by.
        """
        metric: str | Features = self._distances.first
        length = self._lengths[0] if len(self._lengths) == 1 else LENGTH
        if sample is not None and len(self.points) >= _LEAST:
            few, _ = scaled(sample[self._few])
            if len(self._distances.metrics) > 1 or metric != self._distances.metrics[0]:
                metric = self.metric(few, length)
            if len(self._lengths) > 1:
                length = self._length(few, metric)
        process = self._process(metric, length)
        if sample is None:
            return Fitted(Choice(name_of(metric), length, math.nan), process, None)
        error, trust = process.leave_one_out_error(sample), process.trust(sample)
        return Fitted(Choice(name_of(metric), length, error, trust), process, sample)

    def metric(self, few: Tensor, length: float) -> str | Features:
        """Return the metric by which few results ``[C, n]`` are predicted best from each other."""
        distances = self._compared[0]
        metrics = [metric for metric in distances.metrics if distances.has(metric)]
        losses = {
            metric: self._process(metric, length * _SPARSER, few=True).losses(few)
            for metric in metrics
        }
        return _winner(losses, distances.first)

    def _length(self, few: Tensor, metric: str | Features) -> float:
        """Return the length, in steps, by which few results are predicted best from each other."""
        losses: dict[float, Tensor] = {}

        def compare(*lengths: float) -> dict[float, Tensor]:
            for length in lengths:
                if length not in losses:
                    losses[length] = self._process(metric, length, few=True).losses(few)
            return {length: losses[length] for length in lengths}

        several = compare(*LENGTHS[:-1])
        best = min(several, key=lambda length: float(several[length].mean()))
        if best == LENGTHS[-2]:
            several = compare(*LENGTHS)
        found = _winner(several, LENGTH)
        halves = [found / math.sqrt(2), found * math.sqrt(2)]
        if found / 2 in losses and found * 2 in losses:  # only to the side that is better
            longer = float(losses[found * 2].mean()) < float(losses[found / 2].mean())
            halves = [halves[longer]]
        return _winner(compare(found, *halves), found)

    @functools.cached_property
    def _compared(self) -> tuple[Distances, Tensor]:
        """The distances that metrics are compared in, and the rows that they are compared on."""
        distances, few = self._distances, self.points[self._few]
        if len(distances.rows) <= _MEASURED:
            return distances, few
        some = Distances(distances.sources, distances.metrics, distances.rows[few])
        return some, torch.arange(len(few))

    def _process(self, metric: str | Features, length: float, few: bool = False) -> GaussianProcess:
        key = key_of(metric), length, few
        if key not in self._processes:
            distances, points = self._compared if few else (self._distances, self.points)
            squared, step = distances.by(metric)
            self._processes[key] = GaussianProcess(squared, length * step, points)
        return self._processes[key]


def _winner(losses: dict[_T, Tensor], default: _T) -> _T:
    """Return the best by the losses ``[n]`` of each; the default, if the best is so by chance."""
    best = min(losses, key=lambda one: float(losses[one].mean()), default=default)
    if default in losses:
        gain = losses[default] - losses[best]
        if not float(gain.mean()) > _ERRORS * float(gain.std()) / math.sqrt(len(gain)):
            return default
    return best
