"""Carries out a policy's decisions on one request to a pool, and names missing results."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Generator, Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import sparing_logger
from ..codes.plans import DeadlineExceeded, NotEnoughResults
from ..scheduling import Ask, Began, Decision, Drop, Ended, Event, Failure, Prepare, Settled, Wait
from ..scheduling.latency_history import History
from ..scheduling.waiting import Waiting
from ..verification import Trials
from ..workers import base as workers
from .division import Division
from .report import Report
from .result_checks import Results

logger = sparing_logger("coded_torch.nn")
_NOBODY = frozenset[int]()
_SHOWN = 8  # rows in a message
_NOTE = "raised by the module on"


def seconds_left(pool: workers.Workers, waiting: Waiting, report: Report) -> float:
    """Return the seconds to the deadline; infinite if there is none, or time is simulated."""
    if waiting.deadline is None or pool.simulated:
        return math.inf
    return waiting.deadline - (time.perf_counter() - report.since)


class Execution:
    """The asking and waiting of one call, and its verification if there is a ``check``."""

    def __init__(
        self, division: Division, results: Results, report: Report, check: Trials | None = None
    ) -> None:
        self._division, self._results, self._report = division, results, report
        self._check = check
        self.why = ""  #: the reason why there are no more results, in words
        self._parts: list[workers.Part] = []  # all that were asked for
        self._refused: tuple[int, ...] = ()  # parts that the module itself fails on
        self._request: workers.Request
        self._events: deque[Event] = deque()
        self._began: dict[int, workers.Began] = {}  # the last time, as a part may begin again
        self._asked: set[int] = set()  # the workers that began a part
        self._replied: set[int] = set()  # the parts whose reply came; a second one does not count
        self._failed = defaultdict[int, frozenset[int]](frozenset)  # the workers, by unit

    def run(
        self, pool: workers.Workers, module: nn.Module, waiting: Waiting, history: History
    ) -> None:
        """Ask and wait until the policy ends the call, and verify the results."""
        division, check, report = self._division, self._check, self._report
        self._at_once = waiting.at_once
        with pool.open(module, division.task) as request:
            self._request = request
            # On a simulated clock, only the simulation takes time.
            began = 0.0 if pool.simulated else request.now() + report.since - time.perf_counter()
            policy = (waiting if check is None else check).decide(
                history,
                division.first,
                needed=division.needed,
                least=division.least,
                unit_rows=division.task.unit_rows,
                spare=division.spare,
                since=began,
                idle=lambda: request.idle,
                reserve=division.reserve,
            )
            try:
                ended = self._follow(policy)
                if check is not None:
                    self._results.choose(check.answers)
                self.why = request.status()
                if self.why and pool.num_ready == pool.num_restarts == 0:
                    first = "workers are still starting; call pool.start(model, example) first"
                    self.why = f"{first}; {self.why}"
            finally:
                self._note()
        if check is not None:
            division.first = check.first
            report.note_verdict(check, division.batch_size)
        report.note_end(ended)
        report.num_groups, self._refused = division.num_groups, ended.refused
        if ended.reason == "deadline":
            what = "no more" if self._results.units else "nothing"
            late = f"{what} arrived within the deadline of {ended.deadline:g} s"
            self.why = f"{self.why}; {late}" if self.why else late

    def _follow(self, policy: Generator[Decision, Event, Ended]) -> Ended:
        """Carry out the decisions of a policy, and send it the events, until it ends."""
        event: Event = None
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: Ended = stop.value
                return ended
            event = None
            if isinstance(decision, Wait):
                while not self._events and self._listen(decision.until):
                    pass  # the policy needs no event that was heard
                event = self._events.popleft() if self._events else None
            elif isinstance(decision, Ask):
                first = len(self._parts)
                asked = itertools.zip_longest(decision.parts, decision.avoid, fillvalue=_NOBODY)
                for number, (units, avoid) in enumerate(asked, first):
                    failed = [self._failed.get(unit, _NOBODY) for unit in units if self._failed]
                    tried = frozenset[int].intersection(*failed) if failed else _NOBODY
                    self._parts.append(workers.Part(number, (*units,), avoid=avoid, tried=tried))
                self._request.ask(self._parts[first:])
            elif isinstance(decision, Drop):
                self._request.drop([self._parts[number] for number in decision.parts])
            elif isinstance(decision, Prepare):
                with self._report.timed("decode"):  # now, while the call would wait anyway
                    _ = self._division.plan

    def _listen(self, until: float) -> bool:
        """Wait for events, and judge together the replies that arrive together.

        No more replies are taken than can complete the call. Returns whether anything was heard.
        """
        replies, latencies, heard = list[workers.Reply](), self._report.latencies, False
        wanted = self._division.needed - len(self._results.units)
        while (event := self._request.wait(until)) is not None:
            heard, until = True, -math.inf  # next, events that have happened
            if isinstance(event, workers.Began):
                self._began[event.part.number] = event
                self._asked.add(event.worker)
                if not self._at_once:  # otherwise no part is hedged
                    self._events.append(Began(event.part.number, event.at, event.fresh))
            elif event.part.number not in self._replied:
                self._replied.add(event.part.number)
                replies.append(event)
                wanted -= len(event.part.units)
                if wanted <= 0:
                    break
        for reply in replies:
            if self._check is not None:  # a faulty worker may still write to memory that it shares
                reply.value = pytree.tree_map_only(Tensor, Tensor.clone, reply.value)
            if reply.worker >= 0:  # a worker had it
                latencies.pop(reply.worker, None)
                began = self._began.get(reply.part.number)
                if began is None or not began.fresh:
                    latencies[reply.worker] = reply.at
        for reply, settled in zip(replies, self._results.add(replies), strict=True):
            reply.value = None  # the results hold it, if it is good
            for of, result in settled:
                part, good = of.part, result is not None
                if not good and (of.error is None or of.error.kind == "raised"):
                    for unit in part.units:
                        self._failed[unit] |= {of.worker}
                if result is not None and self._check is not None:
                    rows = [result.rows(i) for i in result.divided]
                    self._check.results.add(part.number, part.units, rows)
                failure = _failure(reply) if of is reply else Failure()
                end = Settled(part.number, reply.at, of.latency, good, failure, of.worker)
                self._events.append(end)
        return heard

    def _note(self) -> None:
        """Report who was asked, and which results count."""
        report, division = self._report, self._division
        report.asked = tuple(sorted(self._asked))
        report.versions = dict(self._request.versions)
        units = sum(len(began.part.units) for began in self._began.values())
        report.work = units * division.task.unit_rows / division.batch_size
        report.received = tuple(sorted({result.worker for result in self._results.good}))
        rejected = self._results.rejected
        report.rejected = {error.worker: error.reason for error in rejected if error.worker >= 0}
        for error in rejected:
            logger.warning("CodedWrapper: a result was rejected: %s", error)

    # Missing results.

    def error(self, waiting: Waiting) -> Exception | None:
        """Return the exception if some rows may not, or cannot, be estimated, and report these."""
        division, results, report = self._division, self._results, self._report
        errors = {error.part: error for error in results.rejected}
        blamed = [errors[number] for number in self._refused if number in errors]
        if division.by_rows:
            good, last = results.units, dict[int, workers.WorkerError]()
            for number, failed in errors.items():
                last |= dict.fromkeys(self._parts[number].units, failed)
            refused = {unit for number in self._refused for unit in self._parts[number].units}
            report.missing_rows = tuple(sorted(set(range(division.batch_size)) - good))
            report.errors = {row: last[row] for row in report.missing_rows if row in last}
            report.refused = tuple(sorted(refused - good))
        required = waiting.least(division.needed, division.least, division.by_rows)
        if report.ended == "failed" and waiting.estimate and not division.by_rows:
            required = division.least  # no more could come
        why, error = self.why, results.misfit
        enough = len(results.units) >= required
        if blamed and (waiting.on_error == "raise" or not enough):
            required, why = division.needed, ""
            first = min(blamed, key=lambda error: self._parts[error.part].units)
            error = _of_module(first, report.refused)
        elif enough and error is None:
            required = division.needed
            if not (why := self._why_not_estimated()):
                return None
        return self.holding(error or self._too_few(required, why))

    def not_floating(self) -> str:
        """Return which output cannot be estimated, and a remedy; "" if there is none such."""
        for result in self._results.good[:1]:
            for i in result.divided:
                if not (leaf := result.leaves[i]).is_floating_point():
                    remedy = "take Waiting(estimate=False), or return logits instead"
                    return f"{result.name(i)} is {leaf.dtype} and cannot be estimated; {remedy}"
        return ""

    def _why_not_estimated(self) -> str:
        """Return why rows without a result cannot be estimated; "" if they can, or all have one."""
        division, why = self._division, self.not_floating()
        received, odd = sorted(self._results.units), division.not_finite
        if odd is not None and bool(odd[received].all()):
            why = "no row with finite inputs has a result, which estimates need"
        if not why or division.is_whole(received):
            return ""
        return why if division.by_rows or bool((division.plan.source(received) < 0).any()) else ""

    def _too_few(self, required: int, why: str) -> NotEnoughResults:
        division, results, report = self._division, self._results, self._report
        rejected = results.rejected
        reasons = [str(rejected[0]).partition("\n")[0]] if rejected else []
        if division.by_rows:
            causes = defaultdict[str, list[int]](list)
            for row in report.missing_rows:
                cause = str(report.errors.get(row, "")).partition("\n")[0] or "no reply"
                causes[cause].append(row)
            reasons = [f"{_shown(rows)}: {cause}" for cause, rows in causes.items()]
        kind = DeadlineExceeded if report.ended == "deadline" else NotEnoughResults
        reason = "; ".join(filter(None, [why, *reasons]))
        error = kind([*results.units], required, division.task.num_units, reason)
        error.__cause__ = next(iter([*report.errors.values(), *rejected]), None)
        return error

    def holding(self, error: Exception) -> Exception:
        """Return the exception with the report and the rows that were computed, NaN elsewhere."""
        division, answers = self._division, None
        try:
            error.report = self._report  # type: ignore[attr-defined]
            given_up = self._report.missing_rows if self._report.ended == "failed" else ()
            error.rows = self._report.refused or given_up  # type: ignore[attr-defined]
            if division.by_rows and self._results.units:
                stacked, wholes = self._results.stack(), dict[int, Tensor]()
                for i in stacked.divided:
                    leaf: Tensor = stacked.leaves[i]
                    shape = division.batch_size, *leaf.shape[2:]
                    fill = math.nan if leaf.is_floating_point() else 0
                    wholes[i] = stacked.over(i, leaf.new_full(shape, fill))
                answers = stacked.tree(wholes)
            error.answers = answers  # type: ignore[attr-defined]
        except Exception:  # a class may refuse attributes, and memory may run out
            logger.warning("CodedWrapper: %r does not hold its answers", error, exc_info=True)
        return error


def _failure(reply: workers.Reply) -> Failure:
    """Return how a part failed, by its reply."""
    error = reply.error
    if error is None:
        return Failure()
    cause = error.__cause__ or error
    # Places, sizes and addresses differ between the parts of one batch.
    text = "".join(traceback.format_exception_only(cause)) if error.kind == "raised" else ""
    return Failure(error.kind, (type(cause), re.sub(r"\w*\d\w*", "#", text)))


def _of_module(first: workers.WorkerError, refused: Sequence[int]) -> Exception | None:
    """Return the exception of the module; None if it raised none."""
    cause = first.__cause__
    if first.kind != "raised" or not isinstance(cause, Exception):
        return None
    if isinstance(cause, StopIteration):  # futures cannot hold it (PEP 479)
        cause, stopped = RuntimeError(f"the module raised {cause!r}"), cause
        cause.__cause__ = stopped
    notes = [f"{_NOTE} {_shown(refused)} of the batch; {first}"] if refused else []
    with contextlib.suppress(Exception):  # a class may have slots
        # Python 3.10 has no add_note. The module may raise one exception again and again.
        old = [note for note in getattr(cause, "__notes__", ()) if not note.startswith(_NOTE)]
        cause.__notes__ = [*old, *notes]
    return cause


def _shown(rows: Sequence[int]) -> str:
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}{more}"
