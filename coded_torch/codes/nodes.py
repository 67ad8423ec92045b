r"""Codes whose inputs and workers have points on a line, and families of points in [-1, 1]."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import MOST_WORKERS, count, real_array
from .base import FixedCode, Options

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from typing_extensions import Unpack

    from .base import Map

__all__ = ["CurveCode", "chebyshev_first", "chebyshev_second", "equidistant", "systematic"]

_TIE = 1e-9  # the relative difference of gaps that differ by rounding only


def chebyshev_first(num_points: int) -> NDArray[np.float64]:
    r"""Return the Chebyshev points of the first kind, the roots of :math:`T_n`, increasing.

    .. math:: \cos\frac{(2k - 1)\pi}{2n}, \qquad k = n, \dots, 1

    Args:
        num_points: n, from 1 to 65,536.

    Returns:
        ``[n]``, float64, strictly inside (-1, 1), symmetric about 0 to the bit.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.chebyshev_first(3).round(3).tolist()
        [-0.866, 0.0, 0.866]
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


def equidistant(num_points: int) -> NDArray[np.float64]:
    r"""Return the midpoints of n equal cells of [-1, 1], :math:`(2k - 1 - n) / n`.

    As :func:`chebyshev_first`. Of two such sets the larger reaches further out on both sides. If
    there are more workers than data, no answer is extrapolated because one outermost worker is
    late.
    """
    n = count("equidistant", "num_points", num_points, most=MOST_WORKERS)
    return np.arange(1 - n, n, 2) / n


def systematic(data_points: ArrayLike, num_points: int) -> NDArray[np.float64]:
    r"""Return worker points that contain every data point; the others split the largest gaps.

    A worker at a data point computes an uncoded input, so its answer is exact. Where fewer points
    are left than gaps tie for the largest, they are spread evenly over those gaps. No point lies
    outside the data, where a coded input would be extrapolated.

    Args:
        data_points: ``[K]``, strictly increasing within [-1, 1].
        num_points: N, from K to 65,536; equal to K if K is 1, which leaves no gap to split.

    Returns:
        ``[N]``, float64, strictly increasing, the data points in it to the bit.

    Example:
        >>> from coded_torch.codes import nodes
        >>> nodes.systematic([-0.5, 0.0, 0.5], 5).tolist()
        [-0.5, -0.25, 0.0, 0.25, 0.5]
    """
    data = real_array("systematic", "data_points", data_points)
    increasing = data.ndim == 1 and data.size and (np.diff(data) > 0).all()
    if not (increasing and (np.abs(data) <= 1).all()):
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


class CurveOptions(Options, total=False):
    """The keyword arguments that every code with points takes."""

    data_points: ArrayLike | None
    worker_points: ArrayLike | None


class CurveCode(FixedCode):
    r"""A code of functions of a point: one through the inputs, another through the results.

    Input :math:`k` is the value at data point :math:`\alpha_k`. Worker :math:`n` receives
    its value at worker point :math:`\beta_n`. The decoder's function has the results for values at
    the received :math:`\beta_n`, or comes near; its values at the :math:`\alpha_k` are the answers.
    Subclasses implement ``_make_encoder`` and ``_curve``.

    Args:
        num_data, num_workers, options: as for every :class:`Code`.
        data_points: ``[K]``, finite, strictly increasing. Defaults to :func:`chebyshev_first`.
        worker_points: ``[N]``, finite, strictly increasing. Defaults to :func:`chebyshev_second`,
            or to the class's own ``default_worker_points``.
    """

    default_worker_points = staticmethod(chebyshev_second)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
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
    def _curve(self, nodes: NDArray[np.float64], points: NDArray[np.float64]) -> Map:
        """Return a decoder, from results at ``nodes`` to answers at ``points``."""

    def _make_decoder(self, received: tuple[int, ...]) -> Map:
        return self._curve(self.worker_points[list(received)], self.data_points)

    def _points(self, argument: str, points: ArrayLike, size: int) -> NDArray[np.float64]:
        array = real_array(self, argument, points)
        if array.shape != (size,):
            raise ValueError(
                f"{type(self).__name__}: {argument} must have shape ({size},), got {array.shape}"
            )
        if not (np.isfinite(array).all() and (np.diff(array) > 0).all()):  # negated: NaN fails
            raise ValueError(
                f"{type(self).__name__}: {argument} must be finite and strictly increasing, "
                f"got {array.tolist()}"
            )
        array.flags.writeable = False
        return array

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in {"data_points", "worker_points"} & state.keys():
            getattr(self, name).flags.writeable = False
