"""How fast the paper's code gets better with more workers: ``python -m benchmarks convergence``.

The mean squared error of x sin x at K = 8 inputs in [0, 10], and of LeNet-5's logits on batches of
60 digits at K = 20, for N workers of which S are lost uniformly: S fixed, or growing as the square
root of N. Where workers add noise, it is Gaussian with a hundredth of the outputs' variance, and
the decoder's smoothing is the theorem's c (N - S)^(-4/5), with the c of least error on other draws.

The slopes of the logarithm of the error over that of N are fitted by least squares for every draw
(of noise and lost workers; of digits, for LeNet-5) on its own, which gives the interval. Beside
them stand the theorems' bounds, O(S^3 N^-3) without and O(S^(8/5) N^(-3/5)) with noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch._scores import half_width, rounded
from coded_torch.codes import BerrutCode, FixedCode, SplineCode
from coded_torch.compare import received_by
from coded_torch.stragglers import Uniform

from .runs import Measurement, progress
from .subjects import SEED, run, subject

FACTORS = tuple(10.0**x for x in range(-8, 1))  # c
NOISE = 0.01  # of the outputs' variance
GROWTH: dict[str, Callable[[int, int], int]] = {
    "S fixed": lambda s, n: s,
    "S as the square root of N": lambda s, n: round(s * math.sqrt(n / 32)),
}
BOUNDS = {  # of slopes: the powers of N after S has been put in
    ("S fixed", False): -3.0,
    ("S fixed", True): -0.6,
    ("S as the square root of N", False): -1.5,
    ("S as the square root of N", True): 0.2,
}


class Task:
    """A model, its inputs draw by draw, and the settings of the curve."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.k, self.s = (8, 3) if name == "x sin x" else (20, 5)
        self.draws = 3 if quick else 40 if name == "x sin x" else 15
        self.workers = (32, 64, 128) if quick else (32, 64, 128, 256, 512)

    def inputs(self, part: str, draw: int) -> Tensor:
        """``[K, G, ...]``: groups side by side."""
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


def errors(
    task: Task, make: Callable[[int, int], list[FixedCode]], growth: str, noisy: bool, part: str
) -> np.ndarray:
    """The mean squared errors, ``[draws, N, codes]``, of codes with one encoder."""
    seed = SEED + (10_000 if part == "tuning" else 0)
    table = []
    for draw in progress(range(task.draws), "draws"):
        generator = torch.Generator().manual_seed(seed + draw)
        inputs, rows = task.inputs(part, seed + draw), []
        exact = task.outputs(inputs)
        spread = (NOISE * exact.var()).sqrt() if noisy else 0.0
        for n in task.workers:
            s = GROWTH[growth](task.s, n)
            received = received_by(Uniform(s, seed=seed + draw), n)
            codes = make(n, s)
            results = task.outputs(codes[0].encode(inputs)[received])
            noise = torch.randn(results.shape, generator=generator, dtype=torch.float64)
            results = results + spread * noise
            answers = [code.decode(results, received) for code in codes]
            rows.append([float((answer - exact).square().mean()) for answer in answers])
        table.append(rows)
    return np.array(table)


def convergence(name: str, growth: str, noisy: bool, quick: bool) -> dict[str, Any]:
    task = Task(name, quick)

    def splines(n: int, s: int) -> list[FixedCode]:
        rates = [c * (n - s) ** -0.8 for c in FACTORS] if noisy else [0.0]
        return [SplineCode(task.k, n, decoder_smoothing=rate) for rate in rates]

    best = 0
    if noisy:
        # The same c for every N: that of the least product of their errors.
        tuning = errors(task, splines, growth, noisy, "tuning")
        best = int(np.log(tuning.mean(0)).mean(0).argmin())
    found = {
        name: errors(task, make, growth, noisy, "held_out")[:, :, which]
        for name, make, which in (
            ("spline", splines, best),
            ("Berrut", lambda n, s: [BerrutCode(task.k, n)], 0),
        )
    }
    table: dict[str, Any] = {
        "workers": list(task.workers),
        "stragglers": [GROWTH[growth](task.s, n) for n in task.workers],
        "bound of the slope": BOUNDS[growth, noisy],
    }
    if noisy:
        table["c"] = FACTORS[best]
    for code, squares in found.items():
        slopes = np.polyfit(np.log(task.workers), np.log(squares).T, 1)[0]  # [draws]
        table[code] = {
            "mse": [rounded(x.mean(), half_width(x)) for x in squares.T],
            "slope": rounded(slopes.mean(), half_width(slopes)),
        }
    return table


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in ("x sin x", "lenet5"):
        for growth in GROWTH:
            for noisy in (False, True):
                key = name, growth, "noise" if noisy else "no noise"
                yield key, functools.partial(convergence, name, growth, noisy, quick)


def settings(quick: bool) -> dict[str, Any]:
    tasks = [Task(name, quick) for name in ("x sin x", "lenet5")]
    return {
        "seed": SEED,
        "draws": {task.name: task.draws for task in tasks},
        "workers": list(tasks[0].workers),
        "noise, of the outputs' variance": NOISE,
        "c": list(FACTORS),
    }
