"""Wrong results by name, ``FAULTS``, and workers that return them, to measure verification."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coded_torch._table import Table
from coded_torch.verification._record import Record
from coded_torch.verification._verifier import Verifier
from coded_torch.workers import Reply, WorkerError

from .networks import SEED
from .subjects import run, subject

WORKERS, BATCH_SIZE = 24, 240
#: The difference between honest results, in spreads of the outputs.
ROUNDING = 2.5e-6
#: Bits of a float32. The lowest twelve are left out, as honest results differ in them.
EXPONENT, MANTISSA = (23, 31), (12, 23)
#: Returns the outputs of some rows by a worker, and whether it has been asked before in this call.
Compute = Callable[[int, Sequence[int], bool], Tensor]


class Outcome(NamedTuple):
    """The answers of a call, ``[B, C]``, NaN where there is none; and how many rows it computed."""

    answers: Tensor
    verdict: Verifier
    computed: int


class _All:
    """A waiting policy that asks once, and waits for all."""

    def decide(self, history: Any, table: Table) -> float:
        if not table.parts:
            for units in table.first:
                table.ask(units)
        for part in [part for part in table.parts if part.failed and not part.replaced]:
            part.replaced = True
            if missing := table.missing(part):
                table.ask(missing, part, "retry", {part.worker})
        table.reason = "" if table.open else "complete"
        return math.inf


class Fleet:
    """A pool with as many parts as workers, or fewer, which computes as soon as it is asked.

    A share of the rows is checked. ``seconds`` has, for each call, the time until the first wait,
    and after the last result of a first part.
    """

    def __init__(
        self, data: Data, num_workers: int, share: float, seed: int = SEED, parts: int = 0
    ) -> None:
        self.data, self.random, self._parts = data, random.Random(seed), parts or num_workers
        self.seconds: list[tuple[float, float]] = []
        pool = SimpleNamespace(places=range(num_workers), exclude=None, mixed=False, simulated=True)
        self.record = Record(pool, share, random.Random(seed + 1))

    def settle(self) -> Fleet:
        """Take all workers for proven, with no faults."""
        record = self.record
        record.renew(record.everyone)
        record.passed(*[dict.fromkeys(record.everyone, 30)] * 2)
        return self

    def call(self, at: Tensor, compute: Compute) -> Outcome:
        """Answer the inputs at some places of the data."""
        size, inputs = len(at), [self.data.inputs[at]]
        order = self.random.sample(sorted(self.record.workers), len(self.record.workers))
        count = min(len(order), size, self._parts)
        parts = [range(i * size // count, (i + 1) * size // count) for i in range(count)]
        waiting, verifier, values = _All(), Verifier(self.record, inputs), dict[int, Tensor]()
        table = Table(first=parts, needed=size, idle=lambda: len(order))
        verifier.begin(table)
        events, asked = deque[Reply](), 0
        begin, first_wait = time.perf_counter(), 0.0
        while True:
            until = min(policy.decide(None, table) for policy in (waiting, verifier))
            if table.end:
                break
            for part in table.parts[asked:]:
                worker = order[part.number % len(order)]
                if asked:
                    able = sorted(self.record.workers - part.avoid)
                    worker = self.random.choice(able) if able else -1
                error = WorkerError(part.number, -1, "has no worker") if worker < 0 else None
                if worker >= 0:
                    value = values[part.number] = compute(worker, part.units, asked > 0)
                    part.result = SimpleNamespace(divided=[0], rows=lambda i, value=value: value)
                events.append(Reply(part, worker, 0.0, 0.0, part.result, error))
            if not asked:
                self.random.shuffle(events)
            asked = len(table.parts)
            if until == -math.inf:
                table.hear([], until)
                continue
            first_wait = first_wait or time.perf_counter() - begin
            if events and len(table.ended) < len(table.first):
                begin = time.perf_counter()  # of the last one, in the end
            table.hear([events.popleft()] if events else [], until)
        self.seconds.append((first_wait, time.perf_counter() - begin))
        answers = torch.full((size, *values[0].shape[1:]), math.nan)
        for row, part in table.answered.items():
            answers[row] = values[part.number][part.units.index(row)]
        return Outcome(answers, verifier, sum(len(part.units) for part in table.parts))


class Voters:
    """A pool in which one, two or three workers compute each part, and a majority decides by row.

    If two results differ, a third worker computes the part.
    """

    def __init__(self, data: Data, copies: int) -> None:
        self.data, self.copies, self.tolerance = data, copies, 1e-3 * data.spread
        self.random = random.Random(SEED)

    def settle(self) -> None:
        """Do nothing: no worker has a record."""

    def call(self, at: Tensor, compute: Compute) -> Outcome:
        """Answer the inputs at some places of the data, a multiple of M."""
        order = self.random.sample(range(WORKERS), WORKERS)
        answers, computed, step = list[Tensor](), 0, len(at) // WORKERS
        for part in range(WORKERS):
            rows = range(part * step, (part + 1) * step)
            workers = [order[(part + copy) % WORKERS] for copy in range(3)]
            results = [compute(w, rows, n > 0) for n, w in enumerate(workers[: self.copies])]
            if self.copies == 2 and not self._alike(*results).all():
                results.append(compute(workers[2], rows, True))
            computed += len(rows) * len(results)
            answers.append(self._elected(results))
        return Outcome(torch.cat(answers), Verifier(Record(None, 0.0)), computed)

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
    """The inputs ``[n, ...]``, the module, its outputs ``[n, C]`` and their deviation."""

    def __init__(self, seed: int = SEED) -> None:
        digits = subject("lenet5", quick=True)
        self.inputs = torch.cat([digits.tuning.images, digits.held_out.images])
        self.model = digits.model
        self.outputs = run(self.model, self.inputs)
        self.spread = float(self.outputs.std())
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        return torch.randint(len(self.inputs), (size,), generator=self.generator)

    def place(self, below: int) -> Tensor:
        return torch.randint(below, (1,), generator=self.generator)

    def normal(self, rows: Tensor, size: float) -> Tensor:
        return rows + size * self.spread * torch.randn(rows.shape, generator=self.generator)

    def other(self, rows: Tensor) -> Tensor:
        """Return as many answers to other inputs."""
        return self.outputs[self.batch(len(rows))]


#: Maps right rows, ``[n, C]``, to the wrong rows that a worker returns.
Fault = Callable[[Data, Tensor], Tensor]


def swap(data: Data, rows: Tensor) -> Tensor:
    """Swap the two largest outputs of each row."""
    top = rows.topk(2).indices
    return rows.scatter(-1, top, rows.gather(-1, top.flip(-1)))


def one_row(data: Data, rows: Tensor) -> Tensor:
    """Replace one row by another one."""
    rows, at = rows.clone(), data.place(len(rows))
    rows[at] = data.other(at)
    return rows


def block(data: Data, rows: Tensor) -> Tensor:
    """Replace a quarter of the outputs of all rows by the outputs of other rows."""
    rows, width = rows.clone(), rows.shape[1] // 4
    at = int(data.place(rows.shape[1] - width + 1))
    rows[:, at : at + width] = data.other(rows)[:, at : at + width]
    return rows


def one_output(data: Data, rows: Tensor) -> Tensor:
    """Replace one number by the number of another row."""
    rows, column, at = rows.clone(), data.place(rows.shape[1]), data.place(len(rows))
    rows[at, column] = data.other(at)[0, column]
    return rows


def one_bit(data: Data, rows: Tensor, low: int, high: int) -> Tensor:
    """Flip a drawn bit of one number. If it is then not finite, it becomes 0."""
    rows, column, at = rows.clone(), data.place(rows.shape[1]), data.place(len(rows))
    bit = int((1 << (low + data.place(high - low))).to(torch.int32))  # the last one: < 0
    flipped = (rows[at, column].view(torch.int32) ^ bit).view(torch.float32)
    fits = flipped.abs() < torch.finfo(rows.dtype).max  # NaN fails, too
    rows[at, column] = torch.where(fits, flipped, 0.0)
    return rows


def _noise(size: float) -> Fault:
    return lambda data, rows: data.normal(rows, size)


def _bit(low: int, high: int) -> Fault:
    return lambda data, rows: one_bit(data, rows, low, high)


FAULTS: dict[str, Fault] = {
    "noise 1": _noise(1),
    "noise .3": _noise(0.3),
    "noise .1": _noise(0.1),
    "noise .05": _noise(0.05),
    "replay": Data.other,
    "swap": swap,
    "block": block,
    "one row": one_row,
    "one output": one_output,
    "exponent": _bit(*EXPONENT),
    "mantissa": _bit(*MANTISSA),
}
#: Further ones: of rows of outputs by 1.01, and of parts of 60 rows in 6 or 24 parts, or one more.
SUBTLE: dict[str, Fault] = {
    "scaled": lambda data, rows: 1.01 * rows,
    "of one size": lambda data, rows: (
        data.normal(rows, 1.0) if len(rows) in (2, 3, 10, 11) else rows
    ),
}
