"""Whose fault a failed part is: the module's, on some row, or bad luck with a worker.

A part that fails is computed again in pieces until the rows that it failed for stand alone. Then

- the same exception for the same rows on two workers is the *module's*; an exception from one
  worker alone is the module's only if no other worker returns a good result in the call;
- a row that ended its worker twice, alone, is *poison*, unless workers end as often without it.

Either row is refused: it is not asked for again in this call. A row that only a broken worker fails
on is given up, but not refused: it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .policy import Part
    from .protocol import Failure

__all__ = ["ALONE", "EXACT", "Verdict", "judge", "raised_alike"]

#: Failures of the same rows in a row, after which these rows are given up.
ALONE = 3
#: The same number for calls that may predict nothing: at a failure rate of 0.5, one row of a
#: million is given up.
EXACT = 20
_OFTEN = 4  # workers that parts with a row have ended, after which one more alone will do
_PIECES = 4  # that a part is cut into which ended its worker, so that few more workers are lost
# Probabilities that a part fails as often as this one by the rate at which others fail. Below the
# first, which five others that did not fail reach, its rows are suspected, and it is cut. Below the
# second a row is poison: with a third of all parts failing, that is one call of two thousand
# (benchmarks/promises.py, "poison").
_SUSPECT, _POISON = 0.2, 1e-5


class Verdict(NamedTuple):
    """The fate of a failed part.

    Attributes:
        pieces: the number of parts that stand in for it; 0 if its rows are given up.
        refused: whether the module itself fails on it.
    """

    pieces: int
    refused: bool = False


def judge(part: Part, rate: float, most: int, others: bool = False) -> Verdict:
    """Judge a part of rows that has failed.

    Args:
        part: the part.
        rate: the share of other parts that fail, without an exception of the module.
        most: failures of the same rows, after which these rows are given up.
        others: whether another worker than the one that failed has returned a good result.
    """
    failure, alone = part.failure, len(part.units) == 1
    if failure.kind == "raised":
        if not alone:
            return Verdict(2)
        alike = (other.failure for other in part.line() if other.failure.what == failure.what)
        elsewhere = any(other.worker != failure.worker for other in alike)
        again = not elsewhere and part.tries < (most if others else ALONE)
        return Verdict(int(again), elsewhere)
    if part.fresh is None:  # no worker had it
        return Verdict(int(part.tries < ALONE))
    times = sum(other.failed and other.failure.kind != "raised" for other in part.line())
    chance = rate**times
    died = failure.kind == "died"
    if alone:
        poison = died and (part.tries >= 2 or times >= _OFTEN) and chance <= _POISON
        return Verdict(int(not poison and part.tries < most), poison)
    # Where nearly all fails, pieces would only lose more workers, but rejected results cost none.
    if chance <= _SUSPECT or (part.tries >= ALONE and not died):
        return Verdict(_PIECES if died else 2)
    return Verdict(int(part.tries < most))


def raised_alike(failures: Mapping[int, Failure], num_parts: int) -> bool:
    """Return whether the module has raised alike for every part of the first ask.

    One or two parts may each contain a bad row. A single worker may be broken.

    Args:
        failures: of kind "raised", by the number of the part.
        num_parts: of the first ask.
    """
    if not 2 < num_parts == len(failures):
        return False
    causes = {failure.what for failure in failures.values()}
    return len(causes) == 1 and len({failure.worker for failure in failures.values()}) > 1
