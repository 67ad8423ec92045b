"""SimulatedWorkers that exist only as queues on one clock, and what goes wrong with them."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from .._arguments import instance, positive, probability, real
from ..stragglers import Stragglers
from .protocol import Ask, Began, Decision, Drop, Ended, Event, Failure, Settled, Wait

__all__ = ["PART_ROWS", "Conditions", "Faults", "OpenCall", "SimulatedWorkers"]

PART_ROWS = 12  # of a part of the first ask: 2, 3 and 4 divide it


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How long parts take, and what goes wrong.

    A part with the share r of the inputs of one of the first ask takes ``overhead + (1 - overhead)
    r``, times a lognormal factor.

    Args:
        spread: standard deviation of that factor's logarithm.
        overhead: of a part's time, the share that does not depend on its inputs.
        straggling: the probability that a part takes longer by a factor from ``straggling_by``,
            log-uniform between the two.
        slow: the share of time in which a worker is slower by a factor from ``slow_by``, in
            exponential spells.
        spell: their mean, in times between two requests.
        dead: the probability that a part fails, after ``dead_after``.
        bursts: the mean time between two bursts, exponential: a fifth of the workers, side by
            side, do nothing for ``pause``. Infinite: none.
        delays: a law of further seconds, one second being the median part; drawn for every request,
            one a worker. A part that is never to end fails after ``dead_after``.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.
    """

    spread: float = 0.15
    overhead: float = 0.1
    straggling: float = 0.0
    straggling_by: tuple[float, float] = (5.0, 50.0)
    slow: float = 0.0
    slow_by: tuple[float, float] = (3.0, 10.0)
    spell: float = 100.0
    dead: float = 0.0
    dead_after: float = 100.0
    bursts: float = math.inf
    pause: float = 10.0
    delays: Stragglers | None = None

    def __post_init__(self) -> None:
        real(self, "spread", self.spread, "at least 0 and finite", lambda x: 0 <= x < math.inf)
        for argument in ("overhead", "straggling", "slow", "dead"):
            probability(self, argument, getattr(self, argument))
        for argument in ("spell", "dead_after", "pause"):
            positive(self, argument, getattr(self, argument))
        real(self, "bursts", self.bursts, "positive", lambda x: x > 0)
        for argument in ("straggling_by", "slow_by"):
            low, high = getattr(self, argument)
            if not 0 < low <= high < math.inf:
                raise ValueError(
                    f"Conditions: {argument} must be two positive factors, the lower one first, "
                    f"got {(low, high)}"
                )
        instance(self, "delays", self.delays, Stragglers, optional=True)

    def mean(self) -> float:
        """Of a part of the first ask, with all that makes it long but pauses and ``delays``."""
        body = math.exp(self.spread**2 / 2)
        body *= 1 + self.straggling * (_mean(self.straggling_by) - 1)
        body *= 1 + self.slow * (_mean(self.slow_by) - 1)
        return (1 - self.dead) * body + self.dead * self.dead_after


