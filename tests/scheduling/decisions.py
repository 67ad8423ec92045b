"""A driver of policies, whose events are written down, and what a policy decided."""

from typing import NamedTuple

from coded_torch.scheduling.latency_history import History
from coded_torch.table import DISPUTED, Table
from coded_torch.workers import Began, Reply, WorkerError


class Ask(NamedTuple):
    parts: tuple


class Drop(NamedTuple):
    parts: tuple


class Prepare(NamedTuple):
    """Estimates are prepared."""


class Begin(NamedTuple):
    """A worker begins the part of this number."""

    part: int
    at: float
    fresh: bool = False


class Settled(NamedTuple):
    """The part of this number ends; a second end takes a good result back."""

    part: int
    at: float
    latency: float
    ok: bool
    kind: str = ""
    worker: int = -1


class Ended(NamedTuple):
    reason: str
    hedges: tuple = ()
    hedging_threshold: float = float("inf")
    deadline: float = float("inf")
    refused: tuple = ()


def hear(table, event, until):
    """Let an event happen, or nothing until a time."""
    if event is None:
        table.hear([], until)
        return
    part = table.parts[event.part]
    if isinstance(event, Begin):
        table.hear([Began(part, event.part, event.at, event.fresh)])
    elif part.ended < float("inf"):
        table.mark(part, DISPUTED)
    else:
        worker = part.worker if event.worker < 0 else event.worker
        error = None if event.ok else WorkerError(event.part, worker, "wrong", event.kind)
        table.hear([Reply(part, worker, event.at, event.latency, error=error)])


def taken(table, asked):
    """What has been decided since so many parts were asked for."""
    decisions = []
    if table.unwanted:
        decisions.append(Drop(tuple(part.number for part in table.unwanted)))
        table.unwanted.clear()
    if asked < len(table.parts):
        decisions.append(Ask(tuple(part.units for part in table.parts[asked:])))
    if table.prepares:
        decisions.append(Prepare())
        table.prepares = False
    return decisions


def ended(table):
    """The end of a call."""
    refused = {p.number for unit, p in table.refused.items() if unit not in table.answered}
    threshold = table.hedging_threshold
    return Ended(table.reason, table.hedges, threshold, table.deadline, (*sorted(refused),))


def drive(waiting, events, first=((0, 1), (2, 3), (4, 5), (6, 7)), needed=8, history=None, **kw):
    """Let events happen, one after each decision; the decisions, the times waited for, the end.

    ``events`` may be a function of the units of all parts.
    """
    table, decisions, waits, asked = Table(first=first, needed=needed, **kw), [], [], 0
    history, given = history or History(), iter(() if callable(events) else events)
    for _ in range(100_000):
        until = waiting.decide(history, table)
        parts = [part.units for part in table.parts]
        if not table.reason:  # deciding twice adds nothing
            assert waiting.decide(history, table) == until
        assert [part.units for part in table.parts] == parts
        decisions += taken(table, asked)
        asked = len(parts)
        if table.reason:
            assert not list(given)
            return decisions, waits, ended(table)
        waits.append(until)
        try:
            event = events(parts) if callable(events) else next(given)
        except StopIteration:
            return decisions, waits, None
        hear(table, event, until)
    raise AssertionError("the call does not end")
