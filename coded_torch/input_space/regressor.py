"""Regressions from results, with the metric and the length that estimate them best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._arguments import dense
from .._torch import differentiated, exactly, outside, plain, to_device
from ..linear import MatrixMap
from ..ops import left_out_losses
from .error_bounds import Bounds, bounds
from .gaussian_process import NUGGET, GaussianProcess, off_mean, scaled
from .geometry import evenly
from .metrics import Choice, Distances, Features, name_of

_T = TypeVar("_T")

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


class Chosen(NamedTuple):
    """The regression that estimates results best; its process is None if their mean does."""

    choice: Choice | None = None  # None if there is no choice
    process: GaussianProcess | None = None
    trust: float = 0.0  # in the process, which is 0 without one


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
        few = evenly(len(self.known), max(compared, len(self.known) // 8))
        self._few, self._compared = few, self.known[few]
        # The distances among the compared results, and their step, by metric.
        self._among: dict[str | Features, tuple[Tensor, float]] = {}
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
        error, trust = process.leave_one_out_error(results)
        choice = Choice(name_of(metric), length, error, trust)
        chosen = Chosen(choice, process if trust > 0 else None, trust)
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
        metrics, length, losses = self._distances.competing, self._length or LENGTH, self._losses
        metric = self._distances.first if len(metrics) > 1 else metrics[0]
        if len(self.known) < _LEAST or not results.shape[1]:
            return metric, length
        few = scaled(results[self._few])[0].float()
        if len(metrics) > 1:
            of_metrics = {x: losses(few, x, [length], own_step=True)[length] for x in metrics}
            metric = _best(of_metrics, metric)
        if self._length is not None:
            return metric, length
        # No longer length and no half step is tried where losses rise.
        found = losses(few, metric, _LENGTHS[:-1])
        length = _best(found, LENGTH)
        if length == _LENGTHS[-2]:
            found |= losses(few, metric, _LENGTHS[-1:])
            length = _best(found, LENGTH)
        shorter, longer = length / 2, length * 2
        near = [length / math.sqrt(2), length * math.sqrt(2)]
        if {shorter, longer} <= found.keys():  # the side whose next length is better
            near.pop(0 if found[longer].mean() < found[shorter].mean() else 1)
        return metric, _best({length: found[length]} | losses(few, metric, near), length)

    def _losses(
        self, few: Tensor, metric: str | Features, lengths: Sequence[float], own_step: bool = False
    ) -> dict[float, npt.NDArray[np.float64]]:
        """Return the losses of results that are left out, by length.

        Metrics are compared by the steps among few results alone, which need no other distances.
        """
        if metric not in self._among:
            self._among[metric] = self._distances.by(metric, self._compared)
        squared, step = self._among[metric]
        step = step if own_step else self._distances.by(metric)[1]
        found = left_out_losses(squared, [x * step for x in lengths], few, NUGGET).numpy()
        return dict(zip(lengths, found, strict=True))

    def estimate(self, results: Tensor, search: bool) -> tuple[Tensor, Choice | None]:
        """Return estimates of the missing rows, ``[L, ...]``, and how they were made."""
        dense("Regression", "results", results)
        used, (at,) = self._used, to_device([self._used], results.device)
        with outside(), exactly():
            all_columns, sample = columns(results), few_columns(used, results)
            is_whole = sample.shape[1] == all_columns.shape[1]  # a host's numbers are known
            extremes = () if is_whole else all_columns.index_select(0, at).aminmax()
            size = _size(torch.stack(extremes) if extremes else sample)
            weights = torch.full((1, len(used)), 1 / len(used), dtype=torch.float64)
            choice, process, trust = self.fit(sample / size, search)
            if process is not None:  # shrunk as far as results are not estimated by each other
                # Wide outputs, other devices and derivatives need weights.
                simple = results.device.type == "cpu" and not differentiated(results)
                if simple and results[0].numel() < len(self.missing) and len(used) > _WEIGHED:
                    found = process.estimate(all_columns[used].double() / size, trust) * size
                    return found.to(results.dtype).view(-1, *results.shape[1:]), choice
                weights = process.weights * trust + (1 - trust) / len(used)
            map = MatrixMap(weights)
        values = results.index_select(0, at)
        found = map(values) if size == 1 else map(values / size) * size
        return found.expand(len(self.missing), *found.shape[1:]), choice

    def bounds(self, results: Tensor, answers: Tensor, *surrogates: Tensor) -> Bounds:
        """Return the error bounds of the missing rows, as ``RowPlan`` does."""
        rows, values = self.missing, (results, answers, *surrogates)
        found = _on_host([*zip(values, [self._used, rows] * 2, strict=False)])
        size = _size(found[0])
        of_used, estimated, *offsets = (x / size for x in found)
        labels = (of_used, estimated) if results.dim() == 2 else None
        if labels and offsets:
            labels = of_used + offsets[0], estimated + offsets[1]
        _, process, trust = self.fit(_few(of_used).double())
        scaled = bounds(rows, of_used, estimated, process, trust, labels)
        return scaled._replace(thresholds=scaled.thresholds * size)

    def left_out_squares(self, values: Sequence[Tensor]) -> list[float]:
        """Return the sums of squared errors of estimating values from each other.

        The regression is the one that estimates the first of them best.
        """
        values = [x[self._used] for x in values]
        process = self.fit(values[0]).process
        left_out = off_mean if process is None else process.leave_one_out_residuals
        return [float(left_out(x).square().sum()) for x in values]


def _best(losses: Mapping[_T, npt.NDArray[np.float64]], default: _T) -> _T:
    """Return the key with the least mean loss, or the default if the gain may be chance."""
    means = {key: float(x.mean()) for key, x in losses.items()}
    best = min(means, key=means.__getitem__)
    if best == default or means.get(default, math.inf) == math.inf:
        return best
    gain = losses[default] - losses[best]
    by_chance = _ERRORS * float(gain.std(ddof=1)) / math.sqrt(len(gain))
    return best if means[default] - means[best] > by_chance else default


def _size(results: Tensor) -> float:
    """Return the power of two to divide results by; 1, unless squares or sums could overflow."""
    largest = float(results.abs().max()) if results.numel() else 0.0
    if not 0 < largest < math.inf or 2.0**-500 < largest < 2.0**60:
        return 1.0
    return math.ldexp(1.0, max(math.frexp(largest)[1] - 60, -1000))


def few_columns(rows: Tensor, values: Tensor) -> Tensor:
    """Return some columns of some rows of values ``[n, ...]``: ``[M, C]``, float64 on the host."""
    return _on_host([(_few(columns(values)), rows)])[0].double()


def _on_host(asked: Sequence[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """Return rows of values of one device, ``[L, C]`` each, by one copy to the host."""
    indices = to_device([rows for _, rows in asked], asked[0][0].device)
    some = [columns(v).index_select(0, i) for (v, _), i in zip(asked, indices, strict=True)]
    return torch.split(torch.cat(some).cpu(), [len(x) for x in some])


def columns(values: Tensor) -> Tensor:
    """Return the plain numbers of values ``[n, ...]``, as ``[n, C]``."""
    return plain("decode", "results", values).reshape(len(values), -1)


def _few(columns: Tensor) -> Tensor:
    return columns[:, :: max(1, columns.shape[1] // _COLUMNS)]
