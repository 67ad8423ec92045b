r"""How long requests take while machines straggle, under several waiting policies.

Requests arrive by themselves, whether or not earlier ones are answered, and a request's latency
counts from when it arrived, not from when a thread found time for it: a load generator that waits
for answers before it asks again sends least when the system is slowest, and measures what no user
sees.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch._heap import frozen_heap
from coded_torch.codes import KernelCode, NotEnoughResults
from coded_torch.demo.hedging import HedgeOnce, Unsplit
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.nn.report import Report
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import FaultyWorkers, Workers

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "FEW",
    "ROUNDS",
    "Load",
    "Outcome",
    "Sleeping",
    "format_outcomes",
    "measure",
    "median_part",
    "merge",
]

_CALLERS = 64  # that may wait at once; more requests than this would wait for one to be free
#: In turns, so that what slows the machine down slows all policies alike.
ROUNDS = 5
_WARM_UP = 30


@dataclasses.dataclass(frozen=True)
class Load:
    """What arrives, and what goes wrong.

    Attributes:
        rate: requests per second, on average; they arrive independently of each other.
        num_requests: how many, under each policy.
        batch_size: inputs of a request.
        num_data: K, into how many parts a request is divided.
        num_workers: machines, and N where all are asked at once.
        num_stragglers: S, how many of N results are done without where all are asked at once.
        share: of the parts, that are delayed.
        delay: seconds.
        sleep: whether the model sleeps too, see :class:`Sleeping`.
        seed: of arrivals, inputs and delays.
    """

    rate: float = 60.0
    num_requests: int = 1000
    batch_size: int = 64
    num_data: int = 4
    num_workers: int = 6
    num_stragglers: int = 2
    share: float = 0.03
    delay: float = 0.05
    sleep: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.num_data:
            raise ValueError(
                f"Load: batch_size must be a multiple of num_data, {self.num_data}, "
                f"got {self.batch_size}"
            )


class Sleeping(nn.Module):
    """A model that sleeps for 1 ms and 9 ms for every 16 inputs, beside what it computes.

    So that as many processes are as many machines, however few processors they share.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        time.sleep(0.001 + 0.009 * len(images) / 16)
        return self.model(images)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one policy did.

    Attributes:
        latencies: seconds from arrival to answer, of the requests that were answered, sorted.
        failed: how many were not.
        accuracy: right answers among all of them.
        throughput: requests answered per second.
        work: inputs that machines began to compute, per input.
        predicted: the share of answers that are not the model's own.
        overruns: seconds, of calls that ended at a deadline and had half of the results by then,
            by which they returned after it.
    """

    latencies: NDArray[np.float64]
    failed: int
    accuracy: float
    throughput: float
    work: float
    predicted: float
    overruns: NDArray[np.float64]

    def percentile(self, percent: float) -> float:
        """In milliseconds."""
        return float(np.percentile(self.latencies, percent)) * 1e3


def policies(load: Load, part: float) -> dict[str, Waiting]:
    """What is compared; ``part`` is the median of a part, in seconds."""
    never = math.inf
    return {
        "wait for all": Unsplit(patience=never, extra=0),
        "hedge at 1.2 medians": HedgeOnce(medians=1.2),
        "hedge at 1.5 medians": HedgeOnce(medians=1.5),
        "hedge at 2 medians": HedgeOnce(medians=2.0),
        "hedge at the fence": HedgeOnce(),
        "hedge at p95": HedgeOnce(quantile=0.95),
        "three re-asks": Waiting(predict=False),
        "coded at once": Waiting.first(load.num_stragglers),
        "hedge, predict": Waiting(),
        "hedge, deadline": Waiting(deadline=3 * part),
    }


#: What a look at one load needs.
FEW = ("wait for all", "hedge at 1.5 medians", "three re-asks", "coded at once", "hedge, predict")


def measure(
    pool: Workers,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    load: Load,
    names: Sequence[str] | None = FEW,
) -> Iterator[dict[str, Outcome]]:
    """Send the load under every policy, in rounds; the same arrivals and delays for all.

    Args:
        pool: of ``load.num_workers`` machines.
        model: from images to logits.
        images: to draw requests from, ``[M, ...]``.
        labels: theirs, ``[M]``.
        load: what arrives.
        names: of policies; None: all.

    Yields:
        After each of :data:`ROUNDS` rounds, its outcomes, by policy.
    """
    part = median_part(pool, model, images, load)
    model = Sleeping(model).eval() if load.sleep else model
    schemes = {
        name: _Dealt(model, load, pool, waiting)
        for name, waiting in policies(load, part).items()
        if names is None or name in names
    }
    for scheme in schemes.values():
        for i in range(_WARM_UP):
            scheme(images[i : i + load.batch_size])
    generator = torch.Generator().manual_seed(load.seed)
    for number in range(ROUNDS):
        requests = list(_requests(images, labels, load, generator))
        outcomes = {}
        for name, scheme in schemes.items():
            scheme.delay(pool, load, number)
            start = time.perf_counter()
            records = _drive(scheme, requests)
            outcomes[name] = _outcome(records, time.perf_counter() - start)
        yield outcomes


class _Dealt:
    """A wrapper that deals each batch to K machines."""

    def __init__(self, model: nn.Module, load: Load, pool: Workers, waiting: Waiting) -> None:
        code = KernelCode(load.num_data, load.num_workers)
        self.coded = CodedWrapper(model, code, workers=pool, waiting=waiting)

    def delay(self, pool: Workers, load: Load, number: int) -> None:
        """From now on, some parts take longer; the same ones under every policy."""
        law = Bernoulli(load.share, latency=load.delay, seed=0)
        self.coded.workers = FaultyWorkers(pool, delays=law, seed=load.seed + number)

    def __call__(self, images: Tensor) -> tuple[Tensor, Report]:
        with torch.no_grad():  # of this thread
            return self.coded.run(images)


def median_part(pool: Workers, model: nn.Module, images: Tensor, load: Load) -> float:
    """The median of a part, in seconds, of requests that come one after the other."""
    model = Sleeping(model).eval() if load.sleep else model
    scheme = _Dealt(model, load, pool, Waiting(predict=False))
    reports = [scheme(images[: load.batch_size])[1] for _ in range(_WARM_UP)]
    seconds = [at for report in reports[_WARM_UP // 3 :] for at in report.latencies.values()]
    return float(np.median(seconds))


@dataclasses.dataclass(frozen=True)
class _Request:
    arrival: float
    images: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class _Record:
    latency: float
    size: int
    right: int | None = None  # None: not answered
    work: float = 0.0
    predicted: int = 0
    overrun: float | None = None


def _requests(
    images: Tensor, labels: Tensor, load: Load, generator: torch.Generator
) -> Iterator[_Request]:
    arrival = 0.0
    for _ in range(math.ceil(load.num_requests / ROUNDS)):
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        arrival -= float(torch.log1p(-uniform)) / load.rate
        rows = torch.randperm(len(images), generator=generator)[: load.batch_size]
        yield _Request(arrival, images[rows], labels[rows])


def _drive(
    scheme: Callable[[Tensor], tuple[Tensor, Report]], requests: Sequence[_Request]
) -> list[_Record]:
    """Send requests when they arrive, whether or not others still wait."""

    def send(request: _Request) -> _Record:
        size = len(request.labels)
        start = time.perf_counter()
        try:
            answers, report = scheme(request.images)
        except NotEnoughResults:
            return _Record(time.perf_counter() - begin - request.arrival, size)
        end = time.perf_counter()
        right = int((answers.argmax(-1) == request.labels).sum())
        predicted = 0 if report.predicted is None else int(report.predicted.sum())
        overrun = None
        if report.ended == "deadline" and report.deadline and report.decodable:
            overrun = end - start - report.deadline if report.decodable <= report.deadline else None
        latency = end - begin - request.arrival
        return _Record(latency, size, right, report.work, predicted, overrun)

    with frozen_heap(), ThreadPoolExecutor(_CALLERS) as callers:
        begin = time.perf_counter() + 0.05
        futures = []
        for request in requests:
            time.sleep(max(0.0, begin + request.arrival - time.perf_counter()))
            futures.append(callers.submit(send, request))
        return [future.result() for future in futures]


def _outcome(records: Sequence[_Record], seconds: float) -> Outcome:
    answered = [record for record in records if record.right is not None]
    inputs = max(1, sum(record.size for record in answered))
    return Outcome(
        latencies=np.sort([record.latency for record in answered]),
        failed=len(records) - len(answered),
        accuracy=sum(record.right or 0 for record in answered) / inputs,
        throughput=len(answered) / seconds,
        work=sum(record.work for record in answered) / max(1, len(answered)),
        predicted=sum(record.predicted for record in answered) / inputs,
        overruns=np.sort([r.overrun for r in answered if r.overrun is not None]),
    )


def merge(rounds: Sequence[Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """The outcomes of all rounds as one, by policy."""

    def merged(outcomes: Sequence[Outcome]) -> Outcome:
        def mean(name: str) -> float:
            return float(np.mean([getattr(outcome, name) for outcome in outcomes]))

        return Outcome(
            latencies=np.sort(np.concatenate([outcome.latencies for outcome in outcomes])),
            failed=sum(outcome.failed for outcome in outcomes),
            overruns=np.sort(np.concatenate([outcome.overruns for outcome in outcomes])),
            **{name: mean(name) for name in ("accuracy", "throughput", "work", "predicted")},
        )

    return {name: merged([outcomes[name] for outcomes in rounds]) for name in rounds[0]}


def format_outcomes(outcomes: Mapping[str, Outcome]) -> str:
    """A table in 80 columns."""
    lines = [
        f"{'':22}{'p50':>8}{'p99':>9}{'p99.9':>9}{'work':>9}{'predicted':>12}{'accuracy':>11}",
        f"{'':22}{'ms':>8}{'ms':>9}{'ms':>9}",
    ]
    for name, outcome in outcomes.items():
        p50, p99, last = (outcome.percentile(at) for at in (50, 99, 99.9))
        lines.append(
            f"{name:22}{p50:8.1f}{p99:9.1f}{last:9.1f}{outcome.work:9.3f}"
            f"{outcome.predicted:11.2%} {outcome.accuracy:11.4f}"
        )
    return "\n".join(lines)
