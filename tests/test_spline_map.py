"""Splines against exact arithmetic, SciPy, and its own limits."""

import math

import mpmath
import numpy as np
import pytest
import scipy.interpolate
import torch

from coded_torch.linear import SplineMap

from . import reference
from .splines import DTYPES, KNOTS, SMOOTHINGS, TOLERANCES, make_knots, make_points


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


def test_tails_are_linear():
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    knots = np.linspace(0, 1, 9)
    for points in ([0.0, -1.0, -2.0], [1.0, 2.0, 3.0]):
        tail = smoothing_spline(values, knots, points, smoothing=1e-3)
        assert abs(tail[0] - 2 * tail[1] + tail[2]) < 1e-13


@pytest.mark.parametrize(
    ("exponent", "smoothing"), [(-130, 0.1), (130, 0.1), (-1000, 0.0), (1000, 0.0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_change_nothing(dtype, exponent, smoothing):
    """Not even where float32 holds neither the gaps nor their inverses."""
    knots, points = np.array([0.0, 0.3, 0.7, 1.0]), np.array([-0.1, 0.2, 0.3, 1.2])
    values = torch.randn(4, 3, dtype=torch.float64).to(dtype)
    want = smoothing_spline(values, knots, points, smoothing=smoothing)
    scaled = knots * 2.0**exponent, points * 2.0**exponent
    smoothing *= 2.0 ** (3 * exponent) if smoothing else 0
    assert torch.equal(smoothing_spline(values, *scaled, smoothing=smoothing), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_knot_is_a_constant_everywhere(dtype):
    values = torch.randn(1, 3).to(dtype)
    got = smoothing_spline(values, [-1e308], [1e39, -1e39, 1e308])
    assert torch.equal(got, values.expand(3, 3))


def test_dim():
    values = torch.randn(2, 6, 3, dtype=torch.float64)
    knots, points = np.linspace(0, 1, 6), [0.1, 0.9]
    want = torch.stack([smoothing_spline(v, knots, points) for v in values])
    for dim in (1, -2):
        assert torch.equal(smoothing_spline(values, knots, points, dim=dim), want)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"knots": [0.0, 2.0, 1.0]}, ValueError, r"strictly increasing, got knots\[1\] = 2.0"),
        ({"knots": [0.0, 1.0, 1.0]}, ValueError, r"strictly increasing, .*knots\[2\] = 1.0"),
        ({"knots": [0.0, NAN, 1.0]}, ValueError, r"knots must be finite, got knots\[1\] = nan"),
        ({"knots": [0.0, 1.0, INF]}, ValueError, r"knots must be finite, got knots\[2\] = inf"),
        ({"knots": [[0.0, 1.0, 2.0]]}, ValueError, r"knots must have one dim.*, got .*\(1, 3\)"),
        ({"knots": []}, ValueError, "knots must hold at least one number"),
        ({"knots": ["a", "b", "c"]}, TypeError, "knots must be real numbers, got"),
        ({"knots": [0.0, 1.0, 2.0j]}, TypeError, "knots must be real numbers"),
        ({"knots": [0.0, 1e-39, 1.0]}, ValueError, r"float32 can plan, got gaps of 1\.0e-39 to 1"
         r"\.0e\+00, points 5\.0e-01 from .* 0"),
        ({"points": [NAN]}, ValueError, r"points must be finite, got points\[0\] = nan"),
        ({"points": 0.5}, ValueError, r"points must have one dimension, got shape \(\)"),
        ({"points": [0.5, -1e39]}, ValueError, r"float32 can plan, .* points 1\.0e\+39 from"),
        ({"smoothing": -1.0}, ValueError, "smoothing must be finite and >= 0, got -1.0"),
        ({"smoothing": NAN}, ValueError, "smoothing must be finite and >= 0, got nan"),
        ({"smoothing": [0.1, 0.2]}, TypeError, "smoothing must be finite and >= 0"),
        ({"smoothing": 1e170}, ValueError, "must be of a scale that float32 can plan"),
        ({"smoothing": "much"}, TypeError, "smoothing must be finite and >= 0, got 'much'"),
        ({"weights": [1.0, 1e-320, 1.0], "smoothing": 1}, ValueError,
         r"smoothing 1\.0e\+00, weights of 1\.0e-320 to 1\.0e\+00"),
        ({"weights": [1.0, 1.0]}, ValueError, r"weights must have the shape .*\(3,\), got \(2,\)"),
        ({"weights": [1.0, 0.0, 1.0]}, ValueError, "weights must be positive, got 0.0"),
        ({"weights": [1.0, NAN, 1.0]}, ValueError, "weights must be finite"),
        ({"values": torch.ones(4)}, ValueError, r"must have size 3 along dim 0, got .*\(4,\)"),
        ({"values": torch.ones(3, dtype=torch.int64)}, TypeError,
         "SplineMap: values must be a dense, strided floating-point .*int64"),
        ({"values": [1.0, 2.0, 3.0]}, TypeError, "values must be a dense, .*, got list"),
        ({"values": torch.tensor(1.0)}, ValueError, "dim of values must be at most -1, got 0"),
        ({"dim": 1}, ValueError, "dim of values must be at most 0, got 1"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {"values": torch.ones(3), "knots": [0.0, 1.0, 2.0], "points": [0.5]} | change
    with pytest.raises(error, match=message):
        smoothing_spline(**arguments)


def test_half_precision_knots_and_autocast():
    knots = torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16)
    values = torch.tensor([0.0, 1000.0, 10.0])
    want = smoothing_spline(values, [0.0, 1.0, 2.0], [0.3], smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = smoothing_spline(values, knots, [0.3], smoothing=0.1)
    torch.testing.assert_close(got, want)
