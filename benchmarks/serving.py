"""The answers of a model behind HTTP under faults: ``python -m benchmarks serving``.

LeNet-5 in the application of :mod:`coded_torch.serve` under uvicorn, in a process of its own, on
six worker processes. Requests of 1 to 8 rows arrive on their own, and latencies count from when a
request was due. Some calls are delayed by 50 ms, and a worker is killed every 5 s.

- faults: every row is compared with the module's own output;
- estimated: how often LeNet-5's class is estimated rightly from so many earlier answers;
- saturation: rows a second of a model that sleeps 1 ms a row, one row a request, by the number of
  connections. "direct" has the same server and batcher, whose threads call the model. Ray Serve and
  LitServe have as many processes and the same size of a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import NotEnoughResults
from coded_torch.demo import digits, lenet5
from coded_torch.nn import CodedWrapper, Report, Waiting
from coded_torch.open_inference import ADDED, Model, outputs_of, request
from coded_torch.serve import App, TensorSpec, server
from coded_torch.serve._batcher import Batch
from coded_torch.stragglers import Bernoulli, Trace
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers

from .fleet_server import LENGTH
from .runs import Measurement, MissingDataError
from .sleeping import BATCH, FEATURES, PATH, PROCESSES, answer, row_of, sleeping
from .traffic import drive, percentiles

SEED = 0  # the seed of requests, delays and kills
K, N = 4, 6
DEADLINE = 0.2  # seconds
MOST_ROWS = 8  # the rows of the largest request
SLACK = 0.015  # seconds after the deadline
WARM_UP = 100  # requests
KNOWN = (32, 64, 128, 256, 512, 1024)  # earlier answers
HELD_OUT = 960  # digits
START = 240.0  # seconds that a server may take to come up
CONNECTIONS = (1, 8, 32, 64)
ROUNDS = 3
# wrk prints the last line, and counts requests without an answer of status 200.
SCRIPT = """
wrk.method, wrk.body, wrk.headers["Content-Type"] = "POST", '%s', "application/json"
function done(all, latency)
  local e = all.errors
  print(string.format('{"rows a second": %%f, "p50": %%f, "p99": %%f, "failed": %%d}',
    (all.requests - e.status) * 1e6 / all.duration, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.status + e.timeout + e.connect + e.read + e.write))
