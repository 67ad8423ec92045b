"""Which rows are computed again, who is right, and whose result counts."""

import itertools
import math
from collections import Counter

import pytest

from coded_torch.table import Table
from coded_torch.verification import Trials
from coded_torch.workers import Reply, WorkerError

from .pool import Numbers, Pool, Settling, record

ROWS = 48


def honest(worker, row, asked):
    return float(row)


def wrong(*workers, by=5.0, rows=None, first_only=False):
    def returned(worker, row, asked):
        lies = worker in workers and (rows is None or row in rows) and not (first_only and asked)
        return row + by if lies else float(row)

    return returned


def right(answers, size=ROWS):
    return answers == {row: float(row) for row in range(size)}


class TestHonestWorkers:
    def test_are_never_charged_and_cost_little(self):
        pool, found = Pool(24), Counter()
        sizes = itertools.cycle((8, 24, 64, 240))
        for _ in range(5_000):  # benchmarks/verification.py has 20,000 with real scores
            size = next(sizes)
            # As many odd rows as the bars let pass.
            share = 0.001 + 0.003 * min(24, size) / size
            odd = [row for row in range(size) if pool.random.random() < share]
            verdict, _ = pool.call(size, honest, odd)
            found.update(rows=size, computed=pool.work * size, disputes=verdict.disputes)
            found.update(strikes=sum(verdict.strikes.values()), left=len(verdict.unverified))
        assert (found["disputes"], found["strikes"], found["left"]) == (0, 0, 0)
        assert found["computed"] <= 1.023 * found["rows"]

    def test_that_are_new_are_checked_ten_times_as_often(self):
        new, proven = (Pool(24, proven=proven) for proven in (False, True))
        for pool in (new, proven):
            pool.call(240, honest)
        assert len(new.trials.wanted) > 3 * len(proven.trials.wanted)
        assert new.work == pytest.approx(1.2, abs=0.02)

    def test_one_on_probation_among_proven_ones_is_checked_more(self):
        pool, checked = Pool(6), Counter()
        for _ in range(200):
            pool.prove()
            pool.strikes.renew([3])
            pool.call(60, honest)
            answered = pool.trials.table.answered
            checked.update(answered[row].worker for row in pool.trials.wanted)
        others = sum(checked[worker] for worker in range(6) if worker != 3) / 5
        assert checked[3] > 5 * others


class TestAWrongPart:
    @pytest.mark.parametrize("num_workers", [3, 4, 5, 6, 24])
    def test_that_is_noticed_is_replaced_and_its_worker_excluded(self, num_workers):
        pool = Pool(num_workers)
        verdict, answers = pool.call(ROWS, wrong(0), odd=range(ROWS))
        assert right(answers)
        assert verdict.excluded == (0,)
        assert verdict.strikes.keys() == {0}
        assert 0 in verdict.doubted
        assert pool.strikes.workers == set(range(1, num_workers))
        own = {row for row in range(ROWS) if pool.first[row].worker == 0}
        assert verdict.corrected == own

    def test_of_a_worker_that_is_honest_when_asked_again_is_a_strike(self):
        pool = Pool(24)
        verdict, answers = pool.call(ROWS, wrong(0, first_only=True), odd=range(ROWS))
        assert right(answers)
        assert verdict.strikes == {0: 1}
        assert verdict.excluded == ()
        assert pool.strikes.fresh(0)

    def test_strikes_add_up_over_calls(self):
        pool = Pool(24)
        for number in range(1, 5):
            verdict, _ = pool.call(ROWS, wrong(0, first_only=True), odd=range(ROWS))
            assert bool(verdict.excluded) == (number == 4)

    def test_nan_is_wrong(self):
        pool = Pool(6)
        verdict, answers = pool.call(ROWS, wrong(2, by=math.nan), odd=range(ROWS))
        assert right(answers)
        assert verdict.excluded == (2,)

    def test_after_a_strike_the_oddest_row_of_every_other_worker_is_checked(self):
        pool = Pool(12)
        scores = {row: 9.0 if row % 4 == 1 else 0.0 for row in range(ROWS)}
        verdict, answers = pool.call(ROWS, wrong(0, 5), odd=[0, *range(4, 8)], scores=scores)
        owner = {row: part.worker for row, part in pool.first.items()}
        if {owner[0], owner[4]} & {0, 5}:  # one of them was looked at, so both are found
            assert right(answers)
            assert set(verdict.excluded) == {0, 5}

    def test_a_worker_that_returns_wrong_checks_is_found_as_well(self):
        pool, charged = Pool(6, share=0.2), Counter()
        for _ in range(20):
            verdict, _ = pool.call(ROWS, wrong(1))
            charged.update(verdict.excluded)
        assert charged == {1: 1}


