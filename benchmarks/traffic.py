"""Requests that arrive at a wrapper on their own, on workers that straggle.

A request's latency counts from its arrival, not from when a thread found time for it. A load
generator that waits for answers before it asks again sends least when the system is slowest, and
measures a latency that no user sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import DeadlineExceeded, NotEnoughResults, RegressionCode
from coded_torch.nn import CodedWrapper, Report, Waiting
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import FaultyWorkers, Workers

_CALLERS = 64  # threads that may wait at once; further requests wait for a free one
_WARM_UP = 30


@dataclasses.dataclass(frozen=True)
class Load:
    """The requests that arrive, and their faults."""

    busy: float = 0.4  #: the share of the workers' time that the parts take
    num_requests: int = 1000  #: requests under each policy, which arrive independently
    batch_size: int = 64  #: rows of a request
    num_data: int = 4  #: K, the parts into which a request is divided
    num_workers: int = 6  #: workers, and N if all are asked at once
    num_stragglers: int = 2  #: S, the results of N that are not waited for if all are asked at once
    share: float = 0.03  #: the share of the parts that are delayed
    delay: float = 0.05  #: seconds
    sleep: bool = True  #: whether the model sleeps too, see :class:`Sleeping`
    seed: int = 0  #: the seed of arrivals, rows and delays


class Sleeping(nn.Module):
    """A model that sleeps for some seconds a batch and a row, beside its computation.

    So processes behave like machines, however few processors they share.
    """

    def __init__(self, model: nn.Module, batch: float = 1e-3, row: float = 9e-3 / 16) -> None:
        super().__init__()
        self.model, self.batch, self.row = model, batch, row

    def forward(self, images: Tensor) -> Any:
        time.sleep(self.batch + self.row * len(images))
        return self.model(images)


class Reply(NamedTuple):
    """An answer: seconds from the arrival and from the call; None and None if there was none."""

    latency: float
    spent: float
    answers: Tensor | None
    report: Report | None


def dealt(model: nn.Module, load: Load, pool: Workers, waiting: Waiting) -> CodedWrapper:
    """Return a wrapper that deals each batch to workers by rows, or all N columns at once."""
    model = Sleeping(model).eval() if load.sleep else model
    code = RegressionCode(load.num_data, load.num_workers) if waiting.at_once else None
    parts = None if waiting.at_once else load.num_data
    return CodedWrapper(model, code, workers=pool, waiting=waiting, parts=parts)


def delayed(pool: Workers, load: Load, number: int) -> FaultyWorkers:
    """Return the pool with delayed parts, the same ones in every round of this number."""
    delays = Bernoulli(load.share, latency=load.delay, seed=0)
    return FaultyWorkers(pool, delays=delays, seed=load.seed + number)


@torch.no_grad()
def median_part(coded: CodedWrapper, images: Tensor) -> float:
    """Return the median of a part, in seconds, of requests that come one after the other."""
    reports = []
    for _ in range(_WARM_UP):
        with contextlib.suppress(DeadlineExceeded):  # on a busy machine
            reports.append(coded.run(images)[1])
    seconds = [at for report in reports[_WARM_UP // 3 :] for at in report.latencies.values()]
    return float(np.median(seconds))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return what a function returns, or the NotEnoughResults that it raises; and its seconds."""
    start = time.perf_counter()
    try:
        found = function(*arguments)
    except NotEnoughResults as error:
        found = error
    return found, time.perf_counter() - start


def drive(
    send: Callable[[Tensor], tuple[Tensor, Report]],
    batches: Sequence[Tensor],
    rate: float,
    seed: int,
) -> list[Reply]:
    """Send batches when they arrive (Poisson), whether or not others still wait."""
    arrivals = np.random.default_rng(seed).exponential(1 / rate, len(batches)).cumsum()

    def call(batch: Tensor, arrival: float) -> Reply:
        with torch.no_grad():
            found, spent = timed(send, batch)
        answers, report = (None, None) if isinstance(found, NotEnoughResults) else found
        return Reply(time.perf_counter() - begin - arrival, spent, answers, report)

    gc.collect()
    gc.freeze()  # a full collection stops all threads
    with ThreadPoolExecutor(_CALLERS) as callers:
        begin = time.perf_counter() + 0.05
        futures = []
        for batch, arrival in zip(batches, arrivals, strict=True):
            time.sleep(max(0.0, begin + arrival - time.perf_counter()))
            futures.append(callers.submit(call, batch, arrival))
        return [future.result() for future in futures]


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {f"p{at:g}": round(1e3 * float(np.percentile(seconds, at)), 3) for at in (50, 99, 99.9)}
