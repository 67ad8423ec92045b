"""How fast does the paper's error fall with more workers? ``python -m benchmarks convergence``.

The mean squared error of x sin x at K = 8 inputs in [0, 10], and of the logits of LeNet-5 on
batches of 60 digits at K = 20, for N workers. The theorems assume a smooth function: beside LeNet-5
stands the same network with tanh for ReLU and means for maxima. S workers are lost uniformly, S
fixed or growing as the square root of N; or each worker is lost with probability p. With noise,
workers add Gaussian errors with a hundredth of the outputs' variance, and the decoder's smoothing
is the theorem's c (N - S)^(-4/5), with the c of least error on other draws.

Slopes are of log error over log N: of all N, and between neighbouring N, each
fitted for every draw on its own, which gives its interval. Beside them stands the slope of the
theorem's bound at the same N and S: of the spline, O(S^3 N^-3) without and O(S^(8/5) N^(-3/5)) with
noise (arXiv 2406.00300), and O(log^3 N N^-3) where each worker is lost with a fixed probability;
of Berrut's code, O(log^4 N N^-2) there (arXiv 2502.00645). The floor is the error of computing the
network in float32, below which no code comes. Replication has no rate: its error is the share of
inputs without a result, which falls exponentially in N / K.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode, FixedCode, ReplicationCode, SplineCode
from coded_torch.experiments.scores import half_width, rounded
from coded_torch.stragglers import Bernoulli, Stragglers, Uniform

from .networks import SEED
from .runs import Measurement, progress
from .subjects import run, subject

FACTORS = tuple(10.0**x for x in range(-8, 1))  # c
NOISE = 0.01  # the variance of workers' errors over the variance of the outputs
TASKS = ("x sin x", "lenet5-tanh", "lenet5")
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

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.k, self.s = (8, 3) if name == "x sin x" else (20, 5)
        self.draws = 3 if quick else 40 if name == "x sin x" else 15
        self.workers = (32, 64, 128) if quick else (32, 64, 128, 256, 512)

    def inputs(self, part: str, draw: int) -> Tensor:
        """Return inputs ``[K, G, ...]``: groups side by side."""
        if self.name == "x sin x":
            return torch.linspace(0, 10, self.k, dtype=torch.float64)[:, None, None]
        images = getattr(subject(self.name, self.quick), part).images
        generator = torch.Generator().manual_seed(SEED + draw)
        rows = torch.randperm(len(images), generator=generator)[: 3 * self.k]
        return images[rows].unflatten(0, (self.k, 3))

    def outputs(self, x: Tensor) -> Tensor:
        if self.name == "x sin x":
            return x * x.sin()
        results = run(subject(self.name, self.quick).model, x.flatten(0, 1))
        return results.unflatten(0, x.shape[:2]).double()

    def floor(self) -> float:
        """Return the mean squared error of float32, 0 where all is in float64."""
        if self.name == "x sin x":
            return 0.0
        x = self.inputs("held_out", SEED)
        model = copy.deepcopy(subject(self.name, self.quick).model).double()
        exact = run(model, x.flatten(0, 1).double()).unflatten(0, x.shape[:2])
        return float((self.outputs(x) - exact).square().mean())


def bounds(delays: Stragglers, noisy: bool) -> dict[str, Callable[[float, float], float]]:
    """Return the theorems' bounds of each code's error, up to a factor, given N and S."""
    if isinstance(delays, Bernoulli):
        return {
            "spline": lambda n, s: math.log(n) ** 3 / n**3,
            "Berrut": lambda n, s: math.log(n) ** 4 / n**2,
        }
    return {"spline": (lambda n, s: s**1.6 / n**0.6) if noisy else (lambda n, s: s**3 / n**3)}


def errors(
    task: Task, make: Callable[[int, int], list[FixedCode]], delays: str, noisy: bool, part: str
) -> np.ndarray:
    """Return the mean squared errors, ``[draws, N, codes]``, of codes with one encoder.

    ``make`` returns the codes, given N and the number of results.
    """
    seed = SEED + (10_000 if part == "tuning" else 0)
    table = []
    for draw in progress(range(task.draws), "draws"):
        generator = torch.Generator().manual_seed(seed + draw)
        inputs, rows = task.inputs(part, seed + draw), []
        exact = task.outputs(inputs)
        spread = (NOISE * exact.var()).sqrt() if noisy else 0.0
        for n in task.workers:
            latencies = DELAYS[delays](task.s, n, seed + draw).sample(n)
            received = latencies.isfinite().nonzero().flatten().tolist()
            codes = make(n, len(received))
            results = task.outputs(codes[0].encode(inputs)[received])
            noise = torch.randn(results.shape, generator=generator, dtype=torch.float64)
            answers = [code.decode(results + spread * noise, received) for code in codes]
            rows.append([float((answer - exact).square().mean()) for answer in answers])
        table.append(rows)
    return np.array(table)


def convergence(name: str, delays: str, noisy: bool, quick: bool) -> dict[str, Any]:
    task = Task(name, quick)

    def splines(n: int, count: int) -> list[FixedCode]:
        rates = [c * count**-0.8 for c in FACTORS] if noisy else [0.0]
        return [SplineCode(task.k, n, decoder_smoothing=rate) for rate in rates]

    codes: dict[str, Any] = {
        "spline": splines,
        "Berrut": lambda n, count: [BerrutCode(task.k, n)],
        "replication": lambda n, count: [ReplicationCode(task.k, n)],
    }
    drawn = [DELAYS[delays](task.s, n, SEED) for n in task.workers]
    stragglers = [  # on average
        each.p * n if isinstance(each, Bernoulli) else float(each.num_stragglers or 0)
        for each, n in zip(drawn, task.workers, strict=True)
    ]
    table: dict[str, Any] = {"workers": list(task.workers), "stragglers": stragglers}
    table["floor"] = float(f"{task.floor():.3g}")
    best = 0
    if noisy:  # one c for every N, with the least product of their errors
        tuning = errors(task, splines, delays, noisy, "tuning")
        best = int(np.log(tuning.mean(0)).mean(0).argmin())
        table["c"] = FACTORS[best]
    for code, make in codes.items():
        at = best if code == "spline" else 0
        squares = errors(task, make, delays, noisy, "held_out")[:, :, at]
        table[code] = {"mse": [rounded(x.mean(), half_width(x)) for x in squares.T]}
        if (squares <= 0).any():  # an exact answer has no logarithm
            continue
        slopes = _slopes(task.workers, squares)
        table[code]["slope"] = rounded(slopes.mean(), half_width(slopes))
        local = [
            _slopes(task.workers[i : i + 2], squares[:, i : i + 2])
            for i in range(len(task.workers) - 1)
        ]
        table[code]["local slopes"] = [rounded(x.mean(), half_width(x)) for x in local]
        if bound := bounds(drawn[0], noisy).get(code):
            rates = [bound(n, s) for n, s in zip(task.workers, stragglers, strict=True)]
            table[code]["bound"] = [float(f"{rate / rates[0]:.4g}") for rate in rates]
            slope = _slopes(task.workers, np.array([rates]))[0]
            table[code]["slope of the bound"] = round(float(slope), 3)
    return table


def _slopes(workers: Sequence[int], squares: np.ndarray) -> np.ndarray:
    """Return the slopes of log ``squares``, ``[draws, N]``, over log N."""
    return np.polyfit(np.log(workers), np.log(squares).T, 1)[0]


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in TASKS:
        for delays, make in DELAYS.items():
            # No theorem covers noise if each worker is lost with a probability.
            for noisy in (False,) if isinstance(make(1, 32, SEED), Bernoulli) else (False, True):
                key = name, delays, "noise" if noisy else "no noise"
                yield key, functools.partial(convergence, name, delays, noisy, quick)


def settings(quick: bool) -> dict[str, Any]:
    tasks = [Task(name, quick) for name in TASKS]
    return {
        "seed": SEED,
        "draws": {task.name: task.draws for task in tasks},
        "workers": list(tasks[0].workers),
        "noise, of the outputs' variance": NOISE,
        "c": list(FACTORS),
    }
