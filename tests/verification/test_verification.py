"""Tests of verification on a virtual clock: excluded workers, corrected rows, and extra work."""

import copy
import gc
import logging
import math
import os
import random
import time
import weakref

import pytest
import torch

from coded_torch import CodedWrapper, Waiting, codes
from coded_torch.codes import NotEnoughResults
from coded_torch.surrogates import Memory
from coded_torch.testing.virtual import VirtualWorkers
from coded_torch.verification import _scores
from coded_torch.verification._scores import Results, Scores
from coded_torch.workers import DeviceWorkers, FaultyWorkers, LocalWorkers, ProcessWorkers

from ..nn.modules import Call

ROWS = 48
OK, HANGS, DIES = ("ok", 1.0), ("ok", math.inf), ("die", 1.0)


def twice(x):
    return 2 * x + 1


def batch(seed=0, rows=ROWS):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def by(size):
    """The act of a worker whose results are wrong by a size."""
    return lambda y: y + size, 1.0


def pool_of(num_workers=6, scripts=None, all_others=OK):
    return VirtualWorkers([(scripts or {}).get(w, [all_others]) for w in range(num_workers)])


def wrap(pool, verify=0.2, module=None, **options):
    return CodedWrapper(module or Call(twice), workers=pool, verify=verify, **options)


def check(coded, x, wrong=(), charged=()):
    """Run a call whose answers must be right, and that charges some, and perhaps others."""
    answers, report = coded.run(x)
    assert torch.allclose(answers, 2 * x + 1, atol=1e-6)
    assert not report.estimated.any()
    assert set(charged) <= set(report.wrong_results) <= {*wrong, *charged}
    return report


def until_excluded(coded, faulty, most=200, rows=60):
    """Run calls until all faulty workers are excluded, and nobody else is at fault."""
    record = coded._record
    for number in range(1, most + 1):
        _, report = coded.run(batch(number, rows))
        assert set(report.wrong_results) <= set(faulty)
        if record.excluded >= set(faulty):
            return
    raise AssertionError(f"{set(faulty) - record.excluded} are not excluded")


class TestHonestWorkers:
    def test_are_checked_ten_times_as_often_until_they_are_known(self):
        coded, checked, work = wrap(pool_of(), verify=0.02), [], []
        for seed in range(40):
            rows = (240, 8, 24, 64)[seed % 4]
            report = check(coded, batch(seed, rows))
            assert (report.disputes, report.corrected) == (0, ())
            assert not report.unverified.any()
            # Rows ride in the parts of others, or are a part of their own.
            assert report.work_ratio == pytest.approx(1 + report.verified.sum() / rows)
            checked.append(float(report.verified.double().mean()))
            work.append(report.work_ratio * rows)
        assert checked[0] == pytest.approx(0.2, abs=0.02)
        assert sum(work[20:]) <= 1.05 * 5 * (240 + 8 + 24 + 64)

    def test_cost_nothing_without_it(self):
        pool = pool_of()
        _, report = wrap(pool, None).run(batch())
        assert report.verified is None
        assert report.work_ratio == 1.0
        assert len(pool.begun) == 6

    def test_of_fast_modules_are_scored_in_some_calls(self, monkeypatch):
        """Scoring that takes .1 s may take it ten times, and once more in each .5 s of calls."""
        fits = []

        def fit(self, inputs):
            fits.append(len(inputs))
            time.sleep(0.1)

        monkeypatch.setattr(Results, "_fit", fit)
        since = time.monotonic()
        with DeviceWorkers(["cpu"] * 2) as pool:
            coded = wrap(pool)
            for seed in range(60):
                coded(batch(seed))
        assert 10 <= len(fits) <= 11 + (time.monotonic() - since) / 0.5

    def test_that_had_all_rows_are_checked_afterwards(self):
        pool = pool_of(3)
        report = check(wrap(pool, 0.05, parts=1), batch())
        assert report.verified.sum() == ROWS / 2
        assert not report.unverified.any()
        assert [time for time, _, _ in pool.begun] == [0.0, 1.0]
        assert pool.begun[1][2].avoid == {0}

    def test_of_other_hardware_are_never_charged_if_the_pool_says_so(self):
        pool = pool_of(12, {worker: [by(0.01)] for worker in range(0, 12, 2)})
        pool.mixed = True
        coded = wrap(pool)
        for seed in range(20):
            assert not coded.run(batch(seed))[1].disputes

    @pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")
    def test_of_a_module_whose_rows_depend_on_each_other_are_never_charged(self):
        """Whole parts are compared then, and still show a wrong worker."""

        pool, notes, excluded = pool_of(12), [], []
        coded = wrap(pool, 0.3, Call(lambda x: x + 0.1 * x[:1]), parts=6)
        for seed in range(3):
            _, report = coded.run(batch(seed))
            assert not report.wrong_results
            notes += report.notes
        assert sum("depend on the rows beside them" in note for note in notes) == 1
        pool._acts[3] = iter([by(7.0)] * 1000)
        for seed in range(100):
            excluded += coded.run(batch(seed))[1].excluded
        assert excluded == [3]

    @pytest.mark.parametrize(("num_workers", "share"), [(12, 1.0), (12, 0.5), (3, 0.5), (3, 0.1)])
    @pytest.mark.filterwarnings("ignore:.*parts get other answers than the batch")
    def test_of_a_random_module_are_not_verified_any_more(self, num_workers, share):
        generator = torch.Generator().manual_seed(0)

        def random(x):
            noise = torch.rand(2, len(x), 1, generator=generator)
            return x + (noise[0] < share) * (1 + noise[1])

        coded, stopped = wrap(pool_of(num_workers), 0.1, Call(random)), False
        for seed in range(300):
            _, report = coded.run(batch(seed))
            assert not report.excluded
            if stopped:
                assert not report.verified.any()
                break
            stopped = any("not verified any more" in note for note in report.notes)
        assert stopped


