"""Requests on real time, whose workers are the test."""

from __future__ import annotations

import threading
import time

import torch

from coded_torch.testing.workers import numbered, replies_of, task_of
from coded_torch.workers import Began, Part
from coded_torch.workers.live import LiveRequest

WAIT = 60.0


class Nobody:
    """A dispatcher without workers."""

    def submit(self, jobs):
        for job in jobs:
            job.request.parts.append(job)

    def status(self, request):
        return "all is quiet"


class Quiet(LiveRequest):
    """Keeps the parts that it is asked for."""

    def __init__(self, timeout: float = WAIT) -> None:
        super().__init__(task_of(torch.zeros(8, 1, 1)), timeout, Nobody(), None)
        self.parts: list[Part] = []


def test_every_part_fails_at_its_own_time():
    request = Quiet(timeout=0.5)
    request.ask(numbered((0,), (1,)))
    request.begin(request.parts[0], 3)
    time.sleep(0.1)
    request.ask(numbered((2,), first=2))
    assert isinstance(request.wait(), Began)
    assert request.wait(0.15) is None
    replies = replies_of(request)
    assert [reply.part.number for reply in replies] == [0, 1, 2]
    assert [str(reply.error) for reply in replies] == [
        "worker 3 did not reply within 0.5 s",
        "part 1 did not reply within 0.5 s; all is quiet",
        "part 2 did not reply within 0.5 s; all is quiet",
    ]
    times = zip(replies, (0.5, 0.5, 0.6), strict=True)
    assert all(at <= reply.at < at + 2 for reply, at in times)  # a busy machine is late
    request.settle(request.parts[0], "late")
    assert request.wait() is None


def test_nothing_begins_once_close_has_returned():
    for _ in range(200):
        request = Quiet()
        request.ask(numbered(*([n] for n in range(8))))
        begun: list[float] = []
        go = threading.Barrier(2)

        def worker(request=request, begun=begun, go=go) -> None:
            go.wait()
            for part in request.parts:
                if request.begin(part, 0):
                    begun.append(time.monotonic())

        thread = threading.Thread(target=worker)
        thread.start()
        go.wait()
        request.close()
        closed = time.monotonic()
        thread.join()
        # One may have begun before, and noted the time after.
        assert sum(at > closed for at in begun) <= 1
        assert request.wait() is None


def test_waiting_for_many_parts_costs_little_for_each():
    request, n = Quiet(), 20_000
    request.ask(numbered(*([i % 8] for i in range(n))))
    start = time.process_time()
    for part in request.parts:
        request.begin(part, 0)
        request.settle(part, None)
        request.wait()
        request.wait()
    assert time.process_time() - start < 10  # .3 s; quadratic, it would be minutes
