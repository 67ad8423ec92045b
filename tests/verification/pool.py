"""Workers that compute at once, and numbers as results."""

import math
import random
from collections import deque

from coded_torch.scheduling import Ask, Ended, Settled, Wait
from coded_torch.verification import Strikes, Trials

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


class Pool:
    """M workers; ``returned(worker, row, asked)`` is what one returns for a row.

    Args:
        asked: how often the worker was asked for parts in this call before.
    """

    def __init__(self, num_workers, share=0.02, seed=0, proven=True):
        self.random = random.Random(seed)
        self.strikes = Strikes(num_workers, share, generator=random.Random(seed + 1))
        if proven:
            self.prove()

    def prove(self):
        for worker in range(self.strikes.num_workers):
            self.strikes.passed([worker] * 30)

    def call(
        self,
        size,
        returned,
        odd=(),
        scores=None,
        lost=lambda worker, part: False,
        ended=COMPLETE,
        **options,
    ):
        """The trials of a call, and the answers by row."""
        order = self.random.sample(sorted(self.strikes.workers), len(self.strikes.workers))
        count = min(len(order), size)
        parts = [range(i * size // count, (i + 1) * size // count) for i in range(count)]
        trials = Trials(self.strikes)
        asked = trials.first(parts, idle=len(order))
        numbers = trials.results = Numbers(odd, scores)
        times = dict.fromkeys(order, 0)

        def compute(part, rows, worker):
            numbers.by_part[part] = {row: returned(worker, row, times[worker]) for row in rows}
            times[worker] += 1

        replies = [(part, order[part % len(order)]) for part in range(len(asked))]
        for part, worker in replies:
            compute(part, asked[part], worker)
        self.random.shuffle(replies)
        policy = trials.decisions(asked, replies, ended, **options)
        events, event = deque(), None
        self.first = {row: part for part, _ in reversed(replies) for row in asked[part]}
        self.waits = []  # how long was waited in vain
        while True:
            try:
                decision = policy.send(event)
            except StopIteration:
                break
            event = None
            if isinstance(decision, Ask):
                first = len(trials.asked) - len(decision.parts)
                for part, (rows, avoid) in enumerate(zip(*decision, strict=True), first):
                    able = sorted(self.strikes.workers - avoid)
                    worker = self.random.choice(able) if able else -1
                    if able and lost(worker, part):
                        continue
                    if able:
                        compute(part, rows, worker)
                    events.append(Settled(part, 0.0, 0.0, bool(able), worker=worker))
            elif isinstance(decision, Wait) and events:
                event = events.popleft()
            elif isinstance(decision, Wait):
                self.waits.append(decision.until)
        answers = {row: numbers.by_part[part][row] for row, part in trials.answers.items()}
        self.work = sum(map(len, trials.asked)) / size
        self.trials = trials
        return trials, answers
