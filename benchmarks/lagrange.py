"""When is Lagrange coding of polynomial models exact? ``python -m benchmarks lagrange``.

The model is a polynomial of known degree, applied to every entry of the inputs. Lagrange coding is
exact from (K - 1) degree + 1 results on, and does not apply below; splines answer from any number
of results, approximately. Degree 3 with K = 5, and degree 15 with K = 10, as in the paper; random
polynomials, uniformly lost workers, double precision. Errors are root mean squares relative to the
answers': medians and quartiles over trials, as a few received sets decide every mean.

The inputs of a group are independent ("random"), or lie on a smooth curve ("smooth").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from coded_torch.codes import FixedCode, LagrangeCode, SplineCode
from coded_torch.stragglers import Uniform

from .runs import Measurement, progress
from .schemes import received_by, rounded
from .subjects import SEED

CASES = ((3, 5, 26), (15, 10, 272))  # degree, K, N: twice the threshold
INPUTS = ("random", "smooth")
ENTRIES = 64  # of an input


def polynomial(degree: int, rng: np.random.Generator) -> np.ndarray:
    """Return Chebyshev coefficients of a random polynomial, no larger than 1 on [-1, 1]."""
    coefficients = rng.standard_normal(degree + 1)
    return coefficients / np.abs(coefficients).sum()


def draw_inputs(kind: str, num_data: int, rng: np.random.Generator) -> np.ndarray:
    """Return inputs ``[K, ENTRIES]`` within [-1, 1]."""
    if kind == "random":
        return rng.uniform(-1, 1, (num_data, ENTRIES))
    time, phases = np.linspace(-1, 1, num_data)[:, None], rng.uniform(0, 2 * np.pi, ENTRIES)
    return np.sin(rng.uniform(0.5, 2, ENTRIES) * time + phases)


def relative_error(
    code: FixedCode, inputs: Tensor, exact: Tensor, coefficients: np.ndarray, received: list[int]
) -> float:
    """Return the relative error, NaN where the code does not apply."""
    if len(received) < code.min_received:
        return math.nan
    coded = code.encode(inputs)[received].numpy()
    results = torch.from_numpy(chebyshev.chebval(coded, coefficients))
    answers = code.decode(results, received)
    return float((answers - exact).norm() / exact.norm())


def compare(degree: int, k: int, n: int, kind: str, quick: bool) -> dict[str, Any]:
    threshold = (k - 1) * degree + 1
    codes = {"Lagrange": LagrangeCode(k, n, degree=degree), "spline": SplineCode(k, n)}
    counts = sorted({*np.linspace(k, n, 5 if quick else 12).round().astype(int), threshold})
    trials, curves = 5 if quick else 50, {code: [] for code in codes}
    for count in progress(counts, "received"):
        rng, law = np.random.default_rng(SEED), Uniform(n - int(count), seed=SEED)
        errors: dict[str, list[float]] = {code: [] for code in codes}
        for _ in range(trials):
            coefficients, inputs = polynomial(degree, rng), draw_inputs(kind, k, rng)
            exact = torch.from_numpy(chebyshev.chebval(inputs, coefficients))
            received = received_by(law, n)
            for name, code in codes.items():
                of = torch.from_numpy(inputs), exact, coefficients, received
                errors[name].append(relative_error(code, *of))
        for name, values in errors.items():
            curves[name].append(rounded(*np.percentile(values, (50, 25, 75))))
    return {"threshold": threshold, "received": [int(x) for x in counts], "median error": curves}


def measurements(quick: bool) -> Iterable[Measurement]:
    for degree, k, n in CASES[:1] if quick else CASES:
        for kind in INPUTS:
            key = f"degree {degree}, K = {k}, N = {n}", kind
            yield key, functools.partial(compare, degree, k, n, kind, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "trials": 5 if quick else 50, "entries": ENTRIES}
