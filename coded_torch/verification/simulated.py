"""Verification in the simulation: the same decisions, for workers that are never wrong."""

from __future__ import annotations

import random
from collections.abc import Collection, Generator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from ..scheduling import Decision, Ended, Event
from .scores import ODD_PARTS, ODD_ROWS
from .strikes import Strikes
from .trials import Trials

__all__ = ["Verified"]


class Verified:
    """A waiting policy whose results are verified, for :mod:`coded_torch.scheduling.simulation`.

    Of M workers, which are never wrong, a ``share`` of the rows is checked.
    """

    at_once = False

    def __init__(self, waiting: Any, num_workers: int, share: float = 0.02, seed: int = 0) -> None:
        self.waiting = waiting
        pool = SimpleNamespace(places=range(num_workers))
        self.strikes = Strikes(pool, share, random.Random(seed))

    def decide(self, *args: Any, **options: Any) -> Generator[Decision, Event, Ended]:
        return _Right(self.strikes, self.waiting).decide(*args, **options)


class _Right(Trials):
    """Trials of results that do not differ, some of which look odd by chance."""

    tolerance = 0.0

    def prepare(self) -> None:
        self.results = cast(Any, self)

    def differences(self, pairs: Collection[tuple[int, int]]) -> list[dict[int, float]]:
        return [dict.fromkeys({*self.asked[a]}.intersection(self.asked[b]), 0.0) for a, b in pairs]

    def odd(self, answers: Mapping[int, int]) -> set[int]:
        draw, parts = self.record.random.random, {part: row for row, part in answers.items()}
        rows = {row for row in answers if draw() < ODD_ROWS}
        return rows | {row for row in parts.values() if draw() < ODD_PARTS}

    def conclude(self, trials: Trials) -> None:
        """Do nothing: results are not scored."""
