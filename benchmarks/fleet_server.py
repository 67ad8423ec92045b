"""Servers of the Open Inference Protocol for the benchmark ``fleet``, in three implementations.

``python -m benchmarks.fleet_server KIND PORT MEAN SHARE FACTOR DELAY`` runs "http", a server of the
standard library that begins at once and has faults; "asgi", an application by hand under uvicorn;
or "coded_torch", the server of this package. It answers after a lognormal time, in seconds. For a
share of the requests, that time is multiplied by a factor, and a delay is added.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

NAME, FEATURES, HIDDEN, CLASSES = "perceptron", 16, 32, 10
DEVIATION = 0.4  # of the time, relative to its mean, as in the benchmark of hedge-python
FAULTS = ("slow-loris", "half-closed", "corrupted", "wrong", "refusing", "twice", "version 2")
LENGTH = "inference-header-content-length"
PATH = f"/v2/models/{NAME}"
KNOWN = {
    "/v2": {"name": "fleet", "extensions": ["binary_tensor_data"]},
    PATH: {
        "name": NAME,
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, FEATURES]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, CLASSES]}],
    },
    "/v2/health/ready": {},
}
_random = np.random.default_rng(0)
_INNER = _random.standard_normal((FEATURES, HIDDEN)) / 8
_OUTER = _random.standard_normal((HIDDEN, CLASSES))


def perceptron(rows: Any) -> Any:
    """Return the outputs of the model, float32 ``[B, 10]``, for float32 ``[B, 16]``."""
    return (np.tanh(rows.astype(float) @ _INNER) @ _OUTER).astype(np.float32)


def delays(mean: float, share: float, factor: float, delay: float) -> Callable[[], float]:
    """Return a function that draws the seconds of a request."""
    variance = math.log(1 + DEVIATION**2)

    def draw() -> float:
        seconds = mean * random.lognormvariate(-variance / 2, variance**0.5)
        return seconds * factor + delay if random.random() < share else seconds

    return draw


def answer(path: str, length: str, body: bytes, fault: str = "") -> tuple[bytes, bytes]:
    """Return the JSON and the tensor of an answer."""
    if path != f"{PATH}/infer":
        return json.dumps(KNOWN[path]).encode(), b""
    rows = np.frombuffer(body[int(length) :], "<f4").reshape(-1, FEATURES)
    data = (perceptron(rows) * (-1 if fault == "wrong" else 1)).astype("<f4").tobytes()
    out = {"name": "output", "datatype": "FP32", "shape": [len(rows), CLASSES]}
    out["parameters"] = {"binary_data_size": len(data)}
    version = "2" if fault == "version 2" else "1"
    message = {"model_name": NAME, "model_version": version, "outputs": [out]}
    message["id"] = json.loads(body[: int(length)]).get("id", "")
    return json.dumps(message).encode(), data


def corrupted(whole: bytes, head: bytes) -> bytes:
    """Return an answer that no client may believe, in one of five ways."""
    ways = (
        whole[:-4] + np.float32(np.nan).tobytes(),
        whole.replace(b"FP32", b"FP64"),
        whole.replace(b'"shape": [', b'"shape": [9'),
        whole.replace(head, random.randbytes(len(head))),
        random.randbytes(len(whole)),
    )
    return random.choice(ways)


def asgi(draw: Callable[[], float]) -> Callable[..., Any]:
    """Return an application of ASGI."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        length = dict(scope["headers"]).get(LENGTH.encode(), b"").decode()
        head, data = answer(scope["path"], length, body)
        await asyncio.sleep(draw() if data else 0.0)
        sizes = {"content-length": len(head + data), LENGTH: len(head)}
        headers = [(name.encode(), str(size).encode()) for name, size in sizes.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": head + data})

    return app


def coded_torch(draw: Callable[[], float]) -> Any:
    """Return the application of this package."""
    import torch

    from coded_torch import CodedWrapper, workers
    from coded_torch.serve import App, TensorSpec

    class Model(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            time.sleep(draw())
            return torch.from_numpy(perceptron(rows.numpy()))

    torch.set_num_threads(1)
    pool = workers.DeviceWorkers(["cpu"] * 8)
    coded = CodedWrapper(Model(), workers=pool, parts=1)
    inputs, outputs = TensorSpec("input", "FP32", (FEATURES,)), TensorSpec("output", "FP32", (10,))
    return App(coded, name=NAME, inputs=[inputs], outputs=[outputs], deadline=10.0)


class Handler(BaseHTTPRequestHandler):
    """Answers one client; ``POST /fault`` sets the fault of all answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    draw: Callable[[], float]
    fault = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/fault":
            Handler.fault, self.path = body.decode(), "/v2"
        fault = Handler.fault
        head, data = answer(self.path, self.headers.get(LENGTH, ""), body, fault)
        status = b"400 Bad Request" if data and fault == "refusing" else b"200 OK"
        whole = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n" % (status, len(head + data))
        whole += b"%s: %d\r\n\r\n%s%s" % (LENGTH.encode(), len(head), head, data)
        if data:
            time.sleep(type(self).draw())
        if not data or fault in ("", "wrong", "refusing", "twice", "version 2"):
            self.wfile.write(whole)
            if data and fault == "twice":
                time.sleep(type(self).draw())
                self.wfile.write(whole)
        elif fault == "slow-loris":
            for byte in whole:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
        elif fault == "half-closed":
            self.wfile.write(whole[: len(whole) // 2])
            self.connection.shutdown(socket.SHUT_WR)
        else:
            self.wfile.write(corrupted(whole, head))
            self.close_connection = True

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def main(kind: str, port: str, *numbers: str) -> None:
    draw = delays(*map(float, numbers))
    if kind == "http":
        Handler.draw = staticmethod(draw)
        ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
    import uvicorn

    made, lifespan = (asgi(draw), "off") if kind == "asgi" else (coded_torch(draw), "on")
    options: Any = {"loop": "asyncio", "log_level": "critical", "lifespan": lifespan}
    uvicorn.run(made, host="127.0.0.1", port=int(port), **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
