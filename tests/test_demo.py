"""The shipped digits and network, the comparison, and its table and picture."""

import importlib.resources
import math

import pytest
import torch

from coded_torch import codes, metrics
from coded_torch.demo.comparison import Row, Setting, compare, draw_batches, tune_degrees
from coded_torch.demo.lenet5 import LeNet5, digits, lenet5
from coded_torch.demo.report import LEGEND, draw_picture, format_table
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform

SMALL = Setting(num_workers=12, num_data=4, num_stragglers=5)
BATCHES = 6


@pytest.fixture(scope="module")
def shipped():
    return lenet5(), *digits()


@pytest.fixture(scope="module")
def small(shipped):
    return _compare(shipped, SMALL, seed=3)


def _compare(shipped, setting, seed):
    model, images, labels = shipped
    rows = compare(
        model, setting, images[50:], labels[50:], images[:50], num_batches=BATCHES, seed=seed
    )
    return {row.code: row for row in rows}


def test_digits(shipped):
    _, images, labels = shipped
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal((images * 255).round() / 255, images)
    assert labels.dtype == torch.int64
    # Rows 0, 5, 10, ... of the official test set, whose first labels are 7 2 1 0 4 1 4 9 5 9 0.
    assert labels[:3].tolist() == [7, 1, 0]
    assert labels.bincount().tolist() == [189, 222, 212, 242, 196, 186, 158, 215, 193, 187]


def test_lenet5_reads_the_shipped_digits(shipped):
    model, images, labels = shipped
    assert not model.training
    with torch.inference_mode():
        right = (model(images).argmax(-1) == labels).double().mean()
    assert right >= 0.990  # measured: 0.991; rounding may turn a digit or two


def test_lenet5_is_the_classic_size():
    assert sum(p.numel() for p in LeNet5().parameters()) == 61_706


def test_notice():
    notice = (importlib.resources.files("coded_torch") / "data" / "NOTICE").read_text()
    for needed in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0", "every fifth", "Changed"):
        assert needed in notice


def test_every_code_loses_the_same_workers(small):
    received = small["spline"].outcome.received
    assert len(received) == BATCHES
    assert len(set(received)) > 1
    assert all(len(workers) == 12 - 5 for workers in received)
    for code in ("kernel", "Berrut", "Lagrange for RMSE", "Lagrange for RelAcc", "replication"):
        assert small[code].outcome.received == received
    # Six batches are five and one: the law is the same, the calls are fewer.
    assert small["kernel on 5 batches"].outcome.received == received[:2]
    uncoded = small["uncoded"]
    assert uncoded.note == "2 of 4 late"
    assert all(len(workers) == 2 for workers in uncoded.outcome.received)


def test_share_of_inputs_answered(small):
    assert small["spline"].outcome.answered == 1
    assert small["uncoded"].outcome.answered == 0.5
    assert small["kernel"].outcome.answered is None
    replication = codes.ReplicationCode(4, 12)
    received = small["replication"].outcome.received
    answered = torch.stack([replication.answered(workers) for workers in received])
    assert small["replication"].outcome.answered == pytest.approx(answered.double().mean().item())


def test_kernel_numbers_are_those_of_the_wrapper(shipped):
    model, images, labels = shipped
    images = images[50:]
    rows = draw_batches(len(labels) - 50, 4, BATCHES, torch.Generator().manual_seed(3))
    coded = CodedWrapper(
        model, codes.KernelCode(4, 5), stragglers=Uniform(2, seed=3), shuffle=False
    )
    with torch.inference_mode():
        decoded = torch.cat([coded(images[batch.flatten()]) for batch in rows.split(5)])
        exact = model(images[rows.flatten()])
    error = metrics.rmse(decoded, exact)
    outcome = _compare(shipped, Setting(5, 4, 2), seed=3)["kernel on 5 batches"].outcome
    assert outcome.rmse == pytest.approx(error, rel=1e-4)
    assert error > 1


@pytest.mark.parametrize("code", [codes.SplineCode(4, 12), codes.BerrutCode(4, 12)])
def test_numbers_are_those_of_a_run_by_hand(shipped, small, code):
    model, images, labels = shipped
    images, labels = images[50:], labels[50:]
    outcome = small["spline" if isinstance(code, codes.SplineCode) else "Berrut"].outcome
    rows = draw_batches(len(labels), 4, BATCHES, torch.Generator().manual_seed(3))
    squares, right, right_exact = 0.0, 0, 0
    for batch, workers in zip(rows, outcome.received, strict=True):
        with torch.inference_mode():
            exact = model(images[batch])
            results = model(code.encode(images[batch]))[list(workers)]
        decoded = code.decode(results, workers)
        squares += (decoded - exact).square().sum().item()
        right += (decoded.argmax(-1) == labels[batch]).sum().item()
        right_exact += (exact.argmax(-1) == labels[batch]).sum().item()
    assert outcome.rmse == pytest.approx(math.sqrt(squares / rows.numel()), rel=1e-4)
    assert outcome.relative_accuracy == pytest.approx(right / right_exact)


