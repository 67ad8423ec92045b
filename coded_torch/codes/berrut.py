r"""Berrut's rational code (BACC), and its Floater-Hormann generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import count
from .nodes import CurveCode

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .nodes import CurveOptions

__all__ = ["BerrutCode", "FloaterHormannCode"]


class BerrutCode(CurveCode):
    r"""Berrut approximated coded computing (BACC): rational interpolants without poles, both ways.

    .. math:: u(z) = \sum_j \frac{w_j}{z - t_j} y_j \Big/ \sum_j \frac{w_j}{z - t_j},
              \qquad w_j = (-1)^j

    where :math:`j` is the position among the nodes *in use*: the decoder's signs alternate over the
    received workers in order. Signs by the workers' own indices would put poles between them.

    It takes the arguments of :class:`~coded_torch.codes.CurveCode`. Any one result can be decoded.
    Planning a decoder costs :math:`O(|F| K)`. With ``worker_points=chebyshev_first(num_workers)``
    this is the code of SBACC, arXiv 2507.01330.

    Reference:
        T. Jahani-Nezhad, M. A. Maddah-Ali, *Berrut approximated coded computing: straggler
        resistance beyond polynomial computing*, arXiv 2009.08327.

    Example:
        >>> import torch
        >>> from coded_torch.codes import BerrutCode
        >>> code = BerrutCode(num_data=2, num_workers=8)
        >>> coded = code.encode(torch.tensor([1.0, 2.0]))
        >>> code.decode(coded[:7], received=range(7)).round(decimals=1)
        tensor([1.1000, 2.0000])
    """

    order = 0

    def _make_encoder(self) -> NDArray[np.float64]:
        return self._curve(self.data_points, self.worker_points)

    def _curve(
        self, nodes: NDArray[np.float64], points: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        weights = _weights(nodes, min(self.order, nodes.shape[-1] - 1))
        return _interpolation_matrix(nodes, weights, points)

    def _decoder_matrices(self, received: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._curve(self.worker_points[received], self.data_points)


class FloaterHormannCode(BerrutCode):
    r"""The code of Floater-Hormann interpolants, which reproduce polynomials of degree ``order``.

    They are Berrut's with other weights: blends of the polynomials through ``order + 1``
    neighbouring nodes.

    Args:
        num_data, num_workers, options: as for :class:`~coded_torch.codes.CurveCode`.
        order: d, in ``0 .. num_data - 1``; 0 is Berrut's interpolant. A decoder of d results or
            fewer has the order ``|F| - 1``. Defaults to 1.

    Raises:
        TypeError: the order is not an integer.
        ValueError: the order is out of range.

    Note:
        Planning a decoder costs :math:`O(|F| (K + d^2))`.

    Reference:
        M. S. Floater, K. Hormann, *Barycentric rational interpolation with no poles and high rates
        of approximation*, Numer. Math. 107 (2007).
    """

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        order: int = 1,
        **options: Unpack[CurveOptions],
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        self.order = count(self, "order", order, 0, self.num_data - 1)

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {"order": range(min(4, self.num_data))}


def _weights(nodes: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    r"""Return the barycentric weights of Floater-Hormann interpolants, up to a common factor.

    .. math:: w_j = (-1)^j \sum_i \prod_{l = i, l \ne j}^{i + d} \frac{1}{|t_j - t_l|}

    over the windows :math:`i, \dots, i + d` that contain :math:`j` (equation 18 of Floater and
    Hormann), for increasing ``nodes [..., n]`` and d in ``0 .. n - 1``.
    """
    n, width = nodes.shape[-1], order + 1
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    if order == 0:
        return signs
    # On an interval of length 4 the products neither overflow nor underflow as the order grows.
    scaled = nodes * (4 / (nodes[..., -1:] - nodes[..., :1]))
    windows = np.lib.stride_tricks.sliding_window_view(scaled, width, axis=-1)
    distances = np.abs(windows[..., :, None] - windows[..., None, :])
    distances[..., range(width), range(width)] = 1
    terms = 1 / distances.prod(axis=-1)  # [..., windows, d + 1]
    weights = np.zeros(nodes.shape)
    for place in range(width):
        weights[..., place : place + n - order] += terms[..., place]
    return signs * weights


def _interpolation_matrix(
    nodes: NDArray[np.float64], weights: NDArray[np.float64], points: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the matrix ``[..., N, n]`` from values at ``nodes [..., n]`` to ``points [N]``.

    Every row sums to one. The row of a point that is a node is one-hot.
    """
    offsets = points[:, None] - nodes[..., None, :]
    nearest = np.abs(offsets).min(axis=-1, keepdims=True)
    # 1 / offset, relative to the nearest node, so that no offset is too small to divide by. If the
    # nearest offset is 0, that node alone counts.
    ratios = np.divide(nearest, offsets, out=(offsets == 0).astype(np.float64), where=nearest > 0)
    terms = weights[..., None, :] * ratios
    matrix: NDArray[np.float64] = terms / terms.sum(axis=-1, keepdims=True)
    return matrix
