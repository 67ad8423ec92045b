"""How the paper's code depends on its smoothing: ``python benchmarks/smoothing.py``.

The root mean squared error over a grid of encoder and decoder smoothing, relative to the best on
the grid, and what a factor of ten off the best costs, which the paper puts at about 3 %. In the
order of arrival, with the paper's points; the same held-out batches and received sets for all. So
the best is the best on these very batches: a surface is looked at here, no code is tuned.

With noise, workers' outputs carry independent Gaussian errors whose variance is a hundredth of the
outputs', as where workers compute with few bits: then smoothing has something to remove.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from common import Measurement, progress, run_measurements
from schemes import BATCH_SIZE, Case, half_width, received_by, rounded
from subjects import SEED, run, subject

from coded_torch import metrics
from coded_torch.codes import SplineCode
from coded_torch.grouping import Grouping
from coded_torch.stragglers import Uniform

GRID = (0.0, *(10.0**x for x in range(-12, -1)))
CASES = ((100, 20, 20), (100, 20, 60), (24, 20, 4))
OUTPUTS = {"logits": lambda x: x, "softmax": lambda x: x.softmax(-1)}


@torch.no_grad()
def surface(name: str, case: Case, output: str, noise: float, quick: bool) -> dict[str, Any]:
    n, k, s = case
    of, generator = subject(name, quick), torch.Generator().manual_seed(SEED)
    law, stage, count = Uniform(s, seed=SEED), OUTPUTS[output], settings(quick)["batches"]
    codes = [
        [SplineCode(k, n, encoder_smoothing=e, decoder_smoothing=d) for d in GRID] for e in GRID
    ]
    squares = []
    for batch in progress(of.batches("held_out", BATCH_SIZE, count), "batches", count):
        received, exact = received_by(law, n), stage(batch.exact)
        grouping = Grouping.arrival(BATCH_SIZE, k)
        shape = len(received), grouping.num_groups, exact.shape[-1]
        errors = torch.randn(shape, generator=generator) * (noise * exact.var(0).mean()).sqrt()
        squares.append([])
        for row in codes:
            coded = row[0].fit(grouping).encode(batch.images)[received]
            results = stage(run(of.model, coded.flatten(0, 1)).view(shape)) + errors
            answers = [code.fit(grouping).decode(results, received) for code in row]
            squares[-1].append([metrics.rmse(answer, exact) ** 2 for answer in answers])
    squares = np.array(squares)  # [batches, encoder, decoder]
    rmse = np.sqrt(squares.mean(0))
    best = np.unravel_index(rmse.argmin(), rmse.shape)
    return {
        "best": {
            "encoder": GRID[best[0]],
            "decoder": GRID[best[1]],
            "rmse": rounded(rmse.min())[0],
        },
        "rmse to best": [rounded(*row) for row in rmse / rmse.min()],
        "a factor of ten off": {
            "encoder": _neighbours(squares, best, 0),
            "decoder": _neighbours(squares, best, 1),
        },
    }


def _neighbours(squares: np.ndarray, best: tuple[int, int], axis: int) -> dict[str, Any]:
    """The RMSE at a tenth and at ten times the best smoothing relative to that at the best."""
    found = {}
    for name, step in (("a tenth", -1), ("ten times", 1)):
        at = list(best)
        at[axis] += step
        if 0 < at[axis] < len(GRID) and best[axis]:  # 0 has no multiples
            ours, theirs = squares[(slice(None), *best)], squares[(slice(None), *at)]
            ratio = theirs.mean() / ours.mean()
            half = half_width(theirs - ratio * ours) / ours.mean()
            found[name] = rounded(ratio**0.5, half / (2 * ratio**0.5))
    return found


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in ("lenet5",) if quick else ("lenet5", "vit"):
        for case in CASES[-1:] if quick else CASES:
            for output in OUTPUTS:
                for noise in (0.0, 0.01):
                    key = name, str(case), output, f"noise {noise}"
                    yield key, functools.partial(surface, name, case, output, noise, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "batch size": BATCH_SIZE,
        "batches": 2 if quick else 20,
        "grid": list(GRID),
    }


if __name__ == "__main__":
    sys.exit(run_measurements(__file__, settings, measurements))
