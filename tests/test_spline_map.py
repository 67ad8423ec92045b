"""Splines against exact arithmetic, SciPy, and its own limits."""

import itertools

import mpmath
import numpy as np
import pytest
import torch

from coded_torch.linear import SplineMap

from . import reference
from .splines import KNOTS, SMOOTHINGS, TOLERANCES, make_knots, make_points


def smoothing_spline(values, knots, points, dim=0, **options):
    return SplineMap(knots, points, **options)(values, dim)


def exact(values, knots, points, smoothing, weights=None):
    """In 50 digits, rounded to float64 once."""
    with mpmath.workdps(50):
        result = reference.smoothing_spline(
            values, knots, points, smoothing=smoothing, weights=weights, number=mpmath.mpf
        )
    return result.astype(np.float64)


def problem(kind, n):
    rng = np.random.default_rng([n, KNOTS.index(kind)])
    knots = make_knots(kind, n, rng)
    return rng, knots, make_points(knots, rng)


@pytest.mark.parametrize(
    ("kind", "n"),
    [*itertools.product(KNOTS, [1, 2, 3, 4, 5, 17, 128]), ("chebyshev", 512), ("random4", 512)],
)
def test_agrees_with_exact_arithmetic(kind, n):
    rng, knots, points = problem(kind, n)
    # Multiples of 2^-8: the same numbers in every dtype but the half precisions' own.
    values = np.round(rng.standard_normal((n, 2)) * 2**8) / 2**8
    dtypes = [torch.float64] if kind == "random4" else [torch.float64, torch.float32]
    for smoothing in SMOOTHINGS:
        want = exact(values, knots, points, smoothing)
        # Far outside, the tangent multiplies whatever error the slope has.
        largest = max(np.abs(values).max(), np.abs(want).max())
        for dtype in dtypes:
            got = smoothing_spline(
                torch.tensor(values, dtype=dtype), knots, points, smoothing=smoothing
            )
            error = np.abs(got.double().numpy() - want).max()
            assert error <= TOLERANCES[dtype] * largest, (smoothing, dtype, error / largest)


@pytest.mark.parametrize("kind", ["equidistant", "chebyshev", "random3"])
@pytest.mark.parametrize("n", [2, 5, 40])
def test_weights(kind, n):
    rng, knots, points = problem(kind, n)
    values, weights = rng.standard_normal((n, 1)), 10 ** rng.uniform(-3, 3, n)
    for smoothing in SMOOTHINGS:
        want = exact(values, knots, points, smoothing, weights)
        got = smoothing_spline(
            torch.from_numpy(values), knots, points, smoothing=smoothing, weights=weights
        )
        largest = max(np.abs(values).max(), np.abs(want).max())
        assert np.abs(got.numpy() - want).max() <= TOLERANCES[torch.float64] * largest


def test_zero_smoothing_passes_through_every_value_bit_for_bit():
    rng = np.random.default_rng(0)
    knots = make_knots("random3", 64, rng)
    for dtype in (torch.float64, torch.float32):
        values = torch.from_numpy(rng.standard_normal((64, 3))).to(dtype)
        assert torch.equal(smoothing_spline(values, knots, knots), values)


def test_large_smoothing_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    knots, values = make_knots("thinned", 50, rng), rng.standard_normal(50)
    got = smoothing_spline(torch.from_numpy(values), knots, [-1.0, 0.3], smoothing=1e13)
    want = np.polyval(np.polyfit(knots, values, 1), [-1.0, 0.3])
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-11)
