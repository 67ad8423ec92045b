"""How far is each decoder from the best one under a prior? ``python -m benchmarks bound``.

If the network is drawn from a Gaussian process, no decoder has less expected squared error than the
posterior variance of the answers given the results that arrived, on average over the batch. Each
code has its own bound, of the coded inputs that it sent. The covariance is Matern 5/2 of inputs in
units of the batch's spread. Its length has the least leave-one-out error on the outputs of the
network. Its amplitude is estimated from these errors.
A network is no such draw, so errors may be below this variance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import RegressionCode
from coded_torch.experiments._tune import SETS, Trial, chosen
from coded_torch.experiments.compare import peers, received_by
from coded_torch.experiments.scores import rounded, score
from coded_torch.input_space._gaussian_process import GaussianProcess
from coded_torch.stragglers import Uniform

from .accuracy import FEW, PAIRS, SMALL, Case
from .networks import SEED
from .runs import Measurement
from .subjects import subject

NETWORKS = ("lenet5", "digits")
SETTINGS = ((PAIRS, 16), (SMALL, 64), (FEW, 240))
LENGTHS = [1.5**n for n in range(-4, 5)]  # times the median distance of two rows


class Process:
    """A Gaussian process that fits a network on a batch of inputs, ``[B, C]``."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self._centre, self._spread = inputs.mean(0), inputs.std()
        self.inputs, squared = self._scaled(inputs), self._squared(self._scaled(inputs))
        median = float(squared[squared > 0].median().sqrt())
        tried = {}
        for length in (median * times for times in LENGTHS):
            process = GaussianProcess(squared, length)
            off = process.leave_one_out_residuals(outputs.double())
            tried[float(off.square().sum())] = length, process.leave_one_out_variances, off
        self.length, variances, off = tried[min(tried)]
        #: The squared norm of outputs of variance 1.
        self.amplitude = float((off.square().sum(1) / variances).mean())

    def _scaled(self, inputs: Tensor) -> Tensor:
        return (inputs - self._centre) / self._spread

    def _squared(self, points: Tensor) -> Tensor:
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()

    def bound(self, received: Tensor) -> float:
        """Return the mean posterior variance of the batch, given results at inputs ``[M, C]``."""
        points = torch.cat([self.inputs, self._scaled(received)])
        rows = torch.arange(len(points))
        at, known = rows[: len(self.inputs)], rows[len(self.inputs) :]
        return self.amplitude * float(
            GaussianProcess(self._squared(points), self.length, known, at).variances.mean()
        )


def bounds(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    """Return the errors of tuned codes and their bounds, over the variance of the outputs."""
    n, k, s = case
    of, delays = subject(name, quick), Uniform(s, seed=SEED)

    def trials(part: str, most: int) -> list[Trial]:
        batches = of.batches(part, size, most)
        sets = ([received_by(delays, n, s) for _ in range(SETS)] for _ in range(most))
        return [Trial(of.model, (x.images,), y) for x, y in zip(batches, sets, strict=False)]

    honest, codes = trials("tuning", max(1, 240 // size)), dict(peers(k, n))
    for kind in ("copies", "midpoints"):
        codes[f"regression, {kind}"] = RegressionCode(k, n, redundancy=kind)
    del codes["regression"]
    tuned = {
        scheme: chosen("bound", code, honest, s, {"redundancy": [code.redundancy]})
        if isinstance(code, RegressionCode)
        else chosen("bound", code, honest, s)
        for scheme, code in codes.items()
    }
    found = {scheme: list[tuple[float, float, float]]() for scheme in codes}
    for trial in trials("held_out", 2 if quick else max(4, 240 // size)):
        (inputs,) = trial.inputs
        process = Process(inputs.flatten(1), trial.exact[0])
        for scheme, code in tuned.items():
            sent = code.plan(trial.inputs, s).encode(inputs)
            for received in trial.sets:
                (answers,) = trial.decode(code, received, s)
                each = score(answers, trial.exact[0])
                bound = process.bound(sent[received].flatten(0, 1).flatten(1))
                found[scheme].append((each.mse, bound, each.variance))
    result = {}
    for scheme, each in found.items():
        mse, bound, variance = np.mean(each, 0)
        numbers = {"mse": mse / variance, "bound": bound / variance, "over": mse / bound}
        result[scheme] = {key: rounded(x)[0] for key, x in numbers.items()}
    return {"schemes": result}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in NETWORKS[: 1 if quick else None]:
        for case, size in SETTINGS[: 2 if quick else None]:
            key = name, f"B = {size}", str(case)
            yield key, functools.partial(bounds, name, case, size, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "received sets": SETS, "lengths": len(LENGTHS)}
