"""Do other papers' schemes reach their papers' numbers here? ``python -m benchmarks peers``.

Each runs in its paper's protocol, on MNIST and LeNet-5, beside one number of the paper.

- NeRCC (Moradi and Maddah-Ali, arXiv 2402.04377) nests two regressions, smoothing splines whose two
  regularisations are chosen together: ``SplineCode`` with both smoothings tuned, here on a grid.
  LeTCC (arXiv 2406.00300), "the paper's scheme" elsewhere, is the same code.
- ParM (Kosaian, Rashmi and Venkataraman, SOSP 2019) adds K inputs up, and a *parity model* learns
  the sum of their outputs: the sum less the other outputs is the answer of a missing input.
- ApproxIFER (Soleymani, Ali, Mahdavifar and Avestimehr, arXiv 2109.09868) is Berrut's code with a
  locator of A wrong results among N = 2 K + 2 A - 1.

SBACC (Borah and Harshan, arXiv 2507.01330) is Berrut's code with Chebyshev points of the first kind
for inputs and workers; its decoder of wrong results is not here. ``compare(..., extra=peers)`` adds
NeRCC and SBACC to a comparison. tests/benchmarks/test_peers.py checks the maps of both against the
papers' formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import BerrutCode, Code, SplineCode
from coded_torch.codes.curves import chebyshev_first
from coded_torch.demo import LeNet5, digits
from coded_torch.experiments.scores import half_width, rounded

from . import networks
from .accuracy import cells, tried
from .faulty import BATCH_SIZE, WORKERS, Data, Fault, Fleet
from .networks import CACHE, SEED, Subject
from .runs import Measurement, progress
from .subjects import run, student_of, subject
from .verification import warm

PARITY: tuple[int, int, int] = (3, 2, 1)  # N, K, S
PARITY_EPOCHS = 60  # the paper's scripts have 500; the error hardly falls after 40
STEP = 64  # groups of a step, as in the paper's scripts
LOST = (5, 10, 20, 30, 40, 50, 60, 70, 80)  # S of NeRCC, of N = 100 and K = 20
INPUTS, FAULTY = 12, 1  # K and A of ApproxIFER
NOISE = 100.0  # the standard deviation of ApproxIFER's wrong logits


def peers(num_data: int, num_workers: int, **options: Any) -> dict[str, Code]:
    """Return the codes by the name of their scheme, NeRCC's with smoothings still to be tuned."""
    options = {"ordering": "arrival"} | options  # the papers' order
    points = chebyshev_first(num_workers)
    return {
        "NeRCC": SplineCode(num_data, num_workers, **options),
        "SBACC": BerrutCode(num_data, num_workers, worker_points=points, **options),
    }


def parity_model(of: Subject, images: Tensor | None) -> nn.Module:
    """Return the parity model of LeNet-5 from the cache, trained in minutes if it is not there.

    With images, it learns from them in two epochs.
    """
    if images is not None:
        return _taught(of.model, images, 2)
    path = CACHE / f"parity-lenet5-k{PARITY[1]}.npz"
    return networks.cached(
        path, LeNet5, lambda: _taught(of.model, networks.learnt_images(), PARITY_EPOCHS)
    )


def _taught(module: nn.Module, images: Tensor, epochs: int) -> nn.Module:
    """Return a network that has learnt the sum of the outputs of K inputs from their sum."""
    outputs, group = run(module, images), PARITY[1]

    def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
        groups = rows.view(STEP, group)
        return nn.functional.mse_loss(model(images[groups].sum(1)), outputs[groups].sum(1))

    adam = functools.partial(torch.optim.Adam, weight_decay=1e-5)
    sizes, cycle = (len(images), STEP * group), {"one_cycle": 3e-3, "drop_last": True}
    return networks.fit(LeNet5, loss_of, *sizes, adam, epochs, SEED, **cycle)


