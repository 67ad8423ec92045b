"""Requests run together as soon as a slot is free, or are refused: on a model of the test."""

import asyncio
import itertools
import threading
import time
from unittest import mock

import pytest
import torch

from coded_torch.codes import NotEnoughResults
from coded_torch.nn import Report
from coded_torch.serve._batcher import Batch, Batcher
from coded_torch.serve._protocol import RequestError
from coded_torch.workers import WorkerError


class Model:
    """Doubles its input when it may, and remembers its inputs."""

    def __init__(self):
        self.batches, self.seconds, self.parts, self.counted = [], [], [], []
        self.go = threading.Event()
        self.behave = lambda rows, report: None
        self.failed = False

    def __call__(self, inputs, seconds, parts, spares):
        (rows,) = inputs
        self.batches.append(rows[:, 0].tolist())
        self.seconds.append(seconds)
        self.parts.append(parts)
        assert self.go.wait(60)
        report = Report(ended="complete", failed=self.failed)
        self.behave(rows, report)
        lost = {*report.module_failed_rows, *(report.missing_rows if self.failed else ())}
        return Batch({"y": 2 * rows}, report, lost, slice(len(rows)))

    def batcher(self, **options):
        return Batcher(
            self,
            **{"max_batch_size": 4, "max_queued_requests": 8, "slots": lambda: (1, 1)} | options,
            on_batch=lambda report, rows, queued: self.counted.append((rows, queued)),
        )


@pytest.fixture
def model():
    """A model that waits until it may go."""
    return Model()


@pytest.fixture
def quick(model):
    """A model that answers at once."""
    model.go.set()
    return model


def put(batcher, *values, seconds=10.0, client=""):
    now = time.monotonic()
    return batcher.put([torch.tensor(values)[:, None]], now, now + seconds, client)


async def answers(*entries):
    done = await asyncio.gather(*entries, return_exceptions=True)
    return [
        x if isinstance(x, Exception) else x.outputs["y"][x.rows].flatten().tolist() for x in done
    ]


async def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def refused(batcher, seconds=10.0):
    """Return the status and the reason of a request that is refused."""
    with pytest.raises(RequestError) as caught:
        put(batcher, 0.0, seconds=seconds)
    return caught.value.status_code, caught.value.reason


async def known(batcher, model, seconds=0.0):
    """Compute as many batches as the batcher needs to know how long one takes."""
    model.behave = lambda rows, report: time.sleep(seconds)
    for _ in range(32):
        await answers(put(batcher, 0.0))
    model.behave = lambda rows, report: None


async def test_waiting_requests_run_together_in_order_as_soon_as_a_slot_is_free(model):
    batcher = model.batcher()
    sizes = (1, 1, 2, 1, 3, 1, 4)
    entries = [put(batcher, *[float(i)] * n) for i, n in enumerate(sizes)]
    await until(lambda: model.batches == [[0.0]])  # at once, without others
    assert len(batcher._queue) == 6
    model.go.set()
    assert await answers(*entries) == [[2.0 * i] * n for i, n in enumerate(sizes)]
    await batcher.close(1.0)
    assert model.batches == [[0], [1, 2, 2, 3], [4, 4, 4, 5], [6, 6, 6, 6]]
    assert [rows for rows, _ in model.counted] == [1, 4, 4, 4]
    assert all(0 <= seconds < 10 for _, queued in model.counted for seconds in queued)


async def test_rows_of_different_shapes_are_not_mixed(quick):
    batcher, now = quick.batcher(), time.monotonic()
    rows = [torch.full((1, width), float(width)) for width in (1, 2, 2, 1)]
    await answers(*[batcher.put([row], now, now + 10) for row in rows])
    assert quick.batches == [[1], [2, 2], [1]]


async def test_as_many_batches_run_at_once_as_their_parts_find_slots(model):
    batcher = model.batcher(slots=lambda: (3, 2))
    entries = [put(batcher, 0.0), put(batcher, 1.0, 1.0, 1.0), put(batcher, 2.0), put(batcher, 3.0)]
    await until(lambda: len(model.batches) == 2)
    assert sorted(model.parts) == [1, 2]
    assert len(batcher._queue) == 2
    model.go.set()
    assert await answers(*entries) == [[0.0], [2.0] * 3, [4.0], [6.0]]


async def test_a_batch_is_divided_only_while_nothing_else_waits(model):
    batcher = model.batcher(slots=lambda: (3, 3), max_batch_size=9)
    first = put(batcher, *[0.0] * 9)
    await until(lambda: model.parts == [3])  # it takes all slots
    others = [put(batcher, *[float(i)] * 4) for i in (1, 2, 3)]
    model.go.set()
    await answers(first, *others)
    assert model.parts[1:] == [1, 1, 1]


