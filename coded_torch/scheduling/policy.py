"""The decisions of one call: the protocol is described in ``waiting.py``."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import TYPE_CHECKING

from ..nn._blame import ALONE, DROPPED, EXACT, FAILED, GOOD, QUEUED, RUNNING, Part, judge
from .latency_history import History
from .protocol import Ask, Began, Decision, Drop, Ended, Event, Hedge, Prepare, Settled, Wait

if TYPE_CHECKING:
    from .waiting import Waiting

__all__ = ["Call"]

_REASKS = 3  # of a part that is late
_SPLIT = 4  # machines that the first re-ask of a late part is split over
_BURST = 20  # parts, and one whole call, may be asked again before `extra` limits them


class Call:
    """One call, as far as it has come."""

    def __init__(
        self,
        waiting: Waiting,
        history: History,
        first: Sequence[tuple[int, ...]],
        needed: int,
        least: int,
        unit_rows: int,
        spare: Sequence[int] | None,
        since: float,
        idle: Callable[[], int],
        reserve: float,
    ) -> None:
        self.waiting, self.history, self.needed = waiting, history, needed
        share = 0 if waiting.at_once else -(-needed // 2) if waiting.predict else needed
        self.least = max(least, share)
        self.unit_rows, self.since, self.now = unit_rows, since, since
        self.idle = idle
        self.by_columns = spare is not None
        self.spare = deque(spare or ())
        self.parts = [Part(i, units, None, since) for i, units in enumerate(first)]
        self.num_first, self.num_units = len(first), sum(map(len, first))
        self.open = len(first)  # parts of which something may come
        self.unbegun = 0  # of those asked again
        self.good: set[int] = set()
        self.refused: dict[int, int] = {}  # by the unit, the part that showed it
        self.doubtful: dict[int, int] = {}  # likewise, but only one machine has raised
        self.raised: dict[int, tuple[Hashable, int]] = {}  # what each first part raised, and where
        self.ended = self.failed = 0  # parts, without those that the module raised on
        self.decodable = math.inf
        self.timers: list[tuple[float, int]] = []  # when parts are due, and their numbers
        self.late = self.over = self.lost = self.fenced = self.prepared = False
        self.rows = unit_rows * max(map(len, first))
        self.fences: dict[int, float] = {}
        self.hedges = not waiting.at_once and waiting.extra > 0
        self.median = history.call(self.rows)
        if waiting.deadline is not None:
            self.deadline, self.end = waiting.deadline - reserve, waiting.deadline
        else:
            never = waiting.at_once or not waiting.predict or waiting.patience == math.inf
            self.deadline = math.inf if never else waiting.patience * self.median
            self.end = 2 * self.deadline  # of the search for the rows on which the module fails
        if self.hedges:
            history.earn(waiting.extra)

    def decisions(self) -> Generator[Decision, Event, Ended]:
        yield Ask(tuple([part.units for part in self.parts]))
        begins, wait = not self.waiting.at_once, Wait(-math.inf)
        while (reason := self._reason()) is None:
            until = self._until()
            if until != wait.until:
                wait = Wait(until, begins)
            event = yield wait
            if isinstance(event, Began):
                self._begin(event)
                continue
            if event is not None:
                self._settle(event)
                wanting = len(self.good) < self.needed
                if wanting and self.unbegun and (unwanted := self._unwanted()):
                    yield Drop(unwanted)
                if not self.lost:
                    continue
            elif until == math.inf:
                reason = "failed"
                break
            else:
                # Only now, when no event was there to come before it.
                self.now = max(self.now, until)
                self.late |= self.now >= self.since + self.deadline
                self.over |= self.now >= self.since + self.end
                if self._reason() is not None:
                    continue
            if asked := self._again():
                yield Ask(asked)
            if self.now >= self._preparing():
                self.prepared = True
                yield Prepare()
        return self._end(reason)

    def _reason(self) -> str | None:
        """Why the call ends now; None if it does not."""
        good, at_once = len(self.good), self.waiting.at_once
        if good >= self.needed:
            return "first" if at_once and good < self.num_units else "complete"
        if self.refused and good + len(self.refused.keys() - self.good) >= self.needed:
            return "error"
        if self.waiting.deadline is not None:
            if self.over or (self.late and good >= self.least):
                return "deadline"
        elif self.late and good >= self.least:
            searching = self.now < self.since + self.end and self._suspects()
            if not searching:
                return "patience"
        return None if self.open else "failed"

    def _suspects(self) -> bool:
        """Whether it is being found out on which row the module fails: no time to predict it."""
        return any(
            part.state <= RUNNING
            and not self.good.issuperset(part.units)
            and any(other.failure.kind for other in part.line())
            for part in self.parts[self.num_first :]
        )

    def _until(self) -> float:
        """When something is to be done if nothing happens."""
        timers, parts = self.timers, self.parts
        while timers:
            due, number = timers[0]
            if parts[number].state == RUNNING and parts[number].due == due:
                break
            heapq.heappop(timers)
        due = min(timers[0][0] if timers else math.inf, self._preparing())
        if not self.late:
            return min(due, self.since + self.deadline)
        if self.waiting.deadline is None and len(self.good) < self.least:
            return due  # the rest could not be predicted
        return min(due, self.since + self.end)

    def _preparing(self) -> float:
        """When it is probable enough that something will have to be predicted."""
        if self.prepared or not self.fenced:
            return math.inf
        return self.since + self.deadline / 2

    def _fence(self, num_units: int) -> float:
        fence = self.fences.get(num_units)
        if fence is None:
            fence = self.fences[num_units] = self.history.fence(num_units * self.unit_rows)
        return fence

    def _begin(self, event: Began) -> None:
        part = self.parts[event.part]
        self.now = max(self.now, event.at)
        if part.state == DROPPED:  # too late
            self.open += 1
        elif part.number >= self.num_first:
            self.unbegun -= 1
        part.state, part.fresh = RUNNING, event.fresh
        if self.hedges and (fence := self._fence(len(part.units))) < math.inf:
            part.due = event.at + fence
            heapq.heappush(self.timers, (part.due, part.number))

    def _settle(self, event: Settled) -> None:
        part, good = self.parts[event.part], self.good
        self.now = max(self.now, event.at)
        before, part.state = part.state, GOOD if event.ok else FAILED
        part.failure, part.machine = event.failure, event.machine
        if before <= RUNNING:
            self.open -= 1
            self.unbegun -= before == QUEUED and part.number >= self.num_first
            self.ended += event.failure.kind != "raised"
        if event.ok:
            num_good = len(good)
            good.update(part.units)
            part.won, part.seconds = len(good) > num_good, event.latency
            if len(good) >= self.least:
                self.decodable = min(self.decodable, event.at)
            part.fresh = bool(part.fresh)
            return
        self.lost = True
        part.tries += 1
        if before == GOOD:
            good.clear()
            good.update(*(other.units for other in self.parts if other.state == GOOD))
            if len(good) < self.least:
                self.decodable = math.inf
        if event.failure.kind != "raised":
            self.failed += 1
        elif part.number < self.num_first:
            self._raised(part)

    def _raised(self, part: Part) -> None:
        """Blame the module if it has raised alike for every part of the first ask.

        One or two parts may each contain a bad row. A single machine may be broken.
        """
        self.raised[part.number] = part.failure.what, part.failure.machine
        if self.good or not 2 < self.num_first == len(self.raised):
            return
        causes, machines = map(set, zip(*self.raised.values(), strict=True))
        if len(causes) == 1 and len(machines) > 1:
            for other in self.parts[: self.num_first]:
                self.refused |= dict.fromkeys(other.units, other.number)

    def _unwanted(self) -> tuple[int, ...]:
        """Parts asked again that have not begun, and have been answered by others."""
        unwanted, answered = [], self.good | self.refused.keys()
        for part in self.parts[self.num_first :]:
            if part.state == QUEUED and answered.issuperset(part.units):
                part.state = DROPPED
                unwanted.append(part.number)
        self.open -= len(unwanted)
        self.unbegun -= len(unwanted)
        return tuple(unwanted)

    def _again(self) -> tuple[tuple[int, ...], ...]:
        """What is to be asked again now."""
        self.lost = False
        if self.waiting.at_once:
            return ()
        while self.timers and self.timers[0][0] <= self.now:
            heapq.heappop(self.timers)
        num_parts, idle = len(self.parts), self.idle()
        lacking = (
            self.needed - len(self.good) - self._hopeful() if self.by_columns else self.num_units
        )
        for part in self.parts[:num_parts]:
            late = part.state == RUNNING and part.due <= self.now
            if part.replaced or not (late or part.state >= FAILED):
                continue
            missing = [u for u in part.units if u not in self.good and u not in self.refused]
            missing = missing[: max(0, lacking)]
            if not missing or (late and part.lates >= _REASKS):
                continue
            if late and any(other.failure.kind == "died" for other in part.line()):
                continue  # a copy of it would end another worker, too
            self.fenced |= late
            if late and not self._afford(missing):
                fence = self._fence(len(part.units))
                # On a clock that stands still, where parts take no time, it would be due for ever.
                part.due = self.now + fence if fence else math.inf
                heapq.heappush(self.timers, (part.due, part.number))
                continue
            part.replaced = True
            pieces = self._pieces(part, late, idle)
            if not pieces:
                continue
            pieces = min(pieces, len(missing))
            part.lates += late
            idle, lacking = idle - pieces, lacking - len(missing) * self.by_columns
            self._ask(self._stand_ins(missing), pieces, part)
        return tuple([part.units for part in self.parts[num_parts:]])

    def _pieces(self, part: Part, late: bool, idle: int) -> int:
        """How many stand in for a part; 0 if it is given up."""
        if late:
            return 1 if part.of else max(1, min(_SPLIT, idle))
        if part.state == DROPPED:
            return 1
        if self.by_columns:
            return int(part.tries < ALONE)
        raised = part.failure.kind == "raised"
        others = raised and not self._sound() <= {part.failure.machine}
        most = ALONE if self.waiting.predict else EXACT
        verdict = judge(part, self._rate(part), most, others)
        if not verdict.pieces:
            for failed in part.line():  # what it did says nothing of the workers
                failed.explained = True
        if verdict.refused:
            self.refused |= dict.fromkeys(part.units, part.number)
        elif raised and not verdict.pieces:
            self.doubtful |= dict.fromkeys(part.units, part.number)
        return verdict.pieces

    def _sound(self) -> set[int]:
        """The machines that have returned good results in this call."""
        return {part.machine for part in self.parts if part.state == GOOD}

    def _blame_doubtful(self, reason: str) -> str:
        """Refuse the rows that failed on one machine, if no other machine is known to work.

        The call may end before any machine has returned a result. Then nothing is known.
        """
        sound = self._sound()
        for unit, number in self.doubtful.items():
            known = sound or reason == "failed"
            if unit not in self.good and known and sound <= {self.parts[number].failure.machine}:
                self.refused.setdefault(unit, number)
        lacking = self.needed - len(self.good)
        complete = len(self.refused.keys() - self.good) >= lacking
        return "error" if reason == "failed" and self.refused and complete else reason

    def _rate(self, part: Part) -> float:
        """The share of other parts that fail, other than by an exception of the module."""
        own = sum(other.state == FAILED and other.failure.kind != "raised" for other in part.line())
        ended, failed = self.ended - own, self.failed - own
        known_failed, known_ended = self.history.failing()
        # One more of each, as what was never seen to fail may fail; and this call weighs more, as
        # all workers may have broken just now.
        lately = (known_failed + failed + 1) / (known_ended + ended + 1)
        return max(lately, failed / ended if ended else 0.0)

    def _hopeful(self) -> int:
        """Columns that may still come in time."""
        return sum(
            not part.replaced
            and (part.state == QUEUED or (part.state == RUNNING and part.due > self.now))
            and len(part.units)
            for part in self.parts
        )

    def _afford(self, units: Sequence[int]) -> bool:
        most = 1 + _BURST / self.num_first
        return self.history.spend(len(units) / self.num_units, most)

    def _stand_ins(self, missing: list[int]) -> list[int]:
        """Columns not asked yet, as long as there are some, else the same ones again."""
        fresh = [self.spare.popleft() for _ in range(min(len(self.spare), len(missing)))]
        return sorted(fresh + missing[len(fresh) :])

    def _ask(self, units: list[int], pieces: int, of: Part) -> None:
        for i in range(pieces):
            piece = units[i * len(units) // pieces : (i + 1) * len(units) // pieces]
            self.parts.append(Part(len(self.parts), tuple(piece), of, self.now))
        self.open += pieces
        self.unbegun += pieces

    def _end(self, reason: str) -> Ended:
        if self.doubtful:
            reason = self._blame_doubtful(reason)
        ran = [part for part in self.parts if part.fresh is not None]
        if not self.waiting.at_once:
            # Calls that were cut short count as infinite: left out, they would keep the median,
            # and so the patience, at what calls took before the machines became slow.
            took = self.now - self.since if len(self.good) >= self.needed else math.inf
            typical = not any(part.fresh for part in ran)
            self.history.add(
                [(self.unit_rows * len(p.units), p.seconds) for p in ran if not p.fresh],
                (self.rows, took) if typical else None,
            )
        told = [p for p in ran if p.state in (GOOD, FAILED) and not p.explained]
        told = [p for p in told if p.failure.kind != "raised"]
        self.history.failed(sum(p.state == FAILED for p in told), len(told))
        hedges = tuple(
            Hedge(
                part.number,
                part.of.number,
                part.units,
                part.at - self.since,
                part.won,
            )
            for part in self.parts[self.num_first :]
            if part.of is not None
        )
        fence = self._fence(self.rows // self.unit_rows)
        deadline, decodable = self.waiting.deadline or self.deadline, self.decodable - self.since
        refused = tuple(sorted(set(self.refused.values())))
        return Ended(reason, hedges, fence, self.median, deadline, decodable, refused)
