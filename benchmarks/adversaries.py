"""What do compromised workers change under each code? ``python -m benchmarks adversaries``.

Of (N, K, S) = (100, 20, 10), five of the received workers are compromised. Each code answers the
same batches from the same received sets: with all results, with results dropped that do not fit
(``adversaries=5``), and without the compromised workers, as an oracle would. Peers are the error
locator of ApproxIFER for Berrut's code, group by group, and the median of copies. The constants of
the search were chosen on four small networks on digits and friedman1; LeNet-5 was not among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from coded_torch import codes
from coded_torch.codes.curves import chebyshev_second
from coded_torch.experiments.compare import received_by
from coded_torch.experiments.scores import rounded
from coded_torch.stragglers import Uniform

from .networks import SEED
from .peers import wrong_workers
from .runs import Measurement
from .subjects import run, subject

NUM_WORKERS, NUM_DATA, NUM_STRAGGLERS, ADVERSARIES = 100, 20, 10, 5
SUBJECTS = ("lenet5", "digits", "friedman1")
SIZES = (240, 20)
SILENT = 3  # an answer with so many times the oracle's error, unmarked, is wrong in silence

#: Maps results ``[A, G, C]`` of compromised workers, their points and a generator to wrong ones.
Attack = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _noise(rows: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    return rows + 20 * torch.randn(rows.shape, generator=generator)


def _other_input(rows: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    return rows.roll(1, 1) if rows.shape[1] > 1 else rows.roll(1, 0)


def _smooth(rows: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by a smooth function of the worker points: the decoder takes it for the model's."""
    return rows + (2 * torch.cos(2 * points))[:, None, None].to(rows)


ATTACKS: dict[str, Attack] = {
    "noise": _noise,
    "negated": lambda rows, *_: -rows,
    "x 1.5": lambda rows, *_: 1.5 * rows,
    "x 1.01": lambda rows, *_: 1.01 * rows,
    "classes swapped": lambda rows, *_: rows.roll(1, -1),
    "another input": _other_input,
    "all shift alike": lambda rows, *_: rows + 2,
    "smooth shift": _smooth,
}
CODES: dict[str, Callable[[int], codes.Code]] = {
    "the paper's, ordered": lambda a: codes.SplineCode(NUM_DATA, NUM_WORKERS, adversaries=a),
    "Berrut, ordered": lambda a: codes.BerrutCode(NUM_DATA, NUM_WORKERS, adversaries=a),
    "Floater-Hormann, ordered": lambda a: codes.FloaterHormannCode(
        NUM_DATA, NUM_WORKERS, adversaries=a
    ),
    "Lagrange, ordered": lambda a: codes.LagrangeCode(
        NUM_DATA, NUM_WORKERS, decoder_degree=NUM_DATA - 1, adversaries=a
    ),
    "replication": lambda a: codes.ReplicationCode(NUM_DATA, NUM_WORKERS, adversaries=a),
    "regression": lambda a: codes.RegressionCode(NUM_DATA, NUM_WORKERS, adversaries=a),
}


def _located(plan: Any, results: Tensor, received: list[int]) -> Tensor:
    """Return ApproxIFER's answers: in each group, the results that its locator names are left out.

    Groups are decoded one by one, by a plan of all groups, of which one is taken.
    """
    answers = torch.full((plan.batch_size, *results.shape[2:]), torch.nan)
    points = plan.code.worker_points.take(received)
    for group in range(results.shape[1]):
        named = wrong_workers(results[:, group], points, NUM_DATA, ADVERSARIES)
        kept = [i for i in range(len(received)) if i not in named]
        decoded = plan.decode(results[kept], [received[i] for i in kept])
        rows = plan._grouping.targets[:, group]
        rows = rows[rows >= 0]
        answers[rows] = decoded[rows]
    return answers


def _median(plan: Any, results: Tensor, received: list[int], rows: Tensor) -> Tensor:
    """Return the median of each input's copies; the mean of all where there is none."""
    flat = results.flatten(0, 1)
    of = rows[received].flatten()
    answers = flat.mean(0).expand(plan.batch_size, *flat.shape[1:]).clone()
    for row in of.unique().tolist():
        answers[row] = flat[of == row].median(0).values
    return answers


