"""Workers in this process, on a virtual clock."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import ShiftedExponential, Stragglers
from coded_torch.workers import LocalWorkers

from .workers_tests import CopyCode, FailsAt, WorkersTests, divide_by_zero, task_of


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


class TestLocalWorkersInSmallBatches(WorkersTests):
    def make(self) -> LocalWorkers:
        return LocalWorkers(Fixed(0.3, 0.1, 0.2, 0.5, 0.4), max_batch_size=3)


def values(num_workers: int, num_groups: int = 2) -> Tensor:
    """Worker n's inputs are n."""
    return torch.arange(float(num_workers)).reshape(-1, 1, 1).expand(-1, num_groups, 1).contiguous()


def test_only_the_first_are_computed_in_one_batch_in_the_order_of_workers():
    module = Counting()
    pool = LocalWorkers(Fixed(0.5, 0.3, 0.1, math.inf))
    replies = pool.run(module, task_of(values(4)), quorum=2)
    assert [(r.worker, r.latency) for r in (next(replies), next(replies))] == [(2, 0.1), (1, 0.3)]
    assert module.batches == [[1.0, 1.0, 2.0, 2.0]]
    assert next(replies).worker == 0
    assert module.batches[1:] == [[0.0, 0.0]]
    assert list(replies) == []  # infinite is never


def test_the_deadline_is_on_the_virtual_clock():
    pool = LocalWorkers(Fixed(3600.0, 10.0, 20.0, math.nan))
    task = task_of(values(4))
    assert [r.worker for r in pool.run(nn.Identity(), task, quorum=4, deadline=20.0)] == [1, 2]
    assert [r.worker for r in pool.run(nn.Identity(), task, quorum=4, deadline=5.0)] == []
    assert [r.worker for r in pool.run(nn.Identity(), task, quorum=4)] == [1, 2, 0]


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (None, [6])])
def test_batches_have_at_most_the_maximum_size(limit, sizes):
    module = Counting()
    replies = list(LocalWorkers(max_batch_size=limit).run(module, task_of(values(3)), quorum=3))
    assert list(map(len, module.batches)) == sizes
    for reply in replies:
        assert torch.equal(reply.value, torch.full((2, 1), float(reply.worker)))


def test_a_rejected_result_makes_it_compute_one_more():
    module = FailsAt(1.0, lambda x: torch.where(x == 1.0, torch.inf, x))
    counting = Counting()
    coded = CodedWrapper(
        nn.Sequential(counting, module),
        CopyCode(4, 4),
        workers=LocalWorkers(Fixed(0.4, 0.1, 0.2, 0.3)),
        num_stragglers=2,
        ordering="arrival",
        shuffle=False,
    )
    x = torch.arange(4.0).reshape(4, 1)
    assert coded(x).flatten().tolist() == [0.0, 0.0, 2.0, 3.0]
    assert counting.batches == [[1.0, 2.0], [3.0]]
    assert coded.last_run.received == (2, 3)
    assert coded.last_run.latencies == {1: 0.1, 2: 0.2, 3: 0.3}
    assert coded.last_run.rejected == {1: "returned values that are not finite in output"}


def test_an_exception_of_the_module_is_the_callers():
    coded = CodedWrapper(FailsAt(1.0, divide_by_zero), CopyCode(2, 2))
    with pytest.raises(ZeroDivisionError, match="boom") as info:
        coded(torch.ones(2, 1))
    for note in getattr(info.value, "__notes__", ["workers [0, 1], 1 rows each"]):
        assert "workers [0, 1], 1 rows each" in note


def test_outputs_without_the_batch_are_refused():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"sum": x.sum()}

    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[::2]

    pool, task = LocalWorkers(), task_of(values(3))
    with pytest.raises(ValueError, match=r"output\['sum'\] must have a batch dimension at dim 0"):
        list(pool.run(Sum(), task, quorum=3))
    with pytest.raises(ValueError, match=r"output must have size 6, .* got shape \(3, 1\)"):
        list(pool.run(Pairs(), task, quorum=3))


def test_the_structure_must_be_the_same_for_every_batch():
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> object:
            return x if len(x) == 4 else [x]

    with pytest.raises(ValueError, match="the same structure for every batch"):
        list(LocalWorkers(max_batch_size=4).run(Fickle(), task_of(values(3)), quorum=3))


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda x: {"size": len(x)}, "2 and 4"),
        (lambda x: {"size": x if len(x) == 4 else None}, r"None and float32 \(4, 1\)"),
        (
            lambda x: {"size": x if len(x) == 4 else x.long()},
            r"float32 \(4, 1\) and int64 \(2, 1\)",
        ),
    ],
)
def test_constants_and_dtypes_must_be_the_same_for_every_batch(output, got):
    class Varied(nn.Module):
        def forward(self, x: Tensor) -> object:
            return output(x)

    with pytest.raises(ValueError, match=rf"output\['size'\] must be the same .* got {got}"):
        list(LocalWorkers(max_batch_size=4).run(Varied(), task_of(values(3)), quorum=3))


def test_latencies_come_from_the_given_generator():
    def draw(pool: LocalWorkers) -> list[float]:
        return [r.latency for r in pool.run(nn.Identity(), task_of(values(3)), quorum=3)]

    state = torch.get_rng_state()
    first = draw(
        LocalWorkers(ShiftedExponential(0.0, 1.0), generator=torch.Generator().manual_seed(5))
    )
    again = LocalWorkers(ShiftedExponential(0.0, 1.0), generator=torch.Generator().manual_seed(5))
    assert draw(again) == first != draw(again)
    assert draw(LocalWorkers(ShiftedExponential(0.0, 1.0, seed=1))) == draw(
        LocalWorkers(ShiftedExponential(0.0, 1.0, seed=1))
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_batch_sizes(size, error):
    with pytest.raises(error, match=r"LocalWorkers: max_batch_size must be .* got"):
        LocalWorkers(max_batch_size=size)


def test_a_batch_size_is_any_kind_of_integer():
    size = LocalWorkers(max_batch_size=np.int64(2)).max_batch_size
    assert type(size) is int


def test_bad_arguments():
    with pytest.raises(TypeError, match="stragglers must be of type Stragglers or None, got int"):
        LocalWorkers(3)
    with pytest.raises(TypeError, match="generator must be of type Generator or None, got int"):
        LocalWorkers(generator=3)
