"""What is known of workers after many calls."""

import random

import pytest

from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.verification import Record
from coded_torch.workers import DeviceWorkers


@pytest.fixture
def record():
    return Record(VirtualWorkers([[("ok", 1.0)]] * 24), 0.02, random.Random(0))


def test_exclusion_takes_more_faults_if_others_have_some(record):
    record.add_fault(1)
    assert [record.add_fault(2) for _ in range(6)] == [False] * 5 + [True]


def test_faults_of_three_workers_alike_mean_a_random_module(record):
    for worker in (1, 5, 9):
        assert not record.stopped
        record.add_fault(worker)
    assert record.stopped


def test_faults_halve(record):
    for _ in range(3):
        record.add_fault(2)
    for _ in range(2000):
        record.draw([range(3)])
    assert [record.add_fault(2) for _ in range(3)] == [False, False, True]


def test_the_workers_are_those_that_the_pool_has_now():
    with DeviceWorkers(["cpu"] * 4) as pool:
        record = Record(pool, 0.1)
        assert record.workers == {0, 1, 2, 3}
        pool.drain(1)
        assert record.workers == record.everyone == {0, 2, 3}
        pool.resize(4)
        assert record.everyone == {0, 1, 2, 3}
