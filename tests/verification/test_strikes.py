"""What is known of workers after many calls."""

import random

import pytest

from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.verification import Strikes
from coded_torch.workers import DeviceWorkers


@pytest.fixture
def strikes():
    return Strikes(VirtualWorkers([[("ok", 1.0)]] * 24), 0.02, random.Random(0))


def test_exclusion_takes_more_strikes_if_others_have_some(strikes):
    strikes.strike(1)
    assert [strikes.strike(2) for _ in range(6)] == [False] * 5 + [True]


def test_strikes_of_three_workers_alike_mean_a_random_module(strikes):
    for worker in (1, 5, 9):
        assert not strikes.stopped
        strikes.strike(worker)
    assert strikes.stopped


def test_strikes_halve(strikes):
    for _ in range(3):
        strikes.strike(2)
    for _ in range(2000):
        strikes.draw([range(3)])
    assert [strikes.strike(2) for _ in range(3)] == [False, False, True]


def test_the_workers_are_those_that_the_pool_has_now():
    with DeviceWorkers(["cpu"] * 4) as pool:
        strikes = Strikes(pool, 0.1)
        assert strikes.workers == {0, 1, 2, 3}
        pool.drain(1)
        assert strikes.workers == strikes.everyone == {0, 2, 3}
        pool.resize(4)
        assert strikes.everyone == {0, 1, 2, 3}
