"""What is known of workers after many calls."""

import itertools
import random
from collections import Counter

import pytest

from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.verification._record import Record
from coded_torch.workers import DeviceWorkers


@pytest.fixture
def record():
    return Record(VirtualWorkers([[("ok", 1.0)]] * 24), 0.02, random.Random(0))


@pytest.mark.parametrize(("faulty", "faults"), [(1, 4), (2, 10), (3, 12)])
def test_workers_are_excluded_whose_faults_chance_does_not_explain(record, faulty, faults):
    """Workers of one rate do not protect each other."""
    count = 0
    for worker in [*range(faulty)] * 20:
        if worker not in record.excluded:
            record.add_fault(worker)
            count += 1
    assert record.excluded == set(range(faulty))
    assert count <= faults
    assert not record.stopped


def test_an_accident_excludes_nobody(record):
    assert not record.add_fault(2)
    assert [record.add_fault(1) for _ in range(5)] == [False] * 4 + [True]
    assert not record.add_fault(2)


def test_of_a_proven_pool_few_faults_in_a_row_are_enough(record):
    """Once a worker had a fault, it is wrong in all rows that are checked next."""
    record.passed({}, dict.fromkeys(record.everyone, 300))
    assert [record.add_fault(1, parts) for parts in (0, 10, 20)] == [False, False, True]


def test_faults_of_most_workers_mean_a_random_module(record):
    for worker in range(13):
        assert not record.stopped
        assert not record.add_fault(worker)
    assert record.stopped


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize(("size", "num_parts"), [(60, 6), (240, 24), (8, 4), (7, 3), (4, 4)])
def test_parts_with_checks_have_the_size_of_others(record, size, num_parts, share):
    cuts = [size * i // num_parts for i in range(num_parts + 1)]
    plain = [range(a, b) for a, b in itertools.pairwise(cuts)]
    record.share = share
    record.passed(dict.fromkeys(record.everyone, 30), {})
    for _ in range(400):
        parts, rows, _ = record.draw(plain)
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1
        copies = Counter(row for part in parts for row in part)
        assert set(copies) == set(range(size))
        assert {row for row, many in copies.items() if many > 1} == rows
        assert all(len(set(part)) == len(part) for part in parts)
        checked = sum(not rows.isdisjoint(part) for part in parts)
        assert checked >= min(len(rows), num_parts)


def test_faults_halve(record):
    for _ in range(3):
        record.add_fault(2)
    for _ in range(2000):
        record.draw([range(3)])
    assert [record.add_fault(2) for _ in range(3)] == [False, False, True]


def test_a_fault_begins_a_trial_period(record):
    record.passed({2: 1000}, {})
    assert not record.fresh(2)
    record.add_fault(2)
    assert record.fresh(2)


def test_small_differences_of_honest_results_raise_the_tolerance(record):
    record.learn(0.004)
    record.learn(0.001)
    assert (record.tolerance, record.whole) == (0.008, False)


def test_the_workers_are_those_that_the_pool_has_now():
    with DeviceWorkers(["cpu"] * 4) as pool:
        record = Record(pool, 0.1)
        assert record.workers == {0, 1, 2, 3}
        pool.drain(1)
        assert record.workers == record.everyone == {0, 2, 3}
        pool.resize(4)
        assert record.everyone == {0, 1, 2, 3}
