"""Threads that wait for processes: one of them polls for all, and any may be interrupted."""

import ctypes
import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
import torch

from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.testing.workers import WAIT, numbered, replies_of, run, task_of, until
from coded_torch.workers import Part, ProcessWorkers, WorkerError

from .modules import Doubled, Scale, Sleepy

GRACE = 1.0


def seconds(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


@pytest.fixture
def pool():
    with (
        torch.no_grad(),
        ProcessWorkers(4, hang_timeout=WAIT).start(Sleepy(), timeout=2 * WAIT) as pool,
    ):
        yield pool


def in_threads(calls) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def raise_in(thread: int, error: type[BaseException]) -> None:
    """Have a thread raise between two of its lines."""
    argument = ctypes.c_ulong(thread), ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(*argument)


def leader(pool: ProcessWorkers) -> int:
    """The thread that polls, once there is one."""
    until(lambda: pool._queue._lane.leader)
    return pool._queue._lane.leader


@torch.no_grad()
def ask_and_wait(pool, values, found, then=None):
    try:
        with pool.open(Sleepy(), task_of(values)) as request:
            request.ask(numbered(*([n] for n in range(len(values)))))
            if then is not None:
                then(request)
            found.append([reply.error for reply in replies_of(request)])
    except BaseException as error:
        found.append(error)


class Stop(BaseException):
    """Is raised in a leader."""


@pytest.mark.parametrize("end", ["ends", "raises", "interrupted"])
def test_another_thread_leads_when_the_leader_does_not(pool, end):
    found, first = [], []

    def leave(request):
        request.wait(request.now() + 0.3)
        while request.wait(request.now() + 0.3) is not None:
            pass
        if end == "raises":
            raise Stop
        request.close()

    then = None if end == "interrupted" else leave
    (one,) = in_threads([lambda: ask_and_wait(pool, seconds(3600.0), first, then)])
    thread = leader(pool)
    assert thread == one.ident
    others = in_threads([lambda: ask_and_wait(pool, seconds(0.3), found)] * 7)
    if end == "interrupted":
        time.sleep(0.2)
        raise_in(thread, Stop)
    for each in others:
        each.join(WAIT)
    one.join(0.0 if end == "interrupted" else WAIT)
    assert found == [[None]] * 7
    until(lambda: not pool._queue._lane.leader)


def test_a_message_whose_handling_was_interrupted_is_handled_again(pool, monkeypatch):
    queue = pool._queue
    pop = queue._lane.pop
    interrupts = [Stop, Stop]

    class Lane:
        def __getattr__(self, name):
            return getattr(lane, name)

        def pop(self):
            if interrupts:
                raise interrupts.pop()
            pop()

    lane = queue._lane
    with pool.open(Sleepy(), task_of(seconds(0.0, 0.0))) as request:
        request.ask(numbered((0,), (1,)))
        monkeypatch.setattr(queue, "_lane", Lane())
        replies = []
        while len(replies) < 2:
            try:
                replies += replies_of(request)
            except Stop:
                continue
    assert not interrupts
    assert [reply.error for reply in replies] == [None, None]
    assert pool.num_restarts == 0


def test_replies_after_their_call_give_their_worker_back_though_no_call_waits(pool):
    module = Sleepy()
    with pool.open(module, task_of(seconds(0.0))) as request:  # packs the module
        request.ask(numbered((0,)))
        replies_of(request)
    for _ in range(2):
        with pool.open(module, task_of(seconds(0.2, 0.2, 0.2, 0.2))) as request:
            request.ask(numbered((0,), (1,), (2,), (3,)))
            assert request.idle == 0
        until(lambda: pool._queue.num_idle == 4)
    assert pool.num_restarts == 0
    with pool.open(Sleepy(), task_of(seconds(0.0))) as request:
        request.ask(numbered((0,)))
        (reply,) = replies_of(request)
    assert float(reply.value) == 0.0


def test_a_pool_that_another_thread_closes_ends_all_calls(pool):
    found = []
    threads = in_threads([lambda: ask_and_wait(pool, seconds(3600.0, 3600.0), found)] * 8)
    leader(pool)
    time.sleep(0.2)
    start = time.monotonic()
    pool.close()
    for thread in threads:
        thread.join(WAIT)
    assert time.monotonic() - start < 10
    assert len(found) == 8
    assert all("the pool was closed" in str(error) for errors in found for error in errors)


def test_a_fork_can_close_a_request_whose_lock_another_thread_holds(pool):
    held, over = threading.Event(), threading.Event()

    def hold():
        with pool._queue.lock:
            held.set()
            over.wait(WAIT)

    with pool.open(Sleepy(), task_of(seconds(0.0))) as request:
        (thread,) = in_threads([hold])
        assert held.wait(WAIT)
        if not (child := os.fork()):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            request.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        over.set()
        thread.join(WAIT)


def test_a_fork_takes_nothing_from_a_pool_in_use(pool):
    found, stop = [], threading.Event()

    def calls():
        while not stop.is_set():
            ask_and_wait(pool, seconds(0.0, 0.0, 0.0, 0.0), found)

    threads = in_threads([calls] * 2)
    for _ in range(10):
        if not (child := os.fork()):
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join(WAIT)
    assert found
    assert all(errors == [None] * 4 for errors in found)


def test_threads_call_two_modules_at_once(pool):
    wrong = []

    @torch.no_grad()
    def calls(factor: float):
        module = Scale(factor)
        for _ in range(30):
            for reply in run(pool, module, task_of(torch.ones(4, 1, 1)), deadline=WAIT):
                if reply.error is not None or float(reply.value) != factor:
                    wrong.append(reply)

    threads = in_threads([lambda factor=factor: calls(factor) for factor in (2.0, 3.0, 2.5)])
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@torch.no_grad()
def test_a_round_begins_at_workers_that_end_parts_of_other_requests(pool):
    module = Sleepy()
    coded = CodedWrapper(module, workers=pool, waiting=Waiting(estimate=False))
    for _ in range(10):  # until it is known when a part is late
        coded(seconds(0.0, 0.0, 0.0, 0.0))
    with pool.open(module, task_of(seconds(0.3, 0.3, 0.3, 0.3))) as request:
        request.ask(numbered((0,), (1,), (2,), (3,)))
        start = time.monotonic()
        coded(seconds(0.0, 0.0, 0.0, 0.0))
        assert time.monotonic() - start < WAIT / 4


@torch.no_grad()
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_round_tells_whether_inputs_are_finite(pool, odd):
    coded = CodedWrapper(Doubled(), workers=pool, waiting=Waiting(estimate=False))
    x = torch.randn(7, 3)
    for _ in range(10):
        assert torch.equal(coded(x), 2 * x + 1)
    x[5, 1] = odd
    for _ in range(2):
        answers, report = coded.run(x)
        assert torch.equal(answers.nan_to_num(9.0, 8.0), (2 * x + 1).nan_to_num(9.0, 8.0))
        assert not report.rejected
        assert int(report.estimated.sum()) == 0


class Trouble:
    """Eight threads call a pool whose processes are killed and stopped, and are interrupted."""

    def __init__(self, pool: ProcessWorkers, calls: int, end: float) -> None:
        self.pool, self.calls, self.end = pool, calls, end
        self.counts, self.slowest = Counter[str](), 0.0
        waiting = Waiting(estimate=False)
        self.coded = CodedWrapper(Doubled(), workers=pool, parts=4, waiting=waiting)

    def call(self, draw: random.Random) -> str:
        x = torch.full((4, 10 if draw.random() < 0.85 else 1 << 16), draw.random())
        if draw.random() < 0.7:
            return "right" if torch.equal(self.coded(x), 2 * x + 1) else "wrong"
        with self.pool.open(self.coded.module, task_of(x[:, None])) as request:
            request.ask([Part(n, (n % 4,)) for n in range(12)])
            request.drop([Part(n, (n % 4,)) for n in range(8, 12)])
            replies = list(request.replies())
        numbers = {reply.part.number for reply in replies}
        good = [reply for reply in replies if reply.error is None]
        right = all(torch.equal(r.value, 2 * x[:1] + 1) for r in good) and numbers >= set(range(8))
        return "right" if right else "wrong"

    @torch.no_grad()
    def caller(self, seed: int) -> None:
        draw, left = random.Random(seed), [self.calls]
        while left[0] and time.monotonic() < self.end:
            try:
                try:
                    while left[0] and time.monotonic() < self.end:
                        left[0] -= 1
                        start = time.monotonic()
                        try:
                            what = self.call(draw)
                        except (WorkerError, RuntimeError) as error:
                            what = type(error).__name__
                        self.counts[what] += 1
                        self.slowest = max(self.slowest, time.monotonic() - start)
                except (KeyboardInterrupt, Stop):
                    self.counts["interrupted"] += 1
            except (KeyboardInterrupt, Stop):
                self.counts["interrupted twice"] += 1  # while the first was handled

    def disturb(self, over: threading.Event) -> None:
        draw, stopped = random.Random(0), {}
        while not over.wait(0.02):
            what, pids = draw.random(), self.pool.pids
            pid = draw.choice(pids) if pids else 0
            if what < 0.04 and pid:
                self.kill(pid, signal.SIGKILL, "kills")
            elif what < 0.12 and pid:
                self.kill(pid, signal.SIGSTOP, "stops")
                if draw.random() < 0.9:
                    stopped[pid] = time.monotonic() + draw.uniform(0, 0.3)
            elif what < 0.3 and (thread := self.pool._queue._lane.leader):
                self.counts["interrupts"] += 1
                if thread == threading.main_thread().ident:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    raise_in(thread, draw.choice([KeyboardInterrupt, Stop]))
            for each in [each for each, due in stopped.items() if due < time.monotonic()]:
                del stopped[each]
                self.kill(each, signal.SIGCONT, "continued")
        for each in stopped:
            self.kill(each, signal.SIGCONT, "continued")

    def kill(self, pid: int, number: int, what: str) -> None:
        try:
            os.kill(pid, number)
            self.counts[what] += 1
        except ProcessLookupError:
            pass

    def run(self) -> None:
        over = threading.Event()
        threads = in_threads([lambda seed=seed: self.caller(seed) for seed in range(1, 8)])
        (disturbing,) = in_threads([lambda: self.disturb(over)])
        self.caller(0)
        for thread in threads:
            thread.join(WAIT)
        over.set()
        disturbing.join(WAIT)
        self.counts["hang"] = sum(thread.is_alive() for thread in threads)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_call_is_lost_or_wrong_whoever_is_interrupted_killed_or_stopped():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ProcessWorkers(4, hang_timeout=GRACE).start(Doubled(), timeout=2 * WAIT) as pool:
            trouble = Trouble(pool, calls=60, end=time.monotonic() + 20)
            trouble.run()
            until(lambda: pool._queue.num_idle == 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert trouble.counts["wrong"] == trouble.counts["hang"] == 0, trouble.counts
    assert trouble.counts["right"] > 50, trouble.counts
    assert trouble.slowest < WAIT, trouble.counts


@pytest.mark.parametrize("num_parts", [1, 2])
def test_states_of_workers_are_read_while_a_round_goes_on(pool, monkeypatch, num_parts):
    """A server reads them all the time, and a round that is taken over takes longer."""
    module = Sleepy()
    pool.start(module, timeout=WAIT)
    taken = []
    queue = pool._queue
    take_over = queue._take_over
    monkeypatch.setattr(queue, "_take_over", lambda x: (taken.append(x), take_over(x)))
    coded = CodedWrapper(module, workers=pool, parts=num_parts, waiting=Waiting(deadline=WAIT))
    values = torch.full((num_parts, 1), 0.3)
    with torch.no_grad():
        coded(0 * values)  # proves the layout of the outputs
    taken.clear()
    found = []
    (thread,) = in_threads([lambda: found.append(torch.no_grad()(coded)(values))])
    until(lambda: queue._rounds)
    until(lambda: [state for state, _ in pool.states.values()].count("busy") == num_parts)
    thread.join(WAIT)
    assert torch.equal(found[0], values)
    assert not taken
    assert [state for state, _ in pool.states.values()] == ["idle"] * 4
