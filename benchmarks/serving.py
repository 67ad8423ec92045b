"""The answers of a model behind HTTP under faults: ``python -m benchmarks serving``.

LeNet-5 in the application of :mod:`coded_torch.serve` under uvicorn, in a process of its own, on
six worker processes. Requests of 1 to 8 rows arrive on their own, and latencies count from when a
request was due. Some calls are delayed by 50 ms, and a worker is killed every 5 s.

- faults: every row is compared with the module's own output;
- predicted: how often LeNet-5's class is predicted rightly from so many earlier answers.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from torch import Tensor

from coded_torch.codes import NotEnoughResults
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper, Report, Waiting
from coded_torch.stragglers import Bernoulli, Trace
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers

from .runs import Measurement
from .traffic import drive, percentiles

SEED = 0  # the seed of requests, delays and kills
K, N = 4, 6
DEADLINE = 0.2  # seconds
MOST_ROWS = 8  # the rows of the largest request
SLACK = 0.015  # seconds after the deadline
WARM_UP = 100  # requests
KNOWN = (32, 64, 128, 256, 512, 1024)  # earlier answers
HELD_OUT = 960  # digits
START = 120.0  # seconds that a server may take to come up
OUTPUTS = [{"name": name, "parameters": {"binary_data": True}} for name in ("output", "predicted")]


def main(port: str) -> None:
    """Serve, for the benchmark."""
    import uvicorn

    from coded_torch.serve import TensorSpec, app

    torch.set_num_threads(1)  # the processors are the workers'
    pool = ProcessWorkers(N, grace=10 * DEADLINE)
    law = Bernoulli(0.03, latency=0.05, seed=SEED)
    coded = CodedWrapper(
        lenet5(),
        workers=FaultyWorkers(pool, delays=law, seed=SEED, crash_every=5.0),
        parts=K,
        surrogate=Memory(),
    )
    served = app(
        coded,
        name="lenet5",
        inputs=[TensorSpec("input", "FP32", (1, 28, 28))],
        outputs=[TensorSpec("output", "FP32", (10,))],
        deadline=DEADLINE,
    )
    # uvloop is no dependency.
    uvicorn.run(served, host="127.0.0.1", port=int(port), loop="asyncio", log_level="critical")


@contextlib.contextmanager
def serving() -> Iterator[Callable[[Tensor], tuple[Tensor, Report]]]:
    """Run a server; yields a function that has it answer images, in any thread."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.serving", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + START
    try:
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v2/health/ready"):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server did not come up")
            time.sleep(0.05)
        send = functools.partial(_send, threading.local(), port)
        drive(send, batches(WARM_UP, SEED + 1)[0], 50.0, SEED + 1)
        yield send
    finally:
        process.kill()
        process.wait(30)


def _send(mine: threading.local, port: int, images: Tensor) -> tuple[Tensor, Report]:
    """Send a request over this thread's connection."""
    if not hasattr(mine, "connection"):
        mine.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    size, data = len(images), images.numpy().tobytes()
    entry = {"name": "input", "datatype": "FP32", "shape": list(images.shape)}
    entry["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [entry], "outputs": OUTPUTS}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    mine.connection.request("POST", "/v2/models/lenet5/infer", head + data, length)
    answer = mine.connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise NotEnoughResults((), 1, N)
    body = body[int(answer.headers["Inference-Header-Content-Length"]) :]
    logits = np.frombuffer(body, "<f4", 10 * size).reshape(size, 10).copy()
    predicted = np.frombuffer(body, bool, size, 40 * size).copy()
    return torch.from_numpy(logits), Report(predicted=torch.from_numpy(predicted))


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
    with serving() as send:
        replies = drive(send, batches(count, SEED)[0], rate, SEED)
    answered = [(r, x) for r, x in zip(replies, rows, strict=True) if r.report is not None]
    logits = torch.cat([reply.answers for reply, _ in answered])
    flag = torch.cat([reply.report.predicted for reply, _ in answered])
    chosen = torch.cat([x for _, x in answered])
    error = (logits - exact[chosen]).abs().amax(1)[~flag].max()
    times = percentiles([reply.latency for reply in replies])
    return {
        "requests": count,
        "lost": [count - len(answered), 0],
        "largest error of an unflagged row": [float(f"{float(error):.2g}"), 1e-3],
        **times,
        "p99.9": [times["p99.9"], 1e3 * (DEADLINE + SLACK)],
        "exact rows": [round(float((~flag).double().mean()), 5), 0.995],
        "predicted rows": int(flag.sum()),
        "predicted rows of the right class": int(
            (flag & (logits.argmax(1) == labels[chosen])).sum()
        ),
    }


@torch.no_grad()
def predicted() -> dict[str, Any]:
    """Return the share of missing digits that get the right class, by the answers remembered."""
    (images, labels), model, found = digits(), lenet5(), {}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    half_lost = LocalWorkers(Trace([[math.inf, 0.0] * 2]))
    for known in KNOWN:
        memory, seen, right = Memory(), order[:known], []
        memory.observe([images[seen]], [model(images[seen])])
        memory.rebuild()
        coded = CodedWrapper(
            model,
            workers=half_lost,
            parts=K,
            waiting=Waiting(deadline=1.0),
            surrogate=lambda x, memory=memory: memory.predict([x])[0],
        )
        for rows in order[-HELD_OUT:].split(MOST_ROWS):
            answers, report = coded.run(images[rows])
            assert report.predicted is not None
            right.append((answers.argmax(1) == labels[rows])[report.predicted])
        found[str(known)] = round(float(torch.cat(right).double().mean()), 4)
    return {"right class": found}


def measurements(quick: bool) -> Iterator[Measurement]:
    yield ("predicted",), predicted
    yield ("faults",), functools.partial(faults, 4 if quick else 60)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "deadline": DEADLINE, "K": K, "N": N}


if __name__ == "__main__":
    main(*sys.argv[1:])
