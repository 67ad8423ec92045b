"""Latency of a fleet of servers, by client: ``python -m benchmarks fleet``.

Six servers of the Open Inference Protocol (``fleet_server.py``) are asked by httpx as it is, with
the hedges of hedge-python 0.3.0, with retries of tenacity, and by ``EndpointWorkers``; six replicas
in Ray Serve are asked by httpx. Requests arrive on their own; a request is one part, or four that
go to servers side by side. Every row is compared with what the model computes.

- workloads: the one that hedge-python publishes, and one with longer delays. Hedges of ours may
  take as much work as those of hedge-python took.
- faults: at one server of six; or at several, while one is killed every 5 s. More than 25 requests
  per second would saturate two cores under the retries of some peers.
- hostile: all servers but one fail, each in its way, and every answer is exact.
- overhead: of a call beside a call of the bare client.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import math
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.surrogates import Memory
from coded_torch.workers import EndpointWorkers, RemoteModule

from .fleet_ray import RayFleet
from .fleet_server import FAULTS, FEATURES, NAME, perceptron
from .runs import Measurement
from .timing import measure
from .traffic import Reply, drive, percentiles

SEED = 0  # the seed of requests and kills
KINDS = ("coded_torch", "asgi", "http", "http", "http", "http")
#: The places of servers with faults. A killed one is at a random place.
PLACES = {"hung": (1,), "corrupted": (2,), "killed": (3, 4, 5)}
HOSTILE = ("refusing", "twice", "hung", "killed", "version 2")  # the faults of five servers of six
SEEDS = 5
START = 60.0  # seconds that servers may take to come up
ROWS = 16  # rows of a part
DEADLINE = 0.015  # seconds: three times the mean of a request without stragglers
UNDER_FAULTS = 0.1  # the deadline under faults, seconds
OFF = 1e-4  # of an exact answer at most: float32 rounding
PEERS = ("no hedge", "hedge-python", "tenacity")
OURS = {
    "ours, computed": Waiting(estimate=False),
    "ours, deadline": Waiting(deadline=UNDER_FAULTS),
}
Delays = tuple[float, float, float, float]
RAY_RATE = 10.0  # requests per second to Ray Serve: two cores do not carry its proxy with 50
CALM = (0.005, 0.0, 1.0, 0.0)
#: The delays of ``fleet_server.py``, the parts of a request, and requests per second.
CASES: dict[str, tuple[Delays, int, float]] = {
    "5 % ten times slower, one part": ((0.005, 0.05, 10.0, 0.0), 1, 100.0),
    "3 % take 50 ms longer, four parts": ((0.005, 0.03, 1.0, 0.05), 4, 25.0),
}


class Fleet:
    """Servers in processes of their own, at addresses that stay."""

    patience = 0.025  # seconds after which tenacity tries again

    def __init__(self, delays: Delays, kinds: Sequence[str] = KINDS) -> None:
        self.kinds, self.delays = kinds, delays
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in kinds]
            self.ports = [each.getsockname()[1] for each in found]
        self.urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        self.processes = {place: self.begun(place) for place in range(len(kinds))}

    def __enter__(self) -> Fleet:
        until = time.monotonic() + START
        while not all(self.answers(place, "/v2/health/ready") for place in self.processes):
            if time.monotonic() > until:
                self.__exit__()
                raise RuntimeError("the servers did not come up")
            time.sleep(0.05)
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(30)

    def begun(self, place: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.fleet_server", self.kinds[place]]
        command += [str(self.ports[place]), *map(str, self.delays)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def answers(self, place: int, path: str, body: str = "") -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[place], timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("POST" if body else "GET", path, body)
            return connection.getresponse().status == 200
        return False

    @contextlib.contextmanager
    def failing(self, fault: str, *places: int) -> Iterator[None]:
        """Let a server hang, answer in one of the ``FAULTS``, or be killed every 5 s and begun."""
        places, done = places or PLACES.get(fault, (2,)), threading.Event()
        killer = threading.Thread(target=self._kill, args=(done, places))
        if fault == "killed":
            killer.start()
        elif fault == "hung":
            self.processes[places[0]].send_signal(signal.SIGSTOP)
        else:
            assert self.answers(places[0], "/fault", fault)
        try:
            yield
        finally:
            done.set()
            if fault == "killed":
                killer.join()

    def _kill(self, done: threading.Event, places: Sequence[int]) -> None:
        source = random.Random(SEED)
        while not done.wait(5.0):
            place = source.choice(places)
            self.processes[place].kill()
            self.processes[place].wait(30)
            self.processes[place] = self.begun(place)


def wrapped(fleet: Fleet, waiting: Waiting, parts: int, verify: float | None = None) -> Any:
    """Return a wrapper on the fleet, with a memory if its answers may be estimated."""
    module = RemoteModule(fleet.urls[-1], NAME, outputs=["output"])
    pool = EndpointWorkers(fleet.urls, model=NAME, concurrency=8, timeout=10.0)
    surrogate = Memory() if waiting.estimate else ()
    options: Any = {"parts": parts, "surrogate": surrogate, "verify": verify}
    return CodedWrapper(module, workers=pool, waiting=waiting, **options)


def outcome(batches: Sequence[Tensor], replies: Sequence[Reply]) -> dict[str, Any]:
    answered = [(r, x) for r, x in zip(replies, batches, strict=True) if r.report is not None]
    if not answered:  # there is nothing to measure
        keys = ("p50", "p99", "p99.9", "hedging threshold", "error of estimates", "work")
        keys += ("estimated", "extra requests")
        return {"lost": len(replies), "wrong": 0} | dict.fromkeys(keys, math.nan)
    thresholds = [r.report.hedging_threshold for r, _ in answered if r.report.hedging_threshold]
    estimated = torch.cat([r.report.estimated for r, _ in answered])
    exact = torch.from_numpy(perceptron(torch.cat([x for _, x in answered]).numpy()))
    off = (torch.cat([r.answers for r, _ in answered]) - exact).abs()
    error = off[estimated].square().mean().sqrt() / exact.std() if estimated.any() else 0.0
    return {
        **percentiles([reply.latency for reply, _ in answered]),
        "hedging threshold": 1e3 * float(np.median(thresholds)) if thresholds else 0.0,
        "lost": len(replies) - len(answered),
        "wrong": int((~estimated & ~(off.amax(1) <= OFF)).sum()),
        "estimated": float(estimated.double().mean()),
        "error of estimates": float(error),
        "work": float(np.mean([r.report.work_ratio for r, _ in answered])),
        "extra requests": float(np.mean([len(r.report.hedges) for r, _ in answered])),
    }


def driven(
    fleet: Fleet | RayFleet,
    client: Any,
    parts: int,
    rate: float,
    count: int,
    *,
    seed: int = SEED,
    **options: Any,
) -> Any:
    """Send requests by a peer's name or under a policy; return how that went."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(ROWS * parts, FEATURES, generator=generator) for _ in range(count)]
    with contextlib.ExitStack() as stack:
        if isinstance(client, Waiting):
            coded = wrapped(fleet, client, parts, **options)
            stack.enter_context(coded.workers)
            send = coded.run
        else:
            from .fleet_peers import Peer

            peer = Peer(client, fleet.urls, parts, rate, fleet.patience)
            send = stack.enter_context(contextlib.closing(peer))
        drive(send, batches[:400], rate, seed + 1)
        before = getattr(send, "sent", 0)
        found = outcome(batches, drive(send, batches, rate, seed))
    if isinstance(client, str):
        found["work"] = (send.sent - before) / (parts * count)
        found["extra requests"] = parts * (found["work"] - 1)
    found["extra requests"] /= parts
    return {key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()}


