r"""Data points and worker points: where inputs and workers sit on the curve, within [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._arguments import MOST_WORKERS, count, real_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "chebyshev_first",
    "chebyshev_second",
    "equidistant",
    "systematic",
]

# Gaps this close to each other differ by rounding only.
_TIE = 1e-9


def chebyshev_first(num_points: int) -> NDArray[np.float64]:
    r"""The Chebyshev points of the first kind, the roots of :math:`T_n`, in increasing order.

    .. math:: \cos\frac{(2k - 1)\pi}{2n}, \qquad k = n, \dots, 1

    Args:
        num_points: n, from 1 to 65,536.

    Returns:
        ``[n]``, float64, strictly inside (-1, 1), symmetric about 0 to the bit.

    Raises:
        TypeError: ``num_points`` is not an integer.
        ValueError: ``num_points`` is out of its range.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.chebyshev_first(3).round(3).tolist()
        [-0.866, 0.0, 0.866]
    """
    n = count("chebyshev_first", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / n)


def chebyshev_second(num_points: int) -> NDArray[np.float64]:
    r"""The Chebyshev points of the second kind, the extrema of :math:`T_{n-1}`, increasing.

    .. math:: \cos\frac{(k - 1)\pi}{n - 1}, \qquad k = n, \dots, 1

    Args:
        num_points: n, from 1 to 65,536.

    Returns:
        ``[n]``, float64, from -1 to 1, symmetric about 0 to the bit; ``[0.]`` for n = 1.

    Raises:
        TypeError: ``num_points`` is not an integer.
        ValueError: ``num_points`` is out of its range.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.chebyshev_second(5).round(3).tolist()
        [-1.0, -0.707, 0.0, 0.707, 1.0]
    """
    n = count("chebyshev_second", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / max(n - 1, 1))


def equidistant(num_points: int) -> NDArray[np.float64]:
    r"""The midpoints of n equal cells of [-1, 1].

    .. math:: \frac{2k - 1 - n}{n}, \qquad k = 1, \dots, n

    Midpoints and not a grid with both ends: the theory asks for points inside (-1, 1), and of two
    such sets the larger reaches further out on both sides, so that with more workers than data no
    answer is extrapolated because one outermost worker is late.

    Args:
        num_points: n, from 1 to 65,536.

    Returns:
        ``[n]``, float64, strictly inside (-1, 1), symmetric about 0 to the bit.

    Raises:
        TypeError: ``num_points`` is not an integer.
        ValueError: ``num_points`` is out of its range.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.equidistant(4).tolist()
        [-0.75, -0.25, 0.25, 0.75]
    """
    n = count("equidistant", "num_points", num_points, most=MOST_WORKERS)
    return np.arange(1 - n, n, 2) / n


def systematic(data_points: ArrayLike, num_points: int) -> NDArray[np.float64]:
    r"""Worker points that contain every data point; the others split the largest gaps evenly.

    A worker at a data point computes an uncoded input, so its answer is exact. Where fewer points
    are left than gaps tie for the largest, they are spread evenly over those gaps. No point lies
    outside the data, where a coded input would be extrapolated.

    Args:
        data_points: ``[K]``, strictly increasing within [-1, 1].
        num_points: N, from K to 65,536; equal to K if K is 1, which leaves no gap to split.

    Returns:
        ``[N]``, float64, strictly increasing, the data points in it to the bit.

    Raises:
        TypeError: ``num_points`` is not an integer, or ``data_points`` not real.
        ValueError: ``data_points`` is not a strictly increasing vector within [-1, 1], or
            ``num_points`` is out of its range.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.systematic([-0.5, 0.0, 0.5], 5).tolist()
        [-0.5, -0.25, 0.0, 0.25, 0.5]
    """
    data = real_array("systematic", "data_points", data_points)
    # Negated, so that NaN fails.
    if (
        data.ndim != 1
        or not data.size
        or not (np.all(np.abs(data) <= 1) and np.all(np.diff(data) > 0))
    ):
        raise ValueError(
            "systematic: data_points must be a strictly increasing vector within [-1, 1], "
            f"got {data.tolist()}"
        )
    extra = count("systematic", "num_points", num_points, data.size, MOST_WORKERS) - data.size
    gaps = np.diff(data)
    if extra and not gaps.size:
        raise ValueError(f"systematic: num_points must be 1 for one data point, got {num_points}")
    parts = np.ones(gaps.size, dtype=np.int64)
    while extra:
        widths = gaps / parts
        ties = np.flatnonzero(widths >= widths.max() * (1 - _TIE))
        taken = min(extra, ties.size)
        parts[ties[(2 * np.arange(taken) + 1) * ties.size // (2 * taken)]] += 1
        extra -= taken
    ends = zip(data[:-1], data[1:], parts, strict=True)
    pieces = [np.linspace(start, stop, num, endpoint=False) for start, stop, num in ends]
    return np.concatenate([*pieces, data[-1:]])


def _sines(quarter_turns: NDArray[np.float64]) -> NDArray[np.float64]:
    # Sines keep the digits that cosines lose near 0; averaging with the mirror image makes the
    # symmetry independent of how the mathematical library rounds.
    sines = np.sin(quarter_turns * (np.pi / 2))
    return (sines - sines[::-1]) / 2
