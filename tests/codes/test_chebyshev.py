import numpy as np
import pytest

from coded_torch.codes import curves

SETS = [curves.chebyshev_first, curves.chebyshev_second]
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
    np.testing.assert_allclose(curves.chebyshev_first(n), first, atol=1e-15)
    second = np.cos((k - 1) * np.pi / (n - 1)) if n > 1 else [0.0]
    np.testing.assert_allclose(curves.chebyshev_second(n), second, atol=1e-15)
