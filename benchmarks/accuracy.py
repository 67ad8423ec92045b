"""How good is every code, against the number of stragglers? ``python -m benchmarks accuracy``.

The paper's experiment on networks and data that install from registries. For a batch, the received
sets of all S are nested. Outputs are softmax, as in the paper, or logits; the S lost workers are
uniform, or neighbours.

A code with parameters is used at its best among its ``candidates()`` on tuning batches, under
uniform stragglers, for each S, output and aim: least squared error for the errors, and most of the
network's own classes for accuracy and agreement. "Ordered" is by similarity, else by arrival.
Lagrange (adapted) is decoded by least squares of a tuned degree.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from coded_torch.codes import (
    BerrutCode,
    Code,
    FloaterHormannCode,
    LagrangeCode,
    RegressionCode,
    SplineCode,
)

from .runs import Measurement, progress
from .schemes import (
    BATCH_SIZE,
    FIXED,
    OUTPUTS,
    Scheme,
    Scores,
    evaluate,
    rounded,
    student,
    tuned,
    unmixed,
)
from .subjects import SEED, Subject, subject

Curve = tuple[int, int, tuple[int, ...]]  # N, K and every S
Key = tuple[str, int]  # law and S
Name = tuple[str, str, str]  # output, code and aim
CURVES: dict[str, tuple[Curve, ...]] = {
    "lenet5": (
        (100, 20, (5, 10, 20, 30, 40, 50, 60, 70, 80)),
        (100, 60, (2, 5, 10, 15, 20, 25, 30, 35, 40)),
    ),
    "vit": ((20, 8, (1, 2, 3, 4, 5, 6, 8, 10, 12)),),
    "repvgg": ((60, 20, (2, 5, 10, 15, 20, 25, 30, 35, 40)),),
}
QUICK: dict[str, tuple[Curve, ...]] = {"lenet5": ((20, 8, (1, 3, 8)),)}
BATCHES = {"lenet5": 40, "vit": 40, "repvgg": 15}
TUNING = {"lenet5": (6, 4), "vit": (6, 4), "repvgg": (4, 2)}  # codes, kernel
TUNING_SETS = 5  # received sets per batch: rare ones decide the squared error
LAWS = ("uniform", "contiguous")
AIMS = ("squared error", "agreement")
MEASURES = {
    "squared error": ("rmse", "rmse_mean"),
    "agreement": ("relative_accuracy", "agreement"),
}

Picks = dict[int, dict[Name, Scheme]]  # by S


def variants(code: Code) -> list[Code]:
    """Return a code with all combinations of the parameters that are worth trying."""
    numbers = code.candidates()
    every = itertools.product(*numbers.values())
    return [code.replace(**dict(zip(numbers, x, strict=True))) for x in every]


def families(n: int, k: int) -> dict[str, list[Code]]:
    """Return every code that is tuned by trying, with all its variants."""
    arrival = {"ordering": "arrival"}
    return {
        "spline": variants(SplineCode(k, n, **arrival)),
        "Berrut": [BerrutCode(k, n, **arrival)],
        "spline, ordered": variants(SplineCode(k, n)),
        "Berrut, ordered": [BerrutCode(k, n)],
        "Floater-Hormann, ordered": variants(FloaterHormannCode(k, n)),
        "Lagrange (adapted), ordered": variants(LagrangeCode(k, n, decoder_degree=k - 1)),
    }


def received_sets(
    n: int, stragglers: Sequence[int], generator: torch.Generator
) -> dict[Key, list[list[int]]]:
    """Return the workers that answer, by law and S; one law's lost workers are nested."""
    start = torch.randint(n, (), generator=generator)
    lost = {
        "uniform": torch.randperm(n, generator=generator),
        "contiguous": (start + torch.arange(n)) % n,
    }
    return {(law, s): [sorted(lost[law][s:].tolist())] for law in LAWS for s in stragglers}


def tuning_scores(of: Subject, size: int, curve: Curve, count: int) -> dict[int, dict[Any, Scores]]:
    """Return scores on tuning batches by S, then by output, family and variant."""
    n, k, stragglers = curve
    generator = torch.Generator().manual_seed(SEED + 1)
    every = {
        (output, name, i): Scheme(code, output=output)
        for output in OUTPUTS
        for name, codes in families(n, k).items()
        for i, code in enumerate(codes)
        if len(codes) > 1
    }

    def sets(index: int) -> dict[int, list[list[int]]]:
        drawn = [received_sets(n, stragglers, generator) for _ in range(TUNING_SETS)]
        return {s: [x for each in drawn for x in each["uniform", s]] for s in stragglers}

    batches = progress(of.batches("tuning", size, count), "tuning", count)
    return evaluate(of.model, batches, sets, lambda s: every)


