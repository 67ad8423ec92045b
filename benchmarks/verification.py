"""The wrong answers that reach the caller, and the cost of finding wrong workers.

Workers compute at once here, and one of them returns wrong results: whole parts (noise of a share
of the outputs' spread, results of other inputs, the two largest outputs swapped), one row that
answers another, a block of outputs in all rows, or one number (of another row, or with a bit of its
exponent or mantissa flipped). LeNet-5 answers the 2,000 digits that ship.

- *left*: the share of wrong rows that reach the caller in a request in which the worker is wrong.
- *until*: requests until the worker is excluded, if it is wrong in every one, or in some.
- *work*: of honest requests, by the share of checked rows.
- *peers*: *left* and *work* if all parts are computed once, twice (and by a third worker where two
  results differ), or three times, and a majority decides.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .faulty import (
    BATCH_SIZE,
    FAULTS,
    ROUNDING,
    WORKERS,
    Compute,
    Data,
    Fault,
    Fleet,
    Outcome,
    Voters,
)
from .runs import Measurement, progress
from .subjects import SEED

#: The shares of rows that are checked.
SHARES = (0.01, 0.02, 0.03, 0.1)


def honest(data: Data, fleet: Fleet | Voters, sizes: Iterable[int]) -> float:
    """Return the work of requests in which nobody is wrong."""
    found: Counter[str] = Counter()
    for size in sizes:
        at = data.batch(size)
        call = fleet.call(
            size,
            lambda worker, rows, again, at=at: data.normal(
                data.outputs[at[list(rows)]], ROUNDING / 4
            ),
            [data.inputs[at]],
        )
        found.update(rows=size, computed=call.computed)
    return found["computed"] / found["rows"]


def left(
    data: Data, fleet: Fleet | Voters, fault: Fault, count: int, size: int
) -> dict[str, float]:
    """Requests in each of which one proven worker is wrong, a new one."""
    found: Counter[str] = Counter()
    for number in range(count):
        fleet.settle()
        worker, at = number % WORKERS, data.batch(size)
        truth = data.outputs[at]

        def compute(
            by: int, rows: Sequence[int], again: bool, worker: int = worker, truth: Tensor = truth
        ) -> Tensor:
            right = data.normal(truth[list(rows)], ROUNDING / 4)
            return fault(data, right) if by == worker else right

        wrong: list[Tensor] = []
        call = fleet.call(size, _noting(compute, wrong, worker, truth), [data.inputs[at]])
        found.update(_compared(data, call, truth, wrong))
    return dict(found)


def _noting(compute: Compute, wrong: list[Tensor], worker: int, truth: Tensor) -> Compute:
    """Note the first results of the worker as well, NaN for rows that it did not compute."""
    wrong.append(torch.full_like(truth, float("nan")))

    def noting(by: int, rows: Sequence[int], again: bool) -> Tensor:
        returned = compute(by, rows, again)
        if by == worker and not again:
            wrong[0][list(rows)] = returned
        return returned

    return noting


def _compared(data: Data, call: Outcome, truth: Tensor, wrong: list[Tensor]) -> dict[str, int]:
    """Count wrong rows, made and left."""
    counted = {"wrong": wrong[0], "left": call.answers}
    return {name: int(data.wrong(rows, truth).sum()) for name, rows in counted.items()}


def until(data: Data, fault: Fault, share: float, rate: float, seed: int, most: int = 2000) -> int:
    """Requests until a worker that is wrong in a share of its parts is excluded."""
    fleet = warm(data, Fleet(WORKERS, share, seed))
    for number in range(1, most + 1):
        at = data.batch(BATCH_SIZE)

        def compute(worker: int, rows: Sequence[int], again: bool, at: Tensor = at) -> Tensor:
            right = data.outputs[at[list(rows)]]
            return fault(data, right) if worker == 0 and fleet.random.random() < rate else right

        excluded = fleet.call(BATCH_SIZE, compute, [data.inputs[at]]).verdict.excluded
        assert excluded in ((), (0,)), excluded
        if excluded:
            return number
    return most


def warm(data: Data, fleet: Fleet) -> Fleet:
    """Let some honest requests set the bars of scores, as in a pool whose workers are proven."""
    fleet.settle()
    honest(data, fleet, [BATCH_SIZE] * 40)
    return fleet


def _left_by_fault(data: Data, fleet: Fleet | Voters, count: int) -> dict[str, Any]:
    faults = progress(FAULTS.items(), "faults")
    found = {name: left(data, fleet, fault, count, BATCH_SIZE) for name, fault in faults}
    for x in found.values():
        x["share left"] = x["left"] / max(1, x["wrong"])
    return found


def measure_left(quick: bool, share: float) -> dict[str, Any]:
    data, count = Data(), 24 if quick else 240
    fleet = warm(data, Fleet(WORKERS, share))
    found = _left_by_fault(data, fleet, count)
    return {"faults": found}


def measure_until(quick: bool) -> dict[str, Any]:
    data, seeds = Data(), range(4 if quick else 25)
    found: dict[str, Any] = {}
    for name, rate in (("noise 1", 1.0), ("one row", 1.0), ("mantissa", 1.0), ("noise 1", 0.1)):
        each = sorted(until(data, FAULTS[name], 0.02, rate, seed) for seed in seeds)
        found[f"{name}, in {rate:g} of its parts"] = {
            "median": statistics.median(each),
            "95 %": each[len(each) * 95 // 100],
        }
    return found


def measure_work(quick: bool) -> dict[str, Any]:
    """The work of honest requests, by the share of checked rows."""
    data, sizes = Data(), [BATCH_SIZE] * (20 if quick else 300)
    fleets = {f"{share:g}": Fleet(WORKERS, share).settle() for share in SHARES}
    return {share: honest(data, fleet, sizes) for share, fleet in fleets.items()}


def measure_peers(quick: bool) -> dict[str, Any]:
    found, count = {}, 24 if quick else 240
    for copies, name in enumerate(("nothing", "everything twice", "everything three times"), 1):
        data = Data()
        voters = Voters(WORKERS, copies, 1e-3 * data.spread)
        work = honest(data, voters, [BATCH_SIZE] * 20)
        found[name] = {"work": work, "faults": _left_by_fault(data, voters, count)}
    return found


def measurements(quick: bool) -> Iterable[Measurement]:
    for share in SHARES:
        yield ("left", f"{share:g}"), functools.partial(measure_left, quick, share)
    yield ("until",), functools.partial(measure_until, quick)
    yield ("work",), functools.partial(measure_work, quick)
    yield ("peers",), functools.partial(measure_peers, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "workers": WORKERS, "rows": BATCH_SIZE}
