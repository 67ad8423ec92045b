"""Verification of a wrapper's calls: on workers that compute at once, and on processes."""

import copy
import logging
import math
import random
import time
from collections import Counter, deque

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting, codes
from coded_torch.codes import NotEnoughResults
from coded_torch.nn.division import dealt
from coded_torch.surrogates import Memory
from coded_torch.table import Began, Reply, WorkerError
from coded_torch.verification.scores import Fit, Scores
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers
from coded_torch.workers.base import Request, Workers

ROWS = 48


class AtOnce(Workers):
    """M workers of this process that compute at once; any free one takes a part.

    Args:
        spoil: ``(worker, outputs, asked) -> outputs``, what a worker returns instead, and how often
            it was asked for parts of the request before.
    """

    def __init__(self, num_workers, spoil=lambda worker, outputs, asked: outputs, seed=0):
        self.num_workers, self.spoil = num_workers, spoil
        self.random, self.out, self.seen = random.Random(seed), set(), set()
        self.log = []

    def open(self, module, task):
        return _AtOnce(self, module, task)

    def exclude(self, worker):
        self.out.add(worker)

    def restart(self, worker):
        self.out.discard(worker)
        self.seen.discard(worker)


class _AtOnce(Request):
    def __init__(self, pool, module, task):
        self.pool, self.module, self.task = pool, module, task
        self.events, self.times = deque(), Counter()
        self.opened = time.monotonic()

    def ask(self, parts):
        pool = self.pool
        for part in parts:
            able = sorted(set(range(pool.num_workers)) - pool.out - part.avoid)
            if not able:
                error = WorkerError(part.number, -1, "has no worker")
                self.events.append(Reply(part, -1, self.now(), math.inf, None, error))
                continue
            least = min(self.times[worker] for worker in able)
            worker = pool.random.choice([w for w in able if self.times[w] == least])
            args, kwargs = self.task.payload(part.units, True)
            with torch.no_grad():
                value = self.module(*args, **kwargs)
            value = pool.spoil(worker, value, self.times[worker])
            self.times[worker] += 1
            pool.log.append((worker, part.units))
            self.events.append(Began(part, worker, self.now(), worker not in pool.seen))
            pool.seen.add(worker)
            self.events.append(Reply(part, worker, self.now(), 1e-3, value))

    def wait(self, until=math.inf):
        return self.events.popleft() if self.events else None

    def drop(self, parts):
        pass

    def now(self):
        return time.monotonic() - self.opened

    @property
    def idle(self):
        return self.pool.num_workers - len(self.pool.out)

    def close(self):
        self.events.clear()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def wrong(*workers, size=1.0):
    return lambda worker, outputs, asked: outputs + size * (worker in workers)


def batch(seed=0, rows=ROWS):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def wrap(pool, verify=0.05, **options):
    return CodedWrapper(network(), workers=pool, verify=verify, **options)


class TestHonestWorkers:
    def test_are_verified(self):
        coded = wrap(AtOnce(6))
        for seed in range(5):
            x = batch(seed)
            answers, report = coded.run(x)
            assert torch.allclose(answers, coded.module(x), atol=1e-6)
            assert report.verified.sum() >= 0.1 * ROWS
            assert not report.unverified.any()
            assert (report.disputes, report.corrected, report.strikes) == (0, (), {})
            assert report.work == pytest.approx(1 + report.verified.sum() / ROWS)
            assert not report.predicted.any()

    def test_cost_nothing_without_it(self):
        pool = AtOnce(6)
        _, report = wrap(pool, None).run(batch())
        assert report.verified is None
        assert report.work == 1.0
        assert sorted(units for _, units in pool.log) == list(dealt(ROWS, 6))

    def test_of_other_precision_by_batch_size_are_never_charged(self):
        """Results depend on the size of the part. Each dispute at least doubles the tolerance."""
        coded, disputes = wrap(AtOnce(6, lambda worker, y, asked: y + 1e-3 * (len(y) % 5))), 0
        for seed in range(20):
            _, report = coded.run(batch(seed))
            assert not report.strikes
            disputes += report.disputes
        assert coded._strikes.stopped == ""
        assert 1e-3 < coded._strikes.tolerance <= 0.03
        assert disputes <= 5


