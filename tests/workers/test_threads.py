"""A small pool of its own, as one may write it: it passes the tests of all pools."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from coded_torch._table import Failure
from coded_torch.testing.helpers import WAIT, Gated, until
from coded_torch.testing.workers import WorkersTests, numbered, run, task_of
from coded_torch.workers import Part, Task
from coded_torch.workers._base import compute
from coded_torch.workers._dispatch import DispatchedWorkers, Dispatcher, Worker
from coded_torch.workers._live import LiveRequest

ONE = torch.ones(1, 1, 1)


class ThreadWorkers(DispatchedWorkers):
    """Threads of this process that share the module."""

    def __init__(self, num_workers: int, timeout: float = 600.0) -> None:
        self.size, self.timeout = num_workers, timeout
        self._open()

    def _make(self) -> Dispatcher:
        return Threads(self.size)

    def open(self, module: nn.Module, task: Task) -> LiveRequest:
        # The request holds the threads, not the pool, which ends when nothing else holds it.
        return LiveRequest(task, self.timeout, self._dispatcher(), module)


class Threads(Dispatcher):
    kind = "threads"

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._executor = ThreadPoolExecutor(size)
        for place in range(size):
            self.add(Worker(place))

    def send(self, worker: Worker, part: Part) -> None:
        self._executor.submit(self._compute, worker, part)

    def _compute(self, worker: Worker, part: Part) -> None:
        task = part.request.task
        try:
            with part.request.ambient.restored(task.device):
                value = compute(
                    part.request.module, task.payload(part.units, copied=True), part.fault
                )
        except BaseException as cause:
            reason = f"failed: {type(cause).__name__}: {cause}"
            self.settle(worker, part, Failure(reason, "raised", cause))
        else:
            self.settle(worker, part, value)

    def close(self) -> None:
        self.stop()
        self._executor.shutdown()


class TestThreadWorkers(WorkersTests):
    def make(self) -> ThreadWorkers:
        return ThreadWorkers(3)


@pytest.mark.parametrize("leaves", [False, True])
def test_starting_calls_the_module_once_on_each_worker_though_one_is_busy(leaves, tmp_path):
    """Or until the busy one is given up, which is not missing then."""
    calls = []
    module = nn.Identity()
    module.register_forward_hook(lambda *_: calls.append(threading.current_thread()))
    with ThreadWorkers(3) as pool, pool.open(Gated(str(tmp_path)), task_of(ONE)) as request:
        request.ask(numbered((0,)))
        assert request.wait(WAIT).worker == 0
        starting = threading.Thread(target=pool.start, args=(module, ONE), daemon=True)
        starting.start()
        until(lambda: len(calls) == 2 and request.idle == 2)
        assert starting.is_alive()
        pool.drain(0) if leaves else (tmp_path / "open").touch()
        starting.join(WAIT)
        assert not starting.is_alive()
        (tmp_path / "open").touch()
    assert len(calls) == 3 - leaves


@pytest.mark.parametrize("is_sent", [False, True])
def test_an_interrupt_while_a_part_is_handed_over_costs_no_worker(is_sent):
    with ThreadWorkers(1) as pool:
        with pytest.MonkeyPatch.context() as patch:
            send = pool._queue.send

            def interrupted(worker, part):
                if is_sent:
                    send(worker, part)
                raise KeyboardInterrupt

            patch.setattr(pool._queue, "send", interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(run(pool, nn.Identity(), task_of(ONE)))
        (reply,) = run(pool, nn.Identity(), task_of(ONE), deadline=WAIT)
        assert torch.equal(reply.value, ONE[0])


def test_a_worker_that_has_left_cannot_be_restarted():
    with ThreadWorkers(3) as pool:
        pool.drain(1)
        with pytest.raises(ValueError, match=r"worker must be one of \[0, 2\], got 1"):
            pool.restart(1)


def test_a_pool_starts_without_the_workers_that_are_excluded():
    with ThreadWorkers(3) as pool:
        pool.exclude(1)
        pool.start(nn.Identity(), ONE, timeout=WAIT)
        pool._queue.at(1)[0].ready = False  # as while it starts
        pool.start(nn.Identity(), ONE, timeout=WAIT)
        assert {place: state for place, (state, _) in pool.states.items()}[1] == "excluded"


def test_parts_that_spare_a_worker_leave_one_idle_though_several_requests_ask_at_once(tmp_path):
    late = Part(0, (0,))
    with ThreadWorkers(4) as pool, contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(pool.open(Gated(str(tmp_path)), task_of(ONE))) for _ in range(2)
        )
        first.ask([late])
        assert first.wait(WAIT).part is late
        for request in (first, second):  # each saw three idle workers
            request.ask([Part(n, (0,), spares=True, of=late) for n in (1, 2)])
        assert [first.wait(WAIT).part.number, first.wait(WAIT).part.number] == [1, 2]
        assert second.wait(0.2) is None
        assert second.idle == 1
        second.ask([Part(3, (0,))])  # the worker is there for parts that need not spare any
        assert second.wait(WAIT).part.number == 3
        (tmp_path / "open").touch()
        replies = [second.wait(WAIT) for _ in range(5)]
        assert sorted(event.part.number for event in replies) == [1, 1, 2, 2, 3]


def test_a_part_that_spares_a_worker_takes_the_last_one_once_others_have_failed():
    with ThreadWorkers(3) as pool, pool.open(nn.Identity(), task_of(ONE)) as request:
        for worker in (1, 2):
            pool.exclude(worker)
        request.ask([Part(1, (0,), spares=True, of=Part(0, (0,)))])
        assert request.wait(WAIT).worker == 0
