"""Scores batch by batch, and their intervals."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from coded_torch.evaluation import scores as functions
from coded_torch.evaluation.summary import Scores, half_width, ratio, rounded, student


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def scores():
    """Of four batches, and what they are of."""
    batches = [(normal(i, 30, 5), normal(10 + i, 30, 5)) for i in range(4)]
    found = Scores()
    for answers, exact in batches:
        found.add(answers, exact, exact.argmax(1), 2.0)
    return found, batches


def test_numbers_are_those_of_the_metrics(scores):
    found, batches = scores
    summary = found.summary()
    squares = [functions.rmse(*batch) ** 2 for batch in batches]
    assert summary["rmse"][0] == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-3)
    means = [functions.rmse_mean(*batch) for batch in batches]
    assert summary["rmse_mean"][0] == pytest.approx(np.mean(means), rel=1e-3)
    agreement = [functions.top1_agreement(*batch) for batch in batches]
    assert summary["agreement"][0] == pytest.approx(np.mean(agreement), rel=1e-3)
    assert summary["relative_accuracy"] == summary["agreement"]  # the labels are the model's own
    expected = np.mean([2 / math.sqrt(square) for square in squares])
    assert summary["predicted_to_measured"][0] == pytest.approx(expected, rel=1e-3)


def test_intervals_are_those_of_the_mean_and_of_a_ratio(scores):
    a, b = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.0, 5.0, 6.0])
    low, high = scipy.stats.t.interval(0.95, 3, a.mean(), scipy.stats.sem(a))
    assert half_width(a) == pytest.approx((high - low) / 2)
    value, half = ratio(a, b)
    assert value == 1.0
    assert half == pytest.approx(student(4) * (a - b).std(ddof=1) / 2 / 5, rel=1e-3)
    assert math.isnan(half_width(a[:1]))
    assert ratio(a, 0 * b)[0] == math.inf
    assert ratio(0 * a, 0 * b) == [None, None]
    assert rounded(math.nan, 1.23456) == [None, 1.235]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 31, 50, 1000])
def test_students_distribution(count):
    assert student(count) == pytest.approx(scipy.stats.t.ppf(0.975, count - 1), rel=1e-12)


def test_against_others(scores):
    found, batches = scores
    better = Scores()
    for answers, exact in batches:
        better.add(exact + 0.5 * (answers - exact), exact, exact.argmax(1))
    summary = better.summary({"worse": found, "itself": better})
    assert "against itself" not in summary
    assert summary["against worse"]["mse"] == [0.25, 0.0]
    assert summary["against worse"]["relative_accuracy"][0] > 0
    assert "predicted_to_measured" not in summary


def test_missing_answers_are_wrong_and_have_no_error():
    exact = torch.eye(4)
    answers = exact.clone()
    answers[0] = math.nan
    scores = Scores()
    scores.add(answers, exact, torch.arange(4))
    assert scores.summary()["relative_accuracy"][0] == 0.75
    assert scores.summary()["rmse"] == [None, None]


def test_scores_add_up(scores):
    found, _ = scores
    both = Scores()
    both += found
    both += found
    assert both.columns.shape == (7, 8)


def test_without_labels_there_is_no_accuracy():
    scores = Scores()
    scores.add(torch.eye(3), torch.eye(3))
    assert scores.summary()["relative_accuracy"] == [None, None]
    assert scores.summary()["agreement"][0] == 1
