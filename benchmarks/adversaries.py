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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch import functional
from coded_torch._scores import half_width, rounded
from coded_torch.adversaries import Evidence, locate
from coded_torch.codes import BatchPlan, BerrutCode, Code, KernelCode, SplineCode, plan_batch
from coded_torch.workers import Part, Reply, Task
from coded_torch.workers.attacks import Attacker, Liars

from .runs import Measurement, progress
from .schemes import FIXED
from .subjects import SEED, Batch, run, subject

Case = tuple[int, int, int, int]  # N, K, S, A

CASES: tuple[Case, ...] = ((24, 20, 2, 1), (10, 8, 1, 1), (30, 20, 4, 2), (60, 20, 20, 3))
NETWORKS = ("lenet5", "vit", "repvgg")
BATCH_SIZE = 240


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
DEGREES = (2, 4, 6, 8, 10)
SMOOTHINGS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_TUKEY = 4.685
_TUNED_ON = ("nobody lies", "noise", "sign flip", "replay, earlier batch", "x 0.5")


class Answer(NamedTuple):
    """The answers ``[B, C]``, and which machines were dropped for them."""

    values: Tensor
    dropped: tuple[int, ...] = ()


class Trial(NamedTuple):
    """What arrived of one batch.

    Attributes:
        plan: of the code.
        results: ``[F, G, C]``, of which some may be lies.
        received: their machines.
        liars: the machines that lie.
        most: A.
    """

    plan: BatchPlan
    results: Tensor
    received: list[int]
    liars: tuple[int, ...]
    most: int

    def without(self, machines: Sequence[int]) -> Answer:
        """The answers without the results of some machines."""
        kept = [machine not in machines for machine in self.received]
        received = [m for m, keep in zip(self.received, kept, strict=True) if keep]
        values = self.plan.decode(self.results[torch.tensor(kept)], received)
        return Answer(values, tuple(machines))


Scheme = Callable[[Trial], Answer]


def evidence(trial: Trial) -> list[Evidence]:
    """What the results say of each other."""
    shape = trial.results.shape[:2]
    machine, group = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    return [
        Evidence(
            trial.results.flatten(0, 1).double(),
            machine,
            group,
            sites.point.flatten(),
            sites.at.flatten(),
            sites.regression,
        )
        for sites in trial.plan.sites(trial.received)
    ]


def located(trial: Trial) -> Answer:
    """Without those that the locator names."""
    return trial.without(tuple(locate(evidence(trial), trial.received, trial.most).liars))


def undefended(trial: Trial) -> Answer:
    return trial.without(())


def oracle(trial: Trial) -> Answer:
    return trial.without(trial.liars)


def approxifer(trial: Trial, degree: int) -> Answer:
    """Without the A that most of the outputs' error locators name."""
    code = trial.plan.code
    assert isinstance(code, BerrutCode)
    at = code.worker_points[trial.received]
    powers = np.polynomial.chebyshev.chebvander(at, degree)  # [F, degree + 1]
    values = trial.results.flatten(1).double().numpy().T  # [G C, F]
    system = np.concatenate(
        [np.broadcast_to(powers, (len(values), *powers.shape)), -values[..., None] * powers], -1
    )
    _, _, basis = np.linalg.svd(system)
    locator = np.abs(basis[:, -1, degree + 1 :] @ powers.T)  # |Q|, [G C, F]
    named = np.argsort(locator, axis=1)[:, : trial.most]
    votes = np.bincount(named.ravel(), minlength=len(at))
    worst = np.argsort(-votes, kind="stable")[: trial.most]
    return trial.without([trial.received[i] for i in worst])


def reweighted(trial: Trial, smoothing: float) -> Answer:
    """Tukey's biweight of each machine's residuals at a smoothing spline, ten times over."""
    code = trial.plan.code
    assert isinstance(code, SplineCode)
    knots = torch.from_numpy(code.worker_points[trial.received].copy())
    weights = torch.ones(len(knots), dtype=torch.float64)
    results = trial.results.flatten(1).double()
    for _ in range(10):
        fitted = _spline(results, knots, knots, smoothing, weights)
        residuals = (results - fitted).square().mean(1).sqrt()
        scale = float(residuals.median()) / 0.6745
        weights = (1 - (residuals / (_TUKEY * scale)).square()).clamp(min=0).square()
        weights = weights.clamp(min=1e-6)
    points = torch.from_numpy(code.data_points.copy())
    answers = _spline(results, knots, points, smoothing, weights).to(trial.results.dtype)
    scattered = trial.plan._grouping.scatter(answers.unflatten(1, trial.results.shape[1:]))
    dropped = [m for m, w in zip(trial.received, weights.tolist(), strict=True) if w < 1e-3]
    return Answer(scattered, tuple(dropped))


