"""Metrics by which the inputs of a batch may resemble each other, and how well each predicts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import ops
from .._transforms import as_called, exactly
from .geometry import Geometry, added_up
from .ordering import similarity_order

__all__ = [
    "METRICS",
    "Choice",
    "Leaf",
    "Metric",
    "features_by",
    "name_of",
    "similarity_by",
    "squared_distances",
]

#: From the inputs, ``[B, ...]`` each, to the tensors that distances are measured on, likewise.
Features = Callable[..., Any]

# Of the overall spread, added to each feature's own: what varies less counts less.
_FLOOR = 0.01
# Features that vary less, relative to the overall spread, are rounding.
_NOTHING = 1e-6
_RIDGE = 1e-4  # of whitening, relative to the trace
_LONG_AXIS = 512
_TINY = 1e-30
_MOST = 1e8  # the largest length of inputs whose squares' squares are far from overflow


@dataclass(frozen=True)
class Choice:
    """How lost answers were predicted.

    Attributes:
        metric: the name of the metric.
        length: of the regression, in median distances between neighbours on the path.
        error: of predicting the results that arrived from each other, each left out in turn: root
            mean squared, relative to predicting them by the mean of the others. NaN where there
            are too few of them, or all are equal.
        trust: how far predictions by the distances were followed away from the mean of the results,
            in [0, 1]; 0 where they gain nothing against the mean, which is predicted then.
        output: which of the outputs was predicted, counting those that are decoded.
    """

    metric: str
    length: float
    error: float
    trust: float = 1.0
    output: int = 0


class Leaf:
    """One input of a batch, of moderate size, and which of its rows determine a metric.

    Args:
        x: ``[B, ...]``, floating-point.
        basis: the rows that determine what a metric takes from the batch; None: all.

    Attributes:
        x: the input in float32 at least, ``[B, ...]`` with a feature at least; scaled where its
            squares might overflow or vanish.
    """

    def __init__(self, x: Tensor, basis: Tensor | None = None) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.x = x if x.dim() > 1 else x[:, None]
        self._basis = basis
        some = self._rows()
        largest = float(some.abs().amax()) if some.numel() else 0.0
        if largest > 0 and not 1 / _MOST < largest < _MOST:
            self.x = self.x / largest

    def _rows(self) -> Tensor:
        rows = self.x.flatten(1)
        return rows if self._basis is None else rows[self._basis.to(rows.device)]

    @functools.cached_property
    def count(self) -> int:
        """How many rows determine a metric."""
        return len(self.x if self._basis is None else self._basis)

    @functools.cached_property
    def spread(self) -> Tensor:
        """The standard deviation of every feature."""
        rows = self._rows()
        return (rows - rows.mean(0)).square_().mean(0).sqrt_()

    def covariance(self, rows: Tensor) -> Tensor:
        """That of features ``[B, f]``."""
        return (rows if self._basis is None else rows[self._basis.to(rows.device)]).T.cov()


class Metric(NamedTuple):
    """How far two inputs are apart: the distance of their features.

    Attributes:
        features: from one input to its features ``[B, ...]``; None where it does not apply.
        shrinkage: of the geometry of the features.
        linear: whether features of mixtures are the mixtures of features.
    """

    features: Callable[[Leaf], Tensor | None]
    shrinkage: float = 0.0
    linear: bool = True


def _as_it_is(leaf: Leaf) -> Tensor:
    return leaf.x


def _by_spread(leaf: Leaf, floor: float = _FLOOR, least: float = 0.0) -> Tensor | None:
    rows = leaf.x.flatten(1)
    if rows.shape[1] < 2 or leaf.count < 2:
        return None
    own = leaf.spread
    overall = float(own.square().mean()) ** 0.5
    return rows * torch.where(own > least * overall, 1 / (own + floor * overall), 0)


def _by_every_spread(leaf: Leaf) -> Tensor | None:
    return _by_spread(leaf, floor=0.0, least=_NOTHING)


def _by_every_spread_of_few(leaf: Leaf) -> Tensor | None:
    """The same for tables, whose features seldom are as many as a quarter of the rows."""
    return None if 4 * leaf.x[0].numel() > leaf.count else _by_every_spread(leaf)


def _whitened(leaf: Leaf) -> Tensor | None:
    rows = _by_every_spread_of_few(leaf)
    if rows is None:
        return None
    covariance = leaf.covariance(rows)
    covariance.diagonal().add_(_RIDGE * covariance.trace())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    columns: Tensor = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    return columns.T


def _mean(leaf: Leaf) -> Tensor | None:
    return leaf.x.mean(1) if leaf.x.dim() == 3 and min(leaf.x.shape[1:]) > 1 else None


def _mean_and_spread(leaf: Leaf) -> Tensor | None:
    mean = _mean(leaf)
    return None if mean is None else torch.cat([mean, leaf.x.std(1, correction=0)], 1)


def _grey(leaf: Leaf) -> Tensor | None:
    return leaf.x.mean(1) if leaf.x.dim() == 4 and leaf.x.shape[1] > 1 else None


def _colour(leaf: Leaf) -> Tensor | None:
    return leaf.x.mean((2, 3)) if leaf.x.dim() == 4 and leaf.x.shape[1] > 1 else None


def _spectrum(leaf: Leaf) -> Tensor | None:
    sizes = [size for size in leaf.x.shape[1:] if size > 1]
    if len(sizes) != 1 or sizes[0] < _LONG_AXIS:
        return None
    magnitudes = torch.fft.rfft(leaf.x.flatten(1)).abs()
    # Relative to the row's own mean: rows that are not finite do not touch others.
    floor = 1e-3 * magnitudes.mean(1, keepdim=True)
    logarithms: Tensor = magnitudes.add_(floor).clamp_(min=_TINY).log_()
    return logarithms


#: The metrics that compete, by name; the first is that by which copies are planned.
METRICS: MappingProxyType[str, Metric] = MappingProxyType(
    {
        "shrunk": Metric(_as_it_is, 0.01),
        "euclidean": Metric(_as_it_is),
        "covariance": Metric(_as_it_is, math.inf),
        "spread": Metric(_by_spread),
        "spread_all": Metric(_by_every_spread),
        "spread_shrunk": Metric(_by_every_spread_of_few, 0.01),
        "spread_covariance": Metric(_by_every_spread_of_few, math.inf),
        "whitened": Metric(_whitened),
        "mean": Metric(_mean),
        "mean_spread": Metric(_mean_and_spread, linear=False),
        "grey": Metric(_grey),
        "colour": Metric(_colour),
        "spectrum": Metric(_spectrum, linear=False),
    }
)


def name_of(metric: str | Features) -> str:
    """The name of a metric, or of what makes features."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "__name__", type(metric).__name__))


