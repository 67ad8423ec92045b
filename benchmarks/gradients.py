"""What does a metric of the module's gradients bring? ``python -m benchmarks gradients``.

On the networks of ``benchmarks accuracy``, ``RegressionCode`` with copies chooses among today's
metrics, and among these and the gradients' ("with gradients"), or those of a regression on the
outputs of the same rows ("with outputs"). Splines stand in the order of the
inputs' distances, and in the order of the gradients' ("splines by gradients"). Gradients are of 300
tuning rows, and of logits where outputs are probabilities: on other networks, an order by gradients
of probabilities was worse. Nothing is tuned, and all schemes answer the same batches from the same
received sets.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

from coded_torch.experiments.compare import compare
from coded_torch.experiments.scores import Comparison
from coded_torch.input_space.metrics import from_gradients, from_outputs

from .accuracy import FEW, PAIRS, SEEDS, Case, cells
from .distances import ROWS, AsGiven, Splines
from .networks import SEED
from .runs import Measurement
from .subjects import SOFTMAX, run, subject

#: (N, K, S) and the size of batches.
SETTINGS: tuple[tuple[Case, int], ...] = (
    (FEW, 240), ((10, 8, 2), 64), ((60, 20, 20), 240), (PAIRS, 64), (PAIRS, 16),
)  # fmt: skip


def gradients(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    """Return the errors with each metric over those without, and the seconds that it takes."""
    n, k, _ = case
    of = subject(name, quick)
    begin = time.perf_counter()
    logits = subject(name.removesuffix(SOFTMAX), quick).model
    rows = of.tuning.images[:ROWS]
    metric = from_gradients(logits, rows)
    took = time.perf_counter() - begin
    answers = run(logits, rows)
    begin = time.perf_counter()
    by_outputs = from_outputs(rows, answers)
    took_by_outputs = time.perf_counter() - begin
    limits = settings(quick)
    batches = [
        *of.batches("tuning", size, 1),
        *of.batches("held_out", size, max(limits["batches"], limits["rows"] // size)),
    ]
    schemes = {
        "chosen": AsGiven(k, n),
        "with gradients": AsGiven(k, n, metric=metric),
        "with outputs": AsGiven(k, n, metric=by_outputs),
        "splines": Splines(k, n),
        "splines by gradients": Splines(k, n, ordering=metric),
    }
    found = compare(
        of.model,
        [x.images for x in batches],
        [case],
        extra=lambda k, n: schemes,
        schemes=[*schemes],
        received_sets=limits["received sets"],
        tuning_batches=1,
    )
    errors = cells(Comparison(found.records), ("chosen", "splines"))
    return {
        "schemes": errors,
        "copies": errors["with gradients"]["against chosen"]["mse"],
        "copies by outputs": errors["with outputs"]["against chosen"]["mse"],
        "splines": errors["splines by gradients"]["against splines"]["mse"],
        "seconds for gradients": round(took, 2),
        "seconds for outputs": round(took_by_outputs, 2),
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in ["lenet5"] if quick else SEEDS:
        for case, size in SETTINGS[: 2 if quick else None]:
            work = functools.partial(gradients, name, case, size, quick)
            yield (name, f"B = {size}", str(case)), work


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "rows": 240 if quick else 1920,
        "batches": 2 if quick else 8,
        "received sets": 2 if quick else 5,
        "rows of gradients": ROWS,
    }
