"""Do midpoints beat copies as redundant rows? ``python -m benchmarks midpoints``.

``RegressionCode`` with either, each tuned on tuning batches, answers the same held-out batches from
the same received sets. The ratio is the geometric mean of the batches', with its interval, and
``chosen`` is what ``tune`` takes of both. Midpoints were developed on these networks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from coded_torch.codes import RegressionCode
from coded_torch.experiments._tune import SETS, Trial, chosen
from coded_torch.experiments.compare import received_by
from coded_torch.experiments.scores import half_width, rounded, score
from coded_torch.stragglers import Uniform

from .accuracy import PAIRS, SMALL, Case
from .networks import SEED
from .runs import Measurement
from .subjects import subject

#: The networks, and how many held-out rows there are.
ROWS = {
    "lenet5": 10_000, "digits": 957, "friedman1": 480, "vowels": 130, "power": 456,
    "appliances": 297,
}  # fmt: skip
LEAST = 4  # batches, for an interval
SETTINGS = ((PAIRS, 16), (PAIRS, 64), ((5, 4, 1), 32), (SMALL, 64), ((5, 4, 1), 240))


def midpoints(name: str, case: Case, size: int, quick: bool) -> dict[str, Any]:
    """Compare midpoints with copies, each tuned, on held-out batches, with what tuning chooses."""
    n, k, s = case
    of, code, delays = subject(name, quick), RegressionCode(k, n), Uniform(s, seed=SEED)
    count = 4 if quick else 24

    def trials(part: str, most: int) -> list[Trial]:
        batches = of.batches(part, size, most)
        sets = ([received_by(delays, n, s) for _ in range(SETS)] for _ in range(most))
        return [Trial(of.model, (x.images,), y) for x, y in zip(batches, sets, strict=False)]

    honest = trials("tuning", max(1, 240 // size))
    kinds = {
        kind: chosen("midpoints", code, honest, s, {"redundancy": [kind]})
        for kind in ("copies", "midpoints")
    }
    tuned = chosen("midpoints", code, honest, s)
    found = {kind: list[Any]() for kind in kinds}
    for trial in trials("held_out", count):
        for kind, each in kinds.items():
            answers = (trial.decode(each, received, s)[0] for received in trial.sets)
            found[kind].append(np.mean([score(x, trial.exact[0]) for x in answers], 0))
    by = {kind: np.array(each).T for kind, each in found.items()}
    ratios = np.log(by["midpoints"][0] / by["copies"][0])  # as errors differ by factors
    mean, half = ratios.mean(), half_width(ratios)
    return {
        "chosen": tuned.redundancy,
        "batches": len(ratios),
        "mse ratio": rounded(*np.exp([mean, mean - half, mean + half])),
        "mse": {kind: rounded(x[0].mean() / x[2].mean()) for kind, x in by.items()},
        "class kept": {kind: rounded(x[5].mean()) for kind, x in by.items()},
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in ["lenet5"] if quick else ROWS:
        for case, size in SETTINGS[: 1 if quick else None]:
            if size * LEAST <= ROWS[name]:
                key = name, f"B = {size}", str(case)
                yield key, functools.partial(midpoints, name, case, size, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batches": 4 if quick else 24, "received sets": SETS}
