"""Carries out the decisions of the policy on one request to a pool, and judges the replies."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections import deque
from collections.abc import Generator, Sequence

from torch import nn

from .._arguments import sparing_logger
from ..scheduling import Ask, Began, Decision, Drop, Ended, Event, Failure, Prepare, Settled, Wait
from ..scheduling.latency_history import History
from ..scheduling.waiting import Waiting
from ..verification import Trials
from ..workers import base as workers
from .division import Division
from .report import Report
from .result_checks import Results

__all__ = ["Execution", "seconds_left"]

logger = sparing_logger("coded_torch.nn")


def seconds_left(pool: workers.Workers, waiting: Waiting, report: Report) -> float:
    """Return the seconds to the deadline; infinite if there is none, or time is simulated."""
    if waiting.deadline is None or pool.simulated:
        return math.inf
    return waiting.deadline - (time.perf_counter() - report.since)


class Execution:
    """The asking and waiting of one call, and its verification if there is a ``check``.

    Attributes:
        why: the reason why there are no more results, in words.
        parts: all parts that were asked for.
        refused: the numbers of the parts that the module itself fails on.
    """

    def __init__(
        self, division: Division, results: Results, report: Report, check: Trials | None = None
    ) -> None:
        self._division, self._results, self._report = division, results, report
        self._check = check
        self.why = ""
        self.parts: list[workers.Part] = []
        self.refused: tuple[int, ...] = ()
        self._request: workers.Request
        self._events: deque[Event] = deque()
        self._began: dict[int, workers.Began] = {}  # the last time, as a part may begin again
        self._asked: set[int] = set()  # the workers that began a part
        self._fresh: set[int] = set()  # numbers of parts whose worker has to load the module
        self._replies: dict[int, workers.Reply] = {}  # the key is the number of the part

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
            finally:
                self._note()
        if check is not None:
            division.first = check.first
            report.note_verdict(check, division.batch_size)
        report.note_end(ended)
        report.num_groups, self.refused = division.num_groups, ended.refused
        if ended.reason == "deadline":
            what = "no more" if self._results.units else "nothing"
            late = f"{what} arrived within the deadline of {ended.deadline:g} s"
            self.why = f"{late}; {self.why}" if self.why else late

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
                first = len(self.parts)
                avoid = decision.avoid or [frozenset[int]()] * len(decision.parts)
                asked = enumerate(zip(decision.parts, avoid, strict=True), first)
                self.parts += [workers.Part(i, (*units,), avoid=some) for i, (units, some) in asked]
                self._request.ask(self.parts[first:])
            elif isinstance(decision, Drop):
                self._request.drop([self.parts[number] for number in decision.parts])
            elif isinstance(decision, Prepare):
                with self._report.timed("decode"):  # now, while the call would wait anyway
                    self._division.plan()

    def _listen(self, until: float) -> bool:
        """Wait for events, and judge together the replies that arrive together.

        No more replies are taken than can complete the call. Returns whether anything was heard.
        """
        request, replies, heard = self._request, [], None
        wanted = self._division.needed - len(self._results.units)
        while (event := request.wait(until)) is not None:
            heard, until = event, -math.inf  # next, events that have happened
            part = event.part
            if isinstance(event, workers.Began):
                self._began[part.number] = event
                self._asked.add(event.worker)
                if event.fresh:
                    self._fresh.add(part.number)
                if not self._at_once:  # otherwise no part is hedged
                    self._events.append(Began(part.number, event.at, event.fresh))
            else:
                replies.append(event)
                wanted -= len(part.units)
                if wanted <= 0:
                    break
        if replies:
            self._judge(replies)
        return heard is not None

    def _judge(self, replies: Sequence[workers.Reply]) -> None:
        latencies = self._report.latencies
        for reply in replies:
            self._replies[reply.part.number] = reply
            if reply.worker >= 0:  # a worker had it
                latencies.pop(reply.worker, None)
                if reply.part.number not in self._fresh:
                    latencies[reply.worker] = reply.at
        for reply, settled in zip(replies, self._results.add(replies), strict=True):
            reply.value = None  # the results hold it, if it is good
            for part, result in settled:
                good, of = result is not None, self._replies[part.number]
                if result is not None and self._check is not None:
                    self._check.results.add(part.number, part.units, result.divided())
                failure = _NONE if good or of is not reply else _failure(reply)
                self._events.append(
                    Settled(part.number, reply.at, of.latency, good, failure, of.worker)
                )

    def _note(self) -> None:
        """Report who was asked, and which results count."""
        report, division = self._report, self._division
        report.asked = tuple(sorted(self._asked))
        units = sum(len(began.part.units) for began in self._began.values())
        report.work = units * division.task.unit_rows / division.batch_size
        report.received = tuple(sorted({result.worker for result in self._results.good}))
        rejected = self._results.rejected
        report.rejected = {error.worker: error.reason for error in rejected if error.worker >= 0}
        for error in rejected:
            logger.warning("CodedWrapper: a result was rejected: %s", error)


_NONE = Failure()


def _failure(reply: workers.Reply) -> Failure:
    """Return how a part failed, by its reply."""
    error = reply.error
    if error is None:
        return Failure()
    cause = error.__cause__ or error
    text = "".join(traceback.format_exception_only(cause)) if error.kind == "raised" else ""
    # Places and sizes differ between the parts of one batch.
    return Failure(error.kind, (type(cause), re.sub(r"\d+", "#", text)))
