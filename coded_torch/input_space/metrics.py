"""The metrics by which the rows of a batch may resemble each other."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import ops
from .._arguments import shown, sparing_logger
from .._torch import as_called, exactly
from ..ops import squared_distances as squared_distances
from ..ops import typical_rows as typical_rows
from ._gradients import GradientMetric
from ._gradients import from_gradients as from_gradients
from ._gradients import from_outputs as from_outputs
from ._untuned import FAR

logger = sparing_logger("coded_torch.codes")

#: A map from the inputs, ``[B, ...]`` each, to tensors ``[B, ...]`` to measure distances on.
Features = Callable[..., Any]

# More features are added up in buckets, with random signs: Gram matrices of 150,528 take a seventh
# of the time on batches of 240 pictures (measured once; no benchmark keeps it). It is prime, as
# columns of a picture would share buckets.
_MOST_FEATURES = 8192
_BUCKETS = 2039


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


class Leaf(NamedTuple):
    """The features of one input, on which distances are measured."""

    rows: Tensor  # [B, d], float32 or float64
    pooled: Tensor | None = None  # [B, 2 D]; the mean and the spread over T of [B, T, D]

    def at(self, rows: Tensor) -> Leaf:
        """Return some rows."""
        return Leaf(self.rows[rows], None if self.pooled is None else self.pooled[rows])


class Metric(NamedTuple):
    r"""A distance between inputs: the distance of their features.

    These are "rows", the input as it is; "spread", each feature divided by its spread, for features
    in different units, or seldom not 0; or "pooled", the mean and the spread over T of
    ``[B, T, D]``. The metric applies to at least ``rows_each`` rows for each feature.

    For features :math:`X` of root mean square length 1, the inner products are, up to a factor,

    .. math:: X \, C \, (C + \tau I)^{-1} X^\top, \qquad
              C = X^\top X, \quad \tau = \text{shrinkage} \cdot \operatorname{tr} C.

    Shrinkage 0 is the Euclidean metric, ``math.inf`` the covariance's alone.
    """

    features: str
    shrinkage: float
    rows_each: int = 0


#: The distance of features as they are.
EUCLIDEAN = Metric("rows", 0.0)


class Fitted(NamedTuple):
    """A metric fitted to the rows of a batch."""

    coordinates: Tensor  # [n, L], float32, whose inner products it is
    map: Tensor  # [2, f], float64: inputs x have the features x * map[0] - map[1]
    unit: float  # the mean squared length of coordinates


def fitted(
    leaves: Sequence[Leaf], metrics: Sequence[Metric], typical: Tensor | None = None
) -> list[Fitted | None]:
    """Fit metrics to the ``typical`` rows, or all; None stands for one that does not apply."""
    each = [(x.rows, _NONE if x.pooled is None else x.pooled) for x in leaves]
    tensors = [[x.contiguous() for x in some] for some in zip(*each, strict=True)]
    kinds = [(_KINDS.index(kind), *how) for kind, *how in metrics]
    given = map(list, zip(*kinds, strict=True))
    *found, units = ops.fit_metrics(*tensors, typical, *given)
    fits = zip(found[::2], found[1::2], units.tolist(), strict=True)
    return [Fitted(*fit) if len(fit[0]) else None for fit in fits]


_NONE = torch.empty(0, 0, device="cpu")
_KINDS = ("rows", "spread", "pooled")
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


def added_up(x: Tensor) -> Tensor:
    """Return the features ``[B, d]``, at most 8,192, in float32 or float64."""
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if rows.shape[1] <= _MOST_FEATURES:
        return rows.to(dtype)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, rows.shape[1:], generator=generator, device="cpu")
    signs = signs.to(rows.device, dtype) * 2 - 1
    sums = rows.new_zeros(len(rows), _BUCKETS, dtype=dtype)
    for part, sign in zip(rows.split(_BUCKETS, 1), signs.split(_BUCKETS), strict=True):
        sums[:, : len(sign)].addcmul_(part.to(dtype), sign)  # one pass over the inputs, no copy
    return sums


def leaves_of(inputs: Sequence[Tensor]) -> list[Leaf]:
    """Bring the features of inputs to the host."""
    found = []
    for x in inputs:
        x = x.detach()
        with exactly(x.device.type):
            rows = added_up(x)
            pooled = None
            if x.dim() == 3 and min(x.shape[1:]) > 1:
                wide = x.to(rows.dtype)
                pooled = torch.cat([wide.mean(1), wide.std(1, correction=0)], 1).cpu()
            found.append(Leaf(rows.cpu(), pooled))
    return found


class Sources:
    """The features of a batch: ``leaves`` if given, else made from its inputs, and callables'."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Leaf] | None = None,
        made: Mapping[Features, list[Leaf]] | None = None,
    ) -> None:
        self._inputs = inputs
        self.notes = list[str]()
        self._made = dict[Features, list[Leaf]](made or {})
        if leaves is None:
            leaves = leaves_of(inputs)
        self.leaves = leaves

    def of(self, metric: Features) -> Sequence[Leaf]:
        """Return the features that a callable makes; none if it fails. It runs once."""
        if metric not in self._made:
            self._made[metric] = self.make(metric, self._inputs)
        return self._made[metric]

    def make(self, features: Features, inputs: Sequence[Tensor]) -> list[Leaf]:
        """Return the features that a callable makes of inputs; none and a note if it fails."""
        size = len(inputs[0])
        try:
            with torch.no_grad(), as_called():
                found = tree_leaves(features(*map(torch.clone, inputs)))
            for x in found or [None]:
                is_floating = isinstance(x, Tensor) and x.dtype.is_floating_point
                if not is_floating or x.shape[:1] != (size,):
                    requirement = f"features must be floating-point, one for each of {size} rows"
                    raise ValueError(f"{requirement}, got {shown(getattr(x, 'shape', x))}")
        except Exception as error:  # a caller's function may raise anything; other metrics compete
            self.leave_out(features, f"{type(error).__name__}: {error}".splitlines()[0])
            return []
        return leaves_of(found)

    def leave_out(self, metric: str | Features, reason: str) -> None:
        """Note why a metric does not compete."""
        self.notes.append(f"the metric {name_of(metric)} was left out: {reason}")
        logger.warning("%s", self.notes[-1])


