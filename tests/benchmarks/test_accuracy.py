"""The comparison of schemes on networks: its cells, what is drawn, and the gain over Berrut."""

import pytest

from benchmarks import accuracy
from benchmarks.subjects import subject
from benchmarks.tables import BASELINES
from coded_torch.experiments.scores import Comparison, Record, Score


def record(scheme, batch, mse, right=1.0, lost=1):
    score = Score(mse, mse**0.5, 2.0, right, 1.0, right)
    return Record(3, 2, lost, scheme, "", 0, batch, 500, 1.5, score)


def test_cells_hold_differences_and_exact_rates_of_rare_changes():
    records = [record("regression", i, 1.0 + i) for i in range(4)]
    records += [record("the paper's scheme", i, 2.0 + 2 * i, 0.998) for i in range(4)]
    cells = accuracy.cells(Comparison(records))
    of_paper = cells["the paper's scheme"]
    assert of_paper["against regression"]["mse"] == [2.0, 0.0]
    assert of_paper["against regression"]["relative_accuracy"][0] == pytest.approx(-0.002)
    assert "against regression" not in cells["regression"]
    share, low, high = of_paper["changed"]
    assert (share, cells["regression"]["changed"][0]) == (0.002, 0)
    assert low < share < high < 0.006
    assert cells["regression"]["changed"][2] == pytest.approx(1 - 0.025 ** (1 / 2000), rel=1e-2)
    assert accuracy.rate(3, 10) == [0.3]


def test_a_table_has_the_baselines_and_counts_trainings_once():
    found = accuracy.table("lenet5", (6, 4, 2), 24, accuracy.Uniform, quick=True)
    assert set(BASELINES) < set(found["schemes"])
    assert found["observations"] == 5  # one training: its batches are the observations
    assert found["rows"] == 5 * 24 * 2
    assert set(found["codes"]) < set(found["schemes"])


def test_batches_are_disjoint_and_end():
    of = subject("lenet5", quick=True)
    batches = list(of.batches("held_out", 240, 100))
    assert [len(x.images) for x in batches] == [240] * 6  # of 1,500 rows
    rows = {row.numpy().tobytes() for x in batches for row in x.images}
    assert len(rows) > 1400
