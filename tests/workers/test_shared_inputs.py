"""Inputs that are encoded where the processes read them: once, and never under a late one."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import nn

from coded_torch.codes import ReplicationCode, SplineCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.testing.workers import WAIT, Gated, numbered, replies_of, task_of, until
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers
from coded_torch.workers._supervised.pickles import Pickled

from .modules import Doubles, Remembers

COLUMNS = 10_000  # so many that the memory of the pool is used


def values(*numbers: float, pool: ProcessWorkers) -> torch.Tensor:
    """``[U, 1, COLUMNS]`` in the memory of the pool, one number a unit."""
    memory = pool.memory(len(numbers) * COLUMNS * 4)
    assert memory is not None
    coded = memory.view(torch.float32).view(len(numbers), 1, COLUMNS)
    return coded.copy_(torch.tensor(numbers)[:, None, None].expand_as(coded))


def free(pool: ProcessWorkers) -> list[bool]:
    """Of each piece of memory that the pool has, whether nothing refers to it."""
    return [buffer.is_free() for buffer in pool._supervisor._inputs._buffers._buffers]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pool():
    with ProcessWorkers(3, grace=WAIT).start(timeout=WAIT) as pool:
        yield pool


def test_what_lies_there_is_not_written_again(pool):
    x = values(1, 2, 3, pool=pool)
    find = pool._supervisor._inputs.find
    for tensor in (x, x[1], x[:, 0, 5:7], x.movedim(0, 2)):
        pickled = Pickled((tensor, 3), find=find)
        assert pickled.tensors == []
        assert pickled.size < 1000
        assert pickled.inputs.tensor is tensor
    other = Pickled((x.clone(), x), find=find)
    assert len(other.tensors) == 1
    assert find(torch.zeros(3)) is None


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_modules_get_the_inputs_as_they_are(pool, dim):
    x = values(1, 2, 3, pool=pool)
    x += torch.arange(COLUMNS) / COLUMNS
    for reply in pool.run(nn.Identity(), task_of(x, dim=dim)):
        assert reply.error is None
        assert torch.equal(reply.value, x[reply.part.number].movedim(0, dim))


@pytest.mark.parametrize(
    "code", [SplineCode(4, 6), ReplicationCode(4, 6)], ids=["mixes", "repeats"]
)
@pytest.mark.parametrize("inputs", [1, 2])
def test_wrappers_encode_there(pool, code, inputs):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(7, COLUMNS, generator=generator).to(torch.float64) for _ in range(inputs)]
    module = Doubles()
    taken = []

    class Watched(FaultyWorkers):
        def memory(self, num_bytes):
            taken.append(num_bytes)
            return super().memory(num_bytes)

    options = {"code": code, "ordering": "arrival", "waiting": Waiting.first()}
    here = CodedWrapper(module, workers=LocalWorkers(), **options)
    there = CodedWrapper(module, workers=Watched(pool), **options)
    for _ in range(5):
        torch.testing.assert_close(there(*x), here(*x), rtol=0, atol=1e-12)
    assert taken == [6 * 2 * COLUMNS * 8 * inputs] * 5
    until(lambda: all(free(pool)))


def test_what_a_module_writes_to_its_inputs_is_seen_by_no_other():
    with ProcessWorkers(2, grace=WAIT).start(timeout=WAIT) as pool:
        x = values(1, 2, pool=pool)
        module = Doubles(in_place=True)
        for _ in range(3):  # the same units again and again, in both processes
            with pool.open(module, task_of(x)) as request:
                request.ask(numbered((0, 1), (0,), (1,), (0, 1)))
                for reply in replies_of(request):
                    units = list(reply.part.units)
                    assert torch.equal(reply.value, 2 * torch.tensor([1.0, 2.0])[units, None]
                                       .expand(-1, COLUMNS))  # fmt: skip
        assert torch.equal(x[:, 0, 0], torch.tensor([1.0, 2.0]))


def test_memory_that_a_late_process_reads_is_not_written(tmp_path):
    with ProcessWorkers(1, grace=WAIT).start(timeout=WAIT) as pool:
        x = values(7, pool=pool)
        place = x.data_ptr()
        with pool.open(Gated(str(tmp_path)), task_of(x)) as request:
            request.ask(numbered((0,)))
            until(lambda: (tmp_path / "7").exists())
        del x, request  # the call is over, and nothing here holds its inputs any more
        assert free(pool) == [False]
        later = values(8, pool=pool)
        assert later.data_ptr() != place
        (tmp_path / "open").touch()
        until(lambda: pool._supervisor.num_idle == 1)
        assert values(9, pool=pool).data_ptr() == place


def test_memory_is_free_when_its_reader_is_dead():
    with ProcessWorkers(1, grace=WAIT).start(timeout=WAIT) as pool:
        x = values(7, pool=pool)
        place = x.data_ptr()
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        with pool.open(nn.Identity(), task_of(x)) as request:
            request.ask(numbered((0,)))
        del x, request
        assert free(pool) == [False]
        os.kill(pid, signal.SIGKILL)
        until(lambda: free(pool) == [True])
        assert values(9, pool=pool).data_ptr() == place


def test_inputs_that_a_module_keeps_are_not_written():
    module = Remembers()
    with ProcessWorkers(1) as pool:
        seen = []
        for i in range(6):
            (reply,) = pool.run(module, task_of(values(float(i), pool=pool)))
            seen.append(float(reply.value[0, 0]))
        assert seen == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0]
        assert len(free(pool)) <= 3


def test_answers_that_are_held_stay_what_they_are(pool):
    coded = CodedWrapper(nn.Identity(), ReplicationCode(3, 3), workers=pool, ordering="arrival")
    answers = []
    for i in range(10):
        x = torch.full((3, COLUMNS), float(i))
        answers.append((coded(x), x))
    for answer, x in answers:
        assert torch.equal(answer, x)


def test_without_memory_that_is_free_inputs_are_copied():
    with ProcessWorkers(1).start(timeout=WAIT) as pool:
        held = [pool.memory(1) for _ in range(64)]
        assert None not in held
        assert pool.memory(1) is None
        coded = CodedWrapper(nn.Identity(), SplineCode(2, 3), workers=pool, ordering="arrival")
        x = torch.randn(2, COLUMNS * 2, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(coded(x), x, rtol=0, atol=1e-5)


def test_larger_inputs_take_the_place_of_smaller_ones(pool):
    for size in (1 << 17, 1 << 20, 1 << 18, 1 << 21):
        x = torch.arange(2.0 * size).view(2, size)
        coded = CodedWrapper(nn.Identity(), ReplicationCode(2, 3), workers=pool,
                             waiting=Waiting.first(), ordering="arrival")  # fmt: skip
        assert torch.equal(coded(x), x)
    until(lambda: all(free(pool)))


def test_nothing_is_mixed_while_processes_are_killed_and_stopped():
    """Every call has inputs of its own; many are answered while others are late or die."""
    x = [torch.full((4, COLUMNS), float(i)) for i in range(8)]
    with ProcessWorkers(4, grace=0.2).start(timeout=WAIT) as pool:
        coded = CodedWrapper(Doubles(in_place=True), ReplicationCode(4, 8), workers=pool,
                             waiting=Waiting.first(2), ordering="arrival")  # fmt: skip
        end = time.monotonic() + 3.0
        for i in range(200):
            if i % 20 == 5:
                os.kill(pool.pids[0], signal.SIGSTOP)  # killed when its grace is over
            if i % 20 == 15 and len(pool.pids) == 4:
                os.kill(pool.pids[-1], signal.SIGKILL)
            answer = coded(x[i % 8])
            # Where both copies of an input are lost, it is the mean of equal results.
            torch.testing.assert_close(answer, 2 * x[i % 8], rtol=0, atol=1e-3)
            if time.monotonic() > end:
                break


def test_a_closed_pool_has_no_memory():
    before = len(os.listdir("/proc/self/fd"))
    with ProcessWorkers(1).start(timeout=WAIT) as pool:
        held = values(7, pool=pool)
        assert all(reply.error is None for reply in pool.run(nn.Identity(), task_of(held)))
    assert free(pool) == []
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # of the server, if it is the first
    assert float(held.sum()) == 7 * COLUMNS
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.memory(1)