def nercc(quick: bool, probabilities: bool) -> dict[str, Any]:
    """Return by how many percent the RMSE of NeRCC is below the RMSE of Berrut's code, by S.

    Logits are decoded, or probabilities. As in the paper, rows are in order of arrival.
    """
    of = subject("lenet5-softmax" if probabilities else "lenet5", quick)
    cases = [(100, 20, s) for s in LOST[:: 4 if quick else 1]]
    schemes, count = ("NeRCC", "Berrut"), 2 if quick else 12

    def nercc_alone(num_data: int, num_workers: int) -> dict[str, Code]:
        return {"NeRCC": peers(num_data, num_workers)["NeRCC"]}

    found = tried(of, cases, BATCH_SIZE, count, extra=nercc_alone, schemes=schemes)
    below: dict[str, list[float]] = {}
    points: dict[str, list[float]] = {}
    for row in found.against("Berrut"):
        if row.name == "NeRCC":
            ratio, half = row.mse_ratio
            below[str(row.setting[2])] = [100 * (1 - ratio**0.5), 50 * half / ratio**0.5]
            points[str(row.setting[2])] = [100 * x for x in row.gain]
    return {
        "records": found,
        "rmse below, %": {lost: rounded(*x) for lost, x in below.items()},
        "accuracy above by S, points": {lost: rounded(*x) for lost, x in points.items()},
        "most": rounded(*max(below.values())),
        # All S have the same batches: the interval of the mean is at most as wide as their mean.
        "mean": rounded(*np.mean([*below.values()], 0)),
        "accuracy above, points": rounded(*np.mean([*points.values()], 0)),
    }


def parm(quick: bool) -> dict[str, Any]:
    """Return the accuracy of answers that a parity model makes, beside the schemes of ``compare``.

    As in the paper, each input is missing once, beside the result of the other one.
    """
    of, (_, k, _), sets = subject("lenet5", quick), PARITY, 5
    count = 2 if quick else 12
    model = parity_model(of, of.tuning.images if quick else None)

    def decoded(images: Tensor, outputs: Tensor) -> Tensor:
        """Return the answer of each input from the other one and the parity model's."""
        grouped = outputs.unflatten(0, (-1, k))
        sums = run(model, images.unflatten(0, (-1, k)).sum(1))
        return (sums[:, None] - (grouped.sum(1, keepdim=True) - grouped)).flatten(0, 1)

    def answers(inputs: list[Tensor], outputs: list[Tensor], received: Sequence[int]) -> Tensor:
        missing = ~torch.isin(torch.arange(len(outputs[0])) % k, torch.tensor(received))
        return torch.where(missing[:, None], decoded(inputs[0], outputs[0]), outputs[0])

    found = tried(
        of,
        [PARITY],
        BATCH_SIZE,
        count,
        surrogate=student_of("lenet5", quick),
        received_sets=sets,
        extra=lambda k, n: {"ParM": answers},
    )
    accuracies = []
    for batch in of.batches("held_out", BATCH_SIZE, count):
        exact = run(of.model, batch.images)
        both = exact, decoded(batch.images, exact)
        accuracies.append([float((x.argmax(1) == batch.labels).double().mean()) for x in both])
    available, degraded = np.array(accuracies).T
    lower = 100 * (available - degraded)
    return {
        "records": found,
        "accuracy": rounded(available.mean(), half_width(available)),
        "degraded accuracy": rounded(degraded.mean(), half_width(degraded)),
        "lower by points": rounded(lower.mean(), half_width(lower)),
        "schemes": cells(found),
    }


