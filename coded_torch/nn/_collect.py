"""Carries out what the policy of a call decides, and reports what came of it."""

from __future__ import annotations

import functools
import math
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

from torch import nn

from .._logging import sparing_logger
from ..scheduling.waiting import (
    Ask,
    Began,
    Decision,
    Drop,
    Ended,
    Event,
    Failure,
    History,
    Prepare,
    Settled,
    Wait,
    Waiting,
)
from ..workers import base as workers
from ._results import Results
from ._units import Units
from .report import Report

__all__ = ["Collected", "collect", "seconds_left"]

logger = sparing_logger("coded_torch.nn")


class Collected(NamedTuple):
    """How the asking and waiting of a call ended.

    Attributes:
        why: there are no more results, in words.
        parts: that were asked for.
        refused: the numbers of those that the module itself fails on.
    """

    why: str
    parts: list[workers.Part]
    refused: tuple[int, ...]


def collect(
    pool: workers.Workers,
    module: nn.Module,
    waiting: Waiting,
    history: History,
    units: Units,
    results: Results,
    report: Report,
    *,
    since: float,
) -> Collected:
    """Ask and wait until the policy ends the call.

    Args:
        pool: that computes.
        module: what it computes.
        waiting: the policy.
        history: what it has learnt of latencies.
        units: that are asked for.
        results: where replies go.
        report: where it is written how it went.
        since: when the call began, by :func:`time.perf_counter`.
    """
    parts: list[workers.Part] = []
    left = functools.partial(seconds_left, pool, waiting, since)
    with pool.open(module, units.task) as request:
        policy = waiting.decide(
            history,
            units.first,
            needed=units.needed,
            least=units.least,
            unit_rows=units.task.unit_rows,
            spare=units.spare,
            # Nothing takes time on a simulated clock but what is simulated.
            since=0.0 if pool.simulated else request.now() + since - time.perf_counter(),
            idle=lambda: request.idle,
            reserve=history.reserve(units.batch_size, left()) if units.regresses else 0.0,
        )
        asked: set[int] = set()
        try:
            ended = _follow(policy, request, units, results, parts, asked, report, history, left)
            status = request.status()
        finally:
            report.asked = tuple(sorted(asked))
            report.note(results)
            for error in results.rejected:
                logger.warning("CodedWrapper: a result was rejected: %s", error)
    report.ended, report.hedges = ended.reason, ended.hedges
    report.num_groups = units.num_groups
    report.fence, report.median, report.deadline, report.decodable = (
        None if seconds == math.inf else seconds
        for seconds in (ended.fence, ended.median, ended.deadline, ended.decodable)
    )
    if ended.reason == "deadline":
        what = "no more" if results.units else "nothing"
        late = f"{what} arrived within the deadline of {ended.deadline:g} s"
        status = f"{late}; {status}" if status else late
    return Collected(status, parts, ended.refused)


def seconds_left(pool: workers.Workers, waiting: Waiting, since: float) -> float:
    """Seconds to the deadline of a call that began then; infinite if nothing takes real time."""
    if waiting.deadline is None or pool.simulated:
        return math.inf
    return waiting.deadline - (time.perf_counter() - since)


def _follow(
    policy: Generator[Decision, Event, Ended],
    request: workers.Request,
    units: Units,
    results: Results,
    parts: list[workers.Part],
    asked: set[int],
    report: Report,
    history: History,
    left: Callable[[], float],
) -> Ended:
    """Do what the policy decides, and let it hear what comes of it, until it ends the call.

    Args:
        policy: see :mod:`coded_torch.scheduling.waiting`.
        request: to the pool.
        units, results, report: as of :func:`collect`.
        parts: where all go that are asked.
        asked: where the machines go that begin a part.
        history: of latencies.
        left: seconds to the deadline.
    """
    events: deque[Event] = deque()
    latencies: dict[int, float] = {}  # by the number of the part
    machines: dict[int, int] = {}  # likewise
    fresh: set[int] = set()  # numbers of parts whose machine has to load the module
    begun = 0  # rows

    def hear(reply: workers.Reply) -> None:
        if reply.machine >= 0:  # else none had it
            report.latencies.pop(reply.machine, None)
            if reply.part.number not in fresh:
                report.latencies[reply.machine] = reply.at
        latencies[reply.part.number] = reply.latency
        machines[reply.part.number] = reply.machine
        settled = results.add(reply)
        for part, good in settled:
            failure = Failure()
            if not good:
                failure = _failure(reply if part is reply.part else None)
            number = part.number
            latency, machine = latencies[number], machines[number]
            events.append(Settled(number, reply.at, latency, good, failure, machine))

    event: Event = None
    while True:
        try:
            decision = policy.send(event)
        except StopIteration as stop:
            ended: Ended = stop.value
            return ended
        event = None
        if isinstance(decision, Wait):
            while not events and (heard := request.wait(decision.until)) is not None:
                if isinstance(heard, workers.Began):
                    asked.add(heard.machine)
                    begun += len(heard.part.units)
                    if heard.fresh:
                        fresh.add(heard.part.number)
                    report.work = begun * units.task.unit_rows / units.batch_size
                    if decision.begins:
                        events.append(Began(heard.part.number, heard.at, heard.fresh))
                else:
                    hear(heard)
            event = events.popleft() if events else None
        elif isinstance(decision, Ask):
            first = len(parts)
            parts += [workers.Part(first + i, tuple(p)) for i, p in enumerate(decision.parts)]
            request.ask(parts[first:])
        elif isinstance(decision, Drop):
            request.drop([parts[number] for number in decision.parts])
        elif isinstance(decision, Prepare):
            with report.timed("decode"):  # now, while we would wait anyway
                units.prepare(left(), history)


def _failure(reply: workers.Reply | None) -> Failure:
    """How a part failed, by its reply; None: by what was found out later."""
    if reply is None or reply.error is None:
        return Failure() if reply is None else Failure("", reply.machine)
    error = reply.error
    cause = error.__cause__ or error
    text = "".join(traceback.format_exception_only(cause)) if error.kind == "raised" else ""
    # Places and sizes differ between the parts of one batch.
    return Failure(error.kind, error.machine, (type(cause), re.sub(r"\d+", "#", text)))
