"""What a wrapper remembers of latencies: thresholds, calls, and the time that estimates take."""

import copy
import math
import pickle

import pytest

from coded_torch.scheduling._latency_history import EstimationTimes, History
from coded_torch.scheduling.policy import hedging_threshold


def known(seconds=1.0, rows=2, calls=10):
    """A history of equal calls."""
    history = History()
    for _ in range(calls):
        history.add([(rows, seconds)] * 4, (rows, seconds))
    return history


def test_time_to_estimate_is_what_it_took_lately_in_proportion_to_the_rows():
    times = EstimationTimes()
    usual = times.seconds(64, 600)
    for factor in [99.0] + [1.0] * 13 + [2.0] * 3:  # the first loads code
        times.add(factor * usual, 64, 600, False)
    assert times.seconds(64, 600) == pytest.approx(2 * usual)  # of eight, one takes longer
    assert times.seconds(4096, 600) > 10 * times.seconds(1024, 600)
    assert times.reserve(4096, 600, math.inf) == (False, 0.0)
    late = 0.005
    assert times.reserve(64, 600, 0.3) == (False, 1.25 * times.seconds(64, 600) + late)
    for deadline, by_mean in ((10.0, False), (1.0, True), (0.15, True)):  # as time is short
        seconds = 1.25 * times.seconds(4096, 600, by_mean) + late
        assert times.reserve(4096, 600, deadline) == (by_mean, seconds)
    times.add(0.08, 4096, 600, True)  # the mean of wide outputs takes long, too
    assert times.reserve(8192, 600, 0.5) == (True, pytest.approx(1.25 * 0.16 + late))
    assert times.reserve(8192, 600, 0.06) == (True, 0.03)


def test_wide_rows_take_longer_to_estimate_from_the_first_call_on():
    times = EstimationTimes()
    by_mean, seconds = times.reserve(2000, 16, 1.0)
    assert not by_mean
    assert seconds < 0.25
    by_mean, _ = times.reserve(2000, 3072, 1.0)
    assert by_mean  # 2,000 rows of 3,072 features took .64 to .77 s
    by_mean, seconds = times.reserve(2000, 3072, 4.0)
    assert not by_mean
    assert seconds > 0.7


def test_a_regression_that_was_slow_by_chance_is_tried_again():
    times = EstimationTimes()
    usual = times.seconds(64, 1)
    for factor in (1.0, 99.0, 99.0):  # the first loads code
        times.add(factor * usual, 64, 1, False)
    assert times.seconds(64, 1) == pytest.approx(99 * usual)
    for _ in range(64):
        times.add(0.001, 64, 1, True)
    assert times.seconds(64, 1) == pytest.approx(usual)


WIDE = [0.01 * (i + 1) for i in range(100)]  # a tail of 8 medians


@pytest.mark.parametrize(
    ("latencies", "budget", "threshold"),
    [
        ([1.0] * 20 + [0.9] * 20, 0.0, (1 / 0.9) ** 4.45),
        ([1.0] * 25 + [0.8] * 13, 0.0, (1 / 0.8) ** 4.45),
        ([1.0] * 25 + [0.8] * 13 + [math.inf] * 50, 0.0, math.inf),
        ([0.0] * 20 + [0.1] * 30, 0.0, 0.8),
        ([0.02] * 40 + [0.002] * 20, 0.0, 8 * 0.02),  # one worker of three is fast
        (WIDE, 0.2, 0.81),  # parts are late as soon as the budget allows
        (WIDE, 0.25, 1.5 * 0.51),
        (WIDE, 0.0, 8 * 0.51),
    ],
)
def test_the_hedging_threshold_is_the_tail_of_a_lognormal_body(latencies, budget, threshold):
    history = History()
    history.add([(4, seconds) for seconds in latencies], None)
    assert hedging_threshold(history, 4, budget) == pytest.approx(threshold)


def test_no_part_is_late_before_two_milliseconds():
    assert hedging_threshold(known(1e-4), 2) == 2e-3 == hedging_threshold(known(0.0), 2)


def test_what_is_old_is_forgotten():
    history = known(1.0, calls=128)
    for _ in range(200):
        history.add([(2, 3.0)] * 4, (2, 3.0))
    assert (history.part(2), hedging_threshold(history, 2), history.call(2)) == (3.0, 4.5, 3.0)


def test_latencies_are_compared_by_what_their_rows_should_take():
    history = History()
    for _ in range(16):
        history.add([(16, 1.0)] * 3 + [(16, math.inf), (4, 0.325)], (16, 1.5))
    assert history.part(16) == pytest.approx(1.0)
    assert history.part(4) == pytest.approx(0.325)
    assert history.part(10) == pytest.approx(0.6625)
    assert history.part(2) == pytest.approx(0.325)  # no less than ever seen
    assert history.part(32) == pytest.approx(2.0)
    assert history.call(32) == pytest.approx(3.0)
    history = known(rows=16)  # of one size only, fewer rows are given as long
    assert (history.part(4), history.part(16), history.part(48)) == (1.0, 1.0, 3.0)


def test_few_large_parts_do_not_spoil_the_threshold_of_small_ones():
    history = History()
    for number in range(300):  # parts of 1 row, or 2 that take as long, and hardly ever 8
        rows = 8 if number % 100 == 40 else 1 + (number % 3 == 0)
        history.add([(rows, 1.0)], None)
        if number >= 32:
            assert hedging_threshold(history, 1) == hedging_threshold(history, 2) == 1.5, number


def test_sizes_that_are_new_soon_count_as_what_they_take():
    history = known(rows=1, calls=8)
    thresholds = []
    for _ in range(24):
        history.add([(2, 1.0)], None)
        thresholds.append(hedging_threshold(history, 1))
    assert thresholds[8:] == [1.5] * 16


def test_the_bucket_is_filled_by_calls():
    history = History()
    assert history.spend(1.5, most=2.0)
    assert not history.spend(0.75, most=2.0)
    history.earn(0.25)
    assert history.spend(0.75, most=2.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_history_is_empty(copied):
    history = copied(known())
    assert hedging_threshold(history, 2) == math.inf


@pytest.mark.parametrize(("of_four", "num"), [(0.25, 4), (1.0, 1)])
def test_a_hedge_is_split_unless_small_parts_are_known_to_take_as_long(of_four, num):
    history = known(rows=16)
    assert history.num_hedges(16, 4) == 4
    assert history.num_hedges(16, 0) == 1
    history.add([(4, of_four)] * 32, None)
    assert history.num_hedges(16, 4) == num
    assert history.num_hedges(8, 4) == 4  # parts of two rows were never seen
