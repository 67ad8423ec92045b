r"""The paper's code: a smoothing spline through the inputs, another through the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ..linear import LinearMap, MatrixMap, SplineMap, accumulation_dtype, check_smoothing
from ..points import chebyshev_first, chebyshev_second
from .base import CurveCode

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["SplineCode"]

# What generalised cross-validation chooses from, in cubes of half the length of the curve: half a
# decade apart, where the error changes by 1 %, from next to interpolation to next to a line.
_GRID = np.concatenate([[0.0], np.logspace(-12, 2, 29)])


class SplineCode(CurveCode):
    r"""Letting splines code: LeTCC, the learning-theoretic coded computing scheme.

    The encoder is the natural cubic smoothing spline through the inputs :math:`x_k` at the data
    points :math:`\alpha_k`, read off at the worker points :math:`\beta_n`; the decoder is the one
    through the received results :math:`f(u(\beta_n))`, read off at the :math:`\alpha_k`. Any model
    can be coded; the answers are approximate, and one result is enough for some answer.

    Args:
        num_data: K, at least 1.
        num_workers: N, at least 1.
        encoder_smoothing: :math:`\lambda_e`, finite, at least 0, in the mean convention of
            :class:`~coded_torch.linear.SplineMap`.
        decoder_smoothing: :math:`\lambda_d`, likewise. 0 is best for a model without noise. "gcv"
            chooses it anew for the results of every batch, by generalised cross-validation:

            .. math:: \min_\lambda \frac{\lVert (I - A_\lambda) Y \rVert^2 / |F|}
                      {(1 - \operatorname{tr} A_\lambda / |F|)^2},

            :math:`A_\lambda` being the smoother at the received points, over all columns Y at once.
        data_points: ``[K]``, finite, strictly increasing; Chebyshev points of the first kind.
        worker_points: ``[N]``, likewise; Chebyshev points of the second kind.

    Raises:
        TypeError, ValueError: an argument violates its requirement.

    Note:
        Encoding costs :math:`O(K + N)` and decoding :math:`O(|F| + K)` per column. With S of N
        workers lost the mean squared error falls as :math:`O(S^3 N^{-3})`; with noisy results, at
        :math:`\lambda_d \sim (N - S)^{-4/5}`, as :math:`O(S^{8/5} N^{-3/5})`.

        With "gcv", :math:`O(|F|^2)` more per column, and :math:`O(|F|^3)` once per received set.
        The choice is a function of the results alone, gradients do not pass through it, and it
        waits for the device. Decoding is then not linear: ``decoder(received)`` can be applied,
        but has no matrix and no adjoint.

    References:
        Moradi, Tahmasebi and Maddah-Ali, *Coded Computing for Resilient Distributed Computing: A
        Learning-Theoretic Framework*, NeurIPS 2024, arXiv 2406.00300. Craven and Wahba,
        *Smoothing noisy data with spline functions*, Numer. Math. 31, 1979, for "gcv".

    Example:
        >>> import torch
        >>> from coded_torch.codes import SplineCode
        >>> code = SplineCode(num_data=4, num_workers=16)
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        >>> results = code.encode(x).square()  # what sixteen workers answer
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
        decoder_smoothing: float | Literal["gcv"] = 0.0,
        data_points: ArrayLike | None = None,
        worker_points: ArrayLike | None = None,
    ) -> None:
        super().__init__(
            num_data,
            num_workers,
            chebyshev_first(num_data) if data_points is None else data_points,
            chebyshev_second(num_workers) if worker_points is None else worker_points,
        )
        self.encoder_smoothing = check_smoothing("SplineCode: encoder_smoothing", encoder_smoothing)
        self.decoder_smoothing: float | Literal["gcv"] = "gcv"
        if not (isinstance(decoder_smoothing, str) and decoder_smoothing == "gcv"):
            self.decoder_smoothing = check_smoothing(
                "SplineCode: decoder_smoothing", decoder_smoothing
            )

    def _make_encoder(self) -> LinearMap:
        return SplineMap(self.data_points, self.worker_points, smoothing=self.encoder_smoothing)

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        knots = self.worker_points[list(received)]
        if self.decoder_smoothing == "gcv":
            return _CrossValidated(knots, self.data_points)
        return SplineMap(knots, self.data_points, smoothing=self.decoder_smoothing)


class _CrossValidated(LinearMap):
    r"""A spline map whose smoothing is chosen by the values: linear for each choice only.

    In the eigenbasis of the smoothers, the same for all smoothings, one with eigenvalues
    :math:`1 / (1 + \lambda p_i)` leaves the share :math:`\lambda r_i`,
    :math:`r_i = p_i / (1 + \lambda p_i)`, of component i as its residual. The criterion, up to a
    constant, is :math:`\sum_i r_i^2 |y_i|^2 / (\sum_i r_i)^2`; so written, it holds in the limit of
    interpolation too.
    """

    def __init__(self, knots: NDArray[np.float64], points: NDArray[np.float64]) -> None:
        super().__init__(len(knots), len(points))
        self._knots, self._points = knots, points
        self._curves: dict[float, SplineMap] = {}
        # Three results leave no choice: the criterion is the same for every smoothing.
        self._grid = _GRID[: 1 if len(knots) < 4 else None] * (np.ptp(knots) / 2) ** 3
        middle = 1e-5 * (np.ptp(knots) / 2) ** 3 or 1.0
        smoother = SplineMap(knots, knots, smoothing=middle).matrix()
        shares, basis = np.linalg.eigh((smoother + smoother.T).numpy() / 2)
        penalties = (1 / shares.clip(np.finfo(float).eps, 1) - 1) / middle
        penalties[-2:] = 0  # straight lines
        residuals = penalties / (1 + self._grid[:, None] * penalties)  # [L, F]
        total = residuals.sum(1, keepdims=True)
        self._criterion = np.divide(residuals, total, where=total > 0, out=residuals) ** 2
        self._components = MatrixMap(basis.T)

    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        if transpose:
            raise self._not_linear("adjoint")
        return self._curve(self._choose(values.detach()))._apply(values, transpose=False)

    def _choose(self, values: Tensor) -> float:
        values = values.to(accumulation_dtype(values.dtype))
        # The choice is the same at every scale, and squares neither overflow nor underflow at this.
        largest = values.abs().amax() if values.numel() else values.new_ones(())
        components = self._components(values / largest.masked_fill(largest == 0, 1))
        energies = components.square().sum((1, 2), dtype=torch.float64).cpu().numpy()
        return float(self._grid[(self._criterion @ energies).argmin()])

    def _curve(self, smoothing: float) -> SplineMap:
        if smoothing not in self._curves:
            self._curves[smoothing] = SplineMap(self._knots, self._points, smoothing=smoothing)
        return self._curves[smoothing]

    def matrix(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        raise self._not_linear("matrix")

    def _not_linear(self, what: str) -> ValueError:
        return ValueError(
            f"SplineCode: decoder_smoothing must be a number for a decoder with {what}, "
            "got 'gcv', which depends on the results; apply the decoder to them instead"
        )
