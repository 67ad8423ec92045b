"""The points of a batch, in every metric that may answer it, and which one predicts best."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..distances import (
    METRICS,
    Choice,
    Features,
    Leaf,
    Metric,
    features_by,
    features_of,
    inner_products,
    name_of,
    squared_distances,
)
from ..geometry import Geometry
from ..regression import KernelRegression, leave_one_out_losses

if TYPE_CHECKING:
    from ..grouping import Grouping
    from ..linear import LinearMap

__all__ = ["LENGTHS", "Batch", "Fitted", "among", "made_by", "path_step"]

_T = TypeVar("_T")
logger = logging.getLogger("coded_torch.codes")

#: The metric and the length where nothing is chosen, as before there are results.
DEFAULT, LENGTH = "shrunk", 2.0
LENGTHS = (1.0, 2.0, 4.0, 8.0)
# Metrics are compared on so many results; lengths, with the best metric, likewise: on all, which
# cost several times as much, no better ones are found.
_ROWS = 128
# In batches of so many inputs, float64 takes no longer than float32, and predicts what is smooth
# and without noise to more digits.
_EXACT = 128
# Steps of a path through few rows, in median distances from the nearest one.
_STEP = 1.2
# What wins by less than so many standard errors of its gain, from result to result, wins by chance:
# the default stays. On tables, series and pictures that nothing is reported of, one standard error
# let another length lose up to half as much again where results are few; with two hardly any gain
# is left out.
_ERRORS = 2
# Of fewer results, which metric predicts best is chance.
_LEAST = 8
# Points farther from the batch's centre than so many times the root mean square of its inputs say
# nothing of the others, and their results may be so large that the mean does not either.
_FAR = 8
# The least median distance between neighbours, in the same unit: with less for its length, as noisy
# copies of a few images have, a regression sees next to nothing of the others, and all of rounding.
_SHORTEST = 0.01


class Fitted(NamedTuple):
    """A regression from results that arrived.

    Attributes:
        choice: the metric and the length.
        squared: ``[P, P]``, the squared distances of all points.
        regression: from the results.
        trust: see :meth:`~coded_torch.regression.KernelRegression.trust`; 1 without results.
    """

    choice: Choice
    squared: Tensor
    regression: KernelRegression
    trust: float = 1.0


class _Mixtures(NamedTuple):
    """The points behind the inputs: mixtures of the inputs of each group."""

    encoder: LinearMap
    workers: Tensor  # [Q], those whose inputs are mixtures
    rows: Tensor  # [G, K], the inputs of each group


class Batch:
    """The points that workers may compute: the inputs of a batch, and mixtures of them behind.

    Args:
        metrics: that may answer the batch, names and callables.
        lengths: of the regression, likewise.
        grouping: the batch in its order.
        geometry: of its inputs.

    Attributes:
        usable: ``[P]``, bool: whether others are predicted from the results of the point.
        notes: which metrics could not be had, and why.
    """

    def __init__(
        self,
        metrics: Sequence[str | Features],
        lengths: Sequence[float],
        grouping: Grouping,
        geometry: Geometry,
    ) -> None:
        self.notes: list[str] = []
        self._metrics, self._lengths = list(metrics), lengths
        self._grouping, self._geometry = grouping, geometry
        self._told = geometry.typical.nonzero().flatten()
        self._mixtures: _Mixtures | None = None
        self._made: dict[int, list[Tensor] | None] = {}
        self._squared: dict[str | int, Tensor | None] = {}
        self._first, inner = DEFAULT, geometry  # by which copies are planned
        if len(metrics) == 1 and isinstance(metrics[0], str):
            found = self._inner(metrics[0])
            if found is None:
                self.notes.append(f"the metric {metrics[0]!r} does not apply to these inputs")
            else:
                self._first, inner = metrics[0], found
        self._first_length = lengths[0] if len(lengths) == 1 else LENGTH
        self.usable = inner.finite & (inner.squares <= _FAR**2)
        self._dtype = torch.float64 if len(self.usable) <= _EXACT else torch.float32
        self._squared[self._first] = inner.squared_distances(self._dtype)
        self._inner_of_first = inner

    def add_mixtures(self, encoder: LinearMap, workers: Tensor, rows: Tensor) -> Tensor:
        """Add the mixtures of every group as points.

        Args:
            encoder: the map of each group.
            workers: ``[Q]``, those whose inputs are mixtures.
            rows: ``[G, K]``, the inputs of each group.

        Returns:
            ``[Q, G]``, the points that they are.
        """
        self._mixtures = _Mixtures(encoder, workers, rows)
        first = len(self.usable)
        weights, linear = encoder.matrix()[workers], _how(self._first).linear
        inner = self._inner_of_first if linear else self._geometry
        squared, usable = _with_mixtures(inner, weights, rows)
        if linear:
            self._squared[self._first] = squared.to(self._dtype)
        else:
            del self._squared[self._first]  # measured on what workers get, when it is wanted
        self.usable = torch.cat([self.usable, usable])
        return torch.arange(first, len(self.usable)).view(len(workers), len(rows))

    def leave_one_out_variances(self, neighbourhood: int) -> Tensor:
        """Of each input predicted from all others, or, in large batches, those near in order."""
        squared, order = self._squared_distances(self._first), self._grouping.order
        length = self._first_length * path_step(squared, order)
        variances = torch.empty(len(order), dtype=torch.float64)
        all_near = len(order) <= neighbourhood
        for rows in order.split(neighbourhood):
            block = squared if all_near else among(squared, rows, rows)
            near = KernelRegression(block, length).leave_one_out_variances
            variances[slice(None) if all_near else rows] = near
        return variances

    def fit(self, points: Tensor, sample: Tensor | None) -> Fitted:
        """The regression that predicts best.

        Args:
            points: ``[M]``, whose results arrived.
            sample: of the results, ``[M, C]``; None: the metric and length that copies go by.
        """
        metric: str | Features = self._first
        lengths: Sequence[float] = (self._first_length,)
        if sample is not None and len(points) >= _LEAST:
            at = torch.arange(min(len(points), _ROWS)) * len(points) // min(len(points), _ROWS)
            few, of_few = points[at], _of_unit_size(sample[at])
            metric, lengths = self._best(few, of_few), self._lengths
        squared = self._squared_distances(metric)
        step = path_step(squared, self._grouping.order)
        length = lengths[0]
        if len(lengths) > 1:
            length = _best_length(among(squared, few, few).float(), step, lengths, of_few)
        regression = KernelRegression(among(squared, points, points), length * step)
        if sample is None:
            return Fitted(Choice(name_of(metric), length, math.nan), squared, regression)
        choice = Choice(name_of(metric), length, regression.leave_one_out_error(sample))
        return Fitted(choice, squared, regression, regression.trust(sample))

    def exactly(self, points: Tensor) -> KernelRegression:
        """That by the metric and length of before, in float64."""
        squared = self._squared_distances(self._first)
        length = self._first_length * path_step(squared, self._grouping.order)
        return KernelRegression(among(squared, points, points).double(), length)

    def _best(self, points: Tensor, sample: Tensor) -> str | Features:
        """The metric in which few results are predicted best from each other."""
        if self._metrics == [self._first]:
            return self._first
        leaves = [Leaf(x) for x in self._at(points)]
        products: dict[int, Tensor | None] = {}
        found, squared, lengths = [], [], []
        for metric in self._metrics:
            how = _how(metric)
            key = id(how.features if isinstance(metric, str) else metric)
            if key not in products:
                features = self._features(metric, points, leaves)
                products[key] = None if features is None else inner_products(features).float()
            of_metric = products[key]
            if of_metric is not None and bool(of_metric.isfinite().all()):
                found.append(metric)
                squared.append(squared_distances(of_metric, how.shrinkage))
                lengths.append(LENGTH * _STEP * _nearest(squared[-1]))
        losses = leave_one_out_losses(squared, lengths, sample)
        return _winner(found, losses, self._first)

    def _squared_distances(self, metric: str | Features) -> Tensor:
        """Of all points; by the metric of before, where this one does not apply to them."""
        squared = self.squared_distances(metric)
        return self._squared_distances(self._first) if squared is None else squared

    def squared_distances(self, metric: str | Features) -> Tensor | None:
        """Those of all points, ``[P, P]``; None where the metric does not apply."""
        key = metric if isinstance(metric, str) else id(metric)
        if key not in self._squared:
            self._squared[key] = self._measure(metric)
        return self._squared[key]

    def _measure(self, metric: str | Features) -> Tensor | None:
        if isinstance(metric, str) and _how(metric).linear:
            inner = self._inner(metric)
            if inner is None or self._mixtures is None:
                return None if inner is None else inner.squared_distances(self._dtype)
            encoder, workers, rows = self._mixtures
            return _with_mixtures(inner, encoder.matrix()[workers], rows)[0].to(self._dtype)
        every = torch.arange(len(self.usable))
        leaves = [Leaf(x, self._told) for x in self._at(every)] if isinstance(metric, str) else []
        features = self._features(metric, every, leaves, self._told)
        if features is None:
            return None
        return Geometry(features, shrinkage=_how(metric).shrinkage).squared_distances(self._dtype)

    def _inner(self, metric: str) -> Geometry | None:
        """The geometry of the inputs alone, in a linear metric."""
        how = METRICS[metric]
        if how.features is METRICS[DEFAULT].features:
            same = how.shrinkage == self._geometry.shrinkage
            return self._geometry if same else self._geometry.with_shrinkage(how.shrinkage)
        leaves = [Leaf(x, self._told) for x in self._geometry.inputs]
        features = features_by(how, leaves)
        return None if features is None else Geometry(features, shrinkage=how.shrinkage)

    def _features(
        self,
        metric: str | Features,
        points: Tensor,
        leaves: list[Leaf],
        told: Tensor | None = None,
    ) -> list[Tensor] | None:
        """What distances are measured on at some points, told by some rows of these, or all."""
        if isinstance(metric, str):
            return features_by(METRICS[metric], leaves)
        made = self._made_by(metric)
        if made is None:
            return None
        leaves = [Leaf(x[points.to(x.device)], told) for x in made]
        return features_by(_how(metric), leaves) or [leaf.x for leaf in leaves]

    def _made_by(self, features: Features) -> list[Tensor] | None:
        """What a callable makes of all points; it runs once. None where it fails."""
        if id(features) not in self._made:
            made, note = made_by(features, self._at(torch.arange(len(self.usable))))
            self._made[id(features)] = made
            self.notes += [note] if note else []
        return self._made[id(features)]

    def _at(self, points: Tensor) -> list[Tensor]:
        """What workers are given at some points."""
        size = self._grouping.batch_size
        own = points < size
        values = []
        for x in self._geometry.inputs:
            at = x[points.clamp(max=size - 1).to(x.device)]
            if self._mixtures is not None and not bool(own.all()):
                encoder, workers, _ = self._mixtures
                coded = encoder.gathered(x, self._grouping)[workers.to(x.device)].flatten(0, 1)
                mixed = ~own
                at[mixed.to(x.device)] = coded[(points[mixed] - size).to(x.device)]
            values.append(at)
        return values


def among(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows and columns of a matrix: twice as fast as by indexing."""
    return matrix.index_select(0, rows).index_select(1, columns)


