"""Scores of answers, and their statistics over batches."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from coded_torch.experiments.scores import (
    half_width,
    paired_p,
    ratio,
    relative_accuracy,
    rmse,
    root,
    rounded,
    score,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 7, 3)])
def test_the_error_is_the_formula(shape):
    decoded, exact = normal(*shape), normal(*shape, seed=1)
    rows = (decoded.double() - exact.double()).reshape(-1, shape[-1]).tolist()
    squares = [sum(x * x for x in row) for row in rows]
    assert rmse(decoded, exact) == pytest.approx(math.sqrt(sum(squares) / len(rows)))
    assert rmse(exact, exact) == 0
    assert rmse(decoded.requires_grad_(), exact) > 0
    found = score(decoded, exact)
    assert found.error == pytest.approx(sum(x**0.5 for x in squares) / len(rows))
    spread = exact.double().reshape(-1, shape[-1])
    spread = (spread - spread.mean(0)).square().sum(1).mean().item()
    assert found.variance == pytest.approx(spread)


def test_relative_accuracy():
    rows = torch.eye(4)
    exact, labels = rows[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 0])  # 3 of 4 right
    assert relative_accuracy(rows[[0, 1, 0, 3]], exact, labels) == pytest.approx(2 / 3)
    assert relative_accuracy(rows[[0, 1, 2, 0]], exact, labels) == pytest.approx(4 / 3)
    batched = relative_accuracy(
        rows[[0, 1, 0, 3]].reshape(2, 2, 4), exact.reshape(2, 2, 4), labels.reshape(2, 2).int()
    )
    assert batched == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="the model must be right at least once, got never"):
        relative_accuracy(rows, rows, torch.tensor([1, 2, 3, 0]))


def test_missing_answers_are_wrong_and_have_no_error():
    exact = torch.eye(4)
    answers = exact.clone()
    answers[0] = math.nan
    found = score(answers, exact, torch.arange(4))
    assert (found.right, found.exact_right, found.agreement) == (0.75, 1, 0.75)
    assert math.isnan(found.mse)
    assert math.isnan(score(exact, exact).right)


def test_intervals_of_a_mean_a_ratio_and_a_root():
    a, b = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.0, 5.0, 6.0])
    low, high = scipy.stats.t.interval(0.95, 3, a.mean(), scipy.stats.sem(a))
    assert half_width(a) == pytest.approx((high - low) / 2, rel=1e-5)
    value, half = ratio(a, b)
    assert value == 1.0
    assert half == pytest.approx(half_width(a - b) / 5, rel=1e-3)
    assert root(a) == pytest.approx([5**0.5, half_width(a) / (2 * 5**0.5)], rel=1e-3)
    assert root(0 * a) == [0, 0]
    assert math.isnan(half_width(a[:1]))
    assert ratio(a, 0 * b)[0] == math.inf
    assert ratio(0 * a, 0 * b) == [None, None]
    assert rounded(math.nan, 1.23456) == [None, 1.235]


@pytest.mark.parametrize("count", [2, 8, 40])
def test_a_paired_p_value_is_that_of_flipped_signs(count):
    differences = np.random.default_rng(1).normal(0.5, size=count)
    how = {"permutation_type": "samples", "n_resamples": 20_000 if count > 14 else np.inf}
    wanted = scipy.stats.permutation_test((differences,), np.mean, rng=0, **how)
    assert paired_p(differences) == pytest.approx(wanted.pvalue, abs=1e-9 if count < 15 else 5e-3)
    assert paired_p(np.ones(8)) == 2 / 2**8
    assert paired_p(np.zeros(8)) == 1
