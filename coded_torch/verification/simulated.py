"""Verification in the simulation: the same decisions, for workers that are never wrong."""

from __future__ import annotations

import random
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any

from ..scheduling import Ask, Decision, Ended, Event, Settled
from .scores import ODD_PARTS, ODD_ROWS
from .strikes import Strikes
from .trials import Trials

__all__ = ["Verified"]


class Verified:
    """A waiting policy whose results are verified, for :mod:`coded_torch.scheduling.simulation`.

    Of M workers, a ``share`` of the rows is checked.
    """

    at_once = False

    def __init__(self, waiting: Any, num_workers: int, share: float = 0.02, seed: int = 0) -> None:
        self.waiting, self.random = waiting, random.Random(seed)
        self.strikes = Strikes(num_workers, share, generator=self.random)

    def decide(
        self, history: Any, first: Sequence[Sequence[int]], *, since: float = 0.0, **options: Any
    ) -> Generator[Decision, Event, Ended]:
        """Decide as the policy does, and then as the trials do."""
        trials: Any = Trials(self.strikes)
        trials.results = _Results(self.random, trials)
        parts = trials.first(first, options["idle"]())
        policy = self.waiting.decide(history, parts, since=since, **options)
        asked: list[tuple[int, ...]] = []
        replies: list[tuple[int, int]] = []
        failed: list[int] = []
        event, now = None, since
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                ended: Ended = stop.value
                break
            if isinstance(decision, Ask):
                asked += decision.parts
            event = yield decision
            if isinstance(event, Settled):
                now = event.at
                if event.ok:
                    replies.append((event.part, event.worker))
                else:
                    failed.append(event.part)
        bounded = self.waiting.deadline is not None
        yield from trials.decisions(
            asked, replies, ended, began=since, now=now, bounded=bounded, failed=failed
        )
        return ended


class _Results:
    """Results without differences, some of which look odd by chance."""

    tolerance = 0.0

    def __init__(self, generator: random.Random, trials: Trials) -> None:
        self._draw, self._trials = generator.random, trials

    def differences(self, pairs: Collection[tuple[int, int]]) -> list[dict[int, float]]:
        asked = self._trials.asked
        return [dict.fromkeys(set(asked[a]).intersection(asked[b]), 0.0) for a, b in pairs]

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        parts = {part: row for row, part in answers.items()}
        rows = {row for row in answers if self._draw() < ODD_ROWS}
        return rows | {row for row in parts.values() if self._draw() < ODD_PARTS}

    def conclude(self, trials: Trials) -> None:
        """Do nothing: results are not scored."""
