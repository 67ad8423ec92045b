"""The metrics by which the rows of a batch may resemble each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import sparing_logger
from .._torch import as_called, exactly
from .geometry import Geometry, added_up, typical_rows
from .ordering import similarity_order

__all__ = ["DEFAULT", "METRICS", "Choice", "Distances", "Features", "Leaf", "Metric", "Sources"]
__all__ += ["key_of", "leaves_of", "made_by", "name_of", "path_step", "transforms"]

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


@dataclass(frozen=True)
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


class Leaf(NamedTuple):
    """The features of one input, on which distances are measured."""

    rows: Tensor  # [B, d], float32 or float64
    pooled: Tensor | None  # [B, 2 D], of [B, T, D] the mean and the spread over T; else None

    def at(self, rows: Tensor) -> Leaf:
        """Return some rows, in increasing order."""
        if len(rows) == len(self.rows):
            return self
        return Leaf(self.rows[rows], None if self.pooled is None else self.pooled[rows])


class Metric(NamedTuple):
    """A distance between inputs: the distance of their features.

    ``fit`` maps rows to a map from a leaf to features ``[n, f]``, or to None if the metric does not
    apply. ``shrinkage`` is an argument of the :class:`~coded_torch.input_space.geometry.Geometry`.
    """

    fit: Callable[[Leaf], Callable[[Leaf], Tensor] | None]
    shrinkage: float


def _rows(leaf: Leaf) -> Tensor:
    return leaf.rows


def _whole(_: Leaf) -> Callable[[Leaf], Tensor]:
    return _rows


def _by_spread(leaf: Leaf) -> Callable[[Leaf], Tensor] | None:
    """Divide every feature by its spread: for features in different units, or seldom not 0."""
    rows = leaf.rows
    if rows.shape[1] < 2 or len(rows) < 2:
        return None
    largest = rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)  # squares may overflow
    centred = (rows - rows.mean(0)).div_(largest)
    own = centred.square_().mean(0).sqrt_()  # std takes 20 times as long
    least = _NOTHING * own.square().mean().sqrt()
    scale = torch.where(own > least, 1 / own, 0.0) / largest
    return lambda leaf: leaf.rows * scale


def _by_spread_of_few(leaf: Leaf) -> Callable[[Leaf], Tensor] | None:
    """Do the same for tables, whose features seldom are as many as a quarter of the rows."""
    return None if 4 * leaf.rows.shape[1] > len(leaf.rows) else _by_spread(leaf)


def _pooled(leaf: Leaf) -> Callable[[Leaf], Any] | None:
    return None if leaf.pooled is None else lambda leaf: leaf.pooled


DEFAULT = "shrunk"
#: The metrics that compete, by name; the first is the default, by which copies are planned. With
#: five, the error is at most 1.011 of thirteen's on every development case
#: (benchmarks/results/metrics.json). A shrinkage of .01 has 26 % less squared error than 0 for a
#: LeNet-5 on MNIST, 3 % for a RepVGG and 0 for a transformer on Fashion-MNIST.
#: (benchmarks accuracy)
METRICS: MappingProxyType[str, Metric] = MappingProxyType(
    {
        DEFAULT: Metric(_whole, 0.01),
        "covariance": Metric(_whole, math.inf),
        "spread": Metric(_by_spread, 0.0),
        "spread_covariance": Metric(_by_spread_of_few, math.inf),
        "mean_spread": Metric(_pooled, 0.0),
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
        if inputs[0].device.type != "cpu":
            several = [x for x in (*parts, *pools) if x is not None]
            widths = [x.shape[1] for x in several]
            host = iter(torch.cat(several, 1).cpu().split(widths, 1))
            parts = [next(host) for _ in parts]
            pools = [None if x is None else next(host) for x in pools]
    return [Leaf(*both) for both in zip(parts, pools, strict=True)]


def transforms(metric: Metric, leaves: Sequence[Leaf]) -> list[Callable[[Leaf], Tensor]] | None:
    """Return a map from each leaf to its features; None if the metric applies to no leaf."""
    found = [metric.fit(leaf) for leaf in leaves]
    return [one or _rows for one in found] if any(found) else None


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
    """The features of the rows of a batch, for every metric.

    Args:
        inputs: ``[B, ...]`` each, of which callables make features.
        leaves: of the inputs. Defaults to :func:`leaves_of` them.

    Attributes:
        leaves: as given.
        notes: which metrics could not be had, and why.
    """

    def __init__(self, inputs: Sequence[Tensor], leaves: Sequence[Leaf] | None = None) -> None:
        self._inputs = inputs
        self.leaves = leaves_of(inputs) if leaves is None else list(leaves)
        self.notes: list[str] = []
        self._made: dict[int, list[Leaf] | None] = {}

    def of(self, metric: str | Features) -> list[Leaf] | None:
        """Return a metric's features; None for a callable that fails. It runs once."""
        if isinstance(metric, str):
            return self.leaves
        if id(metric) not in self._made:
            made, note = made_by(metric, self._inputs)
            self._made[id(metric)] = None if made is None else leaves_of(made)
            self.note(note)
        return self._made[id(metric)]

    def note(self, note: str) -> None:
        if note and note not in self.notes:
            self.notes.append(note)


