"""Modules that each worker makes for itself."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.nn import FromFactory
from coded_torch.workers import DeviceWorkers, LocalWorkers, ProcessWorkers, WorkerError

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))


class NotPicklable(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.function = lambda x: scale * x

    def forward(self, x):
        return self.function(x), torch.full((len(x),), float(os.getpid()), dtype=torch.float64)


def make(scale=2.0):
    return NotPicklable(scale).eval()


def no_module():
    return "weights"


def fails():
    raise FileNotFoundError("no weights here")


POOLS = {
    "local": LocalWorkers,
    "devices": lambda: DeviceWorkers(["cpu"] * 2),
    "processes": lambda: ProcessWorkers(2),
}  # tests/workers/test_ray.py has a cluster for such a test of its own


@pytest.mark.parametrize("name", POOLS)
@torch.no_grad()
def test_workers_make_the_module(name):
    with POOLS[name]() as pool:
        model = FromFactory(functools.partial(make, 3.0))
        answers, pids = CodedWrapper(model, workers=pool, parts=4)(X)
        assert torch.equal(answers, 3 * X)
        assert (set(pids.tolist()) == {os.getpid()}) == (name in ("local", "devices"))
        (answers, _) = CodedWrapper(FromFactory(make), workers=pool, parts=4)(X)
        assert torch.equal(answers, 2 * X)


@torch.no_grad()
def test_random_weights_are_those_of_every_worker_and_leave_the_callers_numbers():
    model = FromFactory(functools.partial(nn.Linear, 3, 1))
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    answers = model(X)
    assert torch.equal(torch.rand(2), wanted)
    with ProcessWorkers(3) as pool:
        coded = CodedWrapper(model, workers=pool, parts=9)
        for _ in range(3):
            found, report = coded.run(X)
            torch.testing.assert_close(found, answers)
            assert not report.notes


def test_the_caller_has_no_weights():
    model = FromFactory(make)
    assert [*model.state_dict()] == []
    assert not model.train().training
    with pytest.raises(ValueError, match=r"^FromFactory: the dtype of make cannot be changed"):
        model.half()


def test_what_a_factory_returns_and_raises_reaches_the_caller():
    with pytest.raises(TypeError, match=r"^FromFactory: factory must be callable, got 3"):
        FromFactory(3)
    with pytest.raises(TypeError, match="no_module must return a module, got a str"):
        FromFactory(no_module)(X)
    with (
        ProcessWorkers(1) as pool,
        pytest.raises(WorkerError, match="FileNotFoundError: no weights here"),
    ):
        pool.start(FromFactory(fails))


PROGRAM = """
import functools, resource, torch
from coded_torch import CodedWrapper
from coded_torch.nn import FromFactory
from coded_torch.workers import ProcessWorkers

def make():
    return torch.nn.Sequential(torch.nn.Linear(3, 4096), torch.nn.Linear(4096, 4096)).eval()

def mapped():
    with torch.device("meta"):
        model = make()
    model.load_state_dict(torch.load("weights.pt", mmap=True), assign=True)
    return model

def memory(pid):  # in kilobytes, where a page of several processes counts as a share
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))

if __name__ == "__main__":
    for factory in (functools.partial(torch.nn.Linear, 3, 1), mapped, make):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with ProcessWorkers(3) as pool, torch.no_grad():
            coded = CodedWrapper(FromFactory(factory), workers=pool, parts=6)
            assert len(coded(torch.ones(12, 3))) == 12
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(after - before, sum(map(memory, pool.start(coded.module).pids)))
"""


def test_the_caller_needs_no_memory_for_the_weights_and_workers_share_mapped_ones(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    model = nn.Sequential(nn.Linear(3, 4096), nn.Linear(4096, 4096))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    done = subprocess.run(
        [sys.executable, "program.py"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    (_, small), (of_mapped, mapped), (of_made, made) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    weights = 67_000  # kilobytes
    for grown in (of_mapped, of_made):
        assert grown < weights / 2
    assert made - small > 2.5 * weights
    assert mapped - small < 1.5 * weights
