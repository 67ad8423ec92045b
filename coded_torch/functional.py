r"""Stateless mathematics on tensors."""

from __future__ import annotations

import math
import sys

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from ._arguments import dense
from .linear import SplineMap, apply_each

__all__ = ["smoothing_spline", "smoothing_spline_matrix"]


def smoothing_spline(
    values: Tensor,
    knots: ArrayLike | Tensor,
    points: ArrayLike | Tensor,
    *,
    smoothing: float | Tensor = 0.0,
    weights: ArrayLike | Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    r"""Fit natural cubic smoothing splines and evaluate them.

    :class:`~coded_torch.linear.SplineMap` plans once for many calls. It has the objective, the
    other arguments, the errors and the cost. Results are differentiable any number of times with
    respect to ``values``. If another argument is a tensor that requires a gradient,
    :func:`smoothing_spline_matrix` is used, at :math:`O(n^3 + n N)` plus :math:`O(n N)` per column.

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
    curve = SplineMap(knots, points, smoothing=smoothing, weights=weights)
    parameters = (knots, points, smoothing, weights)
    learned = any(isinstance(a, Tensor) and a.requires_grad for a in parameters)
    if not (learned and torch.is_grad_enabled()):
        return curve(values, dim)
    dim = curve.check(values, dim, curve.num_inputs)
    matrix = smoothing_spline_matrix(knots, points, smoothing=smoothing, weights=weights)
    return apply_each(matrix[None], values.movedim(dim, 0)[None])[0].movedim(0, dim)


def smoothing_spline_matrix(
    knots: ArrayLike | Tensor,
    points: ArrayLike | Tensor,
    *,
    smoothing: float | Tensor = 0.0,
    weights: ArrayLike | Tensor | None = None,
) -> Tensor:
    r"""Return the matrix of :func:`smoothing_spline`, differentiable in every argument.

    Solves for the values :math:`g` and the second derivatives :math:`\gamma` at the knots together,

    .. math::
        \begin{pmatrix} R & -Q^T \\ L Q & I \end{pmatrix}
        \begin{pmatrix} \gamma \\ g \end{pmatrix} = \begin{pmatrix} 0 \\ y \end{pmatrix} ,

    since eliminating either squares the condition of the system (Green and Silverman,
    *Nonparametric Regression and Generalized Linear Models*, 1994).

    Returns:
        ``[N, n]``, float64, on the host, at :math:`O(n^3 + n N)`.
    """
    SplineMap(knots, points, smoothing=smoothing, weights=weights)  # checks all arguments
    t, z, lam = (_double(a) for a in (knots, points, smoothing))
    n, scale = len(t), _scale(t.detach())
    # The factors come one after the other: the cube of the scale may not be a float64.
    t, z, lam = t * scale, z * scale, lam * scale * scale * scale
    h = t.diff()
    identity = torch.eye(n, dtype=t.dtype, device=t.device)
    if n == 1:
        return identity.expand(len(z), 1)
    penalties = n * lam / (torch.ones_like(t) if weights is None else _double(weights))
    # Q' y is the second difference of y: the jump of slope at each inner knot, if any. [n - 2, n]
    q = (identity.diff(dim=0) / h[:, None]).diff(dim=0)
    r = torch.diag((h[:-1] + h[1:]) / 3)
    r = r + torch.diag(h[1:-1] / 6, 1) + torch.diag(h[1:-1] / 6, -1)
    of_gamma, of_g = torch.cat([r, penalties[:, None] * q.T]), torch.cat([-q, identity])
    system, values = torch.cat([of_gamma, of_g], dim=1), pad(identity, (0, 0, n - 2, 0))
    solved = torch.linalg.solve(system, values)
    # Rows and columns differ by many powers of ten, so that pivots are chosen badly or well as
    # LAPACK's order of operations has it; one step of refinement mends that (Skeel 1980).
    solved = solved + torch.linalg.solve(system, values - system @ solved)
    gamma, g = pad(solved[: n - 2], (0, 0, 1, 1)), solved[n - 2 :]
    i = (torch.searchsorted(t.detach(), z.detach(), right=True) - 1).clamp(0, n - 2)
    left, right, gap = (v[:, None] for v in (z - t[i], t[i + 1] - z, h[i]))
    chord = (g[i + 1] - g[i]) / gap
    bend = (1 + left / gap) * gamma[i + 1] + (1 + right / gap) * gamma[i]
    inside = g[i] + left * chord - left * right / 6 * bend
    before = g[i] + left * (chord - gap * (2 * gamma[i] + gamma[i + 1]) / 6)
    after = g[i + 1] - right * (chord + gap * (gamma[i] + 2 * gamma[i + 1]) / 6)
    return torch.where(left < 0, before, torch.where(right < 0, after, inside))


def _double(argument: ArrayLike | float | Tensor) -> Tensor:
    return torch.as_tensor(argument, dtype=torch.float64, device="cpu")


def _scale(knots: Tensor) -> float:
    """Return a power of two that makes the mean gap about 1, as csrc/math/spline_plan.h does."""
    if len(knots) < 2:
        return 1.0
    length = min(float(knots[-1] - knots[0]), sys.float_info.max)
    return float(2.0 ** -max(math.frexp(length / (len(knots) - 1))[1], -1023))
