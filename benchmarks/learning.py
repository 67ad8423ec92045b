"""What surrogates bring and cost while requests come in: ``python -m benchmarks learning``.

LeNet-5 on worker processes that sleep, so that as many processes are as many machines, see
``arrivals.py``. Requests arrive by themselves; latency counts from then.

- answers: at a deadline of three medians of a part, some answers are predicted. How many are right
  with nothing, with a memory that knows nothing at first, with a student. No image comes twice.
- memory: requests from 8 threads with a memory and without, in turns: latency, the largest memory
  of this process, and every answer that is said to be exact compared with the network's.
"""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch._heap import frozen_heap
from coded_torch.codes import KernelCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, ProcessWorkers

from .arrivals import Sleeping
from .runs import Measurement, progress
from .students import student
from .subjects import SEED, run, subject

#: Answers that a worker computed differ from the network's own by rounding, as batches differ.
ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests per second, their inputs, machines, parts, the share of parts that are delayed."""

    rate: float
    batch_size: int
    num_machines: int
    num_data: int
    share: float
    delay: float = 0.05
    threads: int = 8


ANSWERS = Load(rate=5.0, batch_size=64, num_machines=6, num_data=4, share=0.05, threads=64)
#: A part takes some 5 ms, so this is a load of a quarter.
MEMORY = Load(rate=50.0, batch_size=16, num_machines=4, num_data=4, share=0.03)
ROUNDS, REQUESTS = 4, 2500  # a round


@dataclasses.dataclass
class Outcome:
    """Seconds of every request; answers: all, predicted, right, and wrong though called exact."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    answers: int = 0
    predicted: int = 0
    right: int = 0
    right_of_network: int = 0
    wrong: int = 0


class Requests:
    """Batches of the held-out images, with what the network makes of them."""

    def __init__(self, quick: bool) -> None:
        self.of = subject("lenet5", quick)
        self.exact = run(self.of.model, self.of.held_out.images)
        self.right = self.exact.argmax(1) == self.of.held_out.labels

    def drive(self, coded: CodedWrapper, load: Load, batches: Sequence[Tensor]) -> Outcome:
        """Send batches, ``[size]`` rows each, when they arrive."""
        generator = np.random.default_rng(SEED)
        arrivals = generator.exponential(1 / load.rate, len(batches)).cumsum()

        def send(rows: Tensor, arrival: float) -> tuple[float, Tensor, Tensor]:
            with torch.no_grad():
                answers, report = coded.run(self.of.held_out.images[rows])
            assert report.predicted is not None
            return time.perf_counter() - begin - arrival, answers, report.predicted

        outcome = Outcome()
        with frozen_heap(), ThreadPoolExecutor(load.threads) as callers:
            begin = time.perf_counter() + 0.05
            futures = []
            for rows, arrival in zip(batches, arrivals, strict=True):
                time.sleep(max(0.0, begin + arrival - time.perf_counter()))
                futures.append(callers.submit(send, rows, arrival))
            for rows, future in zip(batches, futures, strict=True):
                seconds, answers, predicted = future.result()
                outcome.latencies.append(seconds)
                outcome.answers += len(rows)
                outcome.predicted += int(predicted.sum())
                found = answers.argmax(1) == self.of.held_out.labels[rows]
                outcome.right += int(found.sum())
                outcome.right_of_network += int(self.right[rows].sum())
                off = (answers - self.exact[rows]).abs().amax(1) > ROUNDING
                outcome.wrong += int((off & ~predicted).sum())
        return outcome


def wrap(
    requests: Requests, pool: ProcessWorkers, load: Load, number: int, surrogate: Any, waiting: Any
) -> CodedWrapper:
    law = Bernoulli(load.share, latency=load.delay, seed=0)
    return CodedWrapper(
        Sleeping(requests.of.model).eval(),
        KernelCode(load.num_data, load.num_machines),
        workers=FaultyWorkers(pool, delays=law, seed=number),
        waiting=waiting,
        surrogate=surrogate,
    )


