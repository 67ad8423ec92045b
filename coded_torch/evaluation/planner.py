"""The redundancy that meets a service-level objective at least work, by simulation.

Policies run on :mod:`coded_torch.scheduling.simulation`, on workers whose latencies were measured
or follow a law. Predicted rows count as right as often as :data:`PREDICTED` says.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from .._arguments import count, positive, probability, real
from ..scheduling.simulation import OVERHEAD, Conditions, simulate
from ..scheduling.waiting import Waiting
from ..stragglers import Stragglers
from ..verification.simulated import Verified

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Seconds: TypeAlias = NDArray[np.float64]

__all__ = ["LAWS", "PREDICTED", "Goal", "Option", "best", "draw", "format_options", "plan"]
__all__ += ["read_latencies"]

#: Conditions by name. A part that straggles runs 5 to 50 times as long.
LAWS = {
    "calm": Conditions(),
    "straggling": Conditions(straggling=0.03),
    "slow": Conditions(slow=0.05),
    "dead": Conditions(dead=0.01),
    "bursts": Conditions(bursts=300.0),
    "mix": Conditions(straggling=0.01, slow=0.05, dead=0.001, bursts=300.0),
}
#: The share of predicted rows with the right class, by the number of remembered answers: LeNet-5's
#: digits without results (``python -m benchmarks serving``).
PREDICTED = {0: 0.1, 32: 0.2313, 64: 0.3125, 128: 0.4833, 256: 0.6521, 512: 0.7812, 1024: 0.8542}
_KINDS = ("no redundancy", "hedged", "everything twice", "predicted", "coded")
# The policies that are tried, in steps of a factor of two or four; not tuned.
_PARTS = (1, 2, 4, 8)  # the numbers of parts of a request
_BUDGETS = (0.05, 0.25, 1.0)  # hedging budgets: scarce, the default, and a whole call
_SHARES = (0.5, 0.7, 0.9)  # shares of the deadline after which missing rows are predicted
_IN_TIME = 0.999  # the share of requests that must meet the deadline
_FEWEST = 100  # the least number of latencies, whose quartiles are then known to some per cent


@dataclasses.dataclass(frozen=True)
class Goal:
    """The objective of a service, and its means.

    Args:
        deadline: seconds within which 99.9 % of the requests are to be answered, positive.
        accuracy: the least share of rows with the model's own class, in [0, 1]. Defaults to 0.99.
        num_workers: the number of workers, at least 1, or 2 with ``verify``. Defaults to 6.
        load: the share of the workers' time that requests take without redundancy, in (0, 1).
            Defaults to 0.3.
        parts: the number of parts of a request whose latencies were measured. Defaults to 4.
        known: the number of remembered answers to predict from. Defaults to 1024.
        verify: the share of rows that a second worker computes, as for
            :class:`~coded_torch.CodedWrapper`. Above 0, codes and copies of whole requests are left
            out, as they cannot be verified. Defaults to 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of its domain.
    """

    deadline: float
    accuracy: float = 0.99
    num_workers: int = 6
    load: float = 0.3
    parts: int = 4
    known: int = 1024
    verify: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "deadline", self.deadline)
        probability(self, "accuracy", self.accuracy)
        real(self, "load", self.load, "in (0, 1)", lambda x: 0 < x < 1)
        count(self, "parts", self.parts)
        count(self, "known", self.known, least=0)
        verify = probability(self, "verify", self.verify)
        workers = "num_workers with verify" if verify else "num_workers"
        count(self, workers, self.num_workers, least=2 if verify else 1)


@dataclasses.dataclass(frozen=True)
class Option:
    """A policy, and its simulated outcome."""

    kind: str  #: "no redundancy", "hedged", "everything twice", "predicted" or "coded"
    name: str  #: a description of the policy
    use: str  #: Python code
    parts: int  #: the number of parts of a request, K with a code
    asked: int  #: the number of parts that are asked for at once, N with a code
    latencies: Seconds = dataclasses.field(repr=False)  #: sorted seconds ``[num_requests]``
    late: float  #: the share of requests that miss the deadline
    work: float  #: the number of computed rows per row
    predicted: float  #: the share of predicted rows
    meets: bool  #: true if the policy meets the goal


class _Tail(Stragglers):
    """Further seconds of a part, drawn from measured ones."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self._seconds = torch.from_numpy(seconds)

    def _draw(self, num_workers: int, generator: torch.Generator) -> torch.Tensor:
        return self._seconds[torch.randint(len(self._seconds), (num_workers,), generator=generator)]


