"""What each idea of the default code is worth: ``python -m benchmarks levers``.

:class:`~coded_torch.codes.KernelCode` with one of its ideas left out at a time (the order of the
batch, the decoder, the metric, the unequal copies), and with inputs mixed. Logits, uniform
stragglers, the same held-out batches and received sets for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from coded_torch.codes import KernelCode

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, Case, Scheme, evaluate, summaries, uniform
from .subjects import SEED, subject

CASES = ((24, 20, 4), (100, 20, 60))
NETWORKS = ("lenet5", "vit", "repvgg")


def schemes(case: Case) -> dict[str, Scheme]:
    n, k, _ = case
    mixed = {
        "placement: systematic": KernelCode(k, n, placement=0.5),
        "placement: spread": KernelCode(k, n, placement=1.0),
        "systematic, points: equidistant": KernelCode(k, n, placement=0.5, exponent=0.0),
        "spread, points: equidistant": KernelCode(k, n, placement=1.0, exponent=0.0),
    }
    return {
        "default": Scheme(KernelCode(k, n)),
        "order: arrival": Scheme(KernelCode(k, n), "arrival"),
        "decoder: spline": Scheme(KernelCode(k, n), spline=True),
        "decoder: spline, order: arrival": Scheme(KernelCode(k, n), "arrival", spline=True),
        "metric: Euclidean": Scheme(KernelCode(k, n, shrinkage=0)),
        "copies: equal": Scheme(KernelCode(k, n), num_stragglers=0),
        **{name: Scheme(code) for name, code in mixed.items()},
    }


def levers(name: str, case: Case, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), settings(quick)["batches"]
    batches = progress(of.batches("held_out", BATCH_SIZE, count), "batches", count)
    scores = evaluate(of, batches, schemes(case), case[2], uniform(case))
    return {"codes": summaries(scores["uniform"], ("default",))}


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in CASES:
            yield (name, str(case)), functools.partial(levers, name, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batch size": BATCH_SIZE, "batches": 2 if quick else 25}
