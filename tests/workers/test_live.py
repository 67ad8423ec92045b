"""Requests on real time, whose workers are the test."""

import itertools
import sys
import threading
import time
from typing import Any

import torch

from coded_torch.testing.workers import numbered, replies_of, task_of
from coded_torch.workers import Began
from coded_torch.workers._dispatch import Dispatcher, Worker
from coded_torch.workers._live import LiveRequest, Work

WAIT = 60.0


class Noone(Dispatcher):
    """A dispatcher whose only worker does nothing."""

    def __init__(self) -> None:
        super().__init__(1)
        self.add(Worker(0))

    def send(self, worker, part):
        pass

    def close(self):
        self.stop()


class Quiet(LiveRequest):
    def __init__(self, timeout: float = WAIT) -> None:
        super().__init__(task_of(torch.zeros(8, 1, 1)), timeout, Noone(), None)

    @property
    def worker(self) -> Worker:
        return self.dispatcher.at(0)[0]

    def answer(self, value: Any = None) -> None:
        """Have the worker end its part."""
        self.dispatcher.settle(self.worker, self.worker.part, value)


def test_every_part_fails_at_its_own_time():
    request = Quiet(timeout=0.5)
    request.ask(numbered((0,), (1,)))
    time.sleep(0.1)
    request.ask(numbered((2,), first=2))
    assert isinstance(request.wait(), Began)
    assert request.wait(0.15) is None
    replies = replies_of(request)
    assert [reply.part.number for reply in replies] == [0, 1, 2]
    assert [str(reply.error) for reply in replies] == [
        "worker 0 did not reply within 0.5 s",
        "part 1 did not reply within 0.5 s",
        "part 2 did not reply within 0.5 s",
    ]
    times = zip(replies, (0.5, 0.5, 0.6), strict=True)
    assert all(at <= reply.at < at + 2 for reply, at in times)  # a busy machine is late
    request.answer("late")
    assert request.wait() is None


def test_waiting_for_many_parts_costs_little_for_each():
    request, n = Quiet(), 20_000
    request.ask(numbered(*([i % 8] for i in range(n))))
    start = time.process_time()
    for _ in range(n):
        request.answer()
        request.wait()
        request.wait()
    assert time.process_time() - start < 3  # .3 s; 9 s if each begin walked the queue


def test_replies_are_gathered_unless_a_part_is_late():
    request = Quiet()
    request.together, request.late = 2, WAIT
    request.ask(numbered((0,), (1,)))
    for _ in range(2):
        assert not request.is_notified()  # begins do not count
        request.answer()
    events = [request.wait(), *iter(lambda: request.wait(), None)]
    assert [event.part.number for event in events] == [0, 0, 1, 1]
    request.late = 0.2
    request.ask(numbered((2,), (3,), first=2))
    asked = request.now()
    assert isinstance(request.wait(), Began)
    assert 0.1 < request.now() - asked < WAIT


def interrupted_at(place: int, call: Any) -> bool:
    """Interrupt a call at the given event of its trace, and return whether there was one."""
    left = itertools.count(place, -1)

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if next(left) == 0:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_who_is_interrupted_as_it_asks_for_the_result_of_work_stops_nobody_else():
    def asks(work: Work, found: list[Any]) -> None:
        work.wait(WAIT)
        found.append((work.done(), work.result()))

    places = 0
    for place in itertools.count():
        go_on = threading.Event()
        work = Work(lambda go_on=go_on: go_on.wait(WAIT), "work")
        go_on.set()
        was_interrupted = interrupted_at(place, lambda work=work: asks(work, []))
        found: list[Any] = []
        thread = threading.Thread(target=asks, args=(work, found), daemon=True)
        thread.start()
        thread.join(5.0)
        assert found == [(True, True)], place
        places += was_interrupted
        if not was_interrupted:
            break
    assert places > 5
