"""What surrogates are worth, good ones and bad ones: ``python -m benchmarks surrogates``.

All answers are those of :class:`~coded_torch.nn.CodedWrapper`, on held-out images, with the same
received sets for all; every code is tried without and with help. "paper" is
:class:`~coded_torch.codes.SplineCode` in the order of arrival, its smoothings tuned.

- errors: a student, see :mod:`benchmarks.students`, with every code at two settings, with the
  recommended and the paper's at all;
- lost: with every code, against the number of workers that are lost;
- memory: a stream of requests of inputs none of which comes twice, from a cold start. The memory
  learns whenever 256 results are new, as it does where requests take some time;
- useless: surrogates of noise, of the wrong scale and sign, of a network that was never trained;
- drift: a memory filled from one half of the classes is asked about the other half;
- time: of decoding one batch of 240, beside that without a surrogate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import (
    BerrutCode,
    Code,
    KernelCode,
    LagrangeCode,
    ReplicationCode,
    SplineCode,
)
from coded_torch.evaluation.tune import tune
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory

from .runs import Measurement, progress
from .students import RECIPES, small_network, student
from .subjects import SEED, Batch, Subject, run
from .subjects import subject as plain_subject

CASES = ((24, 20, 4), (100, 20, 60), (60, 20, 20), (20, 8, 3), (10, 8, 2), (6, 4, 2))
FEW, SMALL = (24, 20, 4), (6, 4, 2)
LOST = tuple((60, 20, s) for s in (4, 8, 12, 16, 24, 28, 32, 36, 40))
NETWORKS = ("lenet5", "vit", "repvgg")
SIZES = (64, 240)
LEARNS_AFTER = 256  # results, see Memory

Case = tuple[int, int, int]


class Known(nn.Module):
    """A network that computes no row of a batch twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in images.contiguous()]
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        if new:
            outputs = run(self.model, images[list(new.values())])
            self._known.update(zip(new, outputs, strict=True))
        return torch.stack([self._known[key] for key in keys])

    def forget(self) -> None:
        self._known.clear()


def subject(name: str, quick: bool) -> Subject:
    of = plain_subject(name, quick)
    return of._replace(model=Known(of.model).eval())


