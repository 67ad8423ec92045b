"""What is a cheap model of the model worth, good or bad? ``python -m benchmarks surrogates``.

All answers are those of :class:`~coded_torch.nn.CodedWrapper`, on held-out images, with the same
received sets for all. Codes that repeat inputs are tried without a surrogate and with one; beside
them the paper's scheme, its smoothings tuned, and the surrogate alone.

- errors: a student, see ``students.py``;
- memory: a stream of requests of images none of which comes twice, from a cold start. The memory
  learns whenever 256 results are new, as it does where requests take some time;
- useless: surrogates of noise, of the wrong scale and sign, of a network that was never trained;
- drift: a memory filled from one half of the classes is asked about the other half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import Code, RegressionCode, ReplicationCode, SplineCode
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers

from .runs import Measurement, progress
from .schemes import Case, Scores, ratio, tuned
from .students import RECIPES, small_network, student
from .subjects import SEED, Batch, Subject, run
from .subjects import subject as plain_subject

CASES = ((24, 20, 4), (100, 20, 60), (60, 20, 20), (20, 8, 3), (10, 8, 2), (6, 4, 2))
FEW, SMALL = (24, 20, 4), (6, 4, 2)
NETWORKS = ("lenet5", "vit", "repvgg")
SIZES = (64, 240)
LEARNS_AFTER = 256  # results, see Memory


class Known(nn.Module):
    """A network that computes no row of a batch twice."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in images.contiguous()]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        if new:
            outputs = run(self.model, images[list(new.values())])
            self.known.update(zip(new, outputs, strict=True))
        return torch.stack([self.known[key] for key in keys])


def subject(name: str, quick: bool) -> Subject:
    of = plain_subject(name, quick)
    return of._replace(model=Known(of.model).eval())


def wrap(of: Subject, code: Code, lost: int, surrogate: Any = ()) -> CodedWrapper:
    workers = LocalWorkers(Uniform(lost, seed=SEED))
    return CodedWrapper(of.model, code, workers=workers, surrogate=surrogate)


@torch.no_grad()
def score(of: Subject, batches: Iterable[Batch], wrappers: dict[Any, Any]) -> dict[Any, Scores]:
    """Send batches through all wrappers, with the same losses; others are asked as functions."""
    scores = {key: Scores() for key in wrappers}
    for batch in batches:
        exact = run(of.model, batch.images)
        for key, coded in wrappers.items():
            scores[key].add(coded(batch.images), exact, batch.labels)
        of.model.known.clear()
    return scores


def summary(of: Scores, paper: Scores | None = None, alone: Scores | None = None) -> dict[str, Any]:
    """Return the squared error, also over that of the paper's scheme and of the code alone."""
    right, own, _, mse, *_ = of.columns
    found: dict[str, Any] = {"mse": ratio(mse, np.ones_like(mse))}
    found["relative_accuracy"] = ratio(right, own)
    for name, other in (("against paper", paper), ("against without", alone)):
        if other is not None:
            found[name] = ratio(mse, other.columns[3])
    return found


def batches(of: Subject, size: int, quick: bool) -> Iterator[Batch]:
    count = settings(quick)["batches"]
    return progress(of.batches("held_out", size, count), "batches", count)


@functools.cache
def paper(name: str, case: Case, quick: bool) -> Code:
    (n, k, s), of = case, subject(name, quick)
    return tuned(of.model, of.batches("tuning", 240, 2), SplineCode(k, n, ordering="arrival"), s)


