import numpy as np
import pytest

from coded_torch.codes import curves


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 17, 100, 129, 1000])
def test_points(n):
    k = np.arange(n, 0, -1)
    first = np.cos((2 * k - 1) * np.pi / (2 * n))
    second = np.cos((k - 1) * np.pi / (n - 1)) if n > 1 else [0.0]
    for got, want in (curves.chebyshev_first(n), first), (curves.chebyshev_second(n), second):
        np.testing.assert_allclose(got, want, atol=1e-15)
        assert got.dtype == np.float64
        assert (np.diff(got) > 0).all()
        assert np.abs(got).max() <= 1
        assert np.array_equal(got, -got[::-1])
