"""The decisions of a policy and the events that it is sent; ``waiting.py`` has the protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

__all__ = ["Ask", "Began", "Decision", "Drop", "Ended", "Event", "Failure", "Hedge", "Prepare"]
__all__ += ["Settled", "Wait"]


class Ask(NamedTuple):
    """Have parts computed, each a tuple of units, but not by workers that they ``avoid``."""

    parts: tuple[tuple[int, ...], ...]
    avoid: tuple[frozenset[int], ...] = ()


class Drop(NamedTuple):
    """Let parts, by number, not begin any more: other parts have answered their units."""

    parts: tuple[int, ...]


class Prepare(NamedTuple):
    """Prepare predictions: a part is late and half of the time is over."""


class Wait(NamedTuple):
    """Wait for an event until a time. The policy needs a :class:`Began` only if ``begins``."""

    until: float
    begins: bool = True


class Began(NamedTuple):
    """A worker has begun a part; ``fresh`` if the worker has not run this module before."""

    part: int
    at: float
    fresh: bool = False


class Failure(NamedTuple):
    """How a part failed.

    Attributes:
        kind: "raised" if the module raised, "died" if the worker ended, "" for anything else.
        worker: the worker, -1 if no worker had the part.
        what: equal for equal exceptions, numbers in their messages aside.
    """

    kind: str = ""
    worker: int = -1
    what: Hashable = None


class Settled(NamedTuple):
    """A part has ended ``latency`` seconds after it began, with a good result or a failure.

    A second event for the same part, not ``ok``, takes back a result that turned out to be unlike
    most others.
    """

    part: int
    at: float
    latency: float
    ok: bool
    failure: Failure = Failure()
    worker: int = -1


class Hedge(NamedTuple):
    """A part that stands in for one that was late or failed.

    Attributes:
        part: the number of this part.
        of: the number of the part that it stands in for.
        units: the units that it is asked for.
        at: seconds from the call to the ask.
        won: whether any of its units were answered by it first.
    """

    part: int
    of: int
    units: tuple[int, ...]
    at: float
    won: bool


Decision: TypeAlias = Ask | Drop | Prepare | Wait
Event: TypeAlias = Began | Settled | None


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a call ended.

    Attributes:
        reason: as in :attr:`coded_torch.Report.ended`.
        hedges: the parts that stood in for others.
        hedging_threshold: seconds after which the largest part counts as late; infinite while too
            few latencies are known.
        median: of whole calls like this one, in seconds; infinite while unknown.
        deadline: seconds from the call to its answer at the latest; infinite without one.
        decodable: seconds from the call until the rest could be predicted; infinite if never.
        refused: the numbers of the parts that the module itself fails on.
    """

    reason: str
    hedges: tuple[Hedge, ...] = ()
    hedging_threshold: float = math.inf
    median: float = math.inf
    deadline: float = math.inf
    decodable: float = math.inf
    refused: tuple[int, ...] = ()
