r"""The paper's code: a smoothing spline through the inputs, another through the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._arguments import smoothing
from ..linear import LinearMap, SplineMap
from ..linear.spline import spline_matrices
from .nodes import CurveCode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from typing_extensions import Unpack

    from .nodes import CurveOptions

__all__ = ["SplineCode"]


class SplineCode(CurveCode):
    r"""Learning-theoretic coded computing (LeTCC): the code of two smoothing splines.

    The encoder is the natural cubic smoothing spline through the inputs :math:`x_k` at the data
    points :math:`\alpha_k`. Its values at the worker points :math:`\beta_n` are the coded inputs.
    The decoder is the spline through the received results :math:`f(u(\beta_n))`, and its values at
    the :math:`\alpha_k` are the answers. Any model can be coded. The answers are approximate, and
    one result is enough for some answer.

    With both smoothings tuned together (:func:`~coded_torch.tune`) this is NeRCC, nested-regression
    coded computing.

    Args:
        num_data, num_workers, options: as for :class:`~coded_torch.codes.CurveCode`.
        encoder_smoothing: :math:`\lambda_e`, finite, at least 0, in the mean convention of
            :class:`~coded_torch.linear.SplineMap`. Defaults to 0.
        decoder_smoothing: :math:`\lambda_d`, in the same convention. 0, the default, is best for a
            model without noise.

    Raises:
        TypeError, ValueError: an argument violates its requirement.

    Note:
        Encoding costs :math:`O(K + N)` and decoding :math:`O(|F| + K)` per column. With S of N
        workers lost the mean squared error falls as :math:`O(S^3 N^{-3})`; with noisy results, at
        :math:`\lambda_d \sim (N - S)^{-4/5}`, as :math:`O(S^{8/5} N^{-3/5})`.

    References:
        Moradi, Tahmasebi and Maddah-Ali, *Coded Computing for Resilient Distributed Computing: A
        Learning-Theoretic Framework*, NeurIPS 2024, arXiv 2406.00300. Moradi and Maddah-Ali,
        *NeRCC*, arXiv 2402.04377.

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
        **options: Unpack[CurveOptions],
    ) -> None:
        super().__init__(num_data, num_workers, **options)
        self.encoder_smoothing = smoothing(self, "encoder_smoothing", encoder_smoothing)
        self.decoder_smoothing = smoothing(self, "decoder_smoothing", decoder_smoothing)

    def candidates(self) -> dict[str, Sequence[Any]]:
        return {
            "encoder_smoothing": (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
            "decoder_smoothing": (0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
        }

    def _make_encoder(self) -> LinearMap:
        return SplineMap(self.data_points, self.worker_points, smoothing=self.encoder_smoothing)

    def _curve(self, nodes: NDArray[np.float64], points: NDArray[np.float64]) -> LinearMap:
        return SplineMap(nodes, points, smoothing=self.decoder_smoothing)

    def _decoder_matrices(self, received: NDArray[np.int64]) -> Tensor:
        nodes = self.worker_points[received]
        return spline_matrices(nodes, self.data_points, self.decoder_smoothing)
