"""Kernel regression against the dense formulas, and at its limits."""

import math

import pytest
import torch

from coded_torch.input_space.gaussian_process import NUGGET, KernelRegression, matern52


@pytest.fixture
def problem(generator):
    at = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    to = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return at, torch.cdist(at, at).square(), torch.cdist(to, at).square()


def dense(among, to, length):
    """The best linear unbiased predictor by its bordered system, and its variance."""
    m = len(among)
    c = matern52(among, length) + NUGGET * torch.eye(m, dtype=torch.float64)
    border = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    border[:m, :m], border[:m, m], border[m, :m] = c, 1, 1
    k = torch.cat([matern52(to, length), torch.ones(len(to), 1, dtype=torch.float64)], dim=1)
    solved = torch.linalg.solve(border, k.T)
    return solved[:m].T, 1 + NUGGET - (k * solved.T).sum(1)


def test_agrees_with_the_bordered_system(problem):
    _, among, to = problem
    fit = KernelRegression(among, 1.3)
    weights, variances = dense(among, to, 1.3)
    torch.testing.assert_close(fit.weights(to), weights)
    torch.testing.assert_close(fit.variances(to), variances)
    torch.testing.assert_close(fit.weights(to).sum(1), torch.ones(5, dtype=torch.float64))


def test_leaving_one_out_is_leaving_one_out(problem):
    at, among, _ = problem
    fit = KernelRegression(among, 1.3)
    y = at.sin()
    for i in range(3):
        rest = [j for j in range(30) if j != i]
        without, to = KernelRegression(among[rest][:, rest], 1.3), among[i : i + 1, rest]
        torch.testing.assert_close(fit.leave_one_out_variances[i], without.variances(to)[0])
        left = y[i] - (without.weights(to) @ y[rest])[0]
        torch.testing.assert_close(fit.leave_one_out_residuals(y)[i], left)


def test_trust_is_the_slope_of_leaving_one_out(problem):
    at, among, _ = problem
    fit = KernelRegression(among, 1.3)
    noise = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    results = torch.cat([at.sin(), noise], dim=1)
    above, below = 0.0, 0.0
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        without = KernelRegression(among[rest][:, rest], 1.3).weights(among[i : i + 1, rest])
        mean = results[rest].mean(0)
        predicted = (without @ results[rest])[0] - mean
        above += float((predicted * (results[i] - mean)).sum())
        below += float(predicted.square().sum())
    assert 0.1 < above / below < 0.9
    assert fit.trust(results) == pytest.approx(above / below)
    assert fit.trust(at.sin()) > 0.8
    assert fit.trust(torch.ones(30, 1, dtype=torch.float64)) == 1


def test_no_trust_where_the_gain_may_be_chance(problem, generator):
    at, among, _ = problem
    fit = KernelRegression(among, 1.3)
    noise = [torch.randn(30, 4, generator=generator, dtype=torch.float64) for _ in range(50)]
    assert sum(fit.trust(results) > 0 for results in noise) <= 12  # else in half of them
    assert fit.trust(at.sin() + 0.5 * noise[0][:, :3]) > 0.3
    assert fit.trust(1e100 * at.sin()) == pytest.approx(fit.trust(at.sin()))


def test_trust_lies_within_0_and_1():
    at = torch.arange(4, dtype=torch.float64)
    fit = KernelRegression((at[:, None] - at).square(), 3.0)
    zigzag = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert fit.trust(zigzag) == 0
    assert fit.trust(at[:, None]) == 1


def test_the_outputs_variance(generator):
    """Drawn from the model with variance 9, it is estimated as 9."""
    at = torch.randn(200, 2, dtype=torch.float64, generator=generator)
    among = torch.cdist(at, at).square()
    factor = torch.linalg.cholesky(
        matern52(among, 1.0) + NUGGET * torch.eye(200, dtype=torch.float64)
    )
    draws = 3 * factor @ torch.randn(200, 50, dtype=torch.float64, generator=generator) + 7
    assert KernelRegression(among, 1.0).output_variance(draws) == pytest.approx(9, rel=0.05)


def test_distances_that_no_points_have(generator):
    """Equal to a and to b, which differ: the kernel is indefinite by much more than the nugget."""
    noise = torch.rand(30, 30, dtype=torch.float64, generator=generator)
    fit = KernelRegression((noise + noise.T).fill_diagonal_(0), 1.0)
    assert NUGGET < fit.nugget <= 30
    weights = fit.weights(noise)
    assert weights.abs().max() < 10
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64))
    far = KernelRegression(torch.full((9, 9), math.inf).double().fill_diagonal_(0), 1.0)
    assert far.nugget == NUGGET


def test_distances_that_are_no_numbers():
    with pytest.raises(ValueError, match="squared_distances must be numbers, got NaN"):
        KernelRegression(torch.full((3, 3), math.nan, dtype=torch.float64), 1.0)


def test_one_result_and_repeated_inputs():
    one = KernelRegression(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    assert one.weights(torch.tensor([[4.0]], dtype=torch.float64)).item() == pytest.approx(1)
    assert one.output_variance(torch.ones(1, 2, dtype=torch.float64)) == 0
    assert one.trust(torch.ones(1, 2, dtype=torch.float64)) == 1
    same = KernelRegression(torch.zeros(4, 4, dtype=torch.float64), 1.0)
    weights = same.weights(torch.zeros(1, 4, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.full((1, 4), 0.25, dtype=torch.float64))
    apart = torch.full((3, 3), math.inf, dtype=torch.float64).fill_diagonal_(0)
    nowhere = torch.full((1, 3), math.inf, dtype=torch.float64)
    weights = KernelRegression(apart, 1.0).weights(nowhere)
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3, dtype=torch.float64))
