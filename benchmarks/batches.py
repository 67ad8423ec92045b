"""How good the answers are, code by code, at six settings: ``python -m benchmarks batches``.

All codes answer the same batches from the same received sets; answers are logits, compared with
the model's own. Batches come from the official test images; every number that is tuned is tuned on
training images that no gradient has seen. One batch a case goes through
:class:`~coded_torch.nn.CodedWrapper` too, which must give the same answers to rounding.

The codes: "paper" is :class:`~coded_torch.codes.SplineCode` in the order of arrival, with the
numbers that :func:`coded_torch.evaluation.tune.tune` chooses, "paper, ordered" the same by
similarity;
"Berrut" likewise, with the order of its weights fixed to Berrut's own. "KernelCode, tuned" has the
numbers of ``tune`` too; "KernelCode, paper's encoder" and "KernelCode, systematic" decode what
``SplineCode`` mixes, at the paper's points, and at points that contain the data points.
"replication" is :class:`~coded_torch.codes.ReplicationCode`, which fills in the mean of a group's
results; "replication, batch mean" that of the batch's, and "replication, regression" what
``KernelCode`` predicts.

Sections, each network's every case on its own:

- main: every code, where K inputs go to N workers and S of them are lost;
- batch: batches of other sizes, of random pixels, and of 20 photographs of as many kinds;
- contiguous: blocks of neighbouring workers lost, with and without inputs dealt at random.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from coded_torch.codes import BerrutCode, KernelCode, SplineCode
from coded_torch.evaluation.compare import received_by
from coded_torch.evaluation.scores import Scores, ratio
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Contiguous, Uniform

from .levers import encoders
from .runs import Measurement, progress
from .schemes import BATCH_SIZE, FIXED, Case, Scheme, evaluate, summaries, tuned, uniform, unmixed
from .subjects import PHOTOGRAPHS, SEED, Batch, Subject, run, subject

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

    def batches(self, count: int, size: int = BATCH_SIZE) -> Iterator[Batch]:
        count = 2 if self.quick else count
        return progress(self.subject.batches("held_out", size, count), "batches", count)

    def tuning_batches(self, count: int) -> Iterator[Batch]:
        return progress(self.subject.batches("tuning", BATCH_SIZE, count), "tuning", count)

    def _paper(self, case: Case, ordering: str) -> Scheme:
        n, k, s = case
        batches = self.tuning_batches(self.count["tuning"])
        return tuned(self.subject.model, batches, Scheme(SplineCode(k, n), ordering), s)

    def schemes(self, case: Case) -> dict[str, Scheme]:
        n, k, s = case
        batches = self.tuning_batches(self.count["tuning, kernel"])
        kernel = KernelCode(k, n, **FIXED)
        return {
            "paper": self.paper(case, "arrival"),
            "Berrut": Scheme(BerrutCode(k, n), "arrival"),
            "Berrut, ordered": Scheme(BerrutCode(k, n)),
            "paper, ordered": self.paper(case, "similarity"),
            **unmixed(case),
            "KernelCode, tuned": tuned(self.subject.model, batches, Scheme(kernel), s),
            **self.mixed(case),
        }

    def mixed(self, case: Case) -> dict[str, Scheme]:
        every = encoders(*case[:2])
        return {
            name: Scheme(KernelCode(encoder=every[encoder], **FIXED))
            for name, encoder in (
                ("KernelCode, systematic", "spline, systematic"),
                ("KernelCode, paper's encoder", "spline, as in the paper"),
            )
        }

    def some(self, case: Case) -> dict[str, Scheme]:
        return {"paper": self.paper(case, "arrival"), **unmixed(case), **self.mixed(case)}

    def main(self, case: Case) -> dict[str, Any]:
        schemes = self.schemes(case)
        self.check(case, schemes)
        batches = self.batches(self.count["main"])
        scores = evaluate(self.subject.model, batches, schemes, case[2], uniform(case))
        return {
            "tuned": {
                name: repr(schemes[name].code)
                for name in ("paper", "paper, ordered", "KernelCode, tuned")
            },
            "codes": summaries(scores["uniform"], REFERENCES),
        }

    @torch.no_grad()
    def check(self, case: Case, schemes: dict[str, Scheme]) -> None:
        """That the wrapper gives the same answers."""
        s, model = case[2], self.subject.model
        whole = next(self.subject.batches("held_out", BATCH_SIZE, 1))
        some = {name: schemes[name] for name in ("paper", "replication", *self.mixed(case))}
        some["KernelCode"] = schemes["KernelCode"]
        scores = evaluate(model, [whole], some, s, uniform(case))["uniform"]
        for name, scheme in some.items():
            wrapper = CodedWrapper(
                model,
                scheme.code,
                stragglers=Uniform(s, seed=SEED),
                ordering=scheme.ordering,
                shuffle=False,
            )
            again = Scores()
            again.add(wrapper(whole.images), model(whole.images))
            mse, wrapped = (float(x.columns[3][0]) for x in (scores[name], again))
            if not abs(mse - wrapped) <= 1e-3 * mse:
                raise RuntimeError(f"{name} {case}: squared error {mse}, the wrapper's {wrapped}")

    def batch(self, size: int) -> dict[str, Any]:
        batches = self.batches(SIZES[size], size)
        scores = evaluate(self.subject.model, batches, self.some(FEW), FEW[2], uniform(FEW))
        return {"codes": summaries(scores["uniform"], REFERENCES)}

    def noise(self) -> dict[str, Any]:
        """Random pixels, whose labels are what the network takes them for."""
        count, model = 2 if self.quick else 20, self.subject.model
        generator = torch.Generator().manual_seed(SEED)
        shape = (count * BATCH_SIZE, *self.subject.held_out.images.shape[1:])
        images = torch.rand(shape, generator=generator)
        labels = run(model, images).argmax(-1)
        whole = Batch(images, labels)
        batches = Subject(model, whole, whole).batches("held_out", BATCH_SIZE, count)
        scores = evaluate(self.subject.model, batches, self.some(FEW), FEW[2], uniform(FEW))
        return {
            "share of the commonest class": float(labels.bincount().max() / len(labels)),
            "codes": summaries(scores["uniform"], REFERENCES),
        }

    def contiguous(self, case: Case) -> dict[str, Any]:
        n, _, s = case
        laws, shuffler = (Uniform(s, seed=SEED), Contiguous(s, seed=SEED)), random.Random(SEED)

        def received(index: int) -> dict[str, list[int]]:
            uniform, contiguous = (received_by(law, n) for law in laws)
            positions = shuffler.sample(range(n), n)
            return {
                "uniform": uniform,
                "contiguous": contiguous,
                "contiguous, shuffled": sorted(positions[worker] for worker in contiguous),
            }

        schemes = self.some(case) if case in (FEW, MANY) else unmixed(case)
        batches = self.batches(self.count["contiguous"])
        scores = evaluate(self.subject.model, batches, schemes, s, received)
        table: dict[str, Any] = {law: summaries(found, REFERENCES) for law, found in scores.items()}
        for name in schemes:
            right, own, *_ = scores["uniform"][name].columns
            for law in ("contiguous", "contiguous, shuffled"):
                theirs = scores[law][name].columns[0]
                table[law][name]["against uniform"] = {
                    "relative_accuracy": ratio(theirs - right, own)
                }
        return table

    def photographs(self) -> dict[str, Any]:
        """One batch of 20, and many received sets; tuned on 20 smaller ones of other things."""
        n, k, s = FEW
        law = Uniform(s, seed=SEED)
        sets = {str(i): received_by(law, n) for i in range(50)}
        tuning = list(self.subject.batches("tuning", k, self.count["tuning"]))
        spline, model = SplineCode(k, n), self.subject.model
        schemes = {
            "paper": tuned(model, tuning, Scheme(spline, "arrival"), s),
            "paper, ordered": tuned(model, tuning, Scheme(spline), s),
            **unmixed(FEW),
            **self.mixed(FEW),
        }
        by_set = evaluate(model, [self.subject.held_out], schemes, s, lambda index: sets)
        pooled = {name: Scores() for name in schemes}
        for scores in by_set.values():
            for name in schemes:
                pooled[name] += scores[name]
        return {"codes": summaries(pooled, REFERENCES)}


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in ("lenet5",) if quick else NETWORKS:
        bench = Bench(name, quick)
        for case in CASES[-2:] if quick else CASES:
            yield (name, "main", str(case)), functools.partial(bench.main, case)
        for size in list(SIZES)[:2] if quick else SIZES:
            yield (name, "batch", str(size)), functools.partial(bench.batch, size)
        yield (name, "batch", "random pixels"), bench.noise
        for case in CASES[-1:] if quick else CASES:
            yield (name, "contiguous", str(case)), functools.partial(bench.contiguous, case)
    if not quick:
        yield (PHOTOGRAPHS, "batch", "photographs"), Bench(PHOTOGRAPHS, quick).photographs


def counts(quick: bool) -> dict[str, dict[str, int]]:
    """How many batches of what, by network."""
    many = {"main": 50, "contiguous": 25, "tuning": 8, "tuning, kernel": 4}
    few = {"main": 50, "contiguous": 10, "tuning": 3, "tuning, kernel": 2}
    some = {"main": 2, "contiguous": 2, "tuning": 1, "tuning, kernel": 1}
    if quick:
        return {"lenet5": some}
    return {"lenet5": many, "vit": many, "repvgg": few, PHOTOGRAPHS: few}


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": counts(quick),
        "batches by size": {str(size): count for size, count in SIZES.items()},
    }
