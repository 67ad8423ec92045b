r"""How long requests take while workers straggle: uncoded, hedged and coded, at equal workers.

Requests arrive by themselves, whether or not earlier ones are answered, and a request's latency
counts from when it arrived, not from when somebody found time for it: a load generator that waits
for answers before it asks again sends least when the system is slowest, and measures what no user
sees.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..codes import KernelCode, NotEnoughResults, ReplicationCode
from ..nn import CodedWrapper
from ..stragglers import Bernoulli
from ..workers import FaultyWorkers, Reply, Task, Workers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["ROUNDS", "Load", "Outcome", "draw", "format_outcomes", "measure"]

_CALLERS = 64  # that may wait at once; more requests than this would wait for one to be free
ROUNDS = 5  # in turns, so that what slows the machine down slows all schemes alike
_WARM_UP = 30


@dataclasses.dataclass(frozen=True)
class Load:
    """What arrives, and what goes wrong.

    Attributes:
        rate: requests per second, on average; they arrive independently of each other.
        num_requests: how many, of each scheme.
        batch_size: inputs of a request.
        num_data: K, into how many shares a request is split; the coded one is for N workers.
        num_workers: N, of all schemes.
        num_stragglers: S, how many of N results the coded scheme does without.
        share: of the calls of the module, that are delayed.
        delay: seconds.
        seed: of arrivals, inputs and delays.
    """

    rate: float = 20.0
    num_requests: int = 1000
    batch_size: int = 64
    num_data: int = 4
    num_workers: int = 6
    num_stragglers: int = 2
    share: float = 0.02
    delay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size % self.num_data:
            raise ValueError(
                f"Load: batch_size must be a multiple of num_data, {self.num_data}, "
                f"got {self.batch_size}"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one scheme did.

    Attributes:
        latencies: seconds from arrival to answer, of the requests that were answered.
        failed: how many were not.
        accuracy: right answers among all of them.
        throughput: requests answered per second.
        calls: of the module, per request.
    """

    latencies: NDArray[np.float64]
    failed: int
    accuracy: float
    throughput: float
    calls: float

    def percentile(self, percent: float) -> float:
        """In milliseconds."""
        return float(np.percentile(self.latencies, percent)) * 1e3


def measure(
    pool: Workers, model: nn.Module, images: Tensor, labels: Tensor, load: Load
) -> Iterator[dict[str, Outcome]]:
    """Send the load through every scheme, in rounds.

    Args:
        pool: of ``load.num_workers`` workers.
        model: from images to logits.
        images: to draw requests from, ``[M, ...]``.
        labels: theirs, ``[M]``.
        load: what arrives.

    Yields:
        After each of :data:`ROUNDS` rounds, the outcomes so far, by scheme.
    """
    law = Bernoulli(load.share, latency=load.delay)
    faulty = FaultyWorkers(pool, delays=law, seed=load.seed)
    counted = _Counted(faulty)
    uncoded = split(model, load.num_data, pool)
    generator = torch.Generator().manual_seed(load.seed)
    # As long as three in four need when nothing goes wrong: later than that, somebody straggles.
    warm = [_seconds(uncoded, images[: load.batch_size]) for _ in range(_WARM_UP)]
    after = 2 * float(np.median(warm))
    schemes: dict[str, Callable[[Tensor], Tensor]] = {
        "uncoded": split(model, load.num_data, counted),
        "hedged": Hedged(model, load.num_data, counted, after),
        "coded": CodedWrapper(
            model,
            KernelCode(load.num_data, load.num_workers),
            workers=counted,
            num_stragglers=load.num_stragglers,
        ),
    }
    for scheme in schemes.values():
        for _ in range(_WARM_UP):
            scheme(images[: load.batch_size])
    records: dict[str, list[_Record]] = {name: [] for name in schemes}
    calls, seconds = dict.fromkeys(schemes, 0), dict.fromkeys(schemes, 0.0)
    for _ in range(ROUNDS):
        requests = list(_requests(images, labels, load, generator))
        for name, scheme in schemes.items():
            counted.calls = 0
            start = time.perf_counter()
            records[name] += _drive(scheme, requests)
            seconds[name] += time.perf_counter() - start
            calls[name] += counted.calls
        yield {name: _outcome(records[name], seconds[name], calls[name]) for name in schemes}


@dataclasses.dataclass(frozen=True)
class _Request:
    arrival: float
    images: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class _Record:
    latency: float
    right: int | None  # None: not answered
    size: int


def _requests(
    images: Tensor, labels: Tensor, load: Load, generator: torch.Generator
) -> Iterator[_Request]:
    arrival = 0.0
    for _ in range(math.ceil(load.num_requests / ROUNDS)):
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        arrival -= float(torch.log1p(-uniform)) / load.rate
        rows = torch.randperm(len(images), generator=generator)[: load.batch_size]
        yield _Request(arrival, images[rows], labels[rows])


