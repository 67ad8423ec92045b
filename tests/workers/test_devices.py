"""Workers on devices; two replicas on the CPU stand for two devices."""

import copy
import gc
import re
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from coded_torch.codes import NotEnoughResults
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.testing.helpers import CopyCode
from coded_torch.testing.workers import (
    FailsAt,
    PolynomialCode,
    WorkersTests,
    events_of,
    numbered,
    replies_of,
    run,
    task_of,
    until,
)
from coded_torch.workers import Began, DeviceWorkers, LocalWorkers, Part, ProcessWorkers

from ..nn.modules import Call

WAIT = 30.0  # bounds waits that end at once unless something is broken


@pytest.mark.parametrize(
    "pool", [LocalWorkers(), DeviceWorkers(["cpu"]), ProcessWorkers(1)], ids=str
)
def test_the_derivative_by_a_tensor_that_a_module_holds_is_right_or_refused(pool):
    x = torch.rand(4, 3)

    def total(factor):
        with pool:
            return CodedWrapper(Call(lambda x: x * factor), workers=pool, parts=2)(x).sum()

    if pool.simulated:
        torch.testing.assert_close(torch.func.grad(total)(x[0]), x.sum(0))
        return
    with pytest.raises(RuntimeError, match=r"require gradients|transform of torch\.func"):
        torch.func.grad(total)(x[0])


@pytest.mark.parametrize("by", ["jit", "make_fx", "pre_dispatch", "fake", "export"])
@pytest.mark.parametrize(
    "pool", [LocalWorkers(), DeviceWorkers(["cpu"]), ProcessWorkers(1)], ids=str
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_right_or_refused(pool, by):
    module, x, other = nn.Linear(3, 2), torch.rand(4, 3), torch.rand(4, 3)
    coded = CodedWrapper(module, workers=pool, parts=2)
    how = {"pre_dispatch": {"pre_dispatch": True}, "fake": {"tracing_mode": "fake"}}

    def traced():
        if by == "jit":
            return torch.jit.trace(coded, x)
        if by == "export":
            return torch.export.export(coded, (x,), strict=False).module()
        return make_fx(coded, **how.get(by, {}))(x)

    with pool, torch.no_grad():
        if not pool.simulated:
            with pytest.raises(RuntimeError, match=r"must not be traced by .*; use LocalWorkers$"):
                traced()
        elif by in ("jit", "make_fx", "pre_dispatch"):
            torch.testing.assert_close(traced()(other), module(other))
        else:  # without values, nobody knows whether they are finite
            with pytest.raises(GuardOnDataDependentSymNode):
                traced()


class TestDeviceWorkers(WorkersTests):
    def make(self) -> DeviceWorkers:
        return DeviceWorkers(["cpu", "cpu"])

    def test_a_part_waits_for_another_worker_than_tried_it(self, pool, tmp_path):
        with self.begin_all(pool, tmp_path, extra=0) as earlier:
            with pool.open(nn.Identity(), task_of(self.values())) as request:
                tried = [frozenset({0}), frozenset({1}), frozenset({0, 1})]
                request.ask([Part(n, (n,), tried=some) for n, some in enumerate(tried)])
                (tmp_path / "open").touch()
                workers = {reply.part.number: reply.worker for reply in replies_of(request)}
            assert (workers[0], workers[1]) == (1, 0)
            assert workers[2] in (0, 1)
            replies_of(earlier)
            pool.exclude(1)
            with pool.open(nn.Identity(), task_of(self.values())) as request:
                request.ask([Part(0, (0,), tried=frozenset({0}))])  # no other is left
                assert [reply.worker for reply in replies_of(request)] == [0]


class TestOneDevice(WorkersTests):
    def make(self) -> DeviceWorkers:
        return DeviceWorkers([torch.device("cpu")])


@pytest.mark.cuda
class TestCudaDeviceWorkers(WorkersTests):
    def make(self) -> DeviceWorkers:
        return DeviceWorkers(["cuda", "cuda", "cpu"])


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


def units(*values: float):
    """The task of units of one row."""
    return task_of(column(*values).unsqueeze(1))


def first(num_stragglers: int = 0, deadline: float | None = None) -> Waiting:
    return Waiting.first(num_stragglers, deadline=deadline)


class MuteError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "reason"),
    [(SystemExit("bye"), "SystemExit: bye"), (MuteError(), ".*MuteError: <.*failed>")],
    ids=["exit", "unprintable"],
)
def test_no_exception_ends_a_thread(error, reason):
    def fail(x: Tensor) -> Tensor:
        raise error

    with DeviceWorkers(["cpu"]) as pool:
        for _ in range(3):
            replies = {r.part.number: r for r in run(pool, FailsAt(0.0, fail), units(0, 1))}
            assert re.match(f"worker 0 failed on cpu: {reason}", str(replies[0].error))
            assert replies[1].error is None