async def test_slots_are_left_for_clients_with_answers_while_these_ask(model):
    batcher = model.batcher(slots=lambda: (3, 3), max_batch_size=9)
    model.go.set()
    await answers(put(batcher, 0.0, client="known"))
    model.go.clear()
    first = put(batcher, *[1.0] * 9, client="new")
    await until(lambda: model.parts == [1, 3])  # no known client has asked again
    model.go.set()
    await answers(first)
    await answers(put(batcher, 0.0, client="known"))
    model.go.clear()
    first = put(batcher, *[2.0] * 9, client="newer")
    others = [put(batcher, 3.0, client="newest"), put(batcher, 4.0, client="known")]
    await until(lambda: len(model.parts) == 5)
    assert model.parts[3:] == [1, 1]  # of two slots, one is for the hedge of a part
    assert sorted(model.batches[3:]) == [[2.0] * 9, [4.0]]  # the newest client waits
    model.go.set()
    await answers(first, *others)
    assert model.batches[5:] == [[3.0]]


async def test_parts_of_unknown_clients_and_their_hedges_leave_a_third_of_the_slots(model):
    batcher = model.batcher(slots=lambda: (6, 1))
    model.go.set()
    await answers(put(batcher, 0.0, client="known"))
    model.go.clear()
    entries = [put(batcher, 9.0, client="known")]
    entries += [put(batcher, float(i), client=f"new {i}") for i in range(1, 5)]
    await until(lambda: len(model.batches) == 4)
    await asyncio.sleep(0.05)
    assert sorted(model.batches[1:]) == [[1.0], [2.0], [9.0]]
    model.go.set()
    assert await answers(*entries) == [[18.0], [2.0], [4.0], [6.0], [8.0]]


async def test_late_rows_take_a_third_of_the_slots_while_known_clients_ask(model):
    batcher = model.batcher(slots=lambda: (6, 1))
    model.go.set()
    await known(batcher, model)
    model.go.clear()
    entries = []
    for row in (1.0, 2.0):
        entries.append(put(batcher, row, client=f"new {row}"))
        await until(lambda: all(map(batcher._is_late, batcher._ongoing.values())))
    entries.append(put(batcher, 3.0, client="newest"))
    entries.append(put(batcher, 4.0))
    await until(lambda: [4.0] in model.batches)
    assert [3.0] not in model.batches
    model.go.set()
    assert await answers(*entries) == [[2.0], [4.0], [6.0], [8.0]]


async def test_a_worker_may_hang_while_a_batch_is_taken(quick):
    batcher = quick.batcher(slots=lambda: (6, 6))
    await answers(put(batcher, 0.0, client="known"))
    await answers(put(batcher, 0.0, client="known"))
    numbers = mock.PropertyMock(side_effect=itertools.cycle([0, 6]))
    with mock.patch.object(type(batcher.suspects), "num_stuck", numbers):
        entry = put(batcher, 1.0, 1.0, client="new")
        assert await asyncio.wait_for(answers(entry), 60) == [[2.0, 2.0]]


async def test_the_next_batch_begins_before_the_answers_of_the_last_one_are_written(model):
    batcher, waiting = model.batcher(), []
    first, second = put(batcher, 0.0), put(batcher, 1.0)
    first.add_done_callback(lambda _: waiting.append(len(batcher._queue)))
    model.go.set()
    await answers(first, second)
    assert waiting == [0]


async def test_a_batch_runs_to_the_earliest_deadline_of_its_requests(quick):
    batcher = quick.batcher()
    seconds = (10.0, 9.0, 5.0)
    await answers(*[put(batcher, 0.0, seconds=s) for s in seconds])
    ten, five = quick.seconds  # a busy machine begins late
    assert 8 < ten <= 9.99  # time to write the answers is kept
    assert 3 < five <= 4.99
    while len(quick.seconds) < 3:  # this one may expire before it begins
        await answers(put(batcher, 0.0, seconds=0.012))
    assert 0 < quick.seconds[2] <= 0.006


async def test_a_cancelled_request_is_not_computed(model):
    batcher = model.batcher()
    first, second, last = (put(batcher, float(i)) for i in range(3))
    await until(lambda: model.batches)
    second.cancel()
    await asyncio.sleep(0)
    assert len(batcher._queue) == 1
    first.cancel()  # the answer of a running request is dropped
    model.go.set()
    assert await answers(last) == [[4.0]]
    assert model.batches == [[0], [2]]


