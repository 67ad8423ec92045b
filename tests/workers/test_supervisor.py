"""The policy of supervised pools, on machines in memory and a clock that only the tests move."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from coded_torch.workers._crew import START_SECONDS, Crew, Job, Machine
from coded_torch.workers._request import Request
from coded_torch.workers.base import Ambient

from .workers_tests import task_of

GRACE = 10.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Numbered(Machine):
    """A machine that does nothing by itself."""

    serial = itertools.count()

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.number = next(self.serial)
        self.sent: list[Job] = []
        self.ended = False
        self.paused = False

    def __str__(self) -> str:
        return f"machine {self.number}"


class InMemory(Crew):
    """A crew whose machines the test drives."""

    def __init__(self, size: int) -> None:
        self.clock = Clock()
        self.launched: list[Numbered] = []
        super().__init__(size, GRACE, self.clock)

    def pack(self, module: nn.Module) -> None:
        return None

    def launch(self, index: int) -> Numbered:
        machine = Numbered(index)
        self.launched.append(machine)
        return machine

    def send(self, machine: Machine, job: Job) -> None:
        assert isinstance(machine, Numbered)
        assert not machine.ended, "asked a machine that has ended"
        machine.sent.append(job)

    def end(self, machine: Machine) -> None:
        assert isinstance(machine, Numbered)
        machine.ended = True

    def wait(self, seconds: float) -> None:
        raise AssertionError("no thread serves this crew")

    def wake(self) -> None:
        pass


def request(num_workers: int) -> Request:
    return Request(None, task_of(torch.zeros(num_workers, 1, 1)), Ambient.capture())


def replies(request: Request) -> list:
    got = []
    while not request.replies.empty():
        got.append(request.replies.get_nowait())
    return got


class CrewMachine(RuleBasedStateMachine):
    """Submits, delivers, delays, kills, pauses, corrupts, duplicates and reorders, in any order."""

    @initialize(size=st.integers(1, 4))
    def begin(self, size: int) -> None:
        self.crew = InMemory(size)
        self.requests: list[Request] = []
        self.got: dict[Request, list] = {}
        self.answered: set[int] = set()  # numbers of jobs whose answer was let through
        self.lost_jobs: set[tuple[Request, int]] = set()
        self.crew.tend()

    def alive(self) -> list[Numbered]:
        return [machine for machine in self.crew.launched if not machine.ended]

    def pick(self, data, machines: list[Numbered]) -> Numbered:
        return data.draw(st.sampled_from(machines), label="machine")

    @rule(num_workers=st.integers(1, 6))
    def submit(self, num_workers: int) -> None:
        new = request(num_workers)
        self.requests.append(new)
        self.got[new] = []
        self.crew.submit(new)

    @precondition(lambda self: any(not machine.ready for machine in self.alive()))
    @rule(data=st.data())
    def come_up(self, data) -> None:
        self.crew.ready(self.pick(data, [m for m in self.alive() if not m.ready]))

    @precondition(lambda self: any(m.job and not m.paused for m in self.alive()))
    @rule(data=st.data())
    def deliver(self, data) -> None:
        """Machines answer in any order, so results are delayed and reordered."""
        machine = self.pick(data, [m for m in self.alive() if m.job and not m.paused])
        job = machine.job
        self.crew.deliver(machine, job.number, (job.number, machine.number))

    @precondition(lambda self: any(machine.sent for machine in self.crew.launched))
    @rule(data=st.data())
    def deliver_again_or_stale(self, data) -> None:
        """An answer to an old job, from the machine that had it or from another one."""
        machine = self.pick(data, [m for m in self.crew.launched if m.sent])
        job = data.draw(st.sampled_from(machine.sent), label="job")
        other = self.pick(data, self.crew.launched)
        if other.job is None or other.job.number != job.number:
            before = other.job
            self.crew.deliver(other, job.number, "stale")
            assert other.job is before

    @precondition(lambda self: any(m.job and not m.paused for m in self.alive()))
    @rule(data=st.data(), number=st.integers(-5, 10**6))
    def corrupt(self, data, number: int) -> None:
        """A number that no job has: the machine is still at its job."""
        machine = self.pick(data, [m for m in self.alive() if m.job and not m.paused])
        if machine.job.number != number:
            job = machine.job
            self.crew.deliver(machine, number, "corrupt")
            assert machine.job is job

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def die(self, data) -> None:
        machine = self.pick(data, self.alive())
        machine.ended = True
        self.crew.lost(machine, "died")
        self.crew.lost(machine, "died")  # is told twice

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def pause_or_continue(self, data) -> None:
        machine = self.pick(data, self.alive())
        machine.paused = not machine.paused

    @rule(seconds=st.sampled_from([0.1, 1.0, GRACE, START_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.crew.clock.now += seconds
        self.crew.tend()

    @precondition(lambda self: any(not request.given_up for request in self.requests))
    @rule(data=st.data())
    def give_up(self, data) -> None:
        waiting = [request for request in self.requests if not request.given_up]
        data.draw(st.sampled_from(waiting), label="request").given_up = True

    @invariant()
    def every_reply_is_the_answer_to_its_own_job(self) -> None:
        for request, got in self.got.items():
            for reply in replies(request):
                got.append(reply)
                if reply.error is None:
                    number, machine = reply.value  # neither stale nor corrupt
                    assert number not in self.answered
                    self.answered.add(number)
                    sent = next(m for m in self.crew.launched if m.number == machine).sent
                    job = next(job for job in sent if job.number == number)
                    assert (job.request, job.worker) == (request, reply.worker)
                else:
                    assert reply.error.worker == reply.worker
            workers = [reply.worker for reply in got]
            assert len(set(workers)) == len(workers)
            assert set(workers) <= set(range(request.task.num_workers))

    @invariant()
    def no_job_is_forgotten_and_none_is_at_two_machines(self) -> None:
        busy = [machine.job for machine in self.crew._machines if machine.job is not None]
        waiting = list(self.crew._jobs)
        numbers = [job.number for job in busy + waiting]
        assert len(set(numbers)) == len(numbers)
        for request, got in self.got.items():
            if not request.given_up:
                open_jobs = {job.worker for job in busy + waiting if job.request is request}
                everybody = set(range(request.task.num_workers))
                assert open_jobs | {reply.worker for reply in got} == everybody

    @invariant()
    def nobody_is_idle_while_a_job_waits(self) -> None:
        wanted = any(not job.request.given_up for job in self.crew._jobs)
        assert not (wanted and self.crew._idle)
        for machine in self.crew._idle:
            assert machine.ready
            assert machine.job is None

    @invariant()
    def there_are_never_too_many_machines(self) -> None:
        places = [machine.index for machine in self.crew._machines]
        assert len(set(places)) == len(places) <= self.crew.size

    def teardown(self) -> None:
        if not hasattr(self, "crew"):
            return
        # When all machines that are left work again, everything is answered.
        for _ in range(200):
            self.crew.clock.now += 5.0  # less than the grace, no less than any pause
            self.crew.tend()
            for machine in self.alive():
                if not machine.ready:
                    self.crew.ready(machine)
                if (job := machine.job) is not None:
                    self.crew.deliver(machine, job.number, (job.number, machine.number))
            busy = any(machine.job for machine in self.crew._machines)
            if not busy and not self.crew._jobs and len(self.crew._machines) == self.crew.size:
                break
        self.every_reply_is_the_answer_to_its_own_job()
        for request, got in self.got.items():
            if not request.given_up:
                assert len(got) == request.task.num_workers
        assert len(self.crew._machines) == self.crew.size


TestCrew = CrewMachine.TestCase
TestCrew.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def started(size: int) -> InMemory:
    crew = InMemory(size)
    crew.tend()
    for machine in crew.launched:
        crew.ready(machine)
    return crew


def test_a_machine_that_is_overdue_is_ended_and_replaced():
    crew, one = started(2), request(2)
    crew.submit(one)
    late, good = crew.launched
    crew.deliver(good, good.job.number, "good")
    crew.clock.now = GRACE
    crew.tend()
    assert late.ended
    assert not good.ended
    first, second = replies(one)
    assert first.value == "good"
    assert "machine" in second.error.reason
    assert "was at one job for more than 10 s, and was ended" in second.error.reason
    assert [machine.index for machine in crew.launched] == [0, 1, 0]


def test_machines_that_do_not_come_up_are_tried_less_and_less_often_and_requests_are_told():
    crew, one = InMemory(1), request(2)
    crew.submit(one)
    pauses = []
    for attempt in range(6):
        crew.tend()
        assert len(crew.launched) == attempt + 1
        crew.lost(crew.launched[-1], "ended before it was up")
        pauses.append(crew.pause())
        crew.tend()
        assert len(crew.launched) == attempt + 1
        crew.clock.now += pauses[-1]
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert [reply.worker for reply in replies(one)] == [0, 1]
    crew.tend()
    crew.ready(crew.launched[-1])
    another = request(1)
    crew.submit(another)
    crew.deliver(crew.launched[-1], crew.launched[-1].job.number, "up again")
    assert replies(another)[0].value == "up again"


def test_a_place_that_does_not_come_up_costs_no_job_of_the_others():
    crew, one = InMemory(2), request(2)
    crew.tend()
    good, bad = crew.launched
    crew.ready(good)
    crew.submit(one)
    for _ in range(5):
        crew.lost(bad, "ended before it was up")
        crew.clock.now += crew.pause()
        crew.tend()
        bad = crew.launched[-1]
    assert replies(one) == []
    for _ in range(2):
        crew.deliver(good, good.job.number, "good")
    assert [reply.value for reply in replies(one)] == ["good", "good"]


def test_a_machine_that_cannot_be_launched_is_tried_again():
    crew, one = InMemory(2), request(2)
    crew.submit(one)
    launch = crew.launch

    def refuse(index: int) -> Numbered:
        raise OSError("too many open files")

    crew.launch = refuse
    for _ in range(3):
        crew.tend()
        crew.clock.now += crew.pause()
    for reply in replies(one):
        assert "could not be started: OSError: too many open files" in reply.error.reason
    crew.launch = launch
    crew.tend()
    assert len(crew.launched) == 2


def test_any_number_of_jobs_may_be_unsendable():
    crew, many = started(1), request(2000)

    def refuse(machine: Machine, job: Job) -> None:
        raise ValueError("too heavy")

    crew.send = refuse
    crew.submit(many)
    assert len(replies(many)) == 2000


def test_an_interrupt_while_a_job_is_sent_takes_no_machine():
    crew, one = started(2), request(2)
    send = crew.send

    def interrupted(machine: Machine, job: Job) -> None:
        crew.send = send
        raise KeyboardInterrupt

    crew.send = interrupted
    with pytest.raises(KeyboardInterrupt):
        crew.submit(one)
    one.given_up = True
    another = request(2)
    crew.submit(another)
    for machine in crew.launched:
        crew.deliver(machine, machine.job.number, "good")
    assert [reply.value for reply in replies(another)] == ["good", "good"]


def test_what_cannot_be_sent_is_the_jobs_error():
    crew, one = started(1), request(1)

    def refuse(machine: Machine, job: Job) -> None:
        raise ValueError("too heavy")

    crew.send = refuse
    crew.submit(one)
    (reply,) = replies(one)
    assert "could not be asked: too heavy" in str(reply.error)
    assert isinstance(reply.error.__cause__, ValueError)
    assert crew.launched[0].job is None