class Located:
    """ApproxIFER's answers, of K inputs per group: the results of A workers are found, left out."""

    def __init__(self, num_data: int, faulty: int) -> None:
        self.num_data, self.faulty = num_data, faulty
        self.num_workers = 2 * num_data + 2 * faulty - 1
        # The points of the authors' scripts (github.com/Mahdi-Soleymani/Approxifer).
        points = np.cos(np.arange(self.num_workers)[::-1] * np.pi / self.num_workers)
        self.code = BerrutCode(num_data, self.num_workers, worker_points=points)

    def answers(self, data: Data, at: Tensor, fault: Fault | None, wrong: list[int]) -> Tensor:
        """Return the answers to the inputs ``at``, a multiple of K, with faults of some workers."""
        groups = data.inputs[at].unflatten(0, (-1, self.num_data))  # [G, K, ...]
        coded = self.code.encode(groups, dim=1).float()  # [G, N, ...]
        results = run(data.model, coded.flatten(0, 1)).unflatten(0, coded.shape[:2])
        if fault is not None:
            results[:, wrong] = fault(data, results[:, wrong])
        answers = []
        for group in results:
            named = wrong_workers(group, self.code.worker_points, self.num_data, self.faulty)
            received = [n for n in range(self.num_workers) if n not in named]
            answers.append(self.code.decode(group[received], received))
        return torch.cat(answers).float()


def wrong_workers(results: Tensor, points: np.ndarray, num_data: int, most: int) -> list[int]:
    """Return the positions of the results that most of the outputs' error locators name.

    For every output a rational function P / Q of the points is fitted to the results y by least
    squares of P - y Q; where Q is least, the result is wrong.

    Of results ``[F, ...]`` at the workers' points ``[F]``, ``most`` are named, A. The degree of P
    and of Q is K + A - 1.
    """
    degree = num_data + most - 1
    powers = np.polynomial.chebyshev.chebvander(points, degree)  # [F, degree + 1]
    values = results.flatten(1).double().numpy().T  # [outputs, F]
    numerator = np.broadcast_to(powers, (len(values), *powers.shape))
    system = np.concatenate([numerator, -values[..., None] * powers], -1)
    _, _, basis = np.linalg.svd(system)
    locator = np.abs(basis[:, -1, degree + 1 :] @ powers.T)  # |Q|, [outputs, F]
    named = np.argsort(locator, axis=1)[:, :most]
    votes = np.bincount(named.ravel(), minlength=len(points))
    return sorted(np.argsort(-votes, kind="stable")[:most].tolist())


def approxifer(quick: bool) -> dict[str, Any]:
    """Return the accuracies of answers while one worker adds noise, as in the authors' scripts."""
    data, labels, located = Data(), digits()[1], Located(INPUTS, FAULTY)
    fleet = warm(Fleet(data, WORKERS, 0.02))
    found: dict[str, list[float]] = {}

    def noise(data: Data, rows: Tensor) -> Tensor:
        return data.normal(rows, NOISE / data.spread)

    for number in progress(range(4 if quick else 48), "batches"):
        at, worker = data.batch(BATCH_SIZE), number % WORKERS
        fleet.settle()

        def compute(
            by: int, rows: Sequence[int], again: bool, at: Tensor = at, worker: int = worker
        ) -> Tensor:
            right = data.outputs[at[list(rows)]]
            return noise(data, right) if by == worker else right

        every = {
            "the model": data.outputs[at],
            "ApproxIFER": located.answers(data, at, noise, [worker]),
            "no fault": located.answers(data, at, None, []),
            "verify": fleet.call(at, compute).answers,
        }
        for name, answers in every.items():
            right = (answers.argmax(1) == labels[at]).double().mean()
            found.setdefault(name, []).append(float(right))
    accuracies = {x: rounded(np.mean(y), half_width(np.array(y))) for x, y in found.items()}
    return {"work": located.num_workers / INPUTS, "accuracy": accuracies}


def measurements(quick: bool) -> Iterable[Measurement]:
    yield ("NeRCC",), functools.partial(nercc, quick, True)
    yield ("NeRCC, logits",), functools.partial(nercc, quick, False)
    yield ("ParM",), functools.partial(parm, quick)
    yield ("ApproxIFER",), functools.partial(approxifer, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "epochs of the parity model": 2 if quick else PARITY_EPOCHS,
        "K and A of ApproxIFER": [INPUTS, FAULTY],
        "noise of ApproxIFER": NOISE,
    }
