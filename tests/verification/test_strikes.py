"""What is known of workers after many calls."""

import math

import pytest

from coded_torch.verification import Strikes
from coded_torch.workers import DeviceWorkers

from .pool import record


def of(num_workers=24, share=0.02):
    return record(num_workers, share)


class TestExclusion:
    @pytest.mark.parametrize("num_workers", [3, 6, 24, 1000])
    def test_comes_with_so_many_strikes(self, num_workers):
        strikes, least = of(num_workers), 1 + math.ceil(4 / math.log10(num_workers))
        struck = [strikes.strike(2) for _ in range(least)]
        assert struck == [False] * (least - 1) + [True]
        assert strikes.excluded == {2}

    def test_takes_more_if_others_have_strikes_too(self):
        strikes = of()
        strikes.strike(1)
        assert [strikes.strike(2) for _ in range(7)] == [False] * 6 + [True]

    def test_ends_with_a_restart(self):
        strikes = of()
        while not strikes.strike(2):
            pass
        strikes.renew([2])
        assert strikes.excluded == set()
        assert strikes.fresh(2)


def test_strikes_of_most_workers_mean_a_random_module():
    strikes = of()
    for worker in range(len(strikes.workers) // 2 + 1):
        assert not strikes.stopped
        strikes.strike(worker)
    assert strikes.stopped


def test_strikes_halve():
    strikes = of()
    for _ in range(3):
        strikes.strike(2)
    for _ in range(2000):
        strikes.draw([range(3)])
    assert [strikes.strike(2) for _ in range(3)] == [False, False, True]


class TestDrawn:
    def test_rows_ride_in_parts_of_others(self):
        strikes = of(4, 0.3)
        for _ in range(50):
            parts, rows, _ = strikes.draw([range(10), range(10, 20), range(20, 30)])
            assert all(sum(row in part for part in parts) == 2 for row in rows)
            assert all(list(part) == sorted(set(part)) for part in parts)

    def test_idle_workers_take_the_checks_of_single_rows(self):
        parts, rows, _ = of(4, 0.1).draw([(0,), (1,), (2,)], idle=4)
        assert parts[:3] == ((0,), (1,), (2,))
        assert parts[3:] == ((tuple(sorted(rows)),) if rows else ())

    def test_a_single_part_has_nowhere_to_hide_them(self):
        parts, rows, _ = of(4, 0.1).draw([range(10)])
        assert parts == (tuple(range(10)),)
        assert rows

    def test_nothing_is_drawn_for_one_worker(self):
        assert of(1, 0.1).draw([range(10)])[1] == frozenset()


def test_the_workers_are_those_that_the_pool_has_now():
    with DeviceWorkers(["cpu"] * 4) as pool:
        strikes = Strikes(pool, 0.1)
        assert strikes.workers == {0, 1, 2, 3}
        pool.drain(1)
        assert strikes.workers == strikes.everyone == {0, 2, 3}
        pool.resize(4)
        assert strikes.everyone == {0, 1, 2, 3}
