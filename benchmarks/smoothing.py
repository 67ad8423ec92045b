"""How does the paper's code depend on its smoothing? ``python -m benchmarks smoothing``.

The root mean squared error over a grid of encoder and decoder smoothing, relative to the best on
the grid, and the cost of a factor of ten off the best, which the paper puts at about 3 %. In the
order of arrival, with the paper's points. The best is the best on these very batches. With noise,
workers' outputs carry independent Gaussian errors whose variance is a hundredth of the outputs'.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from coded_torch.codes import SplineCode
from coded_torch.stragglers import Uniform

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, OUTPUTS, Case, half_width, received_by, rounded
from .subjects import SEED, run, subject

GRID = (0.0, *(10.0**x for x in range(-12, -1)))
CASES = ((100, 20, 20), (100, 20, 60), (24, 20, 4))
NOISES = (0.0, 0.01)  # of the outputs' variance


@torch.no_grad()
def smoothing(name: str, case: Case, quick: bool) -> dict[str, Any]:
    n, k, s = case
    of, generator = subject(name, quick), torch.Generator().manual_seed(SEED)
    law, count = Uniform(s, seed=SEED), settings(quick)["batches"]
    codes = [SplineCode(k, n, encoder_smoothing=x, decoder_smoothing=x) for x in GRID]
    squares: dict[tuple[str, float], list[list[list[float]]]] = {
        key: [] for key in itertools.product(OUTPUTS, NOISES)
    }
    for batch in progress(of.batches("held_out", BATCH_SIZE, count), "batches", count):
        received, groups = received_by(law, n), batch.images.unflatten(0, (-1, k)).transpose(0, 1)
        exact = run(of.model, groups.flatten(0, 1)).unflatten(0, groups.shape[:2])
        errors = torch.randn(len(received), *exact.shape[1:], generator=generator)
        coded = [code.encode(groups)[received] for code in codes]
        results = [run(of.model, x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in coded]
        for (output, noise), table in squares.items():
            stage = OUTPUTS[output]
            want = stage(exact)
            spread = (noise * want.flatten(0, 1).var(0).mean()).sqrt()
            table.append(
                [
                    [
                        float((code.decode(noisy, received) - want).square().sum(-1).mean())
                        for code in codes
                    ]
                    for noisy in (stage(x) + spread * errors for x in results)
                ]
            )
    found: dict[str, Any] = {}
    for (output, noise), tables in squares.items():
        found.setdefault(output, {})[f"noise {noise}"] = _surface(np.array(tables))
    return {"surfaces": found}


def _surface(squares: np.ndarray) -> dict[str, Any]:
    """Summarise squared errors ``[batches, encoder, decoder]``."""
    rmse = np.sqrt(squares.mean(0))
    best = np.unravel_index(rmse.argmin(), rmse.shape)
    return {
        "best": {"encoder": GRID[best[0]], "decoder": GRID[best[1]]},
        "rmse": rounded(rmse.min())[0],
        "rmse to best": [rounded(*row) for row in rmse / rmse.min()],
        "a factor of ten off": {
            "encoder": _neighbours(squares, best, 0),
            "decoder": _neighbours(squares, best, 1),
        },
    }


def _neighbours(squares: np.ndarray, best: tuple[int, int], axis: int) -> dict[str, Any]:
    """Return the RMSE at a tenth and at ten times the best smoothing over that at the best."""
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


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in ("lenet5",) if quick else ("lenet5", "vit"):
        for case in CASES[-1:] if quick else CASES:
            yield (name, str(case)), functools.partial(smoothing, name, case, quick)


def settings(quick: bool) -> dict[str, Any]:
    count = 2 if quick else 20
    return {"seed": SEED, "batch size": BATCH_SIZE, "batches": count, "grid": list(GRID)}
