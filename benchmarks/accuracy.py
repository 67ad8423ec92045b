"""How good are the answers, scheme by scheme? ``python -m benchmarks accuracy``.

Every table comes from ``coded_torch.compare``: the codes, each tuned on tuning batches, beside the
trivial baselines. All schemes answer the same batches from the same received sets.

- table: K inputs go to N workers, and S of them are lost, in batches of 240 rows, of 64, and of K
  rows as in the paper;
- neighbours: the lost workers are side by side;
- adversarial: the workers are lost that a code misses most, by a search for the set of the largest
  squared error on a tuning batch;
- curve: the errors against S, on one network of each kind.

Five trainings of LeNet-5 and five splits of a table count as one observation each, with batches and
received sets of their own; of the other networks, every batch is one.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from coded_torch.codes import Code, SplineCode
from coded_torch.experiments._tune import SETS, Trial
from coded_torch.experiments.compare import Decoder, compare, received_by
from coded_torch.experiments.scores import Comparison, grouped, rounded
from coded_torch.input_space._regression import Regression
from coded_torch.stragglers import Contiguous, Stragglers, Trace, Uniform

from .networks import SEED, Subject
from .runs import Measurement, progress
from .subjects import run, student_of, subject

Case = tuple[int, int, int]  # N, K, S

CASES: tuple[Case, ...] = (
    (100, 20, 60), (60, 20, 20), (24, 20, 4), (20, 8, 3), (10, 8, 2), (9, 8, 1),
)  # fmt: skip
SMALL: Case = (6, 4, 2)  # the case of batches of 64
PAIRS: Case = (3, 2, 1)  # the case of batches of 16 and 64, which favours codes that mix
FEW: Case = (24, 20, 4)
#: The seeds of each subject's training, or the splits of a table.
SEEDS = {
    "lenet5": range(5),
    "lenet5-softmax": range(5),
    "lenet5-mixtures": range(1),
    "digits": range(5),
    "speeches": range(1),
}
#: N, K and the numbers of lost workers of each curve.
CURVES = (
    (100, 20, (5, 10, 20, 30, 40, 50, 60, 70, 80)),
    (100, 60, (2, 5, 10, 15, 20, 25, 30, 35, 40)),
)
DRAWN = (
    "the paper's scheme", "Berrut", "the paper's, ordered", "replication", "regression",
    "no redundancy, regression",
)  # fmt: skip
#: The schemes that others are compared with: the code that is recommended, and the paper's.
REFERENCES = ("regression", "the paper's scheme")
QUANTILES = (0.1, 0.5, 0.9)  # of batches, by normalised MSE
_RARE = 0.01  # a rate of changed rows below it gets an exact interval


def kernel_decoder(of: Subject, case: Case, tuning: Sequence[Tensor]) -> dict[str, Decoder]:
    """Return a decoder by regression of the mixtures that the paper's scheme sends, ordered.

    Rows and mixtures are points of one space, as for ``RegressionCode``. The encoder's smoothing
    has the least squared error on the tuning batches.
    """
    n, k, s = case

    def decoder(code: Code) -> Decoder:
        def answers(inputs: list[Tensor], outputs: list[Tensor], received: Sequence[int]) -> Tensor:
            (rows,) = inputs
            sent = code.plan(inputs, s).encode(rows)[received].flatten(0, 1)
            plan, at = Regression().plan([torch.cat([rows, sent])]), len(rows)
            results = run(of.model, sent)[:, None]
            return plan.decode(results, range(at, at + len(sent)))[:at]

        return answers

    def error(code: Code) -> float:
        delays, found = Uniform(s, seed=SEED + 1), 0.0
        for images in tuning:
            exact = run(of.model, images)
            for received in (received_by(delays, n, s) for _ in range(SETS)):
                answers = decoder(code)([images], [exact], received)
                found += float((answers - exact).square().sum())
        return found

    code = SplineCode(k, n)
    smoothings = code.candidates()["encoder_smoothing"]
    best = min((code.replace(encoder_smoothing=x) for x in smoothings), key=error)
    return {"the paper's encoder, regression": decoder(best)}


def tried(
    of: Subject, cases: Sequence[Case], size: int, count: int, seeds: int = SEED, **options: Any
) -> Comparison:
    """Compare the schemes on batches of a subject, after one of tuning or as many as make 240.

    The seed is of the batches, and of the workers that are lost.
    """
    tuning = list(of.batches("tuning", size, max(1, 240 // size), seeds))
    every = [*tuning, *of.batches("held_out", size, count, seeds)]
    labels: Any = None if every[0].labels is None else [x.labels for x in every]
    images = [x.images for x in every]
    if not options.keys() & {"extra", "schemes"}:
        (case,) = cases
        decoders = kernel_decoder(of, case, [x.images for x in tuning])
        options["extra"] = lambda k, n: decoders
    return compare(
        of.model,
        images,
        cases,
        labels=labels,
        tuning_batches=len(tuning),
        seeds=seeds,
        **options,
    )


def cells(found: Comparison, references: Sequence[str] = REFERENCES) -> dict[str, Any]:
    """Return the numbers of each scheme, also relative to the references."""
    rows = {row.name: row for row in found.rows}
    schemes: dict[str, Any] = {
        name: {
            "mse": row.mse,
            "rmse": row.rmse,
            "relative_accuracy": row.relative_accuracy,
            "work": round(row.work, 3),
            "changed": rate(*row.changed) if row.relative_accuracy else None,
        }
        for name, row in rows.items()
    }
    for name, records in grouped(found.records, lambda x: x.scheme).items():
        each = [x.score.mse / x.score.variance for x in records]
        schemes[name]["quantiles"] = [rounded(x)[0] for x in np.quantile(each, QUANTILES)]
    for reference in references:
        for row in found.against(reference):
            if row.name != reference:
                pair = {"mse": row.mse_ratio, "relative_accuracy": row.gain}
                schemes[row.name][f"against {reference}"] = pair
    return schemes


def rate(count: int, total: int) -> list[float]:
    """Return a rate; a rare one with its exact interval, as if rows were independent."""
    if count / total >= _RARE:
        return [float(f"{count / total:.4g}")]
    interval = scipy.stats.binomtest(count, total).proportion_ci(method="exact")
    return [float(f"{x:.3g}") for x in (count / total, interval.low, interval.high)]


def table(name: str, case: Case, size: int, delays: Any, quick: bool) -> dict[str, Any]:
    limits, records = settings(quick), []
    seeds = SEEDS[name][: limits["trainings"]]
    for seed in progress(seeds, "seeds"):
        count = max(limits["batches"][name], -(-limits["rows"] // size))
        found = tried(
            subject(name, quick, seed), [case], size, count, seed, delays=delays,
            surrogate=student_of(name, quick, seed), received_sets=limits["received sets"],
        )  # fmt: skip
        # One of several trainings is one observation.
        records += [x._replace(batch=seed) if len(seeds) > 1 else x for x in found.records]
    comparison = Comparison(records)
    return {
        "records": comparison,
        "observations": len({x.batch for x in records}),
        "rows": max(row.changed[1] for row in comparison.rows),
        "codes": {name: repr(code) for (_, name), code in found.codes.items()},
        "schemes": cells(comparison),
    }


def adversarial(size: int) -> dict[str, Any]:
    """Compare the schemes on LeNet-5, each with the workers lost that it misses most."""
    of, student, records, lost = subject("lenet5"), student_of("lenet5"), [], {}
    codes = tried(of, [FEW], size, 1).codes
    (batch,) = of.batches("tuning", size, 1)
    count = settings(False)["batches"]["lenet5"]
    for (_, scheme), code in progress(codes.items(), "schemes"):
        lost[scheme] = worst(of.model, batch.images, code, FEW)
        how = {"delays": fixed(FEW[0], lost[scheme]), "surrogate": student, "schemes": [scheme]}
        records += tried(of, [FEW], size, count, **how).records
    once = {(x.scheme, x.batch): x for x in records}  # every comparison has the student alone
    comparison = Comparison([*once.values()])
    return {"records": comparison, "lost": lost, "schemes": cells(comparison)}


def fixed(count: int, lost: Iterable[int]) -> Callable[..., Stragglers]:
    """Return delays by which these workers are lost, but in tuning, which has another seed."""
    latencies = [math.inf if n in set(lost) else 0.0 for n in range(count)]
    return lambda s, seed: Trace([latencies]) if seed == SEED else Uniform(s, seed=seed)


def worst(model: nn.Module, images: Tensor, code: Code, case: Case) -> list[int]:
    """Return the S of N workers that a code misses most, by a search.

    It begins with the worst of all blocks and of random sets, and exchanges one worker after the
    other for the one that is missed most, until none is.
    """
    n, _, s = case
    trial = Trial(model, (images,), [range(n)])
    generator = random.Random(SEED)
    found: dict[tuple[int, ...], float] = {}

    def error(lost: Iterable[int]) -> float:
        key = tuple(sorted(lost))
        if key not in found:
            received = [worker for worker in range(n) if worker not in key]
            (answers,) = trial.decode(code, received, s)
            found[key] = float((answers - trial.exact[0]).double().square().sum())
        return found[key]

    blocks = [[(i + j) % n for j in range(s)] for i in range(n)]
    draws = [generator.sample(range(n), s) for _ in range(200)]
    best = max([*blocks, *draws], key=error)
    while True:
        sets = [
            [*best[:place], other, *best[place + 1 :]]
            for place, other in itertools.product(range(s), range(n))
            if other not in best
        ]
        better = max(sets, key=error)
        if not error(better) > error(best):  # ends: there are finitely many sets
            return sorted(best)
        best = better


def curve(n: int, k: int, lost: Sequence[int]) -> dict[str, Any]:
    """Compare the schemes that are drawn on LeNet-5, for every number of lost workers."""
    limits, how = settings(False), {"schemes": DRAWN, "surrogate": student_of("lenet5")}
    cases, count = [(n, k, s) for s in lost], limits["batches"]["lenet5"]
    found = tried(subject("lenet5"), cases, limits["rows"], count, **how)
    schemes = {
        name: {key: [getattr(row, key) for row in rows] for key in ("mse", "relative_accuracy")}
        for name, rows in grouped(found.rows, lambda row: row.name).items()
    }
    return {"records": found, "stragglers": list(lost), "schemes": schemes}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in ["lenet5"] if quick else SEEDS:
        for (n, k, s), size in sizes(name, quick):
            regime = f"B = {size}" if size != k else "B = K"
            key = name, "table", regime, str((n, k, s))
            yield key, functools.partial(table, name, (n, k, s), size, Uniform, quick)
    if not quick:
        key = "lenet5", "neighbours", "B = 240", str(FEW)
        yield key, functools.partial(table, "lenet5", FEW, 240, Contiguous, quick)
        key = "lenet5", "adversarial", "B = 240", str(FEW)
        yield key, functools.partial(adversarial, 240)
        for n, k, lost in CURVES:
            key = "lenet5", "curve", str((n, k))
            yield key, functools.partial(curve, n, k, lost)


def sizes(name: str, quick: bool) -> Iterable[tuple[Case, int]]:
    """Yield the cases of a subject's tables, each with the batch size."""
    if quick:
        yield from [(PAIRS, 16), (SMALL, 64)]
        return
    if name == "lenet5-softmax":  # the paper's cases
        yield from [((100, 20, 60), 20), (FEW, 20), (FEW, 240), (SMALL, 64)]
        return
    whole = CASES if name == "lenet5" else (FEW, (9, 8, 1))
    yield from itertools.product(whole, [240])
    yield from [(SMALL, 64), (PAIRS, 16), (PAIRS, 64)]
    yield from ((case, case[1]) for case in (whole if name == "lenet5" else (FEW,)))


def settings(quick: bool) -> dict[str, Any]:
    few, whole = dict.fromkeys(SEEDS, 2), dict.fromkeys(SEEDS, 6)
    return {
        "seed": SEED,
        "rows": 120 if quick else 240,
        "batches": few if quick else whole | {"digits": 2, "speeches": 12},
        "received sets": 2 if quick else 5,
        "trainings": 1 if quick else 5,
    }
