"""The metrics by which the rows of a batch may resemble each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import shown, sparing_logger
from .._torch import as_called, exactly
from .geometry import ROUNDINGS, Geometry, added_up, typical_rows
from .ordering import similarity_order

logger = sparing_logger("coded_torch.codes")

#: A map from the inputs, ``[B, ...]`` each, to tensors ``[B, ...]`` to measure distances on.
Features = Callable[..., Any]

# Features that vary less, relative to the overall spread, are rounding. In float32 a constant
# feature has 1e-7; it was not tuned.
_NOTHING = 1e-6
# Rows farther from the centre than so many times the root mean square estimate no others, as their
# results may be large. It was not tuned.
_FAR = 8
# The least step, in root mean squares of the rows' lengths: noisy copies of a few pictures would
# have so short a length that rounding decides. It was not tuned.
_SHORTEST = 0.01


@dataclasses.dataclass(frozen=True)
class Choice:
    """The way in which missing answers were estimated.

    Attributes:
        metric: the name of the metric.
        length: of the regression, in median steps of a path through the batch.
        error: the leave-one-out root mean squared error, relative to the mean's; or NaN.
        trust: how far estimates go away from the mean of the results, in [0, 1].
        output: which of the decoded outputs was estimated.
    """

    metric: str
    length: float
    error: float
    trust: float = 1.0
    output: int = 0


class Scaling(NamedTuple):
    """A map from a leaf to the features of a metric: their distances are measured."""

    size: float
    mean: Tensor  # [f], of the rows divided by the size
    spread: float  # the root mean square of their lengths; 0 if all rows are equal
    scale: Tensor  # [f], or a number
    pooled: bool = False

    def __call__(self, leaf: Leaf) -> Tensor:
        """Return features ``[n, f]``."""
        leaf = (self.pooled and leaf.pooled) or leaf
        return (leaf.rows / self.size - self.mean) * self.scale

    def of_fitted(self, leaf: Leaf) -> Tensor:
        """Return the features of the rows that determined the map."""
        leaf = (self.pooled and leaf.pooled) or leaf
        return (leaf.centred[0] * self.scale).float()


@dataclasses.dataclass(eq=False)
class Leaf:
    """The features of one input, on which distances are measured."""

    rows: Tensor  # [B, d], float32 or float64
    pooled: Leaf | None = None  # [B, 2 D]; the mean and the spread over T of [B, T, D]

    def at(self, rows: Tensor) -> Leaf:
        """Return some rows, in increasing order."""
        if len(rows) == len(self.rows):
            return self
        return Leaf(self.rows[rows], self.pooled and self.pooled.at(rows))

    @functools.cached_property
    def centred(self) -> tuple[Tensor, Scaling]:
        """The centred rows, and the map to centred rows of root mean square length 1."""
        x, size = self.rows, 1.0
        largest = max(map(abs, map(float, torch.aminmax(x)))) if x.numel() else 0.0
        if not 1e-8 < largest < 1e8:  # squares would overflow, or vanish
            size = max(largest, torch.finfo(x.dtype).tiny)
            x, largest = x / size, largest / size
        mean = x.mean(0)
        rows = x - mean
        spread = float(torch.linalg.vector_norm(rows)) / math.sqrt(max(len(x), 1))
        rounding = ROUNDINGS * torch.finfo(x.dtype).eps * math.sqrt(x.shape[1]) * largest
        scale = 1 / spread if spread > rounding else 0.0
        return rows, Scaling(size, mean, spread if scale else 0.0, torch.tensor(scale))


class Metric(NamedTuple):
    """A distance between inputs: the distance of their features.

    These are "rows", the input as it is; "spread", each feature divided by its spread, for features
    in different units, or seldom not 0; or "pooled", the mean and the spread over T of
    ``[B, T, D]``. The metric applies to at least ``rows_each`` rows for each feature.
    """

    features: str
    shrinkage: float
    rows_each: int = 0

    def fit(self, leaf: Leaf) -> Scaling | None:
        """Return the map to features of root mean square length 1, or None if none applies."""
        if self.features == "pooled":
            return None if leaf.pooled is None else leaf.pooled.centred[1]._replace(pooled=True)
        if self.features == "rows":
            return leaf.centred[1]
        size, num_features = leaf.rows.shape
        if min(size, num_features) < 2 or self.rows_each * num_features > size:
            return None
        rows, scaling = leaf.centred
        own = rows.square().mean(0).sqrt_().numpy()  # std takes 20 times as long
        vary = own > _NOTHING * scaling.spread / math.sqrt(num_features)
        scale = np.divide(1, own, out=np.zeros_like(own), where=vary)
        scale /= math.sqrt(max(int(vary.sum()), 1))
        return scaling._replace(scale=torch.from_numpy(scale))


DEFAULT = "shrunk"
#: The metrics that compete, by name; the first is the default, by which copies are planned. With
#: five, the error is at most 1.011 of thirteen's on every development case
#: (benchmarks/results/metrics.json). Against a shrinkage of 0, .01 had 26 % less squared error for
#: a LeNet-5 on MNIST, and 0 to 3 % for two other networks (measured once, for version 0.2).
METRICS = {
    DEFAULT: Metric("rows", 0.01),
    "covariance": Metric("rows", math.inf),
    "spread": Metric("spread", 0.0),
    # For tables, whose features seldom are as many as a quarter of the rows.
    "spread_covariance": Metric("spread", math.inf, rows_each=4),
    "mean_spread": Metric("pooled", 0.0),
}


def name_of(metric: str | Features) -> str:
    """Return the name of a metric or of a callable."""
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", None)
    return name or type(metric).__name__


def leaves_of(inputs: Sequence[Tensor]) -> list[Leaf]:
    """Bring the features of inputs to the host, in one copy."""
    found: list[list[Tensor]] = []
    for x in inputs:
        with torch.no_grad(), exactly(x.device.type):
            x = x.detach()
            found.append([added_up(x)])
            if x.dim() == 3 and min(x.shape[1:]) > 1:
                x = x.to(found[-1][0].dtype)
                found[-1].append(torch.cat([x.mean(1), x.std(1, correction=0)], 1))
    if any(x.device.type != "cpu" for x in inputs):
        several = [x.to(inputs[0].device) for both in found for x in both]
        host = iter(torch.cat(several, 1).cpu().split([x.shape[1] for x in several], 1))
        found = [[next(host) for _ in both] for both in found]
    return [Leaf(both[0], *map(Leaf, both[1:])) for both in found]


def transforms(metric: Metric, leaves: Sequence[Leaf]) -> list[Scaling] | None:
    """Return a map from each leaf to its features; None if the metric applies to no leaf."""
    found = [metric.fit(leaf) for leaf in leaves]
    if not any(found):
        return None
    return [one or leaf.centred[1] for one, leaf in zip(found, leaves, strict=True)]


class Sources:
    """The features of a batch, as given or of its inputs; callables make others, or a note."""

    def __init__(self, inputs: Sequence[Tensor], leaves: Sequence[Leaf] | None = None) -> None:
        self._inputs, self.notes, self._made = inputs, list[str](), dict[Features, list[Leaf]]()
        self.leaves = leaves_of(inputs) if leaves is None else leaves

    def of(self, metric: str | Features) -> Sequence[Leaf]:
        """Return a metric's features; none of a callable that fails. It runs once."""
        if isinstance(metric, str):
            return self.leaves
        if metric not in self._made:
            self._made[metric] = self.make(metric, self._inputs)
        return self._made[metric]

    def make(self, features: Features, inputs: Sequence[Tensor]) -> list[Leaf]:
        """Return the features that a callable makes of inputs; none and a note if it fails."""
        size = len(inputs[0])
        try:
            with torch.no_grad(), as_called():
                found = pytree.tree_leaves(features(*inputs))
            for x in found or [None]:
                if not isinstance(x, Tensor) or (x.is_floating_point(), *x.shape[:1]) != (1, size):
                    must = f"features must be floating-point, one for each of {size} rows"
                    raise ValueError(f"{must}, got {shown(getattr(x, 'shape', x))}")
        except Exception as error:  # a caller's function may raise anything; other metrics compete
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.notes.append(f"the metric {name_of(features)} was left out: {reason}")
            logger.warning("%s", self.notes[-1])
            return []
        return leaves_of(found)


