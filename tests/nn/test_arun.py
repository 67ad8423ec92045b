"""The wrapper under asyncio."""

import asyncio
import contextvars
import threading
import time

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, DeadlineExceeded, Waiting
from coded_torch.codes import ReplicationCode
from coded_torch.testing.helpers import Gated
from coded_torch.workers import DeviceWorkers, ProcessWorkers

from .modules import Call

X = torch.arange(8.0).view(8, 1)
WHO = contextvars.ContextVar("WHO", default="nobody")


def test_answers_and_their_report_beside_other_calls():
    async def main():
        return await asyncio.gather(*(coded.arun(X + i, waiting=Waiting()) for i in range(4)))

    with DeviceWorkers(["cpu", "cpu"]) as pool:
        coded = CodedWrapper(nn.ReLU(), workers=pool)
        found = asyncio.run(main())
        for i, (answers, report) in enumerate(found):
            assert torch.equal(answers, X + i)
            assert report.ended == "complete"
    assert any(coded.last_run is report for _, report in found)


def test_a_module_that_raises_stop_iteration_ends_the_await():
    """As one does that looks for the device of its first parameter, and has none."""

    def first(x):
        return x.to(next(iter(())))

    with DeviceWorkers(["cpu", "cpu", "cpu"]) as pool:
        coded = CodedWrapper(Call(first), workers=pool)
        with pytest.raises(RuntimeError, match="the module raised StopIteration"):
            asyncio.run(asyncio.wait_for(coded.arun(X), 30))


def test_context_variables_and_modes_of_torch_hold():
    seen = []

    def note(x):
        seen.append((WHO.get(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return x

    async def main():
        WHO.set("the caller")
        with torch.no_grad(), torch.autocast("cpu"):
            await coded.arun(X)
        assert threading.current_thread() is threading.main_thread()

    coded = CodedWrapper(Call(note), ReplicationCode(2, 2))  # runs where it is called
    asyncio.run(main())
    assert {*seen} == {("the caller", False, True)}


@pytest.mark.parametrize("make", [lambda: DeviceWorkers(["cpu"]), lambda: ProcessWorkers(1)])
def test_a_cancelled_call_ends_its_thread_and_drops_what_has_not_begun(make, tmp_path):
    async def main():
        first = asyncio.create_task(coded.arun(X[:4]))
        while not any(tmp_path.iterdir()):
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        # The default executor waits for its threads.
        await asyncio.get_running_loop().shutdown_default_executor()

    with make() as pool, torch.no_grad():
        pool.start()
        coded = CodedWrapper(Gated(str(tmp_path)), parts=4, workers=pool)
        asyncio.run(main())
        (tmp_path / "open").touch()
        coded(X[7:])
        assert len({path.name for path in tmp_path.iterdir()} - {"7", "open"}) == 1


def test_each_of_many_calls_has_a_thread_and_its_deadline_counts_from_the_await():
    """More calls than the threads of asyncio: all of them get to the workers in time."""
    hold = threading.Event()
    number = 3 * (32 + 4)  # asyncio has at most 32 threads

    def wait(x):
        hold.wait(60)
        return x

    async def main():
        began = time.monotonic()
        calls = [asyncio.ensure_future(coded.arun(X)) for _ in range(number)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return found, time.monotonic() - began

    waiting = Waiting(deadline=1.0, estimate=False)
    with DeviceWorkers(["cpu"]) as pool:
        coded = CodedWrapper(Call(wait), workers=pool, waiting=waiting, parts=1)
        found, seconds = asyncio.run(main())
        hold.set()
    assert {*map(type, found)} == {DeadlineExceeded}
    assert seconds < 2.5  # with asyncio's threads, three or more deadlines
