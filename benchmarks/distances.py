"""On which data do estimates help, by which metrics? ``python -m benchmarks distances``.

Small networks on tables, sequences, text and pictures (``tasks.py``). ``RegressionCode`` with one
metric and length for all ("one metric"), with both chosen on the results ("chosen"), with a stem of
the module that competes, with its gradients that do, and with each metric alone; beside the trivial
baselines, replication and the batch's mean in place of missing answers. Splines stand in the order
of the inputs' distances, and in the order of the gradients' ("splines by gradients"). Outputs are
logits or, of tables with numbers to predict, these numbers, standardised.

Of tables, the held-out rows of each split are one batch, 240 at most, with 40 received sets, and
every split is one observation. Of all else, every batch has one received set.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from coded_torch.codes import Code, RegressionCode, SplineCode
from coded_torch.experiments.compare import compare
from coded_torch.experiments.scores import Comparison, Record
from coded_torch.input_space.metrics import METRICS, fitted, from_gradients, leaves_of

from . import tasks
from .accuracy import FEW, cells
from .networks import SEED, Batch, Subject
from .runs import Measurement, progress
from .subjects import of_task, student_of
from .tasks import Task

SIZE = 240  # rows of a batch
ROWS = 300  # training rows whose gradients are a metric
FIXED: dict[str, Any] = {"metric": "shrunk", "length": 2.0}  # one metric and length for all


class NotTuned(Code):
    """A code whose numbers are not tuned."""

    def candidates(self) -> dict[str, Any]:
        return {}


class AsGiven(NotTuned, RegressionCode):
    """Copies and a regression, as given."""


class Splines(NotTuned, SplineCode):
    """Splines, as given."""


def codes(task: Task, n: int, k: int) -> dict[str, Code]:
    """Return the codes that ``compare`` lacks, and every metric alone."""
    metrics: dict[str, Any] = {"chosen": "auto", "length chosen": "shrunk"}
    if task.stem is not None:
        metrics |= {"with a stem": task.stem, "a stem alone": [task.stem]}
    by_gradients = from_gradients(task.model, task.training[:ROWS])
    metrics["with gradients"] = by_gradients
    leaves = leaves_of([task.inputs[:SIZE]])
    for name, metric in METRICS.items():
        if fitted(leaves, [metric])[0] is not None:
            metrics[name] = name
    return {
        "one metric": AsGiven(k, n, **FIXED),
        **{name: AsGiven(k, n, metric=metric) for name, metric in metrics.items()},
        "splines": Splines(k, n),
        "splines by gradients": Splines(k, n, ordering=by_gradients),
        "mean": AsGiven(k, n, metric="shrunk", length=1e-9),  # a length that reaches no other input
    }


def drawn(name: str, raw: bool, quick: bool) -> Iterator[tuple[int, Task, Any, list[Batch]]]:
    """Yield splits, networks, their students and batches."""
    counts = settings(quick)
    if name not in tasks.TABLES:
        task = tasks.task(name)
        whole = Batch(task.inputs, task.labels)
        batches = Subject(task.model, whole, whole).batches("held_out", SIZE, counts["batches"])
        yield 0, task, student_of(name), list(batches)
        return
    for split in range(counts["splits"]):
        task = tasks.task(name, split, raw)
        yield split, task, of_task(task), [Batch(task.inputs, task.labels).take(slice(SIZE))]


def distances(name: str, raw: bool, quick: bool) -> dict[str, Any]:
    sets = settings(quick)["received sets of a split"] if name in tasks.TABLES else 1
    records: list[Record] = []
    for split, task, cheap, batches in drawn(name, raw, quick):
        # Nothing is tuned: the batch that stands first for tuning is answered, too.
        found = compare(
            task.model,
            [x.images for x in progress([batches[0], *batches], "batches")],
            [FEW],
            labels=None if task.labels is None else [x.labels for x in [batches[0], *batches]],
            extra=lambda k, n, task=task: codes(task, n, k),
            surrogate=cheap,
            schemes=[*codes(task, *FEW[:2]), *BASELINES],
            received_sets=sets,
            tuning_batches=1,
        )
        tables = name in tasks.TABLES
        records += [x._replace(batch=split) if tables else x for x in found.records]
    return {"schemes": cells(Comparison(records), ("chosen",))}


#: The schemes of ``compare`` that stand beside the metrics.
BASELINES = ("no redundancy, regression", "replication")


def measurements(quick: bool) -> Iterable[Measurement]:
    names = (*tasks.TABLES, *tasks.SEQUENCES, "lenet5")
    for name in names[: 1 if quick else None]:
        for raw in (False, True) if name in tasks.RAW else (False,):
            key = (f"{name}, raw" if raw else name, str(FEW))
            yield key, functools.partial(distances, name, raw, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": SIZE,
        "batches": 2 if quick else 20,
        "splits": 1 if quick else tasks.SPLITS,
        "received sets of a split": 3 if quick else 40,
    }
