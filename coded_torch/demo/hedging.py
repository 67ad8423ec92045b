"""Policies to compare with: hedging as others do it, in the terms of :class:`Waiting`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import Any

from ..nn.waiting import Ask, Began, Decision, Ended, Event, History, Settled, Wait, Waiting

__all__ = ["Hedge", "Unsplit"]


@dataclasses.dataclass(frozen=True)
class Hedge:
    """A part that has run for a while is asked once more, whole; all are waited for.

    Args:
        medians: of a part, after which it is; None for the fence of :class:`Waiting`.
        quantile: instead, of the running latencies of parts.
    """

    medians: float | None = None
    quantile: float | None = None

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        unit_rows: int = 1,
        **options: Any,
    ) -> Generator[Decision, Event, Ended]:
        parts, rows = [tuple(units) for units in first], unit_rows * len(first[0])
        if self.quantile is not None:
            after = history.part(rows, self.quantile)
        elif self.medians is not None:
            after = history.part(rows) * self.medians
        else:
            after = history.fence(rows)
        due: dict[int, float] = {}  # of those that have begun and were not asked again
        began: dict[int, float] = {}
        seconds: dict[int, float] = {}
        good: set[int] = set()
        yield Ask(tuple(parts))
        while len(good) < needed:
            until = min(due.values(), default=math.inf)
            event = yield Wait(until)
            again: list[int] = []
            if isinstance(event, Began):
                began[event.part], seconds[event.part] = event.at, math.inf
                if event.part < len(first) and after < math.inf:
                    due[event.part] = event.at + after
            elif isinstance(event, Settled):
                due.pop(event.part, None)
                if event.ok:
                    seconds[event.part] = event.latency
                    good.update(parts[event.part])
                elif not good.issuperset(parts[event.part]):
                    again = [event.part]
            else:
                again = [part for part, at in due.items() if at <= until]
                for part in again:
                    del due[part]
                again = [part for part in again if not good.issuperset(parts[part])]
            if again:
                parts += [parts[part] for part in again]
                yield Ask(tuple(parts[-len(again) :]))
        history.add([(rows, seconds[part]) for part in began], None)
        return Ended("complete", (), after, math.inf, math.inf)


@dataclasses.dataclass(frozen=True)
class Unsplit:
    """A policy whose re-asks are not split over idle machines."""

    waiting: Waiting

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        **options: Any,
    ) -> Generator[Decision, Event, Ended]:
        options["idle"] = lambda: 1
        return self.waiting.decide(history, first, needed=needed, **options)
