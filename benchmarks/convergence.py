"""How fast does the paper's error fall with more workers? ``python -m benchmarks convergence``.

The mean squared error of x sin x at K = 8 inputs in [0, 10], and of LeNet-5's logits on batches of
60 digits at K = 20, for N workers. S of them are lost uniformly, S fixed or growing as the square
root of N; or each is lost with probability p. Where workers add noise, it is Gaussian with a
hundredth of the outputs' variance, and the decoder's smoothing is the theorem's c (N - S)^(-4/5),
with the c of least error on other draws.

The slope of the logarithm of the error over that of N is fitted for every draw on its own, which
gives the interval. Beside it stands the slope of the theorem's bound at the same N and S: of the
spline, O(S^3 N^-3) without and O(S^(8/5) N^(-3/5)) with noise (arXiv 2406.00300), and O(log^3 N
N^-3) where each worker is lost with a fixed probability, for Berrut's code then O(log^4 N N^-2)
(arXiv 2502.00645).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import BerrutCode, FixedCode, SplineCode
from coded_torch.stragglers import Bernoulli, Stragglers, Uniform

from .runs import Measurement, progress
from .schemes import half_width, received_by, rounded
from .subjects import SEED, run, subject

FACTORS = tuple(10.0**x for x in range(-8, 1))  # c
NOISE = 0.01  # of the outputs' variance
TASKS = ("x sin x", "lenet5")
# Which workers are lost, given S where N = 32, N, and a seed.
LAWS: dict[str, Callable[[int, int, int], Stragglers]] = {
    "S fixed": lambda s, n, seed: Uniform(s, seed=seed),
    "S as the square root of N": lambda s, n, seed: Uniform(
        round(s * math.sqrt(n / 32)), seed=seed
    ),
    "each with p = 0.05": lambda s, n, seed: Bernoulli(0.05, seed=seed),
    "each with p = 0.2": lambda s, n, seed: Bernoulli(0.2, seed=seed),
}


class Task:
    """A model, its inputs draw by draw, and the settings of the curve."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.k, self.s = (8, 3) if name == "x sin x" else (20, 5)
        self.draws = 3 if quick else 40 if name == "x sin x" else 15
        self.workers = (32, 64, 128) if quick else (32, 64, 128, 256, 512)

    def inputs(self, part: str, draw: int) -> Tensor:
        """Return inputs ``[K, G, ...]``: groups side by side."""
        if self.name == "x sin x":
            return torch.linspace(0, 10, self.k, dtype=torch.float64)[:, None, None]
        images = getattr(subject("lenet5", self.quick), part).images
        generator = torch.Generator().manual_seed(SEED + draw)
        rows = torch.randperm(len(images), generator=generator)[: 3 * self.k]
        return images[rows].unflatten(0, (self.k, 3))

    def outputs(self, x: Tensor) -> Tensor:
        if self.name == "x sin x":
            return x * x.sin()
        results = run(subject("lenet5", self.quick).model, x.flatten(0, 1))
        return results.unflatten(0, x.shape[:2]).double()


def lost(law: Stragglers, n: int) -> float:
    """Return how many of N workers a law loses, on average."""
    return law.p * n if isinstance(law, Bernoulli) else float(law.num_stragglers or 0)


def bounds(law: Stragglers, noisy: bool) -> dict[str, Callable[[float, float], float]]:
    """Return the theorems' bounds of each code's error, up to a factor, given N and S."""
    if isinstance(law, Bernoulli):
        return {
            "spline": lambda n, s: math.log(n) ** 3 / n**3,
            "Berrut": lambda n, s: math.log(n) ** 4 / n**2,
        }
    return {"spline": (lambda n, s: s**1.6 / n**0.6) if noisy else (lambda n, s: s**3 / n**3)}


def errors(
    task: Task, make: Callable[[int, int], list[FixedCode]], law: str, noisy: bool, part: str
) -> np.ndarray:
    """Return the mean squared errors, ``[draws, N, codes]``, of codes with one encoder.

    Args:
        task: the model and its inputs.
        make: returns the codes, given N and the number of results.
        law: which workers are lost.
        noisy: whether workers add noise.
        part: of the data.
    """
    seed = SEED + (10_000 if part == "tuning" else 0)
    table = []
    for draw in progress(range(task.draws), "draws"):
        generator = torch.Generator().manual_seed(seed + draw)
        inputs, rows = task.inputs(part, seed + draw), []
        exact = task.outputs(inputs)
        spread = (NOISE * exact.var()).sqrt() if noisy else 0.0
        for n in task.workers:
            received = received_by(LAWS[law](task.s, n, seed + draw), n)
            codes = make(n, len(received))
            results = task.outputs(codes[0].encode(inputs)[received])
            noise = torch.randn(results.shape, generator=generator, dtype=torch.float64)
            answers = [code.decode(results + spread * noise, received) for code in codes]
            rows.append([float((answer - exact).square().mean()) for answer in answers])
        table.append(rows)
    return np.array(table)


def convergence(name: str, law: str, noisy: bool, quick: bool) -> dict[str, Any]:
    task = Task(name, quick)

    def splines(n: int, count: int) -> list[FixedCode]:
        rates = [c * count**-0.8 for c in FACTORS] if noisy else [0.0]
        return [SplineCode(task.k, n, decoder_smoothing=rate) for rate in rates]

    def berrut(n: int, count: int) -> list[FixedCode]:
        return [BerrutCode(task.k, n)]

    laws = [LAWS[law](task.s, n, SEED) for n in task.workers]
    stragglers = [lost(each, n) for each, n in zip(laws, task.workers, strict=True)]
    table: dict[str, Any] = {"workers": list(task.workers), "stragglers": stragglers}
    best = 0
    if noisy:  # the same c for every N, that of the least product of their errors
        tuning = errors(task, splines, law, noisy, "tuning")
        best = int(np.log(tuning.mean(0)).mean(0).argmin())
        table["c"] = FACTORS[best]
    for code, make, which in (("spline", splines, best), ("Berrut", berrut, 0)):
        squares = errors(task, make, law, noisy, "held_out")[:, :, which]
        slopes = _slopes(task, squares)
        table[code] = {
            "mse": [rounded(x.mean(), half_width(x)) for x in squares.T],
            "slope": rounded(slopes.mean(), half_width(slopes)),
        }
        if bound := bounds(laws[0], noisy).get(code):
            rates = [bound(n, s) for n, s in zip(task.workers, stragglers, strict=True)]
            table[code]["bound"] = [float(f"{rate / rates[0]:.4g}") for rate in rates]
            table[code]["slope of the bound"] = round(float(_slopes(task, np.array([rates]))[0]), 3)
    return table


def _slopes(task: Task, squares: np.ndarray) -> np.ndarray:
    """Return the slopes of the logarithm of ``squares``, ``[draws, N]``, over that of N."""
    return np.polyfit(np.log(task.workers), np.log(squares).T, 1)[0]


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in TASKS:
        for law, make in LAWS.items():
            # No theorem says what noise does where each worker is lost with a probability.
            for noisy in (False,) if isinstance(make(1, 32, SEED), Bernoulli) else (False, True):
                key = name, law, "noise" if noisy else "no noise"
                yield key, functools.partial(convergence, name, law, noisy, quick)


def settings(quick: bool) -> dict[str, Any]:
    tasks = [Task(name, quick) for name in TASKS]
    return {
        "seed": SEED,
        "draws": {task.name: task.draws for task in tasks},
        "workers": list(tasks[0].workers),
        "noise, of the outputs' variance": NOISE,
        "c": list(FACTORS),
    }