def test_a_module_is_new_to_each_device_once_and_start_runs_it_there():
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    seen: set[int] = set()
    with DeviceWorkers(["cpu", "cpu"]).start(other, torch.ones(4, 3)) as pool:
        for _ in range(20):
            with pool.open(module, task_of(torch.ones(3, 1, 3))) as request:
                assert request.idle <= 2
                request.ask(numbered((0,), (1,), (2,)))
                for event in events_of(request):
                    if isinstance(event, Began):
                        assert event.fresh == (event.worker not in seen)
                        seen.add(event.worker)
        with pool.open(other, task_of(torch.ones(2, 1, 3))) as request:
            request.ask(numbered((0,), (1,)))
            assert not any(event.fresh for event in events_of(request) if isinstance(event, Began))


@pytest.mark.parametrize("path", ["", "0"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_module_that_is_compiled_as_a_whole_is_refused_unharmed(path, in_place):
    linear = nn.Linear(1, 1)
    if in_place:
        linear.compile(backend="eager")
    compiled = linear if in_place else torch.compile(linear, backend="eager")
    module = nn.Sequential(compiled) if path else compiled
    refusal = pytest.raises(TypeError, match=f"{path or 'the module'} must not be compiled")
    with DeviceWorkers(["cpu"]) as pool, refusal:
        pool.open(module, units(0, 1))
    assert len(list(linear.parameters())) == 2
    assert module(column(0, 1)).shape == (2, 1)


def test_a_compiled_forward_is_compiled_once_for_all_replicas():
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Double(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), 2.0))

        @torch.compile(backend=backend)
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    with DeviceWorkers(["cpu"]) as pool:
        coded = CodedWrapper(Double(), CopyCode(2, 2), workers=pool, waiting=first())
        coded(column(1, 2))  # the proof of rows has parts of other sizes, which are compiled, too
        compiled = len(graphs)
        for _ in range(4):
            assert coded(column(1, 2)).flatten().tolist() == [2.0, 4.0]
    assert len(graphs) == compiled <= 3


def test_a_pool_does_not_wait_for_itself():
    with DeviceWorkers(["cpu"]) as pool, DeviceWorkers(["cpu"]) as other:
        inner = CodedWrapper(nn.Identity(), CopyCode(1, 1), workers=pool)
        outer = CodedWrapper(
            inner, PolynomialCode(1, 1), workers=pool, waiting=first(deadline=WAIT)
        )
        with pytest.raises(NotEnoughResults) as info:
            outer(column(1))
        why = "DeviceWorkers: requests must not come from a thread of the pool"
        assert why in str(info.value.__cause__)
        outer.workers = other
        assert outer(column(1)).item() == pytest.approx(1.0)


def test_an_idle_pool_keeps_no_batch_and_no_module_alive():
    with DeviceWorkers(["cpu", "cpu"]) as pool:
        module, values = nn.Linear(1, 1), torch.ones(4, 1, 1)
        kept = [weakref.ref(module), weakref.ref(values)]
        replies = list(run(pool, module, task_of(values)))
        del module, values, replies
        deadline = time.monotonic() + WAIT
        while any(ref() is not None for ref in kept) and time.monotonic() < deadline:
            gc.collect()
        assert [ref() for ref in kept] == [None, None]


def test_replicas_see_the_module_as_it_is():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.weight = 1.0, nn.Parameter(torch.ones(1))
            self.empty = nn.Sequential()  # falsy
            self.absent = None
            self.register_parameter("bias", None)

        def forward(self, x: Tensor) -> Tensor:
            assert self.empty is not None
            assert self.bias is None
            return self.empty(x * self.scale * next(self.parameters())) * (
                2 if self.training else 1
            )

    module, seen = Scale(), []
    module.register_forward_hook(lambda _, args, out: seen.append(out))
    with DeviceWorkers(["cpu", "cpu"]) as pool:
        coded = CodedWrapper(module, CopyCode(2, 2), workers=pool, waiting=first()).eval()
        assert coded(column(1, 2)).flatten().tolist() == [1.0, 2.0]
        assert len(seen) == 4  # with the two parts that prove the rows
        module.scale = 3.0
        assert coded(column(1, 2)).flatten().tolist() == [3.0, 6.0]
        with torch.no_grad():
            module.weight.mul_(2.0)
        assert coded(column(1, 2)).flatten().tolist() == [6.0, 12.0]
        module.weight = nn.Parameter(torch.zeros(1))
        coded.train()
        assert coded(column(1, 2)).flatten().tolist() == [0.0, 0.0]


def test_traced_and_scripted_modules_have_replicas():
    plain, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(8, 3)
    with DeviceWorkers(["cpu", "cpu"]) as pool:
        for module in torch.jit.trace(plain, x), torch.jit.script(plain):
            torch.testing.assert_close(CodedWrapper(module, workers=pool)(x), plain(x))


