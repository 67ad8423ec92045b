r"""Stateless mathematics on tensors."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._arguments import dense
from .linear import SplineMap

__all__ = ["smoothing_spline"]


def smoothing_spline(
    values: Tensor,
    knots: ArrayLike | Tensor,
    points: ArrayLike | Tensor,
    *,
    smoothing: float = 0.0,
    weights: ArrayLike | Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    r"""Fit natural cubic smoothing splines and evaluate them.

    :class:`~coded_torch.linear.SplineMap` plans once for many calls. It has the objective, the
    other arguments, the errors and the cost. Results are differentiable any number of times with
    respect to ``values`` only.

    Args:
        values: ``[..., n, ...]``, the values at the knots, float64, float32, bfloat16 or float16.
        dim: the dimension of ``values`` that counts knots.

    Returns:
        ``[..., N, ...]``, in the dtype and on the device of ``values``.

    Example:
        >>> import torch
        >>> from coded_torch.functional import smoothing_spline
        >>> t = torch.linspace(0, 1, 5)
        >>> smoothing_spline(t.square(), t, [0.3, 0.6]).round(decimals=2)
        tensor([0.0900, 0.3600])
    """
    dense("smoothing_spline", "values", values)
    for name, given in {"knots": knots, "points": points, "weights": weights}.items():
        if isinstance(given, Tensor) and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"smoothing_spline: {name} must not require a gradient, it has none")
    return SplineMap(knots, points, smoothing=smoothing, weights=weights)(values, dim)
