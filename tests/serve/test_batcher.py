"""Which requests run together, when, and which are refused: on a model of the test."""

import asyncio
import threading
import time

import pytest
import torch

from coded_torch.codes import NotEnoughResults
from coded_torch.nn import Report
from coded_torch.serve.batcher import Batcher
from coded_torch.serve.errors import RequestError
from coded_torch.serve.model import Batch
from coded_torch.workers import WorkerError


class Model:
    """Doubles its input when it may, and remembers what it was given."""

    def __init__(self):
        self.batches, self.seconds, self.counted = [], [], []
        self.go = threading.Event()
        self.go.set()
        self.behave = lambda rows, report: None
        self.failed = False

    def __call__(self, inputs, seconds):
        (rows,) = inputs
        self.batches.append(rows[:, 0].tolist())
        self.seconds.append(seconds)
        assert self.go.wait(10)
        report = Report(ended="complete", failed=self.failed)
        self.behave(rows, report)
        lost = {*report.refused, *(report.missing_rows if self.failed else ())}
        return Batch([2 * rows], report, lost)

    def batcher(self, **options):
        return Batcher(
            self,
            **{"max_batch_size": 4, "max_queued_requests": 8, "max_ongoing_batches": 1} | options,
            on_batch=lambda report, rows, queued: self.counted.append((rows, queued)),
        )


@pytest.fixture
def model():
    return Model()


def put(batcher, *values, seconds=10.0):
    now = time.monotonic()
    return batcher.put([torch.tensor(values)[:, None]], now, now + seconds)


async def answers(*entries):
    done = await asyncio.gather(*(future for future, _ in entries), return_exceptions=True)
    return [x if isinstance(x, Exception) else x.outputs[0].flatten().tolist() for x in done]


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError


