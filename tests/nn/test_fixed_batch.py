"""Modules that take batches of one size."""

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.codes import ReplicationCode
from coded_torch.nn import FixedBatch
from coded_torch.workers import LocalWorkers, ProcessWorkers


class OnlyEight(nn.Module):
    """Takes eight rows; returns rows first, rows second (as many steps as rows), and a constant."""

    def forward(self, x, scale=None):
        assert x.shape == (8, 8)
        y = x * 2 if scale is None else x * scale
        return {"rows": y, "steps": (y + 1).T.unsqueeze(2), "size": 8, "weights": x.new_ones(3)}


OUT_DIMS = {"rows": 0, "steps": 1, "size": 0, "weights": None}


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 19])
def test_any_number_of_rows(rows):
    x = torch.randn(rows, 8)
    answers = FixedBatch(OnlyEight(), 8, out_dims=OUT_DIMS)(x)
    assert torch.equal(answers["rows"], 2 * x)
    assert torch.equal(answers["steps"], (2 * x + 1).T.unsqueeze(2))
    assert answers["size"] == 8
    assert torch.equal(answers["weights"], torch.ones(3))


def test_keyword_tensors_are_divided_and_gradients_are_those_of_the_rows():
    x = torch.randn(11, 8, requires_grad=True)
    scale = torch.rand(11, 1)
    FixedBatch(OnlyEight(), 8, out_dims=OUT_DIMS)(x, scale=scale)["rows"].sum().backward()
    assert torch.equal(x.grad, scale.expand(11, 8))


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_a_wrapped_one_is_right_in_parts_of_any_size(parts):
    model = FixedBatch(OnlyEight(), 8, out_dims=OUT_DIMS)
    coded = CodedWrapper(model, workers=LocalWorkers(), parts=parts, out_dims=OUT_DIMS)
    x = torch.randn(19, 8)
    answers = coded(x)
    assert torch.equal(answers["steps"], (2 * x + 1).T.unsqueeze(2))
    assert coded.last_run.notes == ()


@torch.no_grad()
def test_processes():
    linear = nn.Linear(3, 2)
    model = FixedBatch(linear, 8, out_dims=0)
    x = torch.randn(10, 3)
    with ProcessWorkers(2) as pool:
        answers = CodedWrapper(model, workers=pool, parts=3)(x)
    torch.testing.assert_close(answers, linear(x))


def test_columns_of_a_code():
    model = FixedBatch(OnlyEight(), 8, out_dims=OUT_DIMS)
    coded = CodedWrapper(model, ReplicationCode(2, 4), out_dims=OUT_DIMS)
    x = torch.randn(6, 8)
    assert torch.equal(coded(x)["rows"], 2 * x)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "out_dims", "error", "said"),
    [
        (lambda x: x[:3], 0, ValueError, r"output must have .*, got shape \(3"),
        (lambda x: x, 1, ValueError, r"output must have .*dim 1, got shape \(4, 2\)"),
        (lambda x: (x, x.sum().item()), 0, TypeError, r"output\[1\] must be a tensor"),
        (lambda x: int(x[0, 0]), 0, ValueError, "output must be the same for all rows"),
    ],
)  # fmt: skip
def test_outputs_without_the_rows_are_refused(make, out_dims, error, said):
    x = torch.arange(12.0).view(6, 2)
    with pytest.raises(error, match=f"^FixedBatch: {said}"):
        FixedBatch(Returns(make), 4, out_dims=out_dims)(x)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: FixedBatch(nn.ReLU(), 0, out_dims=0), ValueError, "batch_size"),
        (lambda: FixedBatch(abs, 2, out_dims=0), TypeError, "module"),
        (lambda: FixedBatch(nn.ReLU(), 2, out_dims=0)(torch.zeros(0, 3)), ValueError, "a row"),
    ],
)
def test_bad_arguments(call, error, said):
    with pytest.raises(error, match=f"^FixedBatch: .*{said}"):
        call()
