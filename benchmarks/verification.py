"""The wrong answers that reach the caller, and the cost of finding wrong workers.

Workers compute at once here, and one of them returns wrong results: whole parts (noise of a share
of the outputs' spread, results of other inputs, the two largest outputs swapped), one row that
answers another, a block of outputs in all rows, or one number (of another row, or with a bit of its
exponent or mantissa flipped). LeNet-5 answers the 2,000 digits that ship.

- *honest*: requests of 8 to 240 rows in which nobody is wrong; "charged" counts their faults.
- *left*: the share of wrong rows that reach the caller in a request in which the worker is wrong,
  and of the harmful ones, which change the class, or outputs by a tenth of their spread (RMS).
- *small*: the same in requests of 8 rows, of a row that answers another, by odd scores alone.
- *until*: requests until the worker is excluded, if it is wrong in every one, or in some.
- *excluded*: the share of pools in which a worker is excluded within 200 requests of 60 rows, and
  the median of the requests; also of one that scales by 1.01, is wrong only in parts of the size
  that parts without checks have, or is right when it is asked again.
- *liars*: a worker that is right whenever it is asked again, and two of six that agree.
- *work*: of honest requests, by the share of checked rows.
- *latency*: milliseconds of a request of 240 rows beyond the workers', while they compute and
  after it; and the mean latency that checks add in simulated pools, in medians of a part.
- *peers*: *left* and *work* if all parts are computed once, twice (and by a third worker where two
  results differ), or three times, and a majority decides.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from coded_torch.experiments.planner import Verified
from coded_torch.experiments.simulation import Conditions, simulate
from coded_torch.nn import Waiting

from .faulty import BATCH_SIZE, FAULTS, ROUNDING, SUBTLE, WORKERS, Data, Fault, Fleet, Voters
from .networks import SEED
from .runs import Measurement, progress

SHARES = (0.01, 0.02, 0.03, 0.1)  # the shares of rows that are checked
SMALL = 8  # rows of a small request
PAIR_OF = 6  # workers, of which two agree
HARMFUL = 0.1  # of the outputs' spread
EXCLUDING = (6, 6), (24, 24), (24, 6)  # workers and parts
HIDES = "again", "repeated"
#: Simulated pools: workers, parts, load.
POOLS = {"24 of 48 workers": (48, 24, 0.3), "24 of 24": (24, 24, 0.3), "4 of 6": (6, 4, 0.3)}


def request(
    fleet: Fleet | Voters,
    size: int = BATCH_SIZE,
    fault: Fault | None = None,
    faulty: Collection[int] = (),
    *,
    rate: float = 1.0,
    hides: str = "",
    agree: bool = False,
) -> tuple[Counter[str], tuple[int, ...]]:
    """Send a request; return its counts, and the workers that it excluded.

    Args:
        fault: what faulty workers do to a share of their parts, the ``rate``.
        hides: "again" if they are right when they are asked again, "repeated" if they are when they
            have had all rows.
        agree: whether they return the same wrong rows.
    """
    data = fleet.data
    at = data.batch(size)
    truth = data.outputs[at]
    agreed = fault(data, truth) if fault and agree else truth
    made, had = truth.clone(), defaultdict[int, set[int]](set)

    def compute(worker: int, rows: Sequence[int], again: bool) -> Tensor:
        right = data.normal(truth[list(rows)], ROUNDING / 4)
        is_known = {*rows} <= had[worker] if hides == "repeated" else again
        had[worker].update(rows)
        if fault is None or worker not in faulty or (hides and is_known):
            return right
        if rate < 1 and fleet.random.random() >= rate:
            return right
        wrong = agreed[list(rows)] if agree else fault(data, right)
        if not again:
            made[list(rows)] = wrong
        return wrong

    call = fleet.call(at, compute)
    counted = Counter(rows=size, computed=call.computed, disputes=len(call.verdict.disputes))
    faults = call.verdict.faults
    counted["charged"] = sum(n for worker, n in faults.items() if worker not in faulty)
    for name, rows in (("wrong", made), ("left", call.answers)):
        off = (rows - truth).abs() / data.spread
        wrong = off.amax(1) > 1e-3
        harmful = off.square().mean(1).sqrt() > HARMFUL
        harmful |= rows.argmax(1) != truth.argmax(1)
        counted[name] = int(wrong.sum())
        counted[f"harmful {name}"] = int((wrong & harmful).sum())
    return counted, call.verdict.excluded


def honest(fleet: Fleet | Voters, sizes: Iterable[int]) -> dict[str, float]:
    """Return the counts of requests in which nobody is wrong, and their work."""
    found = sum((request(fleet, size)[0] for size in sizes), Counter[str]())
    charges = {x: found[x] for x in ("charged", "disputes", "left")}
    return {"work": found["computed"] / max(1, found["rows"]), **charges}


def left(
    fleet: Fleet | Voters, fault: Fault, count: int, size: int = BATCH_SIZE, between: int = 0
) -> dict[str, float]:
    """Return the counts of requests in each of which another proven worker is wrong.

    Honest requests come between rounds of them: rows that are missed make the bars higher.
    """
    found = Counter[str]()
    for number in range(count):
        if number % WORKERS == 0:
            honest(fleet, [size] * between)
        fleet.settle()
        found += request(fleet, size, fault, [number % WORKERS])[0]
    kinds = {x: found[x] for x in ("wrong", "left", "harmful wrong", "harmful left", "charged")}
    shares = (("share left", "left", "wrong"), ("harmful share", "harmful left", "harmful wrong"))
    return {**kinds, **{x: found[some] / max(1, found[all_]) for x, some, all_ in shares}}


def warm(fleet: Fleet) -> Fleet:
    """Let some honest requests set the bars of scores, as in a pool whose workers are proven."""
    fleet.settle()
    honest(fleet, [BATCH_SIZE] * 40)
    return fleet


def until(fleet: Fleet, fault: Fault, most: int, size: int = BATCH_SIZE, **how: Any) -> int:
    """Return the requests until a wrong worker is excluded; one more than ``most`` if it is not."""
    warm(fleet)
    for number in range(1, most + 1):
        excluded = request(fleet, size, fault, [0], **how)[1]
        assert excluded in ((), (0,)), excluded
        if excluded:
            return number
    return most + 1


def by_fault(fleet: Fleet | Voters, count: int) -> dict[str, Any]:
    faults = progress(FAULTS.items(), "faults")
    return {name: left(fleet, fault, count) for name, fault in faults}


def measure_honest(count: int) -> dict[str, Any]:
    fleet = Fleet(Data(), WORKERS, 0.02).settle()
    generator = fleet.data.generator
    sizes = torch.randint(SMALL, BATCH_SIZE + 1, (count,), generator=generator).tolist()
    return {"requests": count, **honest(fleet, progress(sizes, "requests"))}


def measure_left(count: int, share: float) -> dict[str, Any]:
    return {"faults": by_fault(warm(Fleet(Data(), WORKERS, share)), count)}


def measure_small(count: int, between: int) -> dict[str, Any]:
    fleet = Fleet(Data(), WORKERS, 0.02).settle()
    honest(fleet, [SMALL] * 5 * between)
    fleet.record.share = 0.0  # odd scores alone
    return left(fleet, FAULTS["one row"], count, SMALL, between)


def measure_until(seeds: int, most: int) -> dict[str, Any]:
    data, found = Data(), dict[str, Any]()
    for name, rate in (("noise 1", 1.0), ("one row", 1.0), ("mantissa", 1.0), ("noise 1", 0.1)):
        fleets = (Fleet(data, WORKERS, 0.02, seed) for seed in range(seeds))
        each = sorted(until(x, FAULTS[name], most, rate=rate) for x in fleets)
        found[f"{name}, in {rate:g} of its parts"] = {
            "median": statistics.median(each),
            "95 %": each[len(each) * 95 // 100],
        }
    return found


def measure_excluded(
    seeds: int,
    most: int,
    pools: Sequence[tuple[int, int]] = EXCLUDING,
    num_kinds: int | None = None,
) -> dict[str, Any]:
    data, found = Data(), dict[str, Any]()
    kinds = [(name, fault, "") for name, fault in (FAULTS | SUBTLE).items()]
    kinds += [(f"noise 1, right if {hides}", FAULTS["noise 1"], hides) for hides in HIDES]
    for name, fault, hides in progress(kinds[:num_kinds], "faults"):
        for workers, parts in pools:
            fleets = (Fleet(data, workers, 0.02, seed, parts) for seed in range(seeds))
            each = [until(x, fault, most, 60, hides=hides) for x in fleets]
            found.setdefault(f"{workers} workers, {parts} parts", {})[name] = {
                "excluded": sum(x <= most for x in each) / seeds,
                "median": min(statistics.median(each), most),
            }
    return found


def measure_liars(count: int) -> dict[str, Any]:
    data, found = Data(), dict[str, Any]()
    for name, workers, faulty, how in (
        ("right when asked again", WORKERS, [0], {"hides": "again"}),
        ("two of six that agree", PAIR_OF, [0, 1], {"agree": True}),
    ):
        fleet, counts = warm(Fleet(data, workers, 0.02)), Counter[str]()
        for _ in range(count):
            counts += request(fleet, fault=FAULTS["noise 1"], faulty=faulty, **how)[0]
        found[name] = {x: counts[x] for x in ("wrong", "left", "charged")}
    return found


def measure_work(count: int) -> dict[str, Any]:
    """Return the work of honest requests, by the share of checked rows."""
    data = Data()
    fleets = {f"{share:g}": Fleet(data, WORKERS, share).settle() for share in SHARES}
    return {share: honest(x, [BATCH_SIZE] * count)["work"] for share, x in fleets.items()}


def measure_latency(count: int, requests: int) -> dict[str, Any]:
    fleet = warm(Fleet(Data(), WORKERS, 0.02))
    fleet.seconds.clear()
    honest(fleet, [BATCH_SIZE] * count)
    while_, after = (1e3 * statistics.median(x) for x in zip(*fleet.seconds, strict=True))
    found: dict[str, Any] = {"ms while workers compute": while_, "ms after": after}
    for name, (workers, parts, load) in POOLS.items():
        sizes = {"num_workers": workers, "num_parts": parts, "load": load}
        waiting = Waiting(estimate_after=3.0)
        policies = waiting, Verified(waiting, workers)
        plain, checked = (
            simulate(x, Conditions(), num_requests=requests, **sizes).latencies for x in policies
        )
        found[name] = float(checked.mean() - plain.mean())
    return {name: round(x, 3) for name, x in found.items()}


def measure_peers(count: int) -> dict[str, Any]:
    found = {}
    for copies, name in enumerate(("nothing", "everything twice", "everything three times"), 1):
        voters = Voters(Data(), copies)
        work = honest(voters, [BATCH_SIZE] * 20)["work"]
        found[name] = {"work": work, "faults": by_fault(voters, count)}
    return found


def measurements(quick: bool) -> Iterable[Measurement]:
    count = 6 if quick else 240
    yield ("honest",), functools.partial(measure_honest, 100 if quick else 20_000)
    for share in SHARES[1:2] if quick else SHARES:
        yield ("left", f"{share:g}"), functools.partial(measure_left, count, share)
    small = (count, 10) if quick else (600, 200)
    yield ("small",), functools.partial(measure_small, *small)
    wrong = (1, 20) if quick else (25, 2000)
    yield ("until",), functools.partial(measure_until, *wrong)
    how = (1, 5, EXCLUDING[:1], 3) if quick else (20, 200)
    yield ("excluded",), functools.partial(measure_excluded, *how)
    yield ("liars",), functools.partial(measure_liars, count)
    yield ("work",), functools.partial(measure_work, 20 if quick else 300)
    sizes = (20, 50) if quick else (300, 40_000)
    yield ("latency",), functools.partial(measure_latency, *sizes)
    yield ("peers",), functools.partial(measure_peers, count)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "workers": WORKERS, "rows": BATCH_SIZE}
