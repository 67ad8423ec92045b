"""Workers that compute at once, and numbers as results."""

import math
import random
from collections import Counter, deque
from types import SimpleNamespace

from coded_torch.table import Table
from coded_torch.verification import Strikes, Trials
from coded_torch.workers import Reply, WorkerError


class Numbers:
    """The results of a call: one number a row; odd rows are named by the test."""

    tolerance = 1e-3

    def __init__(self, odd=(), scores=None):
        self.by_part = {}
        self._odd, self._scores = odd, scores or {}

    def add(self, part, rows, leaves):
        """The tests write numbers when a worker computes them."""

    def differences(self, pairs):
        return [self._of(*pair) for pair in pairs]

    def _of(self, part, other):
        mine, its = self.by_part[part], self.by_part[other]
        by = {row: abs(mine[row] - its[row]) for row in mine if row in its}
        return {row: math.inf if math.isnan(x) else x for row, x in by.items()}

    def odd(self, answers):
        return {row for row in self._odd if row in answers}

    def scores(self, answers):
        return self._scores

    def conclude(self, trials):
        pass


class Settling:
    """A waiting policy that asks once, waits for all, and has ended as a test says."""

    def __init__(self, reason="complete", bounded=False, threshold=math.inf, deadline=math.inf):
        self.reason, self.deadline = reason, 1.0 if bounded else None
        self.found = {"hedging_threshold": threshold, "deadline": deadline}

    def decide(self, history, table):
        if not table.parts:
            for units in table.first:
                table.ask(units)
        if not table.open or (table.is_quiet and table.ended):
            vars(table).update(self.found, reason=self.reason)
        return math.inf


def record(num_workers, share=0.02, seed=0):
    return Strikes(SimpleNamespace(places=range(num_workers)), share, random.Random(seed))


class Pool:
    """M workers; ``returned(worker, row, asked)`` is what one returns for a row.

    Args:
        asked: how often the worker was asked for parts in this call before.
    """

    def __init__(self, num_workers, share=0.02, seed=0, proven=True):
        self.random = random.Random(seed)
        self.strikes = record(num_workers, share, seed + 1)
        if proven:
            self.prove()

    def prove(self):
        self.strikes.passed([*self.strikes.everyone] * 30)

    def call(
        self,
        size,
        returned,
        odd=(),
        scores=None,
        lost=lambda worker, part: False,
        **ended,
    ):
        """The trials of a call, and the answers by row."""
        order = self.random.sample(sorted(self.strikes.workers), len(self.strikes.workers))
        count = min(len(order), size)
        parts = [range(i * size // count, (i + 1) * size // count) for i in range(count)]
        trials, numbers = Trials(self.strikes, Settling(**ended)), Numbers(odd, scores)
        trials.prepare = lambda: setattr(trials, "results", numbers)
        table = Table(first=parts, needed=size, idle=lambda: len(order))
        events, times, asked = deque(), Counter(), 0
        self.waits, self.first = [], {}  # how long was waited in vain; the first answers
        while True:
            until = trials.decide(None, table)
            if table.reason:
                break
            new, is_first = table.parts[asked:], not asked
            asked = len(table.parts)
            for part in new:
                worker = order[part.number % len(order)]
                if not is_first:
                    able = sorted(self.strikes.workers - part.avoid)
                    worker = self.random.choice(able) if able else -1
                    if able and lost(worker, part.number):
                        continue
                error = WorkerError(part.number, -1, "has no worker") if worker < 0 else None
                if error is None:
                    rows, many = part.units, times[worker]
                    numbers.by_part[part.number] = {r: returned(worker, r, many) for r in rows}
                    times[worker] += 1
                events.append(Reply(part, worker, 0.0, 0.0, error=error))
            if is_first:
                self.random.shuffle(events)
            if events and until > -math.inf:
                table.hear([events.popleft()])
                if len(table.ended) == len(table.first):
                    self.first = dict(table.answered)
            else:
                self.waits.append(until)
                table.hear([], until)
        answers = {row: numbers.by_part[part][row] for row, part in trials.answers.items()}
        self.work = sum(len(part.units) for part in table.parts) / size
        self.trials = trials
        return trials, answers
