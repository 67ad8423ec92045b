"""Regressions from results, with the metric and the length that estimate them best."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._arguments import dense
from .._torch import differentiated, exactly, outside, plain, to_device
from ..linear import SelectMap
from ..ops import left_out_losses
from .error_bounds import Bounds, bounds
from .gaussian_process import NUGGET, GaussianProcess, scaled
from .geometry import evenly
from .metrics import Choice, Distances, Features, name_of

#: The length where nothing is chosen, in steps of a path, and the lengths that compete, with a half
#: step to the better side; no others were better. (benchmarks distances)
LENGTH = 2.0
_LENGTHS = (1.0, 2.0, 4.0, 8.0)
# Results that metrics and lengths are compared on, or an eighth if that is more: all of 204 cost
# several times as much, and find no better ones. (benchmarks distances)
_COMPARED = 144
# Standard errors that a choice must gain, else the default stays. With one, another length lost up
# to half as much again where results are few; with two hardly any gain is lost. (benchmarks
# distances)
_ERRORS = 2
# With fewer results, chance decides which metric estimates best. (benchmarks distances)
_LEAST = 8
#: Rows that are regressed together; time grows with the cube, memory with the square. In 2, 4, 8
#: parts the squared error is 1.6, 2.4, 4.0 times as large. (measured once; no benchmark keeps it)
MOST_ROWS = 4096
# Columns of the results, to judge estimates by: the outputs' variance and trust are as exact from
# some 64 outputs as from all. It was not tuned.
_COLUMNS = 64
# Weights of more results take longer than estimates, as a system is solved for each missing row.
# It is the number up to which the inverse is known.
_WEIGHED = 512
# Rows whose variances are found together where copies are planned: estimating an input from more
# than its neighbours on the path changes its variance little. (MKL factorises 500 rows in less than
# half the time that it takes for 512.)
_NEIGHBOURS = 500


class Fits:
    """Regressions from the results of rows ``[M]``. Results and their residuals share the factors.

    They estimate the ``missing`` rows. Metrics, and lengths if none is fixed, are compared on
    ``compared`` of the results, or an eighth.
    """

    def __init__(
        self,
        distances: Distances,
        length: float | None,
        points: Tensor,
        missing: Tensor | None = None,
        compared: int = _COMPARED,
    ) -> None:
        self._distances, self._fixed = distances, length
        self._points, self._missing = points, missing
        self._processes: dict[Any, GaussianProcess] = {}
        self._few = evenly(len(points), max(compared, len(points) // 8))
        few = points[self._few]
        # The distances among the compared results, and their step, by metric.
        self._among = functools.cache(lambda metric: distances.among(metric, few))
        self._fitted: list[tuple[Tensor, Choice, GaussianProcess]] = []  # to results, residuals

    def fit(self, sample: Tensor) -> tuple[Choice, GaussianProcess]:
        """Return the regression that estimates results ``[M, C]``, float64, best."""
        for known, choice, fitted in self._fitted:
            if torch.equal(known, sample):
                return choice, fitted
        distances, length = self._distances, self._fixed or LENGTH
        metrics = distances.competing
        metric = distances.first if len(metrics) > 1 else metrics[0]
        if len(self._points) >= _LEAST and sample.shape[1]:
            few = scaled(sample[self._few])[0].float()
            if len(metrics) > 1:
                losses = [self._losses(few, x, [length], self._among(x)[1])[0] for x in metrics]
                default = metrics.index(metric) if metric in metrics else None
                metric = metrics[_best(losses, default)]
            if self._fixed is None:
                length = self._length(few, metric)
        if (process := self._processes.get((metric, length))) is None:
            squared, step, _ = distances.by(metric)
            process = GaussianProcess(squared, length * step, self._points, self._missing)
            self._processes[metric, length] = process
        choice = Choice(name_of(metric), length, *process.leave_one_out_error(sample))
        self._fitted = [*self._fitted[-1:], (sample, choice, process)]
        return choice, process

    def _length(self, few: Tensor, metric: str | Features) -> float:
        """Return the best length; no longer one and no half step is tried where losses rise."""
        found: dict[float, npt.NDArray[np.float64]] = {}
        step = self._distances.by(metric).step

        def best(lengths: Sequence[float], default: float) -> float:
            new = [length for length in lengths if length not in found]
            found.update(zip(new, self._losses(few, metric, new, step), strict=True))
            return lengths[_best([found[x] for x in lengths], lengths.index(default))]

        length = best(_LENGTHS[:-1], LENGTH)
        if length == _LENGTHS[-2]:
            length = best(_LENGTHS, LENGTH)
        near = [length, length / math.sqrt(2), length * math.sqrt(2)]
        if {length / 2, length * 2} <= found.keys():  # the side whose next length is better
            near.pop(1 if found[length * 2].mean() < found[length / 2].mean() else 2)
        return best(near, length)

    def _losses(
        self, few: Tensor, metric: str | Features, lengths: Sequence[float], step: float
    ) -> npt.NDArray[np.float64]:
        squared, _ = self._among(metric)
        return left_out_losses(squared, [x * step for x in lengths], few, NUGGET).numpy()


def _best(losses: Sequence[npt.NDArray[np.float64]], default: int | None) -> int:
    """Return the place of the least mean loss; the default, if that may be chance."""
    means = [float(x.mean()) for x in losses]
    best = min(range(len(means)), key=means.__getitem__)
    if default is None or best == default or means[default] == math.inf:
        return best
    gain = losses[default] - losses[best]
    by_chance = _ERRORS * float(gain.std(ddof=1)) / math.sqrt(len(gain))
    return best if means[default] - means[best] > by_chance else default


class Part:
    """The rows ``[b]`` of a batch that are estimated together; by their mean without distances."""

    def __init__(self, rows: Tensor, distances: Distances | None, length: float | None) -> None:
        self.rows, self.distances, self.length = rows, distances, length
        self.usable = torch.ones(len(rows), dtype=torch.bool)
        self.order = torch.arange(len(rows))
        if distances is not None:
            self.usable, self.order = distances.usable, distances.order
            distances.prepare()

    def leave_one_out_variances(self) -> Tensor:
        """Return the variance of each row estimated from the rows near it, ``[b]``, float64."""
        variances = torch.ones(len(self.rows), dtype=torch.float64)
        if self.distances is None:
            return variances
        squared, step, _ = self.distances.by(self.distances.first)
        length = step * (self.length or LENGTH)
        for near in self.order.tensor_split(-(-len(self.order) // _NEIGHBOURS)):
            variances[near] = GaussianProcess(squared, length, near).leave_one_out_variances
        return variances


class Given:
    """A part of which some results are given: ``source``, ``[B]``, has the place of each, or -1.

    Results are ``[n, ...]``. If none of the part's rows estimates others, all of them do.
    """

    def __init__(self, part: Part, source: Tensor) -> None:
        self._rows, self._own = part.rows, source[part.rows]
        has = self._own >= 0
        self._missing = (~has).nonzero().flatten()
        if bool((has & part.usable).any()):
            has = has & part.usable
        points = has.nonzero().flatten()
        self._used = self._own[points]  # the places of the results that estimate
        self._fits: Fits | None = None  # the mean estimates
        if not len(points):
            known = source[source >= 0]
            self._used = known[evenly(len(known), MOST_ROWS)]
        elif part.distances is not None:
            self._fits = Fits(part.distances, part.length, points, self._missing)

    def decode(self, results: Tensor) -> tuple[Tensor, Choice | None]:
        """Return the answers of the rows, ``[b, ...]``, and how missing ones were estimated."""
        # Wide outputs, other devices and derivatives need weights.
        simple = results.device.type == "cpu" and not differentiated(results)
        own, used, choice, size = self._own, self._used, None, 1.0
        with outside(), exactly():
            if not len(self._missing):
                used, weights = used[:0], torch.zeros(0, 0)
            else:
                dense("Regression", "results", results)
                columns, (sample,) = _columns(results), few_columns(used, results)
                all_columns = sample.shape[1] == columns.shape[1]  # a host's numbers are known
                size = _size(sample if all_columns else torch.stack(columns.aminmax()))
                weights = torch.full((1, len(used)), 1 / len(used), dtype=torch.float64)
            if len(self._missing) and self._fits is not None and size == 1:
                choice, process = self._fits.fit(sample)
                fewer = results.numel() < len(results) * len(self._missing)
                if choice.trust > 0 and simple and fewer and len(used) > _WEIGHED:
                    found = process.estimate(columns[used].double(), choice.trust).to(results.dtype)
                    answers = results.index_select(0, own.clamp(min=0))
                    answers[self._missing] = found.view(len(found), *results.shape[1:])
                    return answers, choice
                if choice.trust > 0:  # shrunk as far as results are not estimated by each other
                    weights = process.weights * choice.trust + (1 - choice.trust) / len(used)
            map = SelectMap(len(results), own, used, weights)
        if size == 1:
            return map(results), choice
        info, has = torch.finfo(results.dtype), (own >= 0).to(results.device)
        answers, choice = self.decode(results / size)
        answers = (answers * size).clamp(info.min, info.max)
        return torch.where(has.view(-1, *[1] * (results.dim() - 1)), results[own], answers), choice

    def bounds(self, results: Tensor, answers: Tensor, *surrogates: Tensor) -> Bounds | None:
        """Return the error bounds of missing rows, None without any, as ``RowPlan`` does."""
        if not len(self._missing):
            return None
        rows, used, values = self._rows[self._missing], self._used, (results, answers, *surrogates)
        of_used, estimated, *offsets = _on_host([*zip(values, [used, rows] * 2, strict=False)])
        if (size := _size(of_used)) != 1:
            found = self.bounds(*(x / size for x in values))
            return found and found._replace(thresholds=found.thresholds * size)
        labels = (of_used, estimated) if results.dim() == 2 else None
        if labels and offsets:
            labels = of_used + offsets[0], estimated + offsets[1]
        regression = None
        if self._fits is not None and len(used) > 1:
            choice, process = self._fits.fit(_few(of_used).double())
            regression = (process, choice.trust) if choice.trust > 0 else None
        return bounds(rows, of_used, estimated, regression, labels)

    def left_out_square(self, results: Tensor) -> float:
        """Return the sum of squared errors of estimating results from the others."""
        (sample,) = few_columns(self._used, results)
        if self._fits is None:
            n = len(sample)
            return float(sample.var(0).sum()) * n**2 / (n - 1) if n > 1 else 0.0
        _, process = self._fits.fit(sample)
        return float(process.leave_one_out_residuals(sample).square().sum())


def _size(results: Tensor) -> float:
    """Return the power of two to divide results by; 1, unless squares or sums could overflow."""
    largest = float(results.abs().max()) if results.numel() else 0.0
    if not 0 < largest < math.inf or 2.0**-500 < largest < 2.0**60:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 60, -1000))


def few_columns(rows: Tensor, *values: Tensor) -> list[Tensor]:
    """Return some columns of some rows of values ``[n, ...]``: ``[M, C]``, float64 on the host."""
    return [x.double() for x in _on_host([(_few(_columns(v)), rows) for v in values])]


def _on_host(asked: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """Return rows of values of one device, ``[L, C]`` each, by one copy to the host."""
    indices = to_device([rows for _, rows in asked], asked[0][0].device)
    some = [_columns(v).index_select(0, i) for (v, _), i in zip(asked, indices, strict=True)]
    return torch.split(torch.cat(some).cpu(), [len(x) for x in some])


def _columns(values: Tensor) -> Tensor:
    return plain("decode", "results", values).reshape(len(values), -1)


def _few(columns: Tensor) -> Tensor:
    return columns[:, :: max(1, columns.shape[1] // _COLUMNS)]