class Measured(NamedTuple):
    """Some rows in one metric."""

    squared: Tensor  # [b, b], float32, the squared distances; infinite to rows not typical
    step: float  # the median distance between neighbours on the path


class Distances:
    """The distances between some rows of a batch, by every metric that may predict them.

    Args:
        sources: of the batch.
        metrics: names and callables, at least one.
        rows: ``[b]``, the rows of the batch. Defaults to all.

    Attributes:
        sources, metrics, rows: as given.
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
        self._typical = typical_rows([leaf.at(rows).rows for leaf in sources.leaves])
        self._geometries: dict[Any, Geometry | None] = {}
        self._measured: dict[Any, Measured] = {}
        self.first = DEFAULT
        if len(metrics) == 1 and isinstance(metrics[0], str):
            if self.has(metrics[0]):
                self.first = metrics[0]
            else:
                sources.note(f"the metric {metrics[0]!r} does not apply to these inputs")
        squared, squares = self._squared(self.first)
        self.usable = self._typical.clone()
        self.usable[self._typical] = squares <= _FAR**2
        self.order = similarity_order(squared.sqrt())
        self._measured[self.first] = Measured(squared, path_step(squared, self.order))

    def has(self, metric: str | Features) -> bool:
        """Return whether a metric applies."""
        return self._geometry(metric) is not None

    def by(self, metric: str | Features) -> Measured:
        """Return the distances in a metric; in the first, if it does not apply."""
        key = key_of(metric)
        if key not in self._measured:
            if not self.has(metric):
                return self._measured[self.first]
            squared, _ = self._squared(metric)
            self._measured[key] = Measured(squared, path_step(squared, self.order))
        return self._measured[key]

    def among(self, metric: str | Features, some: Tensor) -> Tensor:
        """Return the squared distances among some of the rows, ``[m, m]``."""
        key = key_of(metric)
        if key in self._measured:
            return self._measured[key].squared.index_select(0, some).index_select(1, some)
        return self._squared(metric, some)[0]

    def _squared(self, metric: str | Features, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the distances of all or some rows, and the squared lengths of typical rows."""
        geometry = self._geometry(metric)
        assert geometry is not None
        typical = self._typical
        if some is not None:
            place, typical = typical.cumsum(0) - 1, typical[some]
            some = place[some[typical]]
        squared, squares = geometry.squared_distances(_how(metric).shrinkage, some)
        size = len(typical)
        if len(squared) < size:
            among, squared = squared, squared.new_full((size, size), math.inf)
            squared[typical[:, None] & typical] = among.flatten()
            squared.fill_diagonal_(0)
        return squared, squares

    def _geometry(self, metric: str | Features) -> Geometry | None:
        """Return the geometry of a metric's features, which metrics of the same features share."""
        how = _how(metric)
        key = how.fit if isinstance(metric, str) else id(metric)
        if key not in self._geometries:
            self._geometries[key] = None
            leaves = self.sources.of(metric)
            typical = [leaf.at(self.rows[self._typical]) for leaf in leaves or ()]
            maps = transforms(how, typical) if typical else None
            if maps is None and typical and not isinstance(metric, str):
                maps = [_rows] * len(typical)  # a single feature has one unit
            if maps is not None:
                features = [each(leaf) for each, leaf in zip(maps, typical, strict=True)]
                if all(math.isfinite(float(x.sum())) for x in features):
                    self._geometries[key] = Geometry(features)
        return self._geometries[key]


def path_step(squared_distances: Tensor, order: Tensor) -> float:
    """Return the median distance between neighbours on a path; 1 if that says nothing."""
    path = order.numpy()
    steps = squared_distances.numpy()[path[:-1], path[1:]]
    steps = steps[(steps > 0) & (steps < math.inf)]
    if not steps.size:
        return 1.0
    middle = (steps.size - 1) // 2
    return max(math.sqrt(np.partition(steps, middle)[middle]), _SHORTEST)


def key_of(metric: str | Features) -> str | int:
    """Return the key of a metric in dictionaries."""
    return metric if isinstance(metric, str) else id(metric)


def _how(metric: str | Features) -> Metric:
    """Return the metric of a name; of a callable's features, which may be in different units."""
    return METRICS[metric if isinstance(metric, str) else "spread"]
