r"""Waiting policies on machines that exist only as queues: thousands of open calls on one clock.

The same generator of decisions that a wrapper drives over real workers,
:meth:`coded_torch.nn.Waiting.decide`, is driven here over machines that follow :class:`Conditions`.
Time is counted in medians of a part of the first ask, where nothing goes wrong.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ._arguments import count, instance, positive, probability, real
from .nn.waiting import Ask, Began, Decision, Drop, Ended, Event, History, Settled, Wait, Waiting
from .stragglers import Stragglers

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Conditions", "Hedge", "Outcome", "Policy", "simulate"]

_UNITS = 12  # of a part of the first ask: 2, 3 and 4 divide it


class Policy(Protocol):
    """Anything that decides as :class:`~coded_torch.nn.Waiting` does."""

    def decide(
        self, history: History, first: Sequence[Sequence[int]], *, needed: int, **options: Any
    ) -> Generator[Decision, Event, Ended]: ...


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
        slow: the share of time in which a machine is slower by a factor from ``slow_by``, in
            exponential spells that last 100 times the time between two requests on average.
        dead: the probability that a part fails, after ``dead_after``.
        bursts: the mean time between two bursts, exponential: a fifth of the machines, side by
            side, do nothing for ``pause``. Infinite: none.
        delays: a law of further seconds, one second being the median part; drawn for every request,
            one a machine. A part that is never to end fails after ``dead_after``.

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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a policy did.

    Attributes:
        latencies: from arrival to end, ``[num_requests]``, in medians of a part.
        predicted: of each call, the share of its inputs that no machine answered.
        calls: of the module, that machines began, in multiples of those of the first ask.
        work: inputs that machines began, in multiples of a batch.
        ended: how many calls ended for which reason.
    """

    latencies: NDArray[np.float64]
    predicted: NDArray[np.float64]
    calls: float
    work: float
    ended: Counter[str]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies, percent))


@dataclasses.dataclass(frozen=True)
class Hedge:
    """The rival: a part that has run for a while is asked once more, whole, and all are waited for.

    Args:
        medians: of a part, after which that is; None for the policy's fence.
        quantile: instead, of the running latencies of parts.
    """

    medians: float | None = None
    quantile: float | None = None

    def decide(
        self,
        history: History,
        first: Sequence[Sequence[int]],
        *,
        needed: int,
        unit_rows: int = 1,
        **options: Any,
    ) -> Generator[Decision, Event, Ended]:
        parts, rows = [tuple(units) for units in first], unit_rows * len(first[0])
        if self.quantile is not None:
            after = history.part(rows, self.quantile)
        elif self.medians is not None:
            after = history.part(rows) * self.medians
        else:
            after = history.fence(rows)
        due: dict[int, float] = {}  # of those that have begun and were not asked again
        began: dict[int, float] = {}
        seconds: dict[int, float] = {}
        good: set[int] = set()
        yield Ask(tuple(parts))
        while len(good) < needed:
            until = min(due.values(), default=math.inf)
            event = yield Wait(until)
            again: list[int] = []
            if isinstance(event, Began):
                began[event.part], seconds[event.part] = event.at, math.inf
                if event.part < len(first) and after < math.inf:
                    due[event.part] = event.at + after
            elif isinstance(event, Settled):
                due.pop(event.part, None)
                if event.ok:
                    seconds[event.part] = event.latency
                    good.update(parts[event.part])
                elif not good.issuperset(parts[event.part]):
                    again = [event.part]
            else:
                again = [part for part, at in due.items() if at <= until]
                for part in again:
                    del due[part]
                again = [part for part in again if not good.issuperset(parts[part])]
            if again:
                parts += [parts[part] for part in again]
                yield Ask(tuple(parts[-len(again) :]))
        history.add([(rows, seconds[part]) for part in began], None)
        return Ended("complete", (), after, math.inf, math.inf)


