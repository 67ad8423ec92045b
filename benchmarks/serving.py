"""What does a model behind HTTP bear? ``python -m benchmarks serving``.

The application of :mod:`coded_torch.serve` under uvicorn, in a process of its own, on six worker
processes; requests of 1 to 8 rows arrive on their own, and latencies count from when a request was
due. Each number stands beside its bar:

- faults: LeNet-5, some calls delayed by 50 ms, a worker killed every 5 s; every row is compared
  with what the module computes;
- redundancy: a module that sleeps, the same faults; coded, uncoded, and with one hedge after
  each of four thresholds, in turns;
- overload: far more requests than can be answered, by the server's own clock;
- predicted: how often LeNet-5's class is predicted rightly from so many earlier answers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import RegressionCode
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli, Trace
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers

from .hedging import WAIT_FOR_ALL, HedgeOnce
from .http_load import Reply, Server, drive, record_times, request, serving
from .runs import Measurement

SEED = 0
K, N = 4, 6
DEADLINE = 0.2
MOST_ROWS = 8  # of a request
SLACK = 0.015  # seconds after the deadline
HEDGES = {f"hedge at {x:g} medians": HedgeOnce(medians=x) for x in (1.2, 1.5, 2.0, 3.0)}
POLICIES: dict[str, Waiting | None] = {"coded": None, "uncoded": WAIT_FOR_ALL, **HEDGES}
SHARES = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)  # slower than so long
ROUNDS = 2
WARM_UP = 100  # requests
KNOWN = (32, 64, 128, 256, 512, 1024)  # earlier answers
HELD_OUT = 960  # digits
OUTPUTS = ("output", "predicted", "expected_error")


class Sleeping(nn.Module):
    """LeNet-5 after 10 ms of sleep: a worker that is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = lenet5()

    def forward(self, images: Tensor) -> Any:
        time.sleep(0.01)
        return self.model(images)


def application(policy: str, *how: str) -> Any:
    """Return what a server of this benchmark runs; it may be "sleeping" and "faulty"."""
    from coded_torch.serve import TensorSpec, app

    sleeping, faulty = "sleeping" in how, "faulty" in how
    pool: Any = ProcessWorkers(N, grace=10 * DEADLINE)
    if faulty:
        law = Bernoulli(0.03, latency=0.05, seed=SEED)
        pool = FaultyWorkers(pool, delays=law, seed=SEED, crash_every=5.0)
    coded = CodedWrapper(
        Sleeping().eval() if sleeping else lenet5(),
        RegressionCode(K, N),
        workers=pool,
        waiting=POLICIES[policy],
        surrogate=Memory() if policy == "coded" else (),
    )
    return app(
        coded,
        name="lenet5",
        inputs=[TensorSpec("input", "FP32", (1, 28, 28))],
        outputs=[TensorSpec("output", "FP32", (10,))],
        deadline=DEADLINE,
        max_ongoing_batches=2 if sleeping else 1,
    )


def serve(policy: str, *how: str) -> Any:
    return serving("-m", "benchmarks.serving", policy, *how)