def read_latencies(path: Path) -> Seconds:
    """Read seconds from the first column of a CSV file, whose first line may be a heading.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line does not begin with a positive number, or there are fewer than 100.
    """
    with path.open(newline="") as stream:
        fields = [row[0] for row in csv.reader(stream) if row]
    numbers: list[float] = []
    for line, field in enumerate(fields, 1):
        try:
            numbers.append(float(field))
        except ValueError:
            if line > 1:
                must = f"line {line} must begin with seconds"
                raise ValueError(f"{must}, got {field!r:.40}") from None
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError("latencies must be positive and finite")
    if len(numbers) < _FEWEST:
        raise ValueError(f"there must be at least {_FEWEST} latencies, got {len(numbers)}")
    return np.array(numbers)


def measured(seconds: Seconds) -> tuple[float, Callable[[float], Conditions]]:
    """Return the median part, and the conditions of parts of another length.

    The lower half of the latencies defines a lognormal body. Latencies beyond the hedging threshold
    of this body are the tail, whose seconds do not depend on a part's size.
    """
    lower, median = np.quantile(seconds, 0.25), float(np.median(seconds))
    spread = math.log(median / lower) / 0.6745  # the normal distribution's upper quartile
    threshold = median * max(1.5, (median / lower) ** 4.45)  # the threshold of History
    tail = np.where(seconds > threshold, seconds - median, 0.0)
    return median, lambda part: Conditions(spread=spread, delays=_Tail(tail / part))


def plan(
    goal: Goal,
    law: Conditions | Seconds,
    *,
    median: float | None = None,
    num_requests: int = 5_000,
    seed: int = 0,
) -> Iterator[Option]:
    """Simulate policies without redundancy, with hedging, copies, predictions and codes.

    Args:
        goal: the objective.
        law: measured seconds of parts, or conditions.
        median: with conditions, the median seconds of a part.
        num_requests: the number of requests under each policy, at least 1,000. Defaults to 5,000.
        seed: the seed of all draws. Defaults to 0.

    Yields:
        Each policy with each number of parts. Some fifty of them take seconds.
    """
    count("plan", "num_requests", num_requests, least=1000)
    count("plan", "seed", seed, least=0)
    scaled: Callable[[float], Conditions]
    if isinstance(law, Conditions):
        conditions, scale = law, positive("plan", "median", median)
        scaled = lambda part: conditions  # noqa: E731 - laws are in multiples of a part
    else:
        scale, scaled = measured(law)
        if scale > 100 * goal.deadline:
            must = f"latencies must be seconds within reach of the deadline, {goal.deadline:g}"
            raise ValueError(f"{must}, got a median of {scale:g}")
    right = float(np.interp(goal.known, list(PREDICTED), list(PREDICTED.values())))
    for k in (k for k in _PARTS if k <= goal.num_workers):
        part = scale * (OVERHEAD + (1 - OVERHEAD) * goal.parts / k)
        for kind, name, n, waiting in _policies(k, goal):
            # Simulated times are in multiples of a part.
            until = waiting.deadline and waiting.deadline / part
            policy: Waiting | Verified = dataclasses.replace(waiting, deadline=until)
            if goal.verify:
                policy = Verified(policy, goal.num_workers, goal.verify, seed=seed)
            outcome = simulate(
                policy,
                scaled(part),
                num_workers=goal.num_workers,
                num_parts=k,
                load=goal.load,
                num_requests=num_requests,
                num_columns=n,
                seed=seed,
            )
            latencies = np.sort(outcome.latencies * part)
            late = float((latencies > goal.deadline).mean())
            predicted = float(outcome.predicted.mean())
            is_right = 1 - predicted * (1 - right) >= goal.accuracy
            how = f"parts={k}" if n == k else f"code=codes.RegressionCode({k}, {n})"
            how = f"{how}, verify={goal.verify:g}" if goal.verify else how
            use = f"CodedWrapper(model, {how}, workers=pool, waiting={waiting})"
            meets = late <= 1 - _IN_TIME + 1e-9 and is_right
            yield Option(kind, name, use, k, n, latencies, late, outcome.work, predicted, meets)


