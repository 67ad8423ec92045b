"""The queue of requests: while a slot is free, waiting requests run, in order of arrival."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _tracing
from .._arguments import sparing_logger
from .._torch import device_of, unflatten
from ..codes import DeadlineExceeded, NotEnoughResults
from ..nn import CodedWrapper, Report, Waiting
from ..open_inference import FORMER, EndpointError, RefusedError, TensorSpec, cleaned, flatten
from ..scheduling._latency_history import History
from ._protocol import RequestError
from ._suspects import Suspects

logger = sparing_logger("coded_torch.serve")

# The number of batches whose durations are remembered: some seconds of a busy server, so that the
# estimate follows the load. It was not tuned.
_BATCHES = 64
# Seconds before the deadline that are kept to write the answers, and after it in which they may
# still be written. It trades estimated rows against late answers and was not tuned.
TO_ANSWER = 0.01
# A batch takes unusually long after so many of its usual times, and seconds. It trades the waiting
# of equal rows against workers that hang, and was not tuned.
_LATE = 4.0
_SOONEST = 0.005
# One of so many workers is left for known clients, for so many seconds after a request of one. It
# trades requests of others against workers that hang, and was not tuned.
_SHARE = 3
_LEFT_SECONDS = 60.0
# In which a worker that was ended for a known client probably has a successor; not tuned.
_SUCCESSOR_SECONDS = 0.5
_MOST_BATCHES = 1024  # threads, each of which runs a batch; a bound, not tuned


# The columns of a report by the former names of outputs.
_COLUMNS = {spec.name: name for name, spec in FORMER.items()}


class Batch(NamedTuple):
    """The answers of a batch, or of one of its requests."""

    outputs: dict[str, Any]  #: the model's, ``[B, ...]`` each, by name; may be empty
    report: Report
    unanswered: set[int]  #: the rows without an answer
    rows: slice  #: of the batch, the rows of the request
    estimated: Sequence[bool] = ()  #: by row of the batch; may be empty if none is
    version: str = "1"  #: of the model

    def output(self, spec: TensorSpec, coverage: float) -> Any:
        """Return an output of the request; error bounds at a level, unless it is 0."""
        values = self.outputs.get(spec.name)
        if values is not None:
            return values[self.rows]
        name = _COLUMNS.get(spec.name, spec.name)
        return self.report.rows(name, coverage=coverage)[name][self.rows].to(spec.dtype)


def compute(
    coded: CodedWrapper,
    specs: Sequence[TensorSpec],
    form: pytree.TreeSpec,
    inputs: list[Any],
    seconds: float,
    parts: int | None,
    spares: int = 1,
) -> Batch:
    """Compute a batch. After ``seconds``, missing rows are estimated.

    ``form`` is the structure of ``(args, kwargs)``, and ``spares`` the field of :class:`Waiting`.
    """
    if coded.code is not None or not coded.workers.num_workers:
        parts = None  # there are no idle workers to divide it over
    chosen = coded.waiting or (Waiting.first() if coded.code else Waiting())
    # Other rows are estimated even if the module fails on one, which is refused alone.
    waiting = dataclasses.replace(
        chosen, deadline=seconds, on_error="estimate", spares=max(spares, chosen.spares)
    )
    if coded.workers.simulated:  # other pools move their inputs
        device = device_of(coded.module)
        inputs = [x.to(device or x.device) if isinstance(x, Tensor) else x for x in inputs]
    try:
        args, kwargs = unflatten(inputs, form)
        with torch.no_grad():
            answers, report = coded.run(*args, **kwargs, waiting=waiting, parts=parts)
    except Exception as error:
        partial = getattr(error, "report", None)
        if not isinstance(partial, Report) or not partial.missing_rows:
            raise
        answers = getattr(error, "answers", None)
        report = partial
    unanswered = set[int]()
    if chosen.on_error != "estimate":
        unanswered.update(report.module_failed_rows)
    if report.failed or report.ended == "failed":
        unanswered.update(report.module_failed_rows, report.missing_rows)
    rows = slice(inputs[0].shape[0])
    if answers is None:
        return Batch({}, report, unanswered, rows)
    leaves, _ = flatten(answers)
    got = [(leaf.dtype, [*leaf.shape]) for leaf in leaves if hasattr(leaf, "dtype")]
    is_fit = len(got) == len(leaves) == len(specs) and all(
        dtype is spec.dtype and shape[:1] == [rows.stop] and (spec.is_text or spec.fits(shape[1:]))
        for spec, (dtype, shape) in zip(specs, got, strict=True)
    )
    if not is_fit:
        expected = [(spec.dtype, [rows.stop, *spec.shape]) for spec in specs]
        raise TypeError(f"the model must return tensors {expected}, got {got}")
    named = {spec.name: leaf for spec, leaf in zip(specs, leaves, strict=True)}
    sources = list[int]()
    if report.source is not None:
        sources = report.source.tolist()
    if 2 not in sources:
        return Batch(named, report, unanswered, rows)
    flags = [source == 2 for source in sources]
    _ = report.estimated, report.error_bounds, report.label_p_values  # not in the event loop
    return Batch(named, report, unanswered, rows, flags)


@dataclasses.dataclass(eq=False)
class _Running:
    """A batch that runs. Times are seconds of :func:`time.monotonic`."""

    entries: list[_Entry]
    begin: float
    rows: int
    parts: int
    deadline: float

    @property
    def is_known(self) -> bool:
        """Whether its clients were known when it was taken."""
        return self.entries[0].is_known

    @property
    def longest(self) -> int:
        """The rows of its largest part."""
        return -(-self.rows // self.parts)


class _Entry:
    """A request in the queue. Times are seconds of :func:`time.monotonic`."""

    def __init__(
        self, inputs: list[Any], arrived: float, deadline: float, client: str = ""
    ) -> None:
        self.inputs = inputs
        self.client = client
        self.arrived = arrived
        self.deadline = deadline
        self.rows = inputs[0].shape[0]
        self.trace = _tracing.here()
        self.shapes: list[Any] = [x.shape[1:] for x in inputs]
        self.digests = list[bytes]()  # of the rows, once they are needed
        self.is_known = False  # whether its client is, when its batch is taken
        self.future: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()

    def fits(self, other: _Entry) -> bool:
        """Return whether one batch may hold both requests.

        The batch ends at the earlier deadline. Its clients must all be known, or all unknown.
        """
        seconds = self.deadline - self.arrived
        others = other.deadline - other.arrived
        is_similar = seconds <= 2 * others and others <= 2 * seconds
        return self.shapes == other.shapes and self.is_known is other.is_known and is_similar


class Batcher:
    """A bounded queue, and slots in which batches run, until the earliest deadline of a request.

    A batch takes one slot, and an equal share of the rows. If nothing else waits, it is divided
    over the free slots. ``compute`` computes a batch in a thread, given its inputs, the seconds
    that are left, the number of its parts, and the most rows of a part whose hedge leaves a worker
    idle. ``slots`` returns the number of slots, and the most parts of a batch. ``on_batch`` gets
    each batch, its rows, and the seconds that its requests waited. ``states`` returns the state of
    each known worker, "idle", "busy" or other. ``end`` ends the worker at a place of the pool, and
    has another one started; without it, no worker is ended.

    A third of the slots is left for known clients while these ask: for those that have got an
    answer, and of whose rows none has hung or ended a worker. Once late rows of others take a
    third, too, these others wait. So they may send any rows. If known clients wait all the same,
    and none is answered, a worker is ended that is at a row for which no request waits.
    """

    def __init__(
        self,
        compute: Callable[[list[Any], float, int, int], Batch],
        *,
        max_batch_size: int,
        max_queued_requests: int,
        slots: Callable[[], tuple[int, int]],
        on_batch: Callable[[Batch, int, Sequence[float]], None],
        states: Callable[[], Sequence[str]] = tuple,
        end: Callable[[int], None] | None = None,
    ) -> None:
        self._compute = compute
        self._on_batch = on_batch
        self._states = states
        self._end = end
        self._ended = -math.inf  # when a worker was ended for a known client
        self._max_rows = max_batch_size
        self.max_queued = max_queued_requests
        self._slots = slots
        self._queue: dict[_Entry, None] = {}  # the first to arrive is first
        self._rows = 0  # the rows of the queue
        self._history = History(_BATCHES)
        # True if a batch was late, though it had its usual time, and none was answered meanwhile.
        self._hung = False
        self._answered = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._ongoing: dict[asyncio.Task[None], _Running] = {}
        self._threads = ThreadPoolExecutor(_MOST_BATCHES, "coded_torch batch")
        self._known_asked = -math.inf  # when a known client did
        #: Rows that hang or end workers, and known clients.
        self.suspects = Suspects()

    @property
    def _num_free(self) -> int:
        """The number of free slots; at least one if nothing runs."""
        slots = self._slots()[0]
        # Workers that are still at rows of calls that have ended are busy, too.
        used = sum(batch.parts for batch in self._ongoing.values()) + self.suspects.num_held
        if used < slots:
            used = max(used, self._states().count("busy"))
        return max(slots - used, int(not self._ongoing))

    @property
    def _share(self) -> int:
        """The number of slots that are left for known clients; 0 if none is.

        It is also the number of workers that rows of all other clients may hang.
        """
        slots = self._slots()[0]
        if slots == 1 or time.monotonic() > self._known_asked + _LEFT_SECONDS:
            return 0
        return max(1, slots // _SHARE)

    def _left_unknown(self, free: int) -> int:
        """Return how many of the free slots may go to clients who are not known."""
        share = self._share
        if not share:
            return free
        fresh = 0
        stuck = self.suspects.num_stuck
        for batch in self._ongoing.values():
            if self._is_late(batch) and not batch.is_known:
                stuck += 2 * batch.parts  # with their hedges
            elif not batch.is_known:
                fresh += batch.parts
        if stuck >= share:
            return 0
        rest = self._slots()[0] - share - stuck
        return min(free, (rest + 1) // 2 - fresh)  # as each part may be hedged

    def check(
        self, rows: int, deadline: float, *, is_read: bool = False, is_known: bool = False
    ) -> None:
        """Refuse (503) a request if the queue is full, or its answer would probably be late.

        If workers hang, a request is refused only after it was read, because a wrong one must get
        400. A known client's request waits for the successor of a worker that is ended for it.
        """
        if len(self._queue) >= self.max_queued:
            raise RequestError(503, "queue_full", f"{self.max_queued} requests are waiting")
        # An idle server takes anything: only a batch can show that workers are fast again.
        if not (self._ongoing or self._queue):
            return
        now = time.monotonic()
        late = now + self._expected(rows, now) - deadline
        # Wide batches may all be late for a moment, while workers answer smaller ones.
        is_answered = now - self._answered < (deadline - now) / 2
        may_hang = is_read and not is_answered and (self._hung or late == math.inf)
        states = self._states() if may_hang else ()
        is_refused = may_hang and (late == math.inf or "idle" not in states)
        if is_refused and not (is_known and "idle" not in states and self._end_stuck()):
            ended = states.count("busy") - len(self._ongoing)
            why = "no worker is idle, and no batch was answered since one got no result in time"
            if ended > 0:
                why += f"; {ended} or more workers are at rows of requests that have ended"
            raise RequestError(503, "overdue", why)
        if 0 < late < math.inf:
            when = f"{late * 1e3:.0f} ms after the deadline"
            raise RequestError(503, "expected_late", f"the answer would probably come {when}")

    def put(
        self, inputs: list[Any], arrived: float, deadline: float, client: str = ""
    ) -> asyncio.Future[Batch]:
        """Queue a request, or refuse it (503). It leaves the queue once its future is done."""
        is_known = self.suspects.knows(client)
        self.check(inputs[0].shape[0], deadline, is_read=True, is_known=is_known)
        entry = _Entry(inputs, arrived, deadline, client)
        if is_known:
            self._known_asked = time.monotonic()
        self._queue[entry] = None
        self._rows += entry.rows
        entry.future.add_done_callback(lambda _: self._remove(entry))
        self._fill()
        return entry.future

    def expire(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        """End requests at their deadline: by a 503 if no worker began at it, else by None."""
        waiting = {id(entry.future) for entry in self._queue}
        for future in futures:
            if future.done():
                continue
            if id(future) in waiting:
                future.set_exception(_never_begun())
            else:
                future.set_result(None)

    def _remove(self, entry: _Entry) -> None:
        if entry in self._queue:
            del self._queue[entry]
            self._rows -= entry.rows

    async def close(self, seconds: float) -> None:
        """Answer every accepted request, but do not wait longer than ``seconds``."""
        until = time.monotonic() + seconds
        left = seconds
        while self._ongoing and left > 0:
            await asyncio.wait(self._ongoing, timeout=left)
            left = until - time.monotonic()
        self._threads.shutdown(wait=False)

    def _expected(self, rows: int, now: float) -> float:
        """Return the seconds until ``rows`` more rows are probably answered."""
        batches, rest = divmod(self._rows + rows, self._max_rows)
        seconds = (batches and batches * self._usual(self._max_rows)) + (rest and self._usual(rest))
        seconds /= self._slots()[0]
        if self._num_free:
            return seconds
        # A batch beyond its deadline never ends, as far as anyone knows.
        return seconds + min(
            math.inf
            if now > batch.deadline + TO_ANSWER
            else max(0.0, batch.begin + self._usual(batch.longest) - now)
            for batch in self._ongoing.values()
        )

    def _usual(self, rows: int) -> float:
        """Return the median duration of a part in seconds; 0 until 32 batches are known."""
        # A higher quantile, or an extrapolation to more rows, refused requests without need.
        seconds = self._history.part(min(rows, self._history.most_rows))
        return seconds if seconds < math.inf else 0.0

    def _fill(self) -> None:
        """Let waiting requests run while a slot is free."""
        if self.suspects.num_held and self._known_lack_workers():
            self._end_stuck()
        while self._queue:
            free = self._num_free
            if not free:
                break
            left_unknown = self._left_unknown(free)
            batch = self._take(left_unknown)
            if not batch:
                break
            rows = sum(entry.rows for entry in batch)
            until = min(entry.deadline for entry in batch)
            if not batch[0].is_known:
                free = left_unknown
            parts = 1 if self._queue else min(free, rows, self._slots()[1])
            running = _Running(batch, time.monotonic(), rows, parts, until)
            task = asyncio.get_running_loop().create_task(self._run(running))
            self._ongoing[task] = running
        if self._timer:
            self._timer.cancel()
        is_held = self.suspects.num_held and any(x.is_known for x in self._ongoing.values())
        # Nothing tells when rows of calls that have ended are computed, or a batch becomes late.
        if self._queue or is_held:
            self._timer = asyncio.get_running_loop().call_later(TO_ANSWER, self._fill)

    def _known_lack_workers(self) -> bool:
        """Return whether rows of known clients wait unusually long for workers."""
        num_idle = self._states().count("idle")
        if num_idle > 1:  # one stays idle while a late row is computed twice
            return False
        if any(batch.is_known and self._is_late(batch) for batch in self._ongoing.values()):
            return True
        return num_idle == 0 and any(
            self.suspects.knows(entry.client)
            and self._is_overdue(max(entry.arrived, self._answered), entry.deadline, entry.rows)
            for entry in self._queue  # which may be long while batches are answered
        )

    def _end_stuck(self) -> bool:
        """End a worker at rows for which no request waits; return whether one has been ended."""
        if self._end is None:
            return False
        now = time.monotonic()
        if now < self._ended + _SUCCESSOR_SECONDS:
            return True
        held = self.suspects.held
        if held:
            self._ended = now
            why = "worker %d is ended for a known client, as no request waits for its rows"
            logger.warning(why, held[0])
            self._end(held[0])
        return bool(held)

    def _digests(self, entry: _Entry) -> list[bytes]:
        if not entry.digests:
            digest = self.suspects.digest
            entry.digests = [digest(entry.inputs, row) for row in range(entry.rows)]
        return entry.digests

    def _is_late(self, batch: _Running) -> bool:
        """Return whether a batch takes unusually long."""
        return self._is_overdue(batch.begin, batch.deadline, batch.longest)

    def _is_overdue(self, begin: float, deadline: float, rows: int) -> bool:
        """Return whether a part of so many rows that began at a time takes unusually long."""
        usual = self._usual(rows) * _LATE or (deadline - begin) / 2
        return time.monotonic() - begin > max(usual, _SOONEST)

    def _waiting_rows(self) -> set[bytes]:
        """Return digests of the rows that must wait, because a late batch has equal rows.

        A row that has hung or ended a worker is also in one batch at a time.
        """
        waiting = set[bytes]()
        for batch in self._ongoing.values():
            is_late = self._is_late(batch)
            if not (is_late or self.suspects):
                continue
            digests = {digest for entry in batch.entries for digest in self._digests(entry)}
            waiting |= digests if is_late else digests & self.suspects.rows
        return waiting

    def _take(self, left_unknown: int) -> list[_Entry]:
        """Take the next batch. Requests with at most half their usual time get a 503.

        Rows of batches that take unusually long wait, so that they do not hang all workers.
        """
        slots = self._slots()[0]
        waiting = self._waiting_rows()
        suspects = self.suspects
        batch = list[_Entry]()
        rows = 0
        # All slots share the rows: one batch of all leaves workers idle.
        every = self._rows + sum(running.rows for running in self._ongoing.values())
        most = min(self._max_rows, -(-every // slots))
        for entry in list(self._queue):
            hopeless = entry.deadline - time.monotonic() <= 0.5 * self._usual(entry.rows)
            if entry.future.done():
                continue
            if hopeless and (batch or self._ongoing or len(self._queue) > 1):
                # This deadline would end the batch before any result.
                self._remove(entry)
                entry.future.set_exception(_never_begun())
                continue
            entry.is_known = suspects.knows(entry.client)
            must_wait = left_unknown <= 0 and not entry.is_known
            error = None
            if suspects:
                error = suspects.refusal(self._digests(entry))
            if error is None and must_wait and suspects.num_stuck >= self._share:
                why = "rows of clients without an answer hang all workers that these may have"
                error = RequestError(503, "unavailable", why)
            if error is not None:
                entry.future.set_exception(error)
                continue
            if must_wait or (waiting and not waiting.isdisjoint(self._digests(entry))):
                continue
            if batch and not batch[0].fits(entry):
                continue  # the next batch takes it
            if batch and rows + entry.rows > most:
                break
            rows += entry.rows
            self._remove(entry)
            batch.append(entry)
        return batch

    def _compute_and_note(self, inputs: list[Any], seconds: float, running: _Running) -> Batch:
        """Compute a batch in a thread, and note its rows that hang or end workers."""
        spares = 1 if running.is_known else running.rows
        done = self._compute(inputs, seconds, running.parts, spares)
        clients = [entry.client for entry in running.entries for _ in range(entry.rows)]
        computed = {*range(running.rows)} - done.unanswered
        computed.difference_update(itertools.compress(range(running.rows), done.estimated))
        if not done.outputs:
            computed.clear()
        self.suspects.note(inputs, clients, done.report._unfinished, computed)
        return done

    async def _run(self, running: _Running) -> None:
        batch = running.entries
        begin = running.begin
        rows = running.rows
        queued = [begin - entry.arrived for entry in batch]
        left = running.deadline - begin
        left = max(left - TO_ANSWER, left / 2, 1e-3)
        columns = zip(*(entry.inputs for entry in batch), strict=True)
        inputs = [column[0] if len(column) == 1 else _joined(column) for column in columns]
        loop = asyncio.get_running_loop()
        done = None
        error = None
        try:
            run = _tracing.within([entry.trace for entry in batch], self._compute_and_note)
            done = await loop.run_in_executor(self._threads, run, inputs, left, running)
        except Exception as cause:  # any error of the model: its requests get an answer
            error = _error(cause, in_time=time.monotonic() < begin + left)
            late = error.status_code == 504
        else:
            late = not done.outputs and done.report.ended == "deadline"
            num_failed = len(done.report.module_failed_rows)
            if num_failed == rows > batch[0].rows:  # all parts raised alike
                error = _refusal(done.report, 0)
        finally:
            # From slot to slot: the delays of the loop count, as the next batch suffers them too.
            self._history.add([(running.longest, time.monotonic() - begin)], None)
            del self._ongoing[cast("asyncio.Task[None]", asyncio.current_task())]
        if not late:
            self._hung = False
            self._answered = time.monotonic()
        elif left >= self._usual(running.longest) and self._answered < begin:
            self._hung = True
        if error is not None and not late and len(batch) > 1:  # one may be to blame
            batch = [entry for entry in batch if not entry.future.done()]
            for entry in batch:
                entry.shapes = [entry]  # fits no other
                self._rows += entry.rows
            self._queue = dict.fromkeys([*batch, *self._queue])
            batch = []
        self._fill()  # before the answers, which take the loop some time
        end = 0
        for entry in batch:
            mine = slice(end, end + entry.rows)
            end = mine.stop
            if entry.future.done():
                continue
            if error is not None or done is None:
                entry.future.set_exception(cast("RequestError", error))
            elif unanswered := done.unanswered.intersection(range(mine.start, end)):
                entry.future.set_exception(_refusal(done.report, min(unanswered)))
            else:
                entry.future.set_result(done._replace(rows=mine))
        if done is not None and done.outputs:
            self._on_batch(done, rows, queued)


def _never_begun() -> RequestError:
    why = "no worker was free before the deadline"
    return RequestError(503, "overdue", why)


def _joined(column: Sequence[Any]) -> Any:
    """Return the rows of several requests."""
    is_tensor = isinstance(column[0], Tensor)
    return torch.cat([*column]) if is_tensor else np.concatenate(column)


def _error(cause: Exception, in_time: bool) -> RequestError:
    """Return the error of all requests of a batch whose call raised."""
    if isinstance(cause, RefusedError):
        return RequestError(400, "invalid", str(cause))
    if not isinstance(cause, NotEnoughResults):
        logger.error("a batch failed", exc_info=cause)
        return RequestError(500, "failed", f"the model failed: {type(cause).__name__}")
    why = cleaned(str(cause))
    if in_time and not isinstance(cause, DeadlineExceeded):
        return RequestError(500, "failed", f"the model failed: {why}")
    return RequestError(504, "late", f"too few results within the deadline: {why}")


def _refusal(report: Report, row: int) -> RequestError:
    """Return the error of a request one of whose rows has no answer."""
    error = report.errors.get(row)
    why = str(error or "no worker replied with these rows")
    cause = error and error.__cause__
    if error and isinstance(cause, EndpointError):  # no address, and no text of that server
        why = f"worker {error.worker} {str(cause).partition(':')[0]}"
    why = cleaned(re.sub(r" \(https?://\S+\)", "", why))
    if row in report.module_failed_rows:
        if isinstance(cause, RefusedError):
            return RequestError(400, "invalid", str(cause))
    elif report.ended == "deadline" and not isinstance(cause, EndpointError):
        return RequestError(504, "late", f"too few results within the deadline: {why}")
    elif error is None or error.worker < 0 or isinstance(cause, EndpointError):
        return RequestError(503, "unavailable", f"no worker computed it: {why}")
    return RequestError(500, "failed", f"the model failed: {why}")
