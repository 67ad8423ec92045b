"""Fleets of MLServer, KServe's ModelServer and this package's server, some of which misbehave.

The variables MLSERVER and KSERVE name Python interpreters that have these packages.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from coded_torch import CodedWrapper
from coded_torch.open_inference import _client
from coded_torch.workers import EndpointWorkers, RemoteModule

FOLDER = Path(__file__).parent / "other_servers"
SPEC = {"datatype": "FP32", "shape": [-1, 3]}
BEHAVIOURS = ["slow", "hung", "wrong"]
KINDS = ["ours", "mlserver", "kserve"]
ROWS = 2000
STEP = 50  # rows of a call
TIMEOUT = 120.0  # seconds of a part, which no call may take, although a server hangs
STARTING = 300.0  # seconds in which a server must be ready
MAIN = "import sys; from coded_torch.cli.main import main; sys.exit(main())"
OURS = """
import asyncio, sys
sys.path.append({folder!r})
import torch
from behaviour import doubled

class Double(torch.nn.Module):
    def forward(self, input):
        return asyncio.run(doubled(input))

def double():
    return Double(), torch.ones(4, 3)
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command(kind, folder, port):
    """Return the command that serves the model ``double`` by a kind of server."""
    folder.mkdir()
    if kind == "ours":
        (folder / "ours.py").write_text(OURS.format(folder=str(FOLDER)))
        line = [sys.executable, "-c", MAIN, "serve", "ours:double", "--port", str(port)]
        return [*line, "--num-workers", "1", "--deadline", "10"]
    if kind == "kserve":
        return [os.environ["KSERVE"], str(FOLDER / "kserve_server.py"), str(port)]
    model = {"name": "double", "implementation": "mlserver_model.Double"}
    model |= {"inputs": [{"name": "input", **SPEC}], "outputs": [{"name": "output", **SPEC}]}
    (folder / "model-settings.json").write_text(json.dumps(model))
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port()}
    settings |= {"metrics_endpoint": None, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    return [os.environ["MLSERVER"], "-m", "mlserver.cli.main", "start", str(folder)]


@contextlib.contextmanager
def served(kind, behaviour, folder):
    """Yield the URL of a server, once it is ready."""
    port = free_port()
    paths = [str(FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"BEHAVIOUR": behaviour, "PYTHONPATH": os.pathsep.join(paths)}
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        line = command(kind, folder, port)
        how = {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(line, cwd=folder, env=environment, **how)
    url = f"http://127.0.0.1:{port}"
    asking = _client.Client("test")
    end = time.monotonic() + STARTING
    try:
        while not _client.run(asking.is_ready(url, "/v2/models/double/ready")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    not {"MLSERVER", "KSERVE"} <= {*os.environ}, reason="MLSERVER and KSERVE name no interpreters"
)
@pytest.mark.parametrize("turn", range(3))
def test_no_row_of_a_mixed_fleet_is_wrong(turn, tmp_path):
    roles = [(kind, "right") for kind in KINDS]
    roles += zip(KINDS, BEHAVIOURS[turn:] + BEHAVIOURS[:turn], strict=True)
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(turn))
    with contextlib.ExitStack() as held:
        urls = [
            held.enter_context(served(*role, tmp_path / f"{number}"))
            for number, role in enumerate(roles)
        ]
        pool = held.enter_context(EndpointWorkers(urls, model="double", timeout=TIMEOUT))
        module = RemoteModule(urls[0], "double")  # takes binary tensors, unlike MLServer
        coded = CodedWrapper(module, workers=pool, verify=0.1)
        reports = []
        for rows in x.split(STEP):
            begin = time.monotonic()
            with torch.no_grad():
                answers, report = coded.run(rows)
            assert time.monotonic() - begin < TIMEOUT / 2
            assert torch.equal(answers, 2 * rows)
            assert not report.missing_rows
            reports.append(report)
        wrong = roles.index((KINDS[(2 - turn) % 3], "wrong"))
        assert any(wrong in report.wrong_results for report in reports)
