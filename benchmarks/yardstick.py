"""One side of ``python -m benchmarks against``: it measures the version that Python finds.

It runs as a script, in a process of its own, and knows this version's names and those of 0.3. It
reads numbers of calls, one a line, and writes what they took, as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coded_torch
from coded_torch import CodedWrapper, Waiting, codes
from coded_torch.stragglers import Uniform
from coded_torch.surrogates import Memory
from coded_torch.workers import LocalWorkers, ProcessWorkers

START = 120.0  # seconds that a pool or a server may take to come up
N, LATE, FEATURES = 20, 4, 32  # workers, of which so many never answer; numbers of an input
BATCH, MANY = 256, 8  # rows of a batch of a job, and its batches
THREADS = 8
#: Something to measure: a function of one call, which returns its reports.
Call = Callable[[], list[Any]]


def waiting(estimate: bool) -> Waiting:
    """Return a policy that computes every row, or may estimate some, in either version's words."""
    names = {field.name for field in dataclasses.fields(Waiting)}
    return Waiting(**{"estimate" if "estimate" in names else "predict": estimate})


def estimated(report: Any) -> int:
    """Return the number of rows that no worker computed."""
    rows = report.estimated if hasattr(report, "estimated") else report.predicted
    return int(rows.sum())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 10)).eval()


def inputs(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(seed))


def _run(coded: CodedWrapper, batches: Iterator[torch.Tensor]) -> list[Any]:
    return [coded.run(next(batches))[1]]


def by_columns(size: int, code: codes.Code, memory: bool = False) -> Call:
    """Return a call of a batch on workers of which four never answer."""
    surrogate = [Memory()] if memory else []
    pool, model = LocalWorkers(Uniform(LATE, seed=0)), network()
    coded = CodedWrapper(model, code, workers=pool, surrogate=surrogate)
    for each in surrogate:
        each.follow(model)
        each.observe([inputs(2048, seed=9)], [model(inputs(2048, seed=9))])
        each.rebuild()
    batches = itertools.cycle([inputs(size, seed) for seed in range(4)])
    return functools.partial(_run, coded, batches)


def estimates(size: int, memory: bool = False) -> Iterator[Call]:
    yield by_columns(size, codes.RegressionCode(N, N), memory)


def coded_calls(size: int) -> Iterator[Call]:
    yield by_columns(size, codes.SplineCode(N, N + LATE))


def processes(
    numbers: int, threads: int = 1, rows: int = 4, verify: float | None = None
) -> Iterator[Call]:
    """Yield a call of four parts, of one row each by default, or one from each of some threads."""
    batch = torch.ones(rows, numbers)
    with ProcessWorkers(4).start(nn.Identity(), batch[:1], timeout=START) as pool:
        coded = CodedWrapper(nn.Identity(), workers=pool, waiting=waiting(False), verify=verify)
        if threads == 1:
            yield lambda: [coded.run(batch)[1]]
            return
        begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
        reports: list[Any] = []

        def work() -> None:
            with contextlib.suppress(threading.BrokenBarrierError), torch.no_grad():
                while True:
                    begin.wait()
                    reports.append(coded.run(batch)[1])
                    end.wait(START)

        def call() -> list[Any]:
            reports.clear()
            begin.wait()
            end.wait(START)
            return reports

        workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        yield call
        begin.abort()
        for worker in workers:
            worker.join(START)


def jobs() -> Iterator[Call]:
    """Yield a job of some batches on two processes."""
    model, batches = network(), [inputs(BATCH, seed) for seed in range(MANY)]
    with ProcessWorkers(2).start(model, batches[0][:1], timeout=START) as pool:
        coded = CodedWrapper(model, workers=pool, waiting=waiting(False))
        yield lambda: [report for _, report in coded.map(batches)]


