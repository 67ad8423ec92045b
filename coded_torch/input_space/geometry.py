"""The distances between the rows of a batch, in a metric fitted to the batch itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import dense
from .._torch import exactly, on_host
from ..ops import inner_products, squared_distances

__all__ = ["LANDMARKS", "Geometry", "added_up", "check_inputs", "distances_among", "evenly"]
__all__ += ["typical_rows"]

# More features are added up in buckets, with random signs: Gram matrices of 150,528 take a seventh
# of the time on batches of 240 pictures (measured once; no benchmark keeps it). It is prime, as
# columns of a picture would share buckets.
_MOST_FEATURES = 8192
_BUCKETS = 2039
# The rows that determine the covariance: all of 1,000 lower a regression's error by 1 % at most.
# (theory, section 10; benchmarks distances)
LANDMARKS = 512
# Distances that so many roundings of float32 may cause are 0: a margin for sums of some thousand
# terms; it was not tuned.
_ROUNDINGS = 128
# Rows so many times as long as nine tenths of them do not determine the metric, and say nothing of
# the others. Rows of one scale seldom differ by more; it was not tuned.
_LONG = 8


class Geometry:
    r"""The inner products and distances of rows, in a metric fitted to these rows.

    Let :math:`X` hold the features as centred rows, several tensors side by side. Each tensor is
    divided by the root mean square of its centred rows' lengths, so that none dominates. The inner
    products are

    .. math:: M = X \, C \, (C + \tau I)^{-1} X^\top, \qquad
              C = X^\top X, \quad \tau = \text{shrinkage} \cdot \operatorname{tr} C,

    up to a factor that makes the mean of the diagonal 1. ``shrinkage = 0`` is the Euclidean metric,
    ``math.inf`` is :math:`M = X C X^\top`, the metric of the covariance alone.

    Args:
        features: ``[n, d]`` each, floating-point, finite, on the host.

    Note:
        :math:`O(n^2 d + n^3)`. Of more than 512 rows, 512 evenly spaced ones determine C:
        :math:`O(512 n d + 512 n^2)`.

    References:
        Charikar, Chen, Farach-Colton, *Finding frequent items in data streams*, ICALP 2002, for the
        sums of many features.

    Example:
        >>> import torch
        >>> from coded_torch.input_space.geometry import Geometry
        >>> squares, _ = Geometry([torch.tensor([[0.0], [1.0], [3.0]])]).squared_distances(0.0)
        >>> (squares / squares[0, 1]).round(decimals=3)
        tensor([[0., 1., 9.],
                [1., 0., 4.],
                [9., 4., 0.]])
    """

    @on_host()
    @exactly()
    def __init__(self, features: Sequence[Tensor]) -> None:
        rows = [_standardised(x) for x in features]
        self._rows = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
        self._some = evenly(len(self._rows), LANDMARKS)
        self._products: Tensor | None = None  # the inner products with the landmarks, [n, L]
        self._at: dict[float, tuple[Tensor, Tensor]] = {}

    @on_host()
    @exactly()
    def squared_distances(
        self, shrinkage: float, some: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure the rows.

        Args:
            shrinkage: at least 0; ``math.inf`` is allowed.
            some: ``[m]``, the rows whose distances are returned. Defaults to all.

        Returns:
            The squared distances, ``[m, m]``, float32: symmetric, and 0 between equal rows; and the
            squared lengths of all rows, ``[n]``, 1 on average.
        """
        if shrinkage not in self._at:
            rows = self._rows if shrinkage == 0 else self._coordinates(shrinkage)
            squares = rows.square().sum(1)
            square = float(squares.sum()) / max(len(rows), 1)
            if square > 0:
                rows, squares = rows * (1 / math.sqrt(square)), squares / square
            self._at[shrinkage] = rows.contiguous(), squares
        rows, squares = self._at[shrinkage]
        few = (rows, squares) if some is None else (rows[some], squares[some])
        # From differences of coordinates: rounded inner products would part rows that repeat.
        nothing = (_ROUNDINGS * torch.finfo(rows.dtype).eps) ** 2
        return squared_distances(*few, nothing), squares

    def _coordinates(self, shrinkage: float) -> Tensor:
        r"""Return Z ``[n, L]`` with :math:`Z Z^\top = M` up to a factor.

        It is :math:`X X_S^\top (X_S X_S^\top + \tau I)^{-1} X_S X^\top` for landmarks :math:`X_S`,
        as no two large terms are subtracted.
        """
        if self._products is None:
            x, whole = self._rows.contiguous(), len(self._rows) <= LANDMARKS
            self._products = inner_products(x) if whole else x @ x[self._some].T
        products = self._products
        system = products[self._some]
        trace = float(system.trace())
        if shrinkage == math.inf or trace == 0:
            return products
        system.diagonal().add_(shrinkage * trace)
        factor = torch.linalg.cholesky(system)
        rows: Tensor = torch.linalg.solve_triangular(factor.mT, products, upper=True, left=False)
        return rows


