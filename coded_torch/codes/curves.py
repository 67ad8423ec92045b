r"""Codes of functions of a point: splines, rational interpolants and polynomials."""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev
from numpy.typing import ArrayLike

from .._arguments import MOST_WORKERS, count, nonnegative, real_array, shown
from ..linear import LinearMap, SplineMap
from ._base import FixedCode, Map
from ._suspects import WAVELENGTH, Floats, residual_operator

_GOLDEN = (5**0.5 - 1) / 2  # the golden ratio, less 1
# Decoder degrees to try, in degrees of the encoder. The results of a network are some times rougher
# than the coded inputs, of degree 1.
_DEGREES = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5)


def chebyshev_first(num_points: int) -> Floats:
    r"""Return the Chebyshev points of the first kind, the roots of :math:`T_n`, increasing.

    They are ``[n]``, float64, strictly inside (-1, 1), and symmetric about 0 to the bit.
    ``num_points`` is n, from 1 to 65,536.
    """
    n = count("chebyshev_first", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / n)


def chebyshev_second(num_points: int) -> Floats:
    r"""Return the Chebyshev points of the second kind, from -1 to 1; ``[0.]`` for n = 1."""
    n = count("chebyshev_second", "num_points", num_points, most=MOST_WORKERS)
    return _sines(np.arange(1 - n, n, 2) / max(n - 1, 1))


def _sines(quarter_turns: Floats) -> Floats:
    # Sines keep the digits that cosines lose near 0; averaging with the mirror image makes the
    # symmetry independent of how the mathematical library rounds.
    sines = np.sin(quarter_turns * (np.pi / 2))
    return (sines - sines[::-1]) / 2


class CurveCode(FixedCode):
    r"""A code of functions of a point: one through the inputs, another through the results.

    Input :math:`k` is the value at data point :math:`\alpha_k`. Worker :math:`n` receives
    its value at worker point :math:`\beta_n`. The decoder's function has the results for values at
    the received :math:`\beta_n`, or comes near; its values at the :math:`\alpha_k` are the answers.
    Subclasses implement ``_curve``, and ``_make_encoder`` if the encoder is another function.

    Args:
        num_data, num_workers, options: as for every :class:`Code`.
        data_points: ``[K]``, finite, strictly increasing. Defaults to :func:`chebyshev_first`.
        worker_points: ``[N]``, finite, strictly increasing. Defaults to :func:`chebyshev_second`,
            or to the class's own ``default_worker_points``.
    """

    default_worker_points = staticmethod(chebyshev_second)
    defends = True
    #: A curve has a value, a slope and a bend, which two results more would show to be wrong.
    num_unknowns = 3

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        data_points: ArrayLike | None = None,
        worker_points: ArrayLike | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        if data_points is None:
            data_points = chebyshev_first(self.num_data)
        if worker_points is None:
            worker_points = self.default_worker_points(self.num_workers)
        self.data_points = self._points("data_points", data_points, self.num_data)
        self.worker_points = self._points("worker_points", worker_points, self.num_workers)

    @abc.abstractmethod
    def _curve(self, nodes: Floats, points: Floats) -> Map:
        """Return the map from values at ``nodes`` to the function's values at ``points``."""

    def _make_encoder(self) -> Map:
        return self._curve(self.data_points, self.worker_points)

    def _make_decoder(self, received: tuple[int, ...]) -> Map:
        return self._curve(self.worker_points.take(received), self.data_points)

    def residual_operator(self, received: Sequence[int], wavelength: float = WAVELENGTH) -> Floats:
        """Return ``I - H`` of the smoother H by which wrong results are found, ``[|F|, |F|]``.

        It is a smoothing spline through the received worker points, whatever the decoder is. Bends
        within the distance of two points count as noise, if ``wavelength`` is the default.
        """
        nodes = self.worker_points.take([*received])
        smoothing = (wavelength / len(nodes)) ** 4
        return residual_operator(SplineMap(nodes, nodes, smoothing=smoothing).matrix().numpy())

    def _points(self, argument: str, points: ArrayLike, size: int) -> Floats:
        """Return finite, increasing points as an array that cannot be changed."""
        array = real_array(self, argument, points)
        increasing = array.shape == (size,) and (array[1:] > array[:-1]).all()
        if not (increasing and np.isfinite(array).all()):
            raise ValueError(
                f"{type(self).__name__}: {argument} must be finite and strictly increasing, of "
                f"shape ({size},), got {shown(array.tolist())}"
            )
        array.flags.writeable = False
        return array