def attacked(name: str, size: int, attack: Attack | None, quick: bool) -> dict[str, Any]:
    """Return what each code answers under an attack, over the variance of the outputs."""
    of = subject(name, quick=True)
    delays = Uniform(NUM_STRAGGLERS, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str, list[list[float]]] = {}
    variances = list[float]()
    for batch in of.batches("held_out", size, 2 if quick else 12):
        exact = run(of.model, batch.images).flatten(1)
        variances.append(float((exact - exact.mean(0)).square().sum(1).mean()))

        def squares(answers: Tensor, exact: Tensor = exact) -> Tensor:
            return (answers.flatten(1) - exact).square().sum(1)

        def error(answers: Tensor) -> float:
            return float(squares(answers).mean())

        plans = {kind: make(ADVERSARIES).plan([batch.images]) for kind, make in CODES.items()}
        outputs = dict[str, Tensor]()
        for kind, plan in plans.items():
            coded = plan.encode(batch.images)
            results = run(of.model, coded.flatten(0, 1))
            outputs[kind] = results.unflatten(0, coded.shape[:2]).flatten(2)
        for _ in range(1 if quick else 2):
            received = received_by(delays, NUM_WORKERS, NUM_STRAGGLERS)
            drawn = torch.randperm(len(received), generator=generator)[:ADVERSARIES]
            wrong = [] if attack is None else [received[i] for i in drawn.tolist()]
            oracle = [worker for worker in received if worker not in wrong]
            for kind, plan in plans.items():
                results = outputs[kind].clone()
                if attack is not None:
                    points = torch.from_numpy(chebyshev_second(NUM_WORKERS))[wrong]
                    results[wrong] = attack(results[wrong], points, generator)
                trust = plan.trusted([results[received]], received)
                kept = [received[i] for i in trust.places]
                dropped = {*received} - {*kept}
                best = error(plan.decode(results[oracle], oracle))
                answers = plan.decode(results[kept], kept)
                unmarked = squares(answers)[~trust.undefended]
                limit = SILENT * max(best, 1e-9 * variances[-1])
                silent = len(unmarked) > 0 and float(unmarked.mean()) > limit
                numbers = [
                    error(plan.decode(results[received], received)),
                    error(answers),
                    best,
                    len(dropped & {*wrong}),
                    len(dropped - {*wrong}),
                    float(silent),
                    float(trust.undefended.double().mean()),
                ]
                found.setdefault(kind, []).append(numbers)
                peer = None
                if kind == "Berrut, ordered":
                    peer = "Berrut, ApproxIFER's locator"
                    answers = _located(plan, results[received], received)
                elif kind in ("replication", "regression"):
                    peer = f"{kind}, median of copies"
                    rows = getattr(plan, "_rows", None)
                    if rows is None:
                        rows = plan._grouping.rows[torch.arange(NUM_WORKERS) % NUM_DATA]
                    answers = _median(plan, results[received], received, rows)
                if peer is not None:
                    numbers = [numbers[0], error(answers), best, 0, 0, 0, 0]
                    found.setdefault(peer, []).append(numbers)
    variance = sum(variances) / len(variances)
    names = ("trusting", "defended", "oracle")
    answered = {}
    for kind, rows in found.items():
        means = torch.tensor(rows).double().mean(0).tolist()
        answered[kind] = {
            **{key: rounded(value / variance)[0] for key, value in zip(names, means, strict=False)},
            "found": rounded(means[3])[0],
            "innocent": rounded(means[4])[0],
            "silent": rounded(means[5])[0],
            "undefended": rounded(means[6])[0],
            "calls": len(rows),
        }
    return {"codes": answered}


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in SUBJECTS[: 1 if quick else None]:
        for size in SIZES[: 1 if quick else None]:
            for kind, attack in {"none": None, **ATTACKS}.items():
                work = functools.partial(attacked, name, size, attack, quick)
                yield (name, f"B = {size}", kind), work


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "(N, K, S)": [NUM_WORKERS, NUM_DATA, NUM_STRAGGLERS],
        "adversaries": ADVERSARIES,
    }