async def test_an_expired_request_does_not_shorten_the_batch_of_others(model):
    batcher = model.batcher()
    first, short, last = put(batcher, 0.0), put(batcher, 1.0, seconds=0.01), put(batcher, 2.0)
    await asyncio.sleep(0.02)
    model.go.set()
    assert await answers(first, last) == [[0.0], [4.0]]
    assert (await answers(short))[0].status_code == 503
    assert model.batches == [[0], [2]]
    assert model.seconds[1] > 9


async def test_a_full_queue_refuses_before_it_reads(model):
    batcher = model.batcher(max_queued_requests=2)
    entries = [put(batcher, 0.0), put(batcher, 1.0)]
    batcher.check(1, time.monotonic() + 10)
    entries.append(put(batcher, 2.0))
    with pytest.raises(RequestError, match="2 requests are waiting"):
        batcher.check(1, time.monotonic() + 10)
    assert refused(batcher) == (503, "queue_full")
    model.go.set()
    await answers(*entries)


async def test_requests_that_would_be_late_are_refused_when_batches_are_known(quick):
    batcher = quick.batcher(max_queued_requests=1000)
    await known(batcher, quick, 0.02)
    # An idle server tries everything.
    assert await answers(put(batcher, 1.0, seconds=0.015)) == [[2.0]]
    quick.go.clear()
    entries = [put(batcher, 0.0) for _ in range(41)]  # ten batches and more: .2 s
    assert refused(batcher, 0.1) == (503, "expected_late")
    entries.append(put(batcher, 0.0, seconds=5.0))
    quick.go.set()
    await answers(*entries)


async def test_while_workers_hang_one_request_at_a_time_is_tried(quick):
    def hang(rows, report):
        time.sleep(0.05)
        raise NotEnoughResults([], 2, 4)

    batcher = quick.batcher()
    quick.behave = hang
    assert (await answers(put(batcher, 0.0, seconds=0.05)))[0].status_code == 504
    quick.behave = lambda rows, report: None
    quick.go.clear()
    tried = put(batcher, 1.0)
    assert refused(batcher) == (503, "overdue")
    quick.go.set()
    assert await answers(tried) == [[2.0]]
    assert await answers(put(batcher, 2.0), put(batcher, 3.0)) == [[4.0], [6.0]]


async def test_a_late_batch_beside_answered_ones_is_no_hang(quick):
    def hang(rows, report):
        if 9.0 in rows:
            time.sleep(0.2)
            raise NotEnoughResults([], 2, 4)

    batcher = quick.batcher(slots=lambda: (2, 1))
    quick.behave = hang
    late = put(batcher, 9.0, seconds=0.2)
    assert await answers(put(batcher, 1.0)) == [[2.0]]
    assert (await answers(late))[0].status_code == 504
    quick.go.clear()
    tried = [put(batcher, 2.0), put(batcher, 3.0)]  # no worker is known to be idle
    quick.go.set()
    assert await answers(*tried) == [[4.0], [6.0]]


async def test_late_batches_soon_after_an_answer_are_no_hang(quick):
    def compute(rows, report):
        time.sleep(0.15)
        if 9.0 in rows:
            raise NotEnoughResults([], 2, 4)

    batcher = quick.batcher()
    quick.behave = compute
    first = put(batcher, 1.0)
    late = put(batcher, 9.0, seconds=0.25)  # it begins after the first one
    assert await answers(first) == [[2.0]]
    assert (await answers(late))[0].status_code == 504
    quick.go.clear()
    overdue = put(batcher, 9.0, seconds=0.01)
    await asyncio.sleep(0.05)
    tried = [put(batcher, 2.0), put(batcher, 3.0)]  # no worker is known to be idle
    quick.go.set()
    assert (await answers(overdue))[0].status_code == 504
    assert await answers(*tried) == [[4.0], [6.0]]


@pytest.mark.parametrize("begins", [False, True])
async def test_a_request_that_no_worker_began_at_may_be_sent_again(model, begins):
    batcher = model.batcher()
    first, waiting = put(batcher, 0.0), put(batcher, 1.0)
    await until(lambda: model.batches)
    batcher.expire([first if begins else waiting])
    if begins:
        assert first.result() is None
    else:
        error = waiting.exception()
        assert (error.status_code, error.headers) == (503, {"Retry-After": "1"})
    model.go.set()
    await batcher.close(60.0)