class TestAWrongWorker:
    def test_is_corrected_excluded_and_logged(self, caplog):
        pool = AtOnce(6, wrong(2))
        coded, x = wrap(pool), batch()
        with caplog.at_level(logging.WARNING):
            answers, report = coded.run(x)
        assert torch.allclose(answers, coded.module(x).detach(), atol=1e-6)
        assert report.excluded == (2,)
        assert report.strikes.keys() == {2}
        assert report.corrected
        assert pool.out == {2}
        levels = {record.levelname for record in caplog.records if "worker 2" in record.message}
        assert levels == {"WARNING", "ERROR"}

    def test_is_on_probation_once_it_is_restarted(self):
        pool = AtOnce(6, wrong(2))
        coded = wrap(pool, verify=0.02)
        for seed in range(30):
            _, report = coded.run(batch(seed))
            if report.excluded:
                break
        assert pool.out == {2}
        pool.spoil = lambda worker, outputs, asked: outputs
        pool.restart(2)
        asked = Counter()
        for seed in range(10):
            pool.log.clear()
            _, report = coded.run(batch(seed))
            asked.update(worker for worker, _ in pool.log)
            assert not report.strikes
        assert asked[2] >= 10

    def test_that_is_out_gets_nothing_from_pools_that_cannot_exclude(self):
        pool = AtOnce(6, wrong(2))
        pool.exclude = None
        coded = wrap(pool)
        coded.run(batch())
        pool.log.clear()
        coded.run(batch(1))
        assert 2 not in {worker for worker, _ in pool.log}

    def test_leaves_nothing_in_a_memory(self):
        memory = Memory()
        pool = AtOnce(6, wrong(2, size=0.0))
        coded = wrap(pool, surrogate=memory, waiting=Waiting(predict_after=3.0))
        coded._strikes.share = 0.0
        coded.run(batch())
        assert len(memory) == ROWS
        pool.spoil, coded._strikes.share = wrong(2), 0.05
        coded.run(batch(1))
        assert pool.out == {2}
        assert len(memory) == 0  # the first call has rows of worker 2
        coded.run(batch(2))
        assert len(memory) == ROWS

    def test_that_had_all_rows_that_nobody_else_computes_is_an_error_that_says_so(self):
        def spoil(worker, outputs, asked):
            coded._strikes.excluded.add(worker)  # by another call
            pool.out = {0, 1, 2}
            return outputs

        pool = AtOnce(3, spoil)
        pool.seen = {0, 1, 2}
        coded = wrap(pool, parts=1)
        with pytest.raises(NotEnoughResults, match="got 0") as caught:
            coded.run(batch())
        assert caught.value.answers is None
        assert caught.value.report.ended == "failed"

    def test_that_another_call_excludes_meanwhile_is_not_pardoned(self):
        def spoil(worker, outputs, asked):
            coded._strikes.excluded.add(2)
            return outputs + (worker == 2)

        coded = wrap(AtOnce(6))
        coded.run(batch(1))
        coded.workers.spoil = spoil
        answers, _ = coded.run(batch())
        assert coded._strikes.excluded == {2}
        assert torch.allclose(answers, coded.module(batch()).detach(), atol=1e-6)

    @pytest.mark.parametrize("times", [1, 3], ids=["once", "always"])
    def test_whose_rows_others_fail_on_too(self, times, monkeypatch, caplog):
        def spoil(worker, outputs, asked):
            if len(pool.log) == 11:  # the last part of the second call
                coded._strikes.excluded.add(2)  # by another call
                pool.exclude(2)
            return outputs

        def failing(self, parts):
            for part in parts:
                if 2 in part.avoid and len(failed) < times:
                    failed.append(part)
                    error = WorkerError(part.number, 0, "has lost its mind")
                    self.events.append(Reply(part, 0, self.now(), 1e-3, None, error))
                else:
                    ask(self, [part])

        pool, ask, failed = AtOnce(6, spoil), _AtOnce.ask, []
        coded = wrap(pool, waiting=Waiting(predict_after=3.0))
        coded.run(batch(1))
        monkeypatch.setattr(_AtOnce, "ask", failing)
        with caplog.at_level(logging.WARNING):
            answers, report = coded.run(batch())
        assert len(failed) == times
        assert torch.isfinite(answers).all()
        assert report.predicted.any() == (times == 3)
        assert report.ended == ("complete" if times == 1 else "failed")
        assert ("answers are predicted" in caplog.text) == (times == 3)
        good = ~report.predicted
        assert torch.allclose(answers[good], coded.module(batch()).detach()[good], atol=1e-6)


@pytest.mark.parametrize("place", [(Scores, "fit"), (Scores, "learn"), (Fit, "scores")])
def test_an_exception_in_scoring_loses_no_answers(place, monkeypatch, caplog):
    def raising(*args):
        raise FloatingPointError("no such number")

    monkeypatch.setattr(*place, raising)
    coded, x = wrap(AtOnce(6)), batch()
    for _ in range(3):
        answers, report = coded.run(x)
        assert torch.allclose(answers, coded.module(x).detach(), atol=1e-6)
        assert report.verified.any()
    assert caplog.text.count("results are not scored") == 1


