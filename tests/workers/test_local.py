"""Workers in this process, on a virtual clock."""

import math

import pytest
import torch
from torch import Tensor, nn

from coded_torch.stragglers import Bernoulli, ShiftedExponential, Stragglers, Trace, Uniform
from coded_torch.testing.workers import (
    FailsAt,
    WorkersTests,
    divide_by_zero,
    events_of,
    numbered,
    replies_of,
    run,
    task_of,
)
from coded_torch.workers import Began, LocalWorkers, Reply


class Fixed(Stragglers):
    """Stragglers with given latencies."""

    def __init__(self, *latencies: float) -> None:
        super().__init__()
        self.latencies = latencies

    def _draw(self, num_workers: int, generator: torch.Generator) -> Tensor:
        assert num_workers == len(self.latencies)
        return torch.tensor(self.latencies, dtype=torch.float64)


class Counting(nn.Module):
    """Identity that remembers the batches it got."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x[:, 0].tolist())
        return x.clone()


class TestLocalWorkers(WorkersTests):
    def make(self) -> LocalWorkers:
        return LocalWorkers()


def values(num_units: int, num_rows: int = 2) -> Tensor:
    """Unit n's rows are n."""
    return torch.arange(float(num_units)).reshape(-1, 1, 1).expand(-1, num_rows, 1).contiguous()


def times(events: list[Began | Reply]) -> list[tuple[str, int, float]]:
    return [(type(event).__name__, event.part.number, event.at) for event in events]


def test_parts_asked_together_are_computed_in_one_batch_in_the_order_of_units():
    module = Counting()
    with LocalWorkers(Fixed(0.5, 0.3, 0.1, math.inf)).open(module, task_of(values(4))) as request:
        request.ask(numbered((3,), (1,), (0,), (2,)))
        assert times([request.wait() for _ in range(4)]) == [("Began", n, 0.0) for n in range(4)]
        assert module.batches == []
        assert times(events_of(request)) == [
            ("Reply", 2, 0.1),
            ("Reply", 1, 0.3),
            ("Reply", 0, 0.5),
        ]
    assert module.batches == [[0.0, 0.0, 1.0, 1.0, 3.0, 3.0]]  # what never replies is not computed


def test_parts_asked_later_begin_then_and_are_computed_by_themselves():
    module, delays = Counting(), Trace([[1.0, 2.0], [3.0, 4.0], [5.0, math.inf]])
    with LocalWorkers(delays).open(module, task_of(values(4))) as request:
        request.ask(numbered((0, 1), (2, 3)))
        assert times([request.wait() for _ in range(3)])[2:] == [("Reply", 0, 1.0)]
        assert (request.wait(1.5), request.now()) == (None, 1.5)
        request.ask(numbered((2,), (3,), (0,), (1,), first=2))  # rows 1 and 2 of the trace
        assert times(events_of(request)) == [
            *(("Began", n, 1.5) for n in (2, 3, 4, 5)),
            ("Reply", 1, 2.0),
            ("Reply", 2, 4.5),
            ("Reply", 3, 5.5),
            ("Reply", 4, 6.5),
        ]
    assert module.batches == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 2, 2, 3, 3]]


def test_laws_for_one_number_of_workers_serve_parts_that_are_asked_later():
    for delays in (Uniform(1, seed=0), Bernoulli(0.5, latency=2.0, seed=0)):
        with LocalWorkers(delays).open(nn.Identity(), task_of(values(3))) as request:
            request.ask(numbered((0,), (1,), (2,)))
            for n in range(3, 12):
                request.ask(numbered((0,), first=n))
            late = [reply.latency for reply in replies_of(request)]
        assert len(late) in range(8, 13)


def test_waiting_is_on_the_virtual_clock():
    pool = LocalWorkers(Fixed(3600.0, 10.0, 20.0, math.inf))
    task = task_of(values(4))

    def got(deadline: float) -> list[int]:
        return [r.part.number for r in run(pool, nn.Identity(), task, deadline=deadline)]

    assert got(20.0) == [1, 2]
    assert got(5.0) == []
    assert got(math.inf) == [1, 2, 0]
    with pool.open(nn.Identity(), task) as request:
        assert (request.wait(), request.now()) == (None, 0.0)
        assert (request.wait(7.0), request.now()) == (None, 7.0)
        assert (request.wait(3.0), request.now()) == (None, 7.0)


def test_an_exception_of_the_module_is_the_callers():
    pool, module = LocalWorkers(), FailsAt(1.0, divide_by_zero)
    with pytest.raises(ZeroDivisionError, match="boom"):
        list(run(pool, module, task_of(values(2))))


def test_latencies_come_from_the_law():
    def draw(pool: LocalWorkers) -> list[float]:
        return [r.latency for r in run(pool, nn.Identity(), task_of(values(3)))]

    state = torch.get_rng_state()
    again = LocalWorkers(ShiftedExponential(0.0, 1.0, seed=1))
    first = draw(LocalWorkers(ShiftedExponential(0.0, 1.0, seed=1)))
    assert draw(again) == first != draw(again)
    assert first == sorted(ShiftedExponential(0.0, 1.0, seed=1).sample(3).tolist())
    assert torch.equal(torch.get_rng_state(), state)


def test_simulated_workers_neither_come_nor_go():
    with pytest.raises(NotImplementedError, match="LocalWorkers: the pool cannot be resized"):
        LocalWorkers().resize(2)
    with pytest.raises(NotImplementedError, match="LocalWorkers: workers cannot be drained"):
        LocalWorkers().drain(0)