class TestAWrongWorker:
    def test_does_not_make_wrong_results_look_usual(self):
        size = [0.0]
        coded = known(wrap(pool_of(12, {0: [(lambda y: y + size[0], 1.0)]})))
        coded.run(batch(0, 240))  # the first rows that are learnt
        for wrong in (0.0, 1.0):
            size[0] = wrong
            _, report = coded.run(batch(1, 240))
            (_, learnt, _) = coded._record.scores.left[-1]
            assert bool(report.wrong_results) == (not learnt) == bool(wrong)

    @pytest.mark.parametrize("num_workers", [3, 4, 5, 6, 24])
    def test_is_corrected_excluded_and_logged(self, num_workers, caplog):
        pool = pool_of(num_workers, {0: [by(1.0)]})
        coded, excluded = wrap(pool), ()
        with caplog.at_level(logging.WARNING):
            while not excluded:
                pool.begun.clear()
                report = check(coded, batch(), charged=[0])
                assert set(report.corrected) == set(pool.begun[0][2].units)  # it replied first
                excluded = report.excluded
        assert excluded == (0,)
        assert pool.states[0][0] == "excluded"
        levels = {record.levelname for record in caplog.records if "worker 0" in record.message}
        assert levels == {"WARNING", "ERROR"}

    @pytest.mark.parametrize("num_workers", [6, 24])
    def test_of_a_proven_pool_is_excluded_by_the_call_that_finds_it(self, num_workers):
        """It computes parts of others, which it cannot tell from its own ones."""
        pool = pool_of(num_workers, {0: [noise()]})
        coded = wrap(pool, 0.1)
        known(coded)
        report = check(coded, batch(rows=240), charged=[0])
        assert report.excluded == (0,)
        asked = [row for _, worker, part in pool.begun if worker == 0 for row in part.units]
        assert len(set(asked)) == len(asked)
        assert report.work_ratio <= 7.0  # of which most are votes

    def test_that_is_honest_when_asked_again_is_charged_once(self):
        pool = pool_of(24, {0: [by(1.0), OK]})
        report = check(wrap(pool), batch(), wrong=[0])
        assert report.wrong_results == {0: 1}
        assert report.excluded == ()

    @pytest.mark.parametrize(("num_workers", "least"), [(6, 5), (24, 3)])
    def test_is_excluded_after_some_such_calls(self, num_workers, least):
        once = []
        pool = pool_of(num_workers, {0: [(lambda y: y + (once.pop() if once else 0.0), 1.0)]})
        coded, excluded = wrap(pool), []
        for seed in range(4 * least):
            once[:] = [1.0]
            excluded += check(coded, batch(seed), wrong=[0]).excluded
            assert seed >= least - 1 or not excluded
        assert excluded == [0]

    def test_begins_a_trial_period_once_it_is_restarted(self):
        size = [1.0]
        pool = pool_of(6, {2: [(lambda y: y + size[0], 1.0)]})
        coded, seed = wrap(pool, verify=0.02), 0
        while not coded.run(batch(seed))[1].excluded:
            seed += 1
        for _ in range(20):  # all others are known then
            coded.run(batch())
        pool.begun.clear()
        check(coded, batch())
        assert 2 not in {worker for _, worker, _ in pool.begun}
        size[0] = 0.0
        pool.restart(2)
        own, others = 0, 0
        for seed in range(8):
            pool.begun.clear()
            report = check(coded, batch(seed))
            rows = next(set(part.units) for _, worker, part in pool.begun if worker == 2)
            checked = {*report.verified.nonzero().flatten().tolist()}
            own, others = own + len(rows & checked), others + len(checked - rows)
        assert own > others / 2  # of a fifth of the rows

    def test_has_each_row_checked_in_its_trial_period_at_ten_times_a_tenth(self):
        for seed in range(20):
            pool = pool_of(6)
            coded = known(wrap(pool, verify=0.1))
            coded._record.renew([2])
            report = check(coded, batch(seed))
            rows = next(part.units for _, worker, part in pool.begun if worker == 2)
            assert report.verified[[*rows]].all()

    def test_gets_nothing_from_pools_that_cannot_exclude(self):
        pool = pool_of(6, {2: [by(1.0)]})
        pool.exclude = None
        coded = wrap(pool)
        until_excluded(coded, [2])
        pool.begun.clear()
        check(coded, batch(1))
        assert 2 not in {worker for _, worker, _ in pool.begun}

    def test_leaves_nothing_in_a_memory(self):
        size, memory = [0.0], Memory()
        pool = pool_of(6, {2: [(lambda y: y + size[0], 1.0)]})
        waiting = Waiting(estimate_after=100.0)
        coded = wrap(pool, surrogate=memory, waiting=waiting)
        coded.run(batch())
        assert len(memory) == ROWS
        size[0] = 1.0
        until_excluded(coded, [2])
        assert len(memory) == 0  # the first call has rows of worker 2
        check(coded, batch(2))
        assert len(memory) == ROWS

    @pytest.mark.parametrize("waiting", [Waiting(), Waiting(estimate_after=100.0)])
    def test_whose_rows_nobody_else_computes(self, waiting):
        """It had two parts, which others repeated to find it wrong, and then they left."""
        x, counts = batch(), []
        for at in (2.5, 3.5, 4.5, 5.5) * 4:  # whose rows are checked is secret
            pool = VirtualWorkers([[by(9.0)], [OK], [OK], [OK]], [(at, w) for w in (1, 2, 3)])
            coded, missing = wrap(pool, 0.02, parts=8, waiting=waiting), torch.zeros(ROWS) > 0
            try:
                answers, report = coded.run(x)
                missing |= report.estimated
            except NotEnoughResults as error:
                answers, report = error.answers, error.report
                missing |= answers.isnan().all(1)
            if report.wrong_results == {0: 1}:
                counts.append(int(missing.sum()))
                assert report.ended == ("failed" if missing.any() else "complete")
                assert torch.equal(answers[~missing], 2 * x[~missing] + 1)
                own = [set(part.units) for _, worker, part in pool.begun if worker == 0]
                assert set(missing.nonzero().flatten().tolist()) <= set.union(*own)
        assert max(counts) > 0

    def test_that_hangs_when_it_is_asked_again_does_not_hold_the_call(self):
        pool = pool_of(8, {0: [by(1.0), HANGS]})
        report = check(wrap(pool), batch(), wrong=[0])
        assert report.wrong_results == {0: 1}
        assert pool.clock <= 10.0

    def test_is_found_though_others_do_not_answer_when_they_are_asked_again(self):
        pool = pool_of(8, {0: [by(1.0)], 5: [OK, HANGS]})
        check(wrap(pool), batch(), charged=[0])

    def test_cannot_be_told_from_the_other_of_two(self):
        _, report = wrap(pool_of(2, {0: [by(1.0)]})).run(batch())
        assert report.disputes
        assert not report.wrong_results
        assert report.unverified.all()


