r"""Slow twins of the kernels, in plain numpy: what the tests measure against."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["smoothing_spline"]


def smoothing_spline(
    values: Any,
    knots: Sequence[Any],
    points: Sequence[Any],
    *,
    smoothing: Any = 0.0,
    weights: Sequence[Any] | None = None,
    number: Callable[[Any], Any] = float,
) -> np.ndarray[Any, Any]:
    r"""The natural cubic smoothing spline in its textbook form, in any kind of number.

    Solves the pentadiagonal system :math:`(R + Q^T L Q) \gamma = Q^T y` for the second derivatives
    :math:`\gamma` at the knots, then :math:`g = y - L Q \gamma` (Reinsch, *Smoothing by spline
    functions*, Numer. Math. 10, 1967). Its condition grows like :math:`n^4 \lambda`, so ``number``
    should be ``mpmath.mpf`` or ``fractions.Fraction`` for all but small problems.
    """
    y = np.array([[number(v) for v in row] for row in np.asarray(values, dtype=object)])
    t = [number(k) for k in knots]
    n = len(t)
    w = [number(1)] * n if weights is None else [number(v) for v in weights]
    penalty = [n * number(smoothing) / v for v in w]
    gamma = np.array([[number(0)] * y.shape[1]] * n, dtype=object)
    g = y.astype(object)
    if n > 2:
        gamma[1:-1] = _second_derivatives(y, t, penalty)
        for i in range(n):
            g[i] = y[i] - penalty[i] * _q_times(gamma, t, i)
    return np.array([_evaluate(g, gamma, t, number(p)) for p in points], dtype=object).reshape(
        len(points), y.shape[1]
    )


def _q_times(gamma: Any, t: Sequence[Any], i: int) -> Any:
    """Row i of Q gamma: the jump of the third derivative at knot i."""
    right = (gamma[i + 1] - gamma[i]) / (t[i + 1] - t[i]) if i + 1 < len(t) else 0
    left = (gamma[i] - gamma[i - 1]) / (t[i] - t[i - 1]) if i > 0 else 0
    return right - left


def _second_derivatives(y: Any, t: Sequence[Any], penalty: Sequence[Any]) -> Any:
    """Solve the pentadiagonal system by LDL'."""
    h = [b - a for a, b in itertools.pairwise(t)]
    size = len(t) - 2
    q = [(1 / h[i], -1 / h[i] - 1 / h[i + 1], 1 / h[i + 1]) for i in range(size)]
    main = [
        (h[i] + h[i + 1]) / 3 + sum(penalty[i + k] * q[i][k] ** 2 for k in range(3))
        for i in range(size)
    ]
    upper1 = [
        h[i + 1] / 6
        + penalty[i + 1] * q[i][1] * q[i + 1][0]
        + penalty[i + 2] * q[i][2] * q[i + 1][1]
        for i in range(size - 1)
    ]
    upper2 = [penalty[i + 2] * q[i][2] * q[i + 2][0] for i in range(size - 2)]
    d: list[Any] = []
    l1: list[Any] = []
    l2: list[Any] = []
    z: list[Any] = []
    for i in range(size):
        rhs = (y[i + 2] - y[i + 1]) / h[i + 1] - (y[i + 1] - y[i]) / h[i]
        pivot = main[i]
        if i > 0:
            pivot = pivot - l1[i - 1] ** 2 * d[i - 1]
            rhs = rhs - l1[i - 1] * z[i - 1]
        if i > 1:
            pivot = pivot - l2[i - 2] ** 2 * d[i - 2]
            rhs = rhs - l2[i - 2] * z[i - 2]
        d.append(pivot)
        z.append(rhs)
        if i + 1 < size:
            off = upper1[i] - (l1[i - 1] * l2[i - 1] * d[i - 1] if i > 0 else 0)
            l1.append(off / pivot)
        if i + 2 < size:
            l2.append(upper2[i] / pivot)
    gamma = [zi / di for zi, di in zip(z, d, strict=True)]
    for i in range(size - 2, -1, -1):
        gamma[i] = gamma[i] - l1[i] * gamma[i + 1]
        if i + 2 < size:
            gamma[i] = gamma[i] - l2[i] * gamma[i + 2]
    return np.array(gamma, dtype=object)


def _evaluate(g: Any, gamma: Any, t: Sequence[Any], point: Any) -> Any:
    n = len(t)
    if n == 1:
        return g[0]
    i = min(max(sum(1 for knot in t if knot <= point) - 1, 0), n - 2)
    h, left, right = t[i + 1] - t[i], point - t[i], t[i + 1] - point
    chord = (g[i + 1] - g[i]) / h
    if left < 0:
        return g[i] + left * (chord - h * (2 * gamma[i] + gamma[i + 1]) / 6)
    if right < 0:
        return g[i + 1] - right * (chord + h * (gamma[i] + 2 * gamma[i + 1]) / 6)
    bend = (1 + left / h) * gamma[i + 1] + (1 + right / h) * gamma[i]
    return g[i] + left * chord - left * right / 6 * bend
