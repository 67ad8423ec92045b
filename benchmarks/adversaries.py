"""What machines that lie cost, and what finds them: ``python -m benchmarks adversaries``.

The same batches, late machines, liars and lies for every scheme; the liars are among those that
answer. Detected is a liar that is dropped, falsely dropped an honest machine. Relative accuracy and
squared error (over the outputs' variance) are of all answers. Beside KernelCode with its locator
stand the same answers if nobody looks (*undefended*), if the liars are known (*oracle*), and if
nobody lies; and the peers:

- ApproxIFER (arXiv 2109.09868): Berrut's code, and the error locator P(z) = y Q(z), a vote over
  outputs and groups. It always drops A machines, whether or not any lies. The degree is tuned, as
  that of the paper needs N >= 2 K + 2 A - 1.
- The spline with weights: iteratively reweighted, Tukey's biweight of each machine's residuals;
  smoothing tuned.
- The spline with larger smoothing (arXiv 2502.08058), tuned with liars.
- Replication, 2 A + 1 copies of each input and their median: at equal N it answers N / (2 A + 1)
  inputs a group, so it does (2 A + 1) / (N / K) times the work.

All curves are ordered by similarity. What is tuned is tuned on tuning batches with the same lies.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import BatchPlan, Code, KernelCode, plan_batch
from coded_torch.evaluation.summary import half_width, rounded
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import Part, Reply, Task
from coded_torch.workers.attacks import Attacker, Liars

from .locators import DEGREES, SMOOTHINGS, Case, Scheme, Trial, schemes
from .runs import Measurement, progress
from .schemes import FIXED
from .subjects import SEED, Batch, run, subject

CASES: tuple[Case, ...] = ((24, 20, 2, 1), (10, 8, 1, 1), (30, 20, 4, 2), (60, 20, 20, 3))
NETWORKS = ("lenet5", "vit", "repvgg")
BATCH_SIZE, SMALL = 240, 80


class Lie(NamedTuple):
    """An attack, and whether replays are of an earlier batch, or of another machine in the same."""

    attack: str
    strength: float = 1.0
    earlier: bool = True


#: By name; None: nobody lies.
LIES: dict[str, Lie | None] = {
    "nobody lies": None,
    "noise": Lie("noise"),
    "sign flip": Lie("sign_flip"),
    "constant": Lie("constant"),
    "replay, earlier batch": Lie("replay"),
    "replay, other machine": Lie("replay", earlier=False),
    "x 1.5": Lie("scale"),
    "x 0.5": Lie("scale", -1.0),
    "permuted rows": Lie("permute"),
    "swapped outputs": Lie("swap"),
    "shifted inputs": Lie("shift"),
    "offset, common": Lie("offset"),
    "noise x .3": Lie("noise", 0.3),
    "noise x .1": Lie("noise", 0.1),
    "noise x .05": Lie("noise", 0.05),
    "one row": Lie("one_row"),
    "bit flips": Lie("bit_flip"),
}
_TUNED_ON = ("nobody lies", "noise", "sign flip", "replay, earlier batch", "x 0.5")


class Round:
    """A batch, its late machines and its liars; the network is run once a code."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        case: Case,
        index: int,
        previous: Round | None = None,
    ) -> None:
        n, _, s, most = case
        if previous is not None:
            previous.previous = None
            previous._trials.clear()
        self.previous = previous
        self.model, self.batch, self.case, self.index = model, batch, case, index
        self.exact = run(model, batch.images)
        generator = torch.Generator().manual_seed(1000 * SEED + index)
        order = torch.randperm(n, generator=generator).tolist()
        self.received, self.liars = sorted(order[: n - s]), tuple(sorted(order[:most]))
        self._done: dict[str, tuple[BatchPlan, Task, Tensor]] = {}
        self._honest: dict[str, dict[frozenset[int], Tensor]] = {}
        self._trials: dict[tuple[str, Lie | None], Trial] = {}

    def trial(self, code: Code, lie: Lie | None) -> Trial:
        key = repr(code), lie
        if key not in self._trials:
            self._trials[key] = self._trial(code, lie)
        return self._trials[key]

    def _trial(self, code: Code, lie: Lie | None) -> Trial:
        _, _, s, most = self.case
        name = repr(code)
        if name not in self._done:
            images = self.batch.images
            plan = plan_batch(code, "similarity", [images], s + most)
            coded = plan.encode(images)
            spec = pytree.tree_structure(((0,), {}))
            task = Task([coded], [0], spec, len(coded), plan.num_groups, coded.device)
            if code.mixes:
                results = run(self.model, coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
            else:
                results = plan.encode(self.exact)
            self._done[name] = plan, task, results
        plan, task, results = self._done[name]
        sent = results[self.received].clone()
        liars = self.liars if lie else ()
        if lie:
            earlier = self.previous._done.get(name) if self.previous and lie.earlier else None
            attacker = Attacker(
                Liars(lie.attack, liars, lie.strength, SEED),
                self.model,
                task,
                self.index,
                earlier and earlier[1],
            )
            for machine in liars:
                reply = Reply(Part(machine, (machine,)), machine, 0.0, 0.0, results[machine])
                sent[self.received.index(machine)] = attacker(reply).value
        return Trial(plan, sent, self.received, liars, most, self._honest.setdefault(name, {}))


def tuned(name: str, case: Case, size: int, quick: bool) -> dict[str, tuple[Code, Scheme]]:
    """The schemes with what has least squared error on the tuning batches."""
    of, count = subject(name, quick), 2 if quick else 8
    chosen = {}
    rounds = [
        Round(of.model, batch, case, index)
        for index, batch in enumerate(of.batches("tuning", size, count))
    ]
    for scheme, (code, choices) in schemes(case).items():
        errors = [0.0] * len(choices)
        if len(choices) > 1:
            for trial_of, lie in itertools.product(rounds, _TUNED_ON):
                trial = trial_of.trial(code, LIES[lie])
                for i, choice in enumerate(choices):
                    answers = choice(trial).values
                    # Of one lie no more than all of the variance, or it would decide alone.
                    variance = float(trial_of.exact.var(0).sum())
                    error = float((answers - trial_of.exact).square().sum(1).mean())
                    errors[i] += min(error / variance, 1.0)
        chosen[scheme] = code, choices[int(np.argmin(errors))]
    return chosen


@torch.no_grad()
def adversaries(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), settings(quick)["batches"]
    chosen = tuned(name, case, size, quick)
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    batches = enumerate(of.batches("held_out", size, count))
    trial_of = None
    for index, batch in progress(batches, "batches", count):
        trial_of = Round(of.model, batch, case, index, trial_of)
        exact = trial_of.exact
        right = (exact.argmax(1) == batch.labels).double().mean().item()
        variance = float(exact.var(0).sum())
        for (lie, how), (scheme, (code, act)) in itertools.product(LIES.items(), chosen.items()):
            trial = trial_of.trial(code, how)
            answer = act(trial)
            found = set(answer.dropped) & set(trial.liars)
            error = float((answer.values - exact).square().sum(1).mean()) / variance
            hit = (answer.values.argmax(1) == batch.labels).double().mean().item()
            rows.setdefault((lie, scheme), []).append(
                (
                    len(found) / max(1, len(trial.liars)),
                    len(set(answer.dropped) - found),
                    hit / right,
                    error,
                )
            )
    results: dict[str, Any] = {
        "tuned": {x: getattr(act, "keywords", {}) for x, (_, act) in chosen.items()},
        "work": {x: code.num_workers / code.num_data for x, (code, _) in chosen.items()},
    }
    for (lie, scheme), found in rows.items():
        results.setdefault("lies", {}).setdefault(lie, {})[scheme] = _summary(found, lie, scheme)
    return results


@torch.no_grad()
def seconds(name: str, quick: bool) -> dict[str, Any]:
    """Milliseconds of decoding, without and with a look for one liar; in turns.

    With it, copies are dealt for one loss more.
    """
    of, (n, k, s) = subject(name, quick), (24, 20, 4)
    wrappers = {
        most: CodedWrapper(
            of.model,
            KernelCode(k, n, **FIXED),
            stragglers=Uniform(s, seed=SEED),
            max_adversaries=most,
            shuffle=random.Random(SEED),
        )
        for most in (0, 1)
    }
    taken: dict[str, list[float]] = {}
    some = itertools.cycle(of.batches("held_out", BATCH_SIZE, 8))
    for batch in itertools.islice(some, 8 if quick else 80):
        for most, coded in wrappers.items():
            coded(batch.images)
            assert coded.last_run is not None
            taken.setdefault(f"A = {most}", []).append(1e3 * coded.last_run.decode_seconds)
    quartiles = {what: np.quantile(ms, [0.25, 0.5, 0.75]) for what, ms in taken.items()}
    return {
        "milliseconds, quartiles": {
            what: [round(float(q), 2) for q in qs] for what, qs in quartiles.items()
        }
    }


def _summary(rows: Sequence[tuple[float, ...]], lie: str, scheme: str) -> Mapping[str, Any]:
    detected, falsely, accuracy, error = np.array(rows).T

    def interval(x: np.ndarray) -> list[float | None]:
        return rounded(x.mean(), half_width(x)) if np.isfinite(x).all() else [None, None]

    summary = {"relative accuracy": interval(accuracy), "mse to variance": interval(error)}
    if scheme in ("located", "ApproxIFER", "spline, reweighted"):
        summary["dropped falsely, per request"] = interval(falsely)
        if LIES[lie]:
            summary["detected"] = interval(detected)
    return summary


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in CASES[:1] if quick else CASES:
            of_all = functools.partial(adversaries, name, case, BATCH_SIZE, quick)
            yield (name, "main", str(case)), of_all
        few = functools.partial(adversaries, name, CASES[0], SMALL, quick)
        yield (name, "small batches", str(CASES[0])), few
        yield (name, "time"), functools.partial(seconds, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": [BATCH_SIZE, SMALL],
        "batches": 2 if quick else 50,
        "lies": {name: list(lie) if lie else None for name, lie in LIES.items()},
        "degrees": list(DEGREES),
        "smoothings": list(SMOOTHINGS),
    }
