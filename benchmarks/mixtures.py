"""Do mixtures beat copies and midpoints as redundant rows? ``python -m benchmarks mixtures``.

Mixtures are the spline encoder's, in the order of the gradients' metric. A regression over all rows
and mixtures decodes them, instead of a spline for each group. ``RegressionCode`` with copies or
midpoints has the same metrics, gradients among them, at equal work. ``chosen`` has the least error
on tuning batches, and ``cost`` is the error of this choice over that of the choice between copies
and midpoints, with its interval. All answer the same held-out batches from the same received sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import Code, RegressionCode, SplineCode
from coded_torch.experiments._tune import SETS, Trial
from coded_torch.experiments.compare import received_by
from coded_torch.experiments.scores import half_width, rounded, score
from coded_torch.input_space._regression import Regression
from coded_torch.input_space.metrics import from_gradients
from coded_torch.stragglers import Uniform

from .accuracy import PAIRS, Case
from .distances import ROWS
from .midpoints import LEAST
from .midpoints import ROWS as HELD_OUT
from .networks import SEED
from .runs import Measurement
from .subjects import run, subject

SETTINGS: tuple[tuple[Case, int], ...] = (
    (PAIRS, 2), (PAIRS, 16), ((10, 8, 2), 8), ((10, 8, 2), 64), ((60, 20, 20), 20),
)  # fmt: skip
TUNING_ROWS = 240
BATCHES = 24  # that are answered, at most
SMOOTHINGS = (0.0, 1e-4, 1e-2)  # of the encoder

#: Returns the answers of a batch from the results of received workers.
Answers = Callable[[Trial, list[int]], Tensor]


def decoded(code: Code, stragglers: int) -> Answers:
    """Return the answers of a code that decodes by itself."""
    return lambda trial, received: trial.decode(code, received, stragglers)[0]


def regressed(module: Any, code: Code, regression: Regression) -> Answers:
    """Return the answers of a regression over all rows and the mixtures that a code sends."""

    def answers(trial: Trial, received: list[int]) -> Tensor:
        (rows,) = trial.inputs
        sent = code.plan([rows]).encode(rows)[received].flatten(0, 1)
        plan = regression.plan([torch.cat([rows, sent])])
        places = range(len(rows), len(rows) + len(sent))
        return plan.decode(run(module, sent)[:, None], places)[: len(rows)]

    return answers


def mixtures(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    """Return the errors of each kind of redundant rows, and the kind of least tuning error."""
    n, k, s = case
    of = subject(name, quick)
    metric = from_gradients(of.model, of.tuning.images[:ROWS])
    delays = Uniform(s, seed=SEED)

    def errors(kinds: dict[str, Answers], part: str, most: int) -> dict[str, list[float]]:
        found = {kind: list[float]() for kind in kinds}
        for batch in of.batches(part, size, most):
            received_sets = [received_by(delays, n, s) for _ in range(SETS)]
            trial = Trial(of.model, (batch.images,), received_sets)
            for kind, answers in kinds.items():
                scores = [score(answers(trial, x), trial.exact[0]).mse for x in received_sets]
                found[kind].append(float(np.mean(scores)))
        return found

    regression = Regression(metric)
    sent = {f"mixtures {x:g}": SplineCode(k, n, ordering=metric, encoder_smoothing=x)
            for x in SMOOTHINGS}  # fmt: skip
    kinds: dict[str, Answers] = {
        kind: decoded(RegressionCode(k, n, metric=metric, redundancy=kind), s)
        for kind in ("copies", "midpoints")
    }
    kinds |= {kind: regressed(of.model, code, regression) for kind, code in sent.items()}
    tuning = {
        kind: float(np.mean(each))
        for kind, each in errors(kinds, "tuning", max(1, TUNING_ROWS // size)).items()
    }
    mixed = min(sent, key=tuning.__getitem__)
    today = min(("copies", "midpoints"), key=tuning.__getitem__)
    chosen = min((mixed, today), key=tuning.__getitem__)
    tried = {kind: kinds[kind] for kind in ("copies", "midpoints", mixed)}
    by = errors(tried, "held_out", 4 if quick else BATCHES)
    by["mixtures"] = by.pop(mixed)
    chosen = chosen.split()[0]

    def ratio(kind: str) -> list[float]:
        logarithms = np.log(np.array(by[kind]) / np.array(by[today]))
        mean = logarithms.mean()
        half = half_width(logarithms)
        return rounded(*np.exp([mean, mean - half, mean + half]))

    return {
        "batches": len(by[today]),
        "today": today,
        "chosen": chosen,
        "cost": ratio(chosen),
        "over today's": ratio("mixtures"),
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in ["lenet5"] if quick else HELD_OUT:
        for case, size in SETTINGS[: 1 if quick else None]:
            if size * LEAST <= HELD_OUT[name]:
                key = name, f"B = {size}", str(case)
                yield key, functools.partial(mixtures, name, case, size, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batches": 4 if quick else BATCHES,
        "received sets": SETS,
        "smoothings": [*SMOOTHINGS],
    }
