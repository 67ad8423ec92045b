"""Whose fault a failed part is: the module's, on some row, or bad luck with a worker.

A part that fails is computed again in pieces until the rows that it failed for stand alone. Then

- the same exception for the same rows on two workers is the *module's*; from one worker alone it
  is so only if no other worker returns a good result in the call;
- a row that ended its worker twice, alone, is *poison*, unless workers end as often without it.

Either is refused: it is not asked for again in this call. A row that only a broken worker fails on
is given up, but not refused: it is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..scheduling.protocol import Failure

__all__ = ["ALONE", "EXACT", "Part", "Verdict", "judge"]

ALONE = 3  # failures of the same rows in a row, after which these are given up
# The same for calls that may predict nothing: at a failure rate of 0.5 one row of a million is.
EXACT = 20
_OFTEN = 4  # workers that parts with a row have ended, after which one that it ended alone will do
_PIECES = 4  # that a part is cut into which ended its worker, so that few more workers are lost
# Probabilities that a part fails as often as this one by the rate at which others fail. Below the
# first, which five others that did not fail reach, its rows are suspected, and it is cut. Below the
# second a row is poison: with a third of all parts failing, that is one call of two thousand.
_SUSPECT, _POISON = 0.2, 1e-5

QUEUED, RUNNING, GOOD, FAILED, DROPPED = range(5)


class Part:
    """A part that was asked, and what it stands in for: parts make a tree, of which leaves count.

    Attributes:
        machine: where it was computed; -1: unknown.
        tries: failures of exactly these units in a row.
        lates: how often it was asked again for being late.
        explained: whether its failure is known to be its rows'.
    """

    __slots__ = (
        "at", "due", "explained", "failure", "fresh", "lates", "machine", "number", "of",
        "replaced", "seconds", "state", "tries", "units", "won",
    )  # fmt: skip

    def __init__(self, number: int, units: tuple[int, ...], of: Part | None, at: float) -> None:
        self.number, self.units, self.of, self.at = number, units, of, at
        self.state = QUEUED
        self.due = self.seconds = float("inf")
        self.fresh: bool | None = None  # until it begins
        self.machine = -1
        self.failure = Failure()
        self.replaced = self.won = self.explained = False
        same = of is not None and len(of.units) == len(units)
        self.tries: int = of.tries if of is not None and same else 0
        self.lates: int = of.lates if of is not None else 0

    def line(self) -> Iterator[Part]:
        """This part and those that it stands in for, the last first."""
        part: Part | None = self
        while part is not None:
            yield part
            part = part.of


class Verdict(NamedTuple):
    """What becomes of a failed part.

    Attributes:
        pieces: it is asked again in so many; 0: not at all.
        refused: whether the module itself fails on it.
    """

    pieces: int
    refused: bool = False


def judge(part: Part, rate: float, most: int, others: bool = False) -> Verdict:
    """What becomes of a part of rows that has failed.

    Args:
        part: the part.
        rate: the share of other parts that fail, without an exception of the module.
        most: failures of the same rows, after which these are given up.
        others: whether another machine than the one that failed has returned a good result.
    """
    failure, alone = part.failure, len(part.units) == 1
    if failure.kind == "raised":
        if not alone:
            return Verdict(2)
        alike = (other.failure for other in part.line() if other.failure.what == failure.what)
        elsewhere = any(other.machine != failure.machine for other in alike)
        again = not elsewhere and part.tries < (most if others else ALONE)
        return Verdict(int(again), elsewhere)
    if part.fresh is None:  # no worker had it
        return Verdict(int(part.tries < ALONE))
    line = [other for other in part.line() if other.state == FAILED]
    times = sum(other.failure.kind != "raised" for other in line)
    chance = rate**times
    died = failure.kind == "died"
    if alone:
        poison = died and (part.tries >= 2 or times >= _OFTEN) and chance <= _POISON
        return Verdict(int(not poison and part.tries < most), poison)
    # Where nearly all fails, pieces would only lose more workers, but rejected results cost none.
    if chance <= _SUSPECT or (part.tries >= ALONE and not died):
        return Verdict(_PIECES if died else 2)
    return Verdict(int(part.tries < most))
