"""The redundancy that meets a service-level objective at least work, by simulation."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._arguments import between_0_and_1, count, positive, probability
from .._table import Part, Table
from ..scheduling._latency_history import History
from ..scheduling.policy import Waiting, hedging_threshold
from ..stragglers import Stragglers
from ..verification._record import Record
from ..verification._scores import ODD_PARTS, ODD_ROWS, Results
from ..verification._verifier import Verifier
from ._untuned import BUDGETS, PARTS, SHARES
from .scores import grouped
from .simulation import OVERHEAD, Conditions, simulate

Seconds = NDArray[np.float64]

#: Conditions by name. A part that straggles runs 5 to 50 times as long.
CONDITIONS = {
    "calm": Conditions(),
    "straggling": Conditions(straggling=0.03),
    "slow": Conditions(slow=0.05),
    "dead": Conditions(dead=0.01),
    "bursts": Conditions(bursts=300.0),
    "mix": Conditions(straggling=0.01, slow=0.05, dead=0.001, bursts=300.0),
}
#: The share of estimated rows with the right class: LeNet-5's digits without results, estimated
#: from 1,024 remembered answers (``python -m benchmarks serving``).
RIGHT = 0.9318
_KINDS = ("no redundancy", "hedged", "everything twice", "estimated", "coded")
_IN_TIME = 0.999  # the share of requests that must meet the deadline
_FEWEST = 100  # the least number of latencies, whose quartiles are then known to some per cent


class Option(NamedTuple):
    """A policy, and its simulated outcome."""

    kind: str  #: "no redundancy", "hedged", "everything twice", "estimated" or "coded"
    name: str  #: a description of the policy
    use: str  #: Python code
    parts: int  #: the number of parts of a request, K with a code
    asked: int  #: the number of parts that are asked for at once, N with a code
    latencies: Seconds  #: sorted seconds ``[num_requests]``
    slowest: float  #: the seconds within which 99.9 % of the requests are answered
    late: float  #: the share of requests that miss the deadline, or get too few results
    work: float  #: the number of computed rows per row
    estimated: float  #: the share of estimated rows
    meets: bool  #: true if the policy meets the objective

    @property
    def _rank(self) -> tuple[float, ...]:
        """A key that is smallest for the best option: its work or, if it fails, its lateness."""
        # Work to three digits: of options that differ by less, the one with the shorter tail wins.
        return not self.meets, round(self.work, 3) if self.meets else self.late, self.slowest


class Plan(NamedTuple):
    """The result of :func:`plan`; ``print`` shows it as a table in 80 columns."""

    options: Sequence[Option]  #: each policy with each number of parts
    deadline: float  #: seconds within which 99.9 % of the requests are to be answered
    accuracy: float  #: the least share of rows with the model's own class
    workers: str  #: the workers and their load

    @property
    def best(self) -> dict[str, Option]:
        """By kind, the option that meets the objective at least work, or else is least late."""
        kinds = grouped(self.options, lambda option: option.kind)
        return {kind: min(kinds[kind], key=lambda x: x._rank) for kind in _KINDS if kind in kinds}

    def __str__(self) -> str:
        lines = [f"{'':34}{'K':>3}{'N':>3}{'p99.9':>9}{'late':>8}{'work':>7}{'estimated':>11}"]
        for kind, option in self.best.items():
            text = f"  {option.name:32}{option.parts:3}{option.asked:3}"
            text += f"{1e3 * option.slowest:7.1f}ms{option.late:8.2%}{option.work:7.3f}"
            lines += [kind, f"{text}{option.estimated:11.3%}{'  yes' if option.meets else '   no'}"]
        what = f"99.9 % within {1e3 * self.deadline:g} ms and {self.accuracy:.2%} of the rows right"
        least = min(self.best.values(), key=lambda option: option._rank[:2])
        if not least.meets:
            return "\n".join([*lines, "", f"Nothing meets {what}."])
        lines += ["", f"{what}: least work by {least.kind}, {least.name}.", f"Use {least.use}."]
        if least.kind not in ("estimated", "coded"):
            lines.append("Neither estimates nor codes are worth it here.")
        return "\n".join(lines)


class _Tail(Stragglers):
    """Further seconds of a part, drawn from measured ones."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self._seconds = torch.from_numpy(seconds)

    def _draw(self, num_workers: int, generator: torch.Generator) -> torch.Tensor:
        return self._seconds[torch.randint(len(self._seconds), (num_workers,), generator=generator)]