async def test_rows_of_calls_that_have_ended_take_slots(model):
    busy = ["busy"] * 3
    batcher = model.batcher(slots=lambda: (3, 1), states=lambda: busy)
    entries = [put(batcher, float(i)) for i in range(3)]
    await until(lambda: model.batches)
    await asyncio.sleep(0.05)
    assert model.batches == [[0]]  # an idle server tries a batch, and one only
    busy[:] = "busy", "idle", "idle"  # nothing else tells that workers are free
    await until(lambda: len(model.batches) == 3)
    model.go.set()
    assert await answers(*entries) == [[0.0], [2.0], [4.0]]


async def test_a_batch_beyond_its_deadline_is_not_waited_for(model):
    batcher = model.batcher()
    first = put(batcher, 0.0, seconds=0.01)
    put(batcher, 1.0)
    await asyncio.sleep(0.05)
    assert refused(batcher) == (503, "overdue")
    model.go.set()
    assert await answers(first) == [[0.0]]


@pytest.mark.parametrize("raises", [False, True])
async def test_a_request_that_fails_fails_alone(quick, raises):
    """Its row is refused, or all requests of the batch are tried alone."""

    def fail(rows, report):
        if 2.0 in rows:
            if raises:
                raise ValueError("bad")
            report.module_failed_rows = report.missing_rows = (rows.flatten().tolist().index(2.0),)
            report.errors = {
                report.module_failed_rows[0]: WorkerError(3, 1, "raised IndexError: 2", "raised")
            }

    batcher = quick.batcher()
    quick.behave = fail
    found = await answers(*[put(batcher, float(i)) for i in range(6)])
    assert found[:2] + found[3:] == [[0.0], [2.0], [6.0], [8.0], [10.0]]
    assert found[2].status_code == 500
    assert raises or "IndexError: 2" in found[2].detail
    alone = [[1], [2], [3], [4], [5]]
    assert quick.batches == [[0], [1, 2, 3, 4], *(alone if raises else [[5]])]


@pytest.mark.parametrize(
    ("ended", "worker", "kind", "status"),
    [("deadline", 1, "", 504), ("failed", -1, "", 503), ("failed", 1, "died", 500)],
)
async def test_rows_without_a_result_are_late_or_unavailable(quick, ended, worker, kind, status):
    def fail(rows, report):
        report.ended, report.missing_rows = ended, (0,)
        report.errors = {0: WorkerError(0, worker, "is gone", kind)}

    batcher = quick.batcher()
    quick.behave, quick.failed = fail, True
    first, second, third = await answers(*[put(batcher, float(i)) for i in range(3)])
    assert first.status_code == second.status_code == status
    assert third == [4.0]  # the only computed row


@pytest.mark.parametrize(
    ("error", "seconds", "status"),
    [
        (NotEnoughResults([0], 2, 4), 0.05, 504),
        (NotEnoughResults([0], 2, 4), 10, 500),
        (ValueError("bad"), 10, 500),
    ],
)
async def test_errors_of_a_call_become_those_of_its_requests(quick, error, seconds, status):
    def fail(rows, report):
        time.sleep(0.08)
        raise error

    batcher = quick.batcher()
    quick.behave = fail
    (found,) = await answers(put(batcher, 0.0, seconds=seconds))
    assert found.status_code == status
    quick.behave = lambda rows, report: None
    assert await answers(put(batcher, 1.0)) == [[2.0]]  # the slot is free again


@pytest.mark.parametrize(("seconds", "answered"), [(60.0, True), (0.05, False)])
async def test_closing_waits_for_accepted_requests_but_not_for_ever(model, seconds, answered):
    batcher = model.batcher()
    entries = [put(batcher, 0.0), put(batcher, 1.0)]
    if answered:
        threading.Timer(0.2, model.go.set).start()
    start = time.monotonic()
    await batcher.close(seconds)
    assert time.monotonic() - start < 20
    assert [future.done() for future in entries] == [answered] * 2
    model.go.set()


async def test_batches_that_run_at_once_share_the_rows(model):
    batcher = model.batcher(slots=lambda: (2, 1), max_batch_size=8)
    first = [put(batcher, 0.0), put(batcher, 1.0)]
    await until(lambda: len(model.batches) == 2)
    others = [put(batcher, float(i)) for i in range(2, 8)]
    model.go.set()
    await answers(*first, *others)
    assert max(map(len, model.batches)) == 4  # half of the 8 rows, not all 6 that wait


async def test_a_request_with_a_much_shorter_deadline_is_not_mixed_with_others(quick):
    batcher = quick.batcher()
    await answers(*[put(batcher, s, seconds=s) for s in (10.0, 10.0, 1.0, 10.0, 1.0)])
    assert quick.batches == [[10], [10, 10], [1, 1]]
