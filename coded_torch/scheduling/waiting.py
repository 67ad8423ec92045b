r"""When a call asks its workers again, and when it stops waiting.

A policy does no waiting itself: :meth:`Waiting.decide` is a generator of decisions that is sent
what happened, so that a wrapper drives it over real workers and
:mod:`coded_torch.scheduling.simulation` over
thousands of calls on one clock. The protocol, for whatever drives it::

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

Parts are numbered 0, 1, 2, ... in the order in which they are asked; all times are seconds on one
clock. Where ``begins`` is False, a driver may keep every Began to itself. ``Wait(math.inf)`` is
answered by None if nothing can come any more. A driver may close the generator at any time; only a
call that has :class:`Ended` leaves something in the history.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from .._arguments import count, instance, positive, real
from .latency_history import History
from .policy import Call
from .protocol import (
    Ask,
    Began,
    Decision,
    Drop,
    Ended,
    Event,
    Failure,
    Hedge,
    Prepare,
    Settled,
    Wait,
)

__all__ = [
    "Ask",
    "Began",
    "Decision",
    "Drop",
    "Ended",
    "Event",
    "Failure",
    "Hedge",
    "History",
    "Prepare",
    "Settled",
    "Wait",
    "Waiting",
]


@dataclasses.dataclass(frozen=True)
class Waiting:
    r"""Ask for each input once, again for what takes too long, and predict what is then missing.

    - A part that has run longer than a fence (:meth:`History.fence`), from its begin, is asked
      again: at most three times, the first time split over up to four idle machines.
    - A part that failed is asked again at once, in pieces, so that rows on which the module fails
      come to stand alone: two halves, or four where its worker ended. The same exception for the
      same rows on two workers is the module's. So is the exception of a row that raises three times
      alone, if no other worker returns a good result in the call. A row that ended its worker
      twice, alone, is *poison*: it is not asked for again in this call, which so loses at most five
      workers for one of 64 rows. Where other parts fail as often, workers are to blame, and more is
      tried. Any row is given up after three failures alone.
    - The call answers or raises at its deadline. What is missing is predicted in the time that
      predicting takes, if half is there; else :class:`~coded_torch.codes.DeadlineExceeded` is
      raised, unless a surrogate can answer. Without a deadline, what is missing is predicted after
      ``patience`` running medians of whole calls, queueing included, when as much is there: after
      up to twice that while parts that failed are computed again. If nothing more can come, half is
      needed as well. Until 32 parts have replied there is neither that nor a fence.

    Immutable. For the paper's way, all N at once and N - S waited for, see :meth:`first`.

    Args:
        deadline: seconds from the call to its answer. The time of surrogates is not bounded: one
            that takes long makes the call late.
        patience: where there is no deadline, medians of whole calls after which what is missing is
            predicted; infinite: when nothing more can come.
        extra: work that may be asked again for being late, as a share of all work: what is not
            used is saved up, to 20 parts and one whole call. 0: only failed parts are asked again.
        predict: whether answers may be predicted. False: every row is computed, or the call raises
            :class:`~coded_torch.codes.NotEnoughResults`, at its deadline or when a row has failed
            20 times alone; codes that mix inputs, whose answers are all estimates, refuse it.
        on_error: what a row does on which the module itself fails. "raise": the call computes the
            other rows and raises the module's exception, whose ``rows``, ``answers`` and ``report``
            say what came. "predict": the row counts as missing.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.

    Example:
        >>> from coded_torch.nn import Waiting
        >>> Waiting(deadline=0.05)
        Waiting(deadline=0.05)
        >>> Waiting.first(2)
        Waiting.first(num_stragglers=2)
    """

    deadline: float | None = None
    patience: float = 3.0
    extra: float = 0.25
    predict: bool = True
    on_error: str = "raise"

    #: Whether all N are asked at once.
    at_once = False

    def __post_init__(self) -> None:
        if self.deadline is not None:
            self._set("deadline", positive("Waiting", "deadline", self.deadline))
        self._set(
            "patience", real("Waiting", "patience", self.patience, "positive", lambda x: x > 0)
        )
        self._set(
            "extra",
            real(
                "Waiting",
                "extra",
                self.extra,
                "at least 0 and finite",
                lambda x: 0 <= x < math.inf,
            ),
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
        """The paper's way: ask all N columns at once, and stop at the first N - S good results.

        Args:
            num_stragglers: S. None: as many as the law of the workers' stragglers makes late;
                where it names no number, or there is none, 0.
            deadline: seconds from the call; then what is there is decoded, if the code can.

        Raises:
            TypeError: an argument is of another kind than said.
            ValueError: an argument is out of range.
        """
        return _First(deadline, num_stragglers=num_stragglers)

    @property
    def num_stragglers(self) -> int | None:
        """S, where all are asked :meth:`first`."""
        return None

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
        """The decisions of one call; the module's docstring has the protocol.

        Args:
            history: of the same module on the same workers; added to when the call has ended.
            first: the units of each part of the first ask.
            needed: how many units with a good result complete the call: all B rows, or N - S
                columns.
            least: of them, that the code can decode at all.
            unit_rows: rows of a unit.
            spare: where units are columns, those that are not in ``first``: any column stands in
                for any other, and those not asked yet go first. None: units are rows, and only the
                same rows can stand in for a part.
            since: when the call began, on the clock of the events.
            idle: how many machines would take a part at once.
            reserve: seconds before the deadline that predicting takes.

        Returns:
            A generator of decisions that returns :class:`Ended`.
        """
        parts = [tuple(units) for units in first]
        call = Call(self, history, parts, needed, least, unit_rows, spare, since, idle, reserve)
        return call.decisions()

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
    num_stragglers: int | None = None

    at_once = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_stragglers is not None:
            self._set(
                "num_stragglers",
                count("Waiting.first", "num_stragglers", self.num_stragglers, least=0),
            )

    def __repr__(self) -> str:
        return f"Waiting.first({self._changed()})"