def test_replicas_keep_their_attributes_and_may_be_recurrent():
    class Remembers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.memory = x
            return self.memory * 2

    module, lstm = nn.Sequential(Remembers()), nn.LSTM(3, 2, batch_first=True)
    x, series = torch.arange(64.0).reshape(64, 1), torch.randn(4, 5, 3)
    with DeviceWorkers(["cpu", "cpu"]) as pool:
        assert torch.equal(CodedWrapper(module, CopyCode(64, 64), workers=pool)(x), x * 2)
        coded = CodedWrapper(lstm, CopyCode(4, 4), workers=pool, out_dims=(0, 1))
        torch.testing.assert_close(coded(series), lstm(series))
    assert not hasattr(module[0], "memory")


class TestCopies:
    """Tensors elsewhere are copied when needed: seen on the meta device, which costs nothing."""

    @pytest.fixture
    def replica(self):
        from coded_torch.workers._devices import _Replica

        return _Replica(torch.device("meta"))

    def test_a_copy_is_kept_while_the_original_stays(self, replica):
        module = nn.Linear(2, 2)
        with torch.no_grad():
            first, second = replica._replicate(module, {}), replica._replicate(module, {})
            assert first.weight.device.type == "meta"
            assert first.weight is second.weight
            module.weight.add_(1)
            third = replica._replicate(module, {})
            assert third.weight is not first.weight
            assert third.bias is first.bias
            third.bias.add_(1)  # a buffer that a replica changes
            assert replica._replicate(module, {}).bias is not third.bias
            module.weight.data = torch.zeros(2, 2)
            assert replica._replicate(module, {}).weight is not third.weight

    def test_gradients_flow_through_a_copy_of_its_own(self, replica):
        module = nn.Linear(2, 2)
        module.bias.requires_grad_(False)
        first, second = replica._replicate(module, {}), replica._replicate(module, {})
        assert first.weight.grad_fn is not None
        assert first.weight is not second.weight
        assert first.bias is second.bias

    def test_tied_parameters_stay_tied(self, replica):
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1].weight = module[0].weight
        copy = replica._replicate(module, {})
        assert copy[0].weight is copy[1].weight
        assert copy[1].weight.device.type == "meta"

    def test_copies_made_in_inference_mode_serve_outside_of_it(self, replica):
        module = nn.Linear(2, 2).requires_grad_(False)
        with torch.inference_mode():
            inside = replica._replicate(module, {})
            assert not inside.weight.is_inference()
        assert replica._replicate(module, {}).weight is inside.weight


@pytest.mark.cuda
@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_of_a_batch_on_cuda(enabled):
    """In single precision and under autocast, whose cache of weights knows no streams."""
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).cuda()
    with DeviceWorkers(["cuda", "cuda"]) as pool:
        coded = CodedWrapper(module, CopyCode(4, 4), workers=pool, waiting=first(0))
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(200, 64, generator=generator).cuda().requires_grad_()
            parameters = [x, *module.parameters()]
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                wanted, out = module(x), coded(x)
            torch.testing.assert_close(
                torch.autograd.grad(out.float().sum(), parameters),
                torch.autograd.grad(wanted.float().sum(), parameters),
                rtol=0.05 if enabled else 1e-4,
                atol=0.5 if enabled else 1e-3,
            )


@pytest.mark.cuda
def test_a_module_that_raises_has_read_its_weights_when_its_error_arrives():
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2048, 2048, device="cuda"), requires_grad=False)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            # Long enough for the caller, who need not wait, to be there before the last product.
            self.seen.append(x @ (self.weight @ self.weight) @ self.weight)
            raise ZeroDivisionError

    module, values = Raises(), torch.ones(1, 1, 2048, device="cuda")
    with DeviceWorkers(["cuda"]) as pool:
        (reply,) = run(pool, module, task_of(values))
        module.weight.zero_()
        assert isinstance(reply.error.__cause__, ZeroDivisionError)
        torch.cuda.synchronize()
        assert bool((module.seen[0] > 0).all())


def test_threads_come_and_go():
    with DeviceWorkers(["cpu"]) as pool:
        threads = threading.active_count()
        pool.resize(3)
        together = threading.Barrier(3, timeout=WAIT)
        meet = Call(lambda x: (together.wait(), x)[1])
        replies = list(run(pool, meet, task_of(torch.ones(3, 1, 1))))
        assert {reply.worker for reply in replies} == {0, 1, 2}
        assert threading.active_count() == threads + 2
        assert copy.copy(pool).num_workers == 3
        pool.drain(0)
        pool.resize(1)
        until(lambda: threading.active_count() == threads)
        replies = list(run(pool, nn.Identity(), task_of(torch.ones(4, 1, 1))))
        assert {reply.worker for reply in replies} == {1}
        assert pool.num_workers == 1


def test_each_worker_starts_with_the_example_as_it_is():
    example = torch.tensor([0, 1])
    with DeviceWorkers(["cpu"] * 4) as pool:
        pool.start(Call(lambda ids: torch.eye(3)[ids.add_(1)]), example)
    assert example.tolist() == [0, 1]
