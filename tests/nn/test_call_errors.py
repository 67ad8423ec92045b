"""Whose fault failures are: the module's, on some row, or that of workers."""

import math
import time

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import DeadlineExceeded, LagrangeCode, NotEnoughResults
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, ProcessWorkers

from ..workers.modules import FailsOn, Heavy, Sleepy
from .pools import Separate

X = torch.arange(64.0).view(64, 1)
BAD = 17  # the row that the module fails on
MOST = 2 * math.ceil(math.log2(11)) + 2  # parts, beyond the first six of 11 rows at most


def wrapper(pool, how="raise", **waiting):
    waiting = Waiting(**{"hedge_budget": 0} | waiting)  # only what fails is asked again
    return CodedWrapper(FailsOn(BAD, how), parts=6, workers=pool, waiting=waiting)


@pytest.fixture(scope="module")
def pool():
    with ProcessWorkers(6).start() as pool, torch.no_grad():
        yield pool


def check_innocent(error, rows=(BAD,)):
    """All rows but these were computed."""
    assert error.report.missing_rows == error.report.refused == rows
    assert error.answers[list(rows)].isnan().all()
    kept = [row for row in range(64) if row not in rows]
    assert torch.equal(error.answers[kept], 2 * X[kept])


def test_a_row_that_the_module_raises_on_is_named(pool):
    coded = wrapper(pool)
    with pytest.raises(ValueError, match="17 is not to be had, in 1 rows") as info:
        coded(X)
    assert info.value.rows == (BAD,)
    assert "raised by the module on row 17 of the batch" in info.value.__notes__[-1]
    check_innocent(info.value)
    assert coded.last_run is info.value.report
    assert coded.last_run.ended == "error"
    assert len(coded.last_run.hedges) <= MOST


def test_the_row_is_estimated_if_that_is_asked_for(pool):
    answers, report = wrapper(pool, on_error="estimate").run(X)
    assert report.estimated.nonzero().flatten().tolist() == [BAD]
    assert report.refused == (BAD,)
    assert torch.equal(answers[~report.estimated], 2 * X[~report.estimated])
    assert isinstance(report.errors[BAD].__cause__, ValueError)


def test_a_row_that_ends_its_worker_costs_five_at_most(pool):
    for _ in range(3):
        pids = set(pool.pids)
        coded = wrapper(pool, "segfault")
        with pytest.raises(NotEnoughResults, match=r"row 17: .*SIGSEGV") as info:
            coded(X)
        assert info.value.rows == (BAD,)
        check_innocent(info.value)
        pool.start()
        assert 2 <= len(pids - set(pool.pids)) <= 5


@pytest.mark.parametrize("estimate", [True, False])
def test_the_error_names_what_nobody_could_compute_and_why(estimate):
    coded = wrapper(Separate(), estimate=estimate)
    coded.module = nn.Threshold(40.0, math.nan)  # of rows 0 to 40
    with pytest.raises(
        NotEnoughResults, match=r"^rows? .*row 40: worker \d+ ret.*64 of 64"
    ) as info:
        coded(X)
    assert info.value.report.missing_rows == info.value.rows == tuple(range(41))
    assert info.value.report.refused == ()
    assert torch.equal(info.value.answers[41:], X[41:])
    with pytest.raises(ValueError, match="estimate must be True with a code that mixes"):
        CodedWrapper(nn.Identity(), LagrangeCode(4, 6), waiting=Waiting(estimate=False))


def late(coded, deadline, x=X, why=""):
    """Seconds after the deadline at which a call raises."""
    start = time.perf_counter()
    with pytest.raises(DeadlineExceeded, match=why or None) as info:
        coded(x)
    assert len(info.value.received) < 32
    return time.perf_counter() - start - deadline


def test_a_deadline_holds_while_workers_start_and_load_and_hang():
    with ProcessWorkers(2, grace=600) as pool, torch.no_grad():
        heavy = wrapper(pool, deadline=0.1)
        heavy.module = Heavy()
        first = r"^workers are still starting; call pool.start\(model, example\) first; 2 of 2"
        assert -0.01 < late(heavy, 0.1, why=first) < 0.5
        pool.start()
        heavy.module = Heavy()
        assert -0.01 < late(heavy, 0.1) < 0.5  # they load
        hanging = wrapper(pool, deadline=0.1, estimate=False)
        hanging.module = Sleepy()
        for _ in range(3):
            assert -0.01 < late(hanging, 0.1, torch.full((64, 1), 100.0)) < 0.5


def test_a_memory_answers_with_less_than_half(pool):
    memory = Memory()
    coded = wrapper(pool, deadline=5.0)
    coded.surrogate = memory
    coded(X[:BAD])
    assert coded.last_run.ended == "complete"
    memory.rebuild()
    coded.workers = FaultyWorkers(pool, rates={"nan": 1.0})
    answers, report = coded.run(X[:BAD])
    assert report.estimated.all()
    assert "answered alone" in report.notes[-1]
    torch.testing.assert_close(answers, 2 * X[:BAD], atol=1.0, rtol=0)
