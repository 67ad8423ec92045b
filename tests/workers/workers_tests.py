"""What every pool of workers must do; inherit, say how to make one, and it is tested."""

from __future__ import annotations

import abc
import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import FixedCode, NotEnoughResults
from coded_torch.linear import MatrixMap
from coded_torch.nn import CodedWrapper
from coded_torch.workers import Task, Workers
from coded_torch.workers.base import Reply


class PolynomialCode(FixedCode):
    """A curve of degree K - 1 through the inputs: exact for affine modules, from any K results."""

    @property
    def min_received(self) -> int:
        return self.num_data

    def _make_encoder(self) -> MatrixMap:
        def basis(points):
            return np.polynomial.chebyshev.chebvander(points, self.num_data - 1)

        angles = (np.arange(self.num_data) + 0.5) * np.pi / self.num_data
        worker_angles = (np.arange(self.num_workers) + 0.3) * np.pi / self.num_workers
        return MatrixMap(basis(np.cos(worker_angles)) @ np.linalg.inv(basis(np.cos(angles))))

    def _make_decoder(self, received):
        return MatrixMap(np.linalg.pinv(self.encoder.matrix().numpy()[list(received)]))


class CopyCode(FixedCode):
    """Worker n gets input n, and what is missing is zero: N = K."""

    def _make_encoder(self) -> MatrixMap:
        return MatrixMap(np.eye(self.num_data))

    def _make_decoder(self, received):
        return MatrixMap(np.eye(self.num_data)[:, list(received)])


