"""Which redundancy meets a service-level objective at least work, by simulation.

Policies run on :mod:`coded_torch.scheduling.simulation`, on machines whose latencies were measured
or follow a law. What is predicted counts as right as often as :data:`PREDICTED` says.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .._arguments import count, positive, probability, real
from ..demo.hedging import HedgeOnce, Unsplit
from ..scheduling.simulated_pool import PART_ROWS
from ..scheduling.simulation import Conditions, Outcome, simulate
from ..scheduling.waiting import History, Waiting
from ..stragglers import Stragglers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "LAWS",
    "PREDICTED",
    "Goal",
    "Option",
    "draw",
    "format_options",
    "plan",
    "read_latencies",
]

#: Built-in laws; a part that straggles takes 5 to 50 times as long.
LAWS = {
    "calm": Conditions(),
    "straggling": Conditions(straggling=0.03),
    "slow": Conditions(slow=0.05),
    "dead": Conditions(dead=0.01),
    "bursts": Conditions(bursts=300.0),
    "mix": Conditions(straggling=0.01, slow=0.05, dead=0.001, bursts=300.0),
}
#: Of LeNet-5's digits whose results are lost, the share that is predicted to be of the right class,
#: by the number of answers that are remembered: as ``python -m benchmarks serving`` measured it.
PREDICTED = {0: 0.1, 32: 0.2313, 64: 0.3125, 128: 0.4833, 256: 0.6521, 512: 0.7812, 1024: 0.8542}
_KINDS = ("uncoded", "hedged", "replicated", "coded")
_PARTS = (1, 2, 4, 8)
_SHARE = 0.999  # of the requests, that must be in time
_FEWEST = 100  # latencies
_FIRST, _APART = 0.1, 3.0  # share of the latencies that is early; times the longest later one


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is asked of a service, and what it has.

    Args:
        deadline: seconds, within which 99.9 % of the requests are to be answered.
        accuracy: the least share of rows answered as rightly as by the model itself, in [0, 1].
        num_machines: machines.
        load: the share of the machines' time that requests take, each computed once, in (0, 1).
        num_data: K of the parts whose latencies are known.
        known: answers that are remembered, to predict from.

    Raises:
        TypeError, ValueError: an argument is of another kind than said, or out of range.
    """

    deadline: float
    accuracy: float = 0.99
    num_machines: int = 6
    load: float = 0.3
    num_data: int = 4
    known: int = 1024

    def __post_init__(self) -> None:
        positive(self, "deadline", self.deadline)
        probability(self, "accuracy", self.accuracy)
        count(self, "num_machines", self.num_machines)
        real(self, "load", self.load, "in (0, 1)", lambda x: 0 < x < 1)
        count(self, "num_data", self.num_data)
        count(self, "known", self.known, least=0)


@dataclasses.dataclass(frozen=True)
class Option:
    """A policy, and how it did.

    Attributes:
        kind: "uncoded", "hedged", "replicated" or "coded".
        name: what it does.
        num_data: K, parts of a request.
        num_workers: N, columns that are asked for; K where each part is asked for once.
        num_stragglers: S, of N, that are done without from the start.
        deadline: seconds, at which it predicts; infinite: never.
        fence: seconds after which a part is asked again; infinite: never.
        latencies: of the requests, in seconds, sorted.
        late: share of the requests that are not in time.
        work: rows computed per row.
        predicted: share of rows.
        accuracy: share of rows answered as rightly as by the model itself.
        meets: whether it meets the goal.
    """

    kind: str
    name: str
    num_data: int
    num_workers: int
    num_stragglers: int
    deadline: float
    fence: float
    latencies: np.ndarray[tuple[int], np.dtype[np.float64]] = dataclasses.field(repr=False)
    late: float
    work: float
    predicted: float
    accuracy: float
    meets: bool


