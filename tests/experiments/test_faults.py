"""Workers that fail on purpose."""

import copy
import dataclasses
import math
import pickle
import random

import pytest
import torch
from torch import nn

from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Bernoulli, ShiftedExponential, Trace, Uniform
from coded_torch.testing.workers import (
    PolynomialCode,
    WorkersTests,
    numbered,
    replies_of,
    run,
    task_of,
)
from coded_torch.workers import Fault, FaultyWorkers, LocalWorkers

from ..workers.test_threads import ThreadWorkers


class TestFaultyWorkers(WorkersTests):
    def make(self) -> FaultyWorkers:
        return FaultyWorkers(LocalWorkers())


class TestFaultyThreads(WorkersTests):
    def make(self) -> FaultyWorkers:
        return FaultyWorkers(ThreadWorkers(2), delays=Uniform(0))


def test_an_attack_must_have_a_worker_and_return_a_tensor():
    inner = ThreadWorkers(2)
    with inner, pytest.raises(ValueError, match=r"must be places of the pool, got \[2\]$"):
        FaultyWorkers(inner, attack=lambda y, _: -y, adversaries=[2])
    pool = FaultyWorkers(LocalWorkers(), attack=lambda y, _: None, adversaries=[0])
    with pytest.raises(TypeError, match="FaultyWorkers: what attack returns must be of type Tens"):
        CodedWrapper(nn.Identity(), workers=pool, parts=2)(torch.ones(2, 1))


def test_the_law_is_that_of_the_delays_or_of_the_pool():
    inner, delays = LocalWorkers(Uniform(2)), Uniform(1)
    assert FaultyWorkers(inner).stragglers is inner.stragglers
    assert FaultyWorkers(inner, delays=delays).stragglers is delays
    coded = CodedWrapper(nn.Identity(), PolynomialCode(2, 5), workers=FaultyWorkers(inner))
    coded(torch.ones(2, 1))
    assert len(coded.last_run.received) == 3


class Recording(LocalWorkers):
    """Notes the faults of what it is asked for."""

    def open(self, module, task):
        request = super().open(module, task)
        ask = request.ask

        def noted(parts):
            self.asked = getattr(self, "asked", []) + list(parts)
            ask(parts)

        request.ask = noted
        return request


def noise(rows, generator):
    return rows + torch.rand(rows.shape, generator=generator)


TASK = task_of(torch.zeros(4, 1, 1))
DELAYS = [
    lambda: ShiftedExponential(0.0, 1.0, seed=5),
    lambda: Bernoulli(0.5, latency=2.0, seed=5),
    lambda: Trace([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [0.0, 1.0, 0.0]]),
]


def faults_of(delays, order: list[tuple[int, int]], again: int = 7) -> dict[tuple[int, int], Fault]:
    """The faults of parts (request, ask) of three requests that ask in an order."""
    recording = Recording()
    pool = FaultyWorkers(recording, delays=delays(), rates={"nan": 0.2, "crash": 0.2}, seed=3)
    requests = [pool.open(nn.Identity(), TASK) for _ in range(3)]
    faults = {}
    for request, ask in order:
        first = 3 + (ask - 1) * again if ask else 0
        recording.asked = []
        requests[request].ask(numbered(*[[0]] * (again if ask else 3), first=first))
        faults |= {(request, part.number): part.fault for part in recording.asked}
    return faults


@pytest.mark.parametrize("delays", DELAYS)
def test_faults_depend_on_the_request_and_the_part_and_not_on_the_order_of_asking(delays):
    order = [(r, ask) for r in range(3) for ask in range(4)]
    wanted = faults_of(delays, order)
    assert len(wanted) == 3 * (3 + 3 * 7)
    for seed in range(5):
        further = [(r, ask) for r, ask in order if ask]
        # Any interleaving, but for that of first asks and that of each request itself.
        random.Random(seed).shuffle(further)
        further.sort(key=lambda pair: pair[1])
        assert faults_of(delays, [(r, 0) for r in range(3)] + further) == wanted
        one_by_one = [(r, ask) for r in range(3) for ask in range(1 + 3 * 7)]
        assert faults_of(delays, one_by_one, again=1) == wanted


def test_one_part_in_so_many_seconds_crashes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("coded_torch.experiments._faults.time.monotonic", lambda: clock[0])
    pool = FaultyWorkers(recording := Recording(), crash_every=5.0, seed=3)
    crashed = []
    for seconds in (0.0, 4.9, 0.2, 4.9, 20.0, 0.0):
        clock[0] += seconds
        recording.asked = []
        list(run(pool, nn.Identity(), task_of(torch.zeros(4, 1, 1))))
        kinds = [part.fault and part.fault.kind for part in recording.asked]
        assert len(kinds) == 4
        crashed.append(kinds.count("crash"))
    assert crashed == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("kind", Fault.KINDS)
def test_every_kind_of_fault_on_a_virtual_clock(kind):
    pool = FaultyWorkers(LocalWorkers(), delays=Trace([[2.0, math.inf]]), rates={kind: 1.0})
    with pool.open(nn.Identity(), task_of(torch.ones(2, 3, 1))) as request:
        request.ask(numbered((0,), (1,)))
        (reply,) = replies_of(request)
    assert (reply.part.number, reply.at, reply.latency) == (0, 2.0, 2.0)
    if kind == "crash":
        assert str(reply.error) == "worker 0 died of an injected crash"
    elif kind == "structure":
        assert isinstance(reply.value, list)
    elif kind in ("nan", "infinity"):
        assert not reply.value.isfinite().any()
    else:
        assert (reply.value.shape, reply.value.dtype) != ((3, 1), torch.float32)


def test_the_abilities_of_the_pool_are_passed_on():
    class Excluding(LocalWorkers):
        pids, concurrency, names, states = (1, 2), 3, {0: "a"}, {0: ("idle", 0)}

        def exclude(self, worker: int) -> str:
            return f"excluded {worker}"

    pool = FaultyWorkers(FaultyWorkers(Excluding()))
    assert (pool.exclude(1), pool.pids) == ("excluded 1", (1, 2))
    assert (pool.concurrency, pool.names, pool.states) == (3, {0: "a"}, {0: ("idle", 0)})
    assert pool.restart is None
    with pytest.raises(AttributeError, match="'Excluding' object has no attribute 'urls'"):
        _ = pool.urls


def told(pool, seed=0, module=None, **dims):
    """The values by worker of one request."""
    rows = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(seed))
    task = dataclasses.replace(task_of(rows), **dims)
    return {reply.worker: reply.value for reply in run(pool, module or nn.Identity(), task)}


def test_adversaries_attack_by_the_seed_and_the_request_and_nobody_else_does():
    pool = FaultyWorkers(LocalWorkers(), attack=noise, adversaries=(1, 3), seed=3)
    other = pickle.loads(pickle.dumps(pool))
    for seed in range(3):
        truth, got, again = (told(each, seed) for each in (LocalWorkers(), pool, other))
        assert {m for m in truth if not torch.equal(truth[m], got[m])} == {1, 3}
        assert all(torch.equal(got[m], again[m]) for m in got)
    assert copy.deepcopy(pool).adversaries == (1, 3)


def test_workers_of_the_pool_are_drained_and_added():
    with ThreadWorkers(3) as inner:
        pool = FaultyWorkers(inner)
        pool.drain(0)
        assert pool.places == inner.places == {1, 2}
        pool.resize(3)
        assert pool.num_workers == 3
