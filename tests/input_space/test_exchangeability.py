"""The test, over calls, of whether rows are missing at random."""

import itertools
import random

import pytest

from coded_torch.input_space._error_bounds import Exchangeability


def calls(seed, dependence, parts=16, rows=(1,)):
    """Yield the parts of calls: odd by a heavy-tailed law, and late by chance and by oddness."""
    draw = random.Random(seed)
    while True:
        found = []
        for number in range(parts):
            size = rows[number % len(rows)]
            odd = sum(draw.paretovariate(1.5) for _ in range(size)) / size
            late = size + draw.expovariate(1) + dependence * odd
            found.append((size, late, odd))
        yield found


def alarm(seed, dependence, most=50, **options):
    """Return the number of the call that raised an alarm, 0 if none did."""
    test = Exchangeability()
    every = itertools.islice(calls(seed, dependence, **options), most)
    return next((number for number, call in enumerate(every, 1) if test.add(call)), 0)


@pytest.mark.parametrize("rows", [(1,), (1, 2), (3, 4, 5)], ids=str)
def test_false_alarms_are_rare(rows):
    """Parts of two rows take longer, and their mean has another median: sizes must not mix."""
    assert sum(alarm(seed, 0.0, rows=rows) > 0 for seed in range(300)) <= 6


def test_a_dependence_is_found_soon():
    found = [alarm(seed, 1.0) for seed in range(100)]
    assert sum(number > 0 for number in found) >= 99
    assert sorted(found)[50] <= 15


def test_the_alarm_says_how_many_calls_were_compared():
    test = Exchangeability()
    every = calls(0, 5.0)
    numbers = [test.add(next(every)) for _ in range(20)]
    assert numbers[-1] == 20
    assert set(numbers) <= {0, *range(1, 21)}


def test_nothing_is_learnt_from_equal_latencies_or_few_parts():
    test = Exchangeability()
    for _ in range(1000):
        test.add([(1, 2.0, float(odd)) for odd in range(9)])
        test.add([(1, 2.0, 3.0), (2, 3.0, 4.0)])
        test.add([])
    assert test.add([(1, 1.0, 1.0), (1, 2.0, 2.0)]) == 0
    assert [test.add([(1, float(i), float(i)) for i in range(16)]) for _ in range(9)][-1] == 10


def test_parts_that_are_late_because_they_are_easy_are_no_alarm():
    assert alarm(0, -1.0) == 0
