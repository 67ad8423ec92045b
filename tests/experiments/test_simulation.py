"""What holds for every policy under all conditions, and what a simulation is given and gives."""

import pytest

from coded_torch import Waiting, stragglers
from coded_torch.experiments.simulation import Conditions, simulate

WAIT_FOR_ALL, SOON = Waiting(hedge_budget=0), Waiting(estimate_after=3.0)
CALM, STILL = Conditions(), Conditions(spread=0.0)


def run(policy, conditions=CALM, *, workers=6, parts=4, **options):
    return simulate(policy, conditions, num_workers=workers, num_parts=parts, **options)


def test_parts_that_always_fail_end_in_a_estimate_of_all():
    outcome = run(SOON, Conditions(dead=1.0, dead_after=1.0), num_requests=1000)
    assert outcome.ended == {"failed": 1000}
    assert (outcome.estimated == 1).all()
    assert outcome.work == pytest.approx(3.0)


def test_the_default_computes_all():
    failing = Conditions(straggling=0.03, dead=0.1, dead_after=1.0)
    outcome = run(Waiting(), failing, num_requests=4000)
    # Where a tenth of the parts fail, a row is blamed for it in fewer than one call of a thousand.
    assert outcome.ended["complete"] >= 3_996
    assert set(outcome.ended) <= {"complete", "error"}
    assert outcome.work < 1.3


@pytest.mark.parametrize(("load", "most"), [(0.3, 0.0005), (0.7, 0.01), (0.9, 0.04)])
def test_when_calm_little_is_estimated_and_nothing_slower(load, most):
    outcome = run(SOON, load=load, num_requests=3000)
    assert outcome.estimated.mean() <= most
    assert outcome.work <= 1.005
    uncoded = run(WAIT_FOR_ALL, load=load, num_requests=3000)
    assert uncoded.work == uncoded.calls == 1
    assert outcome.percentile(50) <= 1.1 * uncoded.percentile(50)


def test_stragglers_cost_least_where_the_rest_is_estimated():
    policies = WAIT_FOR_ALL, Waiting(), SOON
    straggling = Conditions(straggling=0.03)
    tails = [run(x, straggling, num_requests=4000).percentile(99.9) for x in policies]
    assert tails == sorted(tails, reverse=True)
    assert 40 < tails[0] < 70
    assert tails[-1] < 8


def test_a_paused_worker_goes_on_afterwards():
    often = Conditions(spread=0.0, bursts=30.0)
    outcome, free = (run(WAIT_FOR_ALL, x, workers=1, parts=1, load=0.5) for x in (often, STILL))
    assert (outcome.latencies >= free.latencies - 1e-9).all()
    assert outcome.latencies.mean() > 1.5 * free.latencies.mean()


def test_the_first_n_less_s_are_waited_for():
    straggling = Conditions(straggling=0.05)
    first = run(Waiting.first(2), straggling, load=0.1, num_requests=3000)
    assert first.calls == first.work == pytest.approx(1.5, rel=1e-2)  # some need not begin
    assert first.ended["enough_results"] > 2900
    assert 0.1 < first.estimated.mean() < 0.4  # of 4 results, two may be copies of one share
    everything = run(Waiting.first(0), straggling, load=0.1, num_requests=3000)
    assert everything.ended == {"complete": 3000}
    assert first.percentile(99) < everything.percentile(99) / 3


def test_laws_of_the_package_delay_workers():
    lossy = Conditions(delays=stragglers.Uniform(1, seed=0), dead_after=5.0)
    outcome = run(WAIT_FOR_ALL, lossy, workers=2, parts=2, load=0.01, num_requests=200)
    # One of two workers fails at each request, and may be given the part again.
    assert outcome.percentile(50) > 5.0
    assert outcome.calls > 1.4
