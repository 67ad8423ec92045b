"""What a GPU applies splines with, by the model."""

import pytest

from benchmarks import choices


def test_the_model_prints_each_choice_beside_its_rivals(capsys):
    rows = choices.model()
    printed = capsys.readouterr().out.splitlines()
    assert len(rows) == len(printed) == len(choices.SIZES)
    for row, line in zip(rows, printed, strict=True):
        small = row["num_knots"] <= 128
        assert row["chosen"] == ("dense" if small else "sweep")
        assert f"{row['chosen']}: copy " in line
        assert all(name in line for name in ("matmul", "dense", "sweep"))
        # The kernel that is chosen is the faster one by the model, too.
        assert row["seconds"][row["chosen"]] == min(row["seconds"][k] for k in ("dense", "sweep"))
        if not small:
            assert row["ratio"] <= row["ratio_bar"]


@pytest.mark.parametrize("size", choices.SIZES, ids=str)
def test_nothing_is_faster_than_its_memory(size):
    for seconds in (choices.dense_seconds, choices.sweep_seconds, choices.product_seconds):
        assert seconds(*size) >= choices.copy_seconds(*size)


def test_regressions_name_what_misses_its_bar():
    rows = choices.model()
    for row in rows:
        row["ratio"] = row["ratio_bar"]
    assert choices.regressions(rows) == []
    rows[1]["ratio"] = float("nan")
    assert choices.regressions(rows) == ["64 -> 128, dense: nan times"]
