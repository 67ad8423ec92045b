"""Distances in a metric that the rows determine themselves."""

import math

import pytest
import torch

from coded_torch.input_space.metrics import Leaf, Metric, added_up, fitted
from coded_torch.ops import squared_distances, typical_rows

SHRINKAGES = [0.0, 0.01, math.inf]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def measured(features, shrinkage):
    """Squared distances of all rows, and their squared lengths, of which the mean is 1."""
    (fit,) = fitted([Leaf(x) for x in features], [Metric("rows", shrinkage)])
    squared, squares, _, _ = squared_distances(fit.coordinates, fit.unit)
    return squared / (fit.unit or 1), squares / (fit.unit or 1)


def naive(features, shrinkage):
    """Squared distances of all rows, and their squared lengths, in float64."""
    rows = []
    for x in features:
        centred = x.double() - x.double().mean(0)
        rows.append(centred / centred.square().sum(1).mean().sqrt())
    x = torch.cat(rows, 1)
    covariance = x.T @ x
    metric = covariance if shrinkage else torch.eye(len(covariance), dtype=torch.float64)
    if 0 < shrinkage < math.inf:
        eye = torch.eye(len(covariance), dtype=torch.float64)
        metric = covariance @ torch.linalg.inv(covariance + shrinkage * covariance.trace() * eye)
    gram = x @ metric @ x.T
    gram = gram * len(gram) / gram.trace()
    squares = gram.diagonal()
    return squares[:, None] + squares - 2 * gram, squares


@pytest.mark.parametrize("shrinkage", [0.0, 0.003, 0.01, 0.3, 30.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("widths", [[3], [1], [40], [16, 5, 1]])
def test_distances_and_lengths(shrinkage, dtype, widths):
    features = [randn(24, w, seed=i, dtype=dtype) * 7**i + 3 * i for i, w in enumerate(widths)]
    (squared, squares), (want, lengths) = measured(features, shrinkage), naive(features, shrinkage)
    assert squared.dtype == torch.float32
    torch.testing.assert_close(squared.double(), want, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(squares.double(), lengths, atol=2e-4, rtol=1e-3)
    assert torch.equal(squared, squared.T)
    assert (squared >= 0).all()
    assert (squared.diagonal() == 0).all()


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("width", [3, 784, 14_700])
def test_equal_rows_are_at_distance_zero(shrinkage, width):
    x = added_up(randn(33, width) + 5)[torch.arange(66) % 33]
    zero = torch.eye(33, dtype=torch.bool).repeat(2, 2)
    assert torch.equal(measured([x], shrinkage)[0] == 0, zero)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("fill", [0.0, 0.1, 1e18])
def test_batches_without_any_spread(batch_size, fill, shrinkage):
    squared, _ = measured([torch.full((batch_size, 7), fill)], shrinkage)
    assert torch.equal(squared, torch.zeros(batch_size, batch_size))
    assert measured([torch.zeros(batch_size, 0)], shrinkage)[0].shape == (batch_size, batch_size)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30, 255.0])
def test_rows_that_are_not_typical(bad):
    """They are not finite, or far longer than others, in any of the inputs."""
    x, y = randn(12, 6), randn(12, 1)
    x[2, 3], y[7] = bad, bad
    assert (~typical_rows([x, y])).nonzero().flatten().tolist() == [2, 7]
    ones = torch.ones(40, 3)
    ones[7] = 100
    assert (~typical_rows([ones])).nonzero().flatten().tolist() == [7]
    zeros = torch.zeros(40, 3)
    zeros[7] = 100  # most are 0: the others are not too long
    assert typical_rows([zeros]).all()


def test_many_features_are_added_up():
    x = randn(100, 8) @ randn(8, 3 * 60 * 60, seed=1)
    assert torch.equal(added_up(x), added_up(x))
    assert added_up(x).shape == (100, 2039)
    got, want = measured([added_up(x)], 0.0)[0], naive([x], 0.0)[0]
    ratio = (got / want)[~torch.eye(100, dtype=torch.bool)]
    ratio = ratio / ratio.mean()
    assert float(ratio.std()) < 2 / math.sqrt(2039)
    assert float((ratio - 1).abs().max()) > 1e-4  # they were