def workload(name: str, seconds: float) -> dict[str, Any]:
    delays, parts, rate = CASES[name]
    with Fleet(delays) as fleet:
        send = functools.partial(driven, fleet, parts=parts, rate=rate, count=int(rate * seconds))
        found = {kind: send(kind) for kind in PEERS}
        budget = found["hedge-python"]["work"] - 1
        found["ours, computed"] = send(Waiting(estimate=False, hedge_budget=budget))
        found["ours, deadline"] = send(Waiting(deadline=DEADLINE, hedge_budget=budget))
    if seconds > 1:  # not where it is only tried
        with RayFleet(delays) as fleet:
            found["Ray Serve, no hedge"] = driven(fleet, "no hedge", parts, RAY_RATE, 300)
    bars = {
        f"{client}, {at}": [found[client][at], round(share * found["hedge-python"][at], 3)]
        for client, at, share in (
            ("ours, computed", "p99", 1.0),
            ("ours, computed", "p99.9", 1.0),
            ("ours, deadline", "p99.9", 0.7),
        )
    }
    return {"clients": found, "bars": bars}


def faults(some: Sequence[str], client: str, count: int, rate: float) -> dict[str, Any]:
    """Return how a client does while servers fail, each in its way."""
    options = {"verify": 0.02} if "wrong" in some else {}
    policy: Any = OURS.get(client, client.removeprefix("Ray Serve, "))
    with contextlib.ExitStack() as stack:
        if client.startswith("Ray Serve"):
            rate, count = RAY_RATE, min(count, 300)
            fleet = stack.enter_context(RayFleet(CALM))
            stack.enter_context(fleet.failing())
        else:
            fleet = stack.enter_context(Fleet(CALM))
            for fault in some:
                stack.enter_context(fleet.failing(fault))
        found = driven(fleet, policy, 4, rate, count, **options)
    bars = {"lost": 0, "wrong": 0, "p99.9": 1e3 * UNDER_FAULTS + 10}
    return {**found, "bars": {key: [found[key], x] for key, x in bars.items()}}


def hostile(seed: int, count: int, rate: float) -> dict[str, Any]:
    """Return how exact calls do on a calm fleet, and while all servers but one fail."""
    exact, options = Waiting(estimate=False), {"parts": 4, "rate": rate, "count": count}
    with Fleet(CALM, ("http",) * 6) as fleet:
        calm = driven(fleet, exact, **options, seed=seed)
        with contextlib.ExitStack() as stack:
            for place, fault in enumerate(HOSTILE):
                stack.enter_context(fleet.failing(fault, place))
            found = driven(fleet, exact, **options, seed=seed)
    most = calm["p99"] + calm["hedging threshold"] + calm["p50"]
    bars = {key: [found[key], x] for key, x in {"lost": 0, "wrong": 0, "p99": most}.items()}
    return {"calm": calm, "hostile": found, "bars": bars}


def overhead(runs: int) -> dict[str, Any]:
    with Fleet((0.0, 0.0, 1.0, 0.0), ("http",)) as fleet:
        coded, rows = wrapped(fleet, Waiting(estimate=False), 1), torch.zeros(ROWS, FEATURES)
        with coded.workers:
            calls = {"bare": lambda: coded.module(rows), "endpoint": lambda: coded.run(rows)}
            timings = measure(calls, runs=runs)
    found = {key: round(1e3 * timing["median"], 3) for key, timing in timings.items()}
    return {**found, "bars": {"more": [round(found["endpoint"] - found["bare"], 3), 1.0]}}


def measurements(quick: bool) -> Iterator[Measurement]:
    seconds, count, rate = (1.0, 20, 20.0) if quick else (60.0, 1000, 25.0)
    yield ("overhead", "one part"), functools.partial(overhead, 20 if quick else 1000)
    for name in list(CASES)[:1] if quick else CASES:
        yield ("workloads", name), functools.partial(workload, name, seconds)
    several = ("hung", "corrupted", "killed")
    everyone = (*PEERS, *OURS, "Ray Serve, no hedge", "Ray Serve, tenacity")
    for client in ("hedge-python", *list(OURS)[1:]) if quick else everyone:
        many = 4 * count if client in OURS and not quick else count
        run = functools.partial(faults, several, client, many, rate)
        yield ("faults", ", ".join(several), client), run
    for seed in range(1 if quick else SEEDS):
        yield (
            ("hostile", str(seed)),
            functools.partial(hostile, seed, count if quick else 10_000, 4 * rate),
        )
    for fault in () if quick else ("killed", "hung", *FAULTS):
        run = functools.partial(faults, [fault], "ours, deadline", count, rate)
        yield ("faults", fault, "ours, deadline"), run


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "rows": ROWS, "deadline": DEADLINE, "deadline under faults": UNDER_FAULTS}
