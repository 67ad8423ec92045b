"""Applications under uvicorn, in a thread, and a client of plain HTTP."""

import asyncio
import contextlib
import gc
import http.client
import json
import threading
from unittest import mock

import torch
from torch import nn

from coded_torch import serve
from coded_torch.nn import CodedWrapper
from coded_torch.serve import App, TensorSpec
from coded_torch.testing.helpers import until
from coded_torch.workers import LocalWorkers

INPUTS = [TensorSpec("input", "FP32", (3,))]
OUTPUTS = [TensorSpec("output", "FP32", (2,))]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def built(module=None, *, workers=None, surrogate=(), waiting=None, **options):
    """Return an application of a small module."""
    how = {"workers": workers or LocalWorkers(), "surrogate": surrogate, "waiting": waiting}
    coded = CodedWrapper(module or linear(), parts=4, **how)
    defaults = {"name": "m", "inputs": INPUTS, "outputs": OUTPUTS, "deadline": 5.0}
    return App(coded, **defaults | options)


@contextlib.contextmanager
def serving(application):
    """Yield the application's port, while it runs. Nothing of it is frozen, as much is already."""
    server = serve.server(application, port=0, log_level="critical")

    async def main_loop():  # ends as soon as it is told to, and not at the next tenth of a second
        await server.on_tick(0)
        while not server.should_exit:
            await asyncio.sleep(0.005)

    server.main_loop = main_loop
    freeze = mock.patch.object(gc, "freeze")
    freeze.start()
    (thread,) = started([server.run])
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        freeze.stop()
        assert not thread.is_alive()


def started(targets):
    """Start a thread for each function."""
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    return threads


class Client:
    """Sends requests over one connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def send(self, method, path, body=None, **headers):
        """Return the status, headers and body of the answer."""
        self.connection.request(
            method, path, body, {key.replace("_", "-"): value for key, value in headers.items()}
        )
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read()

    def get(self, path):
        status, _, body = self.send("GET", path)
        return status, json.loads(body)

    def infer(self, request, path="/v2/models/m/infer", **headers):
        """Return the status and the content of the answer."""
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        status, _, answer = self.send("POST", path, body, **headers)
        return status, json.loads(answer)

    def metrics(self):
        return self.send("GET", "/metrics")[2].decode()


def tensor(rows, name="input", datatype="FP32"):
    """Return an input of a request."""
    array = torch.as_tensor(rows)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.tolist()}
