"""How long a request takes over one kept connection, by the clients that users have."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["CLIENTS"]

_MODEL = "lenet5"
_PATH = f"/v2/models/{_MODEL}/infer"
_IMAGE = np.random.default_rng(0).random((1, 1, 28, 28), np.float32)
_INPUT = {"name": "input", "shape": list(_IMAGE.shape), "datatype": "FP32"}
_BODY = json.dumps({"inputs": [_INPUT | {"data": _IMAGE.flatten().tolist()}]}).encode()


def _timed(count: int, infer: Callable[[], object]) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        infer()
        seconds.append(time.perf_counter() - start)
    return seconds


def _http_client(port: int, count: int) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def infer() -> None:
        connection.request("POST", _PATH, _BODY)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200

    seconds = _timed(count, infer)
    connection.close()
    return seconds


def _tritonclient(port: int, count: int) -> list[float]:
    from tritonclient.http import InferenceServerClient, InferInput

    asked = InferInput(*_INPUT.values())
    asked.set_data_from_numpy(_IMAGE)
    with InferenceServerClient(f"127.0.0.1:{port}") as client:
        return _timed(count, lambda: client.infer(_MODEL, [asked]))


def _kserve(port: int, count: int) -> list[float]:
    from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

    async def run() -> list[float]:
        client, seconds = InferenceRESTClient(RESTConfig(protocol="v2")), []
        asked = InferInput(**_INPUT)
        asked.set_data_from_numpy(_IMAGE, binary_data=False)
        for _ in range(count):
            start = time.perf_counter()
            request = InferRequest(_MODEL, [asked])
            await client.infer(f"http://127.0.0.1:{port}", request, model_name=_MODEL)
            seconds.append(time.perf_counter() - start)
        await client.close()
        return seconds

    return asyncio.run(run())


def _wrk(port: int, count: int) -> list[float]:
    """The median alone, once for each request: all that wrk says."""
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body.json"), Path(folder, "post.lua")
        body.write_bytes(_BODY)
        script.write_text(f'wrk.method = "POST"\nwrk.body = io.open("{body}"):read("*a")\n')
        line = ["wrk", "-t1", "-c1", "-d1s", "--latency", "-s", script]
        url = f"http://127.0.0.1:{port}{_PATH}"
        said = subprocess.run([*line, url], capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said, said
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", said).groups()  # type: ignore[union-attr]
    return [float(value) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[unit]] * count


#: By name, what sends so many requests to a port and returns the seconds of each. The packages
#: tritonclient and kserve and Debian's wrk are measured where they are installed.
CLIENTS = {
    name: send
    for name, send, there in (
        ("http.client", _http_client, True),
        ("tritonclient", _tritonclient, importlib.util.find_spec("tritonclient")),
        ("kserve", _kserve, importlib.util.find_spec("kserve")),
        ("wrk", _wrk, shutil.which("wrk")),
    )
    if there
}