class _Open:
    """A call that has not ended."""

    __slots__ = ("answered", "arrival", "dropped", "number", "parts", "policy", "timer", "until")

    def __init__(
        self, number: int, arrival: float, policy: Generator[Decision, Event, Ended]
    ) -> None:
        self.number, self.arrival = number, arrival
        self.policy: Generator[Decision, Event, Ended] | None = policy  # None: it has ended
        self.parts: list[tuple[int, ...]] = []
        self.answered: list[tuple[int, ...]] = []
        self.dropped: set[int] = set()
        self.timer = self.until = math.inf


class _Faults:
    """What makes parts long, the same for every policy: by request and part, machine and time."""

    def __init__(
        self,
        conditions: Conditions,
        machines: int,
        requests: int,
        parts: int,
        gap: float,
        seed: int,
    ) -> None:
        self.conditions, self.machines, self.parts = conditions, machines, parts
        self.delays: tuple[int, list[float]] = (-1, [])
        self._drawn = np.random.default_rng([seed, 1])
        self.first = self._draw(requests * parts)
        self.later = iter(())
        self._spells = [self._spell(random.Random(f"{seed} {m}"), gap) for m in range(machines)]
        self._current = [next(spells) for spells in self._spells]

    def _draw(self, size: int) -> list[float]:
        """Factors of the time that parts take; infinite for those that fail."""
        conditions, generator = self.conditions, self._drawn
        factors = np.exp(conditions.spread * generator.standard_normal(size))
        low, high = conditions.straggling_by
        by = low * (high / low) ** generator.random(size)
        factors = np.where(generator.random(size) < conditions.straggling, factors * by, factors)
        return np.where(generator.random(size) < conditions.dead, math.inf, factors).tolist()

    def _spell(self, generator: random.Random, gap: float) -> Iterator[tuple[float, float, float]]:
        """The spells in which a machine is slow: begin, end, factor."""
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
        if part < self.parts:
            return self.first[request * self.parts + part]
        for factor in self.later:
            return factor
        self.later = iter(self._draw(1000))
        return next(self.later)

    def slowness(self, machine: int, now: float) -> float:
        begin, end, factor = self._current[machine]
        while end <= now:
            begin, end, factor = self._current[machine] = next(self._spells[machine])
        return factor if begin <= now else 1.0

    def delay(self, request: int, machine: int) -> float:
        raise NotImplementedError


_END, _TIMER, _BURST, _RESUME = range(4)


