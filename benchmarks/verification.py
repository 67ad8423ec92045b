"""Wrong answers that reach the caller, and what finding them costs.

Workers compute at once here, and one of them returns wrong results: whole parts (noise of a share
of the outputs' spread, results of other inputs, the two largest outputs swapped), one row that
answers another, a block of outputs in all rows, or one number (of another row, or with a bit of its
exponent or mantissa flipped). LeNet-5 answers the 2,000 digits that ship.

- *left*: the share of wrong rows that reach the caller in a request in which the worker is wrong.
- *until*: requests until the worker is excluded, if it is wrong in every one, or in some.
- *honest*: charges, disputes and work of 20,000 requests in which nobody is wrong.
- *small*: *left* of a row that answers another in batches of 8 rows, by odd scores alone.
- *modules*: charges and notes, if honest results of a module or pool differ.
- *liars*: two workers that collude, and one that is right whenever it is asked again.
- *latency*: simulated, with and without.
- *work*: of honest requests, by the share of checked rows.
- *peers*: *left* and *work* if all parts are computed once, twice (and by a third worker where two
  results differ), or three times, and a majority decides.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_torch.scheduling.protocol import Ask, Event, Settled, Wait
from coded_torch.scheduling.simulation import Conditions, simulate
from coded_torch.scheduling.waiting import Waiting
from coded_torch.verification import Results, Scores, Strikes, Trials, Verdict, draw
from coded_torch.verification.simulated import Verified
from coded_torch.workers import attacks

from .runs import Measurement, progress
from .subjects import SEED, run, subject

WORKERS, BATCH_SIZE = 24, 240
SHARES = (0.01, 0.02, 0.03, 0.1)
SIZES = (8, 24, 64, 240)
ROUNDING = 2.5e-6  # of the outputs' spread, by which honest results differ
#: Returns the outputs of some rows by a worker, and whether it has been asked before in this call.
Compute = Callable[[int, Sequence[int], bool], Tensor]


class Outcome(NamedTuple):
    """What became of one call.

    Attributes:
        answers: ``[B, C]``, NaN where none is left.
        verdict: of the verification.
        computed: rows.
        first: by row, the worker that computed it first.
    """

    answers: Tensor
    verdict: Verdict
    computed: int
    first: dict[int, int]


class Fleet:
    """Workers that compute at once, whoever is asked.

    Args:
        num_workers: M, which is the number of parts, too.
        share: of the rows that are checked.
        seed: of all that is drawn.
    """

    def __init__(self, num_workers: int, share: float, seed: int = SEED) -> None:
        self.random = random.Random(seed)
        self.strikes = Strikes(num_workers, share, random.Random(seed + 1))
        self.scores = Scores()

    def settle(self) -> Fleet:
        """Take all workers for proven, with no strikes."""
        strikes = self.strikes
        strikes.renew(range(strikes.num_workers))
        for worker in range(strikes.num_workers):
            for _ in range(30):
                strikes.passed(worker)
        return self

    def call(self, size: int, compute: Compute, inputs: Sequence[Tensor] = ()) -> Outcome:
        """Answer a batch of ``size`` rows; without inputs, nothing is scored."""
        self.strikes.count_call()
        order = self.random.sample(sorted(self.strikes.workers), len(self.strikes.workers))
        count = min(len(order), size)
        parts = [range(i * size // count, (i + 1) * size // count) for i in range(count)]
        drawn = draw(parts, self.strikes, idle=len(order))
        results = Results(size, self.scores, self.scores.fit(inputs))
        replies = [(part, order[part % len(order)]) for part in range(len(drawn.parts))]
        for part, worker in replies:
            results.add(part, drawn.parts[part], [compute(worker, drawn.parts[part], False)])
        self.random.shuffle(replies)
        trials = Trials(self.strikes, results, drawn.parts, replies, drawn)
        verdict = self._drive(trials, results, compute)
        results.conclude(verdict, inputs, trials.worker)
        answers = results.outputs(verdict.answers)
        first = {row: trials.worker[part] for row, part in trials.first.items()}
        return Outcome(answers, verdict, sum(map(len, trials.asked)), first)

    def _drive(self, trials: Trials, results: Results, compute: Compute) -> Verdict:
        policy, events, event = trials.decisions(), deque[Event](), None
        while True:
            try:
                decision = policy.send(event)
            except StopIteration as stop:
                return stop.value
            event = None
            if isinstance(decision, Ask):
                first = len(trials.asked) - len(decision.parts)
                asked = zip(decision.parts, decision.avoid, strict=True)
                for part, (rows, avoid) in enumerate(asked, first):
                    able = sorted(self.strikes.workers - avoid)
                    worker = self.random.choice(able) if able else -1
                    if able:
                        results.add(part, rows, [compute(worker, rows, True)])
                    events.append(Settled(part, 0.0, 0.0, bool(able), worker=worker))
            elif isinstance(decision, Wait) and events:
                event = events.popleft()


class Voters:
    """Workers that compute every part several times; a majority decides, row by row.

    If two results of a part differ, a third worker computes it.

    Args:
        num_workers: M, which is the number of parts, too.
        copies: the number of workers that compute each part: 1, 2 or 3.
        tolerance: up to which results are alike.
    """

    def __init__(self, num_workers: int, copies: int, tolerance: float) -> None:
        self.num_workers, self.copies, self.tolerance = num_workers, copies, tolerance
        self.random = random.Random(SEED)

    def settle(self) -> None:
        """Do nothing: no worker has a record."""

    def call(self, size: int, compute: Compute, inputs: Sequence[Tensor] = ()) -> Outcome:
        """Answer a batch of ``size`` rows, a multiple of M."""
        order = self.random.sample(range(self.num_workers), self.num_workers)
        answers, computed, step = list[Tensor](), 0, size // self.num_workers
        for part in range(self.num_workers):
            rows = range(part * step, (part + 1) * step)
            workers = [order[(part + copy) % self.num_workers] for copy in range(3)]
            results = [compute(w, rows, n > 0) for n, w in enumerate(workers[: self.copies])]
            if self.copies == 2 and not self._alike(*results).all():
                results.append(compute(workers[2], rows, True))
            computed += len(rows) * len(results)
            answers.append(self._elected(results))
        return Outcome(torch.cat(answers), Verdict(), computed, {})

    def _elected(self, results: Sequence[Tensor]) -> Tensor:
        """Return the first result, but where the other two are alike and differ from it."""
        if len(results) < 3:
            return results[0]
        first, second, third = results
        outvoted = self._alike(second, third) & ~self._alike(first, second)
        return torch.where((outvoted & ~self._alike(first, third)).unsqueeze(1), second, first)

    def _alike(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().amax(1) <= self.tolerance


class Data:
    """Inputs, and what the module returns for them.

    Attributes:
        inputs: ``[n, ...]``.
        outputs: ``[n, C]``.
        spread: of the outputs.
    """

    def __init__(self, seed: int = SEED) -> None:
        digits = subject("lenet5", quick=True)
        self.inputs = torch.cat([digits.tuning.images, digits.held_out.images])
        self.outputs = run(digits.model, self.inputs)
        self.spread = float(self.outputs.std())
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        return torch.randint(len(self.inputs), (size,), generator=self.generator)

    def normal(self, rows: Tensor, size: float) -> Tensor:
        return rows + size * self.spread * torch.randn(rows.shape, generator=self.generator)

    def other(self, count: int) -> Tensor:
        return self.outputs[self.batch(count)]


#: What a worker returns instead of rows ``[n, C]``.
Fault = Callable[[Data, Tensor], Tensor]


def _noise(size: float) -> Fault:
    return lambda data, rows: data.normal(rows, size)


def _mixing(shape: Callable[..., Tensor]) -> Fault:
    """Take the other rows from the answers to other inputs."""
    return lambda data, rows: shape(rows, lambda at: data.other(len(at)), data.generator)


def _bit(low: int, high: int) -> Fault:
    return lambda data, rows: attacks.one_bit(rows, low, high, data.generator)


FAULTS: dict[str, Fault] = {
    "noise 1": _noise(1),
    "noise .3": _noise(0.3),
    "noise .1": _noise(0.1),
    "noise .05": _noise(0.05),
    "replay": lambda data, rows: data.other(len(rows)),
    "swap": lambda data, rows: attacks.swap(rows),
    "block": _mixing(attacks.block),
    "one row": _mixing(attacks.one_row),
    "one output": _mixing(attacks.one_output),
    "exponent": _bit(*attacks.EXPONENT),
    "mantissa": _bit(*attacks.MANTISSA),
}
POOLED = ("noise 1", "noise .05", "replay", "swap")  # the whole-part faults that bars name


def honest(
    data: Data, fleet: Fleet | Voters, sizes: Iterable[int], *, score: bool = True
) -> dict[str, float]:
    """Requests in which nobody is wrong."""
    found: Counter[str] = Counter()
    for size in sizes:
        at = data.batch(size)
        call = fleet.call(
            size,
            lambda worker, rows, again, at=at: data.normal(
                data.outputs[at[list(rows)]], ROUNDING / 4
            ),
            [data.inputs[at]] if score else [],
        )
        verdict = call.verdict
        found.update(requests=1, rows=size, computed=call.computed, disputes=verdict.disputes)
        found.update(charges=sum(verdict.strikes.values()), verified=len(verdict.verified))
    return {**found, "work": found["computed"] / found["rows"]}


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
        found.update(found=worker in call.verdict.strikes)
        found.update(false_charges=len(call.verdict.strikes.keys() - {worker}))
    return dict(found)


def _noting(compute: Compute, wrong: list[Tensor], worker: int, truth: Tensor) -> Compute:
    """The same, and what the worker returned first for the rows, NaN for others."""
    wrong.append(torch.full_like(truth, float("nan")))

    def noting(by: int, rows: Sequence[int], again: bool) -> Tensor:
        returned = compute(by, rows, again)
        if by == worker and not again:
            wrong[0][list(rows)] = returned
        return returned

    return noting


def _compared(data: Data, call: Outcome, truth: Tensor, wrong: list[Tensor]) -> dict[str, int]:
    """Count wrong rows, those that reach the caller, and of both those that do harm."""

    def off(answers: Tensor) -> tuple[Tensor, Tensor]:
        by = (answers - truth).abs() / data.spread
        harmful = (answers.argmax(1) != truth.argmax(1)) | (by.square().mean(1).sqrt() > 0.1)
        return by.amax(1) > 1e-3, harmful & answers.isfinite().all(1)

    made, harm = off(wrong[0])
    stays, harms = off(call.answers)
    counted = {"wrong": made, "harmful": harm, "left": stays, "harmful left": harms}
    return {name: int(rows.sum()) for name, rows in counted.items()}


def until(data: Data, fault: Fault, share: float, rate: float, seed: int, most: int = 2000) -> int:
    """Requests until a worker that is wrong in a share of its parts is excluded."""
    fleet = Fleet(WORKERS, share, seed).settle()
    for number in range(1, most + 1):
        at = data.batch(BATCH_SIZE)

        def compute(by: int, rows: Sequence[int], again: bool, at: Tensor = at) -> Tensor:
            right = data.outputs[at[list(rows)]]
            return fault(data, right) if by == 0 and fleet.random.random() < rate else right

        verdict = fleet.call(BATCH_SIZE, compute, [data.inputs[at]]).verdict
        assert verdict.excluded in ((), (0,)), verdict
        if verdict.excluded:
            return number
    return most


def _quantised(data: Data, right: Tensor, worker: int) -> Tensor:
    """As by dynamic quantisation: the scale is of the rows that are computed together."""
    scale = right.abs().max() / 31
    return (right / scale).round() * scale


def _dropout(data: Data, right: Tensor, worker: int) -> Tensor:
    return data.normal(right, 0.3)


def _random_rows(data: Data, right: Tensor, worker: int) -> Tensor:
    lucky = torch.rand(len(right), 1, generator=data.generator) < 0.01
    return torch.where(lucky, data.normal(right, 0.3), right)


def _mixed(data: Data, right: Tensor, worker: int) -> Tensor:
    return right + (worker % 2) * 0.01 * data.spread * (right * 1e3).sin()


#: Honest results that differ from those of another worker.
MODULES = {
    "int8": _quantised,
    "dropout": _dropout,
    "1 in 100 rows random": _random_rows,
    "mixed hardware": _mixed,
}


def _pair(data: Data, right: Tensor, worker: int) -> Tensor:
    return right.roll(1, -1) if worker < 2 else right


def _liar(data: Data, right: Tensor, worker: int) -> Tensor:
    return data.normal(right, 1) if worker == 0 else right


def requests(
    data: Data, fleet: Fleet, returned: Callable[..., Tensor], count: int, *, relent: bool = False
) -> dict[str, Any]:
    """Requests in which workers return what they do; ``relent``: only when they are asked first."""
    strikes: Counter[int] = Counter()
    excluded: list[int] = []
    notes: dict[str, int] = {}
    wrong = disputes = 0
    for number in range(count):
        at = data.batch(BATCH_SIZE)
        truth = data.outputs[at]

        def compute(worker: int, rows: Sequence[int], again: bool, truth: Tensor = truth) -> Tensor:
            right = truth[list(rows)]
            return right if again and relent else returned(data, right, worker)

        call = fleet.call(BATCH_SIZE, compute, [data.inputs[at]])
        strikes.update(call.verdict.strikes)
        excluded += call.verdict.excluded
        disputes += call.verdict.disputes
        for note in call.verdict.notes:
            notes.setdefault(note, number)
        wrong += int(((call.answers - truth).abs().amax(1) > 1e-3 * data.spread).sum())
    return {
        "strikes": dict(sorted(strikes.items())),
        "excluded": excluded,
        "disputes": disputes,
        "wrong rows left": wrong,
        "notes": notes,
    }


def _left_by_fault(data: Data, fleet: Fleet | Voters, count: int) -> dict[str, Any]:
    faults = progress(FAULTS.items(), "faults")
    found = {name: left(data, fleet, fault, count, BATCH_SIZE) for name, fault in faults}
    for x in found.values():
        x["share left"] = x["left"] / max(1, x["wrong"])
    return found


def measure_left(quick: bool, share: float) -> dict[str, Any]:
    data, fleet, count = Data(), Fleet(WORKERS, share), 24 if quick else 240
    honest(data, fleet, [BATCH_SIZE] * 40)
    found = _left_by_fault(data, fleet, count)
    pooled = [found[name] for name in POOLED]
    harmful, stays = (sum(x[key] for x in pooled) for key in ("harmful", "harmful left"))
    return {"faults": found, "harmful rows of whole parts left": stays / max(1, harmful)}


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


def measure_honest(quick: bool) -> dict[str, Any]:
    drawn, fleet = random.Random(SEED), Fleet(WORKERS, 0.02)
    count = 200 if quick else 20_000
    return honest(Data(), fleet, progress(drawn.choices(SIZES, k=count), "requests"))


def measure_work(quick: bool) -> dict[str, Any]:
    """The work of honest requests, by the share of checked rows."""
    data, sizes = Data(), [BATCH_SIZE] * (20 if quick else 300)
    fleets = {f"{share:g}": Fleet(WORKERS, share).settle() for share in SHARES}
    return {share: honest(data, fleet, sizes)["work"] for share, fleet in fleets.items()}


def measure_peers(quick: bool) -> dict[str, Any]:
    found, count = {}, 24 if quick else 240
    for copies, name in enumerate(("nothing", "everything twice", "everything three times"), 1):
        data = Data()
        voters = Voters(WORKERS, copies, 1e-3 * data.spread)
        work = honest(data, voters, [BATCH_SIZE] * 20)["work"]
        found[name] = {"work": work, "faults": _left_by_fault(data, voters, count)}
    return found


def measure_small(quick: bool) -> dict[str, Any]:
    """Batches of eight rows beside earlier rows, nothing drawn at random."""
    data, fleet = Data(), Fleet(WORKERS, 0.02).settle()
    honest(data, fleet, [8] * (100 if quick else 1000))
    fleet.strikes.share = 0.0
    found: Counter[str] = Counter()
    for _ in range(3 if quick else 25):
        # Faults are rare: where they are not, those that were missed make the bars higher.
        honest(data, fleet, [8] * 200)
        found.update(left(data, fleet, FAULTS["one row"], WORKERS, 8))
    return {**found, "share left": found["left"] / max(1, found["wrong"])}


def measure_modules(quick: bool) -> dict[str, Any]:
    data, count = Data(), 10 if quick else 300
    return {
        name: [requests(data, Fleet(WORKERS, 0.02, seed), module, count) for seed in range(4)]
        for name, module in MODULES.items()
    }


def measure_liars(quick: bool) -> dict[str, Any]:
    data, seeds = Data(), range(2 if quick else 20)
    pairs = [requests(data, Fleet(6, 0.02, seed).settle(), _pair, 30) for seed in seeds]
    relenting = []
    for seed in seeds:
        fleet = Fleet(WORKERS, 0.02, seed).settle()
        honest(data, fleet, [BATCH_SIZE] * 40)
        relenting.append(requests(data, fleet, _liar, 30, relent=True))
    return {"a colluding pair among six": pairs, "right when asked again": relenting}


def measure_latency(quick: bool) -> dict[str, Any]:
    """Simulated latencies with and without verification, in medians of a part."""
    found: dict[str, Any] = {}
    for name, conditions in (("calm", Conditions()), ("3 %", Conditions(straggling=0.03))):
        for workers, parts in ((24, 20), (24, 24), (6, 4)):
            policies = {"without": Waiting(), "with": Verified(Waiting(), workers)}
            outcomes = {
                how: simulate(
                    policy,
                    conditions,
                    num_workers=workers,
                    num_parts=parts,
                    num_requests=200 if quick else 10_000,
                )
                for how, policy in policies.items()
            }
            found[f"{name}, {workers} / {parts}"] = {
                how: {"mean": x.latencies.mean(), "p99": x.percentile(99), "work": x.work}
                for how, x in outcomes.items()
            }
    return found


def measurements(quick: bool) -> Iterable[Measurement]:
    for share in SHARES:
        yield ("left", f"{share:g}"), functools.partial(measure_left, quick, share)
    yield ("until",), functools.partial(measure_until, quick)
    yield ("honest",), functools.partial(measure_honest, quick)
    yield ("work",), functools.partial(measure_work, quick)
    yield ("peers",), functools.partial(measure_peers, quick)
    yield ("small",), functools.partial(measure_small, quick)
    yield ("modules",), functools.partial(measure_modules, quick)
    yield ("liars",), functools.partial(measure_liars, quick)
    yield ("latency",), functools.partial(measure_latency, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "workers": WORKERS, "rows": BATCH_SIZE}