def _drive(scheme: Callable[[Tensor], Tensor], requests: Sequence[_Request]) -> list[_Record]:
    """Send requests when they arrive, whoever still waits."""
    begin = time.perf_counter() + 0.05

    def send(request: _Request) -> _Record:
        with torch.no_grad():  # of this thread
            try:
                right = int((scheme(request.images).argmax(-1) == request.labels).sum())
            except NotEnoughResults:
                right = None
        latency = time.perf_counter() - begin - request.arrival
        return _Record(latency, right, len(request.labels))

    with ThreadPoolExecutor(_CALLERS) as callers:
        futures = []
        for request in requests:
            time.sleep(max(0.0, begin + request.arrival - time.perf_counter()))
            futures.append(callers.submit(send, request))
        return [future.result() for future in futures]


def _outcome(records: Sequence[_Record], seconds: float, calls: int) -> Outcome:
    answered = [record for record in records if record.right is not None]
    return Outcome(
        latencies=np.sort([record.latency for record in answered]),
        failed=len(records) - len(answered),
        accuracy=sum(record.right or 0 for record in answered)
        / max(1, sum(record.size for record in answered)),
        throughput=len(answered) / seconds,
        calls=calls / len(records),
    )


def _seconds(scheme: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        scheme(images)
    return time.perf_counter() - start


def split(model: nn.Module, num_data: int, pool: Workers) -> CodedWrapper:
    """The batch in K shares, without redundancy: the answer is there when the last share is."""
    code = ReplicationCode(num_data, num_data)
    return CodedWrapper(model, code, workers=pool, ordering="arrival", shuffle=False)


class _Counted(Workers):
    """Counts the calls that a pool is asked for."""

    def __init__(self, pool: Workers) -> None:
        self.pool, self.calls = pool, 0

    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        self.calls += task.num_workers
        yield from self.pool.run(module, task, quorum=quorum, deadline=deadline)


class Hedged:
    """The batch in K shares; who has not answered after a while is asked once more."""

    def __init__(self, model: nn.Module, num_data: int, pool: Workers, after: float) -> None:
        self.model, self.num_data, self.pool, self.after = model, num_data, pool, after

    def __call__(self, images: Tensor) -> Tensor:
        shares = images.tensor_split(self.num_data)
        replies: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
        answers: dict[int, Tensor] = {}
        self._ask(shares, range(len(shares)), replies)
        start, hedged = time.perf_counter(), False
        while len(answers) < len(shares):
            wait = None if hedged else max(0.0, self.after - (time.perf_counter() - start))
            try:
                share, reply = replies.get(timeout=wait)
            except queue.Empty:
                missing = [i for i in range(len(shares)) if i not in answers]
                self._ask(shares, missing, replies)
                hedged = True
                continue
            if reply.error is not None:
                raise reply.error
            answers.setdefault(share, reply.value)
        return torch.cat([answers[i] for i in range(len(shares))])

    def _ask(
        self,
        shares: Sequence[Tensor],
        which: Sequence[int],
        replies: queue.SimpleQueue[tuple[int, Reply]],
    ) -> None:
        """Have some shares computed, each reply to be put into the queue."""
        leaves, spec = pytree.tree_flatten(((torch.stack([shares[i] for i in which]),), {}))
        task = Task(leaves, [0], spec, len(which), leaves[0].shape[1], leaves[0].device)
        grad = torch.is_grad_enabled()

        def collect() -> None:
            with torch.set_grad_enabled(grad):
                for reply in self.pool.run(self.model, task, quorum=len(which)):
                    replies.put((which[reply.worker], reply))

        threading.Thread(target=collect, daemon=True).start()


def format_outcomes(outcomes: Mapping[str, Outcome]) -> str:
    """A table in 80 columns."""
    lines = [
        f"{'':10}{'p50':>9}{'p99':>9}{'p99.9':>9}   {'answered':>10}{'calls':>9}{'accuracy':>11}",
        f"{'':10}{'ms':>9}{'ms':>9}{'ms':>9}   {'per second':>10}{'each':>9}",
    ]
    for name, outcome in outcomes.items():
        times = "".join(f"{outcome.percentile(at):9.1f}" for at in (50, 99, 99.9))
        lines.append(
            f"{name:10}{times}   {outcome.throughput:10.1f}{outcome.calls:9.2f}"
            f"{outcome.accuracy:11.4f}"
        )
    return "\n".join(lines)


def draw(load: Load, outcomes: Mapping[str, Outcome]) -> Figure:
    """The share of requests that take longer than a time, against that time."""
    from matplotlib.figure import Figure  # an extra; and not pyplot: no state, no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colours = {"uncoded": "#555555", "hedged": "#009E73", "coded": "#0072B2"}
    for name, outcome in outcomes.items():
        count = len(outcome.latencies)
        slower = np.arange(count, 0, -1) / count
        axes.step(outcome.latencies * 1e3, slower, label=name, color=colours[name], where="post")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("latency from arrival, ms")
    axes.set_ylabel("share of requests that take longer")
    axes.set_title(
        f"{load.num_workers} workers, {load.share:.0%} of calls delayed by "
        f"{load.delay * 1e3:.0f} ms, {load.rate:g} requests a second"
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend(frameon=False)
    return figure