def features_by(metric: Metric, leaves: Sequence[Leaf]) -> list[Tensor] | None:
    """What a metric measures distances on, for each input; those it does not apply to as they are.

    Returns:
        None where it applies to none of the inputs.
    """
    with exactly(leaves[0].x.device.type):
        found = [metric.features(leaf) for leaf in leaves]
    if all(x is None for x in found):
        return None
    return [leaf.x if x is None else x for leaf, x in zip(leaves, found, strict=True)]


def features_of(features: Features, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a callable makes of the inputs, ``[B, ...]`` each.

    Raises:
        ValueError: it returns no floating-point tensors of that batch size. And what it raises.
    """
    with torch.no_grad(), as_called():
        leaves = pytree.tree_leaves(features(*inputs))
    size = len(inputs[0])
    for leaf in leaves or [None]:
        if not (
            isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (size,)
        ):
            got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"{leaf!r}"
            raise ValueError(
                f"features must be floating-point, one for each of {size} rows, got {got}"
            )
    return leaves


def inner_products(features: Sequence[Tensor]) -> Tensor:
    """Inner products ``[n, n]`` of few rows, each tensor centred and of unit spread."""
    products: Tensor | float = 0.0
    for x in features:
        rows = added_up(x, torch.promote_types(x.dtype, torch.float32))
        rows = (rows - rows.mean(0)).contiguous()
        square = rows.square().sum()
        products = products + ops.inner_products(rows) / torch.where(square > 0, square, 1)
    assert isinstance(products, Tensor)
    return products.cpu()


@exactly()
def squared_distances(products: Tensor, shrinkage: float) -> Tensor:
    """Squared distances ``[n, n]`` from inner products, in the metric of a geometry.

    Cheaper and less exact: for comparing metrics on few rows.
    """
    if shrinkage == math.inf:
        products = products @ products
    elif shrinkage > 0:
        system = products.clone()
        system.diagonal().add_(shrinkage * float(products.trace()))
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed:
            half = torch.linalg.solve_triangular(factor, products, upper=False)
            products = half.T @ half
    squares = products.diagonal()
    distances = torch.sub(squares[:, None] + squares, products, alpha=2)
    return distances.clamp_(min=0).fill_diagonal_(0)


def similarity_by(features: Features) -> Callable[[list[Tensor]], Tensor]:
    """An ordering of batches, for any code: neighbours resemble each other in their features.

    Args:
        features: called without gradients with the floating-point inputs that are coded, each
            ``[B, ...]``; returns the tensors that distances are measured on, likewise. Typically
            the module's own first layer or embedding, pooled.

    Example:
        >>> import torch
        >>> from coded_torch.input_space.distances import similarity_by
        >>> order = similarity_by(lambda x: x.abs())
        >>> order([torch.tensor([[3.0], [-2.9], [0.0], [0.2]])])
        tensor([2, 3, 1, 0])
    """

    def order(inputs: list[Tensor]) -> Tensor:
        return similarity_order(Geometry(features_of(features, inputs)).distances())

    return order