def test_two_wrong_workers_that_agree_are_excluded_by_the_call_that_finds_them():
    """A part is one occasion to be wrong, however many rows it has.

    Who checks whom is drawn: in some 3 of 100 draws, two calls check one of them too little.
    """
    excluded = 0
    for seed in range(10):
        coded = known(wrap(pool_of(6, {0: [by(1.0)], 1: [by(1.0)]}), 0.1))
        coded._record.random = random.Random(seed)
        for number in (1, 2):
            _, report = coded.run(batch(number, 240))
            assert set(report.wrong_results) <= {0, 1}
        excluded += coded._record.excluded >= {0, 1}
    assert excluded >= 9


def test_two_wrong_workers_convict_nobody_else():
    """If they collude, and if they are wrong in their own ways."""
    found = 0
    for seed in range(20):
        _, report = wrap(pool_of(6, {0: [by(1.0)], 1: [by(1.0)]}), 0.02).run(batch(seed))
        assert set(report.wrong_results) <= {0, 1}
        found += bool(report.wrong_results)
    assert found >= 15  # else they check each other, and nobody else


def noise(seed=0):
    """The act of a worker whose results are noise, another one in every call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda y: y + torch.randn(y.shape, generator=generator), 1.0


def of_size(size):
    """The act of a worker that is wrong in parts of a size or one more."""
    return lambda y: y + (len(y) - size in (0, 1)), 1.0


class TestFaultyWorkersAreExcluded:
    """Within 200 calls of 60 rows, of which 2 % are checked, and nobody else has a fault."""

    @pytest.mark.parametrize(
        ("num_workers", "act"),
        [
            *[(number, noise()) for number in (6, 24)],
            *[(number, (lambda y: y * 1.01, 1.0)) for number in (6, 24)],
            (6, of_size(10)),
            (24, of_size(2)),
        ],
        ids=["noise", "noise", "a factor", "a factor", "parts of 10 rows", "parts of 2 rows"],
    )
    def test_alone(self, num_workers, act):
        until_excluded(known(wrap(pool_of(num_workers, {1: [act]}), verify=0.02)), [1])

    @pytest.mark.parametrize(("num_workers", "faulty"), [(6, 2), (6, 3), (24, 2), (24, 3)])
    def test_two_or_three_of_one_rate(self, num_workers, faulty):
        scripts = {worker: [noise(worker)] for worker in range(faulty)}
        until_excluded(known(wrap(pool_of(num_workers, scripts), verify=0.02)), range(faulty))

    def test_that_are_right_in_a_part_that_comes_again(self):
        seen = set()

        def act(y):
            again = all(tuple(row) in seen for row in y.tolist())
            seen.update(map(tuple, y.tolist()))
            return y if again else y + 1.0

        until_excluded(known(wrap(pool_of(6, {1: [(act, 1.0)]}), verify=0.02)), [1])


class TestDisputes:
    """In each test a call ends whose verdict was false, or that did not end."""

    def wrong(self, coded, x):
        answers, report = coded.run(x)
        return ~torch.isclose(answers, 2 * x + 1, atol=1e-4).all(1), report

    def test_a_row_that_no_worker_can_check_alone_is_not_asked_for_again_and_again(self):
        squeezing = known(wrap(pool_of(6), 0.02, Call(lambda x: (2 * x + 1).squeeze())))
        for seed in range(14):
            assert len(squeezing.run(batch(seed, 240))[1].wrong_results) == 0
        for workers, bad in ((2, [1]), (3, [1, 2])):
            pool = pool_of(workers, {worker: [("nan", 1.0)] for worker in bad})
            assert wrap(pool, parts=1).run(batch())[1].unverified.all()

    @pytest.mark.parametrize("factor", [1e4, 1e6])
    def test_no_single_worker_sets_the_scale_of_differences(self, factor):
        pool = pool_of(5, {0: [(lambda y: factor * y, 0.9)], 1: [by(1.0)]})
        is_wrong, report = self.wrong(wrap(pool, verify=1.0), batch(rows=400))
        assert not is_wrong.any()
        assert set(report.wrong_results) == {0, 1}

    @pytest.mark.parametrize("huge", [lambda y: 1e6 * y, lambda y: 1e6 * (1 + torch.rand(y.shape))])
    @pytest.mark.parametrize("num_workers", [4, 5, 6])
    @pytest.mark.parametrize("share", [0.2, 1.0])
    def test_no_wrong_rows_are_verified_beside_huge_ones_of_another_worker(
        self, huge, num_workers, share
    ):
        for seed in range(4):
            pool = pool_of(num_workers, {0: [(huge, 1.0)], 1: [by(0.5)]})
            coded = wrap(pool, share)
            for call in range(4):
                is_wrong, report = self.wrong(coded, batch(100 * seed + call))
                assert not (is_wrong & report.verified).any()
                assert set(report.wrong_results) <= {0, 1}

    def test_results_near_0_make_no_rounding_look_like_a_difference(self):
        pool = pool_of(5, {0: [(lambda y: 1e-8 * y, 0.9)]})
        coded = wrap(pool, 0.2, Call(lambda x: 2 * x + 1 + 1e-6 * x[:1]))
        _, report = self.wrong(coded, batch(rows=400))
        assert set(report.wrong_results) == {0}
        assert not coded._record.whole

    def test_a_vote_does_not_vote_for_itself(self):
        for seed in range(12):
            coded = wrap(pool_of(4, {1: [by(1.0)], 2: [OK, by(5.0), OK]}), 0.1)
            assert not self.wrong(coded, batch(seed))[0].any()
            assert not coded._record.whole

    def test_two_doubted_workers_do_not_verify_each_other(self):
        for seed in range(4):
            pool = pool_of(6, {0: [by(1.0)], 1: [by(1.0)]})
            coded = wrap(pool, 0.5, waiting=Waiting(deadline=1.2))
            is_wrong, report = self.wrong(coded, batch(seed))
            assert is_wrong.any()
            assert report.unverified[is_wrong].all()

    @pytest.mark.parametrize("can_exclude", [True, False])
    def test_a_slow_call_undoes_no_exclusion_of_another_one(self, can_exclude):
        pool = pool_of(6, {0: [by(1.0)]})
        if not can_exclude:
            pool.exclude = None
        coded = wrap(pool)

        def others(y):
            if not coded._record.excluded:
                until_excluded(coded, [0])
            return y

        pool._acts[5] = iter([(others, 5.0)] + [OK] * 1000)
        coded.run(batch())
        assert coded._record.excluded == {0}

    @pytest.mark.parametrize("seconds", [2.0, 3.0, 3.5])
    def test_a_restarted_worker_is_excluded_again_however_late_its_first_result_is(self, seconds):
        pool = pool_of(6, {0: [by(1.0)]})
        coded = wrap(pool)
        for seed in range(1, 14):
            coded.run(batch(seed))
        assert coded._record.excluded == {0}
        pool.restart(0)
        # The accident of another worker keeps the call open.
        pool._acts[0] = iter([(by(1.0)[0], seconds), *[by(1.0)] * 1000])
        pool._acts[1] = iter([by(1.0), *[OK] * 1000])
        excluded = coded.run(batch(14))[1].excluded
        assert (0 in excluded) == (pool.states[0][0] == "excluded")

    def test_a_worker_whose_results_have_another_form_is_corrected(self):
        pool = pool_of(3, {0: [(lambda y: y[:, :5], 1.0)]})
        assert not self.wrong(wrap(pool, parts=1), batch())[0].any()

    def test_all_rows_are_unverified_once_verification_has_stopped(self):
        drawn = torch.Generator().manual_seed(0)
        acts = {0: [by(1.0)], 1: [(lambda y: y + torch.rand(1, generator=drawn), 1.0)]}
        coded = wrap(pool_of(3, acts), 0.1)
        for seed in range(3):
            is_wrong, report = self.wrong(coded, batch(seed))
            assert report.unverified[is_wrong].all()
        assert coded._record.stopped

    def test_new_weights_make_no_worker_new(self):
        pool = pool_of()
        coded = known(wrap(pool, 0.02))
        coded.run(batch())
        pool._fresh.update(pool.up)  # as after new weights
        coded.run(batch())
        assert not any(map(coded._record.fresh, range(6)))


def known(coded, checks=30):
    """Let the trial period of all workers be over, after some checks."""
    coded._record.passed(*[dict.fromkeys(coded._record.everyone, checks)] * 2)
    return coded


class TestWithoutTime:
    def test_nothing_more_is_asked_and_what_differs_is_unverified(self):
        pool = pool_of(6, {0: [by(1.0)]})
        _, report = wrap(pool, 0.05, waiting=Waiting(deadline=1.2)).run(batch())
        assert pool.clock <= 1.2
        assert report.disputes
        assert not report.wrong_results
        assert report.unverified.any()

    def test_checks_that_do_not_come_are_unverified(self):
        pool = pool_of(4, {0: [OK]}, all_others=HANGS)
        report = check(wrap(pool, 0.02, parts=1), batch())
        assert 5 <= report.unverified.sum() <= 15
        assert pool.clock <= 6.0

    def test_the_check_rows_of_a_part_that_fails_are_not_waited_for(self):
        pool = pool_of(3, {1: [DIES, HANGS]})
        report = check(wrap(pool, 0.05), batch())
        assert report.unverified.any()
        assert pool.clock <= 8.0


@pytest.mark.parametrize("place", [(Results, "_fit"), (Scores, "learn"), (_scores, "_scores")])
def test_an_exception_in_scoring_loses_no_answers(place, monkeypatch, caplog):
    def raising(*args):
        raise FloatingPointError("no such number")

    monkeypatch.setattr(*place, raising)
    coded = wrap(pool_of())
    for seed in range(3):
        assert check(coded, batch(seed)).verified.any()
    assert caplog.text.count("looking for odd results failed") == 1


@torch.no_grad()
def test_a_faulty_process_is_excluded_restarted_and_tried_anew():
    size = [1.0]
    with ProcessWorkers(4) as processes:
        attack = {"attack": lambda rows, generator: rows + size[0], "adversaries": [2]}
        coded, excluded = wrap(FaultyWorkers(processes, **attack), verify=0.1), []
        for seed in range(20):
            answers, report = coded.run(batch(seed))
            excluded += report.excluded
            if report.corrected or not report.unverified.any():
                assert report.wrong_results.keys() <= {2}
            if 2 in excluded:
                assert torch.allclose(answers, 2 * batch(seed) + 1, atol=1e-5)
        assert excluded == [2]
        size[0] = 0.0
        processes.restart(2)
        end = time.monotonic() + 60
        while processes.num_restarts < 1 or processes.num_ready < 4:  # calls take less time
            assert time.monotonic() < end
            time.sleep(0.01)
        asked = set()
        while 2 not in asked:
            assert time.monotonic() < end
            asked |= set(check(coded, batch()).asked)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"code": codes.ReplicationCode(2, 4)}, "None with a code"),
        ({"workers": LocalWorkers(), "parts": 4}, "None on a pool"),
        *[({"verify": share}, "between 0 and 1") for share in (-0.1, 1.5, math.nan)],
    ],
)
def test_arguments_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=f"verify must be {match}"):
        CodedWrapper(Call(twice), **{"workers": pool_of(4), "verify": 0.1} | options)


def test_another_pool_and_a_copy_begin_anew():
    coded = wrap(pool_of(6, {2: [by(1.0)]}))
    check(coded, batch(), charged=[2])
    twin = copy.deepcopy(coded)
    coded.workers = pool_of()
    for each in (coded, twin):
        assert each._record.excluded == set()
        assert each._record.scores.recent is None


@pytest.mark.parametrize(
    "of",
    [
        *(lambda y: y.sum(1), lambda y: y.argmax(1), lambda y: (y, y.argmax(1)), lambda y: y > 0),
        lambda y: torch.complex(y, y.sin()).conj(),
    ],
    ids=["a number a row", "classes", "both", "booleans", "complex"],
)
@pytest.mark.parametrize("wrong", [(), (2,)], ids=["honest", "one wrong"])
def test_outputs_of_any_form_are_verified(of, wrong):
    pool = pool_of(6, {worker: [(lambda y: y.flip(0), 1.0)] for worker in wrong})
    coded, excluded = wrap(pool, module=Call(of)), set()
    for seed in range(20):
        answers, report = coded.run(batch(seed))
        excluded |= set(report.excluded)
    assert excluded == set(wrong)
    torch.testing.assert_close(answers, of(batch(19)))
    assert report.verified.any()


def test_results_of_another_form_are_left_out_and_no_faults():
    for first in range(6):
        pool = pool_of(6, {first: [("rows", 1.0)]})
        assert check(wrap(pool), batch(first, 96)).verified.any()


def test_of_single_rows_idle_workers_take_the_checks():
    pool = pool_of(8)
    report = check(wrap(pool, 1.0, parts=4), batch(rows=4))
    assert [len(part.units) for _, _, part in pool.begun] == [1] * 8
    assert report.source.tolist() == [0] * 4
    assert report.verified.all()


def test_what_a_worker_writes_into_its_results_after_their_check_reaches_no_answer():
    """A process shares the memory of its results with the caller."""
    sent = []

    class Shared(VirtualWorkers):
        def open(self, module, task):
            request = super().open(module, task)
            close = request.close
            request.close = lambda: ([y.fill_(13.0) for y in sent], close())
            return request

    pool = Shared([[(lambda y: sent.append(y) or y, 1.0)]] * 4)
    assert check(wrap(pool, 1.0), batch()).verified.all()


def test_what_a_faulty_worker_repeats_too_late_never_counts():
    """The worker is asked again for its part, and is wrong again when nobody waits any more."""
    pool = pool_of(4, {0: [by(9.0), (by(9.0)[0], 4.5), OK]})
    report = check(wrap(pool, 1.0, parts=4), batch(rows=16), charged=[0])
    assert (report.wrong_results, report.disputes) == ({0: 1}, 1)


def test_an_interrupted_call_keeps_nothing():
    def interrupt(result):
        raise KeyboardInterrupt

    coded = wrap(pool_of(4, {0: [OK, (interrupt, 1.0)]}), 0.5, parts=8)
    gc.disable()
    try:
        x = batch(rows=16)
        inputs = weakref.ref(x)
        with pytest.raises(KeyboardInterrupt):
            coded(x)
        del x
        coded.workers.begun.clear()
        assert inputs() is None
    finally:
        gc.enable()


class Wrong(torch.nn.Module):
    """An identity that is wrong in one process."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def forward(self, x):
        try:
            os.mkdir(self.folder)
            self.is_wrong = True
        except FileExistsError:
            pass
        return x + vars(self).get("is_wrong", False)


@pytest.mark.parametrize("is_right", [True, False])
def test_fast_verified_calls_ask_for_their_first_parts_in_one_round(
    tmp_path, monkeypatch, is_right
):
    x = batch()
    rounds = []
    module = torch.nn.Identity() if is_right else Wrong(str(tmp_path / "wrong"))
    with ProcessWorkers(5).start() as pool:
        take_round = pool._queue.round

        def noted(request, *given):
            rounds.append(request)
            return take_round(request, *given)

        monkeypatch.setattr(pool._queue, "round", noted)
        coded = wrap(pool, 0.5, module.eval())
        coded._record.scores.spend(1e9, 0)  # no time is left to score results
        for _ in range(8):
            answers, report = coded.run(x)
            assert torch.equal(answers[report.verified], x[report.verified])
            assert report.verified.any()
            assert report.ended == "complete"
        assert len(rounds) >= 6  # not before it is known how long parts take
        assert torch.equal(answers, x)
        assert rounds[-1].num_taken >= 4
        if not is_right:
            assert coded._record.excluded
