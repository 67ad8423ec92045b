"""What stragglers cost in latency, and what ends it: ``python -m benchmarks latency``.

Requests arrive by themselves at LeNet-5, under several waiting policies, on the same worker
processes and with the same arrivals and delays for all, see :mod:`coded_torch.demo.latency`.
Written to ``results/latency.json``: for each case and policy the medians, over five runs, of
percentiles in milliseconds, work, the share of predicted answers, and accuracy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from coded_torch.demo.latency import FEW, ROUNDS, Load, Outcome, format_outcomes, measure, merge
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.workers import ProcessWorkers, RayWorkers, Workers

from .runs import Measurement, progress

# A part of 16 inputs sleeps for 10 ms: on six machines, 60 requests of four parts are a load of .4.
LOAD = Load(num_requests=10_000)
CALM = ("wait for all", "hedge at 1.5 medians", "hedge, predict")
SOME = (*FEW, "hedge, deadline")
CASES: dict[str, tuple[type[Workers], dict[str, Any], Sequence[str] | None]] = {
    "load 0.4, 3 % delayed": (ProcessWorkers, {}, None),
    "load 0.7, 1 % delayed": (
        ProcessWorkers,
        {"rate": 105.0, "share": 0.01, "num_requests": 3000},
        None,
    ),
    "few, none delayed": (
        ProcessWorkers,
        {"rate": 10.0, "share": 0.0, "num_requests": 2000},
        CALM,
    ),
    "no sleep, 3 % delayed": (
        ProcessWorkers,
        {"rate": 20.0, "sleep": False, "num_requests": 1000},
        SOME,
    ),
    "Ray, 3 % delayed": (RayWorkers, {"rate": 10.0, "num_requests": 500}, SOME),
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
    kind, changes, names = CASES[name]
    load = dataclasses.replace(LOAD, **changes)
    if quick:
        load = dataclasses.replace(load, num_requests=100)
    torch.set_num_threads(1)  # the cores are the workers'
    with kind(load.num_workers).start() as pool:
        rounds = list(progress(measure(pool, lenet5(), *digits(), load, names), name, total=ROUNDS))
    print(format_outcomes(merge(rounds)))
    return {
        "load": dataclasses.asdict(load),
        "policies": {
            policy: summary([outcomes[policy] for outcomes in rounds]) for policy in rounds[0]
        },
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in [QUICK] if quick else CASES:
        yield (name,), functools.partial(latency, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": Load().seed, "rounds": ROUNDS}
