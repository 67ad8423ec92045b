r"""When a call hedges, and when it stops waiting.

A policy does no waiting itself. :meth:`Waiting.decide` is a generator of decisions that is sent
events, so that a wrapper drives it over real workers and :mod:`coded_torch.scheduling.simulation`
over thousands of calls on one clock. Any driver follows this protocol::

    policy = waiting.decide(history, first, needed=len(rows), idle=lambda: request.idle)
    event = None
    while True:
        try:
            decision = policy.send(event)
        except StopIteration as stop:
            return stop.value                  # Ended
        event = None
        match decision:
            case Ask(parts): ...               # each part is a tuple of units
            case Drop(parts): ...              # numbers of parts that need not begin any more
            case Prepare(): ...                # what is missing may have to be predicted
            case Wait(until, begins): event = ...  # Began, Settled, or None: it is `until` by now

Parts are numbered 0, 1, 2, ... in the order in which they are asked. All times are seconds on one
clock. If ``begins`` is False, a driver may keep every Began to itself. ``Wait(math.inf)`` is
answered by None if nothing can come any more. A driver may close the generator at any time; only a
call that has :class:`Ended` leaves something in the history.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from .._arguments import count, instance, positive, real
from .blame import raised_alike
from .latency_history import History
from .policy import Call
from .protocol import Ask, Decision, Ended, Event, Failure, Settled, Wait

__all__ = ["Waiting"]


@dataclasses.dataclass(frozen=True)
class Waiting:
    r"""Ask for each part once, hedge late ones, and predict what is then missing.

    - A part is late when its running time exceeds the hedging threshold
      (:meth:`~coded_torch.scheduling.latency_history.History.hedging_threshold`). It is hedged at
      most three times, the first time split over up to four idle workers.
    - A part that failed is asked again at once, in pieces, so that rows on which the module fails
      come to stand alone. The same exception for the same rows on two workers is the module's. So
      is the exception of a row that raises three times alone, if no other worker returns a good
      result in the call. A row that ended its worker twice, alone, is *poison*: it is not asked for
      again in this call. If other parts fail as often, workers are to blame, and more is tried. Any
      row is given up after three failures alone.
    - The call answers or raises at its deadline. Missing rows are predicted in the time that
      predicting takes if half of the results are there; else
      :class:`~coded_torch.codes.DeadlineExceeded` is raised, unless a surrogate can answer.
    - Without a deadline, missing rows are predicted after ``predict_after`` running medians of
      whole calls, queueing included, if half of the results are there; after up to twice that while
      parts that failed are computed again. The same half is needed if nothing more can come.
    - Until 32 parts have replied, nothing is late.

    Immutable. For the paper's way, all N at once and N - S waited for, see :meth:`first`.

    Args:
        deadline: seconds from the call to its answer. A surrogate's time is not bounded. Defaults
            to None, no deadline.
        predict_after: median calls after which missing rows are predicted if there is no deadline;
            infinite: when nothing more can come. Defaults to 3.
        hedge_budget: work that may be hedged for being late, as a share of all work, at least 0.
            Unused work is saved up, to 20 parts and one whole call. At 0 only failed parts are
            asked again. Defaults to 0.25.
        predict: whether answers may be predicted. If not, every row is computed, or the call raises
            :class:`~coded_torch.codes.NotEnoughResults`, at its deadline or when a row has failed
            20 times alone. Must be True with codes that mix inputs. Defaults to True.
        on_error: "raise" to compute the other rows and raise the module's exception for a row on
            which the module itself fails; its ``rows``, ``answers`` and ``report`` say what came.
            "predict" to count such a row as missing. Defaults to "raise".

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.

    Example:
        >>> from coded_torch import Waiting
        >>> Waiting(deadline=0.05)
        Waiting(deadline=0.05)
        >>> Waiting.first(2)
        Waiting.first(num_stragglers=2)
    """

    deadline: float | None = None
    predict_after: float = 3.0
    hedge_budget: float = 0.25
    predict: bool = True
    on_error: str = "raise"

    #: Whether all N columns are asked at once.
    at_once = False
    #: S, the number of columns that are not waited for; None: the number that the pool's law loses.
    num_stragglers = None

    def __post_init__(self) -> None:
        if self.deadline is not None:
            self._set("deadline", positive("Waiting", "deadline", self.deadline))
        after, budget = self.predict_after, self.hedge_budget
        self._set(
            "predict_after", real("Waiting", "predict_after", after, "positive", lambda x: x > 0)
        )
        finite = "at least 0 and finite"
        self._set(
            "hedge_budget",
            real("Waiting", "hedge_budget", budget, finite, lambda x: 0 <= x < math.inf),
        )
        instance("Waiting", "predict", self.predict, bool)
        instance("Waiting", "on_error", self.on_error, str)
        if self.on_error not in ("raise", "predict"):
            raise ValueError(
                f"Waiting: on_error must be 'raise' or 'predict', got {self.on_error!r}"
            )

    def _set(self, argument: str, value: Any) -> None:
        object.__setattr__(self, argument, value)

    @staticmethod
    def first(num_stragglers: int | None = None, *, deadline: float | None = None) -> Waiting:
        """Ask all N columns of a code at once, and stop at the first N - S good results.

        Args:
            num_stragglers: S. Defaults to the number that the law of the pool loses, else 0.
            deadline: seconds from the call; then the results that are there are decoded, if the
                code can. Defaults to None, no deadline.

        Raises:
            TypeError: an argument is of another kind than said.
            ValueError: an argument is out of range.
        """
        return _First(deadline, num_stragglers=num_stragglers)

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        least: int = 1,
        unit_rows: int = 1,
        spare: Sequence[int] | None = None,
        since: float = 0.0,
        idle: Callable[[], int] = lambda: 1,
        reserve: float = 0.0,
    ) -> Generator[Decision, Event, Ended]:
        """Return the decisions of one call; the module's docstring has the protocol.

        Args:
            history: of the same module on the same pool; added to when the call has ended.
            first: the units of each part of the first ask.
            needed: units with a good result that complete the call: all B rows, or N - S columns.
            least: units that can be decoded at all.
            unit_rows: rows of a unit.
            spare: the columns that are not in ``first``: any column stands in for any other, and
                these go first. None if units are rows, for which only the same rows stand in.
            since: when the call began, on the clock of the events.
            idle: returns how many workers would take a part at once.
            reserve: seconds before the deadline that predicting takes.

        Returns:
            A generator of decisions that returns :class:`Ended`.
        """
        return Call(
            self,
            history,
            first,
            needed=needed,
            least=least,
            unit_rows=unit_rows,
            spare=spare,
            since=since,
            idle=idle,
            reserve=reserve,
        ).decisions()

    def __repr__(self) -> str:
        return f"Waiting({self._changed()})"

    def _changed(self) -> str:
        return ", ".join(
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _First(Waiting):
    num_stragglers: int | None = None  # type: ignore[assignment]  # a field here

    at_once = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (lost := self.num_stragglers) is not None:
            self._set("num_stragglers", count("Waiting.first", "num_stragglers", lost, least=0))

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        least: int = 1,
        since: float = 0.0,
        reserve: float = 0.0,
        **_: Any,
    ) -> Generator[Decision, Event, Ended]:
        yield Ask(tuple([tuple(units) for units in first]))
        end = math.inf if self.deadline is None else since + self.deadline
        good: set[int] = set()
        missing, raised = set(range(len(first))), dict[int, Failure]()
        decodable, reason = math.inf, ""
        refused: tuple[int, ...] = ()
        while not reason:
            until = end - reserve if len(good) >= least else end
            event = yield Wait(until, begins=False)
            if isinstance(event, Settled):
                number = event.part
                missing.discard(number)
                if event.ok:
                    good.add(number)
                    decodable = min(decodable, event.at) if len(good) >= least else math.inf
                else:
                    good.discard(number)
                    if event.failure.kind == "raised":
                        raised[number] = event.failure
                if len(good) >= needed:
                    reason = "first" if len(good) < len(first) else "complete"
                elif not good and raised and raised_alike(raised, len(first)):
                    reason, refused = "error", tuple(range(len(first)))
                elif not missing:
                    reason = "failed"
            elif event is None:
                reason = "failed" if until == math.inf else "deadline"
        return Ended(reason, deadline=end - since, decodable=decodable - since, refused=refused)

    def __repr__(self) -> str:
        return f"Waiting.first({self._changed()})"
