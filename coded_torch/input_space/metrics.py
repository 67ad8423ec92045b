"""The metrics by which the rows of a batch may resemble each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import sparing_logger
from .._torch import as_called, exactly
from .geometry import Centred, Geometry, added_up, typical_rows
from .ordering import similarity_order

__all__ = ["DEFAULT", "METRICS", "Choice", "Distances", "Features", "Leaf", "Metric"]
__all__ += ["Scaling", "Sources", "leaves_of", "made_by", "name_of", "path_step"]
__all__ += ["transforms"]

logger = sparing_logger("coded_torch.codes")

#: A map from the inputs, ``[B, ...]`` each, to tensors ``[B, ...]`` to measure distances on.
Features = Callable[..., Any]

# Features that vary less, relative to the overall spread, are rounding. In float32 a constant
# feature has 1e-7; it was not tuned.
_NOTHING = 1e-6
# Rows farther from the centre than so many times the root mean square predict no others, as their
# results may be large. It was not tuned.
_FAR = 8
# The least step, in root mean squares of the rows' lengths: noisy copies of a few pictures would
# have so short a length that rounding decides. It was not tuned.
_SHORTEST = 0.01


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way in which missing answers were predicted.

    Attributes:
        metric: the name of the metric.
        length: of the regression, in median distances between neighbours on a path through the
            batch.
        error: the leave-one-out root mean squared error, relative to predicting the mean of the
            others. NaN if there are too few results, or all are equal.
        trust: how far predictions go away from the mean of the results, in [0, 1].
        output: which of the decoded outputs was predicted.
    """

    metric: str
    length: float
    error: float
    trust: float = 1.0
    output: int = 0


@dataclasses.dataclass(eq=False)
class Leaf:
    """The features of one input, on which distances are measured."""

    rows: Tensor  # [B, d], float32 or float64
    pooled: Tensor | None = None  # [B, 2 D], of [B, T, D] the mean and the spread over T; else None

    def at(self, rows: Tensor) -> Leaf:
        """Return some rows, in increasing order."""
        if len(rows) == len(self.rows):
            return self
        return Leaf(self.rows[rows], None if self.pooled is None else self.pooled[rows])

    @functools.cached_property
    def centred(self) -> Centred:
        return Centred.of(self.rows)

    @functools.cached_property
    def centred_pooled(self) -> Centred | None:
        return None if self.pooled is None else Centred.of(self.pooled)


class Scaling(NamedTuple):
    """A map from a leaf to the features of a metric: their distances are measured."""

    pooled: bool
    size: float
    mean: Tensor  # [f]
    scale: Tensor  # [f], or a number

    def __call__(self, leaf: Leaf) -> Tensor:
        """Return features ``[n, f]``."""
        rows = leaf.pooled if self.pooled else leaf.rows
        assert rows is not None
        return (rows / self.size - self.mean) * self.scale

    def of_fitted(self, leaf: Leaf) -> Tensor:
        """Return the features of the rows that determined the map."""
        centred = leaf.centred_pooled if self.pooled else leaf.centred
        assert centred is not None
        return (centred.rows * self.scale).float()


class Metric(NamedTuple):
    """A distance between inputs: the distance of their features.

    ``features`` are "rows", the input as it is; "spread", each feature divided by its spread, for
    features in different units, or seldom not 0; or "pooled", the mean and the spread over T of
    ``[B, T, D]``. The metric applies to at least ``rows_each`` rows for each feature.
    """

    features: str
    shrinkage: float
    rows_each: int = 0

    def fit(self, leaf: Leaf) -> Scaling | None:
        """Return the map to features of root mean square length 1, or None if none applies."""
        if self.features == "pooled":
            return None if leaf.centred_pooled is None else _scaling(leaf.centred_pooled, True)
        if self.features == "rows":
            return _scaling(leaf.centred)
        (size, num_features), centred = leaf.rows.shape, leaf.centred
        if min(size, num_features) < 2 or self.rows_each * num_features > size:
            return None
        own = centred.rows.square().mean(0).sqrt_().numpy()  # std takes 20 times as long
        vary = own > _NOTHING * centred.spread / math.sqrt(num_features)
        scale = np.divide(1, own, out=np.zeros_like(own), where=vary)
        scale /= math.sqrt(max(int(vary.sum()), 1))
        return _scaling(centred)._replace(scale=torch.from_numpy(scale))


def _scaling(centred: Centred, pooled: bool = False) -> Scaling:
    scale = 1 / centred.spread if centred.spread > 0 else centred.spread
    return Scaling(pooled, centred.size, centred.mean, torch.tensor(scale))


