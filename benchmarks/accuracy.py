"""How good every code is, against the number of stragglers: ``python -m benchmarks accuracy``.

The paper's experiment on networks and data that install from registries. Every code answers the
same held-out batches from the same received sets; for a batch, the sets of all S are nested. Both
softmax outputs, as the paper has them, and logits; S of N workers lost uniformly, or S neighbours.

A code with something to choose is used at its own best among its ``candidates()``: on tuning
batches that no gradient has seen, under uniform stragglers, once for each S, output and aim. What
has the least squared error gives the errors, and what names most of the network's own classes the
accuracy and the agreement.

- spline: the paper's, in the order of arrival, with both smoothings tuned; Berrut: likewise;
- both by similarity, "ordered", as everything below; Floater-Hormann: with the order of the weights
  tuned; Lagrange (adapted): decoded by least squares of a tuned degree, as a network has none;
- uncoded: K workers, an input each; an input whose worker is late has no answer, which is wrong;
- replication: :class:`~coded_torch.codes.ReplicationCode`, where a lost input gets the mean of its
  group; "batch mean": of the batch; "regression": predicted by a regression tuned as the last;
- KernelCode: as it is; tuned: as :func:`coded_torch.evaluation.tune.tune` makes it, on logits.

Of 20 photographs (EfficientNet-Lite0) only the agreement with the network means something; there,
batches are orders of the same 20, so the intervals say nothing about other photographs.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode, Code, KernelCode, LagrangeCode, SplineCode
from coded_torch.evaluation.scores import Scores, rounded, student

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, FIXED, Scheme, Uncoded, decode, equal_copies, trial, tuned, unmixed
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
TUNING_SETS = 5  # received sets per batch: rare ones decide the squared error
OUTPUTS = {"softmax": lambda x: x.softmax(-1), "logits": lambda x: x}
LAWS = ("uniform", "contiguous")
AIMS = ("squared error", "agreement")

TUNED = {
    "spline": ("encoder_smoothing", "decoder_smoothing"),
    "spline, ordered": ("encoder_smoothing", "decoder_smoothing"),
    "Floater-Hormann, ordered": ("order",),
    "Lagrange (adapted), ordered": ("decoder_degree",),
    "KernelCode, tuned": ("metric", "length"),
}

Picks = dict[tuple[str, int, str], dict[str, Scheme]]  # output, S and aim: every code's scheme


def variants(code: Code, ordering: str = "similarity") -> list[Scheme]:
    """A code with all combinations of the numbers that are worth trying."""
    numbers = code.candidates()
    combinations = itertools.product(*numbers.values())
    every = (code.replace(**dict(zip(numbers, x, strict=True))) for x in combinations)
    return [Scheme(one, ordering, 0) for one in every]  # none of them looks at S


def families(n: int, k: int) -> dict[str, list[Scheme]]:
    """Every code but those that are tuned by regression, with all that its numbers may be."""
    spline, berrut = SplineCode(k, n), BerrutCode(k, n)
    return {
        "spline": variants(spline, "arrival"),
        "Berrut": [Scheme(berrut, "arrival", 0)],
        "spline, ordered": variants(spline),
        "Berrut, ordered": [Scheme(berrut, num_stragglers=0)],
        "Floater-Hormann, ordered": variants(berrut),
        "Lagrange (adapted), ordered": variants(LagrangeCode(k, n, decoder_degree=k - 1)),
        "uncoded": [Scheme(Uncoded(k, n), "arrival", 0)],
        **{name: [scheme] for name, scheme in unmixed((n, k, 0)).items()},
    }


def received_sets(
    n: int, stragglers: Sequence[int], generator: torch.Generator
) -> dict[tuple[str, int], list[int]]:
    """The workers that answer, by law and S; of one law, those lost at S are lost at any more."""
    start = torch.randint(n, (), generator=generator)
    lost = {
        "uniform": torch.randperm(n, generator=generator),
        "contiguous": (start + torch.arange(n)) % n,
    }
    return {(law, s): sorted(lost[law][s:].tolist()) for law in LAWS for s in stragglers}


def tuning_scores(
    of: Subject, size: int, curve: Curve, count: int, schemes: Iterable[Scheme]
) -> Mapping[tuple[str, int, Scheme], Scores]:
    """By output, S and scheme: how it does on tuning batches, where it can decode all received."""
    n, _, stragglers = curve
    generator = torch.Generator().manual_seed(SEED + 1)
    scores: dict[tuple[str, int, Scheme], Scores] = defaultdict(Scores)
    for batch in progress(of.batches("tuning", size, count), "tuning", count):
        drawn = [received_sets(n, stragglers, generator) for _ in range(TUNING_SETS)]
        sets = [(s, each["uniform", s]) for each in drawn for s in stragglers]
        tried = trial(of.model, batch, (received for _, received in sets))
        for s, received in sets:
            for scheme in schemes:
                if len(received) < scheme.code.min_received:
                    continue
                for output, stage in OUTPUTS.items():
                    answers, _ = decode(tried, scheme, received, s, stage)
                    scores[output, s, scheme].add(answers, stage(tried.exact[0]), batch.labels)
    return scores


def pick(of: Subject, size: int, curve: Curve, counts: tuple[int, int]) -> Picks:
    """Every code at its best on tuning batches, so many for codes and for regressions."""
    n, k, stragglers = curve
    every = families(n, k)
    open_questions = [x for some in every.values() if len(some) > 1 for x in some]
    scores = tuning_scores(of, size, curve, counts[0], open_questions)

    def loss(output: str, s: int, aim: str, scheme: Scheme) -> float:
        _, _, agreement, mse, *_ = scores[output, s, scheme].columns.mean(1)
        return float(np.nan_to_num(mse, nan=np.inf) if aim == "squared error" else -agreement)

    def best(output: str, s: int, aim: str, some: Sequence[Scheme]) -> Scheme:
        if len(some) == 1:
            return some[0]
        applicable = [scheme for scheme in some if (output, s, scheme) in scores]
        return min(applicable, key=lambda scheme: loss(output, s, aim, scheme))

    batches = list(of.batches("tuning", size, counts[1]))
    # Regressions are tuned without received sets, and so for all S at once.
    kernel = tuned(of.model, batches, Scheme(KernelCode(k, n, **FIXED)), 0)
    return {
        (output, s, aim): {
            **{code: best(output, s, aim, some) for code, some in every.items()},
            "replication, regression": equal_copies(kernel.code),
            "KernelCode, tuned": kernel,
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
        tried = trial(of.model, batch, sets.values())
        for (law, s), received in sets.items():
            # Output after output, as plans keep the decoder of the received set used last.
            for code in picks[next(iter(picks))]:
                for output, stage in OUTPUTS.items():
                    found: dict[Scheme, Tensor] = {}
                    for aim in AIMS:
                        scheme = picks[output, s, aim][code]
                        if scheme not in found:
                            found[scheme], _ = decode(tried, scheme, received, s, stage)
                        scores[output, law, s, code, aim].add(
                            found[scheme], stage(tried.exact[0]), batch.labels
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
    }
