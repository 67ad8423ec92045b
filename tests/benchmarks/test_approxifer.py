"""The peer of verification, where it is known what it must find."""

import torch

from benchmarks.approxifer import wrong_workers
from coded_torch.codes.nodes import chebyshev_second


def test_the_error_locator_finds_one_wrong_result_of_a_polynomial():
    points = chebyshev_second(16)
    at = torch.from_numpy(points.copy())
    results = torch.stack([at**2 + 1, 2 - at], 1)[:, None]  # [N, 1, 2]
    results[7] = torch.tensor([9.0, -5.0])
    assert wrong_workers(results, points, degree=3, most=1) == [7]
