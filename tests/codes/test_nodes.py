import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coded_torch.codes import nodes

SETS = [nodes.chebyshev_first, nodes.chebyshev_second, nodes.equidistant]
SIZES = [1, 2, 3, 4, 5, 8, 17, 100, 129, 1000]


@pytest.mark.parametrize("make", SETS)
@pytest.mark.parametrize("n", SIZES)
def test_sets(make, n):
    got = make(n)
    assert got.dtype == np.float64
    assert got.shape == (n,)
    assert (np.diff(got) > 0).all()
    assert np.abs(got).max() <= 1
    assert np.array_equal(got, -got[::-1])


@pytest.mark.parametrize("n", SIZES)
def test_values(n):
    k = np.arange(n, 0, -1)
    first = np.cos((2 * k - 1) * np.pi / (2 * n))
    np.testing.assert_allclose(nodes.chebyshev_first(n), first, atol=1e-15)
    np.testing.assert_allclose(nodes.equidistant(n), -1 + (2 * k[::-1] - 1) / n, atol=1e-15)
    second = np.cos((k - 1) * np.pi / (n - 1)) if n > 1 else [0.0]
    np.testing.assert_allclose(nodes.chebyshev_second(n), second, atol=1e-15)


@pytest.mark.parametrize("make", [*SETS, lambda n: nodes.systematic([0.0, 0.5], n)])
def test_bad_counts(make):
    with pytest.raises(ValueError, match=r"num_points must be at least [12], got 0"):
        make(0)
    with pytest.raises(TypeError, match=r"num_points must be an integer, got 2\.0"):
        make(2.0)


DATA = st.sets(st.integers(-1000, 1000), min_size=2, max_size=20).map(
    lambda data: np.array(sorted(data)) / 1000
)


@given(DATA, st.integers(0, 60))
def test_systematic_contains_the_data_and_splits_the_largest_gaps(data, extra):
    got = nodes.systematic(data, len(data) + extra)
    assert len(got) == len(data) + extra
    assert (np.diff(got) > 0).all()
    assert np.isin(data, got).all()
    # Every gap in equal parts, and no gap split that had been narrower than the widest left.
    parts = np.diff(np.searchsorted(got, data))
    widths = np.diff(data) / parts
    np.testing.assert_allclose(np.diff(got), np.repeat(widths, parts), rtol=1e-9, atol=1e-12)
    before_last_split = np.diff(data)[parts > 1] / (parts[parts > 1] - 1)
    assert extra == 0 or before_last_split.min() >= widths.max() * (1 - 1e-6)


def test_systematic_spreads_the_rest_over_equal_gaps():
    data = nodes.equidistant(20)
    extra = np.setdiff1d(nodes.systematic(data, 24), data)
    np.testing.assert_allclose(extra, [-0.7, -0.2, 0.2, 0.7], atol=1e-12)
    assert len(np.setdiff1d(nodes.systematic(data, 39), data)) == 19
    np.testing.assert_allclose(nodes.systematic(data, 39), np.linspace(-0.95, 0.95, 39))


@pytest.mark.parametrize(
    "data",
    [[], 0.5, [[0.0, 0.5]], [0.5, 0.0], [0.0, 0.0], [0.0, 1.5], [0.0, float("nan")]],
)
def test_systematic_bad_data(data):
    with pytest.raises(ValueError, match="systematic: data_points must be a strictly increasing"):
        nodes.systematic(data, 5)


def test_systematic_bad_sizes():
    with pytest.raises(ValueError, match="systematic: num_points must be at least 3, got 2"):
        nodes.systematic([-0.5, 0.0, 0.5], 2)
    with pytest.raises(ValueError, match="systematic: num_points must be 1 for one data point"):
        nodes.systematic([0.0], 2)
