"""The benchmarks of fleets and of jobs count what went wrong."""

import numpy as np
import pytest
import torch

from benchmarks import fleet, fleet_server, job
from benchmarks.traffic import Reply
from coded_torch.nn import Report


def test_the_law_of_a_server():
    draw = fleet_server.delays(0.005, 0.05, 10.0, 0.0)
    seconds = np.array([draw() for _ in range(20_000)])
    slow = seconds > 0.02  # ten times a quick one
    assert slow.mean() == pytest.approx(0.05, abs=0.01)
    assert seconds[~slow].mean() == pytest.approx(0.005, rel=0.05)


def test_an_outcome_counts_lost_requests_and_wrong_rows_that_are_not_marked():
    batches = [torch.randn(4, fleet_server.FEATURES) for _ in range(3)]
    answers = [torch.from_numpy(fleet_server.perceptron(x.numpy())) for x in batches]
    answers[0][:2] += 1
    answers[1][3] = torch.nan
    replies = [
        Reply(0.1, 0.1, answers[0], Report(source=torch.tensor([2, 0, 0, 0]))),
        Reply(0.1, 0.1, answers[1], Report(source=torch.zeros(4))),
        Reply(0.1, 0.1, None, None),
    ]
    found = fleet.outcome(batches, replies)
    assert (found["lost"], found["wrong"], found["estimated"]) == (1, 2, 1 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(fleet.SEEDS))
def test_a_fleet_loses_nothing_while_five_of_six_servers_fail(seed):
    found = fleet.hostile(seed, 10_000, 50.0)
    assert all(value <= most for value, most in found["bars"].values()), found


@pytest.mark.parametrize("case", ["killed every 5 s", "two drained"])
def test_a_job_on_workers_that_leave_loses_and_repeats_nothing(case, monkeypatch):
    monkeypatch.setattr(job, "EVERY", 0.3)
    found = job.job(case, "ours", 1500, 2e-3)
    assert {**found, "wall": 0} == {
        "wall": 0,
        "ended": "complete",
        "lost": 0,
        "repeated": 0,
        "wrong": 0,
    }
