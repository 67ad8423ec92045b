"""Regressions from results, with the metric and the length that estimate them best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._arguments import dense
from .._torch import differentiated, exactly, outside, plain, to_device
from ..linear import product
from .error_bounds import Bounds, bounds
from .gaussian_process import NUGGET, Estimates, GaussianProcess, off_mean
from .geometry import evenly
from .metrics import Choice, Distances, Features, name_of

#: The length where nothing is chosen, in steps of a path. (benchmarks distances)
LENGTH = 2.0
# Results that metrics and lengths are compared on, or an eighth if that is more: all of 204 cost
# several times as much, and find no better ones. (benchmarks distances)
_COMPARED = 144
# With fewer results, chance decides which metric estimates best. (benchmarks distances)
_LEAST = 8
#: Rows that are regressed together; time grows with the cube, memory with the square. In 2, 4, 8
#: parts the squared error is 1.6, 2.4, 4.0 times as large. (measured once; no benchmark keeps it)
MOST_ROWS = 4096
# Columns of the results, to judge estimates by: the outputs' variance and trust are as exact from
# some 64 outputs as from all. It was not tuned.
_COLUMNS = 64


class Chosen(NamedTuple):
    """The regression that estimates results best; its process is None if their mean does."""

    choice: Choice | None = None  # None if there is no choice
    process: GaussianProcess | None = None
    estimates: Estimates | None = None  # None if there is no choice

    @property
    def trust(self) -> float:
        return 0.0 if self.estimates is None else self.estimates.trust


class Regressor:
    """Estimates rows of a batch from results of others, in the metric and length that do it best.

    Args:
        distances: of the rows that are estimated together, by every metric that competes.
        length: of the regression, in steps of a path. None to choose among some.
        source: ``[B]``, the place of each row's result among results ``[n, ...]``, or -1. Defaults
            to results of all rows.
        compared: the results that choices are compared on, if an eighth of them is less.

    Attributes:
        known: ``[M]``, those of the rows from which the others are estimated. If there are none,
            all results of the batch are taken, and estimate by their mean.
        missing: ``[L]``, the rows of the batch that are estimated.
    """

    def __init__(
        self,
        distances: Distances,
        length: float | None,
        source: Tensor | None = None,
        compared: int = _COMPARED,
    ) -> None:
        source = torch.arange(len(distances.rows)) if source is None else source
        own = source[distances.rows]
        near = (has := own >= 0) & ~distances.far
        self.known = (near if near.any() else has).nonzero().flatten()
        self._missing = (~has).nonzero().flatten()
        self.missing, self._used = distances.rows[self._missing], own[self.known]
        if not len(self.known):
            places = source[source >= 0]
            self._used = places[evenly(len(places), MOST_ROWS)]
        self._distances, self._length = distances, length
        self._few = evenly(len(self.known), max(compared, len(self.known) // 8))
        self._processes: dict[tuple[str | Features, float], GaussianProcess] = {}
        self._fits: list[tuple[Tensor, Chosen]] = []  # to results, and to residuals
        self._last: tuple[str | Features, float] | None = None  # metric and length

    def fit(self, results: Tensor, search: bool = True) -> Chosen:
        """Return the regression that estimates results ``[M, C]``, float64, best.

        Without a search it has the metric and the length of the last one.
        """
        if not self._distances.measured or len(self.known) < 2:
            return Chosen()
        for known, chosen in self._fits:
            if torch.equal(known, results):
                return chosen
        metric, length = (not search and self._last) or self._search(results)
        self._last, process = (metric, length), self.process(metric, length)
        found = process.estimate(results.contiguous())
        choice = Choice(name_of(metric), length, found.error, found.trust)
        chosen = Chosen(choice, process if found.trust > 0 else None, found)
        self._fits = [*self._fits[-1:], (results, chosen)]
        return self._fits[-1][1]

    def process(self, metric: str | Features, length: float) -> GaussianProcess:
        """Return the regression of one metric and length; results of any outputs share it."""
        if (metric, length) not in self._processes:
            squared, step = self._distances.by(metric)
            found = GaussianProcess(squared, length * step, self.known, self._missing)
            self._processes[metric, length] = found
        return self._processes[metric, length]

    def _search(self, results: Tensor) -> tuple[str | Features, float]:
        """Return the metric that estimates results best, and then the length."""
        by, length, first = self._distances, self._length, self._distances.first
        metrics = by.competing
        if len(self.known) < _LEAST or not results.shape[1]:
            return first if len(metrics) > 1 else metrics[0], length or LENGTH
        if len(metrics) == 1 and length is not None:
            return metrics[0], length
        fits = [by.fitted(metric) for metric in metrics]
        units = torch.tensor([fit.unit for fit in fits], dtype=torch.float64)
        standard = [*metrics].index(first) if first in metrics else -1
        where = by.typical, by.order, self.known[self._few], results[self._few]
        found = ops.choose_regression(
            [fit.coordinates for fit in fits], units, *where, standard, length, NUGGET
        )
        return metrics[found[0]], found[1]

    def estimate(self, results: Tensor, search: bool) -> tuple[Tensor, Choice | None]:
        """Return estimates of the missing rows, ``[L, ...]``, and how they were made."""
        dense("Regression", "results", results)
        used, (at,) = self._used, to_device([self._used], results.device)
        with outside(), exactly():
            sample, size = self._sample(results)
            chosen = self.fit(sample, search)
            process, trust = chosen.process, chosen.trust
            weights = torch.full((1, len(used)), 1 / len(used), dtype=torch.float64)
            if process is not None:  # shrunk as far as results are not estimated by each other
                # Wide outputs, other devices and derivatives need weights. Those of many results
                # take longer than estimates, as a system is solved for each missing row.
                simple = results.device.type == "cpu" and not differentiated(results)
                if simple and results[0].numel() < len(self.missing) and not process.leaves_all:
                    some = columns(results)[used].double() / size
                    few = (process.estimate(some, trust).values * size).to(results.dtype)
                    return few.view(-1, *results.shape[1:]), chosen.choice
                weights = torch.lerp(weights, process.weights, trust)
            wide = torch.promote_types(results.dtype, torch.float32)
            (weights,) = to_device([weights.to(wide)], results.device)
        values = results.index_select(0, at)
        found = product(weights, values if size == 1 else values / size)
        found = found if size == 1 else found * size
        return found.expand(len(self.missing), *found.shape[1:]), chosen.choice

    def bounds(self, results: Tensor, answers: Tensor, *surrogates: Tensor) -> Bounds:
        """Return the error bounds of the missing rows, as ``RowPlan`` does."""
        rows, is_few = self.missing, columns(results).shape[1] < 2 * _COLUMNS
        asked = [*zip((results, answers, *surrogates), [self._used, rows] * 2, strict=False)]
        # Many outputs stay where they are, in their precision.
        found = [x.double() for x in _on_host(asked)] if is_few else _rows(asked)
        sample, size = (found[0], _size(found[0])) if is_few else self._sample(results)
        of_used, estimated, *offsets = found if size == 1 else [x / size for x in found]
        chosen = self.fit(of_used if is_few else sample)
        labels = (of_used, estimated) if results.dim() == 2 else None
        if labels and offsets:
            labels = of_used + offsets[0], estimated + offsets[1]
        scaled = bounds(rows, of_used, estimated, chosen.process, chosen.trust, labels)
        thresholds = scaled.thresholds * size
        places = self._used[evenly(len(self._used), thresholds.shape[2])]
        return scaled._replace(thresholds=thresholds, results=places)

    def _sample(self, results: Tensor) -> tuple[Tensor, float]:
        """Return some columns of the results, ``[M, C]``, divided by their size, and this size."""
        sample, numbers = few_columns(self._used, results), columns(results)
        extremes = () if sample.shape[1] == numbers.shape[1] else numbers.aminmax()
        size = _size(torch.stack(extremes) if extremes else sample)
        return (sample if size == 1 else sample / size), size

    def left_out_squares(self, values: Sequence[Tensor]) -> list[float]:
        """Return the sums of squared errors of estimating values from each other.

        The regression is the one that estimates the first of them best.
        """
        values = [x[self._used] for x in values]
        process = self.fit(values[0]).process
        left_out = off_mean if process is None else process.leave_one_out_residuals
        return [float(left_out(x).square().sum()) for x in values]


def _size(results: Tensor) -> float:
    """Return the power of two to divide results by; 1, unless squares or sums could overflow."""
    largest = float(torch.linalg.vector_norm(results, math.inf)) if results.numel() else 0.0
    if not 0 < largest < math.inf or 2.0**-500 < largest < 2.0**60:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 60, -1000))


def few_columns(rows: Tensor, values: Tensor) -> Tensor:
    """Return some columns of some rows of values ``[n, ...]``: ``[M, C]``, float64 on the host."""
    return _on_host([(_few(columns(values)), rows)])[0].double()


def _on_host(asked: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """Return rows of values of one device, ``[L, C]`` each, by one copy to the host."""
    some = _rows(asked)
    return torch.split(torch.cat(some).cpu(), [len(x) for x in some])


def _rows(asked: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return rows of values of one device, ``[L, C]`` each; all in order are no copy."""
    indices = to_device([rows for _, rows in asked], asked[0][0].device)
    pairs = [(columns(v), rows, i) for (v, rows), i in zip(asked, indices, strict=True)]
    whole = [len(rows) == len(v) and bool((rows.diff() == 1).all()) for v, rows, _ in pairs]
    return [
        v if all_of else v.index_select(0, i)
        for (v, _, i), all_of in zip(pairs, whole, strict=True)
    ]


def columns(values: Tensor) -> Tensor:
    """Return the plain numbers of values ``[n, ...]``, as ``[n, C]``."""
    return plain("decode", "results", values).reshape(len(values), -1)


def _few(columns: Tensor) -> Tensor:
    return columns[:, :: max(1, columns.shape[1] // _COLUMNS)]