def warm(requests: Requests, coded: CodedWrapper, load: Load, count: int = 30) -> float:
    """Have the policy learn latencies; returns the median of a part, in seconds."""
    seconds = []
    for _ in range(count):
        with torch.no_grad():
            _, report = coded.run(requests.of.tuning.images[: load.batch_size])
        seconds += list(report.latencies.values())
    return float(np.median(seconds))


def shuffled(size: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Disjoint batches of all rows."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    yield from order.split(size)[: rows // size]


def answers(quick: bool) -> dict[str, Any]:
    requests, load = Requests(quick), ANSWERS
    made: dict[str, Callable[[], Any]] = {
        "none": tuple,
        "memory": Memory,
        "student": lambda: student("lenet5", quick).model,
    }
    outcomes: dict[str, list[Outcome]] = {what: [] for what in made}
    with ProcessWorkers(load.num_machines).start() as pool:
        calm = wrap(requests, pool, dataclasses.replace(load, share=0.0), 0, (), Waiting())
        waiting = Waiting(deadline=3 * warm(requests, calm, load))
        for number in progress(range(1 if quick else 2), "rounds"):
            batches = list(shuffled(load.batch_size, len(requests.exact), number))
            for what, make in made.items():
                coded = wrap(requests, pool, load, number, make(), waiting)
                warm(requests, coded, load, 10)
                outcomes[what].append(requests.drive(coded, load, batches[: 5 if quick else None]))
    found = {}
    for what, some in outcomes.items():
        count, lost = sum(o.answers for o in some), sum(o.predicted for o in some)
        wrong = sum(o.right_of_network - o.right for o in some)
        found[what] = {
            **percentiles(some),
            "predicted": round(lost / count, 5),
            "right": round(sum(o.right for o in some) / count, 5),
            "right of the network": round(sum(o.right_of_network for o in some) / count, 5),
            "right answers lost, of those predicted": round(wrong / max(lost, 1), 4),
            "wrong though called exact": sum(o.wrong for o in some),
        }
    return {"load": dataclasses.asdict(load), "surrogates": found}


def percentiles(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """In milliseconds: the medians over rounds."""
    each = [np.percentile(o.latencies, (50, 99)) * 1e3 for o in outcomes]
    return dict(zip(("p50", "p99"), np.median(each, axis=0).round(2).tolist(), strict=True))


def memory(quick: bool) -> dict[str, Any]:
    requests, load, known = Requests(quick), MEMORY, Memory()
    outcomes: dict[str, list[Outcome]] = {"without": [], "with": []}
    largest = []
    with ProcessWorkers(load.num_machines).start() as pool:
        wrappers = {
            what: wrap(requests, pool, load, 0, surrogate, Waiting())
            for what, surrogate in (("without", ()), ("with", known))
        }
        for coded in wrappers.values():
            warm(requests, coded, load)
        for number in progress(range(1 if quick else ROUNDS), "rounds"):
            generator = torch.Generator().manual_seed(number)
            shape = 50 if quick else REQUESTS, load.batch_size
            batches = list(torch.randint(len(requests.exact), shape, generator=generator))
            for what, coded in wrappers.items():
                law = Bernoulli(load.share, latency=load.delay, seed=0)
                coded.workers = FaultyWorkers(pool, delays=law, seed=number)
                outcomes[what].append(requests.drive(coded, load, batches))
            largest.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    ratios = [
        float(np.percentile(a.latencies, 99) / np.percentile(b.latencies, 99))
        for a, b in zip(outcomes["with"], outcomes["without"], strict=True)
    ]
    return {
        "load": dataclasses.asdict(load),
        "requests": sum(len(o.latencies) for o in outcomes["with"]),
        **{what: percentiles(some) for what, some in outcomes.items()},
        "p99 with over without, by round": [round(ratio, 3) for ratio in ratios],
        "p99 with over without": round(float(np.median(ratios)), 3),
        "remembered": len(known),
        "largest memory of the process after each round, MB": [round(x) for x in largest],
        "predicted": sum(o.predicted for o in outcomes["with"]),
        "wrong though called exact": sum(o.wrong for some in outcomes.values() for o in some),
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    yield ("answers",), functools.partial(answers, quick)
    yield ("memory",), functools.partial(memory, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED}
