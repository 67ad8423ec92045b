"""What stragglers cost in latency, and what ends it: ``python -m benchmarks latency``.

Uncoded, hedged and coded requests arrive at LeNet-5 at their own pace, on the same worker
processes and the same actors of a local Ray cluster, see :mod:`coded_torch.demo.latency`. Written
to ``results/latency.json``: percentiles in milliseconds, and accuracy, for each share of delayed
calls.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch

from coded_torch.demo.latency import ROUNDS, Load, Outcome, format_outcomes, measure
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.workers import ProcessWorkers, RayWorkers

from .runs import Measurement, progress

CASES = {
    "processes, none delayed": (ProcessWorkers, Load(share=0.0)),
    "processes, 1 % delayed": (ProcessWorkers, Load(share=0.01)),
    "processes, 3 % delayed": (ProcessWorkers, Load(share=0.03)),
    "Ray, 3 % delayed": (RayWorkers, Load(share=0.03, rate=10.0, num_requests=500)),
}
QUICK = "processes, 3 % delayed"


def summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "p50": round(outcome.percentile(50), 2),
        "p99": round(outcome.percentile(99), 2),
        "p99.9": round(outcome.percentile(99.9), 2),
        "answered per second": round(outcome.throughput, 2),
        "failed": outcome.failed,
        "calls per request": round(outcome.calls, 3),
        "accuracy": round(outcome.accuracy, 4),
    }


def latency(name: str, quick: bool) -> dict[str, Any]:
    kind, load = CASES[name]
    if quick:
        load = dataclasses.replace(load, num_requests=100, rate=2 * load.rate)
    torch.set_num_threads(1)  # the cores are the workers'
    with kind(load.num_workers).start() as pool:
        *_, outcomes = progress(measure(pool, lenet5(), *digits(), load), name, total=ROUNDS)
    print(format_outcomes(outcomes))
    return {
        "load": dataclasses.asdict(load),
        "schemes": {scheme: summary(outcome) for scheme, outcome in outcomes.items()},
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in [QUICK] if quick else CASES:
        yield (name,), functools.partial(latency, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": Load().seed}
