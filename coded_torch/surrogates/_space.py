"""Few coordinates of inputs, in which a memory predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..input_space.distances import METRICS, Leaf, Metric, features_by
from ..input_space.geometry import Geometry, added_up
from ..input_space.ordering import Grouping
from ..input_space.points import Points
from ..input_space.selection import DEFAULT, LENGTH, Regressions

__all__ = ["RANK", "Space", "evenly", "side_by_side", "winner"]

RANK = 96
_LANDMARKS = 512  # rows that determine the coordinates, as in a Geometry
_NOTHING = 1e-6  # directions that hold less, relative to all, are rounding


class Space:
    """Coordinates of inputs, whose distances are those of a metric, frozen as rows determine it.

    Args:
        rows: ``[n, d]``, inputs side by side.
        shapes: of every input, without the batch.
        metric: a name; where it does not apply to the inputs, they are taken as they are.
    """

    def __init__(self, rows: Tensor, shapes: Sequence[torch.Size], metric: str = DEFAULT) -> None:
        lengths = rows.double().norm(dim=1)
        rows = rows[lengths <= 8 * lengths.quantile(0.9)]  # longer ones determine nothing
        rows = rows[evenly(len(rows), _LANDMARKS)]
        self._shapes = shapes
        self._how = how = METRICS[metric]
        if not _whole(rows, shapes) or features_by(how, _leaves(rows, shapes)) is None:
            self._how = how = METRICS[DEFAULT]
        features = [x.flatten(1).double() for x in _features(how, rows, shapes)]
        means = [x.mean(0) for x in features]
        # Several inputs count alike.
        spreads = [
            (x - m).square().sum(1).mean().sqrt() for x, m in zip(features, means, strict=True)
        ]
        scale = torch.cat(
            [
                torch.full_like(mean, 1 / float(spread) if spread > 0 else 0.0)
                for mean, spread in zip(means, spreads, strict=True)
            ]
        )
        centre = torch.cat(means)
        centred = torch.cat(features, 1) - centre
        scaled = centred * scale
        values, vectors = torch.linalg.eigh(scaled @ scaled.T)
        values, vectors = values[-RANK:].clamp(min=0), vectors[:, -RANK:]
        weights = _weights(values, how.shrinkage)
        projection = scale[:, None] * (scaled.T @ vectors) * weights
        square = float((centred @ projection).square().sum(1).mean())
        projection *= square**-0.5 if square > 0 else 0.0
        if how.linear and how.features is not METRICS[DEFAULT].features:
            # Of features that are linear, in the inputs themselves.
            maps = _maps(how, rows, shapes)
            parts = projection.split([len(mean) for mean in means])
            projection = torch.cat([a @ p for a, p in zip(maps, parts, strict=True)])
            centre = rows.double().mean(0)
            self._how = METRICS[DEFAULT]
        self._projection, self._centre = projection.float(), centre.float()

    def __call__(self, rows: Tensor) -> Tensor:
        """``[n, d]`` to ``[n, 96]``, or fewer where there are no more directions."""
        if not self._how.linear:
            rows = torch.cat([x.flatten(1) for x in _features(self._how, rows, self._shapes)], 1)
        z: Tensor = (rows - self._centre) @ self._projection
        return z

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The numbers that it holds."""
        return self._centre, self._projection

    def to(self, device: torch.device) -> Space:
        placed = object.__new__(Space)
        placed._how, placed._shapes = self._how, self._shapes
        placed._centre = self._centre.to(device)
        placed._projection = self._projection.to(device)
        return placed


def winner(rows: Tensor, outputs: Tensor, shapes: Sequence[torch.Size]) -> str:
    """The metric in which up to 512 rows predict each other's outputs best.

    Among the few rows of a batch another one wins: the more there are, the finer it is.

    Args:
        rows: ``[n, d]``, inputs side by side.
        outputs: ``[n, C]``.
        shapes: of every input, without the batch.
    """
    some = evenly(len(rows), _LANDMARKS)
    inputs = _inputs(rows[some], shapes) if _whole(rows, shapes) else [rows[some]]
    geometry = Geometry(inputs)
    grouping = Grouping.arrival(len(some), 1)
    batch = Points(tuple(METRICS), (LENGTH,), grouping, geometry)
    compared = Regressions(batch, batch.usable.nonzero().flatten(), _LANDMARKS)
    return compared.fit(outputs[some][batch.usable].double()).choice.metric


def side_by_side(inputs: Sequence[Tensor]) -> Tensor:
    """Features ``[n, d]``, float32, in memory of their own."""
    return torch.cat([added_up(x, torch.float32) for x in inputs], 1)


def evenly(size: int, most: int) -> Tensor:
    """At most so many of ``0 .. size - 1``, evenly spaced."""
    most = min(size, most)
    return torch.arange(most) * size // max(most, 1)


def _weights(values: Tensor, shrinkage: float) -> Tensor:
    r"""What makes of :math:`X^\top U` the directions :math:`V = X^\top U / \sqrt l` with weights.

    These are :math:`\sqrt{l / (l + \tau)}`, or :math:`\sqrt l` where the shrinkage is infinite.
    """
    if shrinkage == math.inf:
        return torch.ones_like(values)
    total = float(values.sum())
    known = values > _NOTHING * total
    return torch.where(known, (values + shrinkage * total).clamp(min=1e-300).rsqrt(), 0.0)


def _widths(shapes: Sequence[torch.Size]) -> list[int]:
    """The features that each input has side by side with others."""
    return [added_up(torch.empty(0, *shape), torch.float32).shape[1] for shape in shapes]


def _whole(rows: Tensor, shapes: Sequence[torch.Size]) -> bool:
    """Whether the rows are the inputs themselves, and not sums of many features."""
    return rows.shape[1] == sum(max(1, shape.numel()) for shape in shapes)


def _inputs(rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = rows.split(_widths(shapes), 1)
    return [x.reshape(len(x), *shape) for x, shape in zip(parts, shapes, strict=True)]


def _leaves(rows: Tensor, shapes: Sequence[torch.Size]) -> list[Leaf]:
    return [Leaf(x) for x in _inputs(rows, shapes)]


def _features(how: Metric, rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    if how.features is METRICS[DEFAULT].features:
        return list(rows.split(_widths(shapes), 1))
    features = features_by(how, _leaves(rows, shapes))
    assert features is not None  # it applies to the rows that determine the space
    return features


def _maps(how: Metric, rows: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The matrix ``[d, f]`` of each input's features, as the rows determine it."""
    maps = []
    for x in _inputs(rows, shapes):
        units = torch.eye(x[0].numel()).reshape(-1, *x.shape[1:])
        basis = torch.arange(len(x))
        images = [
            (features_by(how, [Leaf(torch.cat([x, some]), basis)]) or [torch.cat([x, some])])[0]
            for some in units.split(len(x))
        ]
        maps.append(torch.cat([image[len(x) :].flatten(1) for image in images]).double())
    return maps
