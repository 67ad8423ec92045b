"""Applications under uvicorn, in a thread, and a client of plain HTTP."""

import contextlib
import http.client
import json
import threading
import time

import torch
import uvicorn
from torch import nn

from coded_torch.nn import CodedWrapper
from coded_torch.serve import TensorSpec, app
from coded_torch.workers import LocalWorkers

INPUTS = [TensorSpec("input", "FP32", (3,))]
OUTPUTS = [TensorSpec("output", "FP32", (2,))]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def built(module=None, *, workers=None, inputs=INPUTS, outputs=OUTPUTS, surrogate=(), **options):
    """An application of a small module."""
    coded = CodedWrapper(
        linear() if module is None else module,
        workers=LocalWorkers() if workers is None else workers,
        parts=4,
        surrogate=surrogate,
    )
    return app(
        coded, **{"name": "m", "inputs": inputs, "outputs": outputs, "deadline": 5.0} | options
    )


@contextlib.contextmanager
def serving(application):
    """Its port, while it runs."""
    config = uvicorn.Config(application, port=0, log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        assert server.started
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Client:
    """Requests over one connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def send(self, method, path, body=None, **headers):
        """Status, headers and body of the answer."""
        self.connection.request(
            method, path, body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, _, body = self.send("GET", path)
        return status, json.loads(body)

    def infer(self, request, path="/v2/models/m/infer", **headers):
        """Status and content of the answer."""
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        status, _, answer = self.send("POST", path, body, **headers)
        return status, json.loads(answer)


def tensor(rows, name="input", datatype="FP32"):
    """An input of a request."""
    array = torch.as_tensor(rows)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.tolist()}
