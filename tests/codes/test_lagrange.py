from fractions import Fraction

import numpy as np
import pytest
import torch

from coded_torch.codes import LagrangeCode, curves
from coded_torch.testing.codes import CodeTests, normal


class TestLagrangeCode(CodeTests):
    def make(self):
        return LagrangeCode(4, 20, degree=2)


class TestLagrangeCodeOfAGivenDegree(CodeTests):
    def make(self):
        return LagrangeCode(8, 24, decoder_degree=5)


def cubic(x):
    return 0.7 * x**3 - x**2 + 0.3 * x - 1


def relative_error(code, model, inputs, received):
    results = model(code.encode(inputs))[received]
    exact = model(inputs)
    return float((code.decode(results, received) - exact).abs().max() / exact.abs().max())


def contiguous(num_workers, missing):
    """Every received set that lacks a block of neighbours, with the first after the last."""
    for start in range(num_workers):
        yield [n for n in range(num_workers) if (n - start) % num_workers >= missing]


def test_a_cubic_from_any_13_of_20_results():
    code = LagrangeCode(5, 20, degree=3)
    assert code.min_received == 13
    inputs = normal(5, 8)
    for missing in range(7):  # by least squares
        for received in contiguous(20, missing):
            assert relative_error(code, cubic, inputs, received) < 1e-9
    rng = np.random.default_rng(0)
    drawn = [np.sort(rng.choice(20, 13, replace=False)).tolist() for _ in range(500)]
    worst = max(
        relative_error(code, cubic, inputs, received) for received in [*contiguous(20, 7), *drawn]
    )
    assert worst < 1e-8


@pytest.mark.parametrize("received", [[1, 3, 4, 6, 8], [0, 1, 2, 3, 4]])
def test_interpolation_in_rational_arithmetic(received):
    code = LagrangeCode(3, 9, degree=2)
    nodes = [Fraction(t) for t in code.worker_points[received].tolist()]
    expected = []
    for z in map(Fraction, code.data_points.tolist()):
        row = []
        for j, t in enumerate(nodes):
            entry = Fraction(1)
            for other in nodes[:j] + nodes[j + 1 :]:
                entry *= (z - other) / (t - other)
            row.append(float(entry))
        expected.append(row)
    # Four products of rounded differences and quotients each.
    np.testing.assert_allclose(code.decoder(received).matrix(), expected, rtol=20 * 2.0**-53)


@pytest.mark.parametrize("degree", [0, 1, 4, 9])
def test_least_squares_is_numpys(degree):
    code = LagrangeCode(7, 30, decoder_degree=degree)
    rng = np.random.default_rng(degree)
    for count in (degree + 2, 15, 30):
        received = np.sort(rng.choice(30, count, replace=False))
        results = rng.standard_normal(count)
        fit = np.polynomial.Chebyshev.fit(code.worker_points[received], results, degree)
        answers = code.decode(torch.tensor(results), received).numpy()
        norm = float(code.decoder(received).matrix().abs().sum(1).max())
        np.testing.assert_allclose(answers, fit(code.data_points), atol=1e-11 * norm)


def test_many_nodes_neither_overflow_nor_underflow():
    code = LagrangeCode(1, 2001, decoder_degree=2000, data_points=[0.3])
    nodes = code.worker_points
    answer = code.decode(torch.tensor(np.cos(500 * nodes)), range(2001))
    assert float(answer[0]) == pytest.approx(np.cos(150), abs=1e-9)


def test_exact_hits_are_copied():
    code = LagrangeCode(3, 9)
    assert np.array_equal(code.worker_points, curves.chebyshev_first(9))  # the data points in it
    hits = np.isin(code.worker_points, code.data_points)
    inputs = normal(3)
    assert torch.equal(code.encode(inputs)[torch.tensor(hits)], inputs)
