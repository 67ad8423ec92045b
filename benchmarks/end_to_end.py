"""Where does the time go, code by code? ``python -m benchmarks end_to_end``.

Milliseconds, median and quartiles, for one batch of 240: planning (measuring distances, ordering,
fitting the code); encoding; decoding from a received set seen for the first time, and again. All
codes begin with nothing cached. Beside them the network itself: on the batch, on what one worker
gets, and on what all N get. A batch of 4,000 is measured against the float32
factorisation of as many results as arrive of it, too.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import (
    BerrutCode,
    FloaterHormannCode,
    LagrangeCode,
    RegressionCode,
    SplineCode,
)
from coded_torch.input_space.metrics import Distances, Sources
from coded_torch.input_space.ordering import similarity_order
from coded_torch.stragglers import Uniform

from .runs import Measurement, progress
from .schemes import BATCH_SIZE, FIXED, Case, Scheme, received_by, rounded, unmixed
from .subjects import SEED, subject

CASES = ((24, 20, 4), (100, 20, 60))
NETWORKS = ("lenet5", "vit", "repvgg")
PARTS = ("plan", "encode", "decode", "decode again")
# A large batch: inputs, results that arrive, and how many factorisations of so many planning and
# decoding may take.
LARGE, ARRIVED, LARGE_BAR = 4000, 3400, 4.5


def schemes(case: Case) -> dict[str, Scheme]:
    (n, k, _), arrival = case, {"ordering": "arrival"}
    return {
        "paper": Scheme(SplineCode(k, n, decoder_smoothing=1e-6, **arrival)),
        "Berrut": Scheme(BerrutCode(k, n, **arrival)),
        "Floater-Hormann": Scheme(FloaterHormannCode(k, n, **arrival)),
        "Lagrange (adapted)": Scheme(LagrangeCode(k, n, decoder_degree=k // 2, **arrival)),
        "paper, ordered": Scheme(SplineCode(k, n)),
        **{name: scheme for name, scheme in unmixed(case).items() if scheme.code.num_workers == n},
    }


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_code(scheme: Scheme, images: Tensor, exact: Tensor, received: list[int]) -> list[float]:
    """Return seconds for each of ``PARTS``."""
    code, plans = copy.deepcopy(scheme.code), []  # with nothing cached

    def plan() -> None:
        plans.append(code.plan([images], scheme.lost))

    seconds = [seconds_of(plan), seconds_of(lambda: plans[0].encode(images))]
    results = plans[0].encode(exact)[received]  # numbers of the right shape
    decode = functools.partial(plans[0].decode, results, received)
    return [*seconds, seconds_of(decode), seconds_of(decode)]


@torch.no_grad()
def end_to_end(name: str, case: Case, quick: bool) -> dict[str, Any]:
    n, k, s = case
    of, law, runs = subject(name, quick), Uniform(s, seed=SEED), settings(quick)["runs"]
    model, images = of.model, next(of.batches("held_out", BATCH_SIZE, 1)).images
    exact, every = model(images), schemes(case)
    seconds: dict[str, list[list[float]]] = {code: [] for code in every}
    for received in progress([received_by(law, n) for _ in range(runs)], "runs"):
        for code, scheme in every.items():  # in turns: what slows the machine slows all alike
            seconds[code].append(time_code(scheme, images, exact, received))
    groups = -(-BATCH_SIZE // k)
    coded = images[torch.arange(n * groups) % BATCH_SIZE]
    squared, _ = Distances(Sources([images]), ["shrunk"]).by("shrunk")
    others: dict[str, Callable[[], object]] = {
        "the batch": lambda: model(images),
        "one worker's inputs": lambda: model(coded[:groups]),
        "all workers' inputs": lambda: [model(part) for part in coded.split(BATCH_SIZE)],
        "distances and path": lambda: Distances(Sources([images]), ["shrunk"]),
        "path": lambda: similarity_order(squared.sqrt()),
    }
    return {
        "codes": {
            code: dict(zip(PARTS, quartiles(each), strict=True)) for code, each in seconds.items()
        },
        "network": {
            what: quartiles([[seconds_of(run)] for _ in range(runs)])[0]
            for what, run in others.items()
        },
    }


@torch.no_grad()
def large(quick: bool) -> dict[str, Any]:
    size, arrived = (LARGE // 10, ARRIVED // 10) if quick else (LARGE, ARRIVED)
    n, k, s = CASES[0]
    images = subject("lenet5", quick).held_out.images
    images = images[torch.arange(size) % len(images)]
    exact, law = images.flatten(1)[:, :10], Uniform(s, seed=SEED)
    scheme = Scheme(RegressionCode(k, n, **FIXED), s)
    matrix = torch.randn(arrived, arrived)
    matrix = torch.mm(matrix, matrix.T).div_(arrived) + torch.eye(arrived)
    seconds, factorisation = [], []
    for received in [received_by(law, n) for _ in range(3 if quick else 7)]:
        seconds.append(time_code(scheme, images, exact, received))
        factorisation.append([seconds_of(lambda: torch.linalg.cholesky(matrix))])
    codes = {"KernelCode": dict(zip(PARTS, quartiles(seconds), strict=True))}
    spent = codes["KernelCode"]["plan"][0] + codes["KernelCode"]["decode"][0]
    (of_factorisation,) = quartiles(factorisation)
    ratio = round(spent / of_factorisation[0], 2)
    print(f"{size:,} inputs: {ratio} factorisations")
    return {"codes": codes, "factorisation": of_factorisation, "ratio, bar": [ratio, LARGE_BAR]}


def quartiles(rows: Sequence[Sequence[float]]) -> list[Any]:
    """Return median, lower and upper quartile of every column, in milliseconds."""
    return [rounded(*column) for column in np.percentile(rows, (50, 25, 75), axis=0).T * 1e3]


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in NETWORKS[:1] if quick else NETWORKS:
        for case in CASES[:1] if quick else CASES:
            yield ("cpu", name, str(case)), functools.partial(end_to_end, name, case, quick)
    yield ("cpu", "lenet5", f"{CASES[0]}, {LARGE:,} inputs"), functools.partial(large, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batch size": BATCH_SIZE, "runs": 3 if quick else 21}
