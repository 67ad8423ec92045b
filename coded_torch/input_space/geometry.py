"""The distances between the rows of a batch, in a metric fitted to the batch itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._torch import exactly, on_host
from ..ops import inner_products, squared_distances

# More features are added up in buckets, with random signs: Gram matrices of 150,528 take a seventh
# of the time on batches of 240 pictures (measured once; no benchmark keeps it). It is prime, as
# columns of a picture would share buckets.
_MOST_FEATURES = 8192
_BUCKETS = 2039
# The rows that determine the covariance: a quarter of the batch, within these limits. Of 1,000 rows
# 256 estimate as well as 512; of 3,000 they had 1 % more error (tasks of benchmarks/tasks.py).
_LANDMARKS = 256, 512
#: Distances that so many roundings of float32 may cause are 0: a margin for sums of some thousand
# terms; it was not tuned.
ROUNDINGS = 128
# Rows so many times as long as nine tenths of them do not determine the metric, and say nothing of
# the others. Rows of one scale seldom differ by more; it was not tuned.
_LONG = 8


class Geometry:
    r"""The inner products and distances of rows, in a metric fitted to these rows.

    For centred rows :math:`X` of root mean square length 1, the inner products are

    .. math:: M = X \, C \, (C + \tau I)^{-1} X^\top, \qquad
              C = X^\top X, \quad \tau = \text{shrinkage} \cdot \operatorname{tr} C,

    up to a factor. Shrinkage 0 is the Euclidean metric, ``math.inf`` the covariance's alone.

    ``rows`` are X, ``[n, d]``, float32, on the host, and 0 where they are not ``typical``, ``[t]``,
    all by default. Of more than 256 typical rows, L landmarks determine C: a quarter, 256 at least
    and 512 at most. The cost is :math:`O(L n d + L n^2)`.
    """

    @on_host()
    def __init__(self, rows: Tensor, typical: Tensor | None = None) -> None:
        self._rows = rows.contiguous()  # scaled rows keep the strides of a transposed input
        least, most = _LANDMARKS
        typical = torch.arange(len(rows)) if typical is None else typical
        self._count = len(typical)
        self._some = typical[evenly(self._count, min(max(self._count // 4, least), most))]
        self._at: dict[float, tuple[Tensor, Tensor, float]] = {}

    @on_host()
    @exactly()
    def squared_distances(
        self, shrinkage: float, some: Tensor | None = None
    ) -> tuple[Tensor, float]:
        """Return squared distances of all or some rows, and the mean square of lengths."""
        rows, squares, unit = self.at(shrinkage)
        if some is not None:
            rows, squares = rows[some], squares[some]
        # From differences of coordinates: rounded inner products would part rows that repeat.
        nothing = (ROUNDINGS * torch.finfo(rows.dtype).eps) ** 2
        return squared_distances(rows, squares + (unit - 1) / 2, nothing), unit

    def at(self, shrinkage: float) -> tuple[Tensor, Tensor, float]:
        """Return coordinates ``[n, L]``, the squared lengths ``[n]``, and the mean of these."""
        if shrinkage not in self._at:
            rows = self._rows if shrinkage == 0 else self._coordinates(shrinkage)
            rows = rows.contiguous()
            squares = torch.linalg.vector_norm(rows, dim=1).square_()
            unit = float(squares.sum()) / max(self._count, 1)
            self._at[shrinkage] = rows, squares, unit
        return self._at[shrinkage]

    @functools.cached_property
    def _products(self) -> Tensor:
        """The inner products with the landmarks, ``[n, L]``."""
        x, some = self._rows, self._some
        return inner_products(x) if len(some) == len(x) else x @ x[some].T

    def _coordinates(self, shrinkage: float) -> Tensor:
        r"""Return Z ``[n, L]`` with :math:`Z Z^\top = M` up to a factor.

        It is :math:`X X_S^\top (X_S X_S^\top + \tau I)^{-1} X_S X^\top` for landmarks :math:`X_S`,
        as no two large terms are subtracted.
        """
        products = self._products
        system = products.index_select(0, self._some)
        trace = float(system.trace())
        if shrinkage == math.inf or trace == 0:
            return products
        system.diagonal().add_(shrinkage * trace)
        factor = torch.linalg.cholesky(system)
        rows: Tensor = torch.linalg.solve_triangular(factor.mT, products, upper=True, left=False)
        return rows


def evenly(size: int, most: int) -> Tensor:
    """Return at most so many of ``0 .. size - 1``, evenly spaced."""
    return torch.arange(min(size, most)) * size // max(min(size, most), 1)


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


def typical_rows(features: Sequence[Tensor]) -> npt.NDArray[np.bool_]:
    """Return which rows of features ``[B, d]`` are finite, and no longer than others by far."""
    for dtype in (None, torch.float64):  # squares of float32 may overflow, or vanish
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=dtype).numpy() for x in features]
        lengths = np.stack(norms)  # [inputs, B]
        if lengths.size and 1e-15 < float(lengths.max()) < 1e15:
            break
    finite: npt.NDArray[np.bool_] = np.isfinite(lengths).all(0)
    if not (count := int(finite.sum())):
        return finite
    at = 9 * (count - 1) // 10
    long = _LONG * np.partition(lengths[:, finite], at, 1)[:, at, None]
    # If most rows are 0, the others are not too long.
    typical: npt.NDArray[np.bool_] = finite & ((lengths <= long) | (long == 0)).all(0)
    return typical
