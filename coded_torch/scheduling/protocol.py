"""What a policy and its driver say to each other: ``waiting.py`` describes the protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import NamedTuple, TypeAlias

__all__ = ["Ask", "Began", "Decision", "Drop", "Ended", "Event", "Failure", "Hedge", "Prepare"]
__all__ += ["Settled", "Wait"]


class Ask(NamedTuple):
    """Have parts computed, each a tuple of units."""

    parts: tuple[tuple[int, ...], ...]


class Drop(NamedTuple):
    """Parts, by number, that other parts have answered: what has not begun need not begin."""

    parts: tuple[int, ...]


class Prepare(NamedTuple):
    """A fence has fired and half of the time is over: prepare what predictions need."""


class Wait(NamedTuple):
    """Wait for an event, but not beyond a time; ``begins`` if it matters which parts begin."""

    until: float
    begins: bool = True


class Began(NamedTuple):
    """A machine has begun a part; ``fresh`` if it has not run this module before."""

    part: int
    at: float
    fresh: bool = False


class Failure(NamedTuple):
    """How a part failed.

    Attributes:
        kind: "raised" by the module; "died": its worker ended; "": anything else.
        machine: where; -1: on none.
        what: equal where the same exception was raised, but for numbers in its message.
    """

    kind: str = ""
    machine: int = -1
    what: Hashable = None


class Settled(NamedTuple):
    """A part has ended ``latency`` seconds after it began, with a good result or a failure.

    A second one for the same part, not ``ok``, takes back what turned out unlike most. The machine
    computed the part; -1: unknown.
    """

    part: int
    at: float
    latency: float
    ok: bool
    failure: Failure = Failure()
    machine: int = -1


class Hedge(NamedTuple):
    """One part that was asked again.

    Attributes:
        part: its number.
        of: that of the part it stands in for.
        units: that it is asked for.
        at: when, in seconds of the call.
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
        reason: "complete"; "deadline" or "patience", where the rest is to be predicted; "first"
            where those that were wanted first are there; "error" where all is there but what the
            module itself fails on, or where it raised alike for every part; "failed" where nothing
            more can come.
        hedges: the parts that were asked again.
        fence: seconds after its begin at which the largest part would be asked again; infinite
            while the history is too short.
        median: of whole calls like this one, in seconds; infinite likewise, and where most were
            not complete.
        deadline: of the answer, in seconds of the call; infinite if there was none.
        decodable: when as many results were there as the rest may be predicted from; infinite if
            never.
        refused: the parts that the module itself fails on, by number: single rows, or every part.
    """

    reason: str
    hedges: tuple[Hedge, ...]
    fence: float
    median: float
    deadline: float
    decodable: float = math.inf
    refused: tuple[int, ...] = ()
