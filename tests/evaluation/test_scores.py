"""Scores of answers, and their intervals over batches."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from coded_torch.evaluation.scores import (
    Scores,
    half_width,
    ratio,
    relative_accuracy,
    rmse,
    rounded,
    student,
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


def test_half_precision_is_measured_in_float64():
    exact = torch.full((1, 10_000), 60_000.0, dtype=torch.float16)
    assert rmse(-exact, exact) == pytest.approx(120_000 * 100, rel=1e-3)


def test_relative_accuracy():
    rows = torch.eye(4)
    exact, labels = rows[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 0])  # 3 of 4 right
    assert relative_accuracy(rows[[0, 1, 0, 3]], exact, labels) == pytest.approx(2 / 3)
    assert relative_accuracy(rows[[0, 1, 2, 0]], exact, labels) == pytest.approx(4 / 3)
    batched = relative_accuracy(
        rows[[0, 1, 0, 3]].reshape(2, 2, 4), exact.reshape(2, 2, 4), labels.reshape(2, 2).int()
    )
    assert batched == pytest.approx(2 / 3)


X, LABELS = torch.eye(3), torch.arange(3)
BAD = [
    ([1.0], X, TypeError, "decoded must be a dense, strided floating-point tensor.*, got list"),
    (
        X,
        X.int(),
        TypeError,
        "exact must be a dense, strided floating-point tensor.*, got torch.int",
    ),
    (X[:2], X, ValueError, r"decoded must have the shape of exact, \(3, 3\), got \(2, 3\)"),
    (X[:0], X[:0], ValueError, r"decoded must have shape .* at least one answer, got \(0, 3\)"),
    (X / 0, X, ValueError, "decoded must be finite, got NaN or infinity"),
]


@pytest.mark.parametrize(("decoded", "exact", "kind", "message"), BAD)
@pytest.mark.parametrize("score", [rmse, relative_accuracy])
def test_bad_answers(score, decoded, exact, kind, message):
    labels = () if score is rmse else (LABELS,)
    with pytest.raises(kind, match=f"^{score.__name__}: {message}"):
        score(decoded, exact, *labels)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        (X, TypeError, "labels must be an integer tensor, got torch.float32"),
        ([0, 1, 2], TypeError, "labels must be an integer tensor, got list"),
        (LABELS[:2], ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        ((LABELS + 1) % 3, ValueError, "the model must be right at least once, got never"),
    ],
)
def test_bad_labels(labels, kind, message):
    with pytest.raises(kind, match=f"^relative_accuracy: {message}"):
        relative_accuracy(X, X, labels)


@pytest.fixture
def found():
    """The scores of four batches, and the batches."""
    batches = [(normal(30, 5, seed=i), normal(30, 5, seed=10 + i)) for i in range(4)]
    scores = Scores()
    for answers, exact in batches:
        scores.add(answers, exact, exact.argmax(1))
    return scores, batches


def test_a_summary(found):
    scores, batches = found
    summary = scores.summary()
    squares = [rmse(*batch) ** 2 for batch in batches]
    assert summary["rmse"][0] == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-3)
    means = [float((answers - exact).norm(dim=1).mean()) for answers, exact in batches]
    assert summary["rmse_mean"][0] == pytest.approx(np.mean(means), rel=1e-3)
    agreement = [float((a.argmax(1) == e.argmax(1)).float().mean()) for a, e in batches]
    assert summary["agreement"][0] == pytest.approx(np.mean(agreement), rel=1e-3)
    assert summary["relative_accuracy"] == summary["agreement"]  # the labels are the model's own
    variances = [rmse(e.mean(0).expand_as(e), e) ** 2 for _, e in batches]
    assert summary["mse_to_variance"][0] == pytest.approx(sum(squares) / sum(variances), rel=1e-3)


def test_intervals_of_a_mean_and_of_a_ratio():
    a, b = np.array([3.0, 5.0, 4.0, 8.0]), np.array([4.0, 5.0, 5.0, 6.0])
    low, high = scipy.stats.t.interval(0.95, 3, a.mean(), scipy.stats.sem(a))
    assert half_width(a) == pytest.approx((high - low) / 2, rel=1e-5)
    value, half = ratio(a, b)
    assert value == 1.0
    assert half == pytest.approx(student(4) * (a - b).std(ddof=1) / 2 / 5, rel=1e-3)
    assert math.isnan(half_width(a[:1]))
    assert ratio(a, 0 * b)[0] == math.inf
    assert ratio(0 * a, 0 * b) == [None, None]
    assert rounded(math.nan, 1.23456) == [None, 1.235]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 11, 12, 31, 50, 1000])
def test_students_distribution(count):
    assert student(count) == pytest.approx(scipy.stats.t.ppf(0.975, count - 1), rel=6e-5)


def test_against_others(found):
    scores, batches = found
    better = Scores()
    for answers, exact in batches:
        better.add(exact + 0.5 * (answers - exact), exact, exact.argmax(1))
    summary = better.summary({"worse": scores, "itself": better})
    assert "against itself" not in summary
    assert summary["against worse"]["mse"] == pytest.approx([0.25, 0.0], abs=1e-6)
    assert summary["against worse"]["relative_accuracy"][0] > 0
    better += scores
    assert better.columns.shape == (6, 8)


def test_missing_answers_are_wrong_and_have_no_error():
    exact = torch.eye(4)
    answers = exact.clone()
    answers[0] = math.nan
    scores = Scores()
    scores.add(answers, exact, torch.arange(4))
    assert scores.summary()["relative_accuracy"][0] == 0.75
    assert scores.summary()["rmse"] == [None, None]


def test_without_labels_there_is_no_accuracy():
    scores = Scores()
    scores.add(torch.eye(3), torch.eye(3))
    assert scores.summary()["relative_accuracy"] == [None, None]
    assert scores.summary()["agreement"][0] == 1
