r"""Berrut's rational code (BACC), and its Floater-Hormann generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import count
from ..linear import LinearMap, MatrixMap
from .nodes import CurveCode

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Unpack

    from .base import Options

__all__ = ["BerrutCode"]


class BerrutCode(CurveCode):
    r"""Berrut approximated coded computing: rational interpolants without poles, both ways.

    .. math:: u(z) = \sum_j \frac{w_j}{z - t_j} y_j \Big/ \sum_j \frac{w_j}{z - t_j},
              \qquad w_j = (-1)^j

    where :math:`j` is the position among the nodes *in use*: the decoder's signs alternate over the
    received workers in order, not over their own indices, which would put poles between them. An
    ``order`` d > 0 takes Floater-Hormann weights instead, which reproduce polynomials of degree d.

    Args:
        num_data, num_workers: K and N, as for every :class:`~coded_torch.codes.Code`.
        order: d, in ``0 .. num_data - 1``; 0 is Berrut's interpolant. A decoder with no more than d
            results uses as many as it has, order ``|F| - 1``.
        data_points, worker_points: as for every :class:`~coded_torch.codes.CurveCode`.
        options: ``ordering``, ``shuffle`` and ``link``, as for every
            :class:`~coded_torch.codes.Code`.

    Raises:
        TypeError: a count or the order is not an integer.
        ValueError: a count, the order, or the points are out of range.

    Note:
        Any one result can be decoded. Planning a decoder costs :math:`O(|F| (K + d^2))`.

    Reference:
        T. Jahani-Nezhad, M. A. Maddah-Ali, *Berrut approximated coded computing: straggler
        resistance beyond polynomial computing*, arXiv 2009.08327. M. S. Floater, K. Hormann,
        *Barycentric rational interpolation with no poles and high rates of approximation*, Numer.
        Math. 107 (2007).

    Example:
        >>> import torch
        >>> from coded_torch.codes import BerrutCode
        >>> code = BerrutCode(num_data=2, num_workers=8)
        >>> coded = code.encode(torch.tensor([1.0, 2.0]))
        >>> code.decode(coded[:7], received=range(7)).round(decimals=1)
        tensor([1.1000, 2.0000])
    """

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        order: int = 0,
        data_points: ArrayLike | None = None,
        worker_points: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_data, num_workers, data_points, worker_points, **options)
        self.order = count(self, "order", order, 0, self.num_data - 1)

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {"order": range(min(4, self.num_data))}

    def _make_encoder(self) -> LinearMap:
        weights = _floater_hormann_weights(self.data_points, self.order)
        return MatrixMap(_interpolation_matrix(self.data_points, weights, self.worker_points))

    def _curve(self, nodes: NDArray[np.float64], points: NDArray[np.float64]) -> LinearMap:
        weights = _floater_hormann_weights(nodes, min(self.order, nodes.size - 1))
        return MatrixMap(_interpolation_matrix(nodes, weights, points))


def _floater_hormann_weights(nodes: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    r"""Barycentric weights of the Floater-Hormann interpolant, up to a common factor.

    .. math:: w_j = (-1)^j \sum_i \prod_{l = i, l \ne j}^{i + d} \frac{1}{|t_j - t_l|}

    over the windows :math:`i, \dots, i + d` that contain :math:`j`: equation 18 of Floater and
    Hormann. Order 0 is Berrut's alternating signs, order n - 1 the polynomial through all n nodes.

    Args:
        nodes: ``[n]``, strictly increasing.
        order: d, in ``0 .. n - 1``.

    Returns:
        ``[n]``, float64, alternating in sign, the first positive.

    Note:
        :math:`O((n - d) d^2)`.
    """
    n, width = nodes.size, order + 1
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    if order == 0:
        return signs
    window = np.arange(n - order)[:, None] + np.arange(width)  # [windows, d + 1], indices of nodes
    # On an interval of length 4 the products neither overflow nor underflow as the order grows.
    scaled = nodes * (4 / (nodes[-1] - nodes[0]))
    distances = np.abs(scaled[window][:, :, None] - scaled[window][:, None, :])
    distances[:, range(width), range(width)] = 1
    weights = np.zeros(n)
    np.add.at(weights, window, 1 / distances.prod(axis=2))
    return signs * weights


def _interpolation_matrix(
    nodes: NDArray[np.float64], weights: NDArray[np.float64], points: NDArray[np.float64]
) -> NDArray[np.float64]:
    r"""The matrix that takes values at ``nodes`` to the interpolant's values at ``points``.

    .. math:: u(z) = \sum_j \frac{w_j}{z - t_j} y_j \Big/ \sum_j \frac{w_j}{z - t_j},
              \qquad u(t_j) = y_j

    Args:
        nodes: ``[n]``, distinct.
        weights: ``[n]``, not zero.
        points: ``[N]``.

    Returns:
        ``[N, n]``, float64; every row sums to one, a row of a point that is a node is one-hot.
    """
    offsets = points[:, None] - nodes
    nearest = np.abs(offsets).min(axis=1, keepdims=True)
    # 1 / offset, relative to the nearest node so that no offset is too small to divide by; a
    # nearest offset of 0 is an exact hit, where that node alone counts.
    ratios = np.divide(nearest, offsets, out=(offsets == 0).astype(np.float64), where=nearest > 0)
    terms = weights * ratios
    matrix: NDArray[np.float64] = terms / terms.sum(axis=1, keepdims=True)
    return matrix