class _Tail(Stragglers):
    """Further seconds of a part, drawn from measured ones."""

    def __init__(self, seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        super().__init__()
        self._seconds = torch.from_numpy(seconds)

    def _draw(self, num_workers: int, generator: torch.Generator) -> torch.Tensor:
        return self._seconds[torch.randint(len(self._seconds), (num_workers,), generator=generator)]


def read_latencies(path: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Seconds, from the first column of a CSV file; a first line that is no number is a heading.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds fewer than 100 numbers, or something else.
    """
    with path.open(newline="") as stream:
        rows = [row for row in csv.reader(stream) if row]
    numbers = []
    for line, row in enumerate(rows):
        try:
            numbers.append(float(row[0]))
        except ValueError:
            if line:
                raise ValueError(
                    f"line {line + 1} must begin with seconds, got {row[0]!r:.40}"
                ) from None
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError("latencies must be positive and finite")
    if len(numbers) < _FEWEST:
        raise ValueError(f"there must be at least {_FEWEST} latencies, got {len(numbers)}")
    return np.array(numbers)


def slow_start(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float]:
    """Return the latencies at the beginning that are far longer than all later ones.

    They are probably of machines that loaded the model, which later calls do not wait for.
    """
    first, later = np.split(seconds, [int(_FIRST * len(seconds))])
    return [float(x) for x in first if x > _APART * later.max()]


def measured(
    seconds: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, Callable[[float], Conditions]]:
    """The median part, and conditions for parts of so many times that, after measured latencies.

    The lower half makes the body, a lognormal; what is beyond the fence that it implies, as in
    :class:`~coded_torch.nn.Waiting`, is its tail, whose seconds do not depend on a part's size.
    """
    lower, median = np.quantile(seconds, 0.25), float(np.median(seconds))
    spread = math.log(median / lower) / 0.6745
    fence = median * max(1.5, (median / lower) ** 4.45)
    tail = np.where(seconds > fence, seconds - median, 0.0)
    return median, lambda part: Conditions(spread=spread, delays=_Tail(tail / part))


def plan(
    goal: Goal,
    law: Conditions | np.ndarray[tuple[int], np.dtype[np.float64]],
    *,
    median: float | None = None,
    num_requests: int = 5_000,
    seed: int = 0,
) -> Iterator[Option]:
    """Simulate uncoded, hedged, replicated and coded policies.

    Args:
        goal: to be met.
        law: what machines do: measured seconds of parts, or conditions.
        median: seconds that a part takes, under conditions.
        num_requests: under each policy.
        seed: of everything.

    Yields:
        Each policy with each number of parts, uncoded ones first.

    Note:
        Seconds, for some sixty policies.
    """
    if isinstance(law, Conditions):
        scale = positive("plan", "median", median)
        scaled: Callable[[float], Conditions] = functools.partial(_same, law)
    else:
        scale, scaled = measured(law)
        if scale > 100 * goal.deadline:
            raise ValueError(
                f"latencies must be seconds within reach of the deadline, {goal.deadline:g}, got a "
                f"median of {scale:g}"
            )
    for kind in _KINDS:
        for k in _PARTS:
            if k > goal.num_machines:
                continue
            # Of a part's time a tenth does not depend on its rows, see Conditions.
            part = scale * (0.1 + 0.9 * goal.num_data / k)
            for name, n, policy, until in _policies(kind, k, goal, part):
                history = History()
                outcome = simulate(
                    policy,
                    scaled(part),
                    num_machines=goal.num_machines,
                    num_parts=k,
                    load=goal.load,
                    num_requests=num_requests,
                    num_workers=n,
                    history=history,
                    seed=seed,
                )
                fence = _fence(policy, history) * part
                lost = policy.num_stragglers or 0
                yield _option(goal, outcome, part, kind, name, (k, n, lost), until, fence)


def _same(conditions: Conditions, part: float) -> Conditions:
    """Laws that are multiples of a part are the same for parts of any length."""
    return conditions


def _policies(
    kind: str, k: int, goal: Goal, part: float
) -> Iterator[tuple[str, int, Waiting, float]]:
    never = math.inf
    if kind == "uncoded":
        yield "wait for all", k, Unsplit(patience=never, extra=0), never
    elif kind == "hedged":
        for medians in (1.2, 1.5, 2.0, 3.0):
            yield f"one hedge at {medians:g} medians", k, HedgeOnce(medians=medians), never
        yield "three re-asks", k, Waiting(predict=False), never
    elif kind == "replicated":
        if 2 * k <= goal.num_machines:
            yield "all twice, first answers", 2 * k, Waiting.first(1), never
    else:
        for share in (0.5, 0.7, 0.9):
            until = share * goal.deadline
            name = f"re-ask, predict at {1e3 * until:.4g} ms"
            yield name, k, Waiting(deadline=until / part), until
        for n in range(k + 1, min(2 * k, goal.num_machines + 1)):
            yield f"all at once, first {k} of {n}", n, Waiting.first(n - k), never


def _fence(policy: Waiting, history: History) -> float:
    """In medians of a part."""
    if isinstance(policy, HedgeOnce) and policy.medians is not None:
        return policy.medians * history.part(PART_ROWS)
    if policy.at_once or policy.extra == 0:
        return math.inf
    return history.fence(PART_ROWS)


def _option(
    goal: Goal,
    outcome: Outcome,
    part: float,
    kind: str,
    name: str,
    sizes: tuple[int, int, int],
    until: float,
    fence: float,
) -> Option:
    latencies = np.sort(outcome.latencies * part)
    late = float((latencies > goal.deadline).mean())
    predicted = float(outcome.predicted.mean())
    accuracy = 1 - predicted * (1 - _rightly(goal.known))
    meets = late <= 1 - _SHARE + 1e-9 and accuracy >= goal.accuracy
    return Option(
        kind, name, *sizes, until, fence, latencies, late, outcome.work, predicted, accuracy, meets
    )


def _rightly(known: int) -> float:
    """The share of predicted rows that are right."""
    return float(np.interp(known, list(PREDICTED), list(PREDICTED.values())))


def best(options: Sequence[Option]) -> dict[str, Option]:
    """Of each kind the one that meets the goal at least work, else the one that comes nearest."""
    found: dict[str, Option] = {}
    for option in options:
        old = found.get(option.kind)
        if old is None or _rank(option) < _rank(old):
            found[option.kind] = option
    return found


def _rank(option: Option) -> tuple[float, ...]:
    slowest = float(np.quantile(option.latencies, _SHARE))
    # Work to three digits: what differs by less is chosen by its tail.
    return (0, round(option.work, 3), slowest) if option.meets else (1, option.late, slowest)


def format_options(goal: Goal, options: Sequence[Option]) -> str:
    """A table of the best of each kind, in 80 columns, and what it says."""
    found = best(options)
    lines = [f"{'':34}{'K':>3}{'N':>3}{'p99.9':>9}{'late':>8}{'work':>7}{'predicted':>11}{'':>5}"]
    for kind, option in found.items():
        slowest = 1e3 * float(np.quantile(option.latencies, _SHARE))
        lines += [
            kind,
            f"  {option.name:32}{option.num_data:3}{option.num_workers:3}{slowest:7.1f}ms"
            f"{option.late:8.2%}{option.work:7.3f}{option.predicted:11.3%}"
            f"{'  yes' if option.meets else '   no'}",
        ]
    return "\n".join([*lines, "", _advice(goal, found)])


def _advice(goal: Goal, found: dict[str, Option]) -> str:
    what = f"99.9 % within {1e3 * goal.deadline:g} ms and {goal.accuracy:.2%} of the rows right"
    meeting = [option for option in found.values() if option.meets]
    if not meeting:
        return f"Nothing meets {what}."
    chosen = min(meeting, key=lambda option: (_rank(option)[1], _KINDS.index(option.kind)))
    fence = "" if chosen.fence == math.inf else f", fence {1e3 * chosen.fence:.1f} ms"
    until = "" if chosen.deadline == math.inf else f", deadline {1e3 * chosen.deadline:.4g} ms"
    sizes = f"K = {chosen.num_data}, N = {chosen.num_workers}, S = {chosen.num_stragglers}"
    lines = [f"{what}: least work by {chosen.name}, {sizes}{fence}{until}."]
    if use := _use(goal, chosen):
        lines.append(f"In Python: {use}.")
    if chosen.kind != "coded":
        lines.append("Coding is not worth it here.")
    return "\n".join(lines)


def _use(goal: Goal, option: Option) -> str:
    """What to write for an option; "" of what is only there to compare with."""
    if option.kind == "coded" and option.num_stragglers:
        waiting = f"Waiting.first({option.num_stragglers})"
    elif option.kind == "coded":
        waiting = f"Waiting(deadline={option.deadline:.4g})"
    elif option.kind == "hedged" and "re-asks" in option.name:
        waiting = "Waiting(predict=False)"
    else:
        return ""
    num_workers = option.num_workers if option.num_stragglers else goal.num_machines
    return f"KernelCode({option.num_data}, {num_workers}), {waiting}"


def draw(goal: Goal, options: Sequence[Option]) -> Figure:
    """The share of requests that take longer than a time, against that time, for each kind."""
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, option in best(options).items():
        slower = np.arange(len(option.latencies), 0, -1) / len(option.latencies)
        label = f"{kind}: {option.name}, K = {option.num_data}"
        axes.step(1e3 * option.latencies, slower, label=label, where="post")
    axes.axvline(1e3 * goal.deadline, color="0.4", linestyle=":", label="deadline")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("latency from arrival, ms")
    axes.set_ylabel("share of requests that take longer")
    axes.set_title(f"{goal.num_machines} machines, load {goal.load:g}, simulated")
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure
