r"""What one call's policy decides, done; and what comes of it, reported."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from ..workers import base as workers
from ._agreement import Agreement
from ._results import Results
from ._units import Units
from .report import Report
from .waiting import Ask, Began, Decision, Drop, Ended, Event, Prepare, Settled, Wait

__all__ = ["collect"]


def collect(
    policy: Generator[Decision, Event, Ended],
    request: workers.Request,
    units: Units,
    results: Results,
    asked: set[int],
    report: Report,
    agreement: Agreement | None = None,
) -> Ended:
    """Ask and wait until the policy ends the call.

    Args:
        policy: see :mod:`coded_torch.nn.waiting`.
        request: to the pool.
        units: that are asked for.
        results: where replies go.
        asked: where the machines go that begin a part.
        report: where it is written how it went.
        agreement: what is asked whether the results can be believed, when they would complete the
            call; of those that cannot, the policy has the units asked again.
    """
    parts: list[workers.Part] = []
    events: deque[Event] = deque()
    latencies: dict[int, float] = {}  # by the number of the part
    rows = units.task.unit_rows

    def hear(event: workers.Began | workers.Reply | None) -> None:
        if isinstance(event, workers.Began):
            report.work += len(event.part.units) * rows / units.batch_size
            asked.add(event.machine)
            events.append(Began(event.part.number, event.at, event.fresh))
        elif event is not None:
            if event.machine >= 0:  # else none had it
                report.latencies.pop(event.machine, None)
                report.latencies[event.machine] = event.at
            latencies[event.part.number] = event.latency
            settled = results.add(event)
            if agreement is not None and len(results.units) >= units.needed:
                gone = agreement.check(results)
                bad = {part.number for part, _ in gone}
                settled = gone + [entry for entry in settled if entry[0].number not in bad]
            for part, good in settled:
                events.append(Settled(part.number, event.at, latencies[part.number], good))

    event: Event = None
    while True:
        try:
            decision = policy.send(event)
        except StopIteration as stop:
            ended: Ended = stop.value
            return ended
        event = None
        if isinstance(decision, Wait):
            if not events:
                hear(request.wait(decision.until))
            event = events.popleft() if events else None
        elif isinstance(decision, Ask):
            first = len(parts)
            parts += [workers.Part(first + i, tuple(p)) for i, p in enumerate(decision.parts)]
            request.ask(parts[first:])
        elif isinstance(decision, Drop):
            request.drop([parts[number] for number in decision.parts])
        elif isinstance(decision, Prepare):
            _ = units.plan  # made now, while we would wait anyway
