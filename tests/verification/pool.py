"""Workers that compute at once, and numbers as results."""

import math
import random
from collections import Counter, deque
from types import SimpleNamespace

from coded_torch.scheduling import Ask, Ended, Settled, Wait
from coded_torch.verification import Record, Trials

COMPLETE = Ended("complete")


class Numbers:
    """The results of a call: one number a row; odd rows are named by the test."""

    tolerance = 1e-3

    def __init__(self, odd=(), scores=None):
        self.by_part = {}
        self._odd, self._scores = odd, scores or {}

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

    def __init__(self, ended=COMPLETE, bounded=False):
        self.ended, self.deadline = ended, 1.0 if bounded else None

    def decide(self, history, first, **options):
        yield Ask(tuple(map(tuple, first)))
        for _ in first:
            yield Wait(math.inf)
        return self.ended


def record(num_workers, share=0.02, seed=0):
    return Record(SimpleNamespace(places=range(num_workers)), share, random.Random(seed))


class Pool:
    """M workers; ``returned(worker, row, asked)`` is what one returns for a row.

    Args:
        asked: how often the worker was asked for parts in this call before.
    """

    def __init__(self, num_workers, share=0.02, seed=0, proven=True):
        self.random = random.Random(seed)
        self.record = record(num_workers, share, seed + 1)
        if proven:
            self.prove()

    def prove(self):
        self.record.passed([*self.record.everyone] * 30)

    def call(
        self,
        size,
        returned,
        odd=(),
        scores=None,
        lost=lambda worker, part: False,
        ended=COMPLETE,
        bounded=False,
    ):
        """The trials of a call, and the answers by row."""
        order = self.random.sample(sorted(self.record.workers), len(self.record.workers))
        count = min(len(order), size)
        parts = [range(i * size // count, (i + 1) * size // count) for i in range(count)]
        trials, numbers = Trials(self.record, Settling(ended, bounded)), Numbers(odd, scores)
        trials.prepare = lambda: setattr(trials, "results", numbers)
        policy = trials.decide(None, parts, idle=lambda: len(order))
        events, event, times = deque(), None, Counter()
        self.waits = []  # how long was waited in vain
        while True:
            try:
                decision = policy.send(event)
            except StopIteration:
                break
            event = None
            if isinstance(decision, Ask):
                first = len(trials.asked) - len(decision.parts)
                for part, rows in enumerate(decision.parts, first):
                    worker = order[part % len(order)]
                    if first:
                        able = sorted(self.record.workers - decision.avoid[part - first])
                        worker = self.random.choice(able) if able else -1
                        if able and lost(worker, part):
                            continue
                    if worker >= 0:
                        asked = times[worker]
                        numbers.by_part[part] = {r: returned(worker, r, asked) for r in rows}
                        times[worker] += 1
                    events.append(Settled(part, 0.0, 0.0, worker >= 0, worker=worker))
                if not first:
                    self.random.shuffle(events)
                    replies = [event.part for event in reversed(events)]
                    self.first = {row: part for part in replies for row in trials.asked[part]}
            elif isinstance(decision, Wait) and events:
                event = events.popleft()
            elif isinstance(decision, Wait):
                self.waits.append(decision.until)
        answers = {row: numbers.by_part[part][row] for row, part in trials.answers.items()}
        self.work = sum(map(len, trials.asked)) / size
        self.trials = trials
        return trials, answers
