"""What holds for every policy under all conditions, and what a simulation is given and gives."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_torch import Waiting, stragglers
from coded_torch.experiments.simulation import Conditions, simulate

WAIT_FOR_ALL, SOON = Waiting(hedge_budget=0), Waiting(estimate_after=3.0)
CALM, STILL = Conditions(), Conditions(spread=0.0)


def run(policy, conditions=CALM, *, workers=6, parts=4, **options):
    return simulate(policy, conditions, num_workers=workers, num_parts=parts, **options)


class Watched:
    """A policy whose every decision is checked against the columns of the table."""

    def __init__(self, waiting):
        self.waiting = waiting
        self.log, self.hedged, self.calls = [], 0.0, 0
        self.before, self.thresholds = {}, {}  # by call: answered units; when parts are late

    def decide(self, history, table):
        first, seen = not table.parts, len(table.parts)
        self.calls += first
        due = [self.due(history, table, part) for part in table.parts]
        good = self.good(table)
        until = self.waiting.decide(history, table)
        new, dropped = table.parts[seen:], table.unwanted[:]
        table.unwanted.clear()
        for part in dropped:
            assert part.began == math.inf
            assert part.number >= len(table.first)
            assert good.issuperset(part.units)
        self.check_ask(table, new, good, due)
        self.log.append((table.now, [p.units for p in new], len(dropped), table.reason))
        if table.reason:
            self.check_end(table, good, self.before.get(table, 0))
        self.before[table] = len(good)
        if not table.reason:  # deciding again at one moment adds nothing
            assert self.waiting.decide(history, table) == until
            assert len(table.parts) == seen + len(new)
        return until

    def good(self, table):
        return {unit for part in table.parts if part.outcome == "good" for unit in part.units}

    def due(self, history, table, part):
        """The time when a part that has begun is late."""
        thresholds, units = self.thresholds.setdefault(table, {}), len(part.units)
        if part.began == math.inf:
            return math.inf
        known = history.hedging_threshold(units, self.waiting.hedge_budget)
        half = (self.waiting.deadline or math.inf) / 2
        return part.began + thresholds.setdefault(units, known if known < math.inf else half)

    def check_ask(self, table, new, good, due):
        before = table.parts[: len(table.parts) - len(new)]
        for part in new:
            units = part.units
            assert units
            assert list(units) == sorted(units)
            copies = [n for n, other in enumerate(before) if set(other.units) & set(units)]
            if not before:
                assert not copies
                continue
            assert good.isdisjoint(units), "what is answered is asked again"
            # Late three times, and failed three times, or twenty.
            same = sum(other.units == units for other in table.parts)
            assert same <= (7 if self.waiting.may_estimate(True) else 24)
            states = [before[n].outcome for n in copies]
            for n, state in zip(copies, states, strict=True):
                assert state == "failed" or (state == "open" and due[n] <= table.now)
            if "failed" not in states:
                self.hedged += len(units) / table.needed

    def check_end(self, table, good, before):
        waiting, half, seconds = self.waiting, table.needed / 2, table.now - table.since
        assert (table.reason == "complete") == (len(good) == table.needed)
        if table.reason == "deadline":
            assert seconds == pytest.approx(waiting.deadline)
        if table.reason == "estimate_after":
            assert waiting.deadline is None
            assert waiting.may_estimate(True)
            assert len(good) >= half
            # Exactly then, or when the half was there.
            assert seconds == pytest.approx(table.deadline) or (
                seconds > table.deadline and before < half
            )
        if table.reason == "failed":
            assert not any(part.outcome == "open" for part in table.parts)
        if seconds > table.deadline * (1 + 1e-9):
            assert waiting.deadline is None
            assert before < half, "half was there, and it is time to estimate"


conditions = st.builds(
    Conditions,
    spread=st.sampled_from([0.0, 0.15, 0.5]),
    straggling=st.sampled_from([0.0, 0.03, 0.3]),
    slow=st.sampled_from([0.0, 0.1]),
    dead=st.sampled_from([0.0, 0.02, 0.5]),
    dead_after=st.sampled_from([0.5, 20.0]),
    bursts=st.sampled_from([20.0, math.inf]),
    delays=st.sampled_from([None, stragglers.ShiftedExponential(0.0, 2.0, seed=0)]),
)
policies = st.builds(
    Waiting,
    deadline=st.sampled_from([None, 1.2, 3.0]),
    estimate_after=st.sampled_from([None, 1.5, 3.0, math.inf]),
    hedge_budget=st.sampled_from([0.0, 0.02, 0.25, 2.0]),
    estimate=st.booleans(),
    on_error=st.sampled_from(["raise", "estimate"]),
)


@settings(max_examples=60, deadline=None)
@given(
    conditions=conditions,
    waiting=policies,
    workers=st.integers(1, 8),
    parts=st.integers(1, 6),
    load=st.sampled_from([0.3, 0.7, 0.95]),
    seed=st.integers(0, 99),
)
def test_what_holds_for_every_call(conditions, waiting, workers, parts, load, seed):
    watched = [Watched(waiting), Watched(waiting)]
    how = {"workers": workers, "parts": parts, "load": load, "num_requests": 150, "seed": seed}
    outcomes = [run(policy, conditions, **how) for policy in watched]
    assert watched[0].log == watched[1].log
    np.testing.assert_array_equal(outcomes[0].latencies, outcomes[1].latencies)
    assert watched[0].calls == outcomes[0].ended.total() == 150
    assert watched[0].hedged <= waiting.hedge_budget * 150 + 1 + 20 / parts + 1e-9
    estimated = outcomes[0].estimated
    assert ((estimated > 0) == (estimated != 0)).all()
    assert (estimated > 0).sum() == 150 - outcomes[0].ended["complete"]
    # "error": where half of the parts fail, a row may be blamed for it.
    assert set(outcomes[0].ended) <= {"complete", "deadline", "estimate_after", "failed", "error"}
    if waiting.hedge_budget == 0:
        assert watched[0].hedged == 0


def test_parts_that_always_fail_end_in_estimates_of_all():
    outcome = run(SOON, Conditions(dead=1.0, dead_after=1.0), num_requests=1000)
    assert outcome.ended == {"failed": 1000}
    assert (outcome.estimated == 1).all()
    assert outcome.work == pytest.approx(3.0)


def test_the_default_computes_all():
    failing = Conditions(straggling=0.03, dead=0.1, dead_after=1.0)
    outcome = run(Waiting(), failing)
    # Where a tenth of the parts fail, a row is blamed for it in fewer than one call of a thousand.
    assert outcome.ended["complete"] >= 9_990
    assert set(outcome.ended) <= {"complete", "error"}
    assert outcome.work < 1.3


@pytest.mark.parametrize(("load", "most"), [(0.3, 0.0005), (0.7, 0.01), (0.9, 0.04)])
def test_when_calm_little_is_estimated_and_nothing_slower(load, most):
    outcome = run(SOON, load=load, num_requests=10_000)
    assert outcome.estimated.mean() <= most
    assert outcome.work <= 1.005
    uncoded = run(WAIT_FOR_ALL, load=load, num_requests=10_000)
    assert uncoded.work == uncoded.calls == 1
    assert outcome.percentile(50) <= 1.1 * uncoded.percentile(50)


def test_stragglers_cost_least_where_the_rest_is_estimated():
    policies = WAIT_FOR_ALL, Waiting(), SOON
    straggling = Conditions(straggling=0.03)
    tails = [run(x, straggling, num_requests=10_000).percentile(99.9) for x in policies]
    assert tails == sorted(tails, reverse=True)
    assert 40 < tails[0] < 60
    assert tails[-1] < 8


def test_one_worker_serves_one_part_after_the_other():
    outcome = run(WAIT_FOR_ALL, STILL, workers=1, parts=3, load=0.001, num_requests=20)
    np.testing.assert_allclose(outcome.latencies, 3.0)


def test_a_paused_worker_goes_on_afterwards():
    often = Conditions(spread=0.0, bursts=30.0)
    outcome, free = (run(WAIT_FOR_ALL, x, workers=1, parts=1, load=0.5) for x in (often, STILL))
    assert (outcome.latencies >= free.latencies - 1e-9).all()
    assert outcome.latencies.mean() > 1.5 * free.latencies.mean()


def test_the_first_n_less_s_are_waited_for():
    straggling = Conditions(straggling=0.05)
    first = run(Waiting.first(2), straggling, load=0.1, num_requests=3000)
    assert first.calls == first.work == pytest.approx(1.5, rel=1e-2)  # some need not begin
    assert first.ended["first"] > 2900
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


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Conditions(dead=2.0), "dead must be a probability"),
        (lambda: Conditions(spread=-1.0), "spread must be at least 0"),
        (lambda: Conditions(dead_after=0.0), "dead_after must be positive"),
        (lambda: run(Waiting(), workers=0), "num_workers must be at least 1, got 0"),
        (lambda: run(Waiting(), load=1.0), r"load must be in \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
