"""The policy of supervised pools, on workers in memory and a clock that only the tests move."""

import itertools
import threading
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coded_torch.testing.workers import task_of, until
from coded_torch.workers import Began, Part, Reply
from coded_torch.workers._supervisor import (
    START_SECONDS,
    SupervisedRequest,
    SupervisedWorkers,
    Supervisor,
    WatchedWorker,
)
from coded_torch.workers._worker_main import PackedModule

GRACE = 10.0
TIMEOUT = 600.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Numbered(WatchedWorker):
    """A worker that does nothing by itself."""

    serial = itertools.count()

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.number = next(self.serial)
        self.sent: list[Part] = []
        self.ended = False

    def __str__(self) -> str:
        return f"robot {self.number}"


class InMemory(Supervisor):
    """A supervisor of workers that the test drives."""

    def __init__(self, size: int, start_timeout: float | None = START_SECONDS) -> None:
        self.clock = Clock()
        self.launched: list[Numbered] = []
        super().__init__(size, GRACE, TIMEOUT, start_timeout, self.clock)

    def pack(self, module: nn.Module) -> None:
        return None

    def launch(self, index: int) -> Numbered:
        worker = Numbered(index)
        self.launched.append(worker)
        return worker

    def send(self, worker: WatchedWorker, part: Part) -> None:
        assert isinstance(worker, Numbered)
        assert not worker.ended, "asked a worker that has ended"
        assert part.request.awaits(part), "a part began that its request does not wait for"
        worker.load(part)
        worker.sent.append(part)

    def end(self, worker: WatchedWorker) -> None:
        assert isinstance(worker, Numbered)
        worker.ended = True

    def wait(self, seconds: float) -> None:
        raise AssertionError("no thread serves this supervisor")

    def ring(self) -> None:
        pass


MODULE = PackedModule(0, None, frozenset({0}), b"")


class Asking(SupervisedRequest):
    """A request to a supervisor, on real time, on which nothing here depends."""

    def __init__(self, supervisor: Supervisor, num_parts: int) -> None:
        super().__init__(task_of(torch.zeros(1, 1, 1)), 3600.0, supervisor, MODULE)
        self.asked: list[Part] = []
        self.more(num_parts)

    def more(self, num_parts: int, avoid: frozenset[int] = frozenset()) -> None:
        parts = [Part(len(self.asked) + n, (0,), avoid=avoid) for n in range(num_parts)]
        self.asked += parts
        self.ask(parts)


def answer(supervisor: Supervisor, worker: WatchedWorker, value: Any, part: Any = None) -> None:
    """Report the result of a worker's part or, as it comes late, of an earlier one."""
    supervisor.settle(worker, part or worker.part, (worker, lambda: (True, value)))


def events(request: Asking) -> list[Began | Reply]:
    return list(iter(lambda: request.wait(0.0), None))


def replies(request: Asking) -> list[Reply]:
    return [event for event in events(request) if isinstance(event, Reply)]


NAMES = {
    *("open", "more", "drop", "close", "up", "answer", "stale", "die"),
    *("exclude", "restart", "drain", "resize", "time"),
}
ACTS = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.integers(0, 4), st.integers(0, 4)),
    min_size=30,
    max_size=60,
)