class _Cluster:
    """Machines, one queue, and one clock."""

    def __init__(self, conditions: Conditions, faults: _Faults, seed: int) -> None:
        self.conditions, self.faults = conditions, faults
        self.now = 0.0
        self.events: list[tuple[float, int, int, Any]] = []
        self.order = itertools.count()
        self.queue: deque[tuple[_Open, int]] = deque()
        self.idle = deque(range(faults.machines))
        self.running: list[tuple[_Open, int, float, bool] | None] = [None] * faults.machines
        self.ends = [0.0] * faults.machines
        self.resumes = [0.0] * faults.machines
        self.bursts = random.Random(f"{seed} bursts")
        self.begun_parts = self.begun_units = 0
        self.closed: Callable[[_Open, Ended], None]
        self._burst_later()

    def at(self, time: float, kind: int, what: Any) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def free(self) -> int:
        return max(0, len(self.idle) - len(self.queue))

    def step(self, call: _Open, event: Event) -> None:
        """Send an event, and do what is decided until there is something to wait for."""
        policy = call.policy
        assert policy is not None
        try:
            decision = policy.send(event)
            while type(decision) is not Wait:
                if type(decision) is Ask:
                    for units in decision.parts:
                        self.queue.append((call, len(call.parts)))
                        call.parts.append(units)
                elif type(decision) is Drop:
                    call.dropped.update(decision.parts)
                decision = policy.send(None)
        except StopIteration as stop:
            call.policy = None
            self.closed(call, stop.value)
            return
        call.until = until = decision.until
        if until < call.timer:
            call.timer = until
            self.at(until, _TIMER, call)

    def dispatch(self) -> None:
        """Let idle machines take what is wanted."""
        while self.idle and self.queue:
            call, part = self.queue.popleft()
            if call.policy is None or part in call.dropped:
                continue
            self.begin(self.idle.popleft(), call, part)

    def begin(self, machine: int, call: _Open, part: int) -> None:
        conditions, faults, now = self.conditions, self.faults, self.now
        units = len(call.parts[part])
        factor = faults.factor(call.number, part)
        ok = factor < math.inf
        if ok:
            seconds = conditions.overhead + (1 - conditions.overhead) * units / _UNITS
            seconds *= factor
            if conditions.slow:
                seconds *= faults.slowness(machine, now)
        else:
            seconds = conditions.dead_after
        self.running[machine] = call, part, now, ok
        self.ends[machine] = now + seconds
        self.at(now + seconds, _END, machine)
        self.begun_parts += 1
        self.begun_units += units
        self.step(call, Began(part, now))

    def end(self, machine: int) -> None:
        if self.ends[machine] > self.now:  # it was paused meanwhile
            self.at(self.ends[machine], _END, machine)
            return
        running = self.running[machine]
        assert running is not None
        call, part, began, ok = running
        self.running[machine] = None
        if self.resumes[machine] <= self.now:
            self.idle.append(machine)
        if call.policy is not None:
            if ok:
                call.answered.append(call.parts[part])
            self.step(call, Settled(part, self.now, self.now - began, ok))

    def burst(self) -> None:
        machines, pause = len(self.ends), self.conditions.pause
        first, resume = self.bursts.randrange(machines), self.now + pause
        for i in range(first, first + max(1, round(machines / 5))):
            machine = i % machines
            longer = resume - max(self.now, self.resumes[machine])
            self.resumes[machine] = resume
            if self.running[machine] is not None:
                self.ends[machine] += longer
            elif machine in self.idle:
                self.idle.remove(machine)
            self.at(resume, _RESUME, machine)
        self._burst_later()

    def _burst_later(self) -> None:
        if self.conditions.bursts < math.inf:
            gap = self.bursts.expovariate(1.0) * self.conditions.bursts
            self.at(self.now + gap, _BURST, None)

    def resume(self, machine: int) -> None:
        if self.resumes[machine] <= self.now and self.running[machine] is None:
            self.idle.append(machine)

    def run(self, arrivals: Sequence[float], arrive: Callable[[int, float], _Open]) -> None:
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

    def wake(self, call: _Open) -> None:
        if call.policy is None:
            return
        due, call.timer = call.timer <= self.now, min(call.timer, math.inf)
        if due:
            call.timer = math.inf
        if call.until <= self.now:
            self.step(call, None)
        elif due and call.until < math.inf:
            call.timer = call.until
            self.at(call.until, _TIMER, call)


def simulate(
    policy: Policy,
    conditions: Conditions,
    *,
    num_machines: int,
    num_parts: int,
    load: float = 0.3,
    num_requests: int = 10_000,
    seed: int = 0,
    history: History | None = None,
) -> Outcome:
    gap = conditions.mean() * num_parts / (num_machines * load)
    generator = np.random.default_rng([seed, 0])
    arrivals = np.cumsum(generator.exponential(gap, num_requests)).tolist()
    at_once = getattr(policy, "at_once", False)
    faults = _Faults(conditions, num_machines, num_requests, num_parts, gap, seed)
    cluster = _Cluster(conditions, faults, seed)
    history = History() if history is None else history
    total = num_parts * _UNITS
    first = [tuple(range(i, i + _UNITS)) for i in range(0, total, _UNITS)]
    latencies, predicted, ended = np.zeros(num_requests), np.zeros(num_requests), Counter()

    def arrive(number: int, arrival: float) -> _Open:
        decisions = policy.decide(history, first, needed=total, since=arrival, idle=cluster.free)
        return _Open(number, arrival, decisions)

    def closed(call: _Open, how: Ended) -> None:
        cluster.open -= 1
        latencies[call.number] = cluster.now - call.arrival
        ended[how.reason] += 1
        if how.reason != "complete":
            predicted[call.number] = 1 - len(set().union(*call.answered)) / total

    cluster.closed = closed
    cluster.run(arrivals, arrive)
    return Outcome(
        latencies,
        predicted,
        cluster.begun_parts / (num_requests * num_parts),
        cluster.begun_units / (num_requests * total),
        ended,
    )
