"""What stragglers cost in latency, and what ends it: ``python -m benchmarks latency``.

Requests arrive by themselves at LeNet-5, under several waiting policies, on the same worker
processes and with the same arrivals and delays for all, see ``arrivals.py``.
Written to ``results/latency.json``: for each case and policy the medians, over five runs, of
percentiles in milliseconds, work, the share of predicted answers, and accuracy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.workers import ProcessWorkers, RayWorkers, Workers

from .arrivals import (
    FEW,
    ROUNDS,
    Load,
    Outcome,
    format_outcomes,
    measure,
    median_part,
    merge,
)
from .runs import Measurement, progress

CALM = ("wait for all", "hedge at 1.5 medians", "hedge, predict")
SOME = (*FEW, "hedge, deadline")


class Case(NamedTuple):
    """What is sent to which pool, and under which policies; None: all.

    The load is the share of their time for which machines are at parts, as the rate and the
    median of a part have it where requests come one after the other.
    """

    pool: type[Workers]
    load: float
    changes: dict[str, Any]
    policies: Sequence[str] | None


CASES = {
    "load 0.4, 3 % delayed": Case(ProcessWorkers, 0.4, {"num_requests": 4000}, None),
    "few, none delayed": Case(ProcessWorkers, 0.1, {"num_requests": 600, "share": 0.0}, CALM),
    "no sleep, 3 % delayed": Case(ProcessWorkers, 0.1, {"sleep": False}, SOME),
    "Ray, 3 % delayed": Case(RayWorkers, 0.1, {"num_requests": 500}, SOME),
}
QUICK = "load 0.4, 3 % delayed"


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Medians over runs."""

    def median(values: Iterable[float], digits: int) -> float:
        return round(float(np.median(list(values))), digits)

    late = np.concatenate([outcome.overruns for outcome in outcomes])
    return {
        **{
            f"p{at:g}": median((outcome.percentile(at) for outcome in outcomes), 2)
            for at in (50, 99, 99.9)
        },
        "failed": sum(outcome.failed for outcome in outcomes),
        "work": median((outcome.work for outcome in outcomes), 4),
        "predicted": median((outcome.predicted for outcome in outcomes), 5),
        "accuracy": median((outcome.accuracy for outcome in outcomes), 4),
        "answered per second": median((outcome.throughput for outcome in outcomes), 2),
        "after the deadline, p99.9": round(float(np.percentile(late, 99.9)) * 1e3, 2)
        if len(late)
        else None,
    }


def latency(name: str, quick: bool) -> dict[str, Any]:
    case = CASES[name]
    load = Load(**case.changes)
    if quick:
        load = dataclasses.replace(load, num_requests=100)
    torch.set_num_threads(1)  # the cores are the workers'
    with case.pool(load.num_workers).start() as pool:
        part = median_part(pool, lenet5(), digits()[0], load)
        rate = round(case.load * load.num_workers / (load.num_data * part), 1)
        load = dataclasses.replace(load, rate=rate)
        rounds = list(
            progress(measure(pool, lenet5(), *digits(), load, case.policies), name, total=ROUNDS)
        )
    print(format_outcomes(merge(rounds)))
    return {
        "load": dataclasses.asdict(load),
        "median of a part": round(1e3 * part, 2),
        "policies": {
            policy: summary([outcomes[policy] for outcomes in rounds]) for policy in rounds[0]
        },
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in [QUICK] if quick else CASES:
        yield (name,), functools.partial(latency, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": Load().seed, "rounds": ROUNDS}
