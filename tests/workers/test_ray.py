"""Workers in a Ray cluster of their own: the inherited tests, and what only Ray does."""

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
from coded_torch.nn import CodedWrapper, FromFactory, Waiting
from coded_torch.testing.workers import WAIT, PolynomialCode, WorkersTests, run, task_of, until
from coded_torch.workers import RayWorkers

from .modules import Exits

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, held by a pool of its own."""
    with RayWorkers(1).start(timeout=WAIT) as pool:
        pids = pool.pids
        yield pool
    ray.shutdown()
    until(lambda: not any(map(_runs, pids)))


@pytest.fixture(scope="module", name="pool")
def shared_pool(cluster):
    with RayWorkers(3, hang_timeout=WAIT).start(timeout=WAIT) as pool:
        yield pool


class TestRayWorkers(WorkersTests):
    differentiable = False

    # The dispatcher does this, and restarting takes seconds.
    test_parts_whose_only_worker_they_must_avoid_fail = None

    def make(self) -> RayWorkers:
        return RayWorkers(1)

    @pytest.fixture
    def pool(self, pool):  # actors take seconds to start
        return pool

    def test_a_pool_may_be_copied_and_pickled(self, cluster):
        with self.make() as pool:
            super().test_a_pool_may_be_copied_and_pickled(pool)


def answers(pool, module, values):
    with torch.no_grad():
        return list(run(pool, module, task_of(values), deadline=WAIT))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_tensors_pass_bit_for_bit(pool, dtype):
    values = torch.randn(3, 2, 70_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for reply in answers(pool, nn.Identity(), values):
        assert reply.error is None
        assert torch.equal(reply.value, values[reply.part.number])
        reply.value.zero_()  # its own memory


def test_a_class_without_a_module_is_sent_along(pool):
    class Local(nn.Module):
        def forward(self, x):
            return x + 1

    assert {float(reply.value) for reply in answers(pool, Local(), torch.ones(3, 1, 1))} == {2.0}


class Process(nn.Module):
    """Returns its rows, and the process that computes each. Nobody can pickle it."""

    def __init__(self):
        super().__init__()
        self.function = lambda x: x

    def forward(self, x):
        return self.function(x), torch.full((len(x),), float(os.getpid()), dtype=torch.float64)


@torch.no_grad()
def test_actors_make_the_module(pool):
    x = torch.randn(8, 3)
    answers, pids = CodedWrapper(FromFactory(Process), workers=pool, parts=6)(x)
    assert torch.equal(answers, x)
    assert {*map(int, pids)} <= {*pool.pids}


def test_a_dead_actor_is_named_and_replaced(pool):
    replies = answers(pool, Exits(), torch.tensor([[[0.0]], [[1.0]], [[2.0]]]))
    failed = {r.part.number: str(r.error) for r in replies if r.error is not None}
    assert failed.keys() == {1}, failed
    until(lambda: pool.num_ready == 3)
    assert all(reply.error is None for reply in answers(pool, Exits(), torch.zeros(3, 1, 1)))


def test_stopped_actors_end_at_the_deadline_and_are_ended_after_their_grace(cluster):
    with RayWorkers(3, hang_timeout=1.5).start(timeout=WAIT) as pool:
        code, waiting = PolynomialCode(2, 3), Waiting.first(1, deadline=1.0)
        coded = CodedWrapper(nn.Identity(), code, workers=pool, waiting=waiting)
        coded(torch.ones(2, 1, dtype=torch.float64))  # proves the rows, while all actors answer
        # An actor that is still at the first call gets no part of the second, and another two.
        until(lambda: {state for state, _ in pool.states.values()} == {"idle"})
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


_SCRIPT = """
import contextlib, logging, os
from pathlib import Path
import torch
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.workers import RayWorkers

logging.basicConfig()

class Double(torch.nn.Module):  # of the script itself
    def forward(self, x):
        return 2 * x

def sockets(pid):  # of a process and all that come from it
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(link)
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from sockets(child)

pool = RayWorkers(2)
assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
pool.start()
assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
assert "RAY_USAGE_STATS_ENABLED" not in os.environ
ours = set(sockets(os.getpid()))
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:  # it listens
            print(fields[1].split(":")[0])
coded = CodedWrapper(Double(), ReplicationCode(2, 2), workers=pool)
with torch.no_grad():
    print(coded(torch.tensor([[-1.0], [2.0]])).flatten().tolist(), *pool.pids, flush=True)
"""
_LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads what Linux knows")
def test_a_cluster_of_its_own_listens_on_the_loopback_interface_and_ends_with_the_script(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "sources"
    script.write_text(_SCRIPT)
    # The folder that one is in comes first for actors; they must not take the package from there.
    (folder / "coded_torch").mkdir(parents=True)
    (folder / "coded_torch" / "__init__.py").write_text("raise ImportError('not built')")
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=2 * WAIT,
        env={k: v for k, v in os.environ.items() if k[:4] != "RAY_" or k.endswith("niceness")},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "listen on every interface" not in done.stderr
    answer, pids = done.stdout.strip().rsplit("]", 1)
    *listening, numbers = answer.splitlines()
    assert numbers == "[-2.0, 4.0"
    assert len(listening) >= 5
    assert set(listening) <= _LOOPBACK
    until(lambda: not any(map(_runs, map(int, pids.split()))))


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


_CLUSTERS = """
import ray, torch
from coded_torch.testing.workers import run, task_of
from coded_torch.workers import RayWorkers

def answers(pool):
    with torch.no_grad():
        return len(list(run(pool, torch.nn.Identity(), task_of(torch.ones(2, 1, 1)))))

first = RayWorkers(1).start()
address = ray.get_runtime_context().gcs_address
for other in ("127.0.0.1:9", "local"):
    try:
        RayWorkers(1, address=other).start()
    except RuntimeError as error:
        print(f"got {other!r}" in str(error) and address in str(error))
with RayWorkers(1, address=address).start() as second:
    print(answers(second))
ray.shutdown()  # by somebody else, who then connects anew
later = RayWorkers(1).start()
first.close()
print(answers(later), ray.is_initialized())
"""


@pytest.mark.slow  # two clusters start, one after the other
def test_one_cluster_at_a_time():
    done = subprocess.run(
        [sys.executable, "-c", _CLUSTERS], capture_output=True, text=True, timeout=3 * WAIT, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "2", "2", "True"]
