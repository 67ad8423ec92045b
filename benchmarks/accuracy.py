"""How good every code is, against the number of stragglers: ``python -m benchmarks accuracy``.

The paper's experiment on networks and data that install from registries. Every code answers the
same held-out batches from the same received sets; for a batch, the sets of all S are nested. Both
softmax outputs, as the paper has them, and logits; S of N workers lost uniformly, or S neighbours.

A code with something to choose is used at its own best: on tuning batches that no gradient has
seen, under uniform stragglers, once for each S, output and aim. What has the least squared error
gives the errors, and what names most of the network's own classes the accuracy and the agreement.

- spline: the paper's, in the order of arrival, with both smoothings tuned; Berrut: likewise;
- both by similarity, "ordered", as everything below; Floater-Hormann: with the order of the weights
  tuned; Lagrange (adapted): decoded by least squares of a tuned degree, as a network has none;
- uncoded: K workers, an input each; an input whose worker is late has no answer, which is wrong;
- replication: lost inputs get the mean of the batch; replication + fill: they are predicted by the
  kernel, tuned as the last;
- default: ``KernelCode``; tuned: as :func:`coded_torch.tuning.tune` makes it, on logits.

Of 20 photographs (EfficientNet-Lite0) only the agreement with the network means something; there,
batches are orders of the same 20, so the intervals say nothing about other photographs.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode, LagrangeCode

from .runs import Measurement, progress
from .schemes import (
    BATCH_SIZE,
    SMOOTHINGS,
    TUNING_SETS,
    Round,
    Scheme,
    Scores,
    Uncoded,
    equal_copies,
    rounded,
    splines,
    student,
    tuned_kernel,
    unmixed,
)
from .subjects import PHOTOGRAPHS, SEED, Subject, subject

Curve = tuple[int, int, tuple[int, ...]]  # N, K and every S
CURVES: dict[str, tuple[Curve, ...]] = {
    "lenet5": (
        (100, 20, (5, 10, 20, 30, 40, 50, 60, 70, 80)),
        (100, 60, (2, 5, 10, 15, 20, 25, 30, 35, 40)),
    ),
    "vit": ((20, 8, (1, 2, 3, 4, 5, 6, 8, 10, 12)),),
    "repvgg": ((60, 20, (2, 5, 10, 15, 20, 25, 30, 35, 40)),),
    PHOTOGRAPHS: ((24, 20, (1, 2, 4, 6, 8)),),
}
QUICK: dict[str, tuple[Curve, ...]] = {"lenet5": ((20, 8, (1, 3, 8)),)}
BATCHES = {"lenet5": 40, "vit": 40, "repvgg": 15, PHOTOGRAPHS: 5}
TUNING = {"lenet5": (6, 4), "vit": (6, 4), "repvgg": (4, 2), PHOTOGRAPHS: (2, 1)}  # codes, kernel
ORDERS = (1, 2, 3, 4)
DEGREES = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5)  # times that of the encoder
OUTPUTS = {"softmax": lambda x: x.softmax(-1), "logits": lambda x: x}
LAWS = ("uniform", "contiguous")
AIMS = ("squared error", "agreement")

TUNED = {
    "spline": ("encoder_smoothing", "decoder_smoothing"),
    "spline, ordered": ("encoder_smoothing", "decoder_smoothing"),
    "Floater-Hormann, ordered": ("order",),
    "Lagrange (adapted), ordered": ("decoder_degree",),
    "tuned": ("placement", "shrinkage", "length"),
}

Picks = dict[tuple[str, int, str], dict[str, Scheme]]  # output, S and aim: every code's scheme


def families(n: int, k: int) -> dict[str, list[Scheme]]:
    """Every code, with all that its numbers may be."""
    degrees = sorted({round(x * (k - 1)) for x in DEGREES})
    lagranges = [LagrangeCode(k, n, decoder_degree=d) for d in degrees if d < n]
    return {
        "spline": [Scheme(code, "arrival") for code in splines(n, k)],
        "Berrut": [Scheme(BerrutCode(k, n), "arrival")],
        "spline, ordered": [Scheme(code) for code in splines(n, k)],
        "Berrut, ordered": [Scheme(BerrutCode(k, n))],
        "Floater-Hormann, ordered": [Scheme(BerrutCode(k, n, order=d)) for d in ORDERS],
        "Lagrange (adapted), ordered": [Scheme(code) for code in lagranges],
        "uncoded": [Scheme(Uncoded(k, n), "arrival")],
        **{name: [scheme] for name, scheme in unmixed((n, k, 0)).items()},
    }


def received_sets(
    n: int, stragglers: Sequence[int], generator: torch.Generator
) -> dict[tuple[str, int], list[int]]:
    """The workers that answer, by law and S; under a law, who is lost at S is lost at any more."""
    start = torch.randint(n, (), generator=generator)
    lost = {
        "uniform": torch.randperm(n, generator=generator),
        "contiguous": (start + torch.arange(n)) % n,
    }
    return {(law, s): sorted(lost[law][s:].tolist()) for law in LAWS for s in stragglers}


def pick(of: Subject, size: int, curve: Curve, counts: tuple[int, int]) -> Picks:
    """Every code at its best, as measured on tuning batches; how many for codes and the kernel."""
    n, k, stragglers = curve
    every = families(n, k)
    open_questions = [x for candidates in every.values() if len(candidates) > 1 for x in candidates]
    generator = torch.Generator().manual_seed(SEED + 1)
    scores: dict[tuple[str, int, Scheme], Scores] = defaultdict(Scores)
    for batch in progress(of.batches("tuning", size, counts[0]), "tuning", counts[0]):
        sets = {
            (i, s): received
            for i in range(TUNING_SETS)
            for (law, s), received in received_sets(n, stragglers, generator).items()
            if law == "uniform"
        }
        trial = Round(of.model, batch, sets)
        for (i, s), received in sets.items():
            for scheme in open_questions:
                if len(received) < scheme.code.min_received:
                    continue
                for output, stage in OUTPUTS.items():
                    answers, _ = trial.answers(scheme, s, (i, s), stage)
                    of_scheme = scores[output, s, scheme]
                    of_scheme.add(answers, stage(batch.exact), batch.labels, None)
    kernels = {
        s: tuned_kernel(of, of.batches("tuning", size, counts[1]), (n, k, s))
        for s in progress(stragglers, "tuning the kernel")
    }

    def best(output: str, s: int, aim: str, candidates: Sequence[Scheme]) -> Scheme:
        def loss(scheme: Scheme) -> float:
            means = scores[output, s, scheme].columns.mean(1)
            return float(np.nan_to_num(means[3], nan=np.inf) if aim == AIMS[0] else -means[2])

        if len(candidates) == 1:
            return candidates[0]
        return min((x for x in candidates if (output, s, x) in scores), key=loss)

    return {
        (output, s, aim): {
            **{code: best(output, s, aim, candidates) for code, candidates in every.items()},
            "replication + fill": equal_copies(kernels[s]),
            "tuned": Scheme(kernels[s]),
        }
        for output in OUTPUTS
        for s in stragglers
        for aim in AIMS
    }


def accuracy(name: str, curve: Curve, quick: bool) -> dict[str, Any]:
    n, _, stragglers = curve
    of, count = subject(name, quick), 2 if quick else BATCHES[name]
    size = min(BATCH_SIZE, len(of.held_out.images))
    picks = pick(of, size, curve, (2, 1) if quick else TUNING[name])
    generator = torch.Generator().manual_seed(SEED)
    scores: dict[tuple[str, str, int, str, str], Scores] = defaultdict(Scores)
    for batch in progress(of.batches("held_out", size, count), "batches", count):
        sets = received_sets(n, stragglers, generator)
        trial = Round(of.model, batch, sets)
        for law, s in sets:
            # Output after output, as codes keep the decoder of the received set used last.
            for code in picks[next(iter(picks))]:
                for output, stage in OUTPUTS.items():
                    found: dict[Scheme, Tensor] = {}
                    for aim in AIMS:
                        scheme = picks[output, s, aim][code]
                        if scheme not in found:
                            found[scheme], _ = trial.answers(scheme, s, (law, s), stage)
                        scores[output, law, s, code, aim].add(
                            found[scheme], stage(batch.exact), batch.labels, None
                        )
    return {
        "stragglers": list(stragglers),
        "tuned": _chosen(picks, stragglers),
        **{x: {law: _curves(scores, x, law, stragglers) for law in LAWS} for x in OUTPUTS},
        "fidelity": fidelity(scores, stragglers),
    }


def _curves(
    scores: Mapping[Any, Scores], output: str, law: str, stragglers: Sequence[int]
) -> dict[str, Any]:
    """For every code and measure, an interval for each S."""
    errors, hits = ("rmse", "rmse_mean"), ("relative_accuracy", "agreement")
    codes = dict.fromkeys(code for _, _, _, code, _ in scores)
    curves: dict[str, Any] = {}
    for code in codes:
        for aim, measures in zip(AIMS, (errors, hits), strict=True):
            each = [scores[output, law, s, code, aim].summary() for s in stragglers]
            for measure in measures:
                curves.setdefault(code, {})[measure] = [summary[measure] for summary in each]
    return curves


def _chosen(picks: Picks, stragglers: Sequence[int]) -> dict[str, Any]:
    """The tuned numbers of every code, for each output and aim, S by S."""
    return {
        code: {
            f"{attribute}; {output}, {aim}": [
                str(getattr(picks[output, s, aim][code].code, attribute)) for s in stragglers
            ]
            for attribute in attributes
            for output in OUTPUTS
            for aim in AIMS
        }
        for code, attributes in TUNED.items()
    }


def fidelity(scores: Mapping[Any, Scores], stragglers: Sequence[int]) -> dict[str, Any]:
    """The spline's gain over Berrut's code, averaged over S, in the paper's protocol.

    Softmax outputs, order of arrival, the paper's points, uniform stragglers: the share by which
    both kinds of RMSE are lower, and the points by which RelAcc is higher. Intervals by the
    jackknife over batches.
    """

    def columns(code: str, aim: str) -> np.ndarray:  # [S, 7, batches]
        return np.stack([scores["softmax", "uniform", s, code, aim].columns for s in stragglers])

    errors, hits = ([columns(code, aim) for code in ("spline", "Berrut")] for aim in AIMS)

    def gains(kept: np.ndarray) -> np.ndarray:  # [3, S], in percent
        (ours, theirs), (right, wrong) = (
            [x[:, :, kept].mean(-1) for x in pair] for pair in (errors, hits)
        )
        rmse = 1 - np.sqrt(ours[:, 3] / theirs[:, 3])
        mean = 1 - ours[:, 4] / theirs[:, 4]
        return 100 * np.stack([rmse, mean, (right[:, 0] - wrong[:, 0]) / wrong[:, 1]])

    count = errors[0].shape[-1]
    without = np.stack([gains(np.arange(count) != i) for i in range(count)])  # [batches, 3, S]
    every = gains(np.arange(count))

    def half(each: np.ndarray) -> np.ndarray:
        return student(count) * np.sqrt((count - 1) * each.var(0))

    measures = ("rmse lower by %", "rmse_mean lower by %", "relative accuracy higher by points")
    return {
        measure: {
            "averaged": rounded(every[i].mean(), float(half(without[:, i].mean(-1)))),
            "by stragglers": [
                rounded(*pair) for pair in zip(every[i], half(without[:, i]), strict=True)
            ],
        }
        for i, measure in enumerate(measures)
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
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
        "smoothings": {part: list(values) for part, values in SMOOTHINGS.items()},
        "orders": list(ORDERS),
        "degrees, times that of the encoder": list(DEGREES),
    }
