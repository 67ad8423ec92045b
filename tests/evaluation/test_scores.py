import math

import pytest
import torch

from coded_torch.evaluation import scores


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 7, 3)])
def test_errors_are_the_formulas(shape):
    decoded, exact = normal(*shape), normal(*shape, seed=1)
    rows = (decoded.double() - exact.double()).reshape(-1, shape[-1]).tolist()
    squares = [sum(x * x for x in row) for row in rows]
    assert scores.rmse(decoded, exact) == pytest.approx(math.sqrt(sum(squares) / len(rows)))
    mean = sum(map(math.sqrt, squares)) / len(rows)
    assert scores.rmse_mean(decoded, exact) == pytest.approx(mean)
    assert scores.rmse_mean(decoded, exact) <= scores.rmse(decoded, exact)


def test_no_error():
    exact = normal(4, 3)
    assert scores.rmse(exact, exact) == scores.rmse_mean(exact, exact) == 0
    assert scores.top1_agreement(exact, exact) == 1
    assert scores.relative_accuracy(exact, exact, exact.argmax(-1)) == 1


def test_half_precision_is_measured_in_float64():
    exact = torch.full((1, 10_000), 60_000.0, dtype=torch.float16)
    assert scores.rmse(-exact, exact) == pytest.approx(120_000 * 100, rel=1e-3)


def test_gradients_stay_out():
    assert scores.rmse(normal(2, 3).requires_grad_(), normal(2, 3)) >= 0


def test_relative_accuracy():
    rows = torch.eye(4)
    exact, labels = rows[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 0])  # 3 of 4 right
    assert scores.relative_accuracy(rows[[0, 1, 0, 3]], exact, labels) == pytest.approx(2 / 3)
    repaired = scores.relative_accuracy(rows[[0, 1, 2, 0]], exact, labels)
    assert repaired == pytest.approx(4 / 3)
    batched = scores.relative_accuracy(
        rows[[0, 1, 0, 3]].reshape(2, 2, 4), exact.reshape(2, 2, 4), labels.reshape(2, 2).int()
    )
    assert batched == pytest.approx(2 / 3)


def test_top1_agreement():
    rows = torch.eye(3)
    assert scores.top1_agreement(rows[[0, 1, 2, 2]], rows[[0, 1, 2, 1]]) == 0.75


ALL = [
    scores.rmse,
    scores.rmse_mean,
    scores.top1_agreement,
    lambda decoded, exact: scores.relative_accuracy(decoded, exact, torch.tensor([0, 0])),
]


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize(
    ("decoded", "exact", "error", "message"),
    [
        (normal(2, 3), [1.0], TypeError, "exact must be a dense, .* got list"),
        (normal(2, 3).int(), normal(2, 3), TypeError, "decoded must be .* got torch.int32"),
        (normal(2, 3), normal(2, 4), ValueError, r"shape of exact, \(2, 4\), got \(2, 3\)"),
        (normal(0, 3), normal(0, 3), ValueError, r"at least one answer, got \(0, 3\)"),
        (normal(()), normal(()), ValueError, r"at least one answer, got \(\)"),
        (normal(2, 3) * math.nan, normal(2, 3), ValueError, "decoded must be finite"),
        (normal(2, 3), normal(2, 3) * math.inf, ValueError, "exact must be finite"),
    ],
)
def test_bad_answers(metric, decoded, exact, error, message):
    with pytest.raises(error, match=message):
        metric(decoded, exact)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, "labels must be an integer tensor, got list"),
        (torch.zeros(2), TypeError, "labels must be an integer tensor, got torch.float32"),
        (torch.zeros(2, 3, dtype=int), ValueError, r"labels must have shape \(2,\), got \(2, 3\)"),
        (torch.tensor([3, 3]), ValueError, "the model must be right at least once"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=f"relative_accuracy: {message}"):
        scores.relative_accuracy(normal(2, 3), normal(2, 3), labels)