class SplineCode(CurveCode):
    r"""Learning-theoretic coded computing (LeTCC): the code of two smoothing splines.

    Both functions are natural cubic smoothing splines. Any model can be coded. The answers are
    approximate, and one result is enough for some answer. With both smoothings tuned
    (:func:`~coded_torch.tune`) this is nested-regression coded computing, NeRCC.

    Args:
        encoder_smoothing: :math:`\lambda_e`, finite, at least 0, in the mean convention of
            :class:`~coded_torch.linear.SplineMap`. Defaults to 0.
        decoder_smoothing: :math:`\lambda_d`. The default of 0 is best for a model without noise.

    Note:
        Encoding costs :math:`O(K + N)` and decoding :math:`O(|F| + K)` per column. With S of N
        workers lost the mean squared error falls as :math:`O(S^3 N^{-3})`; with noisy results, at
        :math:`\lambda_d \sim (N - S)^{-4/5}`, as :math:`O(S^{8/5} N^{-3/5})`.

    References:
        Moradi, Tahmasebi and Maddah-Ali, *Coded Computing for Resilient Distributed Computing*,
        NeurIPS 2024, arXiv 2406.00300. Moradi and Maddah-Ali, *NeRCC*, arXiv 2402.04377.

    Example:
        >>> import torch
        >>> from coded_torch.codes import SplineCode
        >>> code = SplineCode(num_data=4, num_workers=16)
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        >>> results = code.encode(x).square()  # the results of sixteen workers
        >>> received = [n for n in range(16) if n not in (3, 7, 8)]
        >>> code.decode(results[received], received).round(decimals=2)
        tensor([ 1.0000,  4.0000,  9.0100, 16.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        encoder_smoothing: float = 0.0,
        decoder_smoothing: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        self.encoder_smoothing = nonnegative(self, "encoder_smoothing", encoder_smoothing)
        self.decoder_smoothing = nonnegative(self, "decoder_smoothing", decoder_smoothing)

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {
            "encoder_smoothing": (0.0, *(10.0**n for n in range(-7, 0))),
            "decoder_smoothing": (0.0, *(10.0**n for n in range(-9, 1))),
        }

    def _make_encoder(self) -> LinearMap:
        return SplineMap(self.data_points, self.worker_points, smoothing=self.encoder_smoothing)

    def _curve(self, nodes: Floats, points: Floats) -> LinearMap:
        return SplineMap(nodes, points, smoothing=self.decoder_smoothing)


class BerrutCode(CurveCode):
    r"""Berrut approximated coded computing (BACC): rational interpolants without poles, both ways.

    .. math:: u(z) = \sum_j \frac{w_j}{z - t_j} y_j \Big/ \sum_j \frac{w_j}{z - t_j},
              \qquad w_j = (-1)^j

    where :math:`j` is the position among the nodes *in use*: the decoder's signs alternate over the
    received workers in order. Signs by the workers' own indices would put poles between them.

    Any one result can be decoded. Planning a decoder costs :math:`O(|F| K)`. With
    ``worker_points=chebyshev_first(num_workers)`` this is the code of SBACC, arXiv 2507.01330.

    Reference:
        T. Jahani-Nezhad, M. A. Maddah-Ali, *Berrut approximated coded computing: straggler
        resistance beyond polynomial computing*, arXiv 2009.08327.

    Example:
        >>> import torch
        >>> from coded_torch.codes import BerrutCode
        >>> code = BerrutCode(num_data=2, num_workers=8)
        >>> coded = code.encode(torch.tensor([1.0, 2.0]))
        >>> code.decode(coded[:7], received=range(7)).round(decimals=1)
        tensor([1.1000, 2.0000])
    """

    order = 0

    def _curve(self, nodes: Floats, points: Floats) -> Floats:
        weights = _weights(nodes, min(self.order, len(nodes) - 1))
        return _interpolation_matrix(nodes, weights, points)


class FloaterHormannCode(BerrutCode):
    r"""The code of Floater-Hormann interpolants, which reproduce polynomials of degree ``order``.

    They are Berrut's with other weights: blends of polynomials through ``order + 1`` neighbours.
    Planning a decoder costs :math:`O(|F| (K + d^2))`.

    Args:
        order: d, at most ``num_data - 1``, or 1; 0 is Berrut's interpolant. If only
            n <= d points are in use, the order is n - 1. Defaults to 1.

    Reference:
        M. S. Floater, K. Hormann, *Barycentric rational interpolation with no poles and high rates
        of approximation*, Numer. Math. 107 (2007).
    """

    def __init__(self, num_data: int, num_workers: int, *, order: int = 1, **options: Any) -> None:
        super().__init__(num_data, num_workers, **options)
        self.order = count(self, "order", order, 0, max(1, self.num_data - 1))

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {"order": range(min(4, self.num_data))}


def _weights(nodes: Floats, order: int) -> Floats:
    r"""Return the barycentric weights of increasing ``nodes [n]``, for d in ``0 .. n - 1``.

    .. math:: w_j = (-1)^j \sum_i \prod_{l = i, l \ne j}^{i + d} \frac{1}{|t_j - t_l|}

    over the windows :math:`i, \dots, i + d` that contain :math:`j`; equation 18 of the paper.
    """
    n = len(nodes)
    width = order + 1
    signs = np.where(np.arange(n) % 2, -1.0, 1.0)
    if order == 0:
        return signs
    # On an interval of length 4 the products neither overflow nor underflow as the order grows.
    windows = np.lib.stride_tricks.sliding_window_view(nodes * (4 / (nodes[-1] - nodes[0])), width)
    distances = np.abs(windows[:, :, None] - windows[:, None, :])
    distances[:, range(width), range(width)] = 1
    terms = 1 / distances.prod(axis=-1)  # [windows, d + 1]
    weights = np.zeros(n)
    for place in range(width):
        weights[place : place + n - order] += terms[:, place]
    return signs * weights


def _interpolation_matrix(nodes: Floats, weights: Floats, points: Floats) -> Floats:
    """Return the matrix ``[N, n]``, whose rows sum to 1, from values at nodes to points."""
    offsets = points[:, None] - nodes
    nearest = np.abs(offsets).min(axis=1, keepdims=True)
    # 1 / offset, relative to the nearest node, so that no offset is too small to divide by. If the
    # nearest offset is 0, that node alone counts.
    ratios = np.divide(nearest, offsets, out=(offsets == 0).astype(np.float64), where=nearest > 0)
    terms = weights * ratios
    matrix: Floats = terms / terms.sum(axis=1, keepdims=True)
    return matrix


class LagrangeCode(CurveCode):
    r"""Lagrange coded computing over the reals: exact for polynomial models.

    The encoder is the polynomial of degree K - 1 through the inputs. If the model is a polynomial
    of ``degree``, the results lie on one of degree :math:`D = (K - 1)\,\mathrm{degree}`. The
    decoder recovers it by interpolation from D + 1 results, from more by least squares

    .. math:: \min_{p \in \mathcal{P}_D} \sum_{v \in F} (p(\beta_v) - y_v)^2

    Args:
        num_data, num_workers, options: as for :class:`CurveCode`; N is at least D + 1. All points
            default to :func:`~coded_torch.codes.curves.chebyshev_first`.
        degree: the degree of the model as a polynomial, at least 1. Defaults to 1, a linear model.
        decoder_degree: D, tuned on validation data for other models. Defaults to that of a degree.

    Note:
        Planning a decoder costs :math:`O(|F|\, D\, (D + K))`. The error of an exact recovery is the
        rounding error of the results times the norm of the decoder, which grows exponentially with
        the number of neighbours that are missing.

    Reference:
        Yu et al., arXiv 1806.00939; in floating point: Fahim and Cadambe, arXiv 1903.08326.

    Example:
        >>> import torch
        >>> from coded_torch.codes import LagrangeCode
        >>> code = LagrangeCode(num_data=3, num_workers=8, degree=2)
        >>> results = code.encode(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) ** 2
        >>> code.decode(results[2:7], received=range(2, 7)).round(decimals=9)
        tensor([1., 4., 9.], dtype=torch.float64)
    """

    default_worker_points = staticmethod(chebyshev_first)
    num_unknowns = 0  # ``min_received`` results determine the polynomial

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        degree: int | None = None,
        decoder_degree: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        if decoder_degree is None:
            if degree is None:
                degree = 1
            degree = count(self, "degree", degree, most=MOST_WORKERS)
            self.decoder_degree = (self.num_data - 1) * degree
        else:
            self.decoder_degree = count(self, "decoder_degree", decoder_degree, 0, MOST_WORKERS)
        self.is_exact = decoder_degree is None
        least = self.min_received
        if self.num_workers < least:
            raise ValueError(
                f"{type(self).__name__}: num_workers must be at least {least} for polynomials of "
                f"degree {least - 1}, got {shown(self.num_workers)}"
            )

    def candidates(self) -> dict[str, Sequence[Any]]:
        if self._given.get("degree") is not None:  # the model is a polynomial, so D is known
            return {}
        degrees = {round(times * (self.num_data - 1)) for times in _DEGREES}
        return {"decoder_degree": sorted(d for d in degrees if d < self.num_workers)}

    @property
    def min_received(self) -> int:
        """D + 1, the number of results that determine a polynomial of degree D."""
        return self.decoder_degree + 1

    def residual_operator(self, received: Sequence[int], wavelength: float = WAVELENGTH) -> Floats:
        """Return ``I - H`` for the polynomial that the results lie on, if the model is one.

        With a ``decoder_degree`` for other models, results lie near a smooth curve.
        """
        if not self.is_exact:
            return super().residual_operator(received, wavelength)
        nodes = self.worker_points.take([*received])
        return residual_operator(_least_squares(nodes, nodes, self.decoder_degree))

    def _make_encoder(self) -> Floats:
        return _through(self.data_points, self.worker_points)

    def _curve(self, nodes: Floats, points: Floats) -> Floats:
        if len(nodes) == self.min_received:
            return _through(nodes, points)
        return _least_squares(nodes, points, self.decoder_degree)


def _through(nodes: Floats, points: Floats) -> Floats:
    # Lagrange's products keep every entry to a few units in the last place, even where the
    # polynomial is extrapolated; there the sum in the barycentric form cancels, down to an exact 0.
    # Golden-ratio steps through the nodes keep partial products moderate.
    matrix = np.ones((len(points), len(nodes)))
    for i in np.argsort(np.arange(len(nodes)) * _GOLDEN % 1):
        distances = nodes - nodes[i]
        distances[i] = 1
        factors = (points - nodes[i])[:, None] / distances
        factors[:, i] = 1
        matrix *= factors
    return matrix


def _least_squares(nodes: Floats, points: Floats, degree: int) -> Floats:
    """Return the matrix of the least-squares polynomial of a degree, ``[N, n]``."""
    # Chebyshev polynomials of the nodes' own interval: on any other they are nearly dependent.
    centre = (nodes[0] + nodes[-1]) / 2
    half = (nodes[-1] - nodes[0]) / 2
    at_nodes = chebyshev.chebvander((nodes - centre) / half, degree)  # [n, D + 1]
    at_points = chebyshev.chebvander((points - centre) / half, degree)  # [N, D + 1]
    q, r = np.linalg.qr(at_nodes)
    # The transpose of q @ inverse(r.T) @ at_points.T, whose columns are backward stable.
    matrix: Floats = (q @ np.linalg.solve(r.T, at_points.T)).T
    return matrix
