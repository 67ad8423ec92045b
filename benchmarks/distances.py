"""On which data does prediction help, by which metrics? ``python -m benchmarks distances``.

Small networks on tables, sequences, text and pictures (``tasks.py``). ``RegressionCode`` with one
metric and length for all ("before"), with both chosen ("chosen"), with a stem of the module that
competes, and with each metric alone; beside replication, no redundancy, and the batch's mean in
place of what is missing. Outputs are logits or, of tables with numbers to predict, these numbers,
standardised.

Of tables, the held-out rows of each split are one batch, 240 at most, with 40 received sets. Of all
else, every batch has one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coded_torch.codes import RegressionCode, ReplicationCode
from coded_torch.input_space.metrics import METRICS, leaves_of, transforms
from coded_torch.stragglers import Uniform

from . import tasks
from .runs import Measurement, progress
from .schemes import (
    BATCH_SIZE,
    FIXED,
    Case,
    Scheme,
    Scores,
    evaluate,
    received_by,
    summaries,
)
from .subjects import SEED, Batch, Subject
from .tasks import Task

CASES = ((24, 20, 4), (10, 8, 2), (6, 4, 2))
PICTURES = ("lenet5", "repvgg", "vit")
SMALL = 64  # the batch at the smaller settings, where rows are many
REFERENCES = ("before", "chosen", "replication", "mean")


def schemes(task: Task, case: Case, alone: bool) -> dict[str, Scheme]:
    """Return the schemes, and every metric alone if asked for."""
    n, k, s = case
    metrics: dict[str, Any] = {"chosen": "auto", "length chosen": "shrunk"}
    if task.stem is not None:
        metrics |= {"with a stem": task.stem, "a stem alone": [task.stem]}
    leaves = leaves_of([task.inputs[:BATCH_SIZE]])
    for name, metric in METRICS.items() if alone else ():
        if transforms(metric, leaves) is not None:
            metrics[name] = name
    return {
        "before": Scheme(RegressionCode(k, n, **FIXED), s),
        **{name: Scheme(RegressionCode(k, n, metric=m), s) for name, m in metrics.items()},
        "no redundancy, regression": Scheme(RegressionCode(k, k)),
        "replication": Scheme(ReplicationCode(k, n, ordering="arrival")),
        "mean": Scheme(RegressionCode(k, n, metric="shrunk", length=1e-9)),
    }


def drawn(name: str, raw: bool, case: Case, quick: bool) -> Iterator[tuple[Task, list[Batch]]]:
    """Yield networks with their batches."""
    counts = settings(quick)
    if name in tasks.TABLES:
        for split in range(counts["splits"]):
            task = tasks.table(name, split, raw)
            yield task, [Batch(task.inputs[:BATCH_SIZE], _labels(task, BATCH_SIZE))]
        return
    task = tasks.sequence(name) if name in tasks.SEQUENCES else tasks.pictures(name)
    whole = Batch(task.inputs, _labels(task))
    size = BATCH_SIZE if case == CASES[0] else SMALL
    of = Subject(task.model, whole, whole)
    yield task, list(of.batches("held_out", size, counts["batches"]))


def _labels(task: Task, most: int | None = None) -> torch.Tensor | None:
    return None if task.labels is None else task.labels[:most]


def distances(name: str, raw: bool, case: Case, quick: bool) -> dict[str, Any]:
    n, _, s = case
    scores: dict[str, dict[str, Scores]] = {}
    count = settings(quick)["received sets a split"] if name in tasks.TABLES else 1
    law = Uniform(s, seed=SEED)
    for task, batches in drawn(name, raw, case, quick):
        every = schemes(task, case, alone=case == CASES[0])
        evaluate(
            task.model,
            progress(batches, "batches"),
            lambda index: {"": [received_by(law, n) for _ in range(count)]},
            lambda key, every=every: every,
            scores,
        )
    codes = summaries(scores[""], REFERENCES)
    return {"codes": codes}


def measurements(quick: bool) -> Iterable[Measurement]:
    tables = tasks.TABLES[:1] if quick else tasks.TABLES
    for name in (*tables, *(() if quick else (*tasks.SEQUENCES, *PICTURES))):
        for raw in (False, True) if name in tasks.RAW else (False,):
            for case in CASES[:1] if quick else CASES:
                key = (f"{name}, raw" if raw else name, str(case))
                yield key, functools.partial(distances, name, raw, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": [BATCH_SIZE, SMALL],
        "batches": 2 if quick else 50,
        "splits": 1 if quick else tasks.SPLITS,
        "received sets a split": 3 if quick else 40,
    }
