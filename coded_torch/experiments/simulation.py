"""Simulation of waiting policies: thousands of open calls on one clock.

:func:`simulate` drives the policy that a wrapper drives over real workers. The unit
of time is the median of a part of the first ask without faults.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._arguments import (
    between_0_and_1,
    count,
    instance,
    nonnegative,
    positive,
    probability,
    real,
)
from .._table import Began, Part, Reply, Table, WorkerError
from ..scheduling._latency_history import History
from ..stragglers import Stragglers
from ..workers._local import VirtualPool

# These numbers define the conditions of benchmarks/waiting.py. Times are in medians of a part.
#: The share of a part's time that does not depend on its number of rows.
OVERHEAD = 0.1
_PART_ROWS = 12  # rows of a part of the first ask; 2, 3 and 4 divide it
_STRAGGLING_BY = 5.0, 50.0  # the factors of a straggling part, log-uniform
_SLOW_BY = 3.0, 10.0  # the factors of a slow worker, log-uniform
_SPELL = 100.0  # the mean time that a worker stays slow, in mean times between two calls
_PAUSE = 10.0  # the time for which a burst stops workers
_BURST_SHARE = 0.2  # the share of the workers that one burst stops


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The running times of parts, and the faults of workers.

    A part with the share r of the rows of a part of the first ask runs for ``0.1 + 0.9 r``, times a
    lognormal factor.
    """

    spread: float = 0.15  #: the standard deviation of the factor's logarithm, at least 0
    straggling: float = 0.0  #: the probability that a part runs 5 to 50 times as long (log-uniform)
    #: The share of time in which a worker is 3 to 10 times as slow (log-uniform), in exponential
    #: spells of 100 mean times between two calls.
    slow: float = 0.0
    dead: float = 0.0  #: the probability that a part fails
    dead_after: float = 100.0  #: the time after which a part fails, positive
    #: The mean time between bursts (exponential). A burst stops a fifth of the workers, which are
    #: side by side, for 10.
    bursts: float = math.inf
    #: Further time, drawn once per call for each worker. An infinite delay fails a part.
    delays: Stragglers | None = None

    def __post_init__(self) -> None:
        nonnegative(self, "spread", self.spread)
        for argument in ("straggling", "slow", "dead"):
            probability(self, argument, getattr(self, argument))
        positive(self, "dead_after", self.dead_after)
        real(self, "bursts", self.bursts, "positive", lambda x: x > 0)
        instance(self, "delays", self.delays, Stragglers, optional=True)

    def mean(self) -> float:
        """Return the mean time of a part of the first ask, without pauses and ``delays``."""
        body = math.exp(self.spread**2 / 2)
        for share, (low, high) in ((self.straggling, _STRAGGLING_BY), (self.slow, _SLOW_BY)):
            body *= 1 + share * ((high - low) / math.log(high / low) - 1)
        return (1 - self.dead) * body + self.dead * self.dead_after


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of simulated calls under one policy."""

    latencies: NDArray[np.float64]  #: ``[num_requests]``, arrival to end, in medians of a part
    estimated: NDArray[np.float64]  #: ``[num_requests]``, the share of rows that no worker answered
    calls: float  #: the parts that workers began, in multiples of the parts of the first asks
    work: float  #: the rows that workers began, in multiples of the rows of all batches
    ended: Counter[str]  #: the number of calls that ended for each reason

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latencies."""
        return float(np.percentile(self.latencies, percent))


