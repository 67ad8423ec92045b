"""Decisions of a policy that asks for parts, hedges late ones and ends a call, and its events.

A unit is a row of the batch, or a column of a code. A part is a tuple of units. A policy does no
waiting itself: ``Waiting.decide`` is a generator of decisions that is sent events, by this
protocol::

    policy = waiting.decide(history, first, needed=len(rows), idle=lambda: request.idle)
    event = None
    while True:
        try:
            decision = policy.send(event)
        except StopIteration as stop:
            return stop.value           # Ended
        event = None
        match decision:
            case Ask(parts): ...        # each part is a tuple of units
            case Drop(parts): ...       # numbers of parts that need not begin any more
            case Prepare(): ...         # missing rows may have to be estimated
            case Wait(until): event = ...  # Began, Settled, or None at the time `until`

Parts are numbered 0, 1, 2, ... in the order in which they are asked. All times are seconds on one
clock. A driver answers ``Wait(math.inf)`` with None if nothing can come any more, and may close the
generator at any time. Only a call that has :class:`Ended` changes the history of latencies.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

__all__ = ["Ask", "Began", "Decision", "Drop", "Ended", "Event", "Failure", "Hedge", "Prepare"]
__all__ += ["Settled", "Wait"]


class Ask(NamedTuple):
    """Ask workers for parts, each of a worker that the part does not ``avoid``."""

    parts: tuple[tuple[int, ...], ...]
    avoid: tuple[frozenset[int], ...] = ()


class Drop(NamedTuple):
    """Keep parts, by number, from beginning: other parts have answered their units."""

    parts: tuple[int, ...]


class Prepare(NamedTuple):
    """Prepare estimates: a part is late, and half of the time to the end is over."""


class Wait(NamedTuple):
    """Wait for an event until a time."""

    until: float


class Began(NamedTuple):
    """A worker has begun a part; ``fresh`` if the worker has not run this module before."""

    part: int
    at: float
    fresh: bool = False


class Failure(NamedTuple):
    """The failure of a part."""

    kind: str = ""  #: "raised" if the module raised, "died" if the worker ended, "" for others
    cause: Hashable = None  #: the same for exceptions that differ only in the numbers they mention


class Settled(NamedTuple):
    """A part has ended ``latency`` seconds after it began, with a good result or a failure.

    A second event, not ``ok``, takes back a result that turned out to be unlike most others. The
    worker is -1 if no worker had the part.
    """

    part: int
    at: float
    latency: float
    ok: bool
    failure: Failure = Failure()
    worker: int = -1


class Hedge(NamedTuple):
    """A part that stands in for a late or failed part."""

    part: int  #: the number of this part
    of: int  #: the number of the part that it stands in for
    units: tuple[int, ...]  #: the units of this part
    at: float  #: seconds from the call to the ask
    won: bool  #: true if this part was the first to answer any of its units


class Ended(NamedTuple):
    """The end of a call."""

    reason: str  #: one of the reasons that :attr:`coded_torch.Report.ended` lists
    hedges: tuple[Hedge, ...] = ()
    #: Seconds after which the largest part is late; infinite while unknown.
    hedging_threshold: float = math.inf
    deadline: float = math.inf  #: seconds from the call to its answer; infinite without a deadline
    refused: tuple[int, ...] = ()  #: the numbers of the parts that the module itself fails on


Decision: TypeAlias = Ask | Drop | Prepare | Wait
Event: TypeAlias = Began | Settled | None
