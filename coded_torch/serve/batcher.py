"""Requests together: what waits goes as soon as a slot is free, in order of arrival."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .._logging import sparing_logger
from ..codes import DeadlineExceeded, NotEnoughResults
from ..nn import Report
from ..scheduling.waiting import History
from .errors import RequestError

__all__ = ["Answer", "Batcher"]

logger = sparing_logger("coded_torch.serve")

_BATCHES = 64  # whose durations are remembered: some seconds of a busy server
_TO_ANSWER = 0.01  # seconds that are kept before the deadline, to write the answers


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        outputs: its rows of every output.
        report: of the call that computed them, with others.
    """

    outputs: list[Tensor]
    report: Report


@dataclasses.dataclass(eq=False)
class _Entry:
    inputs: list[Tensor]
    rows: int
    arrived: float
    deadline: float
    future: asyncio.Future[Answer]

    def joins(self, other: _Entry) -> bool:
        """Whether the rows of both have one shape."""
        pairs = zip(self.inputs, other.inputs, strict=True)
        return all(mine.shape[1:] == theirs.shape[1:] for mine, theirs in pairs)


class Batcher:
    """A queue with a bound, and slots in which batches run.

    When a slot is free, what waits goes, in order of arrival, as many rows as a batch may have;
    there is no timer. A batch runs to the earliest deadline of its requests. All times are those
    of :func:`time.monotonic`. Used by the thread of one event loop.

    Args:
        call: computes a batch: given the inputs and the seconds that there are, it returns outputs
            ``[B, ...]`` and a report. It is called in threads of the batcher's own.
        max_batch_size: rows.
        max_queued_requests: that may wait, those included that are being read.
        max_ongoing_batches: slots.
        on_batch: called with the report of every batch, its rows, and the seconds that each of its
            requests was queued.
    """

    def __init__(
        self,
        call: Callable[[list[Tensor], float], tuple[list[Tensor], Report]],
        *,
        max_batch_size: int,
        max_queued_requests: int,
        max_ongoing_batches: int,
        on_batch: Callable[[Report, int, Sequence[float]], None],
    ) -> None:
        self._call, self._on_batch = call, on_batch
        self._max_rows, self._max_queued = max_batch_size, max_queued_requests
        self._max_ongoing = max_ongoing_batches
        self._queue: dict[_Entry, None] = {}  # in order of arrival
        self._reading = 0
        self._history = History(_BATCHES)
        self._hung = False  # whether the last batch had its usual time, and too few results
        # Begin, rows and deadline of each.
        self._ongoing: dict[asyncio.Task[None], tuple[float, int, float]] = {}
        self._threads = ThreadPoolExecutor(max_ongoing_batches, "coded_torch batch")

    @property
    def num_queued(self) -> int:
        """Requests that wait, those included that are being read."""
        return self._reading + len(self._queue)

    @contextlib.contextmanager
    def reading(self, deadline: float) -> Iterator[None]:
        """Hold a place in the queue for a request while it is read.

        Raises:
            RequestError: there is none, or, unless the server is idle, even one row would probably
                be late, or the batches before it are overdue (503).
        """
        if self.num_queued >= self._max_queued:
            raise RequestError(
                503, "queue_full", f"{self._max_queued} requests are waiting, the most that may"
            )
        self._check(1, deadline)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def put(
        self, inputs: list[Tensor], arrived: float, deadline: float
    ) -> tuple[asyncio.Future[Answer], Callable[[], None]]:
        """Queue a request.

        Returns:
            What becomes of it, and a function by which it leaves the queue if it still waits.

        Raises:
            RequestError: the server is not idle, and it would probably be answered too late (503).
        """
        rows = len(inputs[0])
        self._check(rows, deadline)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        entry = _Entry(inputs, rows, arrived, deadline, future)
        self._queue[entry] = None
        self._fill()

        def leave() -> None:
            future.cancel()
            self._queue.pop(entry, None)

        return future, leave

    async def close(self, seconds: float) -> None:
        """Let what was accepted be answered, but not for longer than that."""
        until = time.monotonic() + seconds
        while self._ongoing and (left := until - time.monotonic()) > 0:
            await asyncio.wait(self._ongoing, timeout=left)
        self._threads.shutdown(wait=False)

    def _check(self, rows: int, deadline: float) -> None:
        # An idle server takes anything: only a batch can show that workers are fast again.
        if not (self._ongoing or self._queue):
            return
        now = time.monotonic()
        late = now + self._expected(rows, now) - deadline
        if self._hung or late == math.inf:
            raise RequestError(503, "overdue", "workers hang: no batch was answered lately")
        if late > 0:
            raise RequestError(
                503,
                "expected_late",
                f"the answer would probably come {late * 1e3:.0f} ms after the deadline",
            )

    def _expected(self, rows: int, now: float) -> float:
        """Seconds until so many more rows are probably answered."""
        batches, rest = divmod(sum(entry.rows for entry in self._queue) + rows, self._max_rows)
        seconds = batches * self._usual(self._max_rows) + (rest and self._usual(rest))
        if len(self._ongoing) < self._max_ongoing:
            return seconds / self._max_ongoing
        until_free = min(self._left(now, *batch) for batch in self._ongoing.values())
        return until_free + seconds / self._max_ongoing

    def _left(self, now: float, begin: float, rows: int, deadline: float) -> float:
        """Seconds until a batch has probably ended; infinite if its deadline has passed."""
        if now > deadline + _TO_ANSWER:
            return math.inf
        return max(0.0, begin + self._usual(rows) - now)

    def _usual(self, rows: int) -> float:
        """The median of batches of so many rows, in seconds; 0 until enough are known."""
        # The median, and no more for more rows than were seen: what is refused by a higher estimate
        # is refused too early.
        seconds = self._history.part(min(rows, self._history.most_rows))
        return seconds if seconds < math.inf else 0.0

    def _fill(self) -> None:
        """Give what waits to slots that are free."""
        while len(self._ongoing) < self._max_ongoing and (batch := self._take()):
            task = asyncio.get_running_loop().create_task(self._run(batch))
            rows, until = sum(entry.rows for entry in batch), min(e.deadline for e in batch)
            self._ongoing[task] = time.monotonic(), rows, until
            task.add_done_callback(self._free)

    def _free(self, task: asyncio.Task[None]) -> None:
        begin, rows, _ = self._ongoing.pop(task)
        # From slot to slot: the loop's own delays count, as the next batch has to bear them.
        self._history.add([(rows, time.monotonic() - begin)], None)
        if not task.cancelled():
            self._fill()
            task.result()  # raises in the loop what no request has heard of

    def _take(self) -> list[_Entry]:
        """The next batch; requests whose time is over have left it to their clients' handlers."""
        batch: list[_Entry] = []
        rows = 0
        while self._queue:
            entry = next(iter(self._queue))
            hopeless = entry.deadline - time.monotonic() <= 0.5 * self._usual(entry.rows)
            if hopeless and (batch or self._ongoing or len(self._queue) > 1):
                del self._queue[entry]  # it would end the batch before anything is there
                continue
            if rows + entry.rows > self._max_rows or (batch and not entry.joins(batch[0])):
                break
            rows += entry.rows
            del self._queue[entry]
            batch.append(entry)
        return batch

    async def _run(self, batch: list[_Entry]) -> None:
        begin = time.monotonic()
        rows = sum(entry.rows for entry in batch)
        left = min(entry.deadline for entry in batch) - begin
        left = max(left - _TO_ANSWER, left / 2, 1e-3)
        columns = zip(*(entry.inputs for entry in batch), strict=True)
        inputs = [column[0] if len(column) == 1 else torch.cat(column) for column in columns]
        loop = asyncio.get_running_loop()
        error: RequestError | None = None
        try:
            outputs, report = await loop.run_in_executor(self._threads, self._call, inputs, left)
        except NotEnoughResults as cause:
            error = RequestError(504, "late", f"too few results within the deadline: {cause}")
            if not isinstance(cause, DeadlineExceeded) and time.monotonic() < begin + left:
                error = RequestError(500, "failed", f"the model failed: {cause}")
        except Exception as cause:  # whatever the model raises: its requests get an answer
            logger.exception("a batch failed")
            error = RequestError(500, "failed", f"the model failed: {type(cause).__name__}")
        else:
            late = not outputs and report.ended == "deadline"
            if outputs:
                self._on_batch(report, rows, [begin - entry.arrived for entry in batch])
            if len(report.refused) == rows > len(batch[0].inputs[0]):  # all parts raised alike
                error = _refusal(report, 0)
        if error is not None:
            late = error.status == 504
        if not late:
            self._hung = False
        elif left >= self._usual(rows):  # 0 while it is not known, as workers that hang never tell
            self._hung = True
        if error is None:
            self._settle(batch, outputs, report)
        elif late or len(batch) == 1:
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
        else:  # it fails for one of them, perhaps, and is answered for the others
            for entry in batch:
                if not entry.future.done() and entry.deadline > time.monotonic():
                    await self._run([entry])

    def _settle(self, batch: list[_Entry], outputs: list[Tensor], report: Report) -> None:
        start = 0
        # Rows that had time, and no result, or that had none when too few came to predict.
        lost = set(report.refused)
        if report.failed or report.ended == "failed":
            lost |= set(report.missing_rows)
        for entry in batch:
            rows = slice(start, start + entry.rows)
            start = rows.stop
            if entry.future.done():
                continue
            mine = lost.intersection(range(rows.start, rows.stop))
            if mine:
                entry.future.set_exception(_refusal(report, min(mine)))
            else:
                entry.future.set_result(Answer([output[rows] for output in outputs], report))


def _refusal(report: Report, row: int) -> RequestError:
    """What a request hears of which a row has no answer."""
    error = report.errors.get(row)
    if row in report.refused:
        return RequestError(500, "failed", f"the model failed: {error}")
    if report.ended == "deadline":
        return RequestError(504, "late", f"too few results within the deadline: {error or 'none'}")
    if error is None or error.machine < 0 or error.kind == "died":
        return RequestError(503, "unavailable", f"no worker computed it: {error or 'none is up'}")
    return RequestError(500, "failed", f"the model failed: {error}")
