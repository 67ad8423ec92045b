"""Verification in the simulation: the same decisions, and results that are only right or wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from ..scheduling.protocol import Ask, Decision, Ended, Event, Settled
from .scores import ODD_PARTS, ODD_ROWS
from .strikes import Strikes, draw
from .trials import Trials, Verdict

__all__ = ["Verified"]


class Verified:
    """A waiting policy whose results are verified, for :func:`coded_torch.scheduling.simulation`.

    Args:
        waiting: the policy.
        num_workers: M
        share: of the rows that are checked.
        wrong: by worker, the probability that a part of it is wrong, as a whole.
        seed: of all that is drawn.

    Attributes:
        verdicts: of all calls.
    """

    at_once = False

    def __init__(
        self,
        waiting: Any,
        num_workers: int,
        share: float = 0.02,
        wrong: Mapping[int, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.waiting, self.wrong, self.random = waiting, wrong or {}, random.Random(seed)
        self.strikes = Strikes(num_workers, share, random.Random(seed + 1))
        self.verdicts: list[Verdict] = []

    def decide(
        self, history: Any, first: Sequence[Sequence[int]], *, since: float = 0.0, **options: Any
    ) -> Generator[Decision, Event, Ended]:
        """Decide as the policy does, and then as the trials do."""
        self.strikes.count_call()
        drawn = draw(first, self.strikes, options["idle"]())
        policy = self.waiting.decide(history, drawn.parts, since=since, **options)
        asked: list[tuple[int, ...]] = []
        replies: list[tuple[int, int]] = []
        event: Event = None
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: Ended = stop.value
                break
            if isinstance(decision, Ask):
                asked += decision.parts
            event = yield self._avoiding(decision)
            if isinstance(event, Settled) and event.ok:
                replies.append((event.part, event.worker))
        until = since + ended.deadline if ended.reason == "complete" else -math.inf
        soon = since + ended.hedging_threshold
        results: Any = _Results(self)
        trials = results.trials = Trials(
            self.strikes,
            results,
            asked,
            replies,
            drawn,
            soon=soon if soon < math.inf else -math.inf,
            until=until,
            end=math.inf if self.waiting.deadline is None else until,
        )
        self.verdicts.append((yield from trials.decisions()))
        return ended

    def _avoiding(self, decision: Decision) -> Decision:
        if isinstance(decision, Ask) and self.strikes.excluded:
            out = frozenset(self.strikes.excluded)
            return decision._replace(avoid=(out,) * len(decision.parts))
        return decision


class _Results:
    """Parts that are right or wrong, each wrong one in its own way."""

    tolerance = 0.0
    trials: Trials

    def __init__(self, of: Verified) -> None:
        self._of, self._wrong = of, dict[int, bool]()

    def _is_wrong(self, part: int) -> bool:
        if part not in self._wrong:
            rate = self._of.wrong.get(self.trials.worker[part], 0.0)
            self._wrong[part] = self._of.random.random() < rate
        return self._wrong[part]

    def differences(self, part: int, other: int) -> dict[int, float]:
        mine, its = self.trials.asked[part], set(self.trials.asked[other])
        apart = math.inf if self._is_wrong(part) or self._is_wrong(other) else 0.0
        return {row: apart for row in mine if row in its}

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        parts: dict[int, int] = {}
        for row, part in answers.items():
            parts.setdefault(part, row)
        draw = self._of.random.random
        rows = {row for row in answers if draw() < ODD_ROWS}
        return rows | {row for row in parts.values() if draw() < ODD_PARTS}

    def scores(self, answers: Mapping[int, int]) -> dict[int, float]:
        return dict.fromkeys(answers, 0.0)
