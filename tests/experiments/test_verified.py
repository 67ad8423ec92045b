"""Verification beside a waiting policy, on simulated workers."""

import pytest

from coded_torch.experiments.planner import Verified
from coded_torch.experiments.simulation import Conditions, simulate
from coded_torch.scheduling.policy import Waiting


def run(policy, conditions, num_requests=300, workers=24):
    return simulate(
        policy, conditions, num_workers=workers, num_parts=20, num_requests=num_requests
    )


@pytest.mark.parametrize("straggling", [0.0, 0.03])
def test_honest_workers_cost_little_time_and_work(straggling):
    conditions, verified = Conditions(straggling=straggling), Verified(Waiting(), 24)
    verified.record.passed(dict.fromkeys(range(24), 30), {})
    plain, checked = run(Waiting(), conditions), run(verified, conditions)
    assert checked.latencies.mean() <= plain.latencies.mean() + 0.2
    assert checked.work <= plain.work + 0.03
    assert not verified.record.excluded


def test_a_deadline_is_kept():
    verified = Verified(Waiting(deadline=2.5), 24)
    outcome = run(verified, Conditions(straggling=0.03))
    assert outcome.latencies.max() <= 2.5 + 1e-9