end
"""
INPUT, OUTPUT = TensorSpec("input", "FP32", (1, 28, 28)), TensorSpec("output", "FP32", (10,))
LENET5 = Model("model", (INPUT,), (OUTPUT, ADDED[0]))  # and the flags of its rows


def lenet5_app() -> Any:
    """Return the application of the faults."""
    pool = ProcessWorkers(N, hang_timeout=10 * DEADLINE)
    delays = Bernoulli(0.03, latency=0.05, seed=SEED)
    faulty = FaultyWorkers(pool, delays=delays, seed=SEED, crash_every=5.0)
    coded = CodedWrapper(lenet5(), workers=faulty, parts=K, surrogate=Memory())
    return App(coded, name="model", inputs=[INPUT], outputs=[OUTPUT], deadline=DEADLINE)


def lit_serve(port: int) -> None:
    from .lit_serve import run  # here, so that the other servers run without its imports

    run(port)


def ray_serve(port: int) -> None:
    import ray
    from ray import serve

    places = {"num_replicas": PROCESSES, "ray_actor_options": {"num_cpus": 0.5}}

    @serve.deployment(max_ongoing_requests=2 * BATCH, **places)
    class Replica:
        def __init__(self) -> None:
            self.model = sleeping()

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
        async def answers(self, rows: list[Tensor]) -> list[Any]:
            return [*map(answer, await asyncio.to_thread(self.model, torch.stack(rows)))]

        async def __call__(self, request: Any) -> Any:
            return await self.answers(row_of(await request.json()))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # ends Ray's processes
    ray.init(address="local", num_cpus=PROCESSES, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Replica.bind(), route_prefix="/")
    threading.Event().wait()


PEERS = {"LitServe": lit_serve, "Ray Serve": ray_serve}


def saturated_app(direct: bool) -> Any:
    """Return the application of the sleeping model, whose batcher may call it in its threads."""
    model, waiting = sleeping(), Waiting(estimate=False)
    pool = LocalWorkers() if direct else ProcessWorkers(PROCESSES)
    coded = CodedWrapper(model, workers=pool, parts=1 if direct else None, waiting=waiting)
    one = [TensorSpec("input", "FP32", (FEATURES,))], [TensorSpec("output", "FP32", (FEATURES,))]
    limits: Any = {"deadline": 10.0, "max_batch_size": BATCH}
    made = App(coded, name="model", inputs=one[0], outputs=one[1], **limits)
    if direct:

        def compute(inputs: list[Tensor], *_: Any) -> Batch:
            return Batch({"output": model(*inputs)}, Report(), set(), slice(len(inputs[0])))

        made.batcher._compute, made.batcher._slots = compute, lambda: (PROCESSES, 1)
    return made


def main(kind: str, port: str) -> None:
    """Serve, for the benchmark."""
    if kind in PEERS:
        PEERS[kind](int(port))
        return
    torch.set_num_threads(1)  # the processors are the workers'
    made = lenet5_app() if kind == "faults" else saturated_app(kind == "direct")
    server(made, port=int(port), log_level="critical").run()


@contextlib.contextmanager
def serving(kind: str, body: bytes, **headers: str) -> Iterator[int]:
    """Run a server; yields its port once it answers a request."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", f"{__package__}.serving", kind, str(port)]
    # The replicas of Ray Serve answer by themselves, which is faster than its proxy.
    variables = os.environ | {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdout=quiet, stderr=quiet, env=variables, start_new_session=True
    )
    asked = Request(f"http://127.0.0.1:{port}{PATH}", body, headers)
    until = time.monotonic() + START
    try:
        while True:
            with contextlib.suppress(OSError), urlopen(asked, timeout=10):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server {kind} did not come up")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()  # Ray ends its processes; LitServe leaves some
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def message(images: Tensor) -> tuple[bytes, dict[str, str]]:
    """Return the body of a binary request and its headers."""
    body, length = request(LENET5, [images], binary=True)
    return body, {LENGTH: str(length)}


def _send(mine: threading.local, port: int, images: Tensor) -> tuple[Tensor, Report]:
    """Send a request over this thread's connection."""
    if not hasattr(mine, "connection"):
        mine.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    mine.connection.request("POST", PATH, *message(images))
    answer = mine.connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise NotEnoughResults((), 1, N)
    (logits, estimated), _ = outputs_of(LENET5, body, answer.headers[LENGTH], len(images))
    return logits, Report(source=2 * estimated)


