"""Few coordinates of inputs in one metric, for rows that come later."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._untuned import NOTHING
from .metrics import Fitted, Leaf, Metric

# Directions of the coordinates: with 64 of 1,024 rows' the squared error grows by 7 to 10 %, with
# 128 by less than 3 %. (measured once; no benchmark keeps it)
RANK = 96


class Coordinates:
    """Few coordinates of inputs in one metric, of mean square 1 on the rows that determine them."""

    def __init__(
        self, leaves: Sequence[Leaf], metric: Metric, fit: Fitted, place: slice = slice(None)
    ) -> None:
        self._place = place  # of the leaves that it measures on
        self._is_pooled = metric.features == "pooled"
        shrinkage = metric.shrinkage
        factor, offset = fit.map
        rows = self._features(leaves) * factor - offset
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        values = values[-RANK:].clamp(min=0)
        vectors = vectors[:, -RANK:]
        total = float(values.sum())
        if shrinkage < math.inf:  # sqrt(1 / (l + tau)) turns X' U into the metric's directions
            weights = (values + shrinkage * total).clamp(min=1e-300).rsqrt()
            vectors = vectors * torch.where(values > NOTHING * total, weights, 0.0)
        projection = rows.T @ vectors
        square = float((rows @ projection).square().sum(1).mean())
        projection *= square**-0.5 if square > 0 else 0.0
        self._map = factor[:, None] * projection
        self._shift = -offset @ projection

    def __call__(self, leaves: Sequence[Leaf]) -> Tensor:
        """Return coordinates ``[n, 96]``, or fewer if there are no more directions."""
        return torch.addmm(self._shift, self._features(leaves), self._map).float()

    def _features(self, leaves: Sequence[Leaf]) -> Tensor:
        leaves = leaves[self._place]
        rows = [x.rows if x.pooled is None or not self._is_pooled else x.pooled for x in leaves]
        return torch.cat(rows, 1).double()