DEFAULT = "shrunk"
#: The metrics that compete, by name; the first is the default, by which copies are planned. With
#: five, the error is at most 1.011 of thirteen's on every development case
#: (benchmarks/results/metrics.json). Against a shrinkage of 0, .01 had 26 % less squared error for
#: a LeNet-5 on MNIST, and 0 to 3 % for two other networks (measured once, for version 0.2).
METRICS: MappingProxyType[str, Metric] = MappingProxyType(
    {
        DEFAULT: Metric("rows", 0.01),
        "covariance": Metric("rows", math.inf),
        "spread": Metric("spread", 0.0),
        # For tables, whose features seldom are as many as a quarter of the rows.
        "spread_covariance": Metric("spread", math.inf, rows_each=4),
        "mean_spread": Metric("pooled", 0.0),
    }
)


def name_of(metric: str | Features) -> str:
    """Return the name of a metric or of a callable."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", type(metric).__name__))


def leaves_of(inputs: Sequence[Tensor]) -> list[Leaf]:
    """Bring the features of inputs to the host, in one copy."""
    parts: list[Tensor] = []
    pools: list[Tensor | None] = []
    with torch.no_grad(), exactly(inputs[0].device.type):
        for x in inputs:
            x = x.detach()
            parts.append(added_up(x))
            pools.append(None)
            if x.dim() == 3 and min(x.shape[1:]) > 1:
                x = x.to(parts[-1].dtype)
                pools[-1] = torch.cat([x.mean(1), x.std(1, correction=0)], 1)
        if any(x.device.type != "cpu" for x in inputs):
            several = [x.to(inputs[0].device) for x in (*parts, *pools) if x is not None]
            widths = [x.shape[1] for x in several]
            host = iter(torch.cat(several, 1).cpu().split(widths, 1))
            parts = [next(host) for _ in parts]
            pools = [None if x is None else next(host) for x in pools]
    return [Leaf(*both) for both in zip(parts, pools, strict=True)]


def transforms(metric: Metric, leaves: Sequence[Leaf]) -> list[Scaling] | None:
    """Return a map from each leaf to its features; None if the metric applies to no leaf."""
    found = [metric.fit(leaf) for leaf in leaves]
    if not any(found):
        return None
    return [one or _scaling(leaf.centred) for one, leaf in zip(found, leaves, strict=True)]


def made_by(features: Features, inputs: Sequence[Tensor]) -> tuple[list[Tensor] | None, str]:
    """Return a callable's tensors, ``[B, ...]`` each; or None and the reason."""
    size = len(inputs[0])
    try:
        with torch.no_grad(), as_called():
            leaves = pytree.tree_leaves(features(*inputs))
        for leaf in leaves or [None]:
            shape = leaf.shape if isinstance(leaf, Tensor) and leaf.is_floating_point() else ()
            if shape[:1] != (size,):
                got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"{leaf!r}"
                must = f"features must be floating-point, one for each of {size} rows"
                raise ValueError(f"{must}, got {got}")
    except Exception as error:  # a caller's function may raise anything; other metrics compete
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        note = f"the metric {name_of(features)} was left out: {reason}"
        logger.warning("%s", note)
        return None, note
    return leaves, ""


class Sources:
    """The features of the rows of a batch, for every metric; callables make them of the inputs.

    Attributes:
        leaves: as given. Defaults to :func:`leaves_of` the inputs.
        notes: which metrics could not be had, and why.
    """

    def __init__(self, inputs: Sequence[Tensor], leaves: Sequence[Leaf] | None = None) -> None:
        self._inputs = inputs
        self.leaves = leaves_of(inputs) if leaves is None else list(leaves)
        self.notes: list[str] = []
        self._made: dict[Features, list[Leaf] | None] = {}

    def of(self, metric: str | Features) -> list[Leaf] | None:
        """Return a metric's features; None for a callable that fails. It runs once."""
        if isinstance(metric, str):
            return self.leaves
        if metric not in self._made:
            made, note = made_by(metric, self._inputs)
            self._made[metric] = None if made is None else leaves_of(made)
            self.note(note)
        return self._made[metric]

    def note(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)


class Measured(NamedTuple):
    """Some rows in one metric."""

    squared: Tensor  # [b, b], float32, the squared distances; infinite to rows not typical
    step: float  # the median distance between neighbours on the path
    unit: float  # the mean square of the rows' lengths


