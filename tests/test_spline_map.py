"""Splines against exact arithmetic, SciPy, and its own limits."""

import mpmath
import numpy as np
import pytest
import scipy.interpolate
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


@pytest.mark.parametrize("kind", KNOTS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 128, 512])
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


@pytest.mark.parametrize("n", [5, 20, 100])
@pytest.mark.parametrize("penalty", [0.0, 1e-9, 1e-6, 1e-3])
def test_agrees_with_scipy_where_scipy_is_exact(n, penalty):
    rng = np.random.default_rng(n)
    knots = np.linspace(-1, 1, n) + rng.uniform(-0.2, 0.2, n) / n
    points = rng.uniform(knots[0], knots[-1], 50)  # outside, SciPy continues the cubic
    values, weights = rng.standard_normal(n), rng.uniform(0.5, 2, n)
    want = scipy.interpolate.make_smoothing_spline(knots, values, w=weights, lam=penalty)(points)
    got = smoothing_spline(
        torch.from_numpy(values), knots, points, smoothing=penalty / n, weights=weights
    )
    assert np.abs(got.numpy() - want).max() <= 1e-10 * np.abs(values).max()


@pytest.mark.parametrize("kind", KNOTS)
@pytest.mark.parametrize("n", [2, 3, 17, 256])
@pytest.mark.parametrize("smoothing", [*SMOOTHINGS, 1e12])
def test_reproduces_straight_lines(kind, n, smoothing):
    _, knots, points = problem(kind, n)
    points = torch.from_numpy(points)
    got = smoothing_spline(torch.from_numpy(1 + 3 * knots), knots, points, smoothing=smoothing)
    # The end gaps amplify the rounding of the values where the line is continued.
    torch.testing.assert_close(got, 1 + 3 * points, rtol=0, atol=1e-11)


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


def test_dim():
    values = torch.randn(2, 6, 3, dtype=torch.float64)
    knots, points = np.linspace(0, 1, 6), [0.1, 0.9]
    want = torch.stack([smoothing_spline(v, knots, points) for v in values])
    for dim in (1, -2):
        assert torch.equal(smoothing_spline(values, knots, points, dim=dim), want)
