"""What do compromised workers change under each code? ``python -m benchmarks adversaries``.

Of (N, K, S) = (100, 20, 10), five of the received workers are compromised. Each code answers the
same batches from the same received sets: with all results, with results dropped that do not fit
(``adversaries=5``), and without the compromised workers, as an oracle would. Peers are the error
locator of ApproxIFER for Berrut's code, group by group, and the median of copies. The constants of
the search were chosen on other networks than these, but for the table of digits.

"calls" are of one pool of 100 workers on LeNet-5: 1,000 honest ones (50 batches, each with 20
received sets), and 40 in which the same five workers are compromised. Workers change columns from
call to call. A worker that is excluded is lost from then on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_torch import codes
from coded_torch.codes.curves import chebyshev_second
from coded_torch.experiments.compare import received_by
from coded_torch.experiments.scores import rounded
from coded_torch.stragglers import Uniform
from coded_torch.verification._evidence import Evidence

from .accuracy import SEEDS
from .networks import SEED
from .peers import wrong_workers
from .runs import Measurement
from .subjects import run, subject

NUM_WORKERS, NUM_DATA, NUM_STRAGGLERS, ADVERSARIES = 100, 20, 10, 5
SUBJECTS = (*SEEDS,)
SIZES = (240, 20)
#: Two batches instead of six are tried: a call takes seconds.
FEW = [(name, 240) for name in SUBJECTS[1:]]
SILENT = 3  # an answer with so many times the oracle's error, unmarked, is wrong in silence
#: Less squared error over the variance is right: copies may differ by .1 % of the spread.
EXACT = 1e-6
HONEST_BATCHES, HONEST_SETS = 50, 20  # of honest calls
CALLS = 40  # with the same compromised workers
CALLED = ("the paper's, ordered", "regression")  # the codes of these calls

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
#: Changes that move answers less than honest errors, and are not found.
SUBTLE = ("x 1.01",)
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


class Prepared(NamedTuple):
    """A batch, with the results of all workers under each code."""

    exact: Tensor  # [B, C]
    plans: dict[str, Any]
    outputs: dict[str, Tensor]  # [N, G, C]

    @classmethod
    def of(cls, model: Any, images: Tensor, kinds: Iterable[str] = CODES) -> Prepared:
        plans = {kind: CODES[kind](ADVERSARIES).plan([images]) for kind in kinds}
        outputs = dict[str, Tensor]()
        for kind, plan in plans.items():
            coded = plan.encode(images)
            results = run(model, coded.flatten(0, 1))
            outputs[kind] = results.unflatten(0, coded.shape[:2]).flatten(2)
        return cls(run(model, images).flatten(1), plans, outputs)


@functools.lru_cache(1)  # the next attack meets the same batches
def prepared(name: str, size: int, quick: bool) -> list[Prepared]:
    of = subject(name, quick)
    count = 2 if (name, size) in FEW else 6
    if quick:
        count = 1
    return [Prepared.of(of.model, x.images) for x in of.batches("held_out", size, count)]


def changed(
    results: Tensor, wrong: Sequence[int], attack: Attack | None, generator: torch.Generator
) -> Tensor:
    """Return results in which an attack has changed those of some columns."""
    results = results.clone()
    if attack is not None:
        points = torch.from_numpy(chebyshev_second(NUM_WORKERS))[[*wrong]]
        results[[*wrong]] = attack(results[[*wrong]], points, generator)
    return results


def attacked(
    name: str, size: int, attack: Attack | None, quick: bool, draws: int
) -> dict[str, Any]:
    """Return what each code answers under an attack, over the variance of the outputs.

    Compromised workers are drawn so many times for each batch.
    """
    delays = Uniform(NUM_STRAGGLERS, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str, list[list[float]]] = {}
    for exact, plans, outputs in prepared(name, size, quick):
        variance = float((exact - exact.mean(0)).square().sum(1).mean())

        def squares(answers: Tensor, exact: Tensor = exact, variance: float = variance) -> Tensor:
            return (answers.flatten(1) - exact).square().sum(1) / variance

        def error(answers: Tensor) -> float:
            return float(squares(answers).mean())

        for _ in range(draws):
            received = received_by(delays, NUM_WORKERS, NUM_STRAGGLERS)
            drawn = torch.randperm(len(received), generator=generator)[:ADVERSARIES]
            wrong = [] if attack is None else [received[i] for i in drawn.tolist()]
            oracle = [worker for worker in received if worker not in wrong]
            for kind, plan in plans.items():
                results = changed(outputs[kind], wrong, attack, generator)
                trust = plan.trusted([results[received]], received)
                kept = [received[i] for i in trust.places]
                dropped = {*received} - {*kept}
                best = error(plan.decode(results[oracle], oracle))
                answers = plan.decode(results[kept], kept)
                unmarked = squares(answers)[~trust.undefended]
                limit = max(SILENT * best, EXACT)
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
                    defended = error(answers)
                    silent = defended > limit  # it marks nothing
                    numbers = [numbers[0], defended, best, 0, 0, float(silent), 0]
                    found.setdefault(peer, []).append(numbers)
    names = ("trusting", "defended", "oracle", "found", "innocent", "silent", "undefended")
    answered = {}
    for kind, rows in found.items():
        means = torch.tensor(rows).double().mean(0).tolist()
        each = {key: rounded(value)[0] for key, value in zip(names, means, strict=True)}
        answered[kind] = {**each, "calls": len(rows)}
    return {"codes": answered}


class _Pool:
    """A pool whose excluded workers are kept by number."""

    def __init__(self) -> None:
        self.excluded = list[int]()

    def exclude(self, worker: int) -> None:
        self.excluded.append(worker)


def calls(kind: str, attack: Attack | None, quick: bool) -> dict[str, Any]:
    """Return whom many calls of one pool drop and exclude, honest ones without an attack."""
    of = subject("lenet5", quick)
    if quick:
        batches, sets = 2, 2
    elif attack is None:
        batches, sets = HONEST_BATCHES, HONEST_SETS
    else:
        batches, sets = CALLS, 1
    pool = _Pool()
    evidence = Evidence(pool)
    generator = torch.Generator().manual_seed(SEED)
    wrong = [] if attack is None else torch.randperm(NUM_WORKERS, generator=generator).tolist()
    wrong = wrong[:ADVERSARIES]
    dropped = {True: 0, False: 0}  # compromised workers, and others
    marked = 0
    for _ in range(batches):
        rows = torch.randint(len(of.held_out.images), (SIZES[0],), generator=generator)
        batch = Prepared.of(of.model, of.held_out.images[rows], [kind])
        for _ in range(sets):
            # The worker of each column.
            workers = torch.randperm(NUM_WORKERS, generator=generator).tolist()
            late = torch.randperm(NUM_WORKERS, generator=generator)[:NUM_STRAGGLERS].tolist()
            absent = {*late, *pool.excluded}
            received = [i for i in range(NUM_WORKERS) if workers[i] not in absent]
            columns = [i for i in received if workers[i] in wrong]
            results = changed(batch.outputs[kind], columns, attack, generator)
            trust = batch.plans[kind].trusted([results[received]], received)
            kept = {workers[received[i]] for i in trust.places}
            asked = {workers[i] for i in received}
            for worker in asked - kept:
                dropped[worker in wrong] += 1
            marked += bool(trust.undefended.any())
            evidence.add(asked, asked - kept)
    return {
        "calls": batches * sets,
        "compromised workers": len(wrong),
        "of them excluded": len({*wrong} & {*pool.excluded}),
        "others excluded": len({*pool.excluded} - {*wrong}),
        "others dropped": dropped[False],
        "calls with marked rows": marked,
    }


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in SUBJECTS[: 1 if quick else None]:
        for size in SIZES[: 1 if quick else None]:
            for kind, attack in {"none": None, **ATTACKS}.items():
                work = functools.partial(attacked, name, size, attack, quick, 1 if quick else 2)
                yield (name, f"B = {size}", kind), work
    chosen = [*CODES][: 1 if quick else None]
    for code in chosen:
        yield ("calls", code, "none"), functools.partial(calls, code, None, quick)
    attacks = [*ATTACKS.items()][: 1 if quick else None]
    for code, (kind, attack) in itertools.product(CALLED[: 1 if quick else None], attacks):
        if kind not in SUBTLE:
            yield ("calls", code, kind), functools.partial(calls, code, attack, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "(N, K, S)": [NUM_WORKERS, NUM_DATA, NUM_STRAGGLERS],
        "adversaries": ADVERSARIES,
    }