def requests_of(count: int, seed: int) -> tuple[list[bytes], list[Tensor]]:
    """Return requests, and the rows of the digits that each holds."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    made, rows = [], []
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in OUTPUTS]
    for _ in range(count):
        size = int(torch.randint(1, MOST_ROWS + 1, (), generator=generator))
        chosen = torch.randint(len(images), (size,), generator=generator)
        data = images[chosen].numpy().tobytes()
        entry = {"name": "input", "datatype": "FP32", "shape": [size, 1, 28, 28]}
        entry["parameters"] = {"binary_data_size": len(data)}
        head = json.dumps({"inputs": [entry], "outputs": outputs}).encode()
        made.append(request("/v2/models/lenet5/infer", head + data, len(head)))
        rows.append(chosen)
    return made, rows


def answers_of(reply: Reply, size: int) -> tuple[Tensor, Tensor]:
    """Return logits ``[n, 10]``, and which rows were predicted."""
    data = reply.body[reply.head_length :]
    logits = np.frombuffer(data, "<f4", 10 * size).reshape(size, 10)
    predicted = np.frombuffer(data, bool, size, 40 * size)
    return torch.from_numpy(logits.copy()), torch.from_numpy(predicted.copy())


def percentile(seconds: Any, at: float) -> float:
    """Return a percentile in milliseconds."""
    return round(1e3 * float(np.percentile(seconds, at)), 2)


def warm_up(server: Server) -> None:
    drive(server.port, requests_of(WARM_UP, SEED + 1)[0], 50.0, SEED + 1)
    server.times()


def faults(seconds: float) -> dict[str, Any]:
    rate = 100.0
    requests, rows = requests_of(int(rate * seconds), SEED)
    images, labels = digits()
    with torch.no_grad():
        exact = lenet5()(images)
    with serve("coded", "faulty") as server:
        warm_up(server)
        replies = drive(server.port, requests, rate, SEED)
        by_server, killed = server.times(), server.killed()
    answered = [reply for reply in replies if reply.status == 200]
    found = [answers_of(reply, len(rows[reply.number])) for reply in answered]
    chosen = torch.cat([rows[reply.number] for reply in answered])
    logits, flag = (torch.cat(parts) for parts in zip(*found, strict=True))
    error = (logits - exact[chosen]).abs().amax(1)
    times = [reply.seconds for reply in replies]
    return {
        "requests": len(requests),
        "lost": [len(requests) - len(answered), 0],
        "statuses": Counter(str(reply.status) for reply in replies),
        "largest error of an unflagged row": [float(f"{float(error[~flag].max()):.2g}"), 1e-3],
        "p50": percentile(times, 50),
        "p99": percentile(times, 99),
        "p99.9": [percentile(times, 99.9), 1e3 * (DEADLINE + SLACK)],
        "p99.9 by the server": percentile(by_server[:, 1], 99.9),
        "exact rows": [round(float((~flag).double().mean()), 5), 0.995],
        "predicted rows": int(flag.sum()),
        "predicted rows of the right class": int(
            (flag & (logits.argmax(1) == labels[chosen])).sum()
        ),
        "killed": killed,
    }


def redundancy(seconds: float, rounds: int, hedges: Sequence[str]) -> dict[str, Any]:
    rate, policies = 50.0, ("coded", "uncoded", *hedges)
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    pooled: dict[str, list[float]] = {policy: [] for policy in policies}
    for turn in range(rounds):
        requests, _ = requests_of(int(rate * seconds), SEED + turn)
        for policy in policies:
            with serve(policy, "sleeping", "faulty") as server:
                warm_up(server)
                replies = drive(server.port, requests, rate, SEED + turn)
            latencies = [reply.seconds for reply in replies]
            pooled[policy] += latencies
            numbers = {f"p{at:g}": percentile(latencies, at) for at in (50, 99, 99.9)}
            failed = sum(reply.status != 200 for reply in replies)
            found[policy].append({**numbers, "failed": failed})
    medians = {
        policy: {key: round(float(np.median([x[key] for x in runs])), 2) for key in runs[0]}
        for policy, runs in found.items()
    }
    best = min(hedges, key=lambda policy: medians[policy]["p99"])
    coded = medians["coded"]["p99"]
    return {
        "policies": medians,
        "slower shares": SHARES,
        "latencies": {
            policy: [percentile(seconds, 100 - 100 * share) for share in SHARES]
            for policy, seconds in pooled.items()
        },
        "best hedge": best,
        "p99 against uncoded": [round(coded / medians["uncoded"]["p99"], 3), 0.8],
        "p99 against the best hedge": [round(coded / medians[best]["p99"], 3), 1.0],
    }


def overload(rate: float, seconds: float) -> dict[str, Any]:
    requests, _ = requests_of(int(rate * seconds), SEED)
    with serve("coded") as server:
        warm_up(server)
        drive(server.port, requests[: len(requests) // 4], rate, SEED)  # it grows to its size
        server.times()
        before, start = server.resident(), time.perf_counter()
        replies = drive(server.port, requests, rate, SEED)
        took = time.perf_counter() - start
        (status, spent), after = server.times().T, server.resident()
    refused = spent[status == 503]
    return {
        "sent": len(requests),
        "lost": sum(reply.status == 0 for reply in replies),
        "statuses": Counter(status.astype(int).astype(str).tolist()),
        "answered a second": [round(float((status == 200).sum()) / took, 1), 200],
        "p99.9": [percentile(spent, 99.9), 1e3 * (DEADLINE + SLACK)],
        "refused within 10 ms": [
            round(float((refused < 0.01).mean()), 4) if len(refused) else 1.0,
            0.95,
        ],
        "share of 504": [round(float((status == 504).mean()), 4), 0.04],
        "memory, relative": [round(after / before, 3), 1.1],
    }


@torch.no_grad()
def predicted() -> dict[str, Any]:
    """Return the share of missing digits that get the right class, by the answers remembered."""
    images, labels = digits()
    model, found = lenet5(), {}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    half_lost = LocalWorkers(Trace([[math.inf, 0.0] * 2]))
    for known in KNOWN:
        memory, seen, right = Memory(), order[:known], []
        memory.observe([images[seen]], [model(images[seen])])
        memory.rebuild()
        coded = CodedWrapper(
            model,
            RegressionCode(K, N),
            workers=half_lost,
            waiting=Waiting(deadline=1.0),
            surrogate=lambda x, memory=memory: memory.predict([x])[0],
        )
        for rows in order[-HELD_OUT:].split(MOST_ROWS):
            answers, report = coded.run(images[rows])
            assert report.predicted is not None
            right.append((answers.argmax(1) == labels[rows])[report.predicted])
        found[str(known)] = round(float(torch.cat(right).double().mean()), 4)
    return {"right class": found}


def measurements(quick: bool, device: str) -> Iterator[Measurement]:
    yield ("predicted",), predicted
    yield ("faults",), functools.partial(faults, 4 if quick else 60)
    for rate in (600.0, 2000.0):
        what = "overload", f"{rate:g} a second"
        yield what, functools.partial(overload, rate, 2 if quick else 20)
    how = (2, 1, list(HEDGES)[:1]) if quick else (12, ROUNDS, list(HEDGES))
    yield ("redundancy",), functools.partial(redundancy, *how)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "deadline": DEADLINE, "K": K, "N": N, "rounds": ROUNDS}


def main(policy: str, *how: str) -> None:
    """Serve, for the benchmark; the last word is the port."""
    import uvicorn

    logging.basicConfig(level="WARNING")  # kills are counted by what pools log
    torch.set_num_threads(1)  # the processors are the workers'
    uvicorn.run(
        record_times(application(policy, *how[:-1])),
        host="127.0.0.1",
        port=int(how[-1]),
        loop="asyncio",  # uvloop is no dependency
        log_level="critical",
        timeout_keep_alive=75,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
