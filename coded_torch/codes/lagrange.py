r"""Lagrange's polynomial code (LCC), in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.polynomial import chebyshev

from .._arguments import MOST_WORKERS, count, shown
from .nodes import CurveCode, chebyshev_first

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from .nodes import CurveOptions

__all__ = ["LagrangeCode"]

_GOLDEN = (5**0.5 - 1) / 2  # the golden ratio, less 1

# Decoder degrees to try, in degrees of the encoder. The results of a network are some times rougher
# than the coded inputs, of degree 1.
_DEGREES = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5)


class LagrangeCode(CurveCode):
    r"""Lagrange coded computing over the reals: exact for polynomial models.

    The encoder is the polynomial of degree K - 1 through the inputs. If the model is a polynomial
    of ``degree``, the results lie on one of degree :math:`D = (K - 1)\,\mathrm{degree}`. The
    decoder recovers it by interpolation from D + 1 results, from more by least squares

    .. math:: \min_{p \in \mathcal{P}_D} \sum_{v \in F} (p(\beta_v) - y_v)^2

    For other models give ``decoder_degree``, D itself, which is tuned on validation data (the
    adapted code).

    Args:
        num_data: K.
        num_workers: N, at least D + 1.
        degree: the degree of the model as a polynomial, at least 1. Defaults to 1, a linear model.
        decoder_degree: D, at least 0; excludes ``degree``.
        options: as for every :class:`~coded_torch.codes.CurveCode`. All points default to
            :func:`~coded_torch.codes.nodes.chebyshev_first`.

    Raises:
        TypeError: a degree is not an integer.
        ValueError: a degree is out of range, both degrees are given, or N workers can never return
            D + 1 results.

    Note:
        :attr:`min_received` is D + 1. Planning a decoder costs :math:`O(|F|\, D\, (D + K))`.
        The error of an exact recovery is the rounding error of the results times the norm of the
        decoder. This norm grows exponentially with the number of neighbours that are missing. For a
        cubic, K = 5 and 13 of 20 results, it is below 1e5 for 99 % of the received sets. It is 4e7
        if the 7 outermost workers on one side are missing.

    Reference:
        Q. Yu et al., *Lagrange coded computing*, arXiv 1806.00939; in floating point: M. Fahim,
        V. R. Cadambe, *Numerically stable polynomially coded computing*, arXiv 1903.08326.

    Example:
        >>> import torch
        >>> from coded_torch.codes import LagrangeCode
        >>> code = LagrangeCode(num_data=3, num_workers=8, degree=2)
        >>> results = code.encode(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) ** 2
        >>> code.decode(results[2:7], received=range(2, 7)).round(decimals=9)
        tensor([1., 4., 9.], dtype=torch.float64)
    """

    default_worker_points = staticmethod(chebyshev_first)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        degree: int | None = None,
        decoder_degree: int | None = None,
        **options: Unpack[CurveOptions],
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        if decoder_degree is None:
            degree = count(self, "degree", 1 if degree is None else degree, most=MOST_WORKERS)
            self.decoder_degree = (self.num_data - 1) * degree
        elif degree is None:
            self.decoder_degree = count(self, "decoder_degree", decoder_degree, 0, MOST_WORKERS)
        else:
            raise ValueError(
                "LagrangeCode: degree and decoder_degree exclude each other, "
                f"got {shown(degree)} and {shown(decoder_degree)}"
            )
        if self.num_workers < self.min_received:
            raise ValueError(
                f"LagrangeCode: num_workers must be at least {self.min_received} to recover a "
                f"polynomial of degree {self.decoder_degree}, got {self.num_workers}"
            )

    def candidates(self) -> dict[str, Sequence[Any]]:
        """Return degrees for a model that is no polynomial; for others D is known."""
        if "degree" in self._arguments():
            return {}
        degrees = {round(times * (self.num_data - 1)) for times in _DEGREES}
        return {"decoder_degree": sorted(d for d in degrees if d < self.num_workers)}

    @property
    def min_received(self) -> int:
        """D + 1, the number of results that determine a polynomial of degree D."""
        return self.decoder_degree + 1

    def _make_encoder(self) -> NDArray[np.float64]:
        return _through(self.data_points, self.worker_points)

    def _curve(
        self, nodes: NDArray[np.float64], points: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        if nodes.shape[-1] == self.min_received:
            return _through(nodes, points)
        return _least_squares(nodes, points, self.decoder_degree)

    def _decoder_matrices(self, received: NDArray[np.int64]) -> NDArray[np.float64]:
        return self._curve(self.worker_points[received], self.data_points)


def _through(nodes: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix of the polynomial through all nodes ``[..., n]``, ``[..., N, n]``."""
    # Lagrange's products keep every entry to a few units in the last place, even where the
    # polynomial is extrapolated; there the sum in the barycentric form cancels, down to an exact 0.
    # Golden-ratio steps through the nodes keep partial products moderate.
    matrix = np.ones((*nodes.shape[:-1], points.size, nodes.shape[-1]))
    for i in np.argsort(np.arange(nodes.shape[-1]) * _GOLDEN % 1):
        node = nodes[..., i : i + 1]
        distances = nodes - node
        distances[..., i] = 1
        factors = (points - node)[..., None] / distances[..., None, :]
        factors[..., i] = 1
        matrix *= factors
    return matrix


def _least_squares(
    nodes: NDArray[np.float64], points: NDArray[np.float64], degree: int
) -> NDArray[np.float64]:
    """Return the matrix of the least-squares polynomial of a degree, ``[..., N, n]``."""
    # Chebyshev polynomials of the nodes' own interval: on any other they are nearly dependent.
    first, last = nodes[..., :1], nodes[..., -1:]
    centre, half = (first + last) / 2, (last - first) / 2
    at_nodes = chebyshev.chebvander((nodes - centre) / half, degree)  # [..., n, D + 1]
    at_points = chebyshev.chebvander((points - centre) / half, degree)  # [..., N, D + 1]
    q, r = np.linalg.qr(at_nodes)
    # The transpose of q @ inverse(r.T) @ at_points.T, whose columns are backward stable.
    solved = np.linalg.solve(r.swapaxes(-1, -2), at_points.swapaxes(-1, -2))
    matrix: NDArray[np.float64] = (q @ solved).swapaxes(-1, -2)
    return matrix
