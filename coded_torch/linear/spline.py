r"""Smoothing splines as maps: the only place above ``ops`` that knows kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .._arguments import real_array
from .._arguments import smoothing as check_smoothing
from .._extension import HAS_CUDA_KERNELS, curve_plan, fits_matrix
from .maps import LinearMap

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ..input_space.ordering import Grouping

__all__ = ["SplineMap", "dense_instructions", "prefers_matrix", "sweep_instructions"]

# Instructions of a warp for 32 columns of float32, without moves, counted in the PTX that nvcc 13.0
# writes for sm_90: of the sweeps per knot and per point, and of the product per entry of the
# matrix. (The product takes 75 for 16 rows of the matrix and four columns a thread.)
_PER_KNOT, _PER_POINT, _PER_ENTRY = 90, 35, 1.2
_ROWS = 16  # matrices have their rows in multiples of this number (kDenseRows in dense_block.h)
# An instruction of a sweep takes this many times longer, since it depends on the one before. The
# model of an H100 that `python -m benchmarks.kernels --model` prints says so; it is not measured.
_WAITING = 1.5
# Columns from which rows are read by index: the columns of each group then fill tiles of their own,
# and for fewer columns copying the rows costs less than tiles half empty.
_FUSED_COLUMNS = 256


class SplineMap(LinearMap):
    r"""The map from values at the knots to a natural cubic smoothing spline's values at the points.

    The spline minimises, in the mean convention of the paper,

    .. math:: \frac{1}{n} \sum_i w_i (y_i - g(t_i))^2 + \lambda \int g''(t)^2 \, dt ,

    and continues as its tangent beyond the first and the last knot. Smoothing 0 interpolates, and
    straight lines are always reproduced. (``scipy.interpolate.make_smoothing_spline`` has a plain
    sum: ``lam = n * smoothing``.)

    Args:
        knots: ``[n]``, finite, strictly increasing, ``n >= 1``.
        points: ``[N]``, finite, in any order.
        smoothing: :math:`\lambda`, finite, at least 0.
        weights: ``[n]``, :math:`w`, finite, positive; all 1 by default.

    Raises:
        TypeError: an argument is not an array of real numbers.
        ValueError: an argument violates its requirement, or float32 cannot hold the plan. The
            bounds are gaps, and distances of points from the knots, of some 1e38 mean gaps or its
            inverse, and a smoothing of 1e150 times its cube.

    Note:
        Planning costs :math:`O(n + N \log n)` on the host, applying :math:`O(n + N)` per column, or
        :math:`O(n N)` on CUDA where a dense matrix is faster. The result of a column depends on
        nothing but the column, bit for bit.

    References:
        Wecker and Ansley, *The signal extraction approach to nonlinear regression and spline
        smoothing*, J. Am. Stat. Assoc. 78, 1983. Green and Silverman, *Nonparametric Regression and
        Generalized Linear Models*, 1994.

    Example:
        >>> import torch
        >>> from coded_torch.linear import SplineMap
        >>> curve = SplineMap(knots=[0.0, 1.0, 3.0], points=[0.5, 2.0, 4.0])
        >>> curve(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
        tensor([0.5000, 2.0000, 4.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        knots: ArrayLike | Tensor,
        points: ArrayLike | Tensor,
        *,
        smoothing: float | Tensor = 0.0,
        weights: ArrayLike | Tensor | None = None,
    ) -> None:
        smoothing = check_smoothing("smoothing spline", "smoothing", smoothing)
        t, z = _numbers("knots", knots), _numbers("points", points)
        w = None if weights is None else _numbers("weights", weights)
        exact, rounded, schedule = map(torch.from_numpy, curve_plan(t, z, smoothing, w))
        super().__init__(len(t), len(z), exact, schedule, rounded=(rounded, schedule))

    def _to_place(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        coefficients, schedule = super()._to_place(dtype, device)
        chooses = prefers_matrix if HAS_CUDA_KERNELS else fits_matrix
        dense = device.type == "cuda" and chooses(self.num_inputs, self.num_outputs)
        # Compiled code would make the matrix anew in every call.
        if dense and not torch.compiler.is_compiling():
            exact, _ = super()._to_place(torch.float64, device)
            coefficients = ops.with_matrix(coefficients, schedule, exact)
        return coefficients, schedule

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        coefficients, schedule = self._operands(values)
        return ops.spline_apply(values, coefficients, schedule, transpose=transpose)

    def gathered(self, batch: Tensor, grouping: Grouping) -> Tensor:
        """Return ``map(grouping.gather(batch))``, reading the rows where they lie."""
        self._dimension(batch, 0, grouping.batch_size)
        num_columns = batch.shape[1:].numel()
        if num_columns < _FUSED_COLUMNS:
            return super().gathered(batch, grouping)
        coefficients, schedule = self._operands(batch)
        rows, gather = batch.reshape(len(batch), num_columns), grouping.to(batch.device).rows
        result = ops.spline_apply(rows, coefficients, schedule, gather=gather)
        return result.view(self.num_outputs, grouping.num_groups, *batch.shape[1:])

    def scattered(self, groups: Tensor, grouping: Grouping) -> Tensor:
        """Return ``grouping.scatter(map(groups))``, writing the rows where they belong."""
        for dim, size in enumerate((self.num_inputs, grouping.num_groups)):
            self._dimension(groups, dim, size)
        num_columns = groups.shape[2:].numel()
        if num_columns < _FUSED_COLUMNS:
            return super().scattered(groups, grouping)
        coefficients, schedule = self._operands(groups)
        targets = grouping.to(groups.device).targets
        # If no group is filled up, every entry names a row.
        num_rows = None if targets.numel() == grouping.batch_size else grouping.batch_size
        values = groups.reshape(*groups.shape[:2], num_columns)
        result = ops.spline_apply(
            values, coefficients, schedule, scatter=targets, num_rows=num_rows
        )
        return result.view(grouping.batch_size, *groups.shape[2:])


def _numbers(argument: str, numbers: ArrayLike | Tensor) -> NDArray[np.float64]:
    if type(numbers) is np.ndarray and numbers.dtype == np.float64:
        return numbers  # the planner only reads it
    return real_array("smoothing spline", argument, numbers)


def spline_matrices(
    knots: NDArray[np.float64], points: NDArray[np.float64], smoothing: float
) -> Tensor:
    """Return the dense matrices of splines with other knots each, ``[P, n] -> [P, N, n]``."""
    plans = [curve_plan(t, points, smoothing, None) for t in knots]
    size = knots.shape[1]
    if not plans:
        return torch.zeros(0, len(points), size, dtype=torch.float64)
    exact, _, schedule = (torch.from_numpy(np.concatenate(x)) for x in zip(*plans, strict=True))
    identity = torch.eye(size, dtype=torch.float64).unsqueeze(1).expand(size, len(knots), size)
    return ops.spline_apply(identity, exact, schedule).transpose(0, 1)


def sweep_instructions(num_knots: int, num_points: int) -> float:
    """Return the instructions of a warp that sweeps its 32 columns."""
    return _PER_KNOT * num_knots + _PER_POINT * num_points


def dense_instructions(num_knots: int, num_points: int) -> float:
    """Return the instructions for 32 columns of the product with the dense matrix."""
    return _PER_ENTRY * num_knots * -(-num_points // _ROWS) * _ROWS


def prefers_matrix(num_knots: int, num_points: int) -> bool:
    """Return whether a GPU multiplies by the dense matrix of a plan rather than sweep.

    The number of columns does not count, since a column's result must not depend on it.
    """
    dense = dense_instructions(num_knots, num_points)
    return 0 < dense <= _WAITING * sweep_instructions(num_knots, num_points)