def batches(count: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return images of requests, and the rows of the digits that they are."""
    images, generator = digits()[0], torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, MOST_ROWS + 1, (count,), generator=generator).tolist()
    rows = [torch.randint(len(images), (size,), generator=generator) for size in sizes]
    return [images[x] for x in rows], rows


@torch.no_grad()
def faults(seconds: float) -> dict[str, Any]:
    rate, (images, labels) = 100.0, digits()
    count = int(rate * seconds)
    rows, exact = batches(count, SEED)[1], lenet5()(images)
    body, headers = message(images[:1])
    with serving("faults", body, **headers) as port:
        send = functools.partial(_send, threading.local(), port)
        drive(send, batches(WARM_UP, SEED + 1)[0], 50.0, SEED + 1)
        replies = drive(send, batches(count, SEED)[0], rate, SEED)
    answered = [(r, x) for r, x in zip(replies, rows, strict=True) if r.report is not None]
    logits = torch.cat([reply.answers for reply, _ in answered])
    flag = torch.cat([reply.report.estimated for reply, _ in answered])
    chosen = torch.cat([x for _, x in answered])
    error = (logits - exact[chosen]).abs().amax(1)[~flag].max()
    times = percentiles([reply.latency for reply in replies])
    return {
        "requests": count,
        "lost": [count - len(answered), 0],
        "largest error of an unflagged row": [float(f"{float(error):.2g}"), 1e-3],
        **times,
        "p99.9": [times["p99.9"], 1e3 * (DEADLINE + SLACK)],
        "computed rows": [round(float((~flag).double().mean()), 5), 0.995],
        "estimated rows": int(flag.sum()),
        "estimated rows of the right class": int(
            (flag & (logits.argmax(1) == labels[chosen])).sum()
        ),
    }


@torch.no_grad()
def estimated(quick: bool) -> dict[str, Any]:
    """Return the share of missing digits that get the right class, by the answers remembered."""
    (images, labels), model, found = digits(), lenet5(), {}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    half_lost = LocalWorkers(Trace([[math.inf, 0.0] * 2]))
    for known in KNOWN[: 1 if quick else None]:
        memory, seen, right = Memory(), order[:known], []
        memory.observe([images[seen]], [model(images[seen])])
        memory.rebuild()
        coded = CodedWrapper(
            model,
            workers=half_lost,
            waiting=Waiting(deadline=1.0),
            surrogate=lambda x, memory=memory: memory.estimate([x])[0],
            parts=K,
        )
        for rows in order[-HELD_OUT:].split(MOST_ROWS):
            answers, report = coded.run(images[rows])
            assert report.estimated is not None
            right.append((answers.argmax(1) == labels[rows])[report.estimated])
        found[str(known)] = round(float(torch.cat(right).double().mean()), 4)
    return {"right class": found}


def load(port: int, connections: int, seconds: float, script: str) -> dict[str, Any]:
    """Send requests over kept connections, one after the other on each, by wrk."""
    url = f"http://127.0.0.1:{port}{PATH}"
    options = ["-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "20s"]
    done = subprocess.run(
        ["wrk", *options, "-s", script, url], capture_output=True, text=True, timeout=60, check=True
    )
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def saturation(quick: bool) -> dict[str, Any]:
    """Return the rows a second of servers, the medians of rounds in which they take turns."""
    for found, how in (("wrk", "apt-get install wrk"), ("litserve", "pip install litserve")):
        if not (shutil.which(found) or importlib.util.find_spec(found)):
            raise MissingDataError(f"{found} is not installed; get it with: {how}")
    entry = {"name": "input", "datatype": "FP32", "shape": [1, FEATURES], "data": [0.5] * FEATURES}
    body, kind = json.dumps({"inputs": [entry]}), {"Content-Type": "application/json"}
    servers, begin = ("ours", "direct", *PEERS)[: 3 if quick else None], os.getloadavg()[0]
    every: dict[str, dict[str, list[Any]]] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT % body)
        script.flush()
        # One server at a time: processes of the others take processors even while they are idle.
        for _, server in itertools.product(range(1 if quick else ROUNDS), servers):
            with serving(server, body.encode(), **kind) as port:
                load(port, CONNECTIONS[-1], 1, script.name)  # warms up
                for connections in CONNECTIONS[-1:] if quick else CONNECTIONS:
                    found = load(port, connections, 1, script.name)
                    of = every.setdefault(server, {})
                    of.setdefault(str(connections), []).append(found)
    table = {
        server: {
            at: {what: round(float(np.median([x[what] for x in runs])), 1) for what in runs[0]}
            for at, runs in of.items()
        }
        for server, of in every.items()
    }
    most = str(CONNECTIONS[-1])
    rows = {server: of[most]["rows a second"] for server, of in table.items()}
    return {
        "load of the machine": [round(begin, 1), round(os.getloadavg()[0], 1)],
        "servers": table,
        # In a short run, a busy machine may let a server answer nothing.
        "ours over": {
            x: round(rows["ours"] / rows[x], 3) if rows[x] else None for x in servers[1:]
        },
    }


def measurements(quick: bool) -> Iterator[Measurement]:
    yield ("estimated",), functools.partial(estimated, quick)
    yield ("faults",), functools.partial(faults, 4 if quick else 60)
    yield ("saturation",), functools.partial(saturation, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "deadline": DEADLINE, "K": K, "N": N}


if __name__ == "__main__":
    main(*sys.argv[1:])
