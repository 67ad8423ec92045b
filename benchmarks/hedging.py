"""Rival waiting policies: hedging as others do it, in the terms of ``Waiting``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import Any

from coded_torch.nn import Waiting
from coded_torch.scheduling import Ask, Began, Decision, Ended, Event, Settled, Wait
from coded_torch.scheduling.latency_history import History

_TRIES = 3  # the most asks for a part that fails


@dataclasses.dataclass(frozen=True, repr=False)
class HedgeOnce(Waiting):
    """Ask for a part that has run for a while once more, whole, and wait for all parts.

    Without numbers, it is hedged at Waiting's threshold.
    """

    medians: float | None = None  #: medians of a part after which it is hedged
    quantile: float | None = None  #: instead, the quantile of the latencies of parts

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        unit_rows: int = 1,
        **options: Any,
    ) -> Generator[Decision, Event, Ended]:
        parts, rows = [tuple(units) for units in first], unit_rows * max(map(len, first))
        after = self._after(history, rows)
        due: dict[int, float] = {}  # the times of parts that have begun and were not hedged
        seconds: dict[int, float] = {}  # the seconds of parts that have begun
        good: set[int] = set()
        open_parts = len(parts)
        yield Ask(tuple(parts))
        while len(good) < needed and open_parts:
            until = min(due.values(), default=math.inf)
            event = yield Wait(until)
            again: list[int] = []
            if isinstance(event, Began):
                seconds[event.part] = math.inf
                if event.part < len(first) and after < math.inf:
                    due[event.part] = event.at + after
            elif isinstance(event, Settled):
                open_parts -= 1
                due.pop(event.part, None)
                if event.ok:
                    seconds[event.part] = event.latency
                    good.update(parts[event.part])
                elif parts.count(parts[event.part]) <= _TRIES:
                    again = [event.part]
            elif until == math.inf:
                break
            else:
                again = [part for part, at in due.items() if at <= until]
                due = {part: at for part, at in due.items() if at > until}
            if asked := tuple(parts[part] for part in again if not good.issuperset(parts[part])):
                parts += asked
                open_parts += len(asked)
                yield Ask(asked)
        history.add([(rows, took) for took in seconds.values()], None)
        reason = "complete" if len(good) >= needed else "failed"
        return Ended(reason, hedging_threshold=after)

    def _after(self, history: History, rows: int) -> float:
        if self.quantile is not None:
            return history.part(rows, self.quantile)
        if self.medians is not None:
            return history.part(rows) * self.medians
        return history.hedging_threshold(rows)


class Unsplit(Waiting):
    """Hedge as ``Waiting`` does, but without splitting late parts over idle workers."""

    def decide(
        self, history: History, first: Sequence[Sequence[int]], *, needed: int, **options: Any
    ) -> Generator[Decision, Event, Ended]:
        return super().decide(history, first, needed=needed, **options | {"idle": lambda: 1})


WAIT_FOR_ALL = Unsplit(estimate_after=math.inf, hedge_budget=0)
