"""The locator of wrong results of ApproxIFER (arXiv:2109.09868), a peer of verification."""

from __future__ import annotations

import numpy as np
from torch import Tensor

__all__ = ["wrong_workers"]


def wrong_workers(results: Tensor, points: np.ndarray, degree: int, most: int) -> list[int]:
    """Return the positions of the results that most of the outputs' error locators name.

    For every output a rational function P / Q of the points is fitted to the results y by least
    squares of P - y Q; where Q is least, the result is wrong.

    Args:
        results: results that arrived, ``[F, ...]``.
        points: the workers' points, ``[F]``.
        degree: the degree of P and Q, in Chebyshev polynomials.
        most: how many workers are named.
    """
    powers = np.polynomial.chebyshev.chebvander(points, degree)  # [F, degree + 1]
    values = results.flatten(1).double().numpy().T  # [outputs, F]
    numerator = np.broadcast_to(powers, (len(values), *powers.shape))
    system = np.concatenate([numerator, -values[..., None] * powers], -1)
    _, _, basis = np.linalg.svd(system)
    locator = np.abs(basis[:, -1, degree + 1 :] @ powers.T)  # |Q|, [outputs, F]
    named = np.argsort(locator, axis=1)[:, :most]
    votes = np.bincount(named.ravel(), minlength=len(points))
    return sorted(np.argsort(-votes, kind="stable")[:most].tolist())
