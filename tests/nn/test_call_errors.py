"""Whose fault failures are: the module's, on some row, or that of workers."""

import math
import time

import pytest
import torch

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import DeadlineExceeded
from coded_torch.workers import DeviceWorkers, ProcessWorkers

from ..workers.modules import FailsOn, Heavy, Sleepy

X = torch.arange(64.0).view(64, 1)
BAD = 17  # the row that the module fails on
MOST_LATE = 0.5  # seconds, of the least late of three calls: a busy machine holds some up
MOST = 2 * math.ceil(math.log2(11)) + 2  # parts, beyond the first six of 11 rows at most


def wrapper(pool, **waiting):
    waiting = Waiting(**{"hedge_budget": 0} | waiting)  # only what fails is asked again
    return CodedWrapper(FailsOn(BAD, "raise"), parts=6, workers=pool, waiting=waiting)


@pytest.fixture(scope="module")
def pool():
    with ProcessWorkers(6).start() as pool, torch.no_grad():
        yield pool


def test_a_row_that_the_module_raises_on_is_named(pool):
    coded = wrapper(pool)
    with pytest.raises(ValueError, match="17 is not to be had, in 1 rows") as info:
        coded(X)
    assert info.value.rows == (BAD,)
    assert "raised by the module on row 17 of the batch" in info.value.__notes__[-1]
    report, answers = info.value.report, info.value.answers
    assert report.missing_rows == report.module_failed_rows == (BAD,)
    others = torch.arange(64) != BAD
    assert answers[BAD].isnan().all()
    assert torch.equal(answers[others], 2 * X[others])
    assert coded.last_run is info.value.report
    assert coded.last_run.ended == "error"
    assert len(coded.last_run.hedges) <= MOST


def test_the_row_is_estimated_if_that_is_asked_for(pool):
    answers, report = wrapper(pool, on_error="estimate").run(X)
    assert report.estimated.nonzero().flatten().tolist() == [BAD]
    assert report.module_failed_rows == (BAD,)
    assert torch.equal(answers[~report.estimated], 2 * X[~report.estimated])
    assert isinstance(report.errors[BAD].__cause__, ValueError)


def late(coded, deadline, x=X, why=""):
    """Seconds after the deadline at which a call raises, at least, of three calls."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(DeadlineExceeded, match=why or None) as info:
            coded(x)
        times.append(time.perf_counter() - start - deadline)
        assert len(info.value.received) < 32
    return min(times)


def test_a_deadline_holds_while_workers_start_and_load_and_hang(tmp_path):
    with ProcessWorkers(2, hang_timeout=600) as pool, torch.no_grad():
        heavy = wrapper(pool, deadline=0.1)
        heavy.module = Heavy(tmp_path)
        first = r"^workers are still starting; call pool.start\(model, example\) first; 2 of 2"
        assert -0.01 < late(heavy, 0.1, why=first) < MOST_LATE
        (tmp_path / "open").touch()
        pool.start()
        (loads := tmp_path / "loads").mkdir()
        heavy.module = Heavy(loads)
        assert -0.01 < late(heavy, 0.1) < MOST_LATE  # they load
        (loads / "open").touch()
        hanging = wrapper(pool, deadline=0.1, estimate=False)
        hanging.module = Sleepy()
        assert -0.01 < late(hanging, 0.1, torch.full((64, 1), 100.0)) < MOST_LATE


def test_a_call_on_a_pool_whose_workers_have_left_says_so():
    with DeviceWorkers(["cpu", "cpu"]) as pool, torch.no_grad():
        coded = CodedWrapper(torch.nn.ReLU(), workers=pool, waiting=Waiting(deadline=0.1))
        pool.drain(0)
        pool.drain(1)
        with pytest.raises(DeadlineExceeded, match=r"^all devices have left; nothing arrived"):
            coded(X)