class Distances:
    """The distances between some rows of a batch, by every metric that may predict them.

    Attributes:
        sources, metrics: the features of the batch, and at least one name or callable.
        rows: ``[b]``, the rows of the batch. Defaults to all.
        first: the metric that copies go by: the only one, or the default.
        usable: ``[b]``, bool: whether others are predicted from the results of the row.
        order: ``[b]``, a short path through the rows, in the first metric.
    """

    def __init__(
        self,
        sources: Sources,
        metrics: Sequence[str | Features],
        rows: Tensor | None = None,
    ) -> None:
        rows = torch.arange(len(sources.leaves[0].rows)) if rows is None else rows
        self.sources, self.metrics, self.rows = sources, metrics, rows
        typical = typical_rows([leaf.at(rows).rows for leaf in sources.leaves])
        self._typical = None if typical.all() else torch.from_numpy(typical)
        self._typical_rows = rows if self._typical is None else rows[self._typical]
        self._geometries: dict[Any, Geometry | None] = {}
        self._measured: dict[Any, Measured] = {}
        self.first = DEFAULT
        if len(metrics) == 1 and isinstance(metrics[0], str):
            if self.has(metrics[0]):
                self.first = metrics[0]
            else:
                sources.note(f"the metric {metrics[0]!r} does not apply to these inputs")
        squared, unit = self._squared(self.first)
        geometry = self._geometry(self.first)
        assert geometry is not None
        near = geometry.squared_lengths(_how(self.first).shrinkage) <= _FAR**2 * unit
        self.usable = near
        if self._typical is not None:
            self.usable = self._typical.clone()
            self.usable[self._typical] = near
        # In its own memory, as new memory takes longer than both roots and squares.
        self.order = similarity_order(squared.sqrt_())
        squared.square_()
        step = path_step(squared, self.order.numpy(), unit)
        self._measured[self.first] = Measured(squared, step, unit)

    def has(self, metric: str | Features) -> bool:
        """Return whether a metric applies."""
        return self._geometry(metric) is not None

    def prepare(self) -> None:
        """Compute the coordinates of every metric, while results are awaited."""
        for metric in self.metrics:  # callables run only if a row is missing
            if isinstance(metric, str) and (geometry := self._geometry(metric)) is not None:
                geometry.squared_lengths(_how(metric).shrinkage)

    def by(self, metric: str | Features) -> Measured:
        """Return the distances in a metric; in the first, if it does not apply."""
        if metric not in self._measured:
            if not self.has(metric):
                return self._measured[self.first]
            squared, unit = self._squared(metric)
            step = path_step(squared, self.order.numpy(), unit)
            self._measured[metric] = Measured(squared, step, unit)
        return self._measured[metric]

    def among(self, metric: str | Features, some: Tensor) -> tuple[Tensor, float]:
        """Return the squared distances among some rows, ``[m, m]``, and their step."""
        if metric in self._measured:
            squared, _, unit = self._measured[metric]
            squared = squared.index_select(0, some).index_select(1, some)
        else:
            squared, unit = self._squared(metric, some)
        place = np.full(len(self.order), -1)
        place[some.numpy()] = np.arange(len(some))
        path = place[self.order.numpy()]
        return squared, path_step(squared, path[path >= 0], unit)

    def _squared(self, metric: str | Features, some: Tensor | None = None) -> tuple[Tensor, float]:
        """Return the distances of all or some rows, and the mean square of the rows' lengths."""
        geometry, shrinkage = self._geometry(metric), _how(metric).shrinkage
        assert geometry is not None
        typical = self._typical
        if typical is None:
            return geometry.squared_distances(shrinkage, some)
        if some is not None:
            place, typical = typical.cumsum(0) - 1, typical[some]
            some = place[some[typical]]
        among, unit = geometry.squared_distances(shrinkage, some)
        squared = among.new_full((len(typical), len(typical)), math.inf)
        squared[typical[:, None] & typical] = among.flatten()
        return squared.fill_diagonal_(0), unit

    def _geometry(self, metric: str | Features) -> Geometry | None:
        """Return the geometry of a metric's features, which metrics of the same features share."""
        how = _how(metric)
        key = (how.features, how.rows_each) if isinstance(metric, str) else metric
        if key not in self._geometries:
            self._geometries[key] = None
            leaves = [leaf.at(self._typical_rows) for leaf in self.sources.of(metric) or ()]
            maps = transforms(how, leaves) if leaves else None
            if maps is None and not isinstance(metric, str):  # a single feature has one unit
                maps = transforms(METRICS[DEFAULT], leaves)
            if maps is not None:
                features = [x.of_fitted(leaf) for x, leaf in zip(maps, leaves, strict=True)]
                if all(math.isfinite(float(x.sum())) for x in features):
                    self._geometries[key] = Geometry(
                        features[0] if len(features) == 1 else torch.cat(features, 1)
                    )
        return self._geometries[key]


def path_step(squared_distances: Tensor, path: npt.NDArray[np.int64], unit: float = 1.0) -> float:
    """Return the median distance between neighbours on a path; 1 if that says nothing.

    ``unit`` is the mean square of the rows' lengths.
    """
    steps = squared_distances.numpy()[path[:-1], path[1:]]
    steps = steps[(steps > 0) & (steps < math.inf)]
    if not steps.size:
        return 1.0
    middle = (steps.size - 1) // 2
    return max(math.sqrt(np.partition(steps, middle)[middle]), _SHORTEST * math.sqrt(unit))


def _how(metric: str | Features) -> Metric:
    """Return the metric of a name; of a callable's features, which may be in different units."""
    return METRICS[metric if isinstance(metric, str) else "spread"]