class Measured(NamedTuple):
    """Some rows in one metric."""

    squared: Tensor  # [b, b], float32, the squared distances; infinite to rows not typical
    step: float  # the median distance between neighbours on the path
    unit: float  # the mean square of the rows' lengths


class Distances:
    """The distances between all or some rows of a batch, by every metric that may estimate them.

    Attributes:
        first: the metric that copies go by: the only one, or the default.
        usable: ``[b]``, bool: whether others are estimated from the results of the row.
        order: ``[b]``, a short path through the rows, in the first metric.
    """

    def __init__(
        self, sources: Sources, metrics: Sequence[str | Features], rows: Tensor | None = None
    ) -> None:
        rows = torch.arange(len(sources.leaves[0].rows)) if rows is None else rows
        self._sources, self._metrics, self._rows, self.first = sources, metrics, rows, DEFAULT
        typical = typical_rows([leaf.at(rows).rows for leaf in sources.leaves])
        self._odd = None if typical.all() else torch.from_numpy(~typical)
        self._geometries: dict[Any, Geometry | None] = {}
        self._measured: dict[Any, Measured] = {}
        if len(metrics) == 1 and isinstance(only := metrics[0], str):
            self.first = DEFAULT if self._geometry(only) is None else only
            if self.first != only:
                sources.notes.append(f"the metric {only!r} does not apply to these inputs")
        squared, unit = self._squared(self.first)
        geometry = self._geometry(self.first)
        assert geometry is not None
        self.usable = geometry.at(_how(self.first).shrinkage)[1] <= _FAR**2 * unit
        if self._odd is not None:
            self.usable &= ~self._odd
        # In its own memory, as new memory takes longer than both roots and squares.
        self.order = similarity_order(squared.sqrt_())
        squared.square_()
        self._place = self.order.numpy().argsort()
        step = path_step(squared, self.order.numpy(), unit)
        self._measured[self.first] = Measured(squared, step, unit)

    @functools.cached_property
    def competing(self) -> Sequence[str | Features]:
        """The metrics that apply, or the first; callables run only if a row is missing."""
        return [x for x in self._metrics if self._geometry(x) is not None] or [self.first]

    def prepare(self) -> None:
        """Compute the coordinates of every metric, while results are awaited."""
        for metric in self._metrics:
            if isinstance(metric, str) and (geometry := self._geometry(metric)) is not None:
                geometry.at(_how(metric).shrinkage)

    def by(self, metric: str | Features) -> Measured:
        """Return the distances in a metric that applies."""
        if metric not in self._measured:
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
        return squared, path_step(squared, self._place[some.numpy()].argsort(), unit)

    def _squared(self, metric: str | Features, some: Tensor | None = None) -> tuple[Tensor, float]:
        """Return the distances of all or some rows, and the mean square of the rows' lengths."""
        geometry = self._geometry(metric)
        assert geometry is not None
        squared, unit = geometry.squared_distances(_how(metric).shrinkage, some)
        if self._odd is not None:
            odd = self._odd if some is None else self._odd[some]
            squared.masked_fill_(odd | odd[:, None], math.inf).fill_diagonal_(0)
        return squared, unit

    def _geometry(self, metric: str | Features) -> Geometry | None:
        """Return the geometry of a metric's features, which metrics of the same features share.

        Rows that are not typical are at the centre there.
        """
        how = _how(metric)
        key = (how.features, how.rows_each) if isinstance(metric, str) else metric
        if key not in self._geometries:
            self._geometries[key] = None
            typical = self._rows if self._odd is None else self._rows[~self._odd]
            leaves = [leaf.at(typical) for leaf in self._sources.of(metric)]
            maps = transforms(how, leaves)
            if maps is None and leaves and not isinstance(metric, str):
                maps = transforms(METRICS[DEFAULT], leaves)  # a single feature has one unit
            if maps is not None:
                each = [x.of_fitted(leaf) for x, leaf in zip(maps, leaves, strict=True)]
                features = each[0] if len(each) == 1 else torch.cat(each, 1)
                if math.isfinite(float(features.sum())):
                    known = None if self._odd is None else (~self._odd).nonzero().flatten()
                    if known is not None:
                        zeros = features.new_zeros(len(self._rows), features.shape[1])
                        features = zeros.index_copy_(0, known, features)
                    self._geometries[key] = Geometry(features, known)
        return self._geometries[key]


def path_step(squared_distances: Tensor, path: npt.NDArray[np.int64], unit: float = 1.0) -> float:
    """Return the median distance between neighbours on a path; 1 if that says nothing."""
    steps = squared_distances.numpy()[path[:-1], path[1:]]
    steps = steps[(steps > 0) & (steps < math.inf)]
    if not steps.size:
        return 1.0
    middle = (steps.size - 1) // 2
    return max(math.sqrt(np.partition(steps, middle)[middle]), _SHORTEST * math.sqrt(unit))


def _how(metric: str | Features) -> Metric:
    """Return the metric of a name; of a callable's features, which may be in different units."""
    return METRICS[metric if isinstance(metric, str) else "spread"]
