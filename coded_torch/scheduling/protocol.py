"""Decisions of a policy, and events that are sent to it; ``waiting.py`` describes the protocol.

A unit is a row of the batch, or a column of a code. A part is a tuple of units.
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
    """Prepare predictions: a part is late, and half of the time to the end is over."""


class Wait(NamedTuple):
    """Wait for an event until a time."""

    until: float


class Began(NamedTuple):
    """A worker has begun a part; ``fresh`` if the worker has not run this module before."""

    part: int
    at: float
    fresh: bool = False


class Failure(NamedTuple):
    """The failure of a part.

    Attributes:
        kind: "raised" if the module raised, "died" if the worker ended, "" for anything else.
        cause: the same for the same exceptions, except for the numbers in their messages.
    """

    kind: str = ""
    cause: Hashable = None


class Settled(NamedTuple):
    """A part has ended ``latency`` seconds after it began, with a good result or a failure.

    A second event for the same part, not ``ok``, takes back a result that turned out to be unlike
    most others. The worker is -1 if no worker had the part.
    """

    part: int
    at: float
    latency: float
    ok: bool
    failure: Failure = Failure()
    worker: int = -1


class Hedge(NamedTuple):
    """A part that stands in for a late or failed part.

    Attributes:
        part: the number of this part.
        of: the number of the part that it stands in for.
        units: the units of this part.
        at: seconds from the call to the ask.
        won: whether this part was the first to answer any of its units.
    """

    part: int
    of: int
    units: tuple[int, ...]
    at: float
    won: bool


class Ended(NamedTuple):
    """The end of a call.

    Attributes:
        reason: one of the reasons that :attr:`coded_torch.Report.ended` lists.
        hedges: the parts that stood in for others.
        hedging_threshold: seconds after which the largest part is late; infinite while unknown.
        deadline: seconds from the call to its answer at the latest; infinite without one.
        refused: the numbers of the parts that the module itself fails on.
    """

    reason: str
    hedges: tuple[Hedge, ...] = ()
    hedging_threshold: float = math.inf
    deadline: float = math.inf
    refused: tuple[int, ...] = ()


Decision: TypeAlias = Ask | Drop | Prepare | Wait
Event: TypeAlias = Began | Settled | None