class Modes(nn.Module):
    """Returns the modes that it runs in."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        product = torch.mm(x, x.new_zeros(x.shape[1], 1))  # autocast casts it
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return product, *(torch.full_like(x, flag) for flag in flags)


class FailsAt(nn.Module):
    """Identity, but for inputs of a certain value something happens."""

    def __init__(self, value: float, happens: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.value, self.happens = value, happens

    def forward(self, x: Tensor) -> Any:
        hit = x == self.value
        return self.happens(x) if hit.any() else x.clone()


def divide_by_zero(x: Tensor) -> Tensor:
    raise ZeroDivisionError(f"boom at {x.flatten().tolist()}")


def nan_at_two(x: Tensor) -> Tensor:
    return torch.where(x == 2.0, torch.nan, x)


def task_of(values: Tensor, *shared: Any, dim: int = 0) -> Task:
    """The task of coded inputs ``values [N, G, ...]`` and arguments that are not coded."""
    leaves, spec = pytree.tree_flatten(((values, *shared), {}))
    dims = [dim] + [None] * (len(leaves) - 1)
    return Task(leaves, dims, spec, values.shape[0], values.shape[1], values.device, out_dims=dim)


def by_worker(replies: list[Reply]) -> dict[int, Any]:
    assert len({reply.worker for reply in replies}) == len(replies)
    return {reply.worker: reply.value for reply in replies}


class WorkersTests(abc.ABC):
    """Inherit, and implement :meth:`make`."""

    #: Do gradients pass through the workers?
    differentiable = True
    #: How many workers a pool of :meth:`make` serves.
    num_workers = 5

    @abc.abstractmethod
    def make(self) -> Workers:
        """A pool in which every worker answers."""

    @pytest.fixture
    def pool(self):
        with self.make() as pool:
            yield pool

    def test_every_worker_answers_with_what_the_module_makes_of_its_payload(self, pool):
        torch.manual_seed(0)
        module, values = nn.Linear(3, 2).double(), torch.randn(self.num_workers, 4, 3).double()
        replies = list(pool.run(module, task_of(values), quorum=self.num_workers))
        assert all(reply.error is None and reply.latency >= 0 for reply in replies)
        got = by_worker(replies)
        assert sorted(got) == list(range(self.num_workers))
        for n, value in got.items():
            torch.testing.assert_close(value, module(values[n]))

    def test_arguments_that_are_not_coded_are_the_same_for_every_worker(self, pool):
        values = torch.arange(self.num_workers * 2.0).reshape(self.num_workers, 2, 1)
        task = task_of(values, torch.tensor([10.0]), 3.0)
        got = by_worker(list(pool.run(_Affine(), task, quorum=self.num_workers)))
        for n, value in got.items():
            torch.testing.assert_close(value, values[n] * 10 + 3)

    def test_a_batch_dimension_other_than_the_first(self, pool):
        values = torch.randn(self.num_workers, 3, 7, 2, generator=torch.Generator().manual_seed(0))
        for dim in (1, -1):
            got = by_worker(list(pool.run(_Shape(), task_of(values, dim=dim), quorum=1)))
            for n, value in got.items():
                torch.testing.assert_close(value, values[n].movedim(0, dim).cumsum(0))

    def test_a_consumer_that_stops_early_disturbs_no_later_request(self, pool):
        for round in range(20):
            values = torch.full((self.num_workers, 2, 1), float(round))
            replies = pool.run(nn.Identity(), task_of(values), quorum=1)
            assert (next(replies).value == round).all()
            replies.close()

    def test_requests_from_several_threads_do_not_mix(self, pool):
        coded = CodedWrapper(nn.Identity(), PolynomialCode(2, self.num_workers), workers=pool)

        def request(i: int) -> bool:
            x = torch.full((3, 2), float(i), dtype=torch.float64)
            return torch.allclose(coded(x), x)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(request, range(60), timeout=60))

    def test_answers_of_an_exact_code_are_those_of_the_module(self, pool):
        torch.manual_seed(1)
        module, x = nn.Linear(4, 3).double(), torch.randn(7, 4).double()
        coded = CodedWrapper(
            module, PolynomialCode(2, self.num_workers), workers=pool, num_stragglers=2
        )
        torch.testing.assert_close(coded(x), module(x), rtol=1e-9, atol=1e-9)
        assert len(coded.last_run.received) == self.num_workers - 2

    def test_gradients_reach_inputs_and_weights(self, pool):
        if not self.differentiable:
            pytest.skip("gradients do not pass through these workers")
        torch.manual_seed(2)
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        wanted = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
        coded = CodedWrapper(module, PolynomialCode(2, self.num_workers), workers=pool)
        coded(x).sum().backward()
        got = [x.grad, *(p.grad for p in module.parameters())]
        torch.testing.assert_close(got, list(wanted), rtol=1e-8, atol=1e-8)

    def test_modes_of_the_caller_hold_in_the_workers(self, pool):
        values = torch.ones(self.num_workers, 1, 1)

        def modes() -> set[tuple[Any, ...]]:
            task = task_of(values)
            replies = list(pool.run(Modes(), task, quorum=self.num_workers))
            assert [reply.error for reply in replies] == [None] * self.num_workers
            return {
                (product.dtype, float(grad), float(inference))
                for product, grad, inference in (reply.value for reply in replies)
            }

        assert modes() == {(torch.float32, 1.0, 0.0)}
        with torch.no_grad():
            assert modes() == {(torch.float32, 0.0, 0.0)}
        with torch.inference_mode():
            assert modes() == {(torch.float32, 0.0, 1.0)}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert modes() == {(torch.bfloat16, 1.0, 0.0)}
        with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
            assert modes() == {(torch.float16, 0.0, 0.0)}
        assert modes() == {(torch.float32, 1.0, 0.0)}

    def test_an_exception_of_the_module_reaches_the_caller(self, pool):
        n = self.num_workers
        coded = CodedWrapper(
            FailsAt(1.0, divide_by_zero), CopyCode(n, n), workers=pool, num_stragglers=0
        )
        x = torch.ones(n, 1)
        with pytest.raises((NotEnoughResults, ZeroDivisionError)) as info:
            coded(x)
        error: BaseException | None = info.value
        while error is not None and not isinstance(error, ZeroDivisionError):
            error = error.__cause__
        assert "boom at [1.0" in str(error)
        # The pool is as good as before.
        assert torch.equal(coded(x * 2), x * 2)

    def test_a_result_that_is_not_finite_is_missing_and_named(self, pool):
        n = self.num_workers
        coded = CodedWrapper(
            FailsAt(2.0, nan_at_two),
            CopyCode(n, n),
            workers=pool,
            num_stragglers=1,
            ordering="arrival",
            shuffle=False,
        )
        x = torch.arange(float(n)).reshape(n, 1)
        out = coded(x)
        assert torch.isfinite(out).all()
        run = coded.last_run
        assert 2 in run.missing
        assert len(run.received) == n - 1
        assert set(run.rejected) <= {2}
        if 2 in run.latencies:
            assert "not finite" in run.rejected[2]

    def test_a_pool_may_be_copied_and_pickled(self, pool):
        values = torch.ones(self.num_workers, 2, 1)
        list(pool.run(nn.Identity(), task_of(values), quorum=1))
        for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
            with twin:
                replies = list(twin.run(nn.Identity(), task_of(values), quorum=1))
                assert len(replies) == self.num_workers

    def test_closing_twice_is_fine_and_leaves_nothing_behind(self):
        before = set(threading.enumerate())
        pool = self.make()
        list(pool.run(nn.Identity(), task_of(torch.ones(self.num_workers, 1, 1)), quorum=1))
        pool.close()
        pool.close()
        assert set(threading.enumerate()) <= before

    def test_a_pool_that_nobody_holds_leaves_nothing_behind(self):
        before = set(threading.enumerate())
        pool = self.make()
        list(pool.run(nn.Identity(), task_of(torch.ones(self.num_workers, 1, 1)), quorum=1))
        del pool
        gc.collect()
        assert set(threading.enumerate()) <= before


class _Affine(nn.Module):
    def forward(self, x: Tensor, factor: Tensor, offset: float) -> Tensor:
        return x * factor + offset


class _Shape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)