def _spline(values: Tensor, knots: Tensor, at: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    return functional.smoothing_spline(values, knots, at, smoothing=smoothing, weights=weights)


def smoothed(trial: Trial, smoothing: float) -> Answer:
    code = trial.plan.code
    assert isinstance(code, SplineCode)
    plan = code.replace(decoder_smoothing=smoothing).fit(trial.plan._grouping)
    return Answer(plan.decode(trial.results, trial.received))


class Copies(Code):
    """2 A + 1 machines, side by side in the batch's order, compute each input."""

    mixes = False

    def __init__(self, num_data: int, num_workers: int) -> None:
        super().__init__(num_data, num_workers)

    def fit(self, grouping: Any, geometry: Any = None, num_stragglers: int = 0) -> BatchPlan:
        return _Copies(self, grouping)


class _Copies(BatchPlan):
    def __init__(self, code: Copies, grouping: Any) -> None:
        self.code, self.num_groups = code, grouping.num_groups
        self.batch_size, self._grouping = grouping.batch_size, grouping
        self.of = torch.arange(code.num_workers) % code.num_data

    def encode(self, values: Tensor) -> Tensor:
        return self._grouping.gather(values)[self.of]

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        """The median of the copies that arrived, the mean of the group where none did."""
        whose = self.of[list(received)]
        answers = results.mean(0).expand(self.code.num_data, *results.shape[1:]).clone()
        for k in whose.unique().tolist():
            answers[k] = results[whose == k].quantile(0.5, dim=0)
        return self._grouping.scatter(answers)


def schemes(case: Case) -> dict[str, tuple[Code, list[Scheme]]]:
    """Each scheme's code, and what it may do with the results: the best on tuning batches does."""
    n, k, _, most = case
    ours, spline = KernelCode(k, n, **FIXED), SplineCode(k, n)
    return {
        "located": (ours, [located]),
        "undefended": (ours, [undefended]),
        "oracle": (ours, [oracle]),
        "ApproxIFER": (
            BerrutCode(k, n),
            [functools.partial(approxifer, degree=d) for d in DEGREES if 2 * d + 2 <= n],
        ),
        "spline, reweighted": (
            spline,
            [functools.partial(reweighted, smoothing=s) for s in SMOOTHINGS[1:]],
        ),
        "spline, larger lambda": (
            spline,
            [functools.partial(smoothed, smoothing=s) for s in SMOOTHINGS],
        ),
        "copies, median": (Copies(max(1, n // (2 * most + 1)), n), [undefended]),
    }


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
        self.previous = previous
        self.model, self.batch, self.case, self.index = model, batch, case, index
        self.exact = run(model, batch.images)
        generator = torch.Generator().manual_seed(1000 * SEED + index)
        order = torch.randperm(n, generator=generator).tolist()
        self.received, self.liars = sorted(order[: n - s]), tuple(sorted(order[:most]))
        self._done: dict[str, tuple[BatchPlan, Task, Tensor]] = {}

    def trial(self, code: Code, lie: Lie | None) -> Trial:
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
        return Trial(plan, sent, self.received, liars, most)


def tuned(name: str, case: Case, quick: bool) -> dict[str, tuple[Code, Scheme]]:
    """The schemes with what has least squared error on the tuning batches."""
    of, count = subject(name, quick), 2 if quick else 8
    chosen = {}
    rounds = [
        Round(of.model, batch, case, index)
        for index, batch in enumerate(of.batches("tuning", BATCH_SIZE, count))
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
def adversaries(name: str, case: Case, quick: bool) -> dict[str, Any]:
    of, count = subject(name, quick), settings(quick)["batches"]
    chosen = tuned(name, case, quick)
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    batches = enumerate(of.batches("held_out", BATCH_SIZE, count))
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
            yield (name, str(case)), functools.partial(adversaries, name, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": 2 if quick else 50,
        "lies": {name: list(lie) if lie else None for name, lie in LIES.items()},
        "degrees": list(DEGREES),
        "smoothings": list(SMOOTHINGS),
    }