def read_latencies(path: Path) -> Seconds:
    """Return ``[n]`` seconds, n >= 100, from the first column of a CSV file, under any heading."""
    with path.open() as stream:
        heading = int(stream.readline().lstrip()[:1].isalpha())
    seconds: Seconds = np.genfromtxt(path, delimiter=",", usecols=[0], ndmin=1, skip_header=heading)
    if not np.all((seconds > 0) & (seconds < np.inf)):
        raise ValueError("latencies must be positive, finite seconds, one number per line")
    if len(seconds) < _FEWEST:
        raise ValueError(f"plan: there must be at least {_FEWEST} latencies, got {len(seconds)}")
    return seconds


def measured(seconds: Seconds, part: float) -> Conditions:
    """Return the conditions of measured latencies, for parts of so many median seconds.

    The lower half of the latencies defines a lognormal body. Latencies above the hedging threshold
    are the tail: their seconds beyond the median do not depend on the size of a part.
    """
    lower = np.quantile(seconds, 0.25)
    median = np.median(seconds)
    spread = math.log(median / lower) / 0.6745  # the normal distribution's upper quartile
    history = History(len(seconds))
    history.add([(1, each) for each in seconds.tolist()], None)
    threshold = hedging_threshold(history, 1)
    beyond = np.where(seconds > threshold, seconds - median, 0.0)
    return Conditions(spread=spread, delays=_Tail(beyond / part))