class Sleeping(nn.Module):
    """A model that sleeps for 1 ms a row."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        time.sleep(1e-3 * len(rows))
        return rows[:, :10]


@contextlib.contextmanager
def serving(coded: CodedWrapper) -> Iterator[int]:
    """Run a server in a thread; yields its port."""
    import uvicorn

    from coded_torch import serve
    from coded_torch.serve import TensorSpec

    tensors = [TensorSpec("x", "FP32", (FEATURES,))], [TensorSpec("y", "FP32", (10,))]
    make = getattr(serve, "App", None) or serve.app  # 0.4's name
    application = make(coded, name="m", inputs=tensors[0], outputs=tensors[1], deadline=START)
    server = uvicorn.Server(
        uvicorn.Config(application, port=0, log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + START
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(START)


def body(rows: int) -> str:
    """Return a request of some rows."""
    entry = {"name": "x", "datatype": "FP32", "shape": [rows, FEATURES]}
    return json.dumps({"inputs": [entry | {"data": inputs(rows).tolist()}]})


def served() -> Iterator[Call]:
    """Yield a request of four rows; it has no report."""
    coded = CodedWrapper(network(), workers=LocalWorkers(), parts=1, waiting=waiting(False))
    with serving(coded) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START)

        def call() -> list[Any]:
            connection.request("POST", "/v2/models/m/infer", body(4))
            reply = connection.getresponse()
            text = reply.read()
            assert reply.status == 200, text
            return []

        yield call
        connection.close()


def many_served(clients: int, requests: int) -> Iterator[Call]:
    """Yield so many requests of one row by some clients, of two processes that sleep."""
    model, rows = Sleeping(), inputs(2)
    with ProcessWorkers(2).start(model, rows, timeout=START) as pool:
        coded = CodedWrapper(model, workers=pool, waiting=waiting(False))
        with serving(coded) as port:
            path = Path(__file__).with_name("clients.py")
            line = [sys.executable, path, str(port), str(clients), "/v2/models/m/infer", body(1)]
            pipe: Any = subprocess.PIPE
            with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
                asked: Any = process.stdin
                told: Any = process.stdout

                def call() -> list[Any]:
                    asked.write(f"{requests}\n")
                    assert int(told.readline()) == requests
                    return []

                yield call
                asked.close()


#: The function that yields a question's call, the calls of a round, and the rows that it estimates.
QUESTIONS: dict[str, tuple[Callable[[], Iterator[Call]], int, int]] = {
    **{
        f"estimates, {size:,} rows": (functools.partial(estimates, size), calls, size * LATE // N)
        for size, calls in {64: 10, 240: 10, 1000: 3, 4000: 1}.items()
    },
    "estimates with a Memory, 240 rows": (functools.partial(estimates, 240, True), 10, 48),
    "calls, 4 x 40 B": (functools.partial(processes, 10), 50, 0),
    "calls, 4 x 1 MiB": (functools.partial(processes, 2**18), 10, 0),
    "calls, a million rows of 40 B": (functools.partial(processes, 10, 1, 1_000_000), 1, 0),
    "verified calls, 64 rows of 40 B": (functools.partial(processes, 10, 1, 64, 0.1), 50, 0),
    "calls of eight threads, 4 x 40 B": (functools.partial(processes, 10, THREADS), 10, 0),
    "coded calls, 240 rows": (functools.partial(coded_calls, 240), 20, 240),
    "jobs, 8 x 256 rows": (jobs, 3, 0),
    "served requests, 4 rows": (served, 30, 0),
    "served requests, 1,024 of 64 clients": (functools.partial(many_served, 64, 1024), 1, 0),
}


@torch.no_grad()
def main() -> None:
    name, root = sys.argv[1:]
    assert Path(coded_torch.__file__).parents[1] == Path(root), coded_torch.__file__
    torch.set_num_threads(1)
    make, _, expected = QUESTIONS[name]
    with contextlib.contextmanager(make)() as call:
        for _ in range(3):
            found = {estimated(report) for report in call()} | {expected}
        assert len(found) == 1, f"{name}: estimated {found} rows"
        print("ready", flush=True)
        for line in sys.stdin:
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                call()
            took = time.perf_counter() - wall, time.process_time() - processor
            print(json.dumps([x / int(line) for x in took]), flush=True)


if __name__ == "__main__":
    main()