def test_what_waits_goes_together_in_order_as_soon_as_a_slot_is_free(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        entries = [put(batcher, float(i)) for i in range(7)]
        await until(lambda: model.batches == [[0.0]])  # at once, without others
        assert batcher.num_queued == 6
        model.go.set()
        assert await answers(*entries) == [[2.0 * i] for i in range(7)]
        await batcher.close(1.0)

    asyncio.run(run())
    assert model.batches == [[0.0], [1.0, 2.0, 3.0, 4.0], [5.0, 6.0]]
    assert [rows for rows, _ in model.counted] == [1, 4, 2]
    assert all(0 <= seconds < 10 for _, queued in model.counted for seconds in queued)


def test_rows_are_counted_not_requests_and_order_is_kept(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        sizes = (1, 2, 3, 1, 4)
        entries = [put(batcher, *[float(i)] * n) for i, n in enumerate(sizes)]
        await until(lambda: model.batches)
        model.go.set()
        found = await answers(*entries)
        assert found == [[2.0 * i] * n for i, n in enumerate(sizes)]

    asyncio.run(run())
    assert model.batches == [[0], [1, 1], [2, 2, 2, 3], [4, 4, 4, 4]]


def test_rows_of_different_shapes_are_not_mixed(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        now = time.monotonic()
        entries = [
            batcher.put([torch.full((1, width), float(width))], now, now + 10)
            for width in (1, 2, 2, 1)
        ]
        await until(lambda: model.batches)
        model.go.set()
        await answers(*entries)

    asyncio.run(run())
    assert model.batches == [[1], [2, 2], [1]]


def test_as_many_batches_as_slots_run_at_once(model):
    async def run():
        batcher = model.batcher(max_ongoing_batches=2, max_batch_size=1)
        model.go.clear()
        entries = [put(batcher, float(i)) for i in range(3)]
        await until(lambda: len(model.batches) == 2)
        await asyncio.sleep(0.05)
        assert len(model.batches) == 2
        model.go.set()
        await answers(*entries)

    asyncio.run(run())
    assert len(model.batches) == 3


def test_a_batch_runs_to_the_earliest_deadline_of_its_requests(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        entries = [put(batcher, 0.0), put(batcher, 1.0, seconds=9), put(batcher, 2.0, seconds=5)]
        await until(lambda: model.batches)
        model.go.set()
        await answers(*entries)

    asyncio.run(run())
    assert 9.5 < model.seconds[0] < 10
    assert 4.5 < model.seconds[1] < 5


def test_time_to_write_the_answers_is_kept(model):
    async def run():
        batcher = model.batcher()
        for seconds in (5.0, 0.1, 0.012):
            await answers(put(batcher, 0.0, seconds=seconds))

    asyncio.run(run())
    kept = [left - seconds for left, seconds in zip((5, 0.1, 0.012), model.seconds, strict=True)]
    assert kept == pytest.approx([0.01, 0.01, 0.006], abs=0.005)


def test_what_leaves_is_not_computed(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        first, (_, leave), last = (put(batcher, float(i)) for i in range(3))
        await until(lambda: model.batches)
        leave()
        assert batcher.num_queued == 1
        first[1]()  # it runs already: its answer is dropped
        model.go.set()
        assert await answers(last) == [[4.0]]
        leave()  # twice is fine

    asyncio.run(run())
    assert model.batches == [[0], [2]]


def test_what_has_no_time_left_does_not_spoil_the_batch_of_others(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        first, short, last = put(batcher, 0.0), put(batcher, 1.0, seconds=0.05), put(batcher, 2.0)
        await asyncio.sleep(0.1)
        model.go.set()
        assert await answers(first, last) == [[0.0], [4.0]]
        assert not short[0].done()  # its handler knows

    asyncio.run(run())
    assert model.batches == [[0], [2]]
    assert model.seconds[1] > 9


def test_a_full_queue_refuses_before_it_reads(model):
    async def run():
        batcher = model.batcher(max_queued_requests=2)
        model.go.clear()
        entries = [put(batcher, 0.0), put(batcher, 1.0)]
        with batcher.reading(time.monotonic() + 10):
            with pytest.raises(RequestError) as caught, batcher.reading(time.monotonic() + 10):
                raise AssertionError
            assert (caught.value.status, caught.value.reason) == (503, "queue_full")
        with batcher.reading(time.monotonic() + 10):
            pass
        model.go.set()
        await answers(*entries)

    asyncio.run(run())


def test_what_would_be_late_is_refused_when_batches_are_known(model):
    def slow(rows, report):
        time.sleep(0.02)

    async def run():
        batcher = model.batcher(max_queued_requests=1000)
        model.behave = slow
        for _ in range(32):
            await answers(put(batcher, 0.0))
        model.go.clear()
        entries = [put(batcher, 0.0) for _ in range(41)]  # ten batches and more: .2 s
        with pytest.raises(RequestError) as caught:
            put(batcher, 0.0, seconds=0.1)
        assert (caught.value.status, caught.value.reason) == (503, "expected_late")
        put(batcher, 0.0, seconds=5.0)
        model.go.set()
        await answers(*entries)

    asyncio.run(run())


def test_batches_that_were_slow_are_not_held_against_an_idle_server(model):
    def slow(rows, report):
        time.sleep(0.05)

    async def run():
        batcher = model.batcher()
        model.behave = slow
        for _ in range(32):
            await answers(put(batcher, 0.0))
        model.behave = lambda rows, report: None
        with batcher.reading(time.monotonic() + 0.04):
            entry = put(batcher, 1.0, seconds=0.04)
        assert await answers(entry) == [[2.0]]

    asyncio.run(run())


def test_while_workers_hang_one_request_at_a_time_is_tried(model):
    def hang(rows, report):
        time.sleep(0.05)
        raise NotEnoughResults([], 2, 4)

    def refused(batcher):
        with pytest.raises(RequestError) as caught, batcher.reading(time.monotonic() + 10):
            raise AssertionError
        return caught.value.status, caught.value.reason

    async def run():
        batcher = model.batcher()
        model.behave = hang
        assert (await answers(put(batcher, 0.0, seconds=0.05)))[0].status == 504
        model.behave = lambda rows, report: None
        model.go.clear()
        tried = put(batcher, 1.0)
        assert refused(batcher) == (503, "overdue")
        model.go.set()
        assert await answers(tried) == [[2.0]]
        assert await answers(put(batcher, 2.0), put(batcher, 3.0)) == [[4.0], [6.0]]

    asyncio.run(run())


def test_a_batch_beyond_its_deadline_is_not_waited_for(model):
    async def run():
        batcher = model.batcher()
        model.go.clear()
        first = put(batcher, 0.0, seconds=0.01)
        put(batcher, 1.0)
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError) as caught:
            put(batcher, 2.0)
        assert (caught.value.status, caught.value.reason) == (503, "overdue")
        model.go.set()
        assert await answers(first) == [[0.0]]

    asyncio.run(run())


def test_what_has_expired_joins_no_batch(model):
    async def run():
        batcher = model.batcher()
        for _ in range(32):
            await answers(put(batcher, 0.0))
        model.go.clear()
        entries = [put(batcher, 0.0), put(batcher, 1.0)]
        put(batcher, 2.0, seconds=0.001)
        await asyncio.sleep(0.01)
        model.go.set()
        await answers(*entries)
        assert model.batches[-1] == [1.0]
        assert model.seconds[-1] > 5

    asyncio.run(run())


def test_a_request_that_fails_fails_alone(model):
    def fail(rows, report):
        if 2.0 in rows:
            report.refused = report.missing_rows = (rows.flatten().tolist().index(2.0),)
            report.errors = {report.refused[0]: WorkerError(3, 1, "raised IndexError: 2", "raised")}

    async def run():
        batcher = model.batcher()
        model.behave = fail
        model.go.clear()
        entries = [put(batcher, float(i)) for i in range(5)]
        await until(lambda: model.batches)
        model.go.set()
        found = await answers(*entries)
        assert found[:2] + found[3:] == [[0.0], [2.0], [6.0], [8.0]]
        assert found[2].status == 500
        assert "IndexError: 2" in found[2].message

    asyncio.run(run())
    assert model.batches == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("ended", "machine", "kind", "status"),
    [("deadline", 1, "", 504), ("failed", -1, "", 503), ("failed", 1, "died", 503)],
)
def test_rows_without_a_result_are_late_or_unavailable(model, ended, machine, kind, status):
    def fail(rows, report):
        report.ended, report.missing_rows = ended, (0,)
        report.errors = {0: WorkerError(0, machine, "is gone", kind)}

    async def run():
        batcher = model.batcher()
        model.behave = fail
        model.failed = True
        model.go.clear()
        entries = [put(batcher, float(i)) for i in range(3)]
        await until(lambda: model.batches)
        model.go.set()
        return await answers(*entries)

    first, second, third = asyncio.run(run())
    assert first.status == second.status == status
    assert third == [4.0]  # it was computed


@pytest.mark.parametrize(
    ("error", "seconds", "status"),
    [
        (NotEnoughResults([0], 2, 4), 0.05, 504),
        (NotEnoughResults([0], 2, 4), 10, 500),
        (ValueError("bad"), 10, 500),
    ],
)
def test_errors_of_a_call_become_those_of_its_requests(model, error, seconds, status, caplog):
    def fail(rows, report):
        time.sleep(0.08)
        raise error

    async def run():
        batcher = model.batcher()
        model.behave = fail
        (found,) = await answers(put(batcher, 0.0, seconds=seconds))
        assert found.status == status
        model.behave = lambda rows, report: None
        assert await answers(put(batcher, 1.0)) == [[2.0]]  # the slot is free again

    asyncio.run(run())


def test_closing_waits_for_what_was_accepted_but_not_for_ever(model):
    async def run(seconds):
        batcher = model.batcher()
        entries = [put(batcher, 0.0), put(batcher, 1.0)]
        start = time.monotonic()
        await batcher.close(seconds)
        return [future.done() for future, _ in entries], time.monotonic() - start

    assert asyncio.run(run(5.0))[0] == [True, True]
    model.go.clear()
    threading.Timer(0.5, model.go.set).start()
    done, took = asyncio.run(run(0.1))
    assert done == [False, False]
    assert took < 0.4
