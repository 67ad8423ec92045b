"""Which lies an audit row shows, for codes without copies: ``python -m benchmarks audits``.

Whole calls of a wrapper with ``audit=True``: batches of 240 in order of arrival, 24 machines of
which two are late and one lies, or none. Detected is a liar that is dropped, of those that were not
late; beside them stand the honest machines that were dropped, over all calls, and the liars that
are dropped without the row.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterable
from typing import Any

import torch

from coded_torch.codes import BerrutCode, SplineCode
from coded_torch.evaluation.summary import half_width, rounded
from coded_torch.nn import CodedWrapper, TooManyAdversaries, Waiting
from coded_torch.stragglers import Uniform
from coded_torch.workers import FaultyWorkers, LocalWorkers

from .adversaries import BATCH_SIZE, LIES, NETWORKS, Lie
from .runs import Measurement, progress
from .subjects import SEED, subject

CODES = {"SplineCode": SplineCode(20, 24), "BerrutCode": BerrutCode(20, 24)}
LOST = 2
AUDITED = LIES | {"x 1.05": Lie("scale", 0.1), "offset x .1": Lie("offset", 0.1)}


@torch.no_grad()
def audits(name: str, code: str, audit: bool, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), settings(quick)["batches"]
    found: dict[str, Any] = {}
    for what, lie in progress(AUDITED.items(), code, len(AUDITED)):
        caught, falsely, undecided = [], 0, 0
        for index, batch in enumerate(of.batches("held_out", BATCH_SIZE, count)):
            liar = random.Random(SEED + index).randrange(24)
            pool: Any = LocalWorkers(Uniform(LOST, seed=SEED + index))
            if lie is not None:
                pool = FaultyWorkers(
                    pool, attack=lie.attack, adversaries=(liar,), strength=lie.strength, seed=index
                )
            coded = CodedWrapper(
                of.model,
                CODES[code],
                workers=pool,
                waiting=Waiting.first(LOST),
                ordering="arrival",
                shuffle=random.Random(SEED + index),
                max_adversaries=1,
                audit=audit,
            )
            if lie is not None and lie.attack == "replay" and lie.earlier:
                with contextlib.suppress(TooManyAdversaries):
                    coded(batch.images.flip(0))  # what is replayed
            try:
                coded(batch.images)
            except TooManyAdversaries:
                undecided += 1
            report = coded.last_run
            assert report is not None
            falsely += len(set(report.adversaries) - ({liar} if lie else set()))
            if lie is not None and liar in {*report.received, *report.adversaries}:
                caught.append(float(liar in report.adversaries))
        found[what] = {"calls": count, "dropped falsely": falsely, "errors": undecided}
        if lie is not None:
            share = torch.tensor(caught, dtype=torch.float64).numpy()
            found[what]["detected"] = rounded(share.mean(), half_width(share))
    return found


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for code in CODES:
            yield (name, code, "audit row"), functools.partial(audits, name, code, True, quick)
            if name == NETWORKS[0]:
                yield (name, code, "without"), functools.partial(audits, name, code, False, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": 2 if quick else 50,
        "lies": {name: list(lie) if lie else None for name, lie in AUDITED.items()},
    }
