"""On which data prediction helps, and which distances fit them: ``python -m benchmarks distances``.

Small networks on tables, sequences, text and pictures (``tasks.py``); a network of raw inputs is
that of standardised ones behind its own scaling. :class:`~coded_torch.codes.KernelCode` with one
metric and length for all ("before"), with both chosen ("chosen"), with a cheap part of the module
that competes ("with a stem") or is alone, and with each metric alone; beside replication, and the
batch's mean in place of what is lost. Outputs are logits or, of tables with numbers to predict,
these numbers, standardised.

Of tables, the held-out rows of each split are one batch, 240 at most, with 40 received sets; of all
else, every batch has one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from coded_torch.codes import KernelCode, ReplicationCode
from coded_torch.evaluation.compare import received_by
from coded_torch.evaluation.scores import Scores, rounded
from coded_torch.input_space.distances import METRICS, Leaf, features_by
from coded_torch.stragglers import Uniform

from . import tasks
from .runs import Measurement, progress
from .schemes import BATCH_SIZE, Case, Scheme, decode, equal_copies, summaries, trial
from .subjects import SEED, Batch, Subject
from .tasks import Task

CASES = ((24, 20, 4), (10, 8, 2), (6, 4, 2))
PICTURES = ("lenet5", "repvgg", "vit")
SMALL = 64  # the batch at the smaller settings, where rows are many
REFERENCES = ("before", "chosen", "replication", "mean")


def schemes(task: Task, case: Case, alone: bool) -> dict[str, Scheme]:
    """What is compared.

    Args:
        task: the network and its inputs.
        case: N, K, S.
        alone: whether also every metric for itself.
    """
    n, k, _ = case
    codes = {
        "before": KernelCode(k, n, metric="shrunk", length=2.0),
        "chosen": KernelCode(k, n),
        "length chosen": KernelCode(k, n, metric="shrunk"),
    }
    if task.stem is not None:
        codes["with a stem"] = KernelCode(k, n, metric=task.stem)
        codes["a stem alone"] = KernelCode(k, n, metric=[task.stem])
    leaf = Leaf(task.inputs[:BATCH_SIZE])
    for name, metric in METRICS.items() if alone else ():
        if features_by(metric, [leaf]) is not None:
            codes[name] = KernelCode(k, n, metric=name)
    return {
        **{name: Scheme(code) for name, code in codes.items()},
        "replication": Scheme(ReplicationCode(k, n), "arrival"),
        "mean": equal_copies(KernelCode(k, n, metric="shrunk", length=1e-9)),
    }


def drawn(name: str, raw: bool, case: Case, quick: bool) -> Iterator[tuple[Task, Batch, list[Any]]]:
    """Batches, each with the network it is for and the sets of workers that answer it."""
    n, _, s = case
    law, counts = Uniform(s, seed=SEED), settings(quick)
    if name in tasks.TABLES:
        for split in range(counts["splits"]):
            task = tasks.table(name, split, raw)
            batch = Batch(task.inputs[:BATCH_SIZE], _labels(task)[:BATCH_SIZE])
            yield task, batch, [received_by(law, n) for _ in range(counts["received sets a split"])]
        return
    task = tasks.sequence(name) if name in tasks.SEQUENCES else tasks.pictures(name)
    size = BATCH_SIZE if case == CASES[0] else SMALL
    whole = Batch(task.inputs, _labels(task))
    subject = Subject(task.model, whole, whole)
    for batch in subject.batches("held_out", size, counts["batches"]):
        yield task, batch, [received_by(law, n)]


def _labels(task: Task) -> torch.Tensor:
    """The classes; where there are none, all are right."""
    return torch.zeros(len(task.inputs), dtype=torch.int64) if task.labels is None else task.labels


def distances(name: str, raw: bool, case: Case, quick: bool) -> dict[str, Any]:
    scores: dict[str, Scores] = {}
    for task, batch, sets in progress(drawn(name, raw, case, quick), "batches"):
        compared = schemes(task, case, alone=case == CASES[0])
        tried = trial(task.model, batch, sets)
        for received in sets:
            for scheme_name, scheme in compared.items():
                answers, expected = decode(tried, scheme, received, case[2])
                labels = None if task.labels is None else batch.labels
                scores.setdefault(scheme_name, Scores()).add(
                    answers, tried.exact[0], labels, expected
                )
    codes = summaries(scores, REFERENCES)
    for scheme_name, of_scheme in scores.items():  # of all batches, not on average over them
        mse, expected = of_scheme.columns[3], of_scheme.columns[6]
        known = ~np.isnan(expected)
        root = math.sqrt(expected[known].sum() / mse[known].sum()) if known.any() else math.nan
        codes[scheme_name]["expected_to_measured"] = rounded(root)[0]
    return {"codes": codes}


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
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
