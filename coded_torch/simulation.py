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
import torch

from ._arguments import count, instance, positive, probability, real
from .nn.waiting import Ask, Began, Decision, Drop, Ended, Event, History, Settled, Wait
from .stragglers import Stragglers

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Conditions", "Outcome", "Policy", "simulate"]

_ROWS = 12  # of a part of the first ask: 2, 3 and 4 divide it


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
            exponential spells.
        spell: their mean, in times between two requests.
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


class _Open:
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
        self.delays: list[float] = []  # by machine, where there is a law of them
        self.timer = self.until = math.inf  # when it is woken, and when it wants to be


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
        self._drawn = np.random.default_rng([seed, 1])
        self.first = self._draw(requests * parts)
        self.later: Iterator[float] = iter(())
        self._spells = [self._spell(random.Random(f"{seed} {m}"), gap) for m in range(machines)]
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
        """Of the time of a part; infinite if it fails."""
        if part < self.parts:
            return self.first[request * self.parts + part]
        for factor in self.later:
            return factor
        self.later = iter(self._draw(1000))
        return next(self.later)

    def slowness(self, machine: int, now: float) -> float:
        """The factor by which a machine is slow now; to be asked in the order of time."""
        begin, end, factor = self._current[machine]
        while end <= now:
            begin, end, factor = self._current[machine] = next(self._spells[machine])
        return factor if begin <= now else 1.0


_END, _TIMER, _BURST, _RESUME = range(4)


class _Cluster:
    """Machines, one queue, and one clock."""

    def __init__(
        self,
        conditions: Conditions,
        faults: _Faults,
        unit_rows: int,
        closed: Callable[[_Open, Ended], None],
        seed: int,
    ) -> None:
        self.conditions, self.faults = conditions, faults
        self.unit_rows, self.closed = unit_rows, closed
        self.now = 0.0
        self.events: list[tuple[float, int, int, Any]] = []
        self.order = itertools.count()
        self.queue: deque[tuple[_Open, int]] = deque()
        self.idle = deque(range(faults.machines))
        self.running: list[tuple[_Open, int, float, bool] | None] = [None] * faults.machines
        self.ends = [0.0] * faults.machines
        self.resumes = [0.0] * faults.machines
        self.bursts = random.Random(f"{seed} bursts")
        self.open = self.begun_parts = self.begun_rows = 0
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
            self.open -= 1
            self.closed(call, stop.value)
            return
        call.until = decision.until
        self.wake_in_time(call)

    def wake_in_time(self, call: _Open) -> None:
        if call.until < call.timer:
            call.timer = call.until
            self.at(call.until, _TIMER, call)

    def wake(self, call: _Open) -> None:
        if call.policy is None:
            return
        if call.timer <= self.now:
            call.timer = math.inf
        if call.until <= self.now:
            self.step(call, None)
        else:
            self.wake_in_time(call)

    def dispatch(self) -> None:
        """Let idle machines take what is wanted."""
        while self.idle and self.queue:
            call, part = self.queue.popleft()
            if call.policy is None or part in call.dropped:
                continue
            self.begin(self.idle.popleft(), call, part)

    def begin(self, machine: int, call: _Open, part: int) -> None:
        conditions, faults, now = self.conditions, self.faults, self.now
        rows = len(call.parts[part]) * self.unit_rows
        seconds = faults.factor(call.number, part)
        seconds *= conditions.overhead + (1 - conditions.overhead) * rows / _ROWS
        if conditions.slow:
            seconds *= faults.slowness(machine, now)
        if call.delays:
            seconds += call.delays[machine]
        ok = seconds < math.inf
        self.ends[machine] = now + (seconds if ok else conditions.dead_after)
        self.running[machine] = call, part, now, ok
        self.at(self.ends[machine], _END, machine)
        self.begun_parts += 1
        self.begun_rows += rows
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
        paused = self.resumes[machine] > self.now
        if not paused and self.running[machine] is None and machine not in self.idle:
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


