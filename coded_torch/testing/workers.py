"""The tests of every pool of workers: inherit :class:`WorkersTests` and implement ``make``."""

from __future__ import annotations

import abc
import copy
import gc
import math
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.workers import Began, Part, Reply, Request, Workers

from .helpers import (
    WAIT,
    Affine,
    CumulativeSum,
    Doubles,
    DoublesScale,
    FailsAt,
    Gated,
    Modes,
    PolynomialCode,
    autocast,
    by_part,
    divide_by_zero,
    events_of,
    numbered,
    replies_of,
    run,
    task_of,
    until,
)

__all__ = ["WorkersTests", "numbered", "task_of"]


class WorkersTests(abc.ABC):
    """Inherit, and implement :meth:`make`."""

    #: Do gradients pass through the workers?
    differentiable = True
    #: The number of units of a task.
    num_units = 5

    @abc.abstractmethod
    def make(self) -> Workers:
        """A pool in which every part is answered."""

    @pytest.fixture
    def pool(self):
        with self.make() as pool:
            yield pool

    def values(self, num_rows: int = 2) -> Tensor:
        """Units whose rows are all their own number."""
        return torch.arange(float(self.num_units)).reshape(-1, 1, 1).repeat(1, num_rows, 1)

    def test_every_unit_is_answered_with_what_the_module_makes_of_it(self, pool):
        torch.manual_seed(0)
        module = nn.Linear(3, 2).double().requires_grad_(False)
        values = torch.randn(self.num_units, 4, 3).double()
        replies = list(run(pool, module, task_of(values)))
        assert all(reply.error is None and reply.latency >= 0 for reply in replies)
        got = by_part(replies)
        assert sorted(got) == list(range(self.num_units))
        for n, value in got.items():
            torch.testing.assert_close(value, module(values[n]))

    def test_a_part_is_any_number_of_units_and_parts_may_share_them(self, pool):
        values = self.values()
        with pool.open(nn.Identity(), task_of(values)) as request:
            parts = numbered(range(5), (1, 2), (0, 3), (4,), (2, 3, 4))
            request.ask(parts)
            got = by_part(replies_of(request))
        assert len(got) == 5
        for part in parts:
            assert torch.equal(got[part.number], values[list(part.units)].flatten(0, 1))

    def test_a_module_may_change_its_inputs_which_later_parts_have_as_they_were(self, pool):
        values = self.values()
        with pool.open(Doubles(), task_of(values)) as request:
            request.ask(numbered((1,), (2, 3)))
            list(replies_of(request))
            request.ask(numbered((1,), (2, 3), first=2))
            request.ask(numbered((4, 1), first=4))
            got = by_part(replies_of(request))
        assert torch.equal(values, self.values())
        rows = [got[n][:, 0].tolist() for n in (2, 3, 4)]
        assert rows == [[2, 2], [4, 4, 6, 6], [8, 8, 2, 2]]

    def test_each_part_begins_once_and_then_ends_once(self, pool):
        with pool.open(nn.Identity(), task_of(self.values())) as request:
            request.ask(numbered(*([n] for n in range(5)), *([n] for n in range(5))))
            events = events_of(request)
        workers = pool.num_workers or 10
        began: dict[Part, Began] = {}
        for event in events:
            assert 0 <= event.worker < workers
            assert 0 <= event.at <= request.now()
            if isinstance(event, Began):
                assert event.part not in began
                began[event.part] = event
            else:
                start = began[event.part]
                assert event.worker == start.worker
                assert event.latency == pytest.approx(event.at - start.at)
        assert len(began) == 10
        assert len(events) == 20
        if pool.num_workers:  # one at a time
            for worker in range(workers):
                kinds = [type(event) for event in events if event.worker == worker]
                assert kinds == [Began, Reply] * (len(kinds) // 2)

    def test_a_wait_ends_when_nothing_more_can_come(self, pool):
        with pool.open(nn.Identity(), task_of(self.values())) as request:
            start = time.monotonic()
            assert request.wait() is None
            assert request.wait(3600.0) is None
            request.ask(numbered((0,)))
            assert len(replies_of(request)) == 1
            assert request.wait() is None
            assert time.monotonic() - start < WAIT

    def test_arguments_that_are_not_divided_are_the_same_for_every_part(self, pool):
        values = torch.arange(self.num_units * 2.0).reshape(self.num_units, 2, 1)
        got = by_part(list(run(pool, Affine(), task_of(values, torch.tensor([10.0]), 3.0))))
        for n, value in got.items():
            torch.testing.assert_close(value, values[n] * 10 + 3)

    def test_a_module_may_change_shared_arguments_which_later_parts_have_as_they_were(self, pool):
        values = self.values()
        scale = torch.tensor([10.0])
        got = by_part(list(run(pool, DoublesScale(), task_of(values, scale))))
        assert scale.tolist() == [10.0]
        for n, value in got.items():
            torch.testing.assert_close(value, values[n] * 20)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
    def test_units_need_not_be_floating_point(self, pool, dtype):
        values = self.values().to(dtype)
        got = by_part(list(run(pool, nn.Identity(), task_of(values))))
        assert len(got) == self.num_units
        for n, value in got.items():
            assert value.dtype == dtype
            assert torch.equal(value, values[n])

    def test_a_batch_dimension_other_than_the_first(self, pool):
        values = torch.randn(self.num_units, 3, 7, 2, generator=torch.Generator().manual_seed(0))
        for dim in (1, -1):
            got = by_part(list(run(pool, CumulativeSum(), task_of(values, dim=dim))))
            for n, value in got.items():
                torch.testing.assert_close(value, values[n].movedim(0, dim).cumsum(0))

    def test_a_consumer_that_stops_early_disturbs_no_later_request(self, pool):
        for round in range(20):
            values = torch.full((self.num_units, 2, 1), float(round))
            replies = run(pool, nn.Identity(), task_of(values))
            assert (next(replies).value == round).all()
            replies.close()

    def test_requests_from_several_threads_do_not_mix(self, pool):
        def request(i: int) -> bool:
            values = torch.full((self.num_units, 2, 1), float(i))
            got = by_part(list(run(pool, nn.Identity(), task_of(values), deadline=WAIT)))
            return len(got) == self.num_units and all((v == i).all() for v in got.values())

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(request, range(60), timeout=WAIT))

    def begin_all(self, pool: Workers, folder: Path, extra: int) -> Request:
        """A request that keeps every worker at a part, and has ``extra`` more that wait."""
        if pool.num_workers is None:
            pytest.skip("a worker is free for every part")
        workers = pool.num_workers
        task = task_of(torch.arange(1.0 + workers + extra).reshape(-1, 1, 1))
        request = pool.open(Gated(str(folder)), task)
        request.ask(numbered(*([n] for n in range(workers + extra))))
        begun = [request.wait(WAIT) for _ in range(workers)]
        assert sorted(event.worker for event in begun) == list(range(workers))
        assert request.idle == 0
        until(lambda: len(list(folder.iterdir())) == workers)
        return request

    def test_closing_drops_what_has_not_begun_and_no_late_result_is_used(self, pool, tmp_path):
        request = self.begin_all(pool, tmp_path, extra=3)
        request.close()
        request.close()
        assert request.wait(WAIT) is None
        with pytest.raises(RuntimeError, match="the request is closed"):
            request.ask(numbered((0,), first=99))
        (tmp_path / "open").touch()
        for i in range(10):
            values = torch.full((7, 1, 1), 100.0 + i)
            got = by_part(list(run(pool, nn.Identity(), task_of(values), deadline=WAIT)))
            assert len(got) == 7
            assert all((value == 100 + i).all() for value in got.values())
        assert request.wait(WAIT) is None
        ran = {path.name for path in tmp_path.iterdir()} - {"open"}
        assert ran == {str(n) for n in range(pool.num_workers)}

    def test_dropped_parts_never_begin_or_go_on_and_then_workers_are_idle(self, pool, tmp_path):
        with self.begin_all(pool, tmp_path, extra=4) as request:
            first = pool.num_workers
            request.drop([Part(n, (n,)) for n in (*range(first), first + 1, first + 3)])
            (tmp_path / "open").touch()
            kept = {*range(first), first, first + 2}
            assert set(by_part(replies_of(request))) == kept
            until(lambda: request.idle == first)
        assert {path.name for path in tmp_path.iterdir()} - {"open"} == set(map(str, kept))

    def test_a_wait_ends_at_its_time(self, pool, tmp_path):
        with self.begin_all(pool, tmp_path, extra=1) as request:
            end = request.now() + 0.05
            assert request.wait(end) is None
            assert end <= request.now() < end + WAIT / 2
            assert request.wait(0.0) is None
            (tmp_path / "open").touch()

    def test_workers_at_earlier_tasks_are_named(self, pool, tmp_path):
        with self.begin_all(pool, tmp_path, extra=0) as earlier:
            assert earlier.status() == ""
            with pool.open(nn.Identity(), task_of(self.values())) as request:
                request.ask(numbered((0,)))
                assert request.wait(0.01) is None
                assert f"{pool.num_workers} of {pool.num_workers} " in request.status()
                assert "are at earlier tasks" in request.status()
                (tmp_path / "open").touch()
                assert len(replies_of(request)) == 1
                assert request.status() == ""

    def test_parts_avoid_a_worker(self, pool):
        if pool.num_workers == 1:
            pytest.skip("there is no other worker")
        with pool.open(nn.Identity(), task_of(self.values())) as request:
            parts = [Part(n, (n % 5,), avoid=frozenset({1 - n % 2})) for n in range(2, 12)]
            request.ask(parts)
            request.ask(numbered((0,), first=20))
            events = events_of(request)
        assert len(events) == 22
        assert all(event.worker not in {-1, *event.part.avoid} for event in events)

    def test_parts_whose_only_worker_they_must_avoid_fail(self, pool):
        last = (pool.num_workers or 1) - 1
        if last and pool.exclude is None:
            pytest.skip("all workers are left")
        pool.start()
        with pool.open(nn.Identity(), task_of(self.values())) as request:
            for place in range(last):
                pool.exclude(place)
            request.ask([Part(last, (0,), avoid=frozenset({last})), Part(last + 1, (1,))])
            replies = {reply.part.number: reply for reply in replies_of(request)}
            for place in range(last):
                pool.restart(place)
            until(lambda: not last or request.idle == last + 1)
        assert replies[last + 1].error is None
        failed = replies[last]
        assert (failed.worker, failed.latency) == (-1, math.inf)
        assert str(failed.error) == (
            f"part {last} did not start: it avoids all workers that are left"
        )

    def test_answers_of_an_exact_code_are_those_of_the_module(self, pool):
        torch.manual_seed(1)
        module = nn.Linear(4, 3).double().requires_grad_(False)
        x, code = torch.randn(7, 4).double(), PolynomialCode(2, self.num_units)
        coded = CodedWrapper(module, code, workers=pool, waiting=Waiting.first(2))
        torch.testing.assert_close(coded(x), module(x), rtol=1e-9, atol=1e-9)
        assert coded.last_run.ended == "enough_results"

    def test_gradients_reach_inputs_and_weights(self, pool):
        if not self.differentiable:
            pytest.skip("gradients do not pass through these workers")
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
        x = torch.randn(self.num_units, 2, 3, dtype=torch.float64, requires_grad=True)
        wanted = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
        sum(reply.value.sum() for reply in run(pool, module, task_of(x))).backward()
        got = [x.grad, *(p.grad for p in module.parameters())]
        torch.testing.assert_close(got, list(wanted), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("by", ["grad", "jvp", "duals"])
    def test_derivatives_of_other_kinds_are_right_or_refused(self, pool, by):
        module = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double().requires_grad_(False)
        coded = CodedWrapper(module, workers=pool, parts=self.num_units)
        x = torch.rand(2 * self.num_units, 3, dtype=torch.float64)

        def derivative(f: Any) -> Any:
            if by == "grad":
                return torch.func.grad(lambda x: f(x).square().sum())(x)
            if by == "jvp":
                return torch.func.jvp(f, (x,), (x,))[1]
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent

        if pool.simulated or (by == "duals" and self.differentiable):
            torch.testing.assert_close(derivative(coded), derivative(module))
            return
        with pytest.raises(RuntimeError, match=r"require gradients|transform of torch\.func"):
            derivative(coded)

    def test_modes_of_the_caller_hold_in_the_workers(self, pool):
        values = torch.ones(self.num_units, 1, 1)

        def modes() -> set[tuple[Any, ...]]:
            replies = list(run(pool, Modes(), task_of(values)))
            assert [reply.error for reply in replies] == [None] * self.num_units
            found = [reply.value for reply in replies]
            assert {new.dtype for *_, new in found} == {torch.get_default_dtype()}
            return {(x.dtype, float(grad), float(inference)) for x, grad, inference, _ in found}

        assert modes() == {(torch.float32, 1.0, 0.0)}
        with torch.no_grad():
            assert modes() == {(torch.float32, 0.0, 0.0)}
        with torch.inference_mode():
            assert modes() == {(torch.float32, 0.0, 1.0)}
        with autocast(torch.bfloat16):
            assert modes() == {(torch.bfloat16, 1.0, 0.0)}
        with autocast(torch.float16), torch.no_grad():
            assert modes() == {(torch.float16, 0.0, 0.0)}
        torch.set_default_dtype(torch.float64)
        try:
            assert modes() == {(torch.float32, 1.0, 0.0)}
        finally:
            torch.set_default_dtype(torch.float32)
        assert modes() == {(torch.float32, 1.0, 0.0)}

    def test_an_exception_of_the_module_reaches_the_caller(self, pool):
        def first_error() -> BaseException | None:
            try:
                replies = list(run(pool, FailsAt(1.0, divide_by_zero), task_of(self.values())))
            except ZeroDivisionError as error:
                return error
            assert len(replies) == self.num_units
            (failed,) = [reply for reply in replies if reply.error is not None]
            assert failed.part.units == (1,)
            assert (failed.error.part, failed.error.worker) == (1, failed.worker)
            assert failed.error.kind == "raised"
            return failed.error

        error = first_error()
        while error is not None and not isinstance(error, ZeroDivisionError):
            error = error.__cause__
        assert "boom at [" in str(error)
        # The pool is as good as before.
        assert len(list(run(pool, nn.Identity(), task_of(self.values())))) == self.num_units

    def test_a_pool_may_be_copied_and_pickled(self, pool):
        values = torch.ones(self.num_units, 2, 1)
        next(run(pool, nn.Identity(), task_of(values)))
        for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
            with twin:
                replies = list(run(twin, nn.Identity(), task_of(values)))
                assert len(replies) == self.num_units
                assert twin.num_workers == pool.num_workers

    def test_closing_twice_is_fine_and_leaves_nothing_behind(self):
        before = set(threading.enumerate())
        pool = self.make()
        list(run(pool, nn.Identity(), task_of(self.values())))
        pool.close()
        pool.close()
        assert set(threading.enumerate()) <= before
        if not pool.simulated:
            with pytest.raises(RuntimeError, match="the pool is closed"):
                pool.open(nn.Identity(), task_of(self.values()))

    def test_parts_that_are_asked_of_a_closed_pool_fail(self):
        pool = self.make()
        if pool.simulated:
            pytest.skip("there is nothing to close")
        with pool.open(nn.Identity(), task_of(self.values())) as request:
            pool.close()
            request.ask(numbered((0,)))
            (reply,) = replies_of(request)
        assert str(reply.error) == "part 0 did not start: the pool was closed"
        assert (reply.worker, reply.latency) == (-1, math.inf)

    def test_closing_the_pool_ends_requests_that_wait(self, tmp_path):
        with self.make() as pool, self.begin_all(pool, tmp_path, extra=2) as request:
            threading.Timer(0.1, (tmp_path / "open").touch).start()
            pool.close()
            errors = {reply.part.number: str(reply.error) for reply in replies_of(request)}
        assert len(errors) == pool.num_workers + 2
        for n in range(pool.num_workers, pool.num_workers + 2):
            assert errors[n] == f"part {n} did not start: the pool was closed"

    def test_a_pool_that_nothing_holds_leaves_nothing_behind(self):
        before = set(threading.enumerate())
        pool = self.make()
        list(run(pool, nn.Identity(), task_of(self.values())))
        del pool
        gc.collect()
        assert set(threading.enumerate()) <= before
