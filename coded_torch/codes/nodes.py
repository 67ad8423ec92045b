r"""Families of points in [-1, 1], for the inputs and the workers of a :class:`CurveCode`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .._arguments import MOST_WORKERS, count

__all__ = ["chebyshev_first", "chebyshev_second"]


def chebyshev_first(num_points: int) -> NDArray[np.float64]:
    r"""Return the Chebyshev points of the first kind, the roots of :math:`T_n`, increasing.

    .. math:: \cos\frac{(2k - 1)\pi}{2n}, \qquad k = n, \dots, 1

    The points are ``[n]``, float64, strictly inside (-1, 1), and symmetric about 0 to the bit.
    ``num_points`` is n, from 1 to 65,536.
    """
    n = count("chebyshev_first", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / n)


def chebyshev_second(num_points: int) -> NDArray[np.float64]:
    r"""Return the Chebyshev points of the second kind, the extrema of :math:`T_{n-1}`, increasing.

    .. math:: \cos\frac{(k - 1)\pi}{n - 1}, \qquad k = n, \dots, 1

    As :func:`chebyshev_first`, but from -1 to 1; ``[0.]`` for n = 1.
    """
    n = count("chebyshev_second", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / max(n - 1, 1))


def _sines(quarter_turns: NDArray[np.float64]) -> NDArray[np.float64]:
    # Sines keep the digits that cosines lose near 0; averaging with the mirror image makes the
    # symmetry independent of how the mathematical library rounds.
    sines = np.sin(quarter_turns * (np.pi / 2))
    return (sines - sines[::-1]) / 2
