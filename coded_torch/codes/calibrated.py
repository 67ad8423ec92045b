r"""The best linear decoder of what a model has been seen to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import count
from ..linear import LinearMap, MatrixMap
from ..points import equidistant
from .base import BatchPlan, CurveCode, FixedCode, _GroupwisePlan, few_columns

if TYPE_CHECKING:
    from ..geometry import Geometry
    from ..grouping import Grouping

__all__ = ["CalibratedCode"]

# How many groups the spline prior counts for, in dimensions of the moments. With a third of it, one
# group makes the error up to 5 % worse than the spline's; the more, the slower the gain sets in.
_PRIOR_GROUPS = 0.1
# Relative to the mean variance; without, results at equal points would be one equation twice. A
# hundredth of it costs replicated answers their third digit.
_JITTER = 1e-10
# Freedom that results which repeat each other seem to have.
_JUST_ROUNDING = 1e-2


class CalibratedCode(FixedCode):
    r"""A code with the encoder of another one, and the decoders that are best on calibration data.

    Let Z be the N results for a group, Y its K answers, and :math:`C` their second moments. Of all
    decoders linear in the received results that reproduce constants,

    .. math:: D_F = W + (1 - W 1) m^\top, \qquad W = C_{YF} C_{FF}^{-1}, \qquad
              m = C_{FF}^{-1} 1 / (1^\top C_{FF}^{-1} 1),

    has the least mean squared error; m are the weights of the generalised least-squares mean of the
    results, so that no mean output has to be known. Smoothing splines are the special case of
    moments of an integrated Wiener process along the curve, and these are the prior: with n
    calibration groups,

    .. math:: C = \frac{n}{n + n_0} C_\text{data} + \frac{n_0}{n + n_0} \sigma^2 C_\text{spline},
              \qquad n_0 = \frac{N + K}{10},

    with the :math:`\sigma^2` of maximum likelihood. So a few groups do no harm; a few hundred are
    worth having. :func:`coded_torch.calibration.calibrate` makes such a code from unlabelled
    batches.

    Args:
        code: the code whose encoder it is.
        moments: ``[N + K, N + K]``, :math:`C_\text{data}`: the mean over groups, the sum over
            outputs, of the products of the N results and K answers, in this order, about the mean
            answer (or any other: what all share has no influence on the decoders).
        num_groups: n, how many groups ``moments`` are the mean of, at least 0; with 0, which is
            the default, the prior decodes, and that is in effect the interpolating spline.
        encoder: ``[N, K]``, the matrix of the encoder that ``moments`` were taken with, to be sure
            that it is the one of ``code``; None: not compared.

    Attributes:
        code, moments, num_groups: as given.

    Raises:
        TypeError: ``code`` is not a :class:`~coded_torch.codes.FixedCode`, ``moments`` not a
            floating-point tensor, or ``num_groups`` not an integer.
        ValueError: ``moments`` are not the moments of N + K numbers, ``num_groups`` is negative, or
            ``encoder`` is another code's.

    Note:
        One result is enough for some answer. Planning a decoder costs :math:`O(|F|^2 (|F| + K))`.
        Data points and worker points are those of a :class:`~coded_torch.codes.CurveCode`; of other
        codes, equidistant, and where the encoder takes them.

    Reference:
        Stein, *Interpolation of Spatial Data*, Springer 1999: best linear unbiased prediction.

    Example:
        >>> import tempfile, torch
        >>> from coded_torch.codes import CalibratedCode, SplineCode
        >>> spline = SplineCode(num_data=2, num_workers=3)
        >>> t = torch.tensor([*spline.worker_points, *spline.data_points])
        >>> phases = torch.linspace(0, 6, 50, dtype=t.dtype)
        >>> outputs = (3 * t[:, None] + phases).cos()  # what results and answers look like
        >>> code = CalibratedCode(spline, outputs @ outputs.T / 50, num_groups=50)
        >>> def error(code):
        ...     return (code.decode(outputs[:2], [0, 1]) - outputs[3:]).square().mean().sqrt()
        >>> bool(error(code) < 0.5 * error(spline))
        True
        >>> with tempfile.TemporaryFile() as file:
        ...     torch.save(code.state_dict(), file)
        ...     _ = file.seek(0)
        ...     twin = CalibratedCode(spline, **torch.load(file, weights_only=True))
    """

    def __init__(
        self,
        code: FixedCode,
        moments: Tensor | None = None,
        num_groups: int = 0,
        *,
        encoder: Tensor | None = None,
    ) -> None:
        if not isinstance(code, FixedCode):
            raise TypeError(
                f"CalibratedCode: code must be of type FixedCode, got {type(code).__name__}"
            )
        super().__init__(code.num_data, code.num_workers)
        self.code = code
        self.num_groups = count(self, "num_groups", num_groups, 0)
        if encoder is not None:
            self._check_encoder(encoder)
        size = self.num_workers + self.num_data
        if moments is None:
            moments = torch.zeros(size, size, dtype=torch.float64)
        self.moments = _checked(moments, size)
        self._prior = self._make_prior()
        self._blended = self._blend()

    def state_dict(self) -> dict[str, Any]:
        """What calibration has learnt: the arguments but ``code``, for :func:`torch.save`.

        It can be loaded with ``weights_only=True``, and belongs to codes with the same encoder
        only, as is checked.
        """
        return {
            "moments": self.moments,
            "num_groups": self.num_groups,
            "encoder": self.encoder.matrix(),
        }

    def expected_rmse(
        self, received: Sequence[int] | Tensor, results: Tensor | None = None
    ) -> float | None:
        r"""The root mean squared error to expect of an answer from a received set.

        .. math:: \sqrt{\tfrac1K \operatorname{tr} (C_{YY} - 2 D_F C_{FY} + D_F C_{FF} D_F^\top)}

        Args:
            received: the workers, strictly increasing.
            results: ``[|F|, G, ...]``; without, the error is in units of the outputs' standard
                deviation in calibration (of an output vector's, root of the sum of the variances);
                with, it is absolute, comparable to :func:`coded_torch.metrics.rmse`, and larger
                or smaller as they vary more or less along the curve than in calibration.

        Returns:
            The error, or None where the scale of the outputs is not known: without calibration
            groups and less than two different results.
        """
        decoder = self.decoder(received)
        assert isinstance(decoder, _BestMap)
        if results is not None and decoder.freedom > _JUST_ROUNDING:
            return math.sqrt(decoder.error * decoder.scale(results))
        if not self.num_groups:
            return None
        if results is not None:
            return math.sqrt(decoder.error)
        n = self.num_workers
        variance = float(self.moments[n:, n:].trace()) / self.num_data
        return math.sqrt(decoder.error / variance) if variance > 0 else 0.0

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Every group for itself, all alike; the geometry is not looked at."""
        return _CalibratedPlan(self, grouping)

    def _make_encoder(self) -> LinearMap:
        return self.code.encoder

    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        seen = self.moments if self.num_groups else self._prior
        return _BestMap(self._blended, seen, received, self.num_workers)

    def _check_encoder(self, encoder: Tensor) -> None:
        own, given = self.encoder.matrix(), torch.as_tensor(encoder, dtype=torch.float64)
        # Another machine may have rounded its own differently.
        if given.shape != own.shape or not torch.allclose(given.cpu(), own, atol=1e-6):
            raise ValueError(
                f"CalibratedCode: encoder must be that of code, {self.code}, "
                f"got another one, of shape {tuple(given.shape)}"
            )

    def _blend(self) -> Tensor:
        """The moments of the data shrunk towards the prior's."""
        size = self.num_workers + self.num_data
        # Both up to what all share, of which the decoders do not depend.
        contrasts = torch.linalg.inv(_jittered(self._prior))
        contrasts -= contrasts.sum(0).outer(contrasts.sum(0)) / contrasts.sum()
        scale = float((contrasts * self.moments).sum()) / (size - 1)
        share = self.num_groups / (self.num_groups + _PRIOR_GROUPS * size)
        if not scale > 0:  # nothing to tell it from
            scale = 1.0
        return _jittered(share * self.moments + (1 - share) * scale * self._prior)

    def _make_prior(self) -> Tensor:
        """Of a random line plus integrated Wiener processes from the middle to both ends."""
        code = self.code
        points = code.data_points if isinstance(code, CurveCode) else equidistant(self.num_data)
        knots = torch.tensor(points)
        b = torch.cat([self.encoder.matrix() @ knots, knots])
        b = (2 * b - b.min() - b.max()) / ((b.max() - b.min()) or 1.0)
        a = b[:, None]
        near, far = torch.minimum(a.abs(), b.abs()), torch.maximum(a.abs(), b.abs())
        return 1 + a * b + (a * b > 0) * near.square() * (3 * far - near) / 6


class _CalibratedPlan(_GroupwisePlan):
    code: CalibratedCode

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        return self.code.expected_rmse(received, results)


class _BestMap(MatrixMap):
    """The best linear decoder for given moments.

    Attributes:
        error: the mean squared error of an answer, by the same moments.
        freedom: the mean square of the whitened results of a group, added up, if they vary as in
            ``seen``: |F| - 1 if those are the same moments, and no number repeats another.
    """

    def __init__(
        self, moments: Tensor, seen: Tensor, received: Sequence[int], num_workers: int
    ) -> None:
        f = list(received)
        own, cross, answers = moments[f][:, f], moments[num_workers:, f], moments[num_workers:]
        factor = torch.linalg.cholesky(own)
        ones = torch.ones(len(f), 1, dtype=torch.float64)
        solved = torch.cholesky_solve(torch.cat([ones, cross.T], 1), factor)  # [F, 1 + K]
        mean = solved[:, :1] / solved[:, 0].sum()
        weights = solved[:, 1:].T
        weights = weights + (1 - weights.sum(1, keepdim=True)) @ mean.T
        super().__init__(weights.numpy())
        loss = answers[:, num_workers:].trace() - 2 * (weights * cross).sum()
        loss += (weights @ own * weights).sum()
        self.error = max(float(loss), 0.0) / len(weights)
        eye = torch.eye(len(f), dtype=torch.float64)
        whitening = torch.linalg.solve_triangular(factor, eye - ones @ mean.T, upper=False)
        self._whitening = MatrixMap(whitening.numpy())
        self.freedom = float((whitening @ seen[f][:, f] * whitening).sum())

    def scale(self, results: Tensor) -> float:
        """How the second moments of results ``[F, G, ...]`` compare to those seen: 1 if alike."""
        sample = few_columns(results).to("cpu", torch.float64)
        mean = float(self._whitening(sample).square().mean()) * results.shape[2:].numel()
        return mean * self.num_inputs / self.freedom


def _jittered(moments: Tensor) -> Tensor:
    return moments + _JITTER * moments.diagonal().mean() * torch.eye(len(moments)).double()


def _checked(moments: Tensor, size: int) -> Tensor:
    if not (isinstance(moments, Tensor) and moments.is_floating_point()):
        raise TypeError(
            "CalibratedCode: moments must be a floating-point tensor, "
            f"got {getattr(moments, 'dtype', type(moments).__name__)}"
        )
    if moments.shape != (size, size):
        raise ValueError(
            f"CalibratedCode: moments must have shape ({size}, {size}), got {tuple(moments.shape)}"
        )
    moments = moments.detach().to("cpu", torch.float64, copy=True)
    bound = 1e-6 * float(moments.diagonal().mean())
    # Negated, so that NaN fails.
    if not (
        bool(moments.isfinite().all())
        and float((moments - moments.T).abs().max()) <= bound
        and float(torch.linalg.eigvalsh(moments)[0]) >= -bound
    ):
        raise ValueError(
            "CalibratedCode: moments must be finite, symmetric and positive semidefinite, "
            f"got {moments.tolist() if size < 4 else 'others'}"
        )
    return moments
