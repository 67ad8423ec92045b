"""Regressions from results, with the metric and the length that estimate them best."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._arguments import dense
from .._extension import split_rows
from .._torch import differentiated, exactly, outside, plain, to_device
from ..linear import product
from ._error_bounds import Bounds, bounds_of
from ._gaussian_process import LENGTH, NUGGET, Estimates, GaussianProcess, evenly, off_mean
from ._gradients import GradientMetric
from ._untuned import COLUMNS
from .metrics import Choice, Distances, Features, name_of

# Results that metrics and lengths are compared on: all of 204 cost several times as much, and find
# no better ones. (benchmarks distances)
_COMPARED = 144
# With fewer results, chance decides which metric estimates best. (benchmarks distances)
_LEAST = 8
#: Rows that are regressed together; time grows with the cube, memory with the square. In 2, 4, 8
#: parts the squared error is 1.6, 2.4, 4.0 times as large. (measured once; no benchmark keeps it)
MOST_ROWS = 4096


class Chosen(NamedTuple):
    """The regression that estimates results best; its process is None if their mean does."""

    choice: Choice | None  # None if there is no choice
    process: GaussianProcess | None
    estimates: Estimates


class Regressor:
    """Estimates rows of a batch from results of others, in the metric and length that do it best.

    ``distances`` are of rows that are estimated together. If ``length`` is None, it is chosen.
    ``source``, ``[B]``, is the place of each row's result among ``[n, ...]``, or -1. By default,
    all rows have a result. Choices are compared on ``compared`` results, or on an eighth of all if
    that is more. ``known``, ``[M]``, are the places of the rows that estimate others, and
    ``missing``, ``[L]``, are the rows to estimate. If no row is known, the mean of all results
    of the batch estimates them.
    """

    def __init__(
        self,
        distances: Distances,
        length: float | None,
        source: Tensor | None = None,
        compared: int = _COMPARED,
    ) -> None:
        if source is None:
            source = distances.rows
        arrays = (x.numpy() for x in (source, distances.rows, distances.far))
        split = map(torch.from_numpy, split_rows(*arrays))
        self.known, self._missing, self.missing, self._used = split
        if not len(self.known):
            self._used = evenly(source[source >= 0], MOST_ROWS)
        self._distances = distances
        self._length = length
        self._compared = max(compared, len(self.known) // 8)
        self._processes: dict[tuple[str | Features, float], GaussianProcess] = {}
        self._last: tuple[str | Features, float] | None = None  # metric and length
        self._fits: list[tuple[Tensor, Any, Chosen]] = []  # the last eight, of residuals too
        self._estimated: tuple[Tensor, Tensor, float, Chosen]  # the last, from results

    def fit(self, results: Tensor, search: bool = True) -> Chosen:
        """Return the regression that estimates results ``[M, C]``, float64, best.

        Without a search it has the metric and the length of the last one.
        """
        if not self._distances.measured or len(self.known) < 2:
            mean = results.mean(0).expand(len(self.missing), -1)
            return Chosen(None, None, Estimates(mean, results, math.nan, 0.0))
        for known, last, chosen in self._fits:
            if known is results or torch.equal(known, results):
                self._last = last
                return chosen
        if search or self._last is None:
            self._last = self._search(results)
        metric, length = self._last
        process = self.process(metric, length)
        found = process.estimate(results.contiguous())
        choice = Choice(name_of(metric), length, found.error, found.trust)
        chosen = Chosen(choice, process if found.trust > 0 else None, found)
        self._fits = [*self._fits[-7:], (results, self._last, chosen)]
        return chosen

    def process(self, metric: str | Features, length: float) -> GaussianProcess:
        """Return the regression of one metric and length; results of any outputs share it."""
        if (metric, length) not in self._processes:
            squared, step = self._distances.by(metric)
            found = GaussianProcess(squared, length * step, self.known, self._missing)
            self._processes[metric, length] = found
        return self._processes[metric, length]

    def _search(self, results: Tensor) -> tuple[str | Features, float]:
        """Return the metric that estimates results best, and then the length."""
        by = self._distances
        length = self._length
        first = self._distances.first
        metrics = by.competing
        if len(self.known) < _LEAST or not results.shape[1]:
            return first if len(metrics) > 1 else metrics[0], length or LENGTH
        if len(metrics) == 1 and length is not None:
            return metrics[0], length
        some = [evenly(x, self._compared) for x in (self.known, results)]

        def best(among: Sequence[str | Features], standard: Any, length: float | None) -> Any:
            """Return the metric and length that estimate best, by more than chance explains."""
            fits = [by.fits[metric] for metric in among]
            place = [*among].index(standard) if standard in among else -1
            coordinates, _, units = map(list, zip(*fits, strict=True))
            found = ops.choose_regression(
                coordinates, units, by.typical, by.order, *some, place, length, NUGGET
            )
            return among[found[0]], found[1]

        gradients = [x for x in metrics if isinstance(x, GradientMetric)]
        others = [x for x in metrics if not isinstance(x, GradientMetric)]
        if gradients and others:
            # They must be better than the best of the others, not only than the first.
            first = best(others, first, length or LENGTH)[0]
            metrics = [first, *gradients]
        chosen: tuple[str | Features, float] = best(metrics, first, length)
        return chosen

    def estimate(self, results: Tensor, search: bool) -> tuple[Tensor, Choice | None]:
        """Return estimates of the missing rows, ``[L, ...]``, and how they were made."""
        dense("Regression", "results", results)
        # Wide outputs, other devices and derivatives need weights, which take longer.
        is_simple = results.device.type == "cpu" and not differentiated(results)
        with outside(), exactly():
            sample, size = self._sample(results)
            chosen = self.fit(sample, search)
            self._estimated = results, sample, size, chosen
            choice, process, found = chosen
            if is_simple and _is_few(results):
                values = _scaled(found.values, 1 / size).to(results.dtype)
                return values.reshape(len(values), *results.shape[1:]), choice
            weights = torch.full((1, len(self._used)), 1 / len(self._used), dtype=torch.float64)
            if process is not None:  # shrunk as far as results are not estimated by each other
                weights = torch.lerp(weights, process.weights, found.trust)
            wide = torch.promote_types(results.dtype, torch.float32)
            weights, at = to_device([weights.to(wide), self._used], results.device)
        values = results.index_select(0, at)
        estimates = _scaled(product(weights, _scaled(values, size)), 1 / size)
        return estimates.expand(len(self.missing), *estimates.shape[1:]), choice

    def left_out(self, results: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows with results, some of their columns, and leave-one-out residuals of these."""
        with outside(), exactly():
            sample, _ = self._sample(results)
            _, process, found = self.fit(sample)
            # Of more than 512 results, some are left out only.
            told = process is not None and len(found.residuals) == len(self.known)
            rows = self._distances.rows.index_select(0, self.known if told else self.known[:0])
            return rows, sample[: len(rows)], found.residuals[: len(rows)]

    def bounds(self, answers: Tensor, *surrogates: Tensor) -> Bounds:
        """Return the error bounds of the last estimates."""
        results, used, size, chosen = self._estimated
        estimates = chosen.estimates
        estimated = estimates.values
        columns_of = few_columns
        if not _is_few(results):  # many outputs stay where they are, in their precision
            columns_of = _rows
            used = _scaled(_rows(self._used, results), size)
            estimated = _scaled(_rows(self.missing, answers), size)
        labels = None
        if results.dim() == 2:
            labels = used, estimated
            if surrogates:
                surrogate_used = columns_of(self._used, surrogates[0])
                surrogate_missing = columns_of(self.missing, surrogates[1])
                labels = (
                    used + _scaled(surrogate_used, size),
                    estimated + _scaled(surrogate_missing, size),
                )
        scaled = bounds_of(
            self.missing,
            used,
            estimated,
            chosen.process,
            estimates.trust,
            labels,
            estimates.residuals,
        )
        return scaled._replace(
            thresholds=_scaled(scaled.thresholds, 1 / size),
            odd=_scaled(scaled.odd, 1 / size),
            results=evenly(self._used, len(scaled.odd)),
        )

    def _sample(self, results: Tensor) -> tuple[Tensor, float]:
        """Return some columns of the results, ``[M, C]``, divided by their size, and this size."""
        sample = few_columns(self._used, results)
        size = _size(sample if _is_few(results) else columns(results))
        return _scaled(sample, size), size

    def left_out_squares(self, values: Sequence[Tensor]) -> list[float]:
        """Return the sum of squared leave-one-out errors of each of the values.

        The metric and the length are the ones that estimate the first of the values best.
        """
        values = [x[self._used] for x in values]
        process = self.fit(values[0]).process
        left_out = off_mean if process is None else process.leave_one_out_residuals
        return [float(left_out(x).square().sum()) for x in values]


