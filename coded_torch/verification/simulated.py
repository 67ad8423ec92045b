"""Verification in the simulation: the same decisions, and results that are only right or wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

from ..scheduling.protocol import Ask, Decision, Ended, Event, Settled
from .scores import ODD_PARTS, ODD_ROWS
from .strikes import Strikes
from .trials import Trials

__all__ = ["Verified"]


class Verified:
    """A waiting policy whose results are verified, for :func:`coded_torch.scheduling.simulation`.

    Args:
        waiting: the policy.
        num_workers: M.
        share: the share of rows that are checked. Defaults to 0.02.
        wrong: by worker, the probability that a part of it is wrong as a whole. Defaults to none.
        seed: the seed of all that is drawn. Defaults to 0.

    Attributes:
        verdicts: the verifications of all calls.
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
        self.strikes = Strikes(num_workers, share, generator=random.Random(seed + 1))
        self.verdicts: list[Trials] = []

    def decide(
        self, history: Any, first: Sequence[Sequence[int]], *, since: float = 0.0, **options: Any
    ) -> Generator[Decision, Event, Ended]:
        """Decide as the policy does, and then as the trials do."""
        trials: Any = Trials(self.strikes)
        trials.results = _Results(self, trials)
        policy = self.waiting.decide(
            history, trials.first(first, options["idle"]()), since=since, **options
        )
        asked: list[tuple[int, ...]] = []
        replies: list[tuple[int, int]] = []
        event, now = None, since
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: Ended = stop.value
                break
            if isinstance(decision, Ask):
                asked += decision.parts
                decision = decision._replace(avoid=(trials.avoid,) * len(decision.parts))
            event = yield decision
            if isinstance(event, Settled):
                now = event.at
                if event.ok:
                    replies.append((event.part, event.worker))
        bounded = self.waiting.deadline is not None
        yield from trials.decisions(asked, replies, ended, began=since, now=now, bounded=bounded)
        self.verdicts.append(trials)
        return ended


class _Results:
    """Parts that are right or wrong, each wrong one in its own way."""

    tolerance = 0.0

    def __init__(self, of: Verified, trials: Trials) -> None:
        self._of, self.trials, self._wrong = of, trials, dict[int, bool]()

    def _is_wrong(self, part: int) -> bool:
        if part not in self._wrong:
            rate = self._of.wrong.get(self.trials.worker[part], 0.0)
            self._wrong[part] = self._of.random.random() < rate
        return self._wrong[part]

    def differences(self, pairs: Collection[tuple[int, int]]) -> list[dict[int, float]]:
        asked, by = self.trials.asked, []
        for pair in pairs:
            apart = math.inf if any(map(self._is_wrong, pair)) else 0.0
            by.append(dict.fromkeys(set(asked[pair[0]]).intersection(asked[pair[1]]), apart))
        return by

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        parts, draw = {part: row for row, part in answers.items()}, self._of.random.random
        rows = {row for row in answers if draw() < ODD_ROWS}
        return rows | {row for row in parts.values() if draw() < ODD_PARTS}

    def scores(self, answers: Mapping[int, int]) -> dict[int, float]:
        return dict.fromkeys(answers, 0.0)

    def conclude(self, trials: Trials) -> None:
        pass
