"""How good are the answers, code by code, at six settings? ``python -m benchmarks batches``.

Answers are logits, compared with the network's own. "Paper" is the paper's scheme in the order of
arrival, its smoothings tuned; "paper, ordered" the same by similarity. Replication fills in the
mean of a group's results, "batch mean" the batch's; "no redundancy" has the same regression.

- main: K inputs go to N workers, and S of them are lost;
- batch: batches of other sizes, and of random pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coded_torch.codes import BerrutCode, RegressionCode, SplineCode

from .runs import Measurement, progress
from .schemes import (
    BATCH_SIZE,
    FIXED,
    Case,
    Scheme,
    evaluate,
    summaries,
    tuned,
    uniform,
    unmixed,
)
from .subjects import SEED, Batch, Subject, run, subject

CASES = ((100, 20, 60), (60, 20, 20), (24, 20, 4), (20, 8, 3), (10, 8, 2), (9, 8, 1))
FEW, MANY = (24, 20, 4), (100, 20, 60)
SIZES = {20: 100, 60: 50, 240: 25, 1000: 10}  # and how many batches of each
NETWORKS = ("lenet5", "vit", "repvgg")
REFERENCES = ("paper", "replication, batch mean", "replication, regression", "KernelCode")


class Bench:
    """One network's measurements."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick, self.count = name, quick, counts(quick)[name]
        self.paper = functools.cache(self._paper)

    @property
    def subject(self) -> Subject:
        return subject(self.name, self.quick)

    def batches(self, part: str, count: int, size: int = BATCH_SIZE) -> Iterator[Batch]:
        count = min(count, 2) if self.quick else count
        return progress(self.subject.batches(part, size, count), part, count)

    def _paper(self, case: Case, ordering: str) -> Scheme:
        n, k, s = case
        batches = self.batches("tuning", self.count["tuning"])
        return Scheme(tuned(self.subject.model, batches, SplineCode(k, n, ordering=ordering), s))

    def some(self, case: Case) -> dict[str, Scheme]:
        return {"paper": self.paper(case, "arrival"), **unmixed(case)}

    def main(self, case: Case) -> dict[str, Any]:
        n, k, s = case
        batches = self.batches("tuning", self.count["tuning, kernel"])
        kernel = tuned(self.subject.model, batches, RegressionCode(k, n, **FIXED), s)
        schemes = self.some(case) | {
            "Berrut": Scheme(BerrutCode(k, n, ordering="arrival")),
            "Berrut, ordered": Scheme(BerrutCode(k, n)),
            "paper, ordered": self.paper(case, "similarity"),
            "KernelCode, tuned": Scheme(kernel, s),
        }
        batches = self.batches("held_out", self.count["main"])
        scores = evaluate(self.subject.model, batches, uniform(case), lambda law: schemes)
        chosen = ("paper", "paper, ordered", "KernelCode, tuned")
        return {
            "tuned": {name: repr(schemes[name].code) for name in chosen},
            "codes": summaries(scores["uniform"], REFERENCES),
        }

    def batch(self, batches: Iterable[Batch]) -> dict[str, Any]:
        schemes = self.some(FEW)
        scores = evaluate(self.subject.model, batches, uniform(FEW), lambda law: schemes)
        return {"codes": summaries(scores["uniform"], REFERENCES)}

    def sized(self, size: int) -> dict[str, Any]:
        return self.batch(self.batches("held_out", SIZES[size], size))

    def noise(self) -> dict[str, Any]:
        """Try random pixels, whose labels are what the network takes them for."""
        count, model = 2 if self.quick else 20, self.subject.model
        shape = (count * BATCH_SIZE, *self.subject.held_out.images.shape[1:])
        images = torch.rand(shape, generator=torch.Generator().manual_seed(SEED))
        labels = run(model, images).argmax(-1)
        whole = Batch(images, labels)
        share = float(labels.bincount().max() / len(labels))
        batches = Subject(model, whole, whole).batches("held_out", BATCH_SIZE, count)
        return {"share of the commonest class": share, **self.batch(batches)}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        bench = Bench(name, quick)
        for case in CASES[-2:] if quick else CASES:
            yield (name, "main", str(case)), functools.partial(bench.main, case)
        for size in list(SIZES)[:2] if quick else SIZES:
            yield (name, "batch", str(size)), functools.partial(bench.sized, size)
        yield (name, "batch", "random pixels"), bench.noise


def counts(quick: bool) -> dict[str, dict[str, int]]:
    """Return how many batches of what, by network."""
    many = {"main": 50, "tuning": 8, "tuning, kernel": 4}
    few = {"main": 50, "tuning": 3, "tuning, kernel": 2}
    some = {"main": 2, "tuning": 1, "tuning, kernel": 1}
    return {"lenet5": some} if quick else {"lenet5": many, "vit": many, "repvgg": few}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": counts(quick),
        "batches by size": {str(size): count for size, count in SIZES.items()},
    }