def _policies(k: int, goal: Goal) -> Iterator[tuple[str, str, int, Waiting]]:
    """Yield the kind, the name, N and the policy, whose deadline is in seconds."""
    yield "no redundancy", "wait for all", k, Waiting(predict=False, hedge_budget=0)
    for budget in _BUDGETS:
        name = f"hedge, at most {budget:.0%} more work"
        yield "hedged", name, k, Waiting(predict=False, hedge_budget=budget)
    for share in _SHARES:
        until = float(f"{share * goal.deadline:.4g}")
        name = f"hedge, predict at {1e3 * until:.4g} ms"
        yield "predicted", name, k, Waiting(deadline=until)
    if goal.verify:
        return
    if 2 * k <= goal.num_workers:
        yield "everything twice", "first answers", 2 * k, Waiting.first(1)
    for n in range(k + 1, min(2 * k, goal.num_workers + 1)):
        yield "coded", f"all at once, first {k} of {n}", n, Waiting.first(n - k)


def best(options: Sequence[Option]) -> dict[str, Option]:
    """Return for each kind the option that meets the goal at least work, or the nearest one."""
    found: dict[str, Option] = {}
    for option in sorted(options, key=lambda option: _KINDS.index(option.kind)):
        old = found.get(option.kind)
        if old is None or _rank(option) < _rank(old):
            found[option.kind] = option
    return found


def _rank(option: Option) -> tuple[float, ...]:
    slowest = float(np.quantile(option.latencies, _IN_TIME))
    # Work to three digits: of options that differ by less, the one with the shorter tail wins.
    return (0, round(option.work, 3), slowest) if option.meets else (1, option.late, slowest)


def format_options(goal: Goal, options: Sequence[Option]) -> str:
    """Return a table of the best option of each kind, in 80 columns, and a recommendation."""
    found = best(options)
    lines = [f"{'':34}{'K':>3}{'N':>3}{'p99.9':>9}{'late':>8}{'work':>7}{'predicted':>11}{'':>5}"]
    for kind, option in found.items():
        slowest = 1e3 * float(np.quantile(option.latencies, _IN_TIME))
        lines += [
            kind,
            f"  {option.name:32}{option.parts:3}{option.asked:3}{slowest:7.1f}ms"
            f"{option.late:8.2%}{option.work:7.3f}{option.predicted:11.3%}"
            f"{'  yes' if option.meets else '   no'}",
        ]
    what = f"99.9 % within {1e3 * goal.deadline:g} ms and {goal.accuracy:.2%} of the rows right"
    meeting = [option for option in found.values() if option.meets]
    if not meeting:
        return "\n".join([*lines, "", f"Nothing meets {what}."])
    chosen = min(meeting, key=lambda option: (_rank(option)[1], _KINDS.index(option.kind)))
    lines += ["", f"{what}: least work by {chosen.kind}, {chosen.name}.", f"Use {chosen.use}."]
    if goal.verify:
        lines.append("Codes are left out, as their results cannot be verified.")
    elif chosen.kind not in ("predicted", "coded"):
        lines.append("Neither predictions nor codes are worth it here.")
    return "\n".join(lines)


def draw(goal: Goal, options: Sequence[Option]) -> Figure:
    """Draw the share of slower requests against latency, for the best option of each kind."""
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, option in best(options).items():
        slower = np.arange(len(option.latencies), 0, -1) / len(option.latencies)
        label = f"{kind}: {option.name}, {option.parts} parts"
        axes.step(1e3 * option.latencies, slower, label=label, where="post")
    axes.axvline(1e3 * goal.deadline, color="0.4", linestyle=":", label="deadline")
    labels = {"xlabel": "latency from arrival, ms", "ylabel": "share of requests that take longer"}
    title = f"{goal.num_workers} workers, load {goal.load:g}, simulated"
    axes.set(xscale="log", yscale="log", title=title, **labels)
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure
