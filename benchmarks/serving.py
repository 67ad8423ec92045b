"""What a model behind HTTP bears: ``python -m benchmarks serving``.

The application of :mod:`coded_torch.serve` under uvicorn, in a process of its own, on six worker
processes; requests of 1 to 8 rows arrive by themselves, and latencies count from when a request was
due. Written to ``results/serving.json``, each number beside its bar:

- faults: LeNet-5, some calls delayed by 50 ms, a worker killed every 5 s; every row is compared
  with what the module computes;
- redundancy: a module that sleeps, the same faults; coded, uncoded, and with one hedge after
  each of four thresholds, in turns;
- overload: far more requests than can be answered, by the server's own clock;
- start and end: the command's first answer, and what is left of it when it is killed;
- kept connection: the command beside the same application under ``uvicorn.run``, by the clients
  that users have;
- predicted: how often LeNet-5's class is predicted rightly from so many earlier answers.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import KernelCode
from coded_torch.demo.hedging import HedgeOnce
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli, Trace
from coded_torch.surrogates import Memory
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers

from .http_clients import CLIENTS
from .http_load import Reply, alive, drive, family, record_times, request, serving
from .runs import Measurement

SEED = 0
K, N = 4, 6
DEADLINE = 0.2
MOST_ROWS = 8  # of a request
SLACK = 0.015  # seconds after the deadline
THRESHOLDS = {"1.2 medians": 1.2, "1.5 medians": 1.5, "2 medians": 2.0, "3 medians": 3.0}
HEDGES = {f"hedge at {name}": HedgeOnce(medians=x) for name, x in THRESHOLDS.items()}
POLICIES: dict[str, Waiting | None] = {
    "coded": None,
    "uncoded": Waiting(predict=False, extra=0),
    **HEDGES,
}
SHARES = (0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)  # slower than so long
ROUNDS = 2
WARM_UP = 100  # requests
KNOWN = (32, 64, 128, 256, 512, 1024)  # earlier answers
HELD_OUT = 960  # digits
PATH = "/v2/models/lenet5/infer"


class Sleeping(nn.Module):
    """LeNet-5 after 10 ms of sleep: a machine that is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = lenet5()

    def forward(self, images: Tensor) -> Any:
        time.sleep(0.01)
        return self.model(images)


def application(policy: str, sleeping: bool, faulty: bool) -> Any:
    """What a server of this benchmark runs."""
    from coded_torch.demo.lenet5 import lenet5_and_digits
    from coded_torch.serve import app, specs

    module, examples = lenet5_and_digits()
    inputs, outputs = specs(module, examples)
    pool: Any = ProcessWorkers(N, grace=10 * DEADLINE)
    if faulty:
        law = Bernoulli(0.03, latency=0.05, seed=SEED)
        pool = FaultyWorkers(pool, delays=law, seed=SEED, crash_every=5.0)
    uncoded = policy == "uncoded"
    coded = CodedWrapper(
        Sleeping().eval() if sleeping else module,
        KernelCode(K, K if uncoded else N),
        workers=pool,
        waiting=POLICIES[policy],
        surrogate=Memory() if policy == "coded" else (),
    )
    return app(
        coded,
        name="lenet5",
        inputs=inputs,
        outputs=outputs,
        deadline=DEADLINE,
        max_ongoing_batches=2 if sleeping else 1,
    )


def serve(policy: str, *, sleeping: bool, faulty: bool) -> Any:
    flags = [flag for flag, on in (("--sleeping", sleeping), ("--faulty", faulty)) if on]
    return serving(lambda port: ["-m", "benchmarks.serving", policy, "--port", str(port), *flags])


def requests_of(count: int, seed: int) -> tuple[list[bytes], list[Tensor]]:
    """Requests, and the rows of the digits that each holds."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    made, rows = [], []
    outputs = [
        {"name": name, "parameters": {"binary_data": True}}
        for name in ("output", "predicted", "expected_error")
    ]
    for _ in range(count):
        size = int(torch.randint(1, MOST_ROWS + 1, (), generator=generator))
        chosen = torch.randint(len(images), (size,), generator=generator)
        data = images[chosen].numpy().tobytes()
        entry = {
            "name": "input",
            "datatype": "FP32",
            "shape": [size, 1, 28, 28],
            "parameters": {"binary_data_size": len(data)},
        }
        head = json.dumps({"inputs": [entry], "outputs": outputs}).encode()
        made.append(request(PATH, head + data, len(head)))
        rows.append(chosen)
    return made, rows


def answers_of(reply: Reply, size: int) -> tuple[Tensor, Tensor]:
    """Logits ``[n, 10]``, and which rows were predicted."""
    data = reply.body[reply.head_length :]
    logits = np.frombuffer(data, "<f4", 10 * size).reshape(size, 10)
    predicted = np.frombuffer(data, bool, size, 40 * size)
    return torch.from_numpy(logits.copy()), torch.from_numpy(predicted.copy())


def percentile(seconds: Any, at: float) -> float:
    """In milliseconds."""
    return round(1e3 * float(np.percentile(seconds, at)), 2)


def warm_up(port: int) -> None:
    requests, _ = requests_of(WARM_UP, SEED + 1)
    drive(port, requests, 50.0, SEED + 1)


def faults(seconds: float) -> dict[str, Any]:
    rate = 100.0
    requests, rows = requests_of(int(rate * seconds), SEED)
    images, labels = digits()
    with torch.no_grad():
        exact = lenet5()(images)
    with serve("coded", sleeping=False, faulty=True) as server:
        warm_up(server.port)
        server.times()
        replies = drive(server.port, requests, rate, SEED)
        by_server = server.times()
        killed = server.killed()
    answered = [reply for reply in replies if reply.status == 200]
    errors, flags, right = [], [], []
    for reply in answered:
        chosen = rows[reply.number]
        logits, predicted = answers_of(reply, len(chosen))
        errors.append((logits - exact[chosen]).abs().amax(1))
        flags.append(predicted)
        right.append(logits.argmax(1) == labels[chosen])
    error, flag, rightly = (torch.cat(parts) for parts in (errors, flags, right))
    return {
        "requests": len(requests),
        "lost": [len(requests) - len(answered), 0],
        "statuses": _counts(reply.status for reply in replies),
        "largest error of an unflagged row": [float(f"{float(error[~flag].max()):.2g}"), 1e-3],
        "p50": percentile([reply.seconds for reply in replies], 50),
        "p99": percentile([reply.seconds for reply in replies], 99),
        "p99.9": [percentile([r.seconds for r in replies], 99.9), 1e3 * (DEADLINE + SLACK)],
        "p99.9 by the server": percentile(by_server[:, 1], 99.9),
        "exact rows": [round(float((~flag).double().mean()), 5), 0.995],
        "predicted rows": int(flag.sum()),
        "predicted rows of the right class": int((flag & rightly).sum()),
        "killed": killed,
    }


def redundancy(seconds: float, rounds: int, hedges: Sequence[str]) -> dict[str, Any]:
    rate, policies = 50.0, ("coded", "uncoded", *hedges)
    found: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    pooled: dict[str, list[float]] = {policy: [] for policy in policies}
    for turn in range(rounds):
        requests, _ = requests_of(int(rate * seconds), SEED + turn)
        for policy in policies:
            with serve(policy, sleeping=True, faulty=True) as server:
                warm_up(server.port)
                replies = drive(server.port, requests, rate, SEED + turn)
            latencies = [reply.seconds for reply in replies]
            pooled[policy] += latencies
            failed = sum(reply.status != 200 for reply in replies)
            numbers = {f"p{at:g}": percentile(latencies, at) for at in (50, 99, 99.9)}
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
    with serve("coded", sleeping=False, faulty=False) as server:
        warm_up(server.port)
        drive(server.port, requests[: len(requests) // 4], rate, SEED)  # it grows to its size
        server.times()
        before, start = server.resident(), time.perf_counter()
        replies = drive(server.port, requests, rate, SEED)
        took = time.perf_counter() - start
        times, after = server.times(), server.resident()
    status, spent = times[:, 0], times[:, 1]
    refused = spent[status == 503]
    return {
        "sent": len(requests),
        "lost": sum(reply.status == 0 for reply in replies),
        "statuses": _counts(status.astype(int).tolist()),
        "answered a second": [round(float((status == 200).sum()) / took, 1), 200],
        "p99.9": [percentile(spent, 99.9), 1e3 * (DEADLINE + SLACK)],
        "refused within 10 ms": [
            round(float((refused < 0.01).mean()), 4) if len(refused) else 1.0,
            0.95,
        ],
        "share of 504": [round(float((status == 504).mean()), 4), 0.04],
        "memory, relative": [round(after / before, 3), 1.1],
    }


def command(port: int) -> list[str]:
    """What runs ``coded-torch serve``, on asyncio's own loop, as without uvloop."""
    # Not the checkout first, as in __init__.py.
    code = (
        "import sys; sys.path.pop(0); sys.modules['uvloop'] = None; "
        "from coded_torch.cli.main import main; sys.exit(main())"
    )
    return ["-c", code, "serve", "--memory", "--port", str(port)]


def kept_connection(count: int, rounds: int) -> dict[str, Any]:
    """Medians of two servers in turns, by client."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in CLIENTS}
    with serving(command) as ours, serve("coded", sleeping=False, faulty=False) as plain:
        for server in (ours, plain):
            warm_up(server.port)
        for turn in range(rounds):
            for name, send in CLIENTS.items():
                for which in (turn % 2, 1 - turn % 2):  # no server is always the first
                    seconds[name][which].extend(send((ours, plain)[which].port, count))
    found: dict[str, Any] = {}
    for name, (command_s, plain_s) in seconds.items():
        found[f"p50 by {name}"] = percentile(command_s, 50)
        found[f"p50 by {name}, uvicorn.run"] = percentile(plain_s, 50)
        ratio = float(np.median(command_s) / np.median(plain_s))
        found[f"{name}, against uvicorn.run"] = [round(ratio, 3), 1.1]
    return found


def start_and_end() -> dict[str, Any]:
    requests, _ = requests_of(1, SEED)
    shared = set(os.listdir("/dev/shm"))
    start = time.perf_counter()
    with serving(command) as server:
        (reply,) = drive(server.port, requests, 1e6, SEED)
        assert reply.status == 200
        first = time.perf_counter() - start
        helpers = family(server.process.pid)  # the fork server goes some seconds later
        workers = set().union(*map(family, helpers))
        os.kill(server.process.pid, signal.SIGKILL)
        start = time.perf_counter()
        while any(map(alive, workers)) and time.perf_counter() < start + 60:
            time.sleep(0.005)
        gone = time.perf_counter() - start
        left = set(os.listdir("/dev/shm")) - shared
        while any(map(alive, helpers)) and time.perf_counter() < start + 60:
            time.sleep(0.005)
        all_gone = time.perf_counter() - start
    return {
        "first answer, seconds": [round(first, 2), 10],
        "workers gone, seconds": [round(gone, 2), 2],
        "left in shared memory": [len(left), 0],
        "the fork server too, seconds": round(all_gone, 2),
    }


def predicted() -> dict[str, Any]:
    """Of digits whose results are lost, the share of the right class, by the answers remembered."""
    images, labels = digits()
    model = lenet5()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    found = {}
    half_lost = LocalWorkers(Trace([[math.inf, 0.0] * 2]))
    for known in KNOWN:
        memory, seen = Memory(), order[:known]
        with torch.no_grad():
            memory.observe([images[seen]], [model(images[seen])])
            memory.rebuild()
            coded = CodedWrapper(
                model,
                KernelCode(K, N),
                workers=half_lost,
                waiting=Waiting(deadline=1.0),
                surrogate=lambda x, memory=memory: memory.predict([x])[0],
            )
            right: list[Tensor] = []
            for rows in order[-HELD_OUT:].split(MOST_ROWS):
                answers, report = coded.run(images[rows])
                assert report.predicted is not None
                right.append((answers.argmax(1) == labels[rows])[report.predicted])
        found[str(known)] = round(float(torch.cat(right).double().mean()), 4)
    return {"right class": found}


def _counts(values: Iterable[int]) -> dict[str, int]:
    names, counts = np.unique(list(values), return_counts=True)
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def measurements(quick: bool, device: str) -> Iterator[Measurement]:
    yield ("start and end",), start_and_end
    yield ("kept connection",), functools.partial(kept_connection, 20, 1 if quick else 30)
    yield ("predicted",), predicted
    yield ("faults",), functools.partial(faults, 4 if quick else 60)
    for rate in (600.0, 2000.0):
        what = "overload", f"{rate:g} a second"
        yield what, functools.partial(overload, rate, 2 if quick else 20)
    how = (2, 1, list(HEDGES)[:1]) if quick else (12, ROUNDS, list(HEDGES))
    yield ("redundancy",), functools.partial(redundancy, *how)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "deadline": DEADLINE, "K": K, "N": N, "rounds": ROUNDS}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve, for the benchmark."""
    import uvicorn

    parser = argparse.ArgumentParser()
    parser.add_argument("policy", choices=POLICIES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--sleeping", action="store_true")
    parser.add_argument("--faulty", action="store_true")
    args = parser.parse_args(argv)
    logging.basicConfig(level="WARNING")  # kills are counted by what pools say of them
    torch.set_num_threads(1)  # the processors are the workers'
    served = record_times(application(args.policy, args.sleeping, args.faulty))
    uvicorn.run(
        served,
        host="127.0.0.1",
        port=args.port,
        loop="asyncio",  # uvloop is no dependency
        log_level="critical",
        timeout_keep_alive=75,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
