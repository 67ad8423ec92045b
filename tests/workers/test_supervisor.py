"""The policy of supervised pools, on workers in memory and a clock that only the tests move."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from coded_torch.testing.workers import task_of, until
from coded_torch.workers import Began, Part, Reply
from coded_torch.workers.live import LiveRequest
from coded_torch.workers.supervisor import (
    START_SECONDS,
    SupervisedWorkers,
    Supervisor,
    WatchedWorker,
)
from coded_torch.workers.worker_main import PackedModule

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
        self.paused = False

    def __str__(self) -> str:
        return f"robot {self.number}"


class InMemory(Supervisor):
    """A supervisor of workers that the test drives."""

    def __init__(self, size: int) -> None:
        self.clock = Clock()
        self.launched: list[Numbered] = []
        super().__init__(size, (GRACE, TIMEOUT), self.clock)

    def pack(self, module: nn.Module) -> None:
        return None

    def launch(self, index: int) -> Numbered:
        worker = Numbered(index)
        self.launched.append(worker)
        return worker

    def send(self, worker: WatchedWorker, job: Part) -> None:
        assert isinstance(worker, Numbered)
        assert not worker.ended, "asked a worker that has ended"
        assert job.request.awaits(job), "began what is not wanted"
        worker.load(job)
        worker.sent.append(job)

    def end(self, worker: WatchedWorker) -> None:
        assert isinstance(worker, Numbered)
        worker.ended = True

    def wait(self, seconds: float) -> None:
        raise AssertionError("no thread serves this supervisor")

    def ring(self) -> None:
        pass


MODULE = PackedModule(0, None, frozenset({0}), b"")


class Asking(LiveRequest):
    """A request to a supervisor, on real time, on which nothing here depends."""

    def __init__(self, supervisor: Supervisor, num_parts: int) -> None:
        super().__init__(task_of(torch.zeros(1, 1, 1)), 3600.0, supervisor, MODULE)
        self.asked: list[Part] = []
        self.more(num_parts)

    def more(self, num_parts: int, avoid: frozenset[int] = frozenset()) -> None:
        parts = [Part(len(self.asked) + n, (0,), avoid=avoid) for n in range(num_parts)]
        self.asked += parts
        self.ask(parts)


def events(request: Asking) -> list[Began | Reply]:
    return list(iter(lambda: request.wait(0.0), None))


def replies(request: Asking) -> list[Reply]:
    return [event for event in events(request) if isinstance(event, Reply)]


class SupervisorMachine(RuleBasedStateMachine):
    """Asks, drops, delivers, kills, pauses, corrupts, duplicates and reorders, in any order."""

    @initialize(size=st.integers(1, 4))
    def begin(self, size: int) -> None:
        self.supervisor = InMemory(size)
        self.requests: list[Asking] = []  # that are open
        self.began: dict[Asking, set[int]] = {}
        self.got: dict[Asking, list[Reply]] = {}
        self.excluded: dict[int, int] = {}  # by the number of a worker, the jobs it had had then
        self.dropped: dict[Asking, set[int]] = {}  # before they had begun
        self.answered: set[int] = set()  # numbers of jobs whose answer was let through
        self.supervisor.tend()

    def alive(self) -> list[Numbered]:
        return [worker for worker in self.supervisor.launched if not worker.ended]

    def pick(self, data, workers: list[Numbered]) -> Numbered:
        return data.draw(st.sampled_from(workers), label="worker")

    @rule(num_parts=st.integers(1, 6))
    def open(self, num_parts: int) -> None:
        new = Asking(self.supervisor, num_parts)
        self.requests.append(new)
        self.began[new], self.got[new], self.dropped[new] = set(), [], set()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num_parts=st.integers(1, 3))
    def ask_again(self, data, num_parts: int) -> None:
        data.draw(st.sampled_from(self.requests), label="request").more(num_parts)

    @rule(index=st.integers(0, 3))
    def exclude(self, index: int) -> None:
        self.supervisor.exclude(index)
        self.excluded |= {m.number: len(m.sent) for m in self.alive() if m.index == index}

    @rule(index=st.integers(0, 3))
    def restart(self, index: int) -> None:
        self.supervisor.restart(index)
        self.supervisor.tend()
        assert not any(m.excluded for m in self.alive() if m.index == index and not m.left)

    @rule(index=st.integers(0, 4))
    def drain(self, index: int) -> None:
        busy = [m for m in self.alive() if m.index == index and m.job]
        self.supervisor.leave(index)
        self.supervisor.tend()
        assert [m for m in self.alive() if m.index == index and m.left] == busy

    @rule(size=st.integers(1, 5))
    def resize(self, size: int) -> None:
        self.supervisor.resize(size)
        assert len(self.supervisor.places) == size

    @invariant()
    def the_excluded_get_nothing(self) -> None:
        for worker in self.alive():
            sent = self.excluded.get(worker.number)
            assert sent is None or sent >= len(worker.sent)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def drop(self, data) -> None:
        request = data.draw(st.sampled_from(self.requests), label="request")
        parts = data.draw(st.lists(st.sampled_from(request.asked), unique=True), label="parts")
        self.dropped[request] |= {part.number for part in parts if request.wants(part)}
        request.drop(parts)

    @precondition(lambda self: any(not worker.ready for worker in self.alive()))
    @rule(data=st.data())
    def come_up(self, data) -> None:
        self.supervisor.ready(self.pick(data, [m for m in self.alive() if not m.ready]))

    @precondition(lambda self: any(m.job and not m.paused for m in self.alive()))
    @rule(data=st.data())
    def deliver(self, data) -> None:
        """Workers answer in any order, so results are delayed and reordered."""
        worker = self.pick(data, [m for m in self.alive() if m.job and not m.paused])
        job = worker.job
        self.supervisor.take(worker, job.ticket, lambda: (True, (job.ticket, worker.number)))

    @precondition(lambda self: any(worker.sent for worker in self.supervisor.launched))
    @rule(data=st.data())
    def deliver_again_or_stale(self, data) -> None:
        """An answer to an old job, from the worker that had it or from another one."""
        worker = self.pick(data, [m for m in self.supervisor.launched if m.sent])
        job = data.draw(st.sampled_from(worker.sent), label="job")
        other = self.pick(data, self.supervisor.launched)
        if other.job is None or other.job.ticket != job.ticket:
            before = other.job
            self.supervisor.take(other, job.ticket, lambda: (True, "stale"))
            assert other.job is before

    @precondition(lambda self: any(m.job and not m.paused for m in self.alive()))
    @rule(data=st.data(), number=st.integers(-5, 10**6))
    def corrupt(self, data, number: int) -> None:
        """A number that no job has: the worker is still at its job."""
        worker = self.pick(data, [m for m in self.alive() if m.job and not m.paused])
        if worker.job.ticket != number:
            job = worker.job
            self.supervisor.take(worker, number, lambda: (True, "corrupt"))
            assert worker.job is job

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def die(self, data) -> None:
        worker = self.pick(data, self.alive())
        worker.ended = True
        self.supervisor.lost(worker, "died")
        self.supervisor.lost(worker, "died")  # comes twice

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def pause_or_continue(self, data) -> None:
        worker = self.pick(data, self.alive())
        worker.paused = not worker.paused

    @rule(seconds=st.sampled_from([0.1, 1.0, GRACE, START_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.supervisor.clock.now += seconds
        self.supervisor.tend()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def close(self, data) -> None:
        request = data.draw(st.sampled_from(self.requests), label="request")
        self.requests.remove(request)
        request.close()

    @invariant()
    def every_reply_is_the_answer_to_its_own_job(self) -> None:
        for request, got in self.got.items():
            for event in events(request):
                assert request in self.requests, "something came of what is closed"
                number = event.part.number
                if isinstance(event, Began):
                    assert number not in self.began[request] | self.dropped[request]
                    self.began[request].add(number)
                    continue
                assert (event.worker >= 0) == (number in self.began[request])
                assert number not in self.dropped[request]
                got.append(event)
                if event.error is None:
                    job_number, worker = event.value  # neither stale nor corrupt
                    assert job_number not in self.answered
                    self.answered.add(job_number)
                    sent = next(m for m in self.supervisor.launched if m.number == worker).sent
                    job = next(job for job in sent if job.ticket == job_number)
                    assert job is event.part
                else:
                    assert event.error.part == number
            numbers = [reply.part.number for reply in got]
            assert len(set(numbers)) == len(numbers)

    @invariant()
    def no_job_is_forgotten_and_none_is_at_two_workers(self) -> None:
        busy = [worker.job for worker in self.supervisor._workers if worker.job is not None]
        waiting = list(self.supervisor._jobs)
        numbers = [job.ticket for job in busy + waiting]
        assert len(set(numbers)) == len(numbers)
        for request in self.requests:
            mine = {job.number for job in busy + waiting if job.request is request}
            answered = {reply.part.number for reply in self.got[request]}
            asked = {part.number for part in request.asked}
            assert asked - self.dropped[request] <= mine | answered

    @invariant()
    def no_worker_is_idle_while_a_job_waits(self) -> None:
        wanted = any(job.request.wants(job) for job in self.supervisor._jobs)
        assert not (wanted and self.supervisor.num_idle)

    @invariant()
    def there_are_never_too_many_workers(self) -> None:
        places = [worker.index for worker in self.supervisor._workers if not worker.left]
        assert len(set(places)) == len(places)
        assert self.supervisor.places.issuperset(places)

    def teardown(self) -> None:
        if not hasattr(self, "supervisor"):
            return
        # When all workers work again, everything is answered.
        self.supervisor.resize(2)
        for index in range(5):
            self.supervisor.restart(index)
        for _ in range(200):
            self.supervisor.clock.now += 5.0  # less than the grace, no less than any pause
            self.supervisor.tend()
            for worker in self.alive():
                if not worker.ready:
                    self.supervisor.ready(worker)
                if (job := worker.job) is not None:
                    self.supervisor.take(
                        worker, job.ticket, lambda m=worker: (True, (m.job.ticket, m.number))
                    )
            busy = any(worker.job for worker in self.supervisor._workers)
            if (
                not busy
                and not self.supervisor._jobs
                and len(self.supervisor._workers) == len(self.supervisor.places)
            ):
                break
        self.every_reply_is_the_answer_to_its_own_job()
        for request in self.requests:
            missing = len(request.asked) - len(self.got[request])
            assert missing == len(self.dropped[request])
        assert len(self.supervisor._workers) == len(self.supervisor.places)


TestSupervisor = SupervisorMachine.TestCase
TestSupervisor.settings = hypothesis.settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # on a busy machine
)


def started(size: int) -> InMemory:
    supervisor = InMemory(size)
    supervisor.tend()
    for worker in supervisor.launched:
        supervisor.ready(worker)
    return supervisor


def test_a_worker_that_is_overdue_is_ended_and_replaced():
    supervisor = started(2)
    one = Asking(supervisor, 2)
    late, good = supervisor.launched
    supervisor.take(good, good.job.ticket, lambda: (True, "good"))
    supervisor.clock.now = GRACE
    supervisor.tend()
    assert late.ended
    assert not good.ended
    first, second = replies(one)
    assert first.value == "good"
    assert str(second.error) == (
        f"worker 0 was lost: {late} was at one job for more than 10 s without a sign of life, "
        "and was ended; grace (--grace) sets this time"
    )
    assert [worker.index for worker in supervisor.launched] == [0, 1, 0]


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
        f"was lost: {slow} was at one job for more than 600 s, and was ended; "
        "timeout sets this time"
    )


def test_a_worker_that_falls_silent_has_its_grace_from_then_on():
    supervisor = started(1)
    Asking(supervisor, 1)
    (worker,) = supervisor.launched
    pass_time(supervisor, 3 * GRACE, worker)
    pass_time(supervisor, GRACE - 1)
    assert not worker.ended
    pass_time(supervisor, 1)
    assert worker.ended


def test_the_grace_of_rows_grows_whenever_their_worker_was_ended():
    supervisor = started(1)
    request = Asking(supervisor, 1)
    for kills in range(8):
        worker = supervisor.launched[-1]
        grace = min(GRACE * 2**kills, TIMEOUT)
        pass_time(supervisor, grace - 1)
        assert not worker.ended
        pass_time(supervisor, 1)
        assert worker.ended
        assert f"at one job for more than {grace:g} s" in str(replies(request)[0].error)
        supervisor.ready(supervisor.launched[-1])
        request.more(1)
    request.more(1)
    request.close()
    Asking(supervisor, 1)  # of another request
    supervisor.take(supervisor.launched[-1], supervisor.launched[-1].job.ticket, lambda: (True, 0))
    pass_time(supervisor, GRACE)
    assert supervisor.launched[-2].ended


def test_a_module_is_loaded_by_one_worker_at_a_time_while_another_one_has_calls():
    supervisor, alive = started(4), frozenset({0, 1})
    first = Asking(supervisor, 4)
    for worker in supervisor.launched:
        supervisor.take(worker, worker.job.ticket, lambda: (True, 0))
    first.module = PackedModule(0, None, alive, b"")
    second = Asking(supervisor, 0)
    second.module = PackedModule(1, None, alive, b"")
    second.more(6)

    def loading() -> list[Numbered]:
        return [w for w in supervisor.launched if w.job and w.job.request is second and w.fresh]

    (loader,) = loading()
    first.more(3)
    assert supervisor.num_idle == 0
    for worker in set(supervisor.launched) - {loader}:
        supervisor.take(worker, worker.job.ticket, lambda: (True, 0))
    assert loading() == [loader]
    supervisor.loaded(loader)
    (another,) = loading()
    assert another is not loader
    supervisor.take(another, another.job.ticket, lambda: (True, 0))  # loading is not reported
    assert another.job.request is second
    assert len(loading()) == 1
    supervisor.clock.now += 10.0  # nobody calls the first module any more
    second.more(1)
    assert len(loading()) == 2


def test_a_module_that_was_changed_is_loaded_by_all_workers_at_once():
    supervisor = started(3)
    request = Asking(supervisor, 3)
    for worker in supervisor.launched:
        supervisor.take(worker, worker.job.ticket, lambda: (True, 0))
    request.module = PackedModule(1, None, frozenset({1}), b"")  # its former state is not alive
    request.more(3)
    assert supervisor.num_idle == 0


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
    assert "was at one job for more than 10 s" in str(reply.error)
    supervisor.ready(supervisor.launched[1])
    two = Asking(supervisor, 1)
    supervisor.launched[1].loading = True
    supervisor.clock.now += START_SECONDS
    supervisor.tend()
    (reply,) = replies(two)
    assert f"was loading a module for more than {START_SECONDS:g} s" in str(reply.error)


def test_workers_that_do_not_come_up_are_tried_less_and_less_often_and_what_waits_fails():
    supervisor = InMemory(1)
    one = Asking(supervisor, 2)
    pauses = []
    for attempt in range(6):
        supervisor.tend()
        assert len(supervisor.launched) == attempt + 1
        supervisor.lost(supervisor.launched[-1], "ended before it was up")
        pauses.append(supervisor.pause())
        supervisor.tend()
        assert len(supervisor.launched) == attempt + 1
        supervisor.clock.now += pauses[-1]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert [reply.part.number for reply in replies(one)] == [0, 1]
    supervisor._failed_starts = 2000  # hours later
    supervisor.tend()
    supervisor.lost(supervisor.launched[-1], "ended before it was up")
    assert supervisor.pause() == 5.0
    supervisor.clock.now += 5.0
    supervisor.tend()
    supervisor.ready(supervisor.launched[-1])
    another = Asking(supervisor, 1)
    assert "ended before it was up" not in supervisor.status(another)
    last = supervisor.launched[-1]
    supervisor.take(last, last.job.ticket, lambda: (True, "up again"))
    assert replies(another)[0].value == "up again"


def test_a_place_that_does_not_come_up_costs_no_job_of_the_others():
    supervisor = InMemory(2)
    supervisor.tend()
    good, bad = supervisor.launched
    supervisor.ready(good)
    one = Asking(supervisor, 2)
    for _ in range(5):
        supervisor.lost(bad, "ended before it was up")
        supervisor.clock.now += supervisor.pause()
        supervisor.tend()
        bad = supervisor.launched[-1]
    assert replies(one) == []
    for _ in range(2):
        supervisor.take(good, good.job.ticket, lambda: (True, "good"))
    assert [reply.value for reply in replies(one)] == ["good", "good"]


def test_a_worker_that_cannot_be_launched_is_tried_again():
    supervisor = InMemory(2)
    one = Asking(supervisor, 2)
    launch = supervisor.launch

    def refuse(index: int) -> Numbered:
        raise OSError("too many open files")

    supervisor.launch = refuse
    for _ in range(3):
        supervisor.tend()
        supervisor.clock.now += supervisor.pause()
    errors = [str(reply.error) for reply in replies(one)]
    assert errors == [
        f"part {n} did not start: worker 0 could not be started: OSError: too many open files"
        for n in range(2)
    ]
    supervisor.launch = launch
    supervisor.tend()
    assert len(supervisor.launched) == 2


def test_any_number_of_jobs_that_cannot_be_sent_fail():
    supervisor = started(1)

    def refuse(worker: WatchedWorker, job: Part) -> None:
        raise ValueError("too heavy")

    supervisor.send = refuse
    failed = replies(Asking(supervisor, 2000))
    assert len(failed) == 2000
    assert "could not be asked: too heavy" in str(failed[0].error)
    assert isinstance(failed[0].error.__cause__, ValueError)
    assert supervisor.num_idle == 1


def test_an_interrupt_while_a_job_is_sent_takes_no_worker():
    supervisor = started(2)
    send = supervisor.send

    def interrupted(worker: WatchedWorker, job: Part) -> None:
        supervisor.send = send
        raise KeyboardInterrupt

    supervisor.send = interrupted
    one = Asking(supervisor, 0)
    with pytest.raises(KeyboardInterrupt):
        one.more(2)
    one.close()
    another = Asking(supervisor, 2)
    for worker in supervisor.launched:
        supervisor.take(worker, worker.job.ticket, lambda: (True, "good"))
    assert [reply.value for reply in replies(another)] == ["good", "good"]


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
        "1 of 3 workers are at earlier tasks (grace 10 s); 2 of 3 workers are starting; "
        f"{supervisor.launched[1]} ended before it was up"
    )


def test_a_worker_that_answers_at_the_last_moment_begins_nothing_that_ends_with_it():
    supervisor = started(1)
    one = Asking(supervisor, 2)
    (late,) = supervisor.launched
    end = supervisor.end

    def too_late(worker: Numbered) -> None:
        supervisor.take(worker, worker.sent[0].number, lambda: (True, "just in time"))
        end(worker)

    supervisor.end = too_late
    supervisor.clock.now = GRACE
    supervisor.tend()
    assert late.ended
    assert len(late.sent) == 1
    supervisor.ready(supervisor.launched[-1])
    successor = supervisor.launched[-1]
    supervisor.take(successor, successor.job.ticket, lambda: (True, "by another"))
    first, second = replies(one)
    assert "was at one job for more than 10 s" in str(first.error)
    assert second.value == "by another"


def test_only_workers_that_are_at_an_interrupted_request_are_ended():
    supervisor = started(3)
    interrupted, other = Asking(supervisor, 2), Asking(supervisor, 1)
    interrupted.more(1)  # waits
    first, second, third = supervisor.launched
    interrupted.abandoned = True  # in another thread: its own has still to close it
    supervisor.take(first, first.job.ticket, lambda: (True, "done meanwhile"))
    assert first.idle
    interrupted.abandon()
    supervisor.tend()
    assert [worker.ended for worker in (first, second, third)] == [False, True, False]
    supervisor.take(third, third.job.ticket, lambda: (True, "good"))
    assert [reply.value for reply in replies(other)] == ["good"]


def test_a_result_that_cannot_be_read_is_not_kept():
    supervisor = started(1)
    request = Asking(supervisor, 1)

    class UnreadableError(Exception):
        pass

    errors = [UnreadableError()]
    kept = weakref.ref(errors[0])

    def read() -> tuple[bool, Any]:
        raise errors.pop()

    gc.disable()
    try:
        supervisor.take(supervisor.launched[0], supervisor.launched[0].job.ticket, read)
        assert "sent what cannot be read" in str(replies(request)[0].error)
        assert kept() is None
    finally:
        gc.enable()


def test_overdue_workers_are_replaced_though_one_cannot_be_ended():
    supervisor = started(2)
    one = Asking(supervisor, 2)
    first, second = supervisor.launched
    end = supervisor.end

    def fail(worker: Numbered) -> None:
        end(worker)
        if worker is first:
            raise OSError("it cannot be ended")

    supervisor.end = fail
    supervisor.clock.now = GRACE
    supervisor.tend()
    assert second.ended
    assert len(supervisor.launched) == 4
    assert all("for more than 10 s" in str(reply.error) for reply in replies(one))


def test_workers_that_fail_together_fail_once():
    supervisor = InMemory(5)
    one = Asking(supervisor, 1)
    for _ in range(2):
        supervisor.tend()
        for worker in supervisor.launched[-5:]:
            supervisor.lost(worker, "ended with its server")
        supervisor.clock.now += supervisor.pause()
    assert replies(one) == []


def test_every_worker_of_a_process_has_its_own_seed():
    def seeds() -> list[int]:
        return [supervisor.seed() for supervisor in (InMemory(2), InMemory(2)) for _ in range(6)]

    with torch.random.fork_rng():
        torch.manual_seed(1)
        one = seeds()
        torch.manual_seed(2)
        assert len({*one, *seeds()}) == 24


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
        super().__init__(1, threads=1, grace=GRACE, timeout=60.0)

    def _make(self) -> Supervisor:
        self.served = Served(1)
        self.served.blocked = threading.Event()
        return self.served


def test_the_thread_of_a_pool_survives_any_exception_and_closing_blocks_nobody(caplog, monkeypatch):
    monkeypatch.setattr("coded_torch.workers.supervisor._REPAIR_SECONDS", 0.01)
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


def test_a_worker_that_starts_while_its_place_goes_leaves():
    class Shrinking(InMemory):
        def launch(self, index: int) -> Numbered:
            if index == 1:
                self.resize(1)
            return super().launch(index)

    supervisor = Shrinking(2)
    supervisor.tend()
    supervisor.tend()  # ends the worker that has no place
    kept, gone = supervisor.launched
    assert gone.ended
    assert not kept.ended
    assert list(supervisor.states()) == [0]


def test_jobs_that_nobody_wants_do_not_pile_up_while_no_worker_is_up():
    supervisor = InMemory(1)
    for _ in range(3):
        Asking(supervisor, 4).close()
    last = Asking(supervisor, 2)
    assert [job.request for job in supervisor._jobs] == [last, last]


def test_a_worker_that_is_to_be_replaced_gets_no_part():
    supervisor = InMemory(1)
    supervisor.tend()
    supervisor.ready(supervisor.launched[0])
    supervisor.restart(0)
    request = Asking(supervisor, 1)
    assert (request.idle, events(request)) == (0, [])
    supervisor.tend()
    supervisor.ready(supervisor.launched[1])
    assert [event.worker for event in events(request)] == [0]
