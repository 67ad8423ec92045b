r"""Codes whose inputs and workers sit at points of a curve."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import real_array
from .._transforms import on_host
from ..linear import LinearMap
from .base import FixedCode
from .nodes import chebyshev_first, chebyshev_second

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Unpack

    from .base import Options

__all__ = ["CurveCode"]

# Results are left out of a curve in so many turns: neighbours stay, and few curves are planned.
_FOLDS = 4


class CurveCode(FixedCode):
    r"""A code that lays a curve through the inputs and reads coded inputs off it.

    Input :math:`k` sits at data point :math:`\alpha_k`, worker :math:`n` receives the curve's value
    at worker point :math:`\beta_n`; decoding lays a curve through the results at the received
    :math:`\beta_n` and reads the answers off at the :math:`\alpha_k`.

    Subclasses implement ``_make_encoder`` and ``_curve``.

    Args:
        num_data, num_workers: K and N, as for every :class:`Code`.
        data_points: ``[K]``, finite, strictly increasing; by default
            :func:`~coded_torch.codes.nodes.chebyshev_first`.
        worker_points: ``[N]``, likewise; by default
            :func:`~coded_torch.codes.nodes.chebyshev_second`, or what the class has instead as
            ``default_worker_points``.
        options: ``ordering``, ``shuffle`` and ``link``, as for every :class:`Code`.
    """

    default_worker_points = staticmethod(chebyshev_second)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        data_points: ArrayLike | None = None,
        worker_points: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        if data_points is None:
            data_points = chebyshev_first(self.num_data)
        if worker_points is None:
            worker_points = self.default_worker_points(self.num_workers)
        self.data_points = self._points("data_points", data_points, self.num_data)
        self.worker_points = self._points("worker_points", worker_points, self.num_workers)

    @abc.abstractmethod
    def _curve(self, nodes: NDArray[np.float64], points: NDArray[np.float64]) -> LinearMap:
        """The decoder's curve through results at ``nodes``, read off at ``points``."""

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        return self._curve(self.worker_points[list(received)], self.data_points)

    @on_host()
    def left_out(self, received: Sequence[int]) -> Tensor:
        """By the curve: every fourth result but the outermost at once, from all the others."""
        nodes, count = self.worker_points[list(received)], len(received)
        rows = []
        for fold in range(1, _FOLDS + 1):
            held = np.arange(fold, count - 1, _FOLDS)
            kept = np.setdiff1d(np.arange(count), held)
            if not held.size or kept.size < self.min_received:
                continue
            errors = torch.zeros(held.size, count, dtype=torch.float64)
            errors[:, kept] = -self._curve(nodes[kept], nodes[held]).matrix()
            errors[range(held.size), held] = 1
            rows.append(errors)
        return torch.cat(rows) if rows else super().left_out(received)

    def _points(self, argument: str, points: ArrayLike, size: int) -> NDArray[np.float64]:
        array = real_array(self, argument, points)
        if array.shape != (size,):
            raise ValueError(
                f"{type(self).__name__}: {argument} must have shape ({size},), got {array.shape}"
            )
        # Negated, so that NaN fails.
        if not (np.isfinite(array).all() and (np.diff(array) > 0).all()):
            raise ValueError(
                f"{type(self).__name__}: {argument} must be finite and strictly increasing, "
                f"got {array.tolist()}"
            )
        array.flags.writeable = False
        return array

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for points in (self.data_points, self.worker_points):
            points.flags.writeable = False