def evenly(size: int, most: int) -> Tensor:
    """Return at most so many of ``0 .. size - 1``, evenly spaced."""
    most = min(size, most)
    return torch.arange(most) * size // max(most, 1)


def distances_among(rows: Tensor) -> Tensor:
    """Return the squared distances of rows ``[n, L]`` as they are, ``[n, n]``."""
    return squared_distances(rows.contiguous(), rows.square().sum(1), 0.0)


def check_inputs(owner: str, inputs: Sequence[Tensor]) -> None:
    """Raise an error unless inputs are a sequence of dense tensors of one batch size."""
    if isinstance(inputs, (Tensor, str, bytes)) or not isinstance(inputs, Sequence):
        raise TypeError(
            f"{owner}: inputs must be a sequence of tensors, got {type(inputs).__name__}"
        )
    for i, x in enumerate(inputs):
        dense(owner, f"inputs[{i}]", x)
        if not x.dim() or len(x) != len(inputs[0]):
            raise ValueError(
                f"{owner}: inputs[{i}] must have the batch size of the first along dim 0, "
                f"got shape {tuple(x.shape)} beside {tuple(inputs[0].shape)}"
            )


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


def typical_rows(features: Sequence[Tensor]) -> Tensor:
    """Return which rows of features ``[B, d]`` are finite, and no longer than others by far."""
    lengths = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in features])  # [inputs, B]
    if not lengths.numel() or not 1e-15 < float(lengths.max()) < 1e15:
        # Squares overflow, or vanish.
        norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) for x in features]
        lengths = torch.stack(norms)
    finite = lengths.isfinite().all(0)
    if not (count := int(finite.sum())):
        return finite
    known = lengths if count == len(finite) else lengths[:, finite]
    long = _LONG * known.kthvalue(9 * (count - 1) // 10 + 1, 1, keepdim=True).values
    # If most rows are 0, the others are not too long.
    return finite & ((lengths <= long) | (long == 0)).all(0)


def _standardised(x: Tensor) -> Tensor:
    """Return rows ``[n, d]`` centred, of root mean square length 1; 0 if all are equal."""
    largest = max(map(abs, map(float, torch.aminmax(x)))) if x.numel() else 0.0
    if not largest > torch.finfo(x.dtype).tiny:
        return torch.zeros_like(x, dtype=torch.float32)
    if not 1e-8 < largest < 1e8:  # squares could overflow, or vanish
        x, largest = x / largest, 1.0
    x = x - x.mean(0)
    spread = float(torch.linalg.vector_norm(x)) / math.sqrt(len(x))
    rounding = _ROUNDINGS * torch.finfo(x.dtype).eps * math.sqrt(x.shape[1]) * largest
    return x.mul_(1 / spread).float() if spread > rounding else torch.zeros_like(x).float()
