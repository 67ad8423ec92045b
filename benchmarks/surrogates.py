"""How much is a surrogate worth, good or bad? ``python -m benchmarks surrogates``.

All answers come from :class:`~coded_torch.nn.CodedWrapper`, on held-out images, with the same
received sets:

- memory: a stream of requests of images none of which comes twice, from a cold start. The memory
  learns whenever 256 results are new, as it does where requests take some time;
- useless: surrogates of noise, of the wrong scale and sign, of a network that was never trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import RegressionCode
from coded_torch.experiments.scores import Score, ratio, score
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers

from .accuracy import SMALL
from .networks import SEED, Batch, Subject, seeded
from .runs import Measurement, progress
from .subjects import run, small_network, student_of, subject

NAME = "lenet5"
SIZE = 64  # rows of a batch
LEARNS_AFTER = 256  # results, as a Memory does by itself


def wrap(of: Subject, surrogate: Any = ()) -> CodedWrapper:
    n, k, s = SMALL
    pool, code = LocalWorkers(Uniform(s, seed=SEED)), RegressionCode(k, n)
    return CodedWrapper(of.model, code, workers=pool, surrogate=surrogate)


@torch.no_grad()
def answered(
    of: Subject, batches: Iterable[Batch], some: dict[str, Callable[[Tensor], Tensor]]
) -> dict[str, list[Score]]:
    """Send batches through wrappers, with the same losses, or through functions."""
    scores: dict[str, list[Score]] = {name: [] for name in some}
    for batch in batches:
        exact = run(of.model, batch.images)
        for name, function in some.items():
            scores[name].append(score(function(batch.images), exact, batch.labels))
    return scores


def summary(scores: list[Score], reference: list[Score]) -> dict[str, Any]:
    """Return the normalised MSE, alone and over a reference's, and the accuracy that is kept."""
    ours, theirs = np.array(scores).T, np.array(reference).T
    return {
        "mse": ratio(ours[0], ours[2]),
        "relative_accuracy": ratio(ours[3], ours[4]),
        "against without": ratio(ours[0], theirs[0]),
    }


@torch.no_grad()
def memory(quick: bool) -> dict[str, Any]:
    """Send requests with a memory, which learns as soon as enough is new, and without.

    The last third also counts the estimated rows, and the shares of them with the class that the
    module gives.
    """
    of, count, known, found = subject(NAME, quick), 9 if quick else 150, Memory(), {}
    requests = list(of.batches("held_out", SIZE, count))
    coded, fresh = {"with": wrap(of, known), "without": wrap(of)}, 0
    for i in range(3):
        scores: dict[str, list[Score]] = {name: [] for name in coded}
        same: dict[str, list[Tensor]] = {name: [] for name in coded}
        for batch in requests[i * count // 3 : (i + 1) * count // 3]:
            exact = run(of.model, batch.images)
            for name, wrapper in coded.items():
                answers, report = wrapper.run(batch.images)
                scores[name].append(score(answers, exact, batch.labels))
                same[name].append((answers.argmax(1) == exact.argmax(1))[report.estimated])
                if name == "with":
                    fresh += int((~report.estimated).sum())
            if fresh >= LEARNS_AFTER:
                known.rebuild()
                fresh = 0
        found[f"third {i + 1}"] = summary(scores["with"], scores["without"])
    kept = {name: torch.cat(each).double() for name, each in same.items()}
    shares = {f"class kept, {name}": round(float(x.mean()), 4) for name, x in kept.items()}
    return {"remembered": len(known), "estimated": len(kept["with"]), **shares, **found}


def useless(size: int, quick: bool) -> dict[str, Any]:
    of, generator = subject(NAME, quick), torch.Generator().manual_seed(SEED)
    small = student_of(NAME, quick)
    bad: dict[str, Any] = {
        "noise": lambda x: torch.randn(len(x), 10, generator=generator),
        "untrained": seeded(small_network, SEED),
        "wrong scale and sign": lambda x: -20 * small(x),
    }
    wrappers = {what: wrap(of, s) for what, s in {**bad, "without": ()}.items()}
    batches = of.batches("held_out", size, settings(quick)["batches"])
    scores = answered(of, progress(batches, "batches"), dict(wrappers))
    return {what: summary(scores[what], scores["without"])["against without"] for what in bad}


def measurements(quick: bool) -> Iterable[Measurement]:
    yield (NAME, "memory"), functools.partial(memory, quick)
    for size in (8, SIZE):
        yield (NAME, "useless", str(size)), functools.partial(useless, size, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batches": 3 if quick else 50}