class Score:
    """Squared errors and accuracies, batch by batch."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, float]] = []

    def add(self, coded: CodedWrapper, batch: Batch) -> None:
        with torch.no_grad():
            answers, exact = coded(batch.images), run(coded.module, batch.images)
        report = coded.last_run
        square = float((answers - exact).square().sum(1).mean())
        right = float((answers.argmax(1) == batch.labels).float().mean())
        own = float((exact.argmax(1) == batch.labels).float().mean())
        expected = (
            np.nan if report is None or report.expected_rmse is None else report.expected_rmse
        )
        self.rows.append((square, right, own, expected))

    def summary(self, paper: Score | None = None, alone: Score | None = None) -> dict[str, Any]:
        square, right, own, expected = np.array(self.rows).T
        found = {
            "mse": interval(square, np.ones_like(square)),
            "relative_accuracy": interval(right, own),
        }
        if not np.isnan(expected).any():
            found["expected over measured"] = round(float((expected**2).mean() / square.mean()), 3)
        for name, other in (("against paper", paper), ("against without", alone)):
            if other is not None:
                found[name] = interval(square, np.array(other.rows)[:, 0])
        return found


def interval(top: np.ndarray, bottom: np.ndarray) -> list[float]:
    """The ratio of the means, and half of its 95 % interval over the batches."""
    ratio = top.mean() / bottom.mean()
    spread = (top - ratio * bottom).std(ddof=1) / bottom.mean() / len(top) ** 0.5
    return [float(f"{ratio:.4g}"), float(f"{1.96 * spread:.2g}")]


@functools.cache
def codes(name: str, case: Case, quick: bool) -> dict[str, tuple[Code, str]]:
    """Those that are tried, and the order of the batch."""
    of, (n, k, s) = subject(name, quick), case

    def tuned(code: Code, ordering: str) -> tuple[Code, str]:
        law = Uniform(s, seed=SEED + 1)
        coded = CodedWrapper(of.model, code, stragglers=law, ordering=ordering)
        return tune(coded, [batch.images for batch in of.batches("tuning", 240, 2)]), ordering

    found = {"paper": tuned(SplineCode(k, n), "arrival")}
    if case in (FEW, SMALL, *LOST):
        found |= {
            "paper, ordered": tuned(SplineCode(k, n), "similarity"),
            "Berrut, ordered": (BerrutCode(k, n), "similarity"),
            "Lagrange, ordered": tuned(LagrangeCode(k, n), "similarity"),
        }
    return {
        **found,
        "replication": (ReplicationCode(k, n), "similarity"),
        "default": (KernelCode(k, n), "similarity"),
    }


def wrap(
    of: Subject, code: Code, lost: int, surrogate: Any = (), ordering: Any = "similarity"
) -> CodedWrapper:
    law = Uniform(lost, seed=SEED)
    return CodedWrapper(of.model, code, stragglers=law, ordering=ordering, surrogate=surrogate)


def errors(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    of, taught = subject(name, quick), student(name, quick)
    wrappers = {
        (code, helped): wrap(of, made, case[2], taught.model if helped else (), ordering)
        for code, (made, ordering) in codes(name, case, quick).items()
        for helped in (False, True)
    }
    scores = {key: Score() for key in wrappers}
    for batch in batches(of, size, quick):
        for key, coded in wrappers.items():
            scores[key].add(coded, batch)
        of.model.forget()
    paper = scores["paper", False]
    return {
        "student": {"error": round(taught.error, 4), "seconds": round(taught.seconds)},
        "variance": float(f"{run(of.model, of.held_out.images).var(0).sum():.4g}"),
        "codes": {
            code: {
                "without": scores[code, False].summary(paper),
                "with": scores[code, True].summary(paper, scores[code, False]),
            }
            for code, helped in scores
            if helped
        },
    }


def batches(of: Subject, size: int, quick: bool) -> Iterator[Batch]:
    count = settings(quick)["batches"]
    return progress(of.batches("held_out", size, count), "batches", count)


class Stream:
    """Requests to two wrappers with the same losses, one of them with a memory."""

    def __init__(self, of: Subject, case: Case) -> None:
        n, k, s = case
        self.memory = Memory()
        self.helped = wrap(of, KernelCode(k, n), s, self.memory)
        self.alone = wrap(of, KernelCode(k, n), s)
        self._fresh = 0

    def answer(self, stream: Iterable[Batch]) -> tuple[Score, Score]:
        helped, alone = Score(), Score()
        for batch in stream:
            helped.add(self.helped, batch)
            alone.add(self.alone, batch)
            self.helped.module.forget()
            report = self.helped.last_run
            assert report is not None
            assert report.predicted is not None
            self._fresh += int((~report.predicted).sum())
            if self._fresh >= LEARNS_AFTER:
                self.memory.rebuild()
                self._fresh = 0
        return helped, alone


def memory(name: str, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), 9 if quick else 150
    stream = Stream(of, SMALL)
    requests = list(of.batches("held_out", 64, count))
    thirds = {}
    for third in range(3):
        some = requests[third * count // 3 : (third + 1) * count // 3]
        helped, alone = stream.answer(progress(some, f"third {third + 1}", len(some)))
        thirds[f"third {third + 1}"] = helped.summary(None, alone)
    return {"remembered": len(stream.memory), **thirds}


def drift(name: str, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), 4 if quick else 40
    halves = []
    for classes in (range(5), range(5, 10)):
        mine = torch.isin(of.held_out.labels, torch.tensor(list(classes)))
        whole = Batch(of.held_out.images[mine], of.held_out.labels[mine])
        halves.append(Subject(of.model, whole, whole).batches("held_out", 64, count))
    stream = Stream(of, SMALL)
    stream.answer(progress(halves[0], "first half", count))
    known = wrap(of, KernelCode(4, 6), 2, stream.memory)
    stream.memory.observe = lambda *args: None  # type: ignore[method-assign]  # all that it knows is wrong
    alone, helped = Score(), Score()
    bare = wrap(of, KernelCode(4, 6), 2)
    for batch in halves[1]:
        helped.add(known, batch)
        alone.add(bare, batch)
        of.model.forget()
    return {"never seen classes": helped.summary(None, alone)}


def useless(name: str, size: int, quick: bool) -> dict[str, Any]:
    of, generator = subject(name, quick), torch.Generator().manual_seed(SEED)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(len(x), 10, generator=generator)

    small = student(name, quick).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        untrained = small_network()
    bad: dict[str, Callable[[Tensor], Tensor]] = {
        "noise": noise,
        "untrained": untrained,
        "wrong scale and sign": lambda x: -20 * small(x),
    }
    made = {
        "default": KernelCode(4, 6),
        "paper": SplineCode(4, 6),
        "replication": ReplicationCode(4, 6),
    }
    found: dict[str, Any] = {}
    for code, each in made.items():
        scores = {what: (Score(), wrap(of, each, 2, s)) for what, s in {**bad, "": ()}.items()}
        for batch in batches(of, size, quick):
            for score, coded in scores.values():
                score.add(coded, batch)
            of.model.forget()
        alone = scores[""][0]
        found[code] = {
            what: scores[what][0].summary(None, alone)["against without"] for what in bad
        }
    return found


def seconds(name: str, quick: bool) -> dict[str, Any]:
    """Milliseconds of decoding; the surrogates in turns, so that all see the same machine."""
    of = plain_subject(name, quick)
    known = Memory()
    images = of.tuning.images[:2048]
    known.observe([images], [run(of.model, images)])
    known.rebuild()
    known.observe = lambda *args: None  # type: ignore[method-assign]
    small = student(name, quick).model
    n, k, s = FEW
    wrappers = {
        what: wrap(of, KernelCode(k, n), s, surrogate)
        for what, surrogate in (("none", ()), ("memory", known), ("student", small))
    }
    taken: dict[str, list[float]] = {what: [] for what in wrappers}
    rounds = itertools.islice(itertools.cycle(of.batches("held_out", 240, 8)), 8 if quick else 80)
    for batch in rounds:
        for what, coded in wrappers.items():
            with torch.no_grad():
                coded(batch.images)
            assert coded.last_run is not None
            taken[what].append(1e3 * coded.last_run.decode_seconds)
    quantiles = {what: np.quantile(ms, [0.25, 0.5, 0.75]) for what, ms in taken.items()}
    return {
        "milliseconds, quartiles": {
            what: [round(float(q), 2) for q in qs] for what, qs in quantiles.items()
        }
    }


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    cases: Sequence[Case] = (FEW, SMALL) if quick else CASES
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in cases:
            for size in SIZES[:1] if quick else SIZES:
                yield (
                    (name, "errors", str(case), str(size)),
                    functools.partial(errors, name, case, size, quick),
                )
        if name == NETWORKS[0]:
            for case in LOST[:1] if quick else LOST:
                key = name, "lost", str(case)
                yield key, functools.partial(errors, name, case, SIZES[-1], quick)
        yield (name, "memory"), functools.partial(memory, name, quick)
        yield (name, "drift"), functools.partial(drift, name, quick)
        for size in (8, 64):
            yield (name, "useless", str(size)), functools.partial(useless, name, size, quick)
        yield (name, "time"), functools.partial(seconds, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    epochs = {name: recipe.epochs for name, recipe in RECIPES.items()}
    return {"seed": SEED, "batches": 3 if quick else 50, "epochs": epochs}