def plan(
    conditions: Conditions | Seconds,
    deadline: float,
    *,
    accuracy: float = 0.99,
    num_workers: int = 6,
    load: float = 0.3,
    parts: int = 4,
    median: float | None = None,
    verify: float = 0.0,
    num_requests: int = 5_000,
    seed: int = 0,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Plan:
    """Simulate policies with and without hedging, copies, estimates and codes, in some 20 s.

    Args:
        conditions: the workers' conditions, or float64 ``[n]``, measured seconds of parts.
        deadline: seconds within which 99.9 % of the requests are to be answered, positive.
        accuracy: the least share of rows that are right; estimated ones are by :data:`RIGHT`.
        num_workers, parts: at least 1, or 2 workers with ``verify``; parts of measured requests.
        load: the share of the workers' time that requests take without redundancy.
        median: with conditions, and required with them: median seconds per part, positive.
        verify: the share of rows that a second worker computes. Policies with codes or copies are
        left out.
        num_requests, seed: the requests under each policy, at least 1,000; the seed of all draws.
        progress: called with the list of policies, returns them one by one, such as ``tqdm.tqdm``.
    """
    positive("plan", "deadline", deadline)
    probability("plan", "accuracy", accuracy)
    between_0_and_1("plan", "load", load)
    probability("plan", "verify", verify)
    least = {"parts": (parts, 1), "num_requests": (num_requests, 1000), "seed": (seed, 0)}
    least["num_workers with verify" if verify else "num_workers"] = num_workers, 2 if verify else 1
    for argument, (value, bound) in least.items():
        count("plan", argument, value, least=bound)
    if isinstance(conditions, Conditions):
        scale = positive("plan", "median", median)
    else:
        scale = float(np.median(conditions))
        if scale > 100 * deadline:
            requirement = f"in the median at most 100 deadlines of {deadline:g}"
            raise ValueError(f"plan: latencies must be seconds, {requirement}, got {scale:g}")
    options = []
    policies = [*_policies(num_workers, deadline, bool(verify))]
    for kind, name, k, n, waiting in progress(policies):
        part = scale * (OVERHEAD + (1 - OVERHEAD) * parts / k)
        # Simulated times are in multiples of a part. Calls that are late go on, to see how late.
        until = None
        if kind == "estimated":
            until = (waiting.deadline or 0.0) / part
        policy: Waiting | Verified = dataclasses.replace(waiting, deadline=until)
        if verify:
            policy = Verified(policy, num_workers, verify, seed=seed)
        given = conditions if isinstance(conditions, Conditions) else measured(conditions, part)
        outcome = simulate(
            policy,
            given,
            num_workers=num_workers,
            num_parts=k,
            num_columns=n,
            load=load,
            num_requests=num_requests,
            seed=seed,
        )
        latencies = np.sort(outcome.latencies * part)
        slowest = float(np.quantile(latencies, _IN_TIME))
        # A call raises if fewer rows came than the policy asks of it; a code decodes one result.
        enough = waiting._least(2 * k, 1, by_rows=n == k) / (2 * k)
        raised = 1 - outcome.estimated < enough - 1e-9
        late = float((raised | (outcome.latencies * part > deadline)).mean())
        estimated = float(np.where(raised, 0.0, outcome.estimated).mean())
        meets = late <= 1 - _IN_TIME + 1e-9 and 1 - estimated * (1 - RIGHT) >= accuracy
        use = f"code=codes.RegressionCode({k}, {n})"
        if n == k:
            use = f"parts={k}"
        if verify:
            use += f", verify={verify:g}"
        use = f"CodedWrapper(model, {use}, workers=pool, waiting={waiting})"
        options.append(
            Option(kind, name, use, k, n, latencies, slowest, late, outcome.work, estimated, meets)
        )
    return Plan(options, deadline, accuracy, f"{num_workers} workers, load {load:g}")


def _policies(
    num_workers: int, deadline: float, verified: bool
) -> Iterator[tuple[str, str, int, int, Waiting]]:
    """Yield the kind, the name, K, N and the policy, whose deadline is in seconds."""
    first = functools.partial(Waiting.first, deadline=deadline)
    exact = Waiting(deadline, estimate=False, hedge_budget=0)
    for k in (k for k in PARTS if k <= num_workers):
        yield "no redundancy", "wait for all", k, k, exact
        for budget in BUDGETS:
            name = f"hedge, at most {budget:.0%} more work"
            yield "hedged", name, k, k, dataclasses.replace(exact, hedge_budget=budget)
        for share in SHARES:
            until = float(f"{share * deadline:.4g}")
            name = f"hedge, estimate at {1e3 * until:.4g} ms"
            yield "estimated", name, k, k, Waiting(deadline=until)
        if verified:
            continue
        if 2 * k <= num_workers:
            yield "everything twice", "first answers", k, 2 * k, first(1)
        for n in range(k + 1, min(2 * k, num_workers + 1)):
            yield "coded", f"all at once, first {k} of {n}", k, n, first(n - k)


class Verified:
    """A policy, and verification of a share of rows, on simulated workers that are all honest."""

    at_once = False

    def __init__(self, waiting: Any, num_workers: int, share: float = 0.02, seed: int = 0) -> None:
        self.waiting = waiting
        pool = SimpleNamespace(places=range(num_workers), exclude=None, mixed=False)
        self.record = Record(pool, share, random.Random(seed))

    def decide(self, history: History, table: Table) -> float:
        """Let the policy decide, and then the verification of the same call."""
        if table.verdict is None:
            bounded = self.waiting.deadline is not None
            verifier = Verifier(self.record, bounded=bounded)
            verifier.results = _Right(self.record)
            verifier.is_scored = False
            verifier.begin(table)
            table.verdict = verifier
        until = self.waiting.decide(history, table)
        return float(min(until, table.verdict.decide(history, table)))


class _Right(Results):
    """Results that do not differ, some of which look odd by chance."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.scores)
        self._draw = record.random.random

    def odd(self, answers: Mapping[int, Part]) -> set[int]:
        of_parts = {part: row for row, part in answers.items()}.values()
        odd = {row for row in answers if self._draw() < ODD_ROWS}
        return odd.union(row for row in of_parts if self._draw() < ODD_PARTS)
