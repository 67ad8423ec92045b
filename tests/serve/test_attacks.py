"""A client of a server beside attackers of each kind: its latencies, and the memory."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from coded_torch.testing.helpers import until

from . import attackers
from .servers import Client
from .test_command import running

SECONDS = float(os.environ.get("ATTACK_SECONDS", "6"))  # of the calm, and of each attack
FACTOR = 2.0  # of the calm p95; benchmarks run alone
ROW = attackers.body(1, attackers.ONE)


@pytest.fixture(scope="module", params=[6, 2])
def server(request):
    model = "hostile:make", "--name", "lenet5", "--num-workers", str(request.param)
    folder = Path(__file__).parent
    with (
        running(*model, "--deadline", "1", cwd=folder) as (process, port),
        Client(port) as client,
    ):
        until(lambda: client.get("/v2/health/ready")[0] == 200)
        asked(client, 2.0)  # latencies become known
        yield process, port, client


@contextlib.contextmanager
def attacking(kind, port):
    line = [sys.executable, attackers.__file__, kind, str(port)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            yield
            assert process.poll() is None
        finally:
            process.kill()


def asked(client, seconds):
    """Return the p95 of latencies in ms, and the statuses of requests, one after another."""
    took, statuses, until = [], [], time.monotonic() + seconds
    while time.monotonic() < until:
        begin = time.monotonic()
        statuses.append(client.infer(ROW, attackers.PATH)[0])
        took.append(time.monotonic() - begin)
        time.sleep(0.02)
    return 1000 * float(np.percentile(took, 95)), statuses


def peak(process):
    """Return the most memory in MB that the server's own process had."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


@pytest.mark.slow
@pytest.mark.parametrize("kind", attackers.KINDS)
def test_a_client_is_answered_as_ever_beside_attackers(server, kind):
    process, port, client = server
    calm, _ = asked(client, SECONDS / 2)
    with attacking(kind, port):  # the machine's own noise seldom spoils both times
        times, answers = zip(*[asked(client, SECONDS) for _ in range(2)], strict=True)
    attacked, statuses = min(times), answers[0] + answers[1]
    after, _ = asked(client, SECONDS / 2)
    lost, memory = sum(status != 200 for status in statuses), peak(process)
    print(f"\n{kind}: p95 {calm:.1f} and {after:.1f} ms calm, {attacked:.1f} attacked, ", end="")
    print(f"{lost} of {len(statuses)} lost, {memory:.0f} MB")
    assert lost == 0
    assert memory < 1024
    assert attacked <= FACTOR * max(calm, after)
