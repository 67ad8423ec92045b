"""The waiting policy: when a call hedges, and when it stops waiting."""

from __future__ import annotations

import dataclasses
import math

from .._arguments import count, instance, real, shown
from ..table import Table
from .latency_history import History
from .policy import Decisions


@dataclasses.dataclass(frozen=True, repr=False)
class Waiting:
    r"""A policy that asks for each part once, hedges late parts, and decides about missing rows.

    By rows, a row is estimated only if the caller asked for it: by a deadline, a number
    ``estimate_after``, or ``on_error="estimate"``. Otherwise every answer is computed, or the call
    raises :class:`~coded_torch.codes.NotEnoughResults` with the rows that nobody could compute.

    - A part is late when its running time exceeds the hedging threshold
      (:meth:`~coded_torch.scheduling.latency_history.History.hedging_threshold`). It is hedged at
      most three times, the first time split over up to four idle workers. Until 32 parts have
      replied, a part is late at half of the deadline.
    - A part that failed is asked again at once, in smaller parts, until the rows that fail stand
      alone. If a row raises alike on two workers, the module fails on it. If 16 rows, or all, raise
      alike before any result is good, it is taken to fail on all. If a row ends its worker twice,
      alone, and other parts fail less often, it is not asked again. Any other row is given up
      after 20 failures alone, or after three if it may be estimated and the module did not raise.
    - The call answers or raises at its deadline. If half of the results are there, missing rows are
      estimated in time. Otherwise a surrogate answers, if this or an earlier call had a result,
      or else the call raises :class:`~coded_torch.codes.DeadlineExceeded`.

    Instances are immutable. :meth:`first` is the paper's policy.

    Args:
        deadline: seconds from the call to its answer, positive. The time of a surrogate or of a
            callable metric is not bounded. Defaults to None, no deadline.
        estimate_after: without a deadline, the number of median calls after which missing rows are
            estimated, once half of the results are there; positive. With infinity, rows are
            estimated when no more results can come. Defaults to None: never by rows, 3 with a code.
        hedge_budget: the work that hedges of late parts may take, as a share of all work, at least
            0. Unused work is saved, up to 20 parts and one whole call. A larger budget hedges
            earlier where latencies vary widely. At 0 only failed parts are asked again. Defaults to
            0.25.
        estimate: whether rows may be estimated at all, even at a deadline. Must be True with codes
            that mix inputs. Defaults to True.
        on_error: the end of a call by rows if the module fails on a row. "raise" computes the other
            rows and raises the module's exception, with ``rows``, ``answers`` and ``report``.
            "estimate" estimates such a row, and any other that nobody could compute. Defaults to
            "raise".
        at_once, num_stragglers: set by :meth:`first`.

    Example:
        >>> from coded_torch import Waiting
        >>> Waiting(deadline=0.05)
        Waiting(deadline=0.05)
        >>> Waiting.first(2)
        Waiting.first(num_stragglers=2)
    """

    deadline: float | None = None
    estimate_after: float | None = None
    hedge_budget: float = 0.25
    estimate: bool = True
    on_error: str = "raise"

    at_once: bool = dataclasses.field(default=False, kw_only=True)
    num_stragglers: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for argument, must, valid in (
            ("deadline", "a positive and finite number of seconds", lambda x: 0 < x < math.inf),
            ("estimate_after", "positive", lambda x: x > 0),
            ("hedge_budget", "at least 0 and finite", lambda x: 0 <= x < math.inf),
        ):
            value = getattr(self, argument)
            if value is not None or argument == "hedge_budget":
                object.__setattr__(self, argument, real("Waiting", argument, value, must, valid))
        for argument in ("estimate", "at_once"):
            instance("Waiting", argument, getattr(self, argument), bool)
        instance("Waiting", "on_error", self.on_error, str)
        is_known = self.on_error in ("raise", "estimate")
        if not is_known:
            raise ValueError(
                f"Waiting: on_error must be 'raise' or 'estimate', got {shown(self.on_error)}"
            )
        if self.num_stragglers is not None:
            count("Waiting.first", "num_stragglers", self.num_stragglers, least=0)

    def may_estimate(self, by_rows: bool) -> bool:
        """Return whether answers may be estimated: by rows, only if the caller asked for it."""
        is_asked = (self.deadline, self.estimate_after, self.on_error) != (None, None, "raise")
        return self.estimate and (is_asked or not by_rows)

    def least(self, needed: int, decodable: int, by_rows: bool) -> int:
        """Return how many results suffice for an answer, if all are ``needed`` to complete it."""
        if self.at_once:
            return decodable
        return max(decodable, -(-needed // 2)) if self.may_estimate(by_rows) else needed

    def decide(self, history: History, table: Table) -> float:
        """Write the parts to ask for into the table of a call, and return when to decide again.

        The history is of the same module on the same pool.
        """
        if table.policy is None:
            table.policy = Decisions(self, history, table)
        return float(table.policy.decide())

    @staticmethod
    def first(num_stragglers: int | None = None, *, deadline: float | None = None) -> Waiting:
        """Return a policy that asks all N columns at once and takes the first N - S good results.

        Args:
            num_stragglers: S, at least 0. Defaults to the number that the delay distribution of the
                pool loses, or 0.
            deadline: seconds from the call, positive, after which the results that arrived are
                decoded, if the code can. Defaults to None, no deadline.
        """
        return Waiting(deadline, math.inf, 0.0, at_once=True, num_stragglers=num_stragglers)

    def __repr__(self) -> str:
        names = ["deadline", "num_stragglers"] if self.at_once else [*vars(self)]
        values = {name: getattr(self, name) for name in names}
        changed = [f"{x}={v!r}" for x, v in values.items() if v != getattr(type(self), x)]
        return f"Waiting{'.first' if self.at_once else ''}({', '.join(changed)})"
