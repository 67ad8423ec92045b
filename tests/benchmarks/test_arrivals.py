"""The load generator, on workers whose latency is known."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import arrivals
from benchmarks.arrivals import FEW, Load, format_outcomes, measure, merge
from coded_torch.nn.report import Report
from coded_torch.workers import DeviceWorkers

LOAD = Load(rate=200.0, num_requests=50, batch_size=8, share=0.0, sleep=False)


class Slow(nn.Module):
    """Labels are the first feature; takes two milliseconds."""

    def forward(self, x):
        time.sleep(0.002)
        return nn.functional.one_hot(x[:, 0].long(), 10).float()


@pytest.fixture
def data():
    labels = torch.arange(40) % 10
    return labels[:, None].float(), labels


def outcomes(load, data):
    with DeviceWorkers(["cpu"] * load.num_workers) as pool:
        return merge(list(measure(pool, Slow(), *data, load)))


def test_every_request_under_every_policy_is_answered(data):
    found = outcomes(LOAD, data)
    assert list(found) == list(FEW)
    for outcome in found.values():
        assert (len(outcome.latencies), outcome.failed) == (50, 0)
        assert outcome.latencies[0] >= 0.002
        assert (np.diff(outcome.latencies) >= 0).all()
    for name in ("wait for all", "hedge at 1.5 medians", "three re-asks"):
        assert (found[name].accuracy, found[name].predicted) == (1, 0)
    assert found["wait for all"].work == 1
    assert found["coded at once"].work == pytest.approx(1.5, rel=0.1)  # some need not begin


def test_delays_reach_requests_that_wait_for_all_in_full(data):
    load = dataclasses.replace(LOAD, share=0.2, delay=0.2, num_requests=20, rate=20.0)
    found = outcomes(load, data)
    assert found["wait for all"].percentile(99) >= 200
    assert found["three re-asks"].work > 1


def test_latency_counts_from_the_arrival_not_from_the_start():
    """A server that does one request at a time, slower than they arrive: each waits longer."""
    lock, requests = threading.Lock(), []
    for i in range(10):
        requests.append(arrivals._Request(i * 0.001, torch.zeros(1, 1), torch.zeros(1)))

    def serve(images):
        with lock:
            time.sleep(0.02)
        return torch.ones(1, 2), Report()

    latencies = sorted(record.latency for record in arrivals._drive(serve, requests))
    assert latencies[0] >= 0.02
    assert latencies[-1] >= 10 * 0.02 - 9 * 0.001


def test_arrivals_are_poisson():
    load = dataclasses.replace(LOAD, rate=50.0, num_requests=20_000)
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(8, 1)
    times = [r.arrival for r in arrivals._requests(images, images[:, 0], load, generator)]
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.06)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.08)


def test_the_table_holds_every_policy(data):
    found = outcomes(LOAD, data)
    table = format_outcomes(found)
    assert max(map(len, table.splitlines())) <= 80
    assert all(name in table for name in found)


def test_a_batch_must_be_cut_evenly():
    with pytest.raises(ValueError, match="batch_size must be a multiple of num_data, 4, got 6"):
        Load(batch_size=6)