def errors(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    of, taught, (n, k, s) = subject(name, quick), student(name, quick), case
    codes = {
        "no redundancy": RegressionCode(k, k),
        "replication": ReplicationCode(k, n),
        "default": RegressionCode(k, n),
    }
    wrappers: dict[Any, Any] = {"paper": wrap(of, paper(name, case, quick), s)}
    wrappers["student alone"] = taught.model
    for code, each in codes.items():
        # Without redundancy, as large a share of the workers is lost, so far as K has one.
        lost = s if each.num_workers == n else max(1, round(s * k / n))
        wrappers |= {
            (code, "without"): wrap(of, each, lost),
            (code, "with"): wrap(of, each, lost, taught.model),
        }
    scores = score(of, batches(of, size, quick), wrappers)
    reference = scores["paper"]
    return {
        "student": {"error": round(taught.error, 4), "seconds": round(taught.seconds)},
        "variance": float(f"{run(of.model, of.held_out.images).var(0).sum():.4g}"),
        "codes": {
            "paper": {"without": summary(reference, reference)},
            "student alone": {"with": summary(scores["student alone"], reference)},
            **{
                code: {
                    "without": summary(alone := scores[code, "without"], reference),
                    "with": summary(scores[code, "with"], reference, alone),
                }
                for code in codes
            },
        },
    }


def memory(name: str, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), 9 if quick else 150
    known = Memory()
    requests = list(of.batches("held_out", 64, count))
    thirds = [requests[i * count // 3 : (i + 1) * count // 3] for i in range(3)]
    found = {f"third {i + 1}": stream(of, some, known) for i, some in enumerate(thirds)}
    return {"remembered": len(known), **found}


def stream(of: Subject, requests: Iterable[Batch], known: Memory) -> dict[str, Any]:
    """Send requests with a memory, which learns as soon as enough is new, and without."""
    (n, k, s), fresh = SMALL, 0
    coded = {"with": wrap(of, RegressionCode(k, n), s, known)}
    coded["without"] = wrap(of, RegressionCode(k, n), s)
    scores = {key: Scores() for key in coded}
    for batch in requests:
        for key, of_batch in score(of, [batch], coded).items():
            scores[key] += of_batch
        report = coded["with"].last_run
        assert report is not None
        assert report.predicted is not None
        fresh += int((~report.predicted).sum())
        if fresh >= LEARNS_AFTER:
            known.rebuild()
            fresh = 0
    return summary(scores["with"], alone=scores["without"])


def drift(name: str, quick: bool) -> dict[str, Any]:
    of, count, known = subject(name, quick), 4 if quick else 40, Memory()
    halves = []
    for classes in (range(5), range(5, 10)):
        mine = torch.isin(of.held_out.labels, torch.tensor(list(classes)))
        whole = Batch(of.held_out.images[mine], of.held_out.labels[mine])
        halves.append(Subject(of.model, whole, whole).batches("held_out", 64, count))
    stream(of, halves[0], known)
    # All that it knows is wrong, and it learns nothing of the other half.
    known.observe = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return {"never seen classes": stream(of, halves[1], known)}


def useless(name: str, size: int, quick: bool) -> dict[str, Any]:
    of, generator = subject(name, quick), torch.Generator().manual_seed(SEED)
    small = student(name, quick).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        untrained = small_network()
    bad: dict[str, Callable[[Tensor], Tensor]] = {
        "noise": lambda x: torch.randn(len(x), 10, generator=generator),
        "untrained": untrained,
        "wrong scale and sign": lambda x: -20 * small(x),
    }
    found = {}
    for code, each in (("default", RegressionCode(4, 6)), ("replication", ReplicationCode(4, 6))):
        wrappers = {what: wrap(of, each, 2, s) for what, s in {**bad, "": ()}.items()}
        scores = score(of, batches(of, size, quick), wrappers)
        alone = scores.pop("").columns[3]
        found[code] = {what: ratio(x.columns[3], alone) for what, x in scores.items()}
    return found


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in (FEW, SMALL) if quick else CASES:
            for size in SIZES[:1] if quick else SIZES:
                key = name, "errors", str(case), str(size)
                yield key, functools.partial(errors, name, case, size, quick)
        yield (name, "memory"), functools.partial(memory, name, quick)
        yield (name, "drift"), functools.partial(drift, name, quick)
        for size in (8, 64):
            yield (name, "useless", str(size)), functools.partial(useless, name, size, quick)


def settings(quick: bool) -> dict[str, Any]:
    epochs = {name: recipe.epochs for name, recipe in RECIPES.items()}
    return {"seed": SEED, "batches": 3 if quick else 50, "epochs": epochs}