def _nearest(squared_distances: Tensor) -> float:
    """The median distance from the nearest other row; 1 where that says nothing."""
    nearest = squared_distances.clone().fill_diagonal_(math.inf).amin(1).sqrt_()
    nearest = nearest[(nearest > 0) & nearest.isfinite()]
    return float(nearest.median()) if len(nearest) else 1.0


def made_by(features: Features, inputs: Sequence[Tensor]) -> tuple[list[Tensor] | None, str]:
    """What a callable makes of inputs; or None, and why, in a line that is logged."""
    try:
        return features_of(features, inputs), ""
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"the metric {name_of(features)} was left out: {reason}"
        logger.warning("%s", note)
        return None, note


def _of_unit_size(sample: Tensor) -> Tensor:
    """Results in float32, which their squares do not leave; what is chosen stays the same."""
    centred = sample - sample.mean(0)
    largest = float(centred.abs().max()) if centred.numel() else 0.0
    return (centred / (largest or 1.0)).float()


def _best_length(squared: Tensor, step: float, lengths: Sequence[float], sample: Tensor) -> float:
    """The length, in steps, by which the results are predicted best from each other."""

    def best(lengths: Sequence[float], default: float) -> float:
        scaled = [step * length for length in lengths]
        losses = leave_one_out_losses([squared] * len(lengths), scaled, sample)
        return _winner(lengths, losses, default)

    found = best(lengths, LENGTH)
    if lengths != LENGTHS:
        return found
    return best((found, found / math.sqrt(2), found * math.sqrt(2)), found)


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


