"""Requests on real time, whose workers are the test."""

from __future__ import annotations

import math
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


def test_only_what_is_open_and_not_dropped_begins_and_only_once():
    request = Quiet()
    first, second, third = parts = numbered((0,), (1,), (2,))
    assert not request.begin(first, 0)
    request.ask(parts)
    assert request.wants(first)
    assert request.begin(first, 4, fresh=True)
    assert not request.begin(first, 5)
    request.drop([first, second, Part(99, (0,))])
    assert not request.begin(second, 5)
    began = request.wait()
    assert (began.part, began.worker, began.fresh) == (first, 4, True)
    request.close()
    assert not request.begin(third, 5)
    request.settle(first, "late")
    assert request.wait() is None


def test_a_part_has_one_reply_and_its_latency_is_from_when_it_began():
    request = Quiet()
    (part,) = parts = numbered((0,))
    request.ask(parts)
    time.sleep(0.02)
    request.begin(part, 2)
    request.settle(part, "value")
    request.settle(part, "again")
    assert isinstance(began := request.wait(), Began)
    reply = request.wait()
    assert request.wait() is None
    assert (reply.value, reply.worker, reply.error) == ("value", 2, None)
    assert reply.latency == reply.at - began.at
    assert reply.at >= began.at >= 0.02


def test_what_was_never_begun_fails_without_a_worker():
    request = Quiet()
    request.ask(parts := numbered((0,)))
    request.settle(parts[0], None, "did not start: there was none")
    (reply,) = replies_of(request)
    assert (reply.worker, reply.latency) == (-1, math.inf)
    assert str(reply.error) == "part 0 did not start: there was none"


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


def test_a_status_is_given_while_a_part_has_not_begun():
    request = Quiet()
    assert request.status() == ""
    request.ask(parts := numbered((0,), (1,)))
    assert request.status() == "all is quiet"
    request.begin(parts[0], 0)
    assert request.status() == "all is quiet"
    request.drop(parts)
    assert request.status() == ""


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
