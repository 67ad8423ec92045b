import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import FloaterHormannInterpolator

from coded_torch.codes import BerrutCode, FloaterHormannCode
from coded_torch.testing.codes import CodeTests


class TestBerrutCode(CodeTests):
    def make(self):
        return BerrutCode(8, 24)


def test_a_single_input_has_the_order_that_it_can_have():
    x = torch.tensor([[2.0]])
    code = FloaterHormannCode(1, 3)
    assert code.decode(code.encode(x), received=range(3)).tolist() == x.tolist()


class TestFloaterHormannCode(CodeTests):
    def make(self):
        return FloaterHormannCode(8, 25, order=3)


@pytest.mark.parametrize("order", [0, 1, 2, 3, 7])
def test_floater_hormann_is_scipys(order):
    code = FloaterHormannCode(8, 30, order=order)
    rng = np.random.default_rng(order)
    for count in (1, 3, 6, 20, 30):
        received = np.sort(rng.choice(30, count, replace=False))
        results = rng.standard_normal((count, 2))
        oracle = FloaterHormannInterpolator(
            code.worker_points[received], results, d=min(order, count - 1)
        )
        answers = code.decode(torch.tensor(results), received)
        expected = oracle(code.data_points)
        np.testing.assert_allclose(answers, expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("order", [0, 1, 2, 5])
def test_polynomials_of_the_order_are_reproduced(order):
    code = FloaterHormannCode(6, 24, order=order)
    polynomial = np.polynomial.Chebyshev(np.arange(1.0, order + 2))
    coded = code.encode(torch.tensor(polynomial(code.data_points)))
    np.testing.assert_allclose(coded, polynomial(code.worker_points), rtol=1e-12, atol=1e-12)
    received = [0, 3, 4, 5, 9, 11, 12, 15, 18, 20, 23]
    answers = code.decode(torch.tensor(polynomial(code.worker_points[received])), received)
    np.testing.assert_allclose(answers, polynomial(code.data_points), rtol=1e-11, atol=1e-11)


@given(st.integers(1, 12), st.sets(st.integers(0, 40), min_size=1).map(sorted), st.integers(0, 11))
def test_no_received_set_has_a_pole(num_data, received, order):
    code = FloaterHormannCode(num_data, 41, order=min(order, num_data - 1))
    matrix = code.decoder(received).matrix()
    assert bool(torch.isfinite(matrix).all())
    assert torch.allclose(matrix.sum(1), torch.ones(num_data, dtype=torch.float64), atol=1e-6)


def test_exact_hits_are_copied():
    code = BerrutCode(3, 5, data_points=[-0.5, 0.0, 0.5], worker_points=[-1, -0.5, 0, 0.5, 1])
    inputs = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert torch.equal(code.encode(inputs)[1:4], inputs)
    results = torch.tensor([5.0, 0.1, 0.7, -3.0], dtype=torch.float64)
    assert torch.equal(code.decode(results, [0, 1, 3, 4])[[0, 2]], results[[1, 2]])


def test_a_node_too_near_to_divide_by():
    code = BerrutCode(1, 2, data_points=[5e-324], worker_points=[0.0, 1.0])
    assert code.decoder([0, 1]).matrix().tolist() == [[1.0, 5e-324]]
