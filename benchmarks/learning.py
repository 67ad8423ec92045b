"""What do surrogates bring while requests come in? ``python -m benchmarks learning``.

LeNet-5 on worker processes that sleep, see ``traffic.py``. At a deadline of three medians of a part,
some answers are predicted. How many are right with nothing, with a memory that knows nothing at
first, with a student? No image comes twice. Every answer that is said to be exact is compared with
the network's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.nn import Waiting
from coded_torch.surrogates import Memory
from coded_torch.workers import ProcessWorkers

from .runs import Measurement, progress
from .students import student
from .subjects import SEED, Subject, run, subject
from .traffic import Load, Reply, dealt, delayed, drive, median_part, percentiles

LOAD = Load(rate=5.0, share=0.05)
ROUNDING = 1e-3  # exact answers differ from the network's own by rounding, as batches differ


def answers(quick: bool) -> dict[str, Any]:
    of = subject("lenet5", quick)
    exact, tuning = run(of.model, of.held_out.images), of.tuning.images[: LOAD.batch_size]
    made: dict[str, Callable[[], Any]] = {
        "none": tuple,
        "memory": Memory,
        "student": lambda: student("lenet5", quick).model,
    }
    replies: dict[str, list[list[Reply]]] = {what: [] for what in made}
    sent: list[Tensor] = []
    with ProcessWorkers(LOAD.num_workers).start() as pool:
        part = median_part(dealt(of.model, LOAD, pool, Waiting()), tuning)
        for number in progress(range(1 if quick else 2), "rounds"):
            order = torch.randperm(len(exact), generator=torch.Generator().manual_seed(number))
            batches = list(order.split(LOAD.batch_size))[: 5 if quick else -1]
            sent += batches
            for what, make in made.items():
                coded = dealt(of.model, LOAD, pool, Waiting(deadline=3 * part), make())
                median_part(coded, tuning)  # the policy learns how long parts take
                coded.workers = delayed(pool, LOAD, number)
                images = [of.held_out.images[rows] for rows in batches]
                replies[what].append(drive(coded.run, images, LOAD.rate, SEED))
    found = {what: summary(of, exact, some, sent) for what, some in replies.items()}
    return {"load": dataclasses.asdict(LOAD), "surrogates": found}


def summary(
    of: Subject, exact: Tensor, rounds: Sequence[Sequence[Reply]], sent: Sequence[Tensor]
) -> dict[str, Any]:
    rows = torch.cat(list(sent))
    replies = [reply for some in rounds for reply in some]
    given = torch.cat([reply.answers for reply in replies])
    predicted = torch.cat([reply.report.predicted for reply in replies])
    labels = of.held_out.labels[rows]
    right, own = (x.argmax(1) == labels for x in (given, exact[rows]))
    wrong = ((given - exact[rows]).abs().amax(1) > ROUNDING) & ~predicted
    times = [percentiles([reply.latency for reply in some]) for some in rounds]

    def share(x: Tensor) -> float:
        return round(float(x.double().mean()), 5)

    lost = int(own.sum() - right.sum()) / max(1, int(predicted.sum()))
    return {
        **{at: round(float(np.median([x[at] for x in times])), 2) for at in ("p50", "p99")},
        "predicted": share(predicted),
        "right": share(right),
        "right of the network": share(own),
        "right answers lost, of those predicted": round(lost, 4),
        "wrong though called exact": int(wrong.sum()),
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    yield ("answers",), functools.partial(answers, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED}
