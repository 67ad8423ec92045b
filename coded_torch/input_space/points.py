"""The points of a batch, in every metric that may answer it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._logging import sparing_logger
from .distances import (
    METRICS,
    Features,
    Leaf,
    Metric,
    features_by,
    features_of,
    inner_products,
    name_of,
    squared_distances,
)
from .gaussian_process import MOST_INVERTED, FittedRegression, KernelRegression, PartialRegression
from .geometry import Geometry
from .selection import DEFAULT, LENGTH, Fitted, Regressions, key_of

if TYPE_CHECKING:
    from ..linear import LinearMap
    from .ordering import Grouping

__all__ = ["Points", "made_by", "path_step"]

logger = sparing_logger("coded_torch.codes")

# Points farther from the batch's centre than so many times the root mean square of its inputs say
# nothing of the others, and their results may be so large that the mean does not either.
_FAR = 8
# The least median distance between neighbours, in the same unit: with less for its length, as noisy
# copies of a few images have, a regression sees next to nothing of the others, and all of rounding.
_SHORTEST = 0.01
# Predicting an input from more than its neighbours on the path changes its variance little. (MKL
# factorises 500 rows in less than half the time that it takes for 512.)
_NEIGHBOURHOOD = 500


class _Mixtures(NamedTuple):
    """The points behind the inputs: mixtures of the inputs of each group."""

    encoder: LinearMap
    workers: Tensor  # [Q], those whose inputs are mixtures
    rows: Tensor  # [G, K], the inputs of each group


class Points:
    """The points that workers may compute: the inputs of a batch, and mixtures of them behind.

    Args:
        metrics: that may answer the batch, names and callables.
        lengths: of the regression, likewise.
        grouping: the batch in its order.
        geometry: of its inputs.

    Attributes:
        metrics, lengths: as given.
        first, first_length: the metric and length that copies go by.
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
        self.metrics, self.lengths = list(metrics), lengths
        self._regressions: Regressions | None = None
        self._grouping, self._geometry = grouping, geometry
        self._basis = geometry.typical.nonzero().flatten()
        self._mixtures: _Mixtures | None = None
        self._made: dict[int, list[Tensor] | None] = {}
        self._squared: dict[str | int, Tensor | None] = {}
        self._steps: dict[str | int, float] = {}
        self._whole: KernelRegression | None = None
        self._copies_planned = False
        self.first, inner = DEFAULT, geometry  # by which copies are planned
        if len(metrics) == 1 and isinstance(metrics[0], str):
            found = self._inner(metrics[0])
            if found is None:
                self.notes.append(f"the metric {metrics[0]!r} does not apply to these inputs")
            else:
                self.first, inner = metrics[0], found
        self.first_length = lengths[0] if len(lengths) == 1 else LENGTH
        self.usable = inner.finite & (inner.squares <= _FAR**2)
        wide = any(x.dtype == torch.float64 for x in geometry.inputs)
        few = len(self.usable) <= MOST_INVERTED
        self._dtype = torch.float64 if wide and few else torch.float32
        self._squared[self.first] = inner.squared_distances(self._dtype)
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
        weights, linear = encoder.matrix()[workers], _how(self.first).linear
        inner = self._inner_of_first if linear else self._geometry
        squared, usable = _with_mixtures(inner, weights, rows)
        if linear:
            self._squared[self.first] = squared.to(self._dtype)
        else:
            del self._squared[self.first]  # measured on what workers get, when it is wanted
        self.usable = torch.cat([self.usable, usable])
        return torch.arange(first, len(self.usable)).view(len(workers), len(rows))

    def leave_one_out_variances(self) -> Tensor:
        """Of each input predicted from all others, or, in large batches, those near in order."""
        order = self._grouping.order
        if len(order) <= MOST_INVERTED:
            self._copies_planned = True
            return self.whole().leave_one_out_variances
        squared, step = self.distances(self.first)
        variances = torch.empty(len(order), dtype=torch.float64)
        for rows in order.tensor_split(-(-len(order) // _NEIGHBOURHOOD)):  # about alike
            near = KernelRegression(squared, self.first_length * step, points=rows)
            variances[rows] = near.leave_one_out_variances
        return variances

    def whole(self) -> KernelRegression:
        """Given results of all points, by the metric and length that copies go by; it is kept."""
        if self._whole is None:
            squared, step = self.distances(self.first)
            self._whole = KernelRegression(squared, self.first_length * step)
        return self._whole

    def regression(self, metric: str | Features, length: float, points: Tensor) -> FittedRegression:
        """That given the results of some points."""
        is_first = (metric, length) == (self.first, self.first_length)
        few_lost = 2 * len(points) > len(self.usable)  # else rounding of the inverse would show
        if self._copies_planned and is_first and few_lost:
            return PartialRegression(self.whole(), points)
        squared, step = self.distances(metric)
        return KernelRegression(squared, length * step, points=points)

    def fit(self, points: Tensor, sample: Tensor | None) -> Fitted:
        """The regression that predicts best, see :meth:`Regressions.fit`."""
        if self._regressions is None or self._regressions.points is not points:
            self._regressions = Regressions(self, points)
        return self._regressions.fit(sample)

    def distances(self, metric: str | Features) -> tuple[Tensor, float]:
        """The squared distances of all points, and the step of the path.

        By the metric of before, where this one does not apply to them.
        """
        key = key_of(metric)
        squared = self.squared_distances(metric)
        if squared is None:
            return self.distances(self.first)
        if key not in self._steps:
            self._steps[key] = path_step(squared, self._grouping.order)
        return squared, self._steps[key]

    def unchosen(self, points: Tensor) -> tuple[KernelRegression, Tensor]:
        """A regression by the metric and length of before.

        Returns:
            The regression, given the results of these points or of all, and the places of these
            points among its own.
        """
        if self._mixtures is None and len(self.usable) <= MOST_INVERTED:
            return self.whole(), points  # which is there where copies have been planned
        squared, step = self.distances(self.first)
        given = KernelRegression(squared, self.first_length * step, points=points)
        return given, torch.arange(len(points))

    def of_few(self, points: Tensor) -> tuple[list[str | Features], list[Tensor]]:
        """The metrics that apply to few points, and the squared distances of these, float32."""
        leaves = [Leaf(x) for x in self._at(points)]
        products: dict[int, Tensor | None] = {}
        found, squared = [], []
        for metric in self.metrics:
            how = _how(metric)
            key = id(how.features if isinstance(metric, str) else metric)
            if key not in products:
                features = self._features(metric, points, leaves)
                products[key] = None if features is None else inner_products(features).float()
            of_metric = products[key]
            if of_metric is not None and bool(of_metric.isfinite().all()):
                found.append(metric)
                squared.append(squared_distances(of_metric, how.shrinkage))
        return found, squared

    def squared_distances(self, metric: str | Features) -> Tensor | None:
        """Those of all points, ``[P, P]``; None where the metric does not apply."""
        key = key_of(metric)
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
        leaves = [Leaf(x, self._basis) for x in self._at(every)] if isinstance(metric, str) else []
        features = self._features(metric, every, leaves, self._basis)
        if features is None:
            return None
        return Geometry(features, shrinkage=_how(metric).shrinkage).squared_distances(self._dtype)

    def _inner(self, metric: str) -> Geometry | None:
        """The geometry of the inputs alone, in a linear metric."""
        how = METRICS[metric]
        if how.features is METRICS[DEFAULT].features:
            same = how.shrinkage == self._geometry.shrinkage
            return self._geometry if same else self._geometry.with_shrinkage(how.shrinkage)
        leaves = [Leaf(x, self._basis) for x in self._geometry.inputs]
        features = features_by(how, leaves)
        return None if features is None else Geometry(features, shrinkage=how.shrinkage)

    def _features(
        self,
        metric: str | Features,
        points: Tensor,
        leaves: list[Leaf],
        basis: Tensor | None = None,
    ) -> list[Tensor] | None:
        """What distances are measured on at some points; ``basis`` as of :class:`Leaf`."""
        if isinstance(metric, str):
            return features_by(METRICS[metric], leaves)
        made = self._made_by(metric)
        if made is None:
            return None
        leaves = [Leaf(x[points.to(x.device)], basis) for x in made]
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


def made_by(features: Features, inputs: Sequence[Tensor]) -> tuple[list[Tensor] | None, str]:
    """What a callable makes of inputs; or None, and why, in a line that is logged."""
    try:
        return features_of(features, inputs), ""
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"the metric {name_of(features)} was left out: {reason}"
        logger.warning("%s", note)
        return None, note


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