def simulate(
    policy: Policy,
    conditions: Conditions,
    *,
    num_machines: int,
    num_parts: int,
    load: float = 0.3,
    num_requests: int = 10_000,
    num_workers: int | None = None,
    history: History | None = None,
    seed: int = 0,
) -> Outcome:
    """Send requests to machines that serve one part at a time, from one queue.

    Requests arrive independently of each other (Poisson). An idle machine takes the next part that
    is still wanted; what has begun goes on to its end. What goes wrong is the same for all policies
    with the same seed: by request and part for the first ask, by machine and time for spells and
    bursts.

    Args:
        policy: a :class:`~coded_torch.nn.Waiting`, or what decides like one. Of one that asks all N
            at once, column n holds the share ``n mod K`` of the inputs.
        conditions: what parts take, and what goes wrong.
        num_machines: at least 1.
        num_parts: K, of the first ask.
        load: the share of the machines' time that the first asks take, in (0, 1).
        num_requests: at least 1.
        num_workers: N, for a policy that asks all at once; by default ``num_machines``.
        history: to begin with; by default an empty one. It is added to.
        seed: of everything.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.

    Note:
        Some ten microseconds a part.

    Example:
        >>> from coded_torch.nn import Waiting
        >>> from coded_torch.simulation import Conditions, simulate
        >>> straggling = Conditions(straggling=0.03)
        >>> for waiting in Waiting(), Waiting(patience=float("inf"), extra=0):
        ...     outcome = simulate(waiting, straggling, num_machines=6, num_parts=4)
        ...     print(f"{outcome.percentile(99):.1f}")
        3.6
        42.2
    """
    for argument, value in (
        ("num_machines", num_machines),
        ("num_parts", num_parts),
        ("num_requests", num_requests),
    ):
        count("simulate", argument, value)
    instance("simulate", "conditions", conditions, Conditions)
    real("simulate", "load", load, "in (0, 1)", lambda x: 0 < x < 1)
    gap = conditions.mean() * num_parts / (num_machines * load)
    arrivals = np.cumsum(np.random.default_rng([seed, 0]).exponential(gap, num_requests)).tolist()
    num_rows, unit_rows = num_parts * _ROWS, 1
    first = [tuple(range(i, i + _ROWS)) for i in range(0, num_rows, _ROWS)]
    needed = num_rows
    if getattr(policy, "at_once", False):
        columns = count("simulate", "num_workers", num_workers or num_machines, least=num_parts)
        needed, unit_rows = columns - (getattr(policy, "num_stragglers", 0) or 0), _ROWS
        first = [(column,) for column in range(columns)]
    inputs = num_rows // unit_rows
    history = History() if history is None else history
    generator = torch.Generator().manual_seed(seed)
    latencies, predicted = np.zeros(num_requests), np.zeros(num_requests)
    ended: Counter[str] = Counter()

    def arrive(number: int, arrival: float) -> _Open:
        call = _Open(
            number,
            arrival,
            policy.decide(
                history,
                first,
                needed=needed,
                unit_rows=unit_rows,
                since=arrival,
                idle=cluster.free,
            ),
        )
        if conditions.delays is not None:
            call.delays = conditions.delays.sample(num_machines, generator).tolist()
        return call

    def closed(call: _Open, how: Ended) -> None:
        latencies[call.number] = cluster.now - call.arrival
        ended[how.reason] += 1
        if how.reason != "complete":
            answered = {unit % inputs for units in call.answered for unit in units}
            predicted[call.number] = 1 - len(answered) / inputs

    faults = _Faults(conditions, num_machines, num_requests, len(first), gap, seed)
    cluster = _Cluster(conditions, faults, unit_rows, closed, seed)
    cluster.run(arrivals, arrive)
    return Outcome(
        latencies,
        predicted,
        cluster.begun_parts / (num_requests * num_parts),
        cluster.begun_rows / (num_requests * num_rows),
        ended,
    )
