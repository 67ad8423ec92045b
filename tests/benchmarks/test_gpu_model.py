"""The kernel that a GPU applies splines with, by the model."""

import re
from pathlib import Path

import pytest

from benchmarks import gpu_model

README = Path(__file__).parents[2] / "csrc" / "README.md"


def test_the_model_prints_each_choice_beside_its_rivals(capsys):
    rows = gpu_model.model()
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == len(printed) == len(gpu_model.SIZES)
    for row, line in zip(rows, printed, strict=True):
        small = row["num_knots"] <= 128
        assert row["what"] == ("dense" if small else "sweep")
        assert f"{row['what']}: copy " in line
        assert all(name in line for name in ("matmul", "dense", "sweep"))
        # The kernel that is chosen is the faster one by the model, too.
        assert row["seconds"][row["what"]] == min(row["seconds"][k] for k in ("dense", "sweep"))
        ((ratio, bar),) = row["bars"].values()
        assert small or ratio <= bar


@pytest.mark.parametrize("size", gpu_model.SIZES, ids=str)
def test_nothing_is_faster_than_its_memory(size):
    seconds = gpu_model.model_seconds(*size)
    assert min(seconds.values()) == seconds["copy"]


def test_the_table_of_the_cost_model_is_the_models():
    kernels = {"product": "dense", "sweep": "sweep"}
    pattern = r"^\| (\d+) -> (\d+) x ([\d,]+) \| (product|sweep) \| (.*) \|$"
    table = [
        (tuple(int(t.replace(",", "")) for t in size), kernels[kernel], times.split(" | "))
        for *size, kernel, times in re.findall(pattern, README.read_text(), re.M)
    ]
    for (size, kernel, times), row in zip(table, gpu_model.model(), strict=True):
        assert size == (row["num_knots"], row["num_points"], row["columns"])
        assert kernel == row["what"]
        assert times == [f"{t * 1e6:.0f}" for t in row["seconds"].values()]
