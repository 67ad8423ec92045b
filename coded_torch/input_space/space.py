"""Few coordinates of inputs, in the metric in which results estimate each other best."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import evenly, squared_distances, typical_rows
from .metrics import METRICS, Distances, Fitted, Leaf, Metric, Sources
from .regressor import Regressor

_LANDMARKS = 512  # rows that determine the directions
_NOTHING = 1e-6  # directions that hold less of the variance are rounding; not tuned


class Space:
    """Few coordinates of inputs in one metric, of mean square 1 on the rows that determine them.

    Attributes:
        step: the median distance between neighbours on a path through these rows.
    """

    def __init__(self, leaves: Sequence[Leaf], metric: Metric, fit: Fitted, rank: int) -> None:
        self._is_pooled, shrinkage = metric.features == "pooled", metric.shrinkage
        self._factor, self._offset = fit.map
        rows = self._scaled(leaves)
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        values, vectors = values[-rank:].clamp(min=0), vectors[:, -rank:]
        total = float(values.sum())
        if shrinkage < math.inf:  # sqrt(1 / (l + tau)) turns X' U into the metric's directions
            weights = (values + shrinkage * total).clamp(min=1e-300).rsqrt()
            vectors = vectors * torch.where(values > _NOTHING * total, weights, 0.0)
        projection = rows.T @ vectors
        square = float((rows @ projection).square().sum(1).mean())
        self._projection = projection * (square**-0.5 if square > 0 else 0.0)
        self.step = squared_distances(self(leaves), 1.0)[3]

    def __call__(self, leaves: Sequence[Leaf]) -> Tensor:
        """Return coordinates ``[n, rank]``, float32, or fewer if there are no more directions."""
        return torch.mm(self._scaled(leaves), self._projection).float()

    def _scaled(self, leaves: Sequence[Leaf]) -> Tensor:
        rows = [x.rows if x.pooled is None or not self._is_pooled else x.pooled for x in leaves]
        scaled: Tensor = torch.cat(rows, 1).double() * self._factor - self._offset
        return scaled


class Spaces:
    """The metrics of rows of which some have results. At most 512 of the rows determine them.

    Among the few rows of a batch another metric wins: the more rows there are, the finer it is.
    """

    def __init__(self, leaves: Sequence[Leaf], rank: int, names: Sequence[str]) -> None:
        some = typical_rows([leaf.rows.contiguous() for leaf in leaves]).nonzero().flatten()
        self._some = some[evenly(len(some), _LANDMARKS)]
        own = [leaf.at(self._some) for leaf in leaves]
        self._distances = found = Distances(Sources((), own), names)
        #: Returns the coordinates of a metric, by its name.
        self.of = functools.cache(lambda x: Space(own, METRICS[x], found.fitted(x), rank))

    def choose(self, results: Tensor, length: float | None = None) -> tuple[Any, float]:
        """Return the metric and the length by which results ``[n, C]`` estimate each other best.

        They are the results of the first n rows. The length, in steps of a path, may be given.
        """
        source = torch.where(self._some < len(results), self._some, -1)
        regressor = Regressor(self._distances, length, source, compared=_LANDMARKS)
        return regressor.search(results[self._some[regressor.known]].double().contiguous())


def joined(leaves: Sequence[Leaf]) -> Leaf:
    """Return the rows of leaves of one form as one."""
    pooled = [leaf.pooled for leaf in leaves if leaf.pooled is not None]
    return Leaf(torch.cat([leaf.rows for leaf in leaves]), torch.cat(pooled) if pooled else None)