def _mean(bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low if low == high else (high - low) / math.log(high / low)


class OpenCall:
    """A call that has not ended."""

    __slots__ = (
        "answered",
        "arrival",
        "delays",
        "dropped",
        "number",
        "parts",
        "policy",
        "timer",
        "until",
    )

    def __init__(
        self, number: int, arrival: float, policy: Generator[Decision, Event, Ended]
    ) -> None:
        self.number, self.arrival = number, arrival
        self.policy: Generator[Decision, Event, Ended] | None = policy  # None: it has ended
        self.parts: list[tuple[int, ...]] = []
        self.answered: list[tuple[int, ...]] = []
        self.dropped: set[int] = set()
        self.delays: list[float] = []  # by worker, where there is a law of them
        self.timer = self.until = math.inf  # when it is woken, and when it wants to be


class Faults:
    """What makes parts long, the same for every policy: by request and part, worker and time."""

    def __init__(
        self,
        conditions: Conditions,
        workers: int,
        requests: int,
        parts: int,
        gap: float,
        seed: int,
    ) -> None:
        self.conditions, self.workers, self.parts = conditions, workers, parts
        self._drawn = np.random.default_rng([seed, 1])
        self.first = self._draw(requests * parts)
        self.later: Iterator[float] = iter(())
        self._spells = [self._spell(random.Random(f"{seed} {m}"), gap) for m in range(workers)]
        self._current = [next(spells) for spells in self._spells]

    def _draw(self, size: int) -> list[float]:
        """Factors of the time that parts take; infinite for those that fail."""
        conditions, generator = self.conditions, self._drawn
        factors = np.exp(conditions.spread * generator.standard_normal(size))
        low, high = conditions.straggling_by
        by = low * (high / low) ** generator.random(size)
        factors = np.where(generator.random(size) < conditions.straggling, factors * by, factors)
        dead = generator.random(size) < conditions.dead
        return list(np.where(dead, math.inf, factors).tolist())

    def _spell(self, generator: random.Random, gap: float) -> Iterator[tuple[float, float, float]]:
        """The spells in which a worker is slow: begin, end, factor."""
        slow, (low, high) = self.conditions.slow, self.conditions.slow_by
        if not slow:
            yield math.inf, math.inf, 1.0
        mean = self.conditions.spell * gap
        begin = 0.0 if generator.random() < slow else None
        end = 0.0
        while True:
            if begin is None:
                begin = end + generator.expovariate(1.0) * mean * (1 - slow) / slow
            end = begin + generator.expovariate(1.0) * mean
            yield begin, end, low * (high / low) ** generator.random()
            begin = None

    def factor(self, request: int, part: int) -> float:
        """Of the time of a part; infinite if it fails."""
        if part < self.parts:
            return self.first[request * self.parts + part]
        for factor in self.later:
            return factor
        self.later = iter(self._draw(1000))
        return next(self.later)

    def slowness(self, worker: int, now: float) -> float:
        """The factor by which a worker is slow now; to be asked in the order of time."""
        begin, end, factor = self._current[worker]
        while end <= now:
            begin, end, factor = self._current[worker] = next(self._spells[worker])
        return factor if begin <= now else 1.0


_END, _TIMER, _BURST, _RESUME = range(4)


class SimulatedWorkers:
    """SimulatedWorkers, one queue, and one clock."""

    def __init__(
        self,
        conditions: Conditions,
        faults: Faults,
        unit_rows: int,
        closed: Callable[[OpenCall, Ended], None],
        seed: int,
    ) -> None:
        self.conditions, self.faults = conditions, faults
        self.unit_rows, self.closed = unit_rows, closed
        self.now = 0.0
        self.events: list[tuple[float, int, int, Any]] = []
        self.order = itertools.count()
        self.queue: deque[tuple[OpenCall, int, frozenset[int]]] = deque()
        self.idle = deque(range(faults.workers))
        self.running: list[tuple[OpenCall, int, float, bool] | None] = [None] * faults.workers
        self.ends = [0.0] * faults.workers
        self.resumes = [0.0] * faults.workers
        self.bursts = random.Random(f"{seed} bursts")
        self.open = self.begun_parts = self.begun_rows = 0
        self._burst_later()

    def at(self, time: float, kind: int, what: Any) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def free(self) -> int:
        return max(0, len(self.idle) - len(self.queue))

    def step(self, call: OpenCall, event: Event) -> None:
        """Send an event, and do what is decided until there is something to wait for."""
        policy = call.policy
        assert policy is not None
        try:
            decision = policy.send(event)
            while type(decision) is not Wait:
                if type(decision) is Ask:
                    avoid = decision.avoid or (frozenset[int](),) * len(decision.parts)
                    for units, some in zip(decision.parts, avoid, strict=True):
                        self.queue.append((call, len(call.parts), some))
                        call.parts.append(units)
                elif type(decision) is Drop:
                    call.dropped.update(decision.parts)
                decision = policy.send(None)
        except StopIteration as stop:
            call.policy = None
            self.open -= 1
            self.closed(call, stop.value)
            return
        call.until = decision.until
        self.wake_in_time(call)

    def wake_in_time(self, call: OpenCall) -> None:
        if call.until < call.timer:
            call.timer = call.until
            self.at(call.until, _TIMER, call)

    def wake(self, call: OpenCall) -> None:
        if call.policy is None:
            return
        if call.timer <= self.now:
            call.timer = math.inf
        if call.until <= self.now:
            self.step(call, None)
        else:
            self.wake_in_time(call)

    def dispatch(self) -> None:
        """Let idle workers take what is wanted."""
        passed = []
        while self.idle and self.queue:
            call, part, avoid = entry = self.queue.popleft()
            if call.policy is None or part in call.dropped:
                continue
            worker = next((worker for worker in self.idle if worker not in avoid), None)
            if worker is None:
                if len(avoid) < len(self.ends):
                    passed.append(entry)
                else:  # no worker is left, as a pool would say
                    self.step(call, Settled(part, self.now, math.inf, False))
                continue
            self.idle.remove(worker)
            self.begin(worker, call, part)
        self.queue.extendleft(reversed(passed))

    def begin(self, worker: int, call: OpenCall, part: int) -> None:
        conditions, faults, now = self.conditions, self.faults, self.now
        rows = len(call.parts[part]) * self.unit_rows
        seconds = faults.factor(call.number, part)
        seconds *= conditions.overhead + (1 - conditions.overhead) * rows / PART_ROWS
        if conditions.slow:
            seconds *= faults.slowness(worker, now)
        if call.delays:
            seconds += call.delays[worker]
        ok = seconds < math.inf
        self.ends[worker] = now + (seconds if ok else conditions.dead_after)
        self.running[worker] = call, part, now, ok
        self.at(self.ends[worker], _END, worker)
        self.begun_parts += 1
        self.begun_rows += rows
        self.step(call, Began(part, now))

    def end(self, worker: int) -> None:
        if self.ends[worker] > self.now:  # it was paused meanwhile
            self.at(self.ends[worker], _END, worker)
            return
        running = self.running[worker]
        assert running is not None
        call, part, began, ok = running
        self.running[worker] = None
        if self.resumes[worker] <= self.now:
            self.idle.append(worker)
        if call.policy is not None:
            if ok:
                call.answered.append(call.parts[part])
            failure = Failure() if ok else Failure("died", worker)
            self.step(call, Settled(part, self.now, self.now - began, ok, failure, worker))

    def burst(self) -> None:
        workers, pause = len(self.ends), self.conditions.pause
        first, resume = self.bursts.randrange(workers), self.now + pause
        for i in range(first, first + max(1, round(workers / 5))):
            worker = i % workers
            longer = resume - max(self.now, self.resumes[worker])
            self.resumes[worker] = resume
            if self.running[worker] is not None:
                self.ends[worker] += longer
            elif worker in self.idle:
                self.idle.remove(worker)
            self.at(resume, _RESUME, worker)
        self._burst_later()

    def _burst_later(self) -> None:
        if self.conditions.bursts < math.inf:
            gap = self.bursts.expovariate(1.0) * self.conditions.bursts
            self.at(self.now + gap, _BURST, None)

    def resume(self, worker: int) -> None:
        paused = self.resumes[worker] > self.now
        if not paused and self.running[worker] is None and worker not in self.idle:
            self.idle.append(worker)

    def run(self, arrivals: Sequence[float], arrive: Callable[[int, float], OpenCall]) -> None:
        """Until the last call has ended."""
        events, coming = self.events, iter(enumerate(arrivals))
        number, arrival = next(coming)
        self.open = len(arrivals)
        while self.open:
            if not events or arrival <= events[0][0]:
                if arrival == math.inf:
                    raise RuntimeError("simulate: calls are open, and nothing can come any more")
                self.now = arrival
                self.step(arrive(number, arrival), None)
                number, arrival = next(coming, (0, math.inf))
            else:
                self.now, _, kind, what = heapq.heappop(events)
                if kind == _END:
                    self.end(what)
                elif kind == _TIMER:
                    self.wake(what)
                elif kind == _BURST:
                    self.burst()
                else:
                    self.resume(what)
            self.dispatch()