def _size(results: Tensor) -> float:
    """Return the power of two to divide results by; 1, unless squares or sums could overflow."""
    least, most = map(float, results.aminmax()) if results.numel() else (0.0, 0.0)
    largest = max(-least, most)
    if not 0 < largest < math.inf or 2.0**-500 < largest < 2.0**60:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 60, -1000))


def _scaled(values: Tensor, size: float) -> Tensor:
    return values if size == 1 else values / size


def _is_few(results: Tensor) -> bool:
    return results.numel() < 2 * COLUMNS * len(results)  # then all columns are judged by


def few_columns(rows: Tensor, values: Tensor) -> Tensor:
    """Return some columns of some rows of values ``[n, ...]``: ``[M, C]``, float64 on the host."""
    numbers = columns(values)
    step = numbers.shape[1] // COLUMNS
    some = numbers
    if step > 1:
        some = numbers[:, ::step]
    return some.index_select(0, *to_device([rows], some.device)).cpu().double()


def _rows(rows: Tensor, values: Tensor) -> Tensor:
    """Return some rows of values ``[n, ...]``, ``[M, C]``; all in order are not copied."""
    numbers = columns(values)
    if len(rows) == len(numbers) and bool((rows.diff() == 1).all()):
        return numbers
    return numbers.index_select(0, *to_device([rows], numbers.device))


def columns(values: Tensor) -> Tensor:
    """Return the plain numbers of values ``[n, ...]``, as ``[n, C]``."""
    return plain("decode", "results", values).reshape(len(values), -1)
