"""How much latency do stragglers cost, and which policy ends it? ``python -m benchmarks latency``.

Requests arrive on their own at LeNet-5, under several waiting policies, on the same worker
processes, with the same arrivals and delays for all, see ``traffic.py``. For each case and policy:
the medians, over five rounds, of percentiles in milliseconds, of work, of the share of estimated
answers and of accuracy. The load is the share of their time for which workers are busy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.demo import digits, lenet5
from coded_torch.nn import Waiting
from coded_torch.workers import ProcessWorkers, Workers

from .hedging import WAIT_FOR_ALL, HedgeOnce
from .runs import Measurement, progress
from .traffic import Load, Reply, dealt, delayed, drive, median_part, percentiles

ROUNDS = 5  # the policies take turns in each, so that a slow spell slows all of them
CASES: dict[str, dict[str, Any]] = {
    "load 0.4, 3 % delayed": {"busy": 0.4, "num_requests": 4000},
    "few, none delayed": {"busy": 0.1, "num_requests": 600, "share": 0.0},
}


def policies(load: Load, part: float) -> dict[str, Waiting]:
    """Return the policies; ``part`` is the median of a part, in seconds."""
    return {
        "wait for all": WAIT_FOR_ALL,
        **{f"hedge at {x:g} medians": HedgeOnce(medians=x) for x in (1.2, 1.5, 2.0)},
        "hedge at the fence": HedgeOnce(),
        "hedge at p95": HedgeOnce(quantile=0.95),
        "three re-asks": Waiting(),
        "coded at once": Waiting.first(load.num_stragglers),
        "hedge, estimate": Waiting(estimate_after=3.0),
        "hedge, deadline": Waiting(deadline=3 * part),
    }


def outcome(replies: Sequence[Reply], labels: Sequence[Tensor]) -> dict[str, float | None]:
    """Return how one policy did in one round."""
    answered = [(r, y) for r, y in zip(replies, labels, strict=True) if r.report is not None]
    rows = sum(len(y) for _, y in answered)
    right = sum(int((r.answers.argmax(-1) == y).sum()) for r, y in answered)
    estimated = sum(int(r.report.estimated.sum()) for r, _ in answered)
    late = [r.spent - r.report.deadline for r, _ in answered if r.report.ended == "deadline"]
    return {
        **percentiles([r.latency for r, _ in answered]),
        "failed": len(replies) - len(answered),
        "work": float(np.mean([r.report.work_ratio for r, _ in answered])),
        "estimated": estimated / rows,
        "accuracy": right / rows,
        "after the deadline, p99.9": percentiles(late)["p99.9"] if late else None,
    }


def median(outcomes: Sequence[dict[str, float | None]], what: str) -> float | None:
    values = [x for each in outcomes if (x := each[what]) is not None]
    return round(float(np.median(values)), 5) if values else None


def compare(
    pool: Workers, load: Load, rounds: int, names: Sequence[str] | None = None
) -> tuple[float, dict[str, list[dict[str, float | None]]]]:
    """Send the load under every policy; return the median of a part, and the outcomes."""
    model, (images, labels) = lenet5(), digits()
    first = images[: load.batch_size]
    part = median_part(dealt(model, load, pool, Waiting(estimate=False)), first)
    rate = round(load.busy * load.num_workers / (load.num_data * part), 1)
    every = {
        name: dealt(model, load, pool, waiting)
        for name, waiting in policies(load, part).items()
        if names is None or name in names
    }
    for coded in every.values():
        median_part(coded, first)  # the policy learns how long parts take
    outcomes: dict[str, list[dict[str, float | None]]] = {name: [] for name in every}
    generator = torch.Generator().manual_seed(load.seed)
    for number in progress(range(rounds), "rounds", rounds):
        rows = [
            torch.randperm(len(images), generator=generator)[: load.batch_size]
            for _ in range(-(-load.num_requests // rounds))
        ]
        for name, coded in every.items():
            coded.workers = delayed(pool, load, number)
            replies = drive(coded.run, [images[x] for x in rows], rate, load.seed + number)
            outcomes[name].append(outcome(replies, [labels[x] for x in rows]))
    return part, outcomes


def latency(name: str, quick: bool) -> dict[str, Any]:
    load = Load(**CASES[name] | ({"num_requests": 20} if quick else {}))
    torch.set_num_threads(1)  # the cores are the workers'
    with ProcessWorkers(load.num_workers).start() as pool:
        part, outcomes = compare(pool, load, 1 if quick else ROUNDS)
    return {
        "load": dataclasses.asdict(load),
        "median of a part": round(1e3 * part, 2),
        "policies": {
            policy: {what: median(each, what) for what in each[0]}
            for policy, each in outcomes.items()
        },
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in [*CASES][: 1 if quick else None]:
        yield (name,), functools.partial(latency, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": Load().seed, "rounds": ROUNDS}
