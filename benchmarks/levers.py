"""What is each idea of the recommended code worth? ``python -m benchmarks levers``.

Encoders with their own decoders: inputs repeated equally, or mixed along the paper's curve with
three kinds of points. Then ``RegressionCode`` with one of its ideas left out: the order of the
batch, the metric, the unequal copies.
Logits, uniform stragglers, ordered by similarity unless said.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from coded_torch.codes import RegressionCode, ReplicationCode, SplineCode
from coded_torch.codes.nodes import equidistant, systematic

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, FIXED, Case, Scheme, evaluate, summaries, uniform
from .subjects import SEED, subject

CASES = ((24, 20, 4), (100, 20, 60))
NETWORKS = ("lenet5", "vit", "repvgg")


def euclidean(x: Any) -> Any:
    return x.flatten(1)


def schemes(case: Case) -> dict[str, Scheme]:
    n, k, s = case
    data = equidistant(k)
    even, own = {"worker_points": equidistant(n)}, {"worker_points": systematic(data, n)}
    return {
        "KernelCode": Scheme(RegressionCode(k, n, **FIXED), s),
        "equal copies; own decoder": Scheme(ReplicationCode(k, n)),
        "spline, as in the paper; own decoder": Scheme(SplineCode(k, n)),
        "spline, equidistant; own decoder": Scheme(SplineCode(k, n, data_points=data, **even)),
        "spline, systematic; own decoder": Scheme(SplineCode(k, n, data_points=data, **own)),
        "order: arrival": Scheme(RegressionCode(k, n, ordering="arrival", **FIXED), s),
        "metric: Euclidean": Scheme(RegressionCode(k, n, **FIXED | {"metric": euclidean}), s),
        "copies: equal": Scheme(RegressionCode(k, n, **FIXED)),
    }


def levers(name: str, case: Case, quick: bool) -> dict[str, Any]:
    of, count, every = subject(name, quick), settings(quick)["batches"], schemes(case)
    batches = progress(of.batches("held_out", BATCH_SIZE, count), "batches", count)
    scores = evaluate(of.model, batches, uniform(case), lambda law: every)
    return {"codes": summaries(scores["uniform"], ("KernelCode",))}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in CASES:
            yield (name, str(case)), functools.partial(levers, name, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batch size": BATCH_SIZE, "batches": 2 if quick else 25}
