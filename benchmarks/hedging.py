"""Rival waiting policies: hedging as others do it, in the terms of ``Waiting``."""

from __future__ import annotations

import dataclasses
import math

from coded_torch._table import OPEN, Table
from coded_torch.nn import Waiting
from coded_torch.scheduling._latency_history import History
from coded_torch.scheduling.policy import hedging_threshold

_TRIES = 3  # the most asks for a part that fails


@dataclasses.dataclass(frozen=True, repr=False)
class HedgeOnce(Waiting):
    """Ask for a part that has run for a while once more, whole, and wait for all parts.

    Without numbers, it is hedged at Waiting's threshold.
    """

    medians: float | None = None  #: medians of a part after which it is hedged
    quantile: float | None = None  #: instead, the quantile of the latencies of parts

    def decide(self, history: History, table: Table) -> float:
        if not table.parts:
            table.hedging_threshold = self._after(
                history, table.unit_rows * max(map(len, table.first))
            )
            for units in table.first:
                table.ask(units)
        until = math.inf
        for part in list(table.parts):
            if part.replaced or not table.missing(part):
                continue
            due = part.began + table.hedging_threshold if part.why == "first" else math.inf
            late = part.outcome is OPEN and due <= table.heard
            tries = sum(other.units == part.units for other in table.parts)
            if late or (part.failed and tries <= _TRIES):
                part.replaced = True
                table.ask(part.units, part, "hedge" if late else "retry")
            elif part.outcome is OPEN:
                until = min(until, due)
        if len(table.answered) >= table.needed:
            table.reason = "complete"
        elif table.is_over or not table.open:
            table.reason = "failed"
        if table.reason:
            began = [part for part in table.parts if part.began < math.inf]
            rows = table.unit_rows * max(map(len, table.first))
            history.add([(rows, part.seconds) for part in began], None)
        return until

    def _after(self, history: History, rows: int) -> float:
        if self.quantile is not None:
            return history.part(rows, self.quantile)
        if self.medians is not None:
            return history.part(rows) * self.medians
        return hedging_threshold(history, rows)


class Unsplit(Waiting):
    """Hedge as ``Waiting`` does, but without splitting late parts over idle workers."""

    def decide(self, history: History, table: Table) -> float:
        table.idle = lambda: 1
        return super().decide(history, table)


WAIT_FOR_ALL = Unsplit(estimate_after=math.inf, hedge_budget=0)