class Distances:
    """The distances between all or some rows of a batch, by every metric that may estimate them.

    Attributes:
        rows: ``[b]``, the rows, in increasing order.
        measured: whether there are features to measure distances on.
        first: the metric that copies go by: the only one, or the default.
        far: ``[b]``, bool: the rows from whose results no others are estimated.
        order: ``[b]``, a short path through the rows, in the first metric.
        typical: ``[b]``, bool: the rows that determine metrics; None if all do.
        fits: the metrics that apply, fitted to the rows.
    """

    def __init__(
        self, sources: Sources, metrics: Sequence[str | Features], rows: Tensor | None = None
    ) -> None:
        if rows is None:
            rows = torch.arange(len(sources.leaves[0].rows))
        self.rows = rows
        self._sources = sources
        self._metrics = metrics
        self.first = DEFAULT
        self.measured = bool(sources.leaves)
        self.fits = dict[str | Features, Fitted]()
        if not self.measured:
            self.far = torch.zeros_like(self.rows).bool()
            self.order = torch.arange(len(self.rows))
            return
        leaves = self._own(sources.leaves)
        typical = typical_rows([leaf.rows.contiguous() for leaf in leaves])
        self.typical = None
        if not typical.all():
            self.typical = typical
        # While results are awaited: callables run only if a row is missing.
        names = dict.fromkeys([*(x for x in metrics if isinstance(x, str)), DEFAULT])
        found = fitted(leaves, [METRICS[name] for name in names], self.typical)
        for name, each in zip(names, found, strict=True):
            if each is not None:
                self.fits[name] = each
        if len(metrics) == 1 and isinstance(metrics[0], str):
            if metrics[0] in self.fits:
                self.first = metrics[0]
            else:
                sources.notes.append(f"the metric {metrics[0]!r} does not apply to these inputs")
        fit = self.fits[self.first]
        squared, squares, self.order, step = squared_distances(
            fit.coordinates, fit.unit, self.typical
        )
        self._measured: dict[str | Features, tuple[Tensor, float]] = {self.first: (squared, step)}
        self.far = squares > FAR**2 * fit.unit
        if self.typical is not None:
            self.far |= ~self.typical

    def _own(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        return [x if len(x.rows) == len(self.rows) else x.at(self.rows) for x in leaves]

    @functools.cached_property
    def competing(self) -> Sequence[str | Features]:
        """The metrics that apply, or the first."""
        for metric in self._metrics:
            leaves: Sequence[Leaf] = ()
            if not isinstance(metric, str):
                leaves = self._own(self._sources.of(metric))
            if not leaves:
                continue
            kinds = [EUCLIDEAN]
            if not isinstance(metric, GradientMetric):  # features may have several units
                kinds = [METRICS["spread"], EUCLIDEAN]
            for fit in fitted(leaves, kinds, self.typical):
                if fit is not None:
                    self.fits.setdefault(metric, fit)
            if metric not in self.fits:
                self._sources.leave_out(metric, "its features are not finite, or alike in all rows")
        return [x for x in self._metrics if x in self.fits] or [self.first]

    def path(self, metric: Features) -> Tensor:
        """Return a short path through the rows by a callable's features, or raise its error."""
        notes = self._sources.notes
        if metric in self.competing:
            fit = self.fits[metric]
            path: Tensor = squared_distances(fit.coordinates, fit.unit, self.typical)[2]
            return path
        if notes:
            raise ValueError(notes[-1])
        return self.order  # no row is finite

    def by(self, metric: str | Features) -> tuple[Tensor, float]:
        """Return the squared distances of all rows, in a metric that applies, and a step.

        Distances are ``[b, b]``, float32, and infinite to rows that are not typical. The step is
        the median distance between neighbours on the path.
        """
        if metric not in self._measured:
            fit = self.fits[metric]
            squared, _, _, step = squared_distances(
                fit.coordinates, fit.unit, self.typical, self.order
            )
            self._measured[metric] = squared, step
        return self._measured[metric]