def test_a_seed_repeats_and_another_does_not(shipped, small):
    assert _compare(shipped, SMALL, seed=3) == small
    assert _compare(shipped, SMALL, seed=4)["spline"].outcome != small["spline"].outcome


def test_nobody_late(shipped):
    rows = _compare(shipped, Setting(12, 4, 0), seed=0)
    for code in ("kernel", "kernel on 5 batches", "replication", "uncoded"):
        outcome = rows[code].outcome
        assert (outcome.relative_accuracy, outcome.interval) == (1, 0)
        assert outcome.rmse < 1e-4  # a float32 product rounds differently in another batch size


def test_where_codes_do_not_apply(shipped):
    rows = _compare(shipped, Setting(num_workers=3, num_data=4, num_stragglers=1), seed=0)
    for code in ("kernel", "replication"):
        assert rows[code] == Row(code, "not applicable: fewer workers than inputs", None)
    assert rows["spline"].outcome is not None
    rows = _compare(shipped, Setting(num_workers=10, num_data=1, num_stragglers=9), seed=0)
    assert rows["uncoded"].outcome is None
    assert rows["uncoded"].note == "not applicable: 1 of 1 late"
    assert rows["Lagrange for RMSE"].note == "degree 0"


def test_batches_show_every_input_before_one_comes_again():
    rows = draw_batches(10, 4, 5, torch.Generator().manual_seed(0)).flatten()
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))


def test_tuned_degrees_are_that_of_a_linear_model():
    # A linear model's results are of degree K - 1 = 3: less is biased, and with noise as large as
    # this, more is worse.
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(50, 4, 6, dtype=torch.float64, generator=generator)

    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x + 0.3 * torch.randn(x.shape, dtype=x.dtype, generator=generator)

    assert tune_degrees(Noisy(), Setting(30, 4, 12), batches, generator) == (3, 3)


def test_table_fits_a_terminal(small):
    table = format_table(SMALL, list(small.values()))
    lines = table.splitlines()
    assert max(map(len, (*lines, *LEGEND.splitlines()))) <= 80
    assert lines[0].startswith("N = 12 workers, K = 4 inputs coded together, S = 5")
    for line, row in zip(lines[2:], small.values(), strict=True):
        assert line.startswith(f"  {row.code}")
        assert f"{row.outcome.relative_accuracy:.3f} ± {row.outcome.interval:.3f}" in line
        assert f" {row.outcome.rmse:.2f} " in line
        if row.code.startswith("kernel"):
            assert line.endswith(" predicted")
        else:
            unmixed = row.code in ("replication", "uncoded")
            assert line.endswith(f" {row.outcome.answered:.1%}" if unmixed else " mixed")
    assert len({len(line) for line in lines[2:]}) == 1


def test_table_says_what_does_not_apply():
    row = Row("replication", "not applicable: fewer workers than inputs", None)
    assert format_table(Setting(3, 4, 1), [row]).endswith(
        "\n  replication, not applicable: fewer workers than inputs"
    )


def test_picture_leaves_out_exact_answers_and_missing_codes(small, shipped):
    rows = list(small.values())
    missing = [Row(row.code, "not applicable: no reason", None) for row in rows]
    nobody_late = list(_compare(shipped, Setting(12, 4, 0), seed=0).values())
    figure = draw_picture(SMALL, {0: nobody_late, 5: rows, 9: missing})
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert lines == {
        "kernel on 5 batches": [],  # of 3 copies of each input, one was always in time
        "kernel": [],
        "spline": [0, 5],
        "Berrut": [0, 5],
        "Lagrange for RMSE": [5],  # of 3 K workers, K get an input itself
        "replication": [5],
        "uncoded": [5],
    }


def test_the_paper_setting(shipped):
    """What the demo prints at (N, K, S) = (100, 20, 60), on 50 batches of held-out digits."""
    model, images, labels = shipped
    rows = compare(
        model,
        Setting(100, 20, 60),
        images[500:],
        labels[500:],
        images[:500],
        num_batches=50,
        seed=0,
    )
    outcome = {row.code: row.outcome for row in rows}
    assert outcome["spline"].relative_accuracy >= 0.92  # measured: 0.942
    assert outcome["spline"].rmse <= 0.9 * outcome["Berrut"].rmse  # measured: 0.855
    kernel = outcome["kernel"]
    assert kernel.rmse <= 0.9 * outcome["replication"].rmse
    assert outcome["kernel on 5 batches"].rmse <= 0.8 * kernel.rmse
    assert outcome["kernel on 5 batches"].relative_accuracy > kernel.relative_accuracy
