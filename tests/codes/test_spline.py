"""The paper's code: what every code promises, and how fast its error falls."""

import numpy as np
import torch

from coded_torch.codes import BerrutCode, SplineCode
from coded_torch.codes.base import Code
from coded_torch.testing.codes import CodeTests


class TestSplineCode(CodeTests):
    def make(self) -> Code:
        return SplineCode(8, 24)


class TestSmoothedSplineCode(CodeTests):
    def make(self) -> Code:
        return SplineCode(8, 24, encoder_smoothing=1e-4, decoder_smoothing=1e-3)


class TestSystematicSplineCode(CodeTests):
    def make(self) -> Code:
        data = np.arange(-7, 8, 2) / 8
        workers = np.union1d(data, np.linspace(-0.8, 0.8, 16))
        return SplineCode(8, 24, data_points=data, worker_points=workers)


NUM_DATA, NUM_STRAGGLERS, NUM_WORKERS = 8, 3, (32, 64, 128, 256, 512)


def mean_squared_error(code: Code, *, noise: float = 0.0, trials: int = 200) -> float:
    """Of x sin x at 8 inputs, over random sets of 3 stragglers."""
    rng = np.random.default_rng(0)
    inputs = torch.linspace(0, 4, NUM_DATA, dtype=torch.float64)[:, None]
    coded = code.encode(inputs)
    total = 0.0
    for _ in range(trials):
        received = np.sort(
            rng.choice(code.num_workers, code.num_workers - NUM_STRAGGLERS, replace=False)
        )
        at = coded[torch.from_numpy(received)]
        results = at * at.sin() + noise * torch.from_numpy(rng.standard_normal(at.shape))
        error = code.decode(results, received) - inputs * inputs.sin()
        total += float(error.square().mean()) / trials
    return total


def slope(errors: list[float]) -> float:
    return float(np.polyfit(np.log(NUM_WORKERS), np.log(errors), 1)[0])


def test_the_error_falls_at_least_as_the_third_power_of_the_workers():
    """Theorem: O(S^3 N^-3) without noise; Berrut's is larger at every N."""
    spline = [mean_squared_error(SplineCode(NUM_DATA, n)) for n in NUM_WORKERS]
    berrut = [mean_squared_error(BerrutCode(NUM_DATA, n)) for n in NUM_WORKERS]
    assert slope(spline) <= -3, spline
    assert all(s < b for s, b in zip(spline, berrut, strict=True)), (spline, berrut)


def test_with_noise_the_error_falls_at_the_theoretical_smoothing():
    """Theorem: O(S^(8/5) N^(-3/5)) at a smoothing of (N - S)^(-4/5), up to a constant."""
    errors = [
        mean_squared_error(
            SplineCode(NUM_DATA, n, decoder_smoothing=1e-3 * (n - NUM_STRAGGLERS) ** -0.8),
            noise=0.1,
        )
        for n in NUM_WORKERS
    ]
    assert slope(errors) <= -0.6, errors
