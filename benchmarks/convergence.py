"""How fast does the paper's error fall with more workers? ``python -m benchmarks convergence``.

The mean squared error of x sin x and of a sum of |x - x_k|^1.51 at K = 8 inputs x_k in [0, 10], and
of the logits of LeNet-5 on batches of 60 digits at K = 20, for N workers. The theorems assume a
function of the second-order Sobolev space. The sum is one with kinks where answers are read; it is
hardly smoother than the theorems ask for. LeNet-5 with ReLU is none, so beside it stands the same
network with tanh for ReLU and means for maxima. S workers are lost uniformly, S fixed or growing
as the square root of N; or each worker is lost with probability p. At N = 2048, S grows, and the
lost workers are drawn uniformly, or are the neighbours of the data point where that costs most.

The smoothings are the theorem's, with the c of least error on other draws: without noise the
decoder's is 0 and the encoder's c (S / N)^3. With noise, workers add Gaussian errors with a
hundredth of the outputs' variance, the decoder's is c (N - S)^(-4/5), and the encoder's 0.

Slopes are of log error over log N, or log S: of all, and between neighbouring ones, each
fitted for every draw on its own, which gives its interval; a fitted slope is that of the mean of
the logarithms, with the interval of the fit. Beside them stands the slope of the
theorem's bound at the same N and S: of the spline, O(S^3 N^-3) without and O(S^(8/5) N^(-3/5)) with
noise (arXiv 2406.00300), and O(log^3 N N^-3) where each worker is lost with a fixed probability;
of Berrut's code, O(log^4 N N^-2) there (arXiv 2502.00645). The floor is the error of computing the
network in float32, below which no code comes. Replication has no rate: its error is the share of
inputs without a result, which falls exponentially in N / K.

``theorem.py`` has the bound with its constants, and the rate with adversaries.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode, FixedCode, ReplicationCode, SplineCode
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.stragglers import Bernoulli, Stragglers, Uniform

from . import theorem
from .networks import SEED
from .runs import Measurement, progress
from .subjects import run, subject

FACTORS = tuple(10.0**x for x in range(-8, 1))  # c
ENCODER_FACTORS = tuple(10.0**x for x in range(-8, 1, 4))  # c of the encoder
TUNING_DRAWS = 5
NOISE = 0.01  # the variance of workers' errors over the variance of the outputs
KINK = 1.51  # the power; above 1.5 it is of the second-order Sobolev space
TASKS = ("x sin x", "kinks", "lenet5-tanh", "lenet5")
LOST = (4, 8, 16, 32, 64)  # more and more of the workers, fewer than lie between two data points
# The delay distributions of the lost workers, given S at N = 32, N, and a seed.
DELAYS: dict[str, Callable[[int, int, int], Stragglers]] = {
    "S fixed": lambda s, n, seed: Uniform(s, seed=seed),
    "S as the square root of N": lambda s, n, seed: Uniform(
        round(s * math.sqrt(n / 32)), seed=seed
    ),
    "each with p = 0.05": lambda s, n, seed: Bernoulli(0.05, seed=seed),
    "each with p = 0.2": lambda s, n, seed: Bernoulli(0.2, seed=seed),
}


class Task:
    """A model, its inputs draw by draw, and the numbers of workers."""

    def __init__(self, name: str, quick: bool, groups: int = 3) -> None:
        self.name, self.quick, self.groups = name, quick, groups
        self.is_function = name in ("x sin x", "kinks")
        self.k, self.s = (8, 3) if self.is_function else (20, 5)
        self.draws = 2 if quick else 40 if self.is_function else 15
        self.workers = (32, 64, 128) if quick else (32, 64, 128, 256, 512)
        #: Workers of which more and more are lost.
        self.many = 256 if quick else 2048
        self.lost = LOST[:2] if quick else LOST

    def inputs(self, part: str, draw: int) -> Tensor:
        """Return inputs ``[K, G, ...]``: groups side by side."""
        if self.is_function:
            return torch.linspace(0, 10, self.k, dtype=torch.float64)[:, None, None]
        images = getattr(subject(self.name, self.quick), part).images
        generator = torch.Generator().manual_seed(SEED + draw)
        rows = torch.randperm(len(images), generator=generator)[: self.groups * self.k]
        return images[rows].unflatten(0, (self.k, self.groups))

    def outputs(self, x: Tensor) -> Tensor:
        if self.name == "x sin x":
            return x * x.sin()
        if self.name == "kinks":
            return (x - self.inputs("held_out", 0).flatten()).abs().pow(KINK).mean(-1, keepdim=True)
        results = run(subject(self.name, self.quick).model, x.flatten(0, 1))
        return results.unflatten(0, x.shape[:2]).double()

    def floor(self) -> float:
        """Return the mean squared error of float32, 0 where all is in float64."""
        if self.is_function:
            return 0.0
        x = self.inputs("held_out", SEED)
        exact = self.exactly(x)
        return float((self.outputs(x) - exact).square().mean())

    def exactly(self, x: Tensor) -> Tensor:
        """Return the outputs, computed in float64."""
        if self.is_function:
            return self.outputs(x)
        model = copy.deepcopy(subject(self.name, self.quick).model).double()
        return run(model, x.flatten(0, 1).double()).unflatten(0, x.shape[:2])


def bounds(delays: Stragglers, noisy: bool) -> dict[str, Callable[[float, float], float]]:
    """Return the theorems' bounds of each code's error, up to a factor, given N and S."""
    if isinstance(delays, Bernoulli):
        return {
            "spline": lambda n, s: math.log(n) ** 3 / n**3,
            "Berrut": lambda n, s: math.log(n) ** 4 / n**2,
        }
    return {"spline": (lambda n, s: s**1.6 / n**0.6) if noisy else (lambda n, s: s**3 / n**3)}


class Point(NamedTuple):
    """Numbers of workers, and how they are lost."""

    workers: int
    stragglers: float  #: on average
    #: The received sets of a draw; the error is the largest of them.
    received: Callable[[int], list[list[int]]]


Maker = Callable[[Point, int], list[FixedCode]]  # the codes, given the number of results, too


def errors(task: Task, make: Maker, points: Sequence[Point], noisy: bool, part: str) -> np.ndarray:
    """Return the mean squared errors of codes, ``[draws, points, codes]``."""
    seed = SEED + (10_000 if part == "tuning" else 0)
    draws = min(task.draws, TUNING_DRAWS) if part == "tuning" else task.draws
    table = []
    for draw in progress(range(draws), "draws"):
        generator = torch.Generator().manual_seed(seed + draw)
        inputs, rows = task.inputs(part, seed + draw), []
        exact = task.outputs(inputs)
        spread = (NOISE * exact.var()).sqrt() if noisy else 0.0
        for point in points:
            sets = point.received(seed + draw)
            codes = make(point, len(sets[0]))
            noise: Tensor | float = 0.0
            outputs: dict[float, Tensor] = {}  # by the encoder's smoothing
            found = []
            for code in codes:
                smoothing = getattr(code, "encoder_smoothing", 0.0)
                if smoothing not in outputs:
                    outputs[smoothing] = task.outputs(code.encode(inputs))
                results = outputs[smoothing]
                if noisy and isinstance(noise, float):
                    shape = results.shape
                    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                given = results + spread * noise
                squares = [
                    float((code.decode(given[received], received) - exact).square().mean())
                    for received in sets
                ]
                found.append(max(squares))
            rows.append(found)
        table.append(rows)
    return np.array(table)


def over_workers(task: Task, delays: str) -> list[Point]:
    """Return more and more workers, of whom some are lost."""
    points = []
    for n in task.workers:
        drawn = DELAYS[delays](task.s, n, SEED)
        lost = drawn.p * n if isinstance(drawn, Bernoulli) else float(drawn.num_stragglers or 0)

        def received(seed: int, n: int = n) -> list[list[int]]:
            latencies = DELAYS[delays](task.s, n, seed).sample(n)
            return [latencies.isfinite().nonzero().flatten().tolist()]

        points.append(Point(n, lost, received))
    return points


def over_stragglers(task: Task, how: str) -> list[Point]:
    """Return more and more lost workers, of a fixed number."""
    n = task.many
    at = theorem.blocks(SplineCode(task.k, n))
    points = []
    for s in task.lost:

        def received(seed: int, s: int = s) -> list[list[int]]:
            if how == "lost uniformly":
                latencies = Uniform(s, seed=seed).sample(n)
                return [latencies.isfinite().nonzero().flatten().tolist()]
            lost = [range(min(max(0, x - s // 2), n - s), n)[:s] for x in at]
            return [[i for i in range(n) if i not in block] for block in lost]

        points.append(Point(n, float(s), received))
    return points


def convergence(name: str, delays: str, noisy: bool, quick: bool) -> dict[str, Any]:
    """Return errors and slopes over N, or over S where N is fixed."""
    by_workers = delays in DELAYS
    task = Task(name, quick, 3 if by_workers else 1)
    points = over_workers(task, delays) if by_workers else over_stragglers(task, delays)
    at = [point.workers if by_workers else point.stragglers for point in points]

    def splines(point: Point, count: int) -> list[FixedCode]:
        n = point.workers
        if noisy:
            rates = [c * count**-0.8 for c in FACTORS]
            return [SplineCode(task.k, n, decoder_smoothing=rate) for rate in rates]
        rates = [c * (point.stragglers / n) ** 3 for c in ENCODER_FACTORS]
        return [SplineCode(task.k, n, encoder_smoothing=rate) for rate in rates]

    codes: dict[str, Maker] = {
        "spline": splines,
        "Berrut": lambda point, _: [BerrutCode(task.k, point.workers)],
        "replication": lambda point, _: [ReplicationCode(task.k, point.workers)],
    }
    stragglers = [point.stragglers for point in points]
    table: dict[str, Any] = {"workers": [point.workers for point in points]}
    table |= {"stragglers": stragglers, "floor": float(f"{task.floor():.3g}")}
    # One c for all points, with the least product of their errors.
    tuning = errors(task, splines, points, noisy, "tuning")
    best = int(np.log(tuning.mean(0)).mean(0).argmin())
    table["c" if noisy else "c of the encoder"] = (FACTORS if noisy else ENCODER_FACTORS)[best]

    def chosen(point: Point, count: int) -> list[FixedCode]:
        return [splines(point, count)[best]]

    rates_of = bounds(DELAYS[delays](task.s, 32, SEED) if by_workers else Uniform(1), noisy)
    for code, make in codes.items():
        squares = errors(task, chosen if code == "spline" else make, points, noisy, "held_out")
        squares = squares[:, :, 0]
        table[code] = {"mse": [rounded(x.mean(), half_width(x)) for x in squares.T]}
        if (squares <= 0).any():  # an exact answer has no logarithm
            continue
        slopes = _slopes(at, squares)
        table[code]["slope"] = rounded(slopes.mean(), half_width(slopes))
        table[code]["fitted slope"] = theorem.fitted_slope(at, squares)
        local = [_slopes(at[i : i + 2], squares[:, i : i + 2]) for i in range(len(at) - 1)]
        table[code]["local slopes"] = [rounded(x.mean(), half_width(x)) for x in local]
        if bound := rates_of.get(code):
            rates = [bound(point.workers, point.stragglers) for point in points]
            table[code]["bound"] = [float(f"{rate / rates[0]:.4g}") for rate in rates]
            slope = _slopes(at, np.array([rates]))[0]
            table[code]["slope of the bound"] = round(float(slope), 3)
    return table


def _slopes(at: Sequence[float], squares: np.ndarray) -> np.ndarray:
    """Return the slopes of log ``squares``, ``[draws, N]``, over the logarithms of numbers."""
    return np.polyfit(np.log(at), np.log(squares).T, 1)[0]


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in TASKS[:3] if quick else TASKS:  # one network
        for delays, make in DELAYS.items():
            # No theorem covers noise if each worker is lost with a probability.
            for noisy in (False,) if isinstance(make(1, 32, SEED), Bernoulli) else (False, True):
                key = name, delays, "noise" if noisy else "no noise"
                yield key, functools.partial(convergence, name, delays, noisy, quick)
        for how in ("lost uniformly", "lost side by side"):
            for noisy in (False, True):
                key = name, how, "noise" if noisy else "no noise"
                yield key, functools.partial(convergence, name, how, noisy, quick)
        for power in theorem.POWERS:
            key = name, "adversaries", f"a = {power}"
            yield key, functools.partial(theorem.adversaries, Task(name, quick, 1), power)
        if name in theorem.SMOOTH:
            task = Task(name, quick, 1)
            sweeps = {
                "more workers": over_workers(task, "S fixed"),
                "more lost, side by side": over_stragglers(task, "lost side by side"),
            }
            for sweep, points in sweeps.items():
                yield (name, "bound", sweep), functools.partial(theorem.bound, task, points)


def settings(quick: bool) -> dict[str, Any]:
    tasks = [Task(name, quick) for name in TASKS]
    return {
        "seed": SEED,
        "draws": {task.name: task.draws for task in tasks},
        "workers": list(tasks[0].workers),
        "noise, of the outputs' variance": NOISE,
        "c": list(FACTORS),
        "c of the encoder": list(ENCODER_FACTORS),
        "draws for c": TUNING_DRAWS,
        "lost": list(LOST),
    }