def pick(of: Subject, size: int, curve: Curve, counts: tuple[int, int]) -> Picks:
    """Return every code at its best on tuning batches, so many for codes and for regressions."""
    n, k, stragglers = curve
    every, scores = families(n, k), tuning_scores(of, size, curve, counts[0])
    # Regressions are tuned without received sets, and so for all S at once.
    kernel = tuned(
        of.model, of.batches("tuning", size, counts[1]), RegressionCode(k, n, **FIXED), 0
    )

    def best(s: int, output: str, name: str, aim: str) -> Code:
        if len(every[name]) == 1:
            return every[name][0]

        def loss(i: int) -> float:
            of_code = scores[s].get((output, name, i))
            if of_code is None:  # it cannot decode so few results
                return float("inf")
            _, _, agreement, mse, *_ = of_code.columns.mean(1)
            return float(np.nan_to_num(mse, nan=np.inf) if aim == AIMS[0] else -agreement)

        return every[name][min(range(len(every[name])), key=loss)]

    picks: Picks = {}
    for s in stragglers:
        others = {name: (x.code, x.lost) for name, x in unmixed((n, k, s)).items()}
        others |= {"replication, regression": (kernel, 0), "KernelCode, tuned": (kernel, s)}
        picks[s] = {
            (output, name, aim): Scheme(*scheme, output)
            for output in OUTPUTS
            for aim in AIMS
            for name, scheme in (
                *((name, (best(s, output, name, aim), 0)) for name in every),
                *others.items(),
            )
        }
    return picks


def accuracy(name: str, curve: Curve, quick: bool) -> dict[str, Any]:
    n, _, stragglers = curve
    of, count = subject(name, quick), 2 if quick else BATCHES[name]
    size = min(BATCH_SIZE, len(of.held_out.images))
    picks = pick(of, size, curve, (2, 1) if quick else TUNING[name])
    generator = torch.Generator().manual_seed(SEED)
    scores: dict[Key, dict[Name, Scores]] = evaluate(
        of.model,
        progress(of.batches("held_out", size, count), "batches", count),
        lambda index: received_sets(n, stragglers, generator),
        lambda key: picks[key[1]],
    )
    curves: dict[str, Any] = {output: {law: {} for law in LAWS} for output in OUTPUTS}
    for output, code, aim in picks[stragglers[0]]:
        for law in LAWS:
            each = [scores[law, s][output, code, aim].summary() for s in stragglers]
            of_code = curves[output][law].setdefault(code, {})
            of_code |= {x: [summary[x] for summary in each] for x in MEASURES[aim]}
    chosen = {
        f"{code}; {output}, {aim}": [repr(picks[s][output, code, aim].code) for s in stragglers]
        for output, code, aim in picks[stragglers[0]]
    }
    fidelity = gains([scores["uniform", s] for s in stragglers])
    return {"stragglers": list(stragglers), "tuned": chosen, **curves, "fidelity": fidelity}


def gains(scores: Sequence[Mapping[Name, Scores]]) -> dict[str, Any]:
    """Return the spline's gain over Berrut's code, averaged over S, in the paper's protocol.

    Softmax outputs, order of arrival, the paper's points, uniform stragglers: the share by which
    both kinds of RMSE are lower, and the points by which the relative accuracy is higher. Intervals
    by the jackknife over batches.
    """
    (ours, theirs), (right, wrong) = (  # each [S, 7, batches]
        [
            np.stack([s["softmax", code, aim].columns for s in scores])
            for code in ("spline", "Berrut")
        ]
        for aim in AIMS
    )

    def of(kept: np.ndarray) -> np.ndarray:  # [3, S], in percent
        a, b, c, d = (x[:, :, kept].mean(-1) for x in (ours, theirs, right, wrong))
        rmse, mean = 1 - np.sqrt(a[:, 3] / b[:, 3]), 1 - a[:, 4] / b[:, 4]
        return 100 * np.stack([rmse, mean, (c[:, 0] - d[:, 0]) / d[:, 1]])

    count = ours.shape[-1]
    every = of(np.arange(count))
    without = np.stack([of(np.arange(count) != i) for i in range(count)])  # [batches, 3, S]
    scale = student(count) * np.sqrt(count - 1)
    measures = ("rmse lower by %", "rmse_mean lower by %", "relative accuracy higher by points")
    return {
        measure: {
            "averaged": rounded(every[i].mean(), float(scale * without[:, i].mean(-1).std(0))),
            "by stragglers": [
                rounded(*pair) for pair in zip(every[i], scale * without[:, i].std(0), strict=True)
            ],
        }
        for i, measure in enumerate(measures)
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name, curves in (QUICK if quick else CURVES).items():
        for curve in curves:
            yield (name, str(curve[:2])), functools.partial(accuracy, name, curve, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": 2 if quick else BATCHES,
        "tuning batches, of codes and of the kernel": {x: list(y) for x, y in TUNING.items()},
        "received sets per tuning batch": TUNING_SETS,
    }
