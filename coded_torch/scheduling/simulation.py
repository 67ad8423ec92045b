r"""Waiting policies on workers that exist only as queues: thousands of open calls on one clock.

The same generator of decisions that a wrapper drives over real workers,
:meth:`coded_torch.Waiting.decide`, is driven here over workers that follow :class:`Conditions`.
Time is counted in medians of a part of the first ask, where nothing goes wrong.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from .._arguments import count, instance, real
from .latency_history import History
from .protocol import Decision, Ended, Event
from .simulated_pool import PART_ROWS, Conditions, Faults, OpenCall, SimulatedWorkers
from .waiting import Waiting

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Conditions", "Outcome", "Policy", "simulate"]


class Policy(Protocol):
    """Anything that decides as :class:`~coded_torch.Waiting` does."""

    def decide(
        self, history: History, first: Sequence[Sequence[int]], *, needed: int, **options: Any
    ) -> Generator[Decision, Event, Ended]: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a policy did.

    Attributes:
        latencies: from arrival to end, ``[num_requests]``, in medians of a part.
        predicted: of each call, the share of its inputs that no worker answered.
        calls: of the module, that workers began, in multiples of those of the first ask.
        work: inputs that workers began, in multiples of a batch.
        ended: how many calls ended for which reason.
    """

    latencies: NDArray[np.float64]
    predicted: NDArray[np.float64]
    calls: float
    work: float
    ended: Counter[str]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies, percent))


def simulate(
    policy: Policy | Waiting,
    conditions: Conditions,
    *,
    num_workers: int,
    num_parts: int,
    load: float = 0.3,
    num_requests: int = 10_000,
    num_columns: int | None = None,
    history: History | None = None,
    seed: int = 0,
) -> Outcome:
    """Send requests to workers that serve one part at a time, from one queue.

    Requests arrive independently of each other (Poisson). An idle worker takes the next part that
    is still wanted; what has begun goes on to its end. What goes wrong is the same for all policies
    with the same seed: by request and part for the first ask, by worker and time for spells and
    bursts.

    Args:
        policy: a :class:`~coded_torch.Waiting`, or what decides like one. Of one that asks all N
            at once, column n holds the share ``n mod K`` of the inputs.
        conditions: what parts take, and what goes wrong.
        num_workers: at least 1.
        num_parts: K, of the first ask.
        load: the share of the workers' time that the first asks take, in (0, 1).
        num_requests: at least 1.
        num_columns: N, for a policy that asks all at once; by default ``num_workers``.
        history: to begin with; by default an empty one. It is added to.
        seed: of everything.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.

    Note:
        Some ten microseconds a part.

    Example:
        >>> from coded_torch import Waiting
        >>> from coded_torch.scheduling.simulation import Conditions, simulate
        >>> straggling = Conditions(straggling=0.03)
        >>> for waiting in Waiting(), Waiting(predict_after=float("inf"), hedge_budget=0):
        ...     outcome = simulate(waiting, straggling, num_workers=6, num_parts=4)
        ...     print(f"{outcome.percentile(99):.1f}")
        3.7
        41.9
    """
    for argument, value in (
        ("num_workers", num_workers),
        ("num_parts", num_parts),
        ("num_requests", num_requests),
    ):
        count("simulate", argument, value)
    instance("simulate", "conditions", conditions, Conditions)
    real("simulate", "load", load, "in (0, 1)", lambda x: 0 < x < 1)
    gap = conditions.mean() * num_parts / (num_workers * load)
    arrivals = np.cumsum(np.random.default_rng([seed, 0]).exponential(gap, num_requests)).tolist()
    num_rows, unit_rows = num_parts * PART_ROWS, 1
    first = [tuple(range(i, i + PART_ROWS)) for i in range(0, num_rows, PART_ROWS)]
    needed = num_rows
    if getattr(policy, "at_once", False):
        columns = count("simulate", "num_columns", num_columns or num_workers, least=num_parts)
        needed, unit_rows = columns - (getattr(policy, "num_stragglers", 0) or 0), PART_ROWS
        first = [(column,) for column in range(columns)]
    inputs = num_rows // unit_rows
    history = History() if history is None else history
    generator = torch.Generator().manual_seed(seed)
    latencies, predicted = np.zeros(num_requests), np.zeros(num_requests)
    ended: Counter[str] = Counter()

    def arrive(number: int, arrival: float) -> OpenCall:
        call = OpenCall(
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
            call.delays = conditions.delays.sample(num_workers, generator).tolist()
        return call

    def closed(call: OpenCall, how: Ended) -> None:
        latencies[call.number] = cluster.now - call.arrival
        ended[how.reason] += 1
        if how.reason != "complete":
            answered = {unit % inputs for units in call.answered for unit in units}
            predicted[call.number] = 1 - len(answered) / inputs

    faults = Faults(conditions, num_workers, num_requests, len(first), gap, seed)
    cluster = SimulatedWorkers(conditions, faults, unit_rows, closed, seed)
    cluster.run(arrivals, arrive)
    return Outcome(
        latencies,
        predicted,
        cluster.begun_parts / (num_requests * num_parts),
        cluster.begun_rows / (num_requests * num_rows),
        ended,
    )
