"""The load generator, on workers whose latency is known."""

import threading
import time

import numpy as np
import pytest
import torch

from benchmarks import latency, traffic
from benchmarks.traffic import Load
from coded_torch.nn import Report
from coded_torch.workers import DeviceWorkers

LOAD = Load(busy=0.2, num_requests=20, batch_size=8, share=0.0, sleep=False)
NAMES = ("wait for all", "hedge at 1.5 medians", "three re-asks", "coded at once")


def compare(load):
    with DeviceWorkers(["cpu"] * load.num_workers) as pool:
        return latency.compare(pool, load, 1, NAMES)[1]


def test_every_request_under_every_policy_is_answered():
    found = {name: outcome for name, (outcome,) in compare(LOAD).items()}
    assert tuple(found) == NAMES
    for outcome in found.values():
        assert outcome["failed"] == 0
        assert 0 < outcome["p50"] <= outcome["p99"] <= outcome["p99.9"]
    for name in NAMES[:3]:
        assert found[name]["accuracy"] > 0.9
        assert found[name]["estimated"] == 0
    assert found["wait for all"]["work"] == 1
    assert found["coded at once"]["work"] > 1.2  # some need not begin


def test_latency_counts_from_the_arrival_not_from_the_start():
    """A server that does one request at a time, slower than they arrive: each waits longer."""
    lock = threading.Lock()

    def serve(images):
        with lock:
            time.sleep(0.02)
        return torch.ones(1, 2), Report()

    replies = traffic.drive(serve, [torch.zeros(1, 1)] * 10, 1e4, 0)
    latencies = sorted(reply.latency for reply in replies)
    assert latencies[0] >= 0.02
    assert latencies[-1] >= 10 * 0.02 - 0.02
    assert min(reply.spent for reply in replies) >= 0.02


def test_arrivals_are_poisson(monkeypatch):
    times = []
    monkeypatch.setattr(traffic.time, "sleep", times.append)
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: 0.0)
    traffic.drive(lambda x: (x, Report()), [torch.zeros(1)] * 5_000, 50.0, 0)
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.06)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.08)


def test_a_call_without_an_answer_is_a_reply_without_one():
    from coded_torch.codes import NotEnoughResults

    def fail(images):
        raise NotEnoughResults((), 1, 2)

    (reply,) = traffic.drive(fail, [torch.zeros(1)], 1e4, 0)
    assert reply.report is None
    labels = [torch.zeros(1, dtype=torch.int64)]
    ok = traffic.Reply(0.1, 0.1, torch.ones(1, 2), Report(source=torch.zeros(1), work_ratio=1.0))
    assert latency.outcome([reply, ok], labels * 2)["failed"] == 1