def simulate(
    policy: Any,
    conditions: Conditions,
    *,
    num_workers: int,
    num_parts: int,
    load: float = 0.3,
    num_requests: int = 10_000,
    num_columns: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Simulate calls on workers that compute one part at a time, from one queue.

    Calls arrive as a Poisson process. All policies meet the same faults under the same seed.

    Args:
        policy: a :class:`~coded_torch.Waiting`, or another object that decides as it does.
        conditions: the running times and faults.
        num_workers, num_parts: at least 1: workers, and K, the parts of the first ask.
        load: the share of the workers' time that the first asks take, in (0, 1).
        num_requests, seed: the number of calls, at least 1; the seed of all draws.
        num_columns: N, for a policy that asks all N columns at once, of which column n holds the
            share ``n mod K`` of the rows. Defaults to ``num_workers``.
    """
    count("simulate", "num_workers", num_workers)
    count("simulate", "num_parts", num_parts)
    count("simulate", "num_requests", num_requests)
    instance("simulate", "conditions", conditions, Conditions)
    between_0_and_1("simulate", "load", load)
    num_rows = num_parts * _PART_ROWS
    unit_rows = 1
    first = [tuple(range(i, i + _PART_ROWS)) for i in range(0, num_rows, _PART_ROWS)]
    needed = num_rows
    if getattr(policy, "at_once", False):
        columns = count("simulate", "num_columns", num_columns or num_workers, least=num_parts)
        needed = columns - (getattr(policy, "num_stragglers", 0) or 0)
        unit_rows = _PART_ROWS
        first = [(column,) for column in range(columns)]
    num_units = num_rows // unit_rows
    gap = conditions.mean() * num_parts / (num_workers * load)
    pool = _SlowWorkers(conditions, num_workers, unit_rows, gap, seed)
    factors = pool.factors(num_requests * len(first))
    arrivals = np.cumsum(np.random.default_rng([seed, 0]).exponential(gap, num_requests)).tolist()
    history = History()

    def arrive(number: int) -> None:
        """Begin a call, and plan the arrival of the next one."""
        table = Table(
            first=first, needed=needed, unit_rows=unit_rows, since=pool.clock, idle=pool.num_idle
        )
        own = factors[number * len(first) : (number + 1) * len(first)]
        decide = functools.partial(policy.decide, history, table)
        _Call(pool, number, table, decide, own, pool.delays()).step()
        if number + 1 < num_requests:
            pool.at(arrivals[number + 1], arrive, number + 1)

    pool.at(arrivals[0], arrive, 0)
    while len(pool.ended) < num_requests:
        pool.go_on()
    latencies = np.zeros(num_requests)
    estimated = np.zeros(num_requests)
    for call, at in pool.ended:
        latencies[call.number] = at - call.table.since
        if call.table.end != "complete":
            units = {unit % num_units for unit in call.table.answered}
            estimated[call.number] = 1 - len(units) / num_units
    calls = pool.begun_parts / (num_requests * num_parts)
    work = pool.begun_rows / (num_requests * num_rows)
    reasons = Counter(call.table.end for call, _ in pool.ended)
    return Outcome(latencies, estimated, calls, work, reasons)


@dataclasses.dataclass(eq=False, slots=True)
class _Call:
    """A call, with the time that its policy waits for."""

    pool: "_SlowWorkers"
    number: int
    table: Table
    decide: Callable[[], float]
    factors: Sequence[float]  # factors of the running times in the first ask
    delays: Sequence[float]  # a delay for each worker
    asked: int = 0  # the parts that are in the queue, or were
    until: float = math.inf
    closed: bool = False

    def hear(self, event: Began | Reply) -> None:
        if not self.closed:
            self.step(event)

    def step(self, *events: Began | Reply) -> None:
        """Give events to the policy, and carry out its decisions until it waits or ends."""
        table = self.table
        pool = self.pool
        if self.asked:
            table.hear(events, self.until)
        until = self.decide()
        while until == -math.inf and not table.end:
            self._ask()
            table.hear((), until)
            until = self.decide()
        if table.end:
            self.closed = True
            pool.ended.append((self, pool.clock))
            return
        self._ask()
        if until != self.until or not events:
            self.until = until
            if until < math.inf:
                pool.at(max(until, pool.clock), self._wake)

    def _ask(self) -> None:
        self.pool.ask(self, self.table.parts[self.asked :])
        self.asked = len(self.table.parts)

    def _wake(self) -> None:
        if self.until <= self.pool.clock and not self.closed:
            self.step()


class _SlowWorkers(VirtualPool):
    """Workers with running times and faults under some conditions."""

    def __init__(
        self, conditions: Conditions, num_workers: int, unit_rows: int, gap: float, seed: int
    ) -> None:
        super().__init__(num_workers)
        self.conditions = conditions
        self.unit_rows = unit_rows
        self.begun_parts = 0
        self.begun_rows = 0
        self.ended: list[tuple[_Call, float]] = []  # each call and the time
        self._running: list[tuple[_Call, Part, float, bool] | None] = [None] * num_workers
        self._ends = [0.0] * num_workers  # the time at which each worker's part ends
        self._resumes = [0.0] * num_workers  # the time at which each worker's pause ends
        # Each kind of fault has numbers of its own, so that it is the same for every policy.
        self._numbers = np.random.default_rng([seed, 1])
        self._bursts = random.Random(f"{seed} bursts")
        self._numbers_of_delays = torch.Generator().manual_seed(seed)
        self._later = itertools.chain.from_iterable(iter(lambda: self.factors(1000), None))
        self._spells = [
            _spells(conditions.slow, _SPELL * gap, random.Random(f"{seed} {worker}"))
            for worker in range(num_workers)
        ]
        self._spell = [next(spells) for spells in self._spells]
        self._burst_later()

    def delays(self) -> Sequence[float]:
        """Return the delay of each worker in a new call."""
        delays = self.conditions.delays
        if not delays:
            return ()
        return delays.sample(len(self._ends), self._numbers_of_delays).tolist()

    def begin(self, worker: int, request: _Call, part: Part) -> None:
        """Begin a part, and plan its end by the factors and delays of its call and worker."""
        rows = len(part.units) * self.unit_rows
        is_first = part.number < len(request.factors)
        seconds = request.factors[part.number] if is_first else next(self._later)
        seconds *= OVERHEAD + (1 - OVERHEAD) * rows / _PART_ROWS
        while self._spell[worker][1] <= self.clock:
            self._spell[worker] = next(self._spells[worker])
        begin, _, factor = self._spell[worker]
        if begin <= self.clock:
            seconds *= factor
        if request.delays:
            seconds += request.delays[worker]
        ok = seconds < math.inf
        self._running[worker] = request, part, self.clock, ok
        self._ends[worker] = self.clock + (seconds if ok else self.conditions.dead_after)
        self.at(self._ends[worker], self._end, worker)
        self.begun_parts += 1
        self.begun_rows += rows
        request.hear(Began(part, worker, self.clock))

    def _end(self, worker: int) -> None:
        """End a worker's part, if it has one, or its pause."""
        if self._ends[worker] > self.clock:  # a burst came meanwhile
            self.at(self._ends[worker], self._end, worker)
            return
        self.idle.append(worker)
        running = self._running[worker]
        self._running[worker] = None
        if running is not None:
            call, part, began, ok = running
            error = None
            if not ok:
                error = WorkerError(part.number, worker, "died", "died")
            call.hear(Reply(part, worker, self.clock, self.clock - began, error=error))

    def _burst(self) -> None:
        """Stop neighbouring workers for a time, and plan the next burst."""
        num_workers = len(self._ends)
        resume = self.clock + _PAUSE
        first = self._bursts.randrange(num_workers)
        for i in range(first, first + max(1, round(num_workers * _BURST_SHARE))):
            worker = i % num_workers
            if worker in self.idle:
                self.idle.remove(worker)
                self._ends[worker] = self.clock
                self.at(resume, self._end, worker)
            self._ends[worker] += resume - max(self.clock, self._resumes[worker])
            self._resumes[worker] = resume
        self._burst_later()

    def _burst_later(self) -> None:
        if self.conditions.bursts < math.inf:
            gap = self._bursts.expovariate(1.0) * self.conditions.bursts
            self.at(self.clock + gap, self._burst)

    def factors(self, size: int) -> list[float]:
        """Return the factors of the running times of parts; infinite for parts that fail."""
        conditions = self.conditions
        numbers = self._numbers
        factors = np.exp(conditions.spread * numbers.standard_normal(size))
        low, high = _STRAGGLING_BY
        by = low * (high / low) ** numbers.random(size)
        factors = np.where(numbers.random(size) < conditions.straggling, factors * by, factors)
        dead = numbers.random(size) < conditions.dead
        return list(np.where(dead, math.inf, factors).tolist())


def _spells(slow: float, mean: float, draws: random.Random) -> Iterator[tuple[float, float, float]]:
    """Yield the spells in which a worker is slow: begin, end and factor."""
    if not slow:
        yield math.inf, math.inf, 1.0
    low, high = _SLOW_BY
    end = 0.0
    is_slow = draws.random() < slow
    while True:
        begin = end
        if not is_slow:
            begin = end + draws.expovariate(1.0) * mean * (1 - slow) / slow
        end = begin + draws.expovariate(1.0) * mean
        is_slow = False
        yield begin, end, low * (high / low) ** draws.random()
