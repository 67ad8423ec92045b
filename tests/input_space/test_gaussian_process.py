"""Regression on distances against the dense formulas, and at its limits."""

import math

import pytest
import torch

from coded_torch import ops
from coded_torch.input_space._gaussian_process import NUGGET, GaussianProcess, evenly
from coded_torch.ops import matern52

KNOWN, ASKED = torch.arange(30), torch.arange(30, 35)


@pytest.fixture
def problem(generator):
    """Points with results, 30, and without, 5; the squared distances of all."""
    at = torch.randn(35, 3, dtype=torch.float64, generator=generator)
    return at[:30], torch.cdist(at, at).square()


def given(squared, length=1.3, known=KNOWN, at=ASKED):
    return GaussianProcess(squared, length, known, at)


def trust(process, results):
    return process.estimate(results).trust


def dense(squared, length):
    """The best linear unbiased estimator by its bordered system, and its variance."""
    m = len(KNOWN)
    c = matern52(squared[:m, :m], length) + NUGGET * torch.eye(m, dtype=torch.float64)
    border = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    border[:m, :m], border[:m, m], border[m, :m] = c, 1, 1
    k = torch.cat([matern52(squared[m:, :m], length), torch.ones(5, 1, dtype=torch.float64)], dim=1)
    solved = torch.linalg.solve(border, k.T)
    return solved[:m].T, 1 + NUGGET - (k * solved.T).sum(1)


def test_agrees_with_the_bordered_system(problem):
    at, squared = problem
    process = given(squared)
    weights, variances = dense(squared, 1.3)
    torch.testing.assert_close(process.weights, weights)
    torch.testing.assert_close(process.variances, variances)
    torch.testing.assert_close(process.estimate(at.sin(), 1.0).values, weights @ at.sin())
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    coefficients, mean = ops.coefficients(process.tensors, at.sin())
    found = matern52(squared[30:, :30], 1.3).float() @ coefficients.T + mean
    torch.testing.assert_close(found, (weights @ at.sin()).float(), rtol=1e-3, atol=1e-3)


def test_leaving_one_out_is_leaving_one_out(problem):
    at, squared = problem
    process, y = given(squared), at.sin()
    residuals = process.leave_one_out_residuals(y)
    for i in range(30):
        rest = torch.tensor([j for j in range(30) if j != i])
        without = given(squared, known=rest, at=torch.tensor([i]))
        torch.testing.assert_close(process.leave_one_out_variances[i], without.variances[0])
        left = y[i] - (without.weights @ y[rest])[0]
        torch.testing.assert_close(residuals[i], left, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(process.leave_one_out_residuals(y.repeat(1, 12))[:, :3], residuals)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_many_results_some_are_left_out(generator, dtype):
    """The factor itself takes the place of its inverse."""
    at = torch.randn(600, 3, dtype=torch.float64, generator=generator)
    squared, y = torch.cdist(at, at).square(), at[:570].sin()
    known, asked = torch.arange(570), torch.arange(570, 600)
    process, few = given(squared.to(dtype), 1.3, known, asked), evenly(torch.arange(570), 256)
    exact = matern52(squared, 1.3) + NUGGET * torch.eye(600, dtype=torch.float64)
    inverse = torch.linalg.inv(exact[:570, :570])
    mean = inverse.sum(0)
    inverse -= mean[:, None] * mean / mean.sum()
    variances = 1 / inverse.diagonal()[few]
    close = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 0.02, "atol": 2e-3}
    torch.testing.assert_close(process.leave_one_out_variances, variances, **close)
    residuals = (inverse @ y)[few] * variances[:, None]
    torch.testing.assert_close(process.leave_one_out_residuals(y), residuals, **close)
    wide = process.leave_one_out_residuals(y.to(dtype).repeat(1, 200))  # by the map
    torch.testing.assert_close(wide[:, :3].double(), residuals, **close)
    found = process.estimate(y, 1.0).values
    torch.testing.assert_close(found, process.weights @ y, **close)
    torch.testing.assert_close(process.weights_of_left_out, process.weights[:, few], **close)
    coefficients, offset = ops.coefficients(process.tensors, y)
    other = matern52(squared[570:, :570], 1.3).float() @ coefficients.T + offset
    torch.testing.assert_close(other.double(), found, rtol=0.02, atol=5e-3)


def test_trust_is_the_slope_of_leaving_one_out(problem):
    at, squared = problem
    process = given(squared)
    noise = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    results = torch.cat([at.sin(), noise], dim=1)
    above, below = 0.0, 0.0
    for i in range(30):
        rest = torch.tensor([j for j in range(30) if j != i])
        weights = given(squared, known=rest, at=torch.tensor([i])).weights
        mean = results[rest].mean(0)
        estimated = (weights @ results[rest])[0] - mean
        above += float((estimated * (results[i] - mean)).sum())
        below += float(estimated.square().sum())
    assert 0.1 < above / below < 0.9
    assert trust(process, results) == pytest.approx(above / below, rel=1e-4)
    assert trust(process, at.sin()) > 0.8
    assert trust(process, torch.ones(30, 1, dtype=torch.float64)) == 1


def test_trust_lies_within_0_and_1():
    at = torch.arange(4, dtype=torch.float64)
    process = GaussianProcess((at[:, None] - at).square(), 3.0)
    zigzag = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert trust(process, zigzag) == 0
    assert trust(process, at[:, None]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distances_that_no_points_have(generator, dtype):
    """Equal to a and to b, which differ: the kernel is indefinite by much more than the nugget."""
    noise = torch.rand(35, 35, dtype=torch.float64, generator=generator).to(dtype)
    weights = given((noise + noise.T).fill_diagonal_(0), 1.0).weights
    assert weights.abs().max() < 10
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))


def test_one_result_and_repeated_inputs():
    squared = torch.tensor([[0.0, 4.0], [4.0, 0.0]], dtype=torch.float64)
    one = GaussianProcess(squared, 1.0, torch.tensor([0]), torch.tensor([1]))
    assert one.weights.item() == pytest.approx(1)
    assert trust(one, torch.ones(1, 2, dtype=torch.float64)) == 1
    for far in (0.0, math.inf):  # all at one place; each infinitely far from all others
        squared = torch.full((5, 5), far, dtype=torch.float64).fill_diagonal_(0)
        weights = given(squared, 1.0, torch.arange(4), torch.tensor([4])).weights
        torch.testing.assert_close(weights, torch.full((1, 4), 0.25, dtype=torch.float64))


def test_distances_that_are_no_numbers():
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(RuntimeError, match="squared must be numbers, got NaN"):
            GaussianProcess(torch.full((4, 4), math.nan, dtype=dtype), 1.0)
