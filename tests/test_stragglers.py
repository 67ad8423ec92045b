"""Delay distributions: what all of them keep, and the draws of each."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from coded_torch import stragglers

DELAYS = {
    "uniform": lambda seed: stragglers.Uniform(3, seed=seed),
    "contiguous": lambda seed: stragglers.Contiguous(3, seed=seed),
    "bernoulli": lambda seed: stragglers.Bernoulli(0.3, seed=seed),
    "exponential": lambda seed: stragglers.ShiftedExponential(1.0, 2.0, seed=seed),
}


def draws(delays, num_workers, count):
    return torch.stack([delays.sample(num_workers) for _ in range(count)])


@pytest.fixture(params=DELAYS.values(), ids=DELAYS)
def make(request):
    return request.param


def test_seeds(make):
    before = torch.get_rng_state()
    assert torch.equal(draws(make(7), 20, 5), draws(make(7), 20, 5))
    assert not torch.equal(draws(make(7), 20, 5), draws(make(8), 20, 5))
    assert not torch.equal(draws(make(None), 20, 20), draws(make(None), 20, 20))
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_continue_alike(make):
    delays = make(0)
    draws(delays, 20, 3)
    twins = [pickle.loads(pickle.dumps(delays)), copy.deepcopy(delays)]
    expected = draws(delays, 20, 5)
    for twin in twins:
        assert torch.equal(draws(twin, 20, 5), expected)


def test_uniform():
    delays = stragglers.Uniform(3, seed=0)
    latencies = draws(delays, 10, 4000)
    lost = latencies.isinf()
    assert delays.num_stragglers == 3
    assert bool((lost.sum(1) == 3).all())
    assert bool((latencies[~lost] == 0).all())
    # Workers are lost equally often, and independently of their neighbours: pairs too.
    pairs = (lost.double().T @ lost.double())[np.triu_indices(10, 1)]
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_contiguous():
    delays = stragglers.Contiguous(3, seed=0)
    lost = draws(delays, 10, 2000).isinf()
    starts = lost & ~lost.roll(1, 1)  # lost, and the neighbour before is not
    assert delays.num_stragglers == 3
    assert bool((lost.sum(1) == 3).all())
    assert bool((starts.sum(1) == 1).all())
    assert stats.chisquare(starts.sum(0)).pvalue > 1e-3


def test_bernoulli():
    delays = stragglers.Bernoulli(0.3, latency=0.5, seed=0)
    latencies = draws(delays, 10, 2000)
    late = latencies > 0
    assert delays.num_stragglers is None
    assert set(latencies.unique().tolist()) == {0.0, 0.5}
    assert stats.binomtest(int(late.sum()), late.numel(), 0.3).pvalue > 1e-3
    counts = torch.bincount(late.sum(1), minlength=11)[:8]
    expected = stats.binom.pmf(range(8), 10, 0.3)
    assert stats.chisquare(counts, expected / expected.sum() * float(counts.sum())).pvalue > 1e-3
    assert bool(stragglers.Bernoulli(1.0).sample(50).isinf().all())


@pytest.mark.parametrize(
    ("delays", "distribution"),
    [
        (stragglers.ShiftedExponential(0.5, 4.0, seed=0), stats.expon(0.5, 0.25)),
    ],
)
def test_distributions(delays, distribution):
    assert stats.kstest(draws(delays, 10, 500).flatten(), distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_trace(kind):
    rows = [[0.5, 1.0, math.inf], [0.25, 2.0, 0.125]]
    delays = stragglers.Trace(kind(rows))
    got = draws(delays, 3, 5)
    assert got.dtype == torch.float64
    assert got.tolist() == [rows[0], rows[1], rows[0], rows[1], rows[0]]
    assert (delays.num_requests, delays.num_workers, delays.position) == (2, 3, 1)
    twin = copy.deepcopy(delays)
    delays.sample(3).zero_()  # a draw is a copy
    assert draws(delays, 3, 2).tolist() == rows
    assert twin.sample(3).tolist() == rows[1]
    with pytest.raises(ValueError, match="Trace: num_workers must be 3, as in the trace, got 4"):
        delays.sample(4)


def test_a_law_of_the_users_own():
    class Given(stragglers.Stragglers):
        def __init__(self, *latencies):
            super().__init__()
            self._latencies = latencies

        def _draw(self, num_workers, generator):
            return self._latencies

    assert Given(0, 1.0, math.inf).sample(3).tolist() == [0.0, 1.0, math.inf]
    for latencies in ([1.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"Given: _draw must return 2 latencies of at least 0"):
            Given(*latencies).sample(2)
