"""ApproxIFER (arXiv:2109.09868), a peer of verification: coded inputs, and a locator of errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode

from .faulty import Data, Fault
from .subjects import run

__all__ = ["Coded", "wrong_workers"]


class Coded:
    """Workers that compute coded inputs; the result of one worker is located and left out.

    Args:
        num_data: K, inputs of a group.
    """

    def __init__(self, num_data: int) -> None:
        self.num_data = num_data
        self.num_workers = 2 * num_data + 1  # N >= 2 K + 2 A - 1, with A = 1
        self.code = BerrutCode(num_data, self.num_workers)

    @property
    def work(self) -> float:
        """The rows that workers compute, in multiples of a batch."""
        return self.num_workers / self.num_data

    def answers(self, data: Data, at: Tensor, fault: Fault | None, worker: int) -> Tensor:
        """Return the answers to a batch, ``[B, C]``, with a fault of one worker.

        Args:
            data: the inputs and the module.
            at: ``[B]``, the inputs; B is a multiple of K.
            fault: the fault, or None.
            worker: the worker that has the fault.
        """
        groups = data.inputs[at].unflatten(0, (-1, self.num_data))  # [G, K, ...]
        coded = self.code.encode(groups, dim=1).float()  # [G, N, ...]
        results = run(data.model, coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
        if fault is not None:
            results[:, worker] = fault(data, results[:, worker])
        answers = []
        for group in results:
            wrong = wrong_workers(group, self.code.worker_points, self.num_data, 1)
            received = [n for n in range(self.num_workers) if n not in wrong]
            answers.append(self.code.decode(group[received], received))
        return torch.cat(answers).float()


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