def test_two_workers_that_collude_convict_nobody_else():
    found = 0
    for seed in range(50):
        pool = Pool(6, seed=seed)
        verdict, _ = pool.call(ROWS, wrong(0, 1), odd=range(0, ROWS, 5))
        assert verdict.strikes.keys() <= {0, 1}
        assert not pool.strikes.whole
        found += bool(verdict.strikes)
    assert found >= 45  # else they check each other, and nobody else


def test_two_workers_that_are_wrong_in_their_own_ways_are_both_found():
    def returned(worker, row, asked):
        return row + (worker + 1 if worker < 2 else 0.0)

    for seed in range(50):
        pool = Pool(8, seed=seed)
        verdict, answers = pool.call(ROWS, returned, odd=range(ROWS))
        assert right(answers)
        assert set(verdict.excluded) == {0, 1}


@pytest.mark.parametrize("num_faulty", [2, 3])
@pytest.mark.parametrize("num_workers", [6, 24])
def test_workers_whose_faults_alternate_are_all_excluded(num_faulty, num_workers):
    """Each is wrong once in a call, and honest when it is asked again."""
    pool, excluded = Pool(num_workers), set()
    for number in range(60):
        worker = number % num_faulty
        odd = range(ROWS) if worker not in excluded else ()
        verdict, answers = pool.call(ROWS, wrong(worker, first_only=True), odd=odd)
        excluded.update(verdict.excluded)
        assert right(answers)
    assert excluded == set(range(num_faulty))
    assert not pool.strikes.stopped


class TestTwoWorkers:
    def test_disputes_are_only_reported(self):
        pool = Pool(2)
        verdict, _ = pool.call(ROWS, wrong(0), odd=[0, 30])
        assert verdict.disputes
        assert not verdict.strikes
        assert {0, 30} <= verdict.unverified
        assert verdict.doubted == {0, 1}


class TestHonestResultsThatDiffer:
    def test_other_hardware_raises_the_tolerance(self):
        pool = Pool(12)
        for _ in range(50):
            verdict, _ = pool.call(
                ROWS, lambda worker, row, asked: row + 0.01 * (worker % 2), odd=range(0, ROWS, 7)
            )
            assert not verdict.strikes
        assert pool.strikes.tolerance == pytest.approx(0.02)
        assert not verdict.disputes

    def test_results_that_depend_on_the_rows_beside_them(self):
        pool, notes = Pool(12), []
        for _ in range(20):
            verdict, _ = self._call(pool)
            assert not verdict.strikes
            notes += verdict.notes
        assert pool.strikes.whole
        assert "depend on the rows beside them" in notes[0]
        assert len(notes) == 1

    def test_whole_parts_still_show_a_wrong_worker(self):
        pool = Pool(12)
        self._call(pool)
        assert pool.strikes.whole
        pool.strikes.share, excluded = 0.3, []
        for _ in range(20):
            verdict, _ = self._call(pool, liar=3)
            excluded += verdict.excluded
        assert excluded == [3]

    def _call(self, pool, liar=None):
        # The first rows of parts are seen when they are computed.
        beside = {}

        def returned(worker, row, asked):
            size = beside.setdefault((worker, asked), row)
            return row + 0.1 * (size % 5) + 7.0 * (worker == liar)

        return pool.call(ROWS, returned, odd=[1, 13])

    def test_a_module_that_never_repeats_itself_is_not_verified(self):
        pool = Pool(12)
        for _ in range(3):
            verdict, _ = pool.call(
                ROWS, lambda worker, row, asked: row + pool.random.random(), odd=range(ROWS)
            )
            assert not verdict.strikes
        assert pool.strikes.stopped
        assert any("not verified any more" in note for note in verdict.notes)
        assert pool.strikes.draw([range(4), range(4, 8)])[1] == frozenset()

    def test_a_module_that_sometimes_does_not_is_not_verified(self):
        for seed in range(10):
            pool = Pool(12, seed=seed)

            def returned(worker, row, asked, random=pool.random):
                return row + (random.random() < 0.01)

            for _ in range(1000):
                verdict, _ = pool.call(ROWS, returned, odd=[3, 20])
                assert not verdict.excluded
                if pool.strikes.stopped:
                    break
            assert pool.strikes.stopped


