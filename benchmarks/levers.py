"""What each idea of the recommended code is worth: ``python -m benchmarks levers``.

Encoders times decoders: inputs repeated, equally or as :class:`~coded_torch.codes.KernelCode` does,
or mixed along the paper's curve, with the points of three kinds; decoded by the code's own decoder,
or by regression in input space. Then ``KernelCode`` with one of its ideas left out at a time: the
order of the batch, the metric, the unequal copies. Logits, uniform stragglers, the batch in order
by similarity unless said, the same held-out batches and received sets for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from coded_torch.codes import FixedCode, KernelCode, ReplicationCode, SplineCode
from coded_torch.codes.nodes import equidistant, systematic

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, FIXED, Case, Scheme, equal_copies, evaluate, summaries, uniform
from .subjects import SEED, subject

CASES = ((24, 20, 4), (100, 20, 60))
NETWORKS = ("lenet5", "vit", "repvgg")


def encoders(n: int, k: int) -> dict[str, FixedCode]:
    data = equidistant(k)
    return {
        "equal copies": ReplicationCode(k, n),
        "spline, as in the paper": SplineCode(k, n),
        "spline, equidistant": SplineCode(k, n, data_points=data, worker_points=equidistant(n)),
        "spline, systematic": SplineCode(k, n, data_points=data, worker_points=systematic(data, n)),
    }


def schemes(case: Case) -> dict[str, Scheme]:
    n, k, _ = case
    best = {"KernelCode": Scheme(KernelCode(k, n, **FIXED))}
    for name, code in encoders(n, k).items():
        best[f"{name}; own decoder"] = Scheme(code)
        best[f"{name}; regression"] = Scheme(KernelCode(encoder=code, **FIXED))
    return {
        **best,
        "order: arrival": Scheme(KernelCode(k, n, **FIXED), "arrival"),
        "metric: Euclidean": Scheme(KernelCode(k, n, **FIXED | {"metric": "euclidean"})),
        "copies: equal": equal_copies(KernelCode(k, n, **FIXED)),
    }


def levers(name: str, case: Case, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), settings(quick)["batches"]
    batches = progress(of.batches("held_out", BATCH_SIZE, count), "batches", count)
    scores = evaluate(of.model, batches, schemes(case), case[2], uniform(case))
    return {"codes": summaries(scores["uniform"], ("KernelCode",))}


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in CASES:
            yield (name, str(case)), functools.partial(levers, name, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batch size": BATCH_SIZE, "batches": 2 if quick else 25}
