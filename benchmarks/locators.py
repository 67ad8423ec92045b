"""What is done about machines that lie: our locator, and its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coded_torch import functional
from coded_torch.adversaries import Evidence, locate
from coded_torch.codes import BatchPlan, BerrutCode, Code, KernelCode, SplineCode

from .schemes import FIXED

__all__ = ["DEGREES", "SMOOTHINGS", "Case", "Copies", "Scheme", "Trial", "evidence", "schemes"]

Case = tuple[int, int, int, int]  # N, K, S, A

DEGREES = (2, 4, 6, 8, 10)
SMOOTHINGS = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
_TUKEY = 4.685


class Answer(NamedTuple):
    """The answers ``[B, C]``, and which machines were dropped for them."""

    values: Tensor
    dropped: tuple[int, ...] = ()


class Trial(NamedTuple):
    """What arrived of one batch, the same object for all schemes of a code.

    Attributes:
        plan: of the code.
        results: ``[F, G, C]``, of which some may be lies.
        received: their machines.
        liars: the machines that lie.
        most: A.
        honest: what has been answered without the liars, by the machines that were dropped.
    """

    plan: BatchPlan
    results: Tensor
    received: list[int]
    liars: tuple[int, ...]
    most: int
    honest: dict[frozenset[int], Tensor]

    def without(self, machines: Sequence[int]) -> Answer:
        """The answers without the results of some machines."""
        out = frozenset(machines)
        harmless = out >= set(self.liars)  # then the answers are the same, whatever the lie
        if harmless and out in self.honest:
            return Answer(self.honest[out], tuple(machines))
        kept = [machine not in out for machine in self.received]
        received = [m for m, keep in zip(self.received, kept, strict=True) if keep]
        values = self.plan.decode(self.results[torch.tensor(kept)], received)
        if harmless:
            self.honest[out] = values
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
