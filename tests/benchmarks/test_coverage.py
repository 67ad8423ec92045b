"""Rivals of error bounds, on a function of one output."""

import pytest
import torch

from benchmarks import coverage
from benchmarks.tasks import Task


class Wave(torch.nn.Module):
    def forward(self, x):
        return x.sin().sum(1, keepdim=True)


def test_rivals_answer_the_same_rows(generator):
    pytest.importorskip("mapie", reason="needs the extra 'bench'")
    inputs = torch.randn(400, 2, generator=generator)
    setting = coverage.Setting(rows=60, missing=8)
    found = coverage.rivals(lambda: Task(Wave(), inputs, inputs), setting, quick=True)
    assert set(found) == {"ours", "split conformal", "sigma times a constant", "jackknife+"}
    for name, numbers in found.items():
        least = 0.6 if name == "sigma times a constant" else 0.8  # it guarantees nothing
        assert least <= numbers["covered"][0] <= 1, name
        assert 0.1 < numbers["bound to ours"] < 10, name  # five batches of a smooth function
    assert found["ours"]["bound to ours"] == 1
    assert found["split conformal"]["bound to ours"] > 1  # half of the results estimate
