"""Workers in a Ray cluster of their own: the inherited tests, and what only Ray does."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from coded_torch.codes import NotEnoughResults
from coded_torch.nn import CodedWrapper
from coded_torch.workers import FaultyWorkers, RayWorkers

from .modules import Exits, Scale
from .workers_tests import PolynomialCode, WorkersTests, task_of

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = [
    pytest.mark.ray,
    # Ray's own files and sockets, when its connection ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

WAIT = 60.0  # bounds waits that end at once unless something is broken


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, held by a pool of its own."""
    with RayWorkers(1).start(WAIT) as pool:
        yield pool
    assert not ray.is_initialized()


@pytest.fixture(scope="module", name="pool")
def shared_pool(cluster):
    with RayWorkers(3, grace=WAIT).start(WAIT) as pool:
        yield pool


class TestRayWorkers(WorkersTests):
    differentiable = False

    def make(self) -> RayWorkers:
        return RayWorkers(2)

    @pytest.fixture
    def pool(self, pool):  # actors take seconds to start
        return pool


def answers(pool, module, values, **options):
    options = {"quorum": len(values), "deadline": WAIT} | options
    with torch.no_grad():
        return list(pool.run(module, task_of(values), **options))


def until(condition) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_tensors_pass_bit_for_bit(pool, dtype):
    values = torch.randn(3, 2, 70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for reply in answers(pool, nn.Identity(), values):
        assert reply.error is None
        assert torch.equal(reply.value, values[reply.worker])
        reply.value.zero_()  # its own memory


def test_changes_of_the_module_are_noticed(pool):
    module, one = Scale(2.0), torch.ones(3, 1, 1)
    assert {float(reply.value) for reply in answers(pool, module, one)} == {2.0}
    module.offset.add_(10)
    assert {float(reply.value) for reply in answers(pool, module, one)} == {12.0}


def test_a_class_without_a_module_is_sent_along(pool):
    class Local(nn.Module):
        def forward(self, x):
            return x + 1

    assert {float(reply.value) for reply in answers(pool, Local(), torch.ones(3, 1, 1))} == {2.0}


def test_a_dead_actor_is_named_and_replaced(pool):
    replies = answers(pool, Exits(), torch.tensor([[[0.0]], [[1.0]], [[2.0]]]))
    assert [reply.worker for reply in replies if reply.error is not None] == [1]
    until(lambda: pool.num_ready == 3)
    assert all(reply.error is None for reply in answers(pool, Exits(), torch.zeros(3, 1, 1)))


def test_an_idle_actor_that_is_killed_is_replaced(pool):
    victim = pool.pids[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in pool.pids)
    until(lambda: pool.num_ready == 3)


def test_stopped_actors_end_at_the_deadline_and_are_ended_after_their_grace(cluster):
    with RayWorkers(3, grace=1.5).start(WAIT) as pool:
        coded = CodedWrapper(
            nn.Identity(), PolynomialCode(2, 3), workers=pool, num_stragglers=1, deadline=1.0
        )
        stopped = pool.pids[:2]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(NotEnoughResults):
            coded(torch.ones(2, 1, dtype=torch.float64))
        assert time.monotonic() - start < 1.0 + 5
        until(lambda: not set(stopped) & set(pool.pids) and pool.num_ready == 3)
        x = torch.ones(2, 1, dtype=torch.float64)
        torch.testing.assert_close(coded(x), x)
    until(lambda: not any(map(_runs, stopped)))


@pytest.mark.parametrize("kind", ["nan", "crash"])
def test_faults_spoil_nothing(cluster, kind):
    n = 4
    with FaultyWorkers(RayWorkers(n).start(WAIT), rates={kind: 0.1}, seed=0) as pool:
        coded = CodedWrapper(nn.Identity(), PolynomialCode(2, n), workers=pool, num_stragglers=1)
        for i in range(6):
            x = torch.tensor([[i, 1.0], [i + 1.0, 2.0]], dtype=torch.float64)
            torch.testing.assert_close(coded(x), x)


def test_closing_ends_the_actors(cluster):
    pool = RayWorkers(2).start(WAIT)
    pids = pool.pids
    pool.close()
    pool.close()
    until(lambda: not any(map(_runs, pids)))


def test_a_pool_that_nobody_holds_ends_its_actors(cluster):
    pool = RayWorkers(2).start(WAIT)
    pids = pool.pids
    del pool
    gc.collect()
    until(lambda: not any(map(_runs, pids)))


_AT_EXIT = """
import torch
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.workers import RayWorkers

class Double(torch.nn.Module):  # of the script itself
    def forward(self, x):
        return 2 * x

pool = RayWorkers(2).start()
coded = CodedWrapper(Double(), ReplicationCode(2, 2), workers=pool)
with torch.no_grad():
    print(coded(torch.tensor([[-1.0], [2.0]])).flatten().tolist(), *pool.pids, flush=True)
"""


def test_exit_is_clean(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "sources"
    script.write_text(_AT_EXIT)
    # The folder that one is in comes first for actors; they must not take the package from there.
    (folder / "coded_torch").mkdir(parents=True)
    (folder / "coded_torch" / "__init__.py").write_text("raise ImportError('not built')")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=2 * WAIT, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    answer, pids = done.stdout.strip().rsplit("]", 1)
    assert answer == "[-2.0, 4.0"
    until(lambda: not any(map(_runs, map(int, pids.split()))))


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