def test_a_row_is_verified_only_if_its_answer_is_what_two_workers_computed():
    pool = Pool(6)

    class Stopping(Numbers):
        def odd(self, answers):
            pool.strikes.stopped = "another call found the module random"
            return set()

    trials = Trials(pool.strikes, Settling())
    trials.prepare, trials.wanted = (lambda: None), {0}
    trials.results = Stopping()
    trials.results.by_part = {0: {0: 5.0}, 1: {0: 0.0}, 2: {0: 0.0}}
    table = Table(first=[(0,)] * 3, needed=1, idle=int)
    decide(trials, table, None, (0, 0.0), (1, 0.0), (2, 0.0), None)
    assert (trials.verified, trials.unverified) == (set(), {0})
    assert 0 in trials.doubted


def test_results_that_arrived_with_the_last_event_count():
    trials = Trials(record(4), Settling("deadline"))
    trials.prepare = lambda: setattr(trials, "results", Numbers())
    table = Table(first=[(0,), (1,)], needed=2, idle=int)
    asks = trials.waiting.decide

    def ends_at_the_first(history, table):
        asks(history, table)
        table.reason = "deadline" if table.ended else ""
        return math.inf

    trials.waiting.decide = ends_at_the_first
    assert decide(trials, table, None, (1, 0.0)) == -math.inf
    decide(trials, table, (0, 0.0), None)
    assert trials.answers == {0: 0, 1: 1}


def decide(trials, table, *events):
    """Decide, after each event: the number of a part, which is also its worker, and the time."""
    until = trials.decide(None, table)
    for event in events:
        heard = event and [Reply(table.parts[event[0]], event[0], event[1], event[1])]
        if event and len(event) > 2:
            heard[0].error = WorkerError(event[0], event[0], "failed")
        table.hear(heard or [], until)
        until = trials.decide(None, table)
    return until


class TestWithoutTime:
    def test_nothing_is_asked_and_what_was_drawn_is_unverified(self):
        pool = Pool(6, share=0.5)
        verdict, _ = pool.call(ROWS, wrong(0), odd=[3], reason="deadline", bounded=True)
        assert pool.work == pytest.approx(1.5, abs=0.05)  # what rode along
        assert verdict.disputes
        assert not verdict.strikes
        assert verdict.unverified
        assert 0 in verdict.doubted

    def test_checks_that_do_not_come_are_unverified(self):
        pool = Pool(6)
        verdict, answers = pool.call(ROWS, honest, [3, 4], lost=lambda worker, part: True)
        assert {3, 4} <= verdict.unverified
        assert right(answers)

    def test_jurors_that_do_not_answer_are_replaced(self):
        pool = Pool(8)
        verdict, answers = pool.call(
            ROWS, wrong(0), range(ROWS), lost=lambda worker, part: worker == 5 and part > 20
        )
        assert right(answers)
        assert verdict.excluded == (0,)

    def test_a_worker_that_hangs_when_it_is_asked_again_does_not_hold_the_call(self):
        pool = Pool(8)

        def lost(worker, part):
            return worker == 0

        ended = {"threshold": 1.0, "deadline": 1.0}
        verdict, answers = pool.call(ROWS, wrong(0), range(ROWS), lost=lost, **ended)
        assert right(answers)
        assert verdict.strikes == {0: 1}
        assert pool.waits
        assert max(pool.waits) <= 5.0

    def test_nor_does_one_that_hangs_at_a_check_where_there_is_no_deadline(self):
        pool = Pool(8)
        hangs = {"lost": lambda worker, part: True, "threshold": 1.0}
        verdict, answers = pool.call(ROWS, honest, range(ROWS), **hangs)
        assert right(answers)
        assert len(verdict.unverified) > ROWS / 2
        assert max(pool.waits) <= 5.0


@pytest.mark.parametrize("failed", [True, False])
def test_a_part_that_failed_is_not_waited_for(failed):
    """Its check rows stay unchecked, as those of a late part."""
    trials = Trials(record(3), Settling(threshold=5.0))
    numbers = Numbers()
    numbers.by_part = {0: {0: 0.0, 1: 0.0}, 2: {2: 0.0, 3: 0.0}}
    trials.record.passed([0, 1, 2] * 30)
    trials.record.share = 0.0
    trials.prepare, trials.wanted = (lambda: setattr(trials, "results", numbers)), {0}
    table = Table(first=[(0, 1), (2, 3, 0), (2, 3)], needed=4, idle=int)
    third = (1, 1.0, "failed") if failed else None
    until = decide(trials, table, None, (0, 1.0), (2, 1.0), third, None)
    if not failed:
        assert until == 5.0
        decide(trials, table, None)
    assert table.reason
    assert trials.unverified == {0}