@torch.no_grad()
def test_a_faulty_process_is_excluded_restarted_and_on_probation():
    class Fault:
        size = 1.0

        def __call__(self, rows, generator):
            return rows + self.size

    fault = Fault()
    with ProcessWorkers(4) as processes:
        pool = FaultyWorkers(processes, attack=fault, adversaries=[2])
        # On a busy machine, rows would be predicted where a call takes long.
        coded, excluded = wrap(pool, verify=0.1, waiting=Waiting(predict=False)), []
        for seed in range(20):
            x = batch(seed)
            answers, report = coded.run(x)
            assert not report.predicted.any()
            excluded += report.excluded
            if report.corrected or not report.unverified.any():
                assert report.strikes.keys() <= {2}
            if 2 in excluded:
                assert torch.allclose(answers, coded.module(x).detach(), atol=1e-5)
        assert excluded == [2]
        fault.size = 0.0
        processes.restart(2)
        end = time.monotonic() + 60
        while processes.num_restarts < 1 or processes.num_ready < 4:  # calls take less time
            assert time.monotonic() < end
            time.sleep(0.01)
        asked = set()
        for seed in range(20):
            x = batch(seed)
            answers, report = coded.run(x)
            assert torch.allclose(answers, coded.module(x).detach(), atol=1e-5)
            assert not report.strikes
            asked |= set(report.asked)
            if 2 in asked:
                break
        assert 2 in asked
        assert coded._strikes.fresh(2)
        assert not coded._strikes.fresh(0)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"code": codes.ReplicationCode(2, 4)}, "None with a code"),
            ({"workers": LocalWorkers(), "parts": 4}, "None on a pool"),
            *[({"verify": share}, "between 0 and 1") for share in (-0.1, 1.5, math.nan)],
        ],
    )
    def test_are_refused_by_name(self, options, match):
        with pytest.raises(ValueError, match=f"verify must be {match}"):
            CodedWrapper(network(), **{"workers": AtOnce(4), "verify": 0.1} | options)

    def test_another_pool_begins_anew(self):
        coded = wrap(AtOnce(6, wrong(2)))
        coded.run(batch())
        coded.workers = AtOnce(6)
        assert coded._strikes.excluded == set()

    def test_copies_begin_anew_and_hold_no_rows(self):
        coded = wrap(AtOnce(6, seed=1), verify=0.5)
        coded.run(batch())
        other = copy.deepcopy(coded._strikes)
        assert other.scores.recent is None


class TestOutputs:
    @pytest.mark.parametrize(
        "of",
        [lambda y: y.sum(1), lambda y: y.argmax(1), lambda y: (y, y.argmax(1)), lambda y: y > 0],
        ids=["a number a row", "classes", "both", "booleans"],
    )
    @pytest.mark.parametrize("workers", [(), (2,)], ids=["honest", "one wrong"])
    def test_of_any_form_are_verified(self, of, workers):
        class Module(nn.Module):
            def forward(self, x):
                return of(x)

        def spoil(worker, outputs, asked):
            flipped = torch.utils._pytree.tree_map(lambda y: y.flip(0), outputs)
            return flipped if worker in workers else outputs

        coded = CodedWrapper(Module(), workers=AtOnce(6, spoil), verify=0.2)
        for seed in range(5):
            answers, report = coded.run(batch(seed))
        assert set(coded._strikes.excluded) == set(workers)
        want = coded.module(batch(4))
        torch.testing.assert_close(answers, want)
        assert report.verified.any()

    def test_unlike_most_others_are_left_out(self):
        def spoil(worker, outputs, asked):
            return (outputs, outputs) if worker == first else outputs

        pool = AtOnce(6, spoil)
        coded = wrap(pool)
        for first in range(6):
            x = batch(first, 96)
            answers, report = coded.run(x)
            assert torch.allclose(answers, coded.module(x).detach(), atol=1e-6)
            assert report.verified.any()
            assert not report.strikes


def test_a_check_part_of_the_first_ask_is_no_later_part():
    """Of single rows and idle workers, the checks are a part of their own."""
    pool = AtOnce(8, lambda worker, outputs, asked: outputs[:0] if len(outputs) == 1 else outputs)
    coded = CodedWrapper(nn.Identity(), workers=pool, parts=4, verify=1.0)
    answers, report = coded.run(batch(rows=4))
    assert torch.equal(answers, batch(rows=4))
    assert report.source.tolist() == [0] * 4


def test_what_a_worker_writes_into_its_results_after_their_check_reaches_no_answer():
    """A process shares the memory of its results with the caller."""
    sent = []

    class Shared(_AtOnce):
        def close(self):
            for outputs in sent:
                outputs.fill_(13.0)

    class Pool(AtOnce):
        def open(self, module, task):
            return Shared(self, module, task)

    pool = Pool(4, lambda worker, outputs, asked: sent.append(outputs) or outputs)
    answers, report = wrap(pool, verify=1.0).run(batch())
    assert report.verified.all()
    assert torch.allclose(answers, network()(batch()).detach(), atol=1e-6)