class Script:
    """Acts on a supervisor, after each of which its promises are checked."""

    def __init__(self, size: int) -> None:
        self.supervisor = InMemory(size)
        self.requests: list[Asking] = []
        self.events: dict[Asking, list[Began | Reply]] = {}
        self.dropped: dict[Asking, set[int]] = {}  # before they had begun
        self.out: dict[Numbered, int] = {}  # that were excluded or left, and their parts until then
        self.supervisor.tend()
        for worker in self.supervisor.launched:
            self.supervisor.ready(worker)
        self.act("open", 0, 4)

    def act(self, act: str, which: int, number: int) -> None:
        supervisor = self.supervisor
        alive = [worker for worker in supervisor.launched if not worker.ended]
        ready = [worker for worker in alive if worker.part]
        worker = alive[which % len(alive)] if alive else None
        request = self.requests[which % len(self.requests)] if self.requests else None
        if act == "open":
            self.requests.append(new := Asking(supervisor, number + 1))
            self.events[new], self.dropped[new] = [], set()
        elif act == "more" and request:
            request.more(number)
        elif act == "drop" and request:
            parts = request.asked[number : number + 2]
            self.dropped[request] |= {part.number for part in parts if request.wants(part)}
            request.drop(parts)
        elif act == "close" and request:
            self.requests.remove(request)
            request.close()
        elif act == "up" and worker and not worker.ready:
            supervisor.ready(worker)
        elif act == "answer" and ready:
            self.answer(ready[which % len(ready)])
        elif act == "stale":  # an answer to an old part, or to one that no worker had
            for other in alive:
                part = other.sent[0] if other.sent else Part(0, (0,))
                if other.part is not part:
                    answer(supervisor, other, "stale", part)
        elif act == "die" and worker:
            worker.ended = True
            supervisor.lost(worker, "died")
            supervisor.lost(worker, "died")  # comes twice
        elif act == "exclude":
            supervisor.exclude(which)
            self.out |= {m: len(m.sent) for m in alive if m.index == which}
        elif act == "restart":
            self.out = {m: sent for m, sent in self.out.items() if m.index != which or m.left}
            supervisor.restart(which)
            supervisor.tend()
        elif act == "drain":
            self.out |= {m: len(m.sent) for m in alive if m.index == which}
            supervisor.leave(which)
            supervisor.tend()
        elif act == "resize":
            supervisor.resize(number + 1)
        elif act == "time":
            supervisor.clock.now += (0.1, 1.0, GRACE, START_SECONDS, 5.0)[number]
            supervisor.tend()

    def answer(self, worker: Numbered) -> None:
        part = worker.part
        assert part is not None
        value = part.request, part
        answer(self.supervisor, worker, value, part)

    def check(self) -> None:
        """Every event is that of its own part, no part is lost, and no worker is idle or extra."""
        supervisor = self.supervisor
        for request, got in self.events.items():
            new = events(request)
            assert not new or request in self.requests, "a closed request got an event"
            for event in new:
                began = [e for e in got if isinstance(e, Began) and e.part is event.part]
                assert event.part.number not in self.dropped[request]
                assert len(began) == (isinstance(event, Reply) and event.worker >= 0)
                assert not any(isinstance(e, Reply) and e.part is event.part for e in got)
                if isinstance(event, Reply) and event.error is None:
                    assert event.value == (request, event.part)  # neither stale nor another's
                got.append(event)
        parts = [w.part for w in supervisor._workers if w.part is not None] + [*supervisor._parts]
        assert len(set(parts)) == len(parts)
        for request in self.requests:
            known = {part.number for part in parts if part.request is request}
            known |= {e.part.number for e in self.events[request] if isinstance(e, Reply)}
            assert {part.number for part in request.asked} <= known | self.dropped[request]
        wanted = any(part.request.wants(part) for part in supervisor._parts)
        assert not (wanted and supervisor.num_idle)
        assert all(len(worker.sent) == sent for worker, sent in self.out.items())
        places = [worker.index for worker in supervisor._workers if not worker.left]
        assert len(set(places)) == len(places)
        assert supervisor.places.issuperset(places)

    def finish(self) -> None:
        """When all workers work again, everything is answered."""
        self.supervisor.resize(2)
        for place in range(5):
            self.act("restart", place, 0)
        for _ in range(100):
            self.supervisor.clock.now += 5.0  # less than the hang timeout, no less than any pause
            self.supervisor.tend()
            for worker in self.supervisor.launched:
                if not worker.ended and not worker.ready:
                    self.supervisor.ready(worker)
                if not worker.ended and worker.part:
                    self.answer(worker)
            self.check()
        for request in self.requests:
            replies = [e.part.number for e in self.events[request] if isinstance(e, Reply)]
            asked = {part.number for part in request.asked}
            assert {*replies} == asked - self.dropped[request]
        assert len(self.supervisor._workers) == len(self.supervisor.places)


