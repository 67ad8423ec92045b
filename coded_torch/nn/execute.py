"""Carries out the decisions of the policy on one request to a pool, and judges what arrives."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from .._logging import sparing_logger
from ..scheduling.latency_history import History
from ..scheduling.protocol import (
    Ask,
    Began,
    Decision,
    Drop,
    Ended,
    Event,
    Failure,
    Prepare,
    Settled,
    Wait,
)
from ..scheduling.waiting import Waiting
from ..workers import base as workers
from .division import Division
from .report import Report
from .result_checks import Results
from .verify import Check

__all__ = ["Executed", "execute", "seconds_left"]

logger = sparing_logger("coded_torch.nn")
_T = TypeVar("_T")


class Executed(NamedTuple):
    """How the asking and waiting of a call ended.

    Attributes:
        why: why there are no more results, in words.
        parts: all parts that were asked for.
        refused: the numbers of the parts that the module itself fails on.
        owners: int64 ``[B]``, by row the worker that computed the answer; -1 if it is in doubt.
            None if nothing was verified.
    """

    why: str
    parts: list[workers.Part]
    refused: tuple[int, ...]
    owners: Tensor | None = None


def execute(
    pool: workers.Workers,
    module: nn.Module,
    waiting: Waiting,
    history: History,
    division: Division,
    results: Results,
    report: Report,
    *,
    since: float,
    reserve: float,
    check: Check | None = None,
) -> Executed:
    """Ask and wait until the policy ends the call, and verify the results.

    Args:
        pool: computes the parts.
        module: what it computes.
        waiting: the policy.
        history: of the latencies of this module on this pool.
        division: of the batch into parts.
        results: where replies go.
        report: of the call.
        since: when the call began, by :func:`time.perf_counter`.
        reserve: seconds before the deadline that predicting takes.
        check: verifies the results; None if they are not.
    """
    with pool.open(module, division.task) as request:
        # Nothing takes time on a simulated clock but what is simulated.
        began = 0.0 if pool.simulated else request.now() + since - time.perf_counter()
        policy = waiting.decide(
            history,
            division.first if check is None else check.first(division.first, request.idle),
            needed=division.needed,
            least=division.least,
            unit_rows=division.task.unit_rows,
            spare=division.spare,
            since=began,
            idle=lambda: request.idle,
            reserve=reserve,
        )
        execution = _Execution(request, division, results, report, check)
        try:
            ended = execution.follow(policy)
            if check is not None:
                execution.verify(check, ended, began, waiting, reserve)
            why = request.status()
        finally:
            execution.note()
    report.note_end(ended)
    report.num_groups = division.num_groups
    if ended.reason == "deadline":
        what = "no more" if results.units else "nothing"
        late = f"{what} arrived within the deadline of {ended.deadline:g} s"
        why = f"{late}; {why}" if why else late
    return Executed(why, execution.parts, ended.refused, execution.owners)


def seconds_left(pool: workers.Workers, waiting: Waiting, since: float) -> float:
    """Return the seconds to the deadline; infinite if there is none, or time is simulated."""
    if waiting.deadline is None or pool.simulated:
        return math.inf
    return waiting.deadline - (time.perf_counter() - since)


class _Execution:
    """One request while its call goes on."""

    def __init__(
        self,
        request: workers.Request,
        division: Division,
        results: Results,
        report: Report,
        check: Check | None,
    ) -> None:
        self._request, self._division = request, division
        self._results, self._report = results, report
        self._check, self._checking = check, False
        self.parts: list[workers.Part] = []
        self.owners: Tensor | None = None
        self._events: deque[Event] = deque()
        self._began: set[int] = set()  # workers
        self._begun_units = 0
        self._fresh: set[int] = set()  # numbers of parts whose worker has to load the module
        self._replies: dict[int, workers.Reply] = {}  # by the number of the part

    def follow(self, policy: Generator[Decision, Event, _T]) -> _T:
        """Do what a policy decides, and let it hear what comes of it, until it ends."""
        event: Event = None
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: _T = stop.value
                return ended
            event = None
            if isinstance(decision, Wait):
                if not self._events:
                    self._listen(decision)
                event = self._events.popleft() if self._events else None
            elif isinstance(decision, Ask):
                first = len(self.parts)
                self.parts += [
                    workers.Part(first + i, tuple(units), avoid=avoid)
                    for i, (units, avoid) in enumerate(self._avoiding(decision))
                ]
                self._request.ask(self.parts[first:])
                if self._check is not None and not first:
                    self._check.prepare()
            elif isinstance(decision, Drop):
                self._request.drop([self.parts[number] for number in decision.parts])
            elif isinstance(decision, Prepare):
                with self._report.timed("decode"):  # now, while the call would wait anyway
                    self._division.plan()

    def _avoiding(self, ask: Ask) -> Iterable[tuple[Sequence[int], frozenset[int]]]:
        """Return the units of each part, and the workers that must not compute them."""
        out = self._check.avoid if self._check is not None else frozenset()
        avoid = [out | some for some in ask.avoid] or [out] * len(ask.parts)
        return zip(ask.parts, avoid, strict=True)

    def verify(
        self, check: Check, ended: Ended, began: float, waiting: Waiting, reserve: float
    ) -> None:
        """Have results verified while there is time, and let those that hold be the answers."""
        end = began + ended.deadline - reserve  # predictions may follow
        until = end if ended.reason in ("complete", "failed") else -math.inf
        soon = began + ended.hedging_threshold
        bounded = waiting.deadline is not None or ended.reason == "error"
        self._events.clear()  # the results are there
        self._checking = True
        fresh = {self._replies[n].worker for n in self._fresh if n in self._replies}
        verdict = self.follow(
            check.decisions(
                [part.units for part in self.parts],
                self._results.good,
                fresh,
                soon=soon if soon < math.inf else -math.inf,
                until=until,
                end=until if bounded else math.inf,
            )
        )
        self._results.choose(verdict.answers)
        self.owners = check.conclude(verdict, self._report)

    def _listen(self, wait: Wait) -> None:
        """Wait for something that the policy hears of, and judge together what arrives together.

        No more replies are taken than can complete the call.
        """
        request, replies, until = self._request, [], wait.until
        wanted = self._division.needed - len(self._results.units)
        while (heard := request.wait(until)) is not None:
            if isinstance(heard, workers.Began):
                self._begin(heard)
                if wait.begins:
                    self._events.append(Began(heard.part.number, heard.at, heard.fresh))
            else:
                replies.append(heard)
                wanted -= len(heard.part.units)
                if wanted <= 0:
                    break
            if replies or self._events:
                until = -math.inf  # only what has happened already
        if replies:
            self._judge(replies)

    def _begin(self, heard: workers.Began) -> None:
        self._began.add(heard.worker)
        self._begun_units += len(heard.part.units)
        if heard.fresh:
            self._fresh.add(heard.part.number)

    def _judge(self, replies: Sequence[workers.Reply]) -> None:
        latencies = self._report.latencies
        for reply in replies:
            self._replies[reply.part.number] = reply
            if reply.worker >= 0:  # else no worker had it
                latencies.pop(reply.worker, None)
                if reply.part.number not in self._fresh:
                    latencies[reply.worker] = reply.at
        for reply, settled in zip(replies, self._results.add(replies), strict=True):
            reply.value = None  # the results hold it, if it is good
            for part, good in settled:
                if good and self._checking and self._check is not None:
                    result = next(r for r in reversed(self._results.good) if r.part is part)
                    self._check.add(result)
                of = self._replies[part.number]
                failure = Failure() if good or of is not reply else _failure(reply)
                self._events.append(
                    Settled(part.number, reply.at, of.latency, good, failure, of.worker)
                )

    def note(self) -> None:
        """Report who was asked, and what became of it."""
        report, division = self._report, self._division
        report.asked = tuple(sorted(self._began))
        report.work = self._begun_units * division.task.unit_rows / division.batch_size
        report.note_results(self._results)
        for error in self._results.rejected:
            logger.warning("CodedWrapper: a result was rejected: %s", error)


def _failure(reply: workers.Reply) -> Failure:
    """Return how a part failed, by its reply."""
    error = reply.error
    if error is None:
        return Failure("", reply.worker)
    cause = error.__cause__ or error
    text = "".join(traceback.format_exception_only(cause)) if error.kind == "raised" else ""
    # Places and sizes differ between the parts of one batch.
    return Failure(error.kind, error.worker, (type(cause), re.sub(r"\d+", "#", text)))