def _how(metric: str | Features) -> Metric:
    """A callable's features may be in units of their own; they are never of mixtures linearly."""
    return METRICS[metric] if isinstance(metric, str) else METRICS["spread"]._replace(linear=False)


def _with_mixtures(geometry: Geometry, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The squared distances of inputs and mixtures, and which mixtures are usable.

    Args:
        geometry: of the inputs.
        weights: ``[Q, K]``, of the mixtures, the same in every group; each row sums to 1.
        rows: ``[G, K]``, the inputs of each group.

    Returns:
        ``[B + Q G, B + Q G]``, and bool, ``[Q G]``.
    """
    gram, lost = geometry.gram, ~geometry.finite
    # W M and W M W', group by group, as the weights are zero in all other groups.
    inner = torch.einsum("qk,gkb->qgb", weights, gram[rows]).flatten(0, 1)  # [Q G, B]
    among = torch.einsum("pgk,qk->pqg", inner[:, rows], weights).flatten(1)  # [Q G, Q G]
    squares = among.diagonal()
    inner = (squares[:, None] + gram.diagonal()).sub_(inner, alpha=2).clamp_(min=0)
    among = (squares[:, None] + squares).sub_(among, alpha=2).clamp_(min=0)
    # What an input that is infinitely far has been mixed into is infinitely far, too.
    nowhere = ((weights != 0)[:, None] & lost[rows]).any(dim=2).flatten()  # [Q G]
    inner.masked_fill_(nowhere[:, None] | lost, math.inf)
    among.masked_fill_(nowhere[:, None] | nowhere, math.inf).fill_diagonal_(0)
    upper = torch.cat([geometry.squared_distances(), inner.T], 1)
    lower = torch.cat([inner, among], 1)
    return torch.cat([upper, lower]), (squares <= _FAR**2) & ~nowhere


def path_step(squared_distances: Tensor, order: Tensor) -> float:
    """The median distance between neighbours on the path; 1 where that says nothing."""
    pairs = order[:-1] * len(squared_distances) + order[1:]
    steps = squared_distances.flatten()[pairs].sqrt()
    steps = steps[(steps > 0) & steps.isfinite()]
    return max(float(steps.median()), _SHORTEST) if len(steps) else 1.0