@given(st.integers(1, 4), ACTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_part_is_lost_or_mixed_whatever_happens(size, acts):
    script = Script(size)
    for act in acts:
        script.act(*act)
        script.check()
    script.finish()


def started(size: int) -> InMemory:
    supervisor = InMemory(size)
    supervisor.tend()
    for worker in supervisor.launched:
        supervisor.ready(worker)
    return supervisor


def pass_time(supervisor: InMemory, seconds: float, *alive: Numbered) -> None:
    """Let time pass, in which some workers give signs of life."""
    end = supervisor.clock.now + seconds
    while supervisor.clock.now < end:
        supervisor.clock.now += 1.0
        for worker in alive:
            worker.life = supervisor.clock.now
        supervisor.tend()


def test_a_worker_that_gives_signs_of_life_has_the_timeout_for_a_part_that_is_awaited():
    supervisor = started(3)
    one, other = Asking(supervisor, 2), Asking(supervisor, 1)
    slow, hung, unawaited = supervisor.launched
    other.close()
    pass_time(supervisor, GRACE - 1, slow, unawaited)
    assert not any(worker.ended for worker in supervisor.launched)
    pass_time(supervisor, 1, slow, unawaited)
    assert [worker.ended for worker in (slow, hung, unawaited)] == [False, True, True]
    assert "without a sign of life" in str(replies(one)[0].error)
    pass_time(supervisor, TIMEOUT - GRACE - 1, slow)
    assert not slow.ended
    pass_time(supervisor, 1, slow)
    assert slow.ended
    (late,) = replies(one)
    assert late.error.reason == (
        f"was lost: {slow} was at one part for more than 600 s, and was ended; "
        "timeout sets this time"
    )


def test_the_grace_of_rows_grows_whenever_their_worker_was_ended():
    supervisor = started(1)
    request = Asking(supervisor, 1)
    for kills in range(8):
        worker = supervisor.launched[-1]
        hang_timeout = min(GRACE * 2**kills, TIMEOUT)
        pass_time(supervisor, hang_timeout - 1)
        assert not worker.ended
        pass_time(supervisor, 1)
        assert worker.ended
        assert f"at one part for more than {hang_timeout:g} s" in str(replies(request)[0].error)
        supervisor.ready(supervisor.launched[-1])
        request.more(1)
    request.more(1)
    request.close()
    Asking(supervisor, 1)  # of another request
    answer(supervisor, supervisor.launched[-1], 0)
    pass_time(supervisor, GRACE)
    assert supervisor.launched[-2].ended


def test_a_module_is_loaded_by_one_worker_at_a_time_while_another_one_has_calls():
    supervisor, alive = started(4), frozenset({0, 1})
    first = Asking(supervisor, 4)
    for worker in supervisor.launched:
        answer(supervisor, worker, 0)
    first.module = PackedModule(0, None, alive, b"")
    second = Asking(supervisor, 0)
    second.module = PackedModule(1, None, alive, b"")
    second.more(6)

    def loading() -> list[Numbered]:
        return [w for w in supervisor.launched if w.part and w.part.request is second and w.fresh]

    (loader,) = loading()
    first.more(3)
    assert supervisor.num_idle == 0
    for worker in set(supervisor.launched) - {loader}:
        answer(supervisor, worker, 0)
    assert loading() == [loader]
    supervisor.loaded(loader)
    (another,) = loading()
    assert another is not loader
    answer(supervisor, another, 0)  # loading is not reported
    assert another.part.request is second
    assert len(loading()) == 1
    supervisor.clock.now += 10.0  # nobody calls the first module any more
    second.more(1)
    assert len(loading()) == 2


def test_loading_a_module_is_no_part_of_the_grace():
    supervisor = started(1)
    one = Asking(supervisor, 1)
    (worker,) = supervisor.launched
    worker.loading = True  # as sending did, where modules are loaded there
    supervisor.clock.now += START_SECONDS - 1
    supervisor.tend()
    supervisor.loaded(worker)
    supervisor.clock.now += GRACE - 1
    supervisor.tend()
    assert not worker.ended
    supervisor.clock.now += 1
    supervisor.tend()
    assert worker.ended
    (reply,) = replies(one)
    assert "was at one part for more than 10 s" in str(reply.error)
    supervisor.ready(supervisor.launched[1])
    two = Asking(supervisor, 1)
    supervisor.launched[1].loading = True
    supervisor.clock.now += START_SECONDS
    supervisor.tend()
    (reply,) = replies(two)
    assert f"was loading a module for more than {START_SECONDS:g} s" in str(reply.error)


def test_workers_may_take_ten_times_as_long_to_start_as_the_first_one():
    supervisor = InMemory(3, None)
    supervisor.tend()
    first, second, third = supervisor.launched
    supervisor.clock.now = START_SECONDS - 1
    assert supervisor.tend() <= START_SECONDS
    assert not any(worker.ended for worker in supervisor.launched)
    supervisor = InMemory(3, None)
    supervisor.tend()
    first, second, third = supervisor.launched
    supervisor.clock.now = 2.0
    supervisor.ready(first)
    supervisor.clock.now = 19.0
    assert supervisor.tend() == 20.0
    supervisor.ready(second)  # only the first start sets the time
    supervisor.clock.now = 20.0
    request = Asking(supervisor, 2)
    supervisor.tend()
    assert [worker.ended for worker in (first, second, third)] == [False, False, True]
    for worker in (first, second):
        worker.loading = True  # as sending did, where modules are loaded there
    supervisor.clock.now = 59.0  # twice the time, as one was ended for it
    supervisor.tend()
    assert not first.ended
    supervisor.clock.now = 60.0
    supervisor.tend()
    assert first.ended
    assert second.ended
    assert "was loading a module for more than 40 s" in str(replies(request)[0].error)
    assert supervisor.start_timeout == 80.0


def test_workers_have_at_least_ten_seconds_to_start_or_what_the_caller_says():
    for start_timeout, limit in ((None, 10.0), (3.0, 3.0)):
        supervisor = InMemory(2, start_timeout)
        supervisor.tend()
        first, second = supervisor.launched
        supervisor.ready(first)
        supervisor.clock.now = limit - 0.5
        supervisor.tend()
        assert not second.ended
        supervisor.clock.now = limit
        supervisor.tend()
        assert second.ended


def test_workers_that_do_not_come_up_are_tried_less_and_less_often_and_what_waits_fails():
    supervisor = InMemory(1)
    one = Asking(supervisor, 2)
    pauses = []
    for attempt in range(6):
        supervisor.tend()
        assert len(supervisor.launched) == attempt + 1
        supervisor.lost(supervisor.launched[-1], "ended before it was up")
        pauses.append(supervisor.tend() - supervisor.clock.now)
        assert len(supervisor.launched) == attempt + 1
        supervisor.clock.now += pauses[-1]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert [reply.part.number for reply in replies(one)] == [0, 1]
    supervisor._failed_starts = 2000  # hours later
    supervisor.tend()
    supervisor.lost(supervisor.launched[-1], "ended before it was up")
    assert supervisor.tend() == supervisor.clock.now + 5.0
    supervisor.clock.now += 5.0
    supervisor.tend()
    supervisor.ready(supervisor.launched[-1])
    another = Asking(supervisor, 1)
    assert "ended before it was up" not in supervisor.status(another)
    last = supervisor.launched[-1]
    answer(supervisor, last, "up again")
    assert replies(another)[0].value == "up again"


def test_a_worker_that_cannot_be_launched_is_tried_again():
    supervisor = InMemory(2)
    one = Asking(supervisor, 2)
    launch = supervisor.launch

    def refuse(index: int) -> Numbered:
        raise OSError("too many open files")

    supervisor.launch = refuse
    for _ in range(3):
        supervisor.clock.now = supervisor.tend()
    errors = [str(reply.error) for reply in replies(one)]
    assert errors == [
        f"part {n} did not start: worker 0 could not be started: OSError: too many open files"
        for n in range(2)
    ]
    supervisor.launch = launch
    supervisor.tend()
    assert len(supervisor.launched) == 2


def test_an_interrupt_before_the_thread_starts_is_made_up_for(monkeypatch):
    supervisor = InMemory(1)
    supervisor.wait = lambda seconds: time.sleep(0.01)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(supervisor.thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            supervisor.begin(nn.Identity())
    supervisor.begin(nn.Identity())
    assert supervisor.thread.is_alive()
    supervisor.close()
    assert not supervisor.thread.is_alive()


def test_the_obstacle_is_said():
    supervisor = InMemory(3)
    request = Asking(supervisor, 1)
    supervisor.tend()
    assert request.status() == "3 of 3 workers are starting"
    supervisor.ready(supervisor.launched[0])
    assert request.status() == ""
    later = Asking(supervisor, 1)
    supervisor.lost(supervisor.launched[1], "ended before it was up")
    assert later.status() == (
        "1 of 3 workers are at earlier tasks (hang timeout 10 s); 2 of 3 workers are starting; "
        f"{supervisor.launched[1]} ended before it was up"
    )


def test_only_workers_that_are_at_an_interrupted_request_are_ended():
    supervisor = started(3)
    interrupted, other = Asking(supervisor, 2), Asking(supervisor, 1)
    interrupted.more(1)  # waits
    first, second, third = supervisor.launched
    interrupted.interrupt(abandon=True)  # in another thread: its own has still to close it
    answer(supervisor, first, "done meanwhile")
    assert first.is_wanted
    assert first.part is None
    interrupted.abandon()
    supervisor.tend()
    assert [worker.ended for worker in (first, second, third)] == [False, True, False]
    assert supervisor.num_lost == 0  # it did not fail
    answer(supervisor, third, "good")
    assert [reply.value for reply in replies(other)] == ["good"]


def test_overdue_workers_are_replaced_though_one_cannot_be_ended():
    supervisor = started(3)
    one = Asking(supervisor, 2)
    first, second, idle = supervisor.launched
    end = supervisor.end

    def fail(worker: Numbered) -> None:
        end(worker)
        if worker is first:
            raise OSError("it cannot be ended")

    supervisor.end = fail
    supervisor.clock.now = GRACE
    supervisor.tend()
    assert (second.ended, idle.ended) == (True, False)
    assert [worker.index for worker in supervisor.launched] == [0, 1, 2, 0, 1]
    assert [str(reply.error) for reply in replies(one)] == [
        f"worker {n} was lost: {worker} was at one part for more than 10 s without a sign of life, "
        "and was ended; hang_timeout (--hang-timeout) sets this time"
        for n, worker in enumerate((first, second))
    ]


class Served(InMemory):
    """One whose thread runs, and fails where it has nothing to do."""

    failures = 1

    def wait(self, seconds: float) -> None:
        if self.failures:
            self.failures -= 1
            raise KeyError("nobody expected this")
        self.blocked.wait(60.0)

    def ring(self) -> None:
        self.rung = True


class Pool(SupervisedWorkers):
    def __init__(self) -> None:
        super().__init__(1, threads=1, hang_timeout=GRACE, timeout=60.0, start_timeout=None)

    def _make(self) -> Supervisor:
        self.served = Served(1)
        self.served.blocked = threading.Event()
        return self.served


def test_the_thread_of_a_pool_survives_any_exception_and_closing_blocks_nobody(caplog, monkeypatch):
    monkeypatch.setattr("coded_torch.workers._supervisor._REPAIR_SECONDS", 0.01)
    pool = Pool()
    pool.open(nn.Identity(), task_of(torch.zeros(1, 1, 1)))
    until(lambda: "the thread of the pool goes on" in caplog.text)
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: getattr(pool.served, "rung", False))
    with pytest.raises(RuntimeError, match="the pool is closed"):  # while the thread has not ended
        pool.open(nn.Identity(), task_of(torch.zeros(1, 1, 1)))
    assert closing.is_alive()
    pool.served.blocked.set()
    closing.join(60.0)
    assert not pool.served.thread.is_alive()
