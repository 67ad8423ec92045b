"""The promises of a call, on scripts of events that hypothesis draws and shrinks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .. import CodedWrapper, NotEnoughResults, Report, Waiting
from .virtual import VirtualWorkers

ROWS = 32
INPUTS = torch.stack([torch.arange(ROWS), torch.arange(ROWS) / 7, torch.arange(ROWS).sin()], 1)

OK = ("ok", 1.0)
seconds = st.floats(0.1, 20.0) | st.just(1.0)
#: Acts of a worker that is honest: a part may be late, be lost, or be of another form.
acts = st.tuples(st.sampled_from(["ok", "ok", "ok", "die", "nan", "rows", "twice"]), seconds)
#: In the end, every worker computes.
scripts = st.lists(acts, max_size=4).map(lambda some: [*some, OK])
pools = st.lists(scripts, min_size=1, max_size=6)
drains = st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(0, 5)), max_size=2)
bad_rows = st.sets(st.integers(0, ROWS - 1), max_size=3)


def numbers(x: Tensor) -> list[int]:
    """Return the numbers of the rows of a part."""
    return x[:, 0].int().tolist()


class Exact(nn.Module):
    """Maps each row alone, with the same bits in every batch, and fails on rows."""

    def __init__(self, raising: Any = ()) -> None:
        super().__init__()
        self.raising = frozenset(raising)

    def forward(self, x: Tensor) -> Tensor:
        if not self.raising.isdisjoint(numbers(x)):
            raise ValueError("the module fails on a row")
        return torch.stack([x[:, 0] * 2 + x[:, 1], x[:, 2] - 1], 1)


EXACT = Exact()(INPUTS)


class CallTests:
    """The promises of calls by rows. Every implementation of a call must pass.

    Subclasses may override :meth:`make`.
    """

    def make(self, module: nn.Module, pool: VirtualWorkers, **options: Any) -> Any:
        """Return a wrapper of a module, whose ``run`` returns answers and a report."""
        return CodedWrapper(module, workers=pool, **options)

    def check(self, pool: VirtualWorkers, answers: Tensor, report: Report) -> None:
        """Check what every call that ended well promises."""
        estimated = report.estimated
        assert estimated is not None
        assert torch.equal(answers[~estimated], EXACT[~estimated])
        assert answers.isfinite().all()
        assert report.error_bounds is None or (report.error_bounds[~estimated] == 0).all()
        assert set(report.received) <= set(report.asked) <= {w for _, w, _ in pool.begun}
        assert report.work_ratio >= 1 - estimated.double().mean() - 1e-9
        self.check_workers(pool)

    def check_workers(self, pool: VirtualWorkers) -> None:
        assert all(worker not in part.avoid for _, worker, part in pool.begun)
        drained = {place: time for time, place in reversed(pool.drains)}
        assert all(time <= drained.get(worker, math.inf) for time, worker, _ in pool.begun)

    @given(pools, st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, 8))
    @settings(max_examples=100, deadline=None)
    def test_every_row_is_computed(self, scripts: Any, budget: float, parts: int) -> None:
        """Without a deadline nothing is estimated, whatever workers do that compute in the end."""
        pool = VirtualWorkers(scripts)
        waiting = Waiting(hedge_budget=budget)
        coded = self.make(Exact(), pool, parts=parts, waiting=waiting)
        try:
            answers, report = coded.run(INPUTS)
        except NotEnoughResults as error:  # by chance, workers ended at one row again and again
            held: Any = error
            missing = held.report.missing_rows
            assert missing
            assert missing == held.report.module_failed_rows
            others = [row for row in range(ROWS) if row not in missing]
            assert torch.equal(held.answers[others], EXACT[others])
            return
        assert not report.estimated.any()
        assert report.ended == "complete"
        self.check(pool, answers, report)

    @given(pools, drains, st.floats(0.5, 30.0), st.integers(1, 8), st.booleans())
    @example([[OK], [("ok", 2.0), OK], [("twice", 1.0), OK]], [], 2.0, 6, True)
    @settings(max_examples=100, deadline=None)
    def test_a_deadline_is_kept(
        self, scripts: Any, drains: Any, deadline: float, parts: int, estimate: bool
    ) -> None:
        """At its deadline a call answers or raises. It estimates only if that is allowed."""
        pool = VirtualWorkers(scripts, drains)
        waiting = Waiting(deadline=deadline, estimate=estimate)
        coded = self.make(Exact(), pool, parts=parts, waiting=waiting)
        error: Any = None
        try:
            answers, report = coded.run(INPUTS)
        except (NotEnoughResults, ValueError) as raised:  # a ValueError if no result has its form
            error = raised
        if error is None:
            assert estimate or not report.estimated.any()
            assert report.ended != "complete" or not report.estimated.any()
            self.check(pool, answers, report)
        else:
            known = torch.zeros(ROWS, dtype=torch.bool)
            if error.answers is not None:
                known = ~error.answers.isnan().any(1)
                assert torch.equal(error.answers[known], EXACT[known])
            assert error.report.missing_rows == tuple((~known).nonzero().flatten().tolist())
            # If rows may be estimated, half of the results are enough for answers. But the call
            # raises for a row that ended several workers, even if all others are computed.
            enough = ROWS
            if estimate and not error.report.module_failed_rows:
                enough = ROWS / 2
            assert known.sum() < enough
        self.check_workers(pool)
        assert pool.clock <= deadline + 1e-9

    @given(pools, bad_rows, bad_rows, st.integers(1, 8))
    @example([[OK]], set(), {0, 8, 16}, 1)  # three quarters of the part have such a row
    @settings(max_examples=100, deadline=None)
    def test_rows_on_which_the_module_fails(
        self, scripts: Any, raising: set[int], killing: set[int], parts: int
    ) -> None:
        """All other rows are computed, and the exception names the rows that nobody could."""
        honest = [[("ok", seconds) for _, seconds in script] for script in scripts]
        killing = killing - raising
        pool = VirtualWorkers(honest, kills=lambda x: not killing.isdisjoint(numbers(x)))
        coded = self.make(Exact(raising), pool, parts=parts, waiting=Waiting())
        if not raising | killing:
            answers, report = coded.run(INPUTS)
            return self.check(pool, answers, report)
        with pytest.raises((ValueError, NotEnoughResults)) as caught:
            coded.run(INPUTS)
        error: Any = caught.value
        assert set(error.report.missing_rows) == raising | killing
        good = sorted(set(range(ROWS)) - raising - killing)
        assert torch.equal(error.answers[good], EXACT[good])
        assert error.answers[sorted(raising | killing)].isnan().all()
        if raising and not killing:
            assert isinstance(error, ValueError)
            assert set(error.rows) == raising
        self.check_workers(pool)
        return None

    @given(pools, drains, st.integers(1, 8))
    @settings(max_examples=30, deadline=None)
    def test_the_same_events_give_the_same_bits(
        self, scripts: Any, drains: Any, parts: int
    ) -> None:
        def once() -> Any:
            pool = VirtualWorkers(scripts, drains)
            coded = self.make(Exact(), pool, parts=parts, waiting=Waiting(deadline=5.0))
            try:
                answers, report = coded.run(INPUTS)
            except (NotEnoughResults, ValueError) as error:
                return str(error), pool.clock, len(pool.begun)
            return answers.tolist(), report.hedges, pool.clock, len(pool.begun)

        assert once() == once()

    @given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 0.25]))
    @settings(max_examples=30, deadline=None)
    def test_hedges_keep_their_number(self, workers: int, parts: int, budget: float) -> None:
        """Where all workers are slow, a late part is hedged three times at most."""
        pool = VirtualWorkers([[("ok", 1.0)] * 50 + [("ok", 500.0)]] * workers)
        waiting = Waiting(hedge_budget=budget)
        coded = self.make(Exact(), pool, parts=parts, waiting=waiting)
        for _ in range(40):
            answers, report = coded.run(INPUTS)
            self.check(pool, answers, report)
            for row in range(ROWS):
                again = [hedge for hedge in report.hedges if row in hedge.units]
                assert len(again) <= (3 if budget else 0)

    @given(
        st.integers(4, 6),
        st.sampled_from(["lie", "die", "nan", "slow", "none"]),
        st.sampled_from([0.02, 0.25, 1.0]),
    )
    @settings(max_examples=60, deadline=None)
    def test_no_honest_worker_is_at_fault(self, workers: int, fault: str, share: float) -> None:
        """Whatever one faulty worker does, others have no fault, and verified rows are right."""
        script = {"slow": ("ok", 30.0), "none": ("ok", 1.0)}.get(fault, (fault, 1.0))
        scripts = [[script], *([("ok", 1.0 + place / 100)] for place in range(1, workers))]
        pool = VirtualWorkers(scripts)
        coded = self.make(Exact(), pool, verify=share, waiting=Waiting())
        for _ in range(3):
            answers, report = coded.run(INPUTS)
            assert {*report.wrong_results, *report.excluded} <= ({0} if fault == "lie" else set())
            right = (answers == EXACT).all(1)
            assert right[report.verified].all()
            assert right.all() or fault == "lie"
            assert right.all() or share < 1.0
            self.check_workers(pool)
