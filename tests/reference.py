r"""A slow twin of the spline kernels, in plain numpy: what the tests measure against."""

import numpy as np


def smoothing_spline(values, knots, points, *, smoothing=0.0, weights=None, number=float):
    r"""The natural cubic smoothing spline in its textbook form, in any kind of number.

    Solves the pentadiagonal system :math:`(R + Q^T L Q) \gamma = Q^T y` for the second derivatives
    :math:`\gamma` at the knots, then :math:`g = y - L Q \gamma` (Reinsch, *Smoothing by spline
    functions*, Numer. Math. 10, 1967). Its condition grows like :math:`n^4 \lambda`, so ``number``
    should be ``mpmath.mpf`` or ``fractions.Fraction`` for all but small problems.
    """
    exact = np.frompyfunc(number, 1, 1)
    y, t, points = (exact(np.asarray(x, dtype=object)) for x in (values, knots, points))
    n, h = len(t), np.diff(t)
    penalty = n * number(smoothing) / exact(np.ones(n) if weights is None else np.asarray(weights))
    gamma, size = y * 0, n - 2
    if size > 0:
        q = np.stack([1 / h[:-1], -1 / h[:-1] - 1 / h[1:], 1 / h[1:]])  # the rows of Q^T
        p = np.stack([penalty[k : k + size] for k in range(3)])
        bands = [(h[:-1] + h[1:]) / 3 + (p * q * q).sum(0)]
        bands += [h[1:-1] / 6 + (p[1:, :-1] * q[1:, :-1] * q[:-1, 1:]).sum(0)]
        bands += [p[2, :-2] * q[2, :-2] * q[0, 2:]]
        jumps = np.diff(np.diff(y, axis=0) / h[:, None], axis=0)
        gamma[1:-1] = _solved(*bands, jumps)
    slopes = np.diff(gamma, axis=0) / h[:, None]
    zero = gamma[:1] * 0
    g = y - penalty[:, None] * np.diff(np.concatenate([zero, slopes, zero]), axis=0)
    return np.stack([_evaluate(g, gamma, t, point) for point in points])


def _solved(main, upper1, upper2, right):
    """Solve a symmetric pentadiagonal system by elimination."""
    bands, x = [[*main], [*upper1], [*upper2]], [*right]
    for i in range(len(x)):
        for k in (1, 2):
            if i + k < len(x):
                factor = bands[k][i] / bands[0][i]
                bands[0][i + k] -= factor * bands[k][i]
                x[i + k] = x[i + k] - factor * x[i]
                if k == 1 and i + 2 < len(x):
                    bands[1][i + 1] -= factor * bands[2][i]
    for i in reversed(range(len(x))):
        for k in (1, 2):
            if i + k < len(x):
                x[i] = x[i] - bands[k][i] * x[i + k]
        x[i] = x[i] / bands[0][i]
    return x


def _evaluate(g, gamma, t, point):
    n = len(t)
    if n == 1:
        return g[0]
    i = min(max(int((t <= point).sum()) - 1, 0), n - 2)
    h, left, right = t[i + 1] - t[i], point - t[i], t[i + 1] - point
    chord = (g[i + 1] - g[i]) / h
    if left < 0:
        return g[i] + left * (chord - h * (2 * gamma[i] + gamma[i + 1]) / 6)
    if right < 0:
        return g[i + 1] - right * (chord + h * (gamma[i] + 2 * gamma[i + 1]) / 6)
    bend = (1 + left / h) * gamma[i + 1] + (1 + right / h) * gamma[i]
    return g[i] + left * chord - left * right / 6 * bend
