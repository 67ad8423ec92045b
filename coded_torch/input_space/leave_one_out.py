r"""How badly results are predicted from each other, by several kernels at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._transforms import exactly
from .gaussian_process import NUGGET, matern52

__all__ = ["LeaveOneOut"]


class LeaveOneOut:
    r"""How badly results are predicted from each other, by several kernels; each is factored once.

    Args:
        squared_distances: ``[M, M]`` each, finite or infinite, all of one dtype.
        lengths: of each kernel, positive.
    """

    @exactly()
    def __init__(self, squared_distances: Sequence[Tensor], lengths: Sequence[float]) -> None:
        if not squared_distances:
            self._half = torch.zeros(0, 0, 0)
            return
        first = squared_distances[0]
        covariance = first.new_empty(len(squared_distances), *first.shape)  # [kernels, M, M]
        for out, squared, length in zip(covariance, squared_distances, lengths, strict=True):
            matern52(squared, length, out=out)
        covariance.diagonal(dim1=-2, dim2=-1).add_(NUGGET)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        eye = torch.eye(len(first), dtype=factor.dtype).expand_as(factor)
        # Of the inverse, half half', only its diagonal and products with the results and with 1.
        self._half = torch.linalg.solve_triangular(factor.mT, eye, upper=True, left=False)
        mean = self._half.sum(-2, keepdim=True) @ self._half.mT  # [kernels, 1, M]
        self._mean = mean / mean.sum(-1, keepdim=True)
        inverses = self._half.square().sum(-1).sub_((mean * self._mean).squeeze(1))
        self._inverses = inverses.clamp_(min=torch.finfo(inverses.dtype).tiny).double()
        self._failed = (failed > 0)[:, None]

    @exactly()
    def losses(self, results: Tensor) -> Tensor:
        r"""One for each kernel and result: less is better.

        The negative logarithm of the density that the others' prediction and its variance give to
        each number of a result, on average, but for a constant, at the best variance of the
        outputs: with the leave-one-out residuals e, their variances v, and the mean q of
        :math:`e^2 / v` over all numbers,

        .. math:: \tfrac12 \log q + \tfrac12 \left(\overline{e^2 / (q v)} - 1\right)
            + \tfrac12 \log v .

        It weighs down residuals where the kernel knows that it cannot predict, so a few inputs far
        from all others do not decide. As q is where the sum over all results is least, the
        difference of two kernels varies from result to result as if each had been given its own.

        Args:
            results: ``[M, C]``, of the dtype of the distances.

        Returns:
            ``[kernels, M]``, float64; infinite where there is no factorisation in this dtype.
        """
        if not len(self._half):
            return torch.zeros(0, len(results), dtype=torch.float64)
        solved = (results - results.mean(0)).T @ self._half @ self._half.mT  # [kernels, C, M]
        residuals = solved - solved.sum(-1, keepdim=True) * self._mean
        # e = r / p and v = 1 / p, so e^2 / v = r^2 / p.
        squares = residuals.square().mean(1) / self._inverses
        least = torch.finfo(results.dtype).tiny
        mean_squares = squares.mean(1, keepdim=True).clamp_(min=least)
        losses = squares.div_(mean_squares).sub_(1).add_(mean_squares.log())
        losses.sub_(self._inverses.log()).div_(2)
        return losses.masked_fill_(self._failed | ~mean_squares.isfinite(), math.inf)
