"""Calls for many batches: their order, their number at once, and their end."""

import gc
import inspect
import os
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.testing.helpers import until
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .modules import Call


class Gated(nn.Module):
    """Doubles its input after the gate of its first value has opened, if it has one."""

    def __init__(self):
        super().__init__()
        self.gates, self.running = {}, []  # replicas of the module share them

    def forward(self, x):
        self.running.append(len(self.running) + 1)
        if (gate := self.gates.get(int(x[0, 0]))) is not None:
            assert gate.wait(30)
        if (x == 13).any():
            raise IndexError("thirteen")
        return 2 * x


@pytest.fixture
def model():
    return Gated().eval()


@pytest.fixture
def coded(model):
    """A wrapper on four workers, whose calls have one part."""
    with DeviceWorkers(["cpu"] * 4) as pool, torch.no_grad():
        yield CodedWrapper(model, workers=pool, parts=1, waiting=Waiting(estimate=False))
        for gate in model.gates.values():
            gate.set()


def batches(count):
    return (torch.full((2, 1), float(i)) for i in range(count))


def test_answers_come_in_order_and_equal_those_of_single_calls(coded, model):
    model.gates[0] = threading.Event()
    most = []

    def release():  # waits until the others in flight have run
        until(lambda: len(model.running) >= 4)
        most.append(len(model.running))
        model.gates[0].set()

    threading.Thread(target=release).start()
    found = list(coded.map(batches(12), in_flight=4))
    assert most == [4]  # the fifth waits until the first has been handed on
    assert [answers[0, 0].item() for answers, _ in found] == [2.0 * i for i in range(12)]
    assert all(report.ended == "complete" for _, report in found)


def test_a_call_may_have_several_arguments_and_a_policy_of_its_own():
    coded = CodedWrapper(Call(torch.add), workers=LocalWorkers(), parts=2)
    pairs = [(torch.ones(4, 1), torch.full((4, 1), float(i))) for i in range(3)]
    found = list(coded.map(pairs, waiting=Waiting(estimate=False, deadline=9.0)))
    assert [answers[0, 0].item() for answers, _ in found] == [1.0, 2.0, 3.0]
    assert all(report.deadline == 9.0 for _, report in found)


def test_no_batch_is_taken_early_or_kept(coded):
    alive = weakref.WeakSet()

    def counted():
        for batch in batches(12):
            alive.add(batch)
            yield batch

    most = 0
    for answers, _ in coded.map(counted(), in_flight=3):
        del answers
        gc.collect()
        most = max(most, len(alive))
    assert most <= 3 + 2  # the loops that make and hand on batches hold one each


def test_an_exception_names_its_batch_and_ends_the_other_calls(coded, model):
    model.gates[14] = threading.Event()
    found, start = [], time.monotonic()
    with pytest.raises(IndexError, match="thirteen") as caught:
        found.extend(coded.map(batches(20), in_flight=4))
    assert time.monotonic() - start < 20  # batch 14 was open, and is not waited for
    assert caught.value.batch == len(found) == 13
    assert "at batch 13; the 13 batches before it were answered" in caught.value.__notes__[-1]


def test_an_iterable_that_fails_does_so_after_the_answers_before(coded):
    def failing():
        yield from batches(6)
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone") as caught:
        found.extend(coded.map(failing()))
    assert caught.value.batch == len(found) == 6


def test_an_early_end_of_the_loop_ends_the_open_calls(coded, model):
    model.gates[2] = threading.Event()
    for answers, _ in coded.map(batches(20), in_flight=2):
        assert answers[0, 0] == 0
        break
    model.gates[2].set()
    assert coded(torch.ones(2, 1)).tolist() == [[2.0]] * 2


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_ends_the_loop_at_once(coded, model):
    model.gates[5], found = threading.Event(), []

    def interrupt():  # once the loop waits
        until(lambda: len(found) == 5)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as caught:
        found.extend(coded.map(batches(12), in_flight=4))
    assert time.monotonic() - start < 20  # as the gate is open after 30 s
    assert caught.value.batch == len(found) == 5


def test_bad_arguments(coded):
    with pytest.raises(ValueError, match="map: in_flight must be at least 1, got 0"):
        coded.map([], in_flight=0)
    assert list(coded.map([])) == []


class Scaled(nn.Module):
    """Multiplies its input by an argument that has to be named."""

    def forward(self, x, *, by):
        return x * by


def test_bound_arguments_are_passed_by_name():
    module, x, by = Scaled().eval(), torch.arange(8.0)[:, None], torch.full((8, 1), 3.0)
    bound = inspect.signature(module.forward).bind(by=by, x=x)
    with DeviceWorkers(["cpu"] * 2) as pool:
        pool.start(module, bound)
        coded = CodedWrapper(module, workers=pool, waiting=Waiting(estimate=False))
        ((answers, _),) = coded.map([bound])
    assert torch.equal(answers, 3 * x)


def test_calls_that_are_open_together_have_a_part_for_each_worker():
    sizes = []
    module = Call(lambda x: sizes.append(len(x)) or x)
    with DeviceWorkers(["cpu"] * 4) as pool:
        coded = CodedWrapper(module, workers=pool)
        coded(torch.ones(8, 2))  # the first call proves the rows of outputs by small parts
        for in_flight, parts in ((1, 4), (2, 2), (3, 2), (8, 1)):
            sizes.clear()
            assert len(list(coded.map([torch.ones(8, 2)] * 3, in_flight=in_flight))) == 3
            assert sizes == [8 // parts] * (3 * parts)
        coded.parts = 4
        sizes.clear()
        assert len(list(coded.map([torch.ones(8, 2)]))) == 1
        assert sizes == [2] * 4
        coded.run(torch.ones(8, 2), parts=1)
        assert sizes[4:] == [8]
        with pytest.raises(ValueError, match="run: parts must be at least 1, got 0"):
            coded.run(torch.ones(8, 2), parts=0)
