"""Do requests still answer, right and in time, while workers die?

``python -m benchmarks resilience``. Every scenario runs real processes, the disturbed and the
undisturbed requests in turns or one after the other, and checks every answer: the module is
affine, so the code gives back exactly what it computes. Times are milliseconds. The first five are
asked for under ``Waiting()``, and all at once as the others are. What is measured, and the bars
that it is to reach:

- kill: up to S of N processes are killed at random moments;
- pause: S are stopped, then S + 1, then all go on;
- mixing: threads share a wrapper whose workers answer later than its deadline;
- corruption: results that are wrong in every way that a check can see;
- leak: what a pool leaves behind;
- stragglers: a share of the calls takes 50 ms longer, against waiting for all and two-fold
  replication;
- overhead: of the pool, and of the wrapper; ray: actors are killed every three seconds;
- exact, poison, deadline: see ``promises.py``.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coded_torch.codes import NotEnoughResults, ReplicationCode, SplineCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import (
    FaultyWorkers,
    LocalWorkers,
    ProcessWorkers,
    RayWorkers,
    Workers,
)

from . import promises
from .clients import (
    FEATURES,
    SEED,
    START,
    Client,
    K,
    Killer,
    N,
    S,
    affine,
    percentiles,
    stopped,
    task_of,
)
from .runs import Measurement

DELAY = 0.05  # seconds
Bars = dict[str, list[float]]  # what was measured, and its bar
Policy = Callable[[float | None], Waiting]  # by the deadline


def as_needed(deadline: float | None) -> Waiting:
    return Waiting(deadline=deadline)


def at_once(deadline: float | None) -> Waiting:
    return Waiting.first(S, deadline=deadline)


def _killed(
    pool: Any, count: int, pause: Callable[[float], float], policy: Policy
) -> dict[str, Any]:
    client, draw = Client(pool, policy(None)), random.Random(SEED)
    client.requests(max(20, count // 20))
    calm, _ = client.requests(count)
    killer = Killer(pool, lambda: pause(draw.random()), S, SEED)
    with killer.at_work():
        times, failed = client.requests(count)
    return {
        "requests": count,
        "kills": killer.kills,
        "failed": failed,
        "largest difference": client.worst,
        "undisturbed": percentiles(calm),
        "disturbed": percentiles(times),
        "recovery, seconds": [
            round(float(np.median(killer.recoveries)), 3),
            round(max(killer.recoveries), 3),
        ],
        "bars": bars_of(times, failed, calm, killer),
    }


def bars_of(times: list[float], failed: int, calm: list[float], killer: Killer) -> Bars:
    p99, undisturbed = np.percentile(times, 99), np.percentile(calm, 99)
    return {
        "failed": [failed, 0],
        "p99": [round(p99, 3), round(max(3 * undisturbed, undisturbed + 5), 3)],
        "longest recovery, seconds": [round(max(killer.recoveries), 3), 1.0],
    }


def kill(quick: bool, policy: Policy) -> dict[str, Any]:
    with ProcessWorkers(N).start(timeout=START) as pool:
        count = 300 if quick else 10_000
        # The short run takes half a second, in which a process must die.
        least, most = (0.02, 0.12) if quick else (0.4, 0.8)
        return _killed(pool, count, lambda u: least + (most - least) * u, policy)


def ray(quick: bool) -> dict[str, Any]:
    with RayWorkers(N).start(timeout=START) as pool:
        between = 0.3 if quick else 3.0
        found = _killed(pool, 100 if quick else 2_000, lambda u: between, at_once)
    undisturbed = found["undisturbed"]["p99"]
    found["bars"] = {
        "failed": [found["failed"], 0],
        "p99": [found["disturbed"]["p99"], round(3 * undisturbed, 3)],
    }
    return found


def pause(quick: bool, policy: Policy) -> dict[str, Any]:
    count, deadline = 200 if quick else 3_000, 0.1
    with ProcessWorkers(N, grace=600).start(timeout=START) as pool:
        client = Client(pool, policy(None))
        client.requests(100)
        calm, _ = client.requests(count)
        with stopped(pool.pids[:S]):
            times, failed = client.requests(count)
        limited, late = Client(pool, policy(deadline)), []
        stale = 0
        for _ in range(5 if quick else 30):
            stale += client.requests(20)[1]  # until those that were stopped are free again
            with stopped(pool.pids[: S + 1]):
                start = time.perf_counter()
                with contextlib.suppress(NotEnoughResults):
                    limited.request()
                late.append(time.perf_counter() - start - deadline)
        stale += client.requests(count // 3)[1]
    return {
        "requests": count,
        "undisturbed": percentiles(calm),
        "S stopped": percentiles(times),
        "S + 1 stopped, ms after the deadline": round(max(late) * 1e3, 3),
        "bars": {
            "failed": [failed + stale, 0],
            "p99": [percentiles(times)["p99"], round(1.5 * percentiles(calm)["p99"], 3)],
            "ms after the deadline": [round(max(late) * 1e3, 3), 50.0],
        },
    }


class Replicated:
    """Every input to so many workers, answered when each has a reply: nothing is predicted."""

    def __init__(self, pool: Workers, copies: int) -> None:
        self.pool, self.model = pool, affine()
        self.code = ReplicationCode(K, K * copies)

    def request(self, x: Tensor) -> None:
        answered: set[int] = set()
        with contextlib.closing(
            self.pool.run(self.model, task_of(self.code.encode(x)[:, None]))
        ) as replies:
            for reply in replies:
                if reply.error is None:
                    answered |= {unit % K for unit in reply.part.units}
                if len(answered) == K:
                    return


def stragglers(quick: bool) -> dict[str, Any]:
    count, interval = 60 if quick else 1500, 0.02
    found: dict[str, Any] = {"requests": count, "delay": DELAY * 1e3, "bars": {}}
    with contextlib.ExitStack() as stack:
        sizes = {"waiting for all": K, "coded": N, "replication": 2 * K}
        pools = {
            name: stack.enter_context(ProcessWorkers(n).start(timeout=START))
            for name, n in sizes.items()
        }
        for share, quarter in ((0.01, 0.25), (0.03, 0.5)):
            times = delayed_times(pools, share, count, interval)
            p99 = {name: percentiles(each)["p99"] for name, each in times.items()}
            found[f"{share:.0%} delayed"] = {name: percentiles(x) for name, x in times.items()}
            found["bars"] |= {
                f"{share:.0%}: p99": [p99["coded"], quarter * DELAY * 1e3],
                f"{share:.0%}: p99, waiting for all, at least": [
                    -p99["waiting for all"],
                    -DELAY * 1e3,
                ],
                f"{share:.0%}: p99 against replication's": [
                    round(p99["coded"] / p99["replication"], 3),
                    1.2,
                ],
            }
    return found


def delayed_times(
    pools: dict[str, ProcessWorkers], share: float, count: int, interval: float
) -> dict[str, list[float]]:
    """Milliseconds of the requests of three schemes, in turns; some of the calls are delayed."""
    law = Bernoulli(share, latency=DELAY)
    faulty = {name: FaultyWorkers(pool, delays=law, seed=SEED) for name, pool in pools.items()}
    client = Client(faulty["coded"], at_once(None))
    x = torch.randn(K, FEATURES, generator=client.generator, dtype=torch.float64)
    requests: dict[str, Callable[[], object]] = {
        "waiting for all": functools.partial(Replicated(faulty["waiting for all"], 1).request, x),
        "coded": client.request,
        "replication": functools.partial(Replicated(faulty["replication"], 2).request, x),
    }
    times: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(count):
        for name, request in requests.items():
            start = time.perf_counter()
            request()
            times[name].append((time.perf_counter() - start) * 1e3)
        time.sleep(interval)
    return times


def mixing(quick: bool, policy: Policy) -> dict[str, Any]:
    count, threads = 400 if quick else 10_000, 8
    law = Bernoulli(0.05, latency=0.04)
    with FaultyWorkers(ProcessWorkers(N).start(timeout=START), delays=law, seed=SEED) as pool:
        coded = CodedWrapper(
            nn.Identity(),
            SplineCode(K, N),
            workers=pool,
            waiting=policy(0.03),
            ordering="arrival",
        )

        def request(i: int) -> str:
            x = torch.full((K, 3), float(i), dtype=torch.float64)
            try:
                return "right" if torch.allclose(coded(x), x, atol=1e-6) else "mixed"
            except NotEnoughResults:
                return "too few"

        with ThreadPoolExecutor(threads) as executor:
            outcomes = list(executor.map(request, range(count)))
    return {
        "requests": count,
        "threads": threads,
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "bars": {"mixed": [outcomes.count("mixed"), 0]},
    }


def corruption(quick: bool, policy: Policy) -> dict[str, Any]:
    count = 100 if quick else 1_000
    rates = dict.fromkeys(("nan", "infinity", "shape", "dtype", "structure", "crash"), 0.01)
    with FaultyWorkers(ProcessWorkers(N).start(timeout=START), rates=rates, seed=SEED) as pool:
        client, reasons = Client(pool, policy(None)), []
        failed = 0
        for _ in range(count):
            try:
                client.request()
            except NotEnoughResults:
                failed += 1
            reasons += client.report.rejected.values()
    return {
        "requests": count,
        "rates": rates,
        "rejected": len(reasons),
        "not finite": sum("not finite" in reason for reason in reasons),
        "unlike most": sum("where most returned" in reason for reason in reasons),
        "killed": sum("was killed by SIGKILL" in reason for reason in reasons),
        "bars": {"failed": [failed, 0]},
    }


def leak(quick: bool, policy: Policy) -> dict[str, Any]:
    def session() -> None:
        with ProcessWorkers(N).start(timeout=START) as pool:
            client = Client(pool, policy(None))
            client.requests(50 if quick else 500)
            os.kill(pool.pids[0], signal.SIGKILL)
            client.requests(50)

    def inventory() -> dict[str, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return {
            "children": len(children),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "shared-memory segments": len(os.listdir("/dev/shm")),
            "resident MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        }

    session()  # the server that processes are forked from, and caches, stay
    before = inventory()
    for _ in range(3 if quick else 10):
        session()
    after = inventory()
    memory = round(after["resident MiB"] / before["resident MiB"], 3)
    return {
        "before": before,
        "after": after,
        "bars": {"resident memory": [memory, 1.05]}
        | {name: [after[name], before[name]] for name in before if name != "resident MiB"},
    }


def overhead(quick: bool) -> dict[str, Any]:
    runs = 30 if quick else 300
    found: dict[str, Any] = {}
    module = nn.Identity()  # the same in all calls: a new one would have to be sent
    with torch.no_grad(), ProcessWorkers(4).start(timeout=START) as pool:
        for name, columns in (("4 x 40 B", 10), ("4 x 1 MiB", 1 << 18)):
            values = torch.randn(4, 1, columns)
            task = task_of(values)

            def call(task: Any = task) -> None:
                for reply in pool.run(module, task):
                    assert reply.error is None

            found[f"pool, {name}"] = _times(call, runs)
        x = torch.randn(8, (1 << 20) // 32)
        for name, ordering in (("arrival", "arrival"), ("similarity", "similarity")):
            coded = CodedWrapper(
                _Head(), SplineCode(8, 12), workers=LocalWorkers(), ordering=ordering
            )
            found[f"wrapper, K = 8, N = 12, 1 MiB, {name}"] = _times(
                functools.partial(coded, x), runs
            )
    found["bars"] = {
        "pool, 4 x 1 MiB": [found["pool, 4 x 1 MiB"]["p50"], 1.5],
        "pool, 4 x 1 MiB against 4 x 40 B": [
            round(found["pool, 4 x 1 MiB"]["p50"] / found["pool, 4 x 40 B"]["p50"], 3),
            1.15,
        ],
        "wrapper, K = 8, N = 12, 1 MiB": [
            found["wrapper, K = 8, N = 12, 1 MiB, arrival"]["p50"],
            0.3,
        ],
    }
    return found


class _Head(nn.Module):
    """Takes no time."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :10]


def _times(call: Callable[[], object], runs: int) -> dict[str, float]:
    times = []
    for _ in range(10 + runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return percentiles(times[10:])


POLICIES = {"": as_needed, ", all at once": at_once}
SCENARIOS: dict[str, Callable[[bool], dict[str, Any]]] = {
    **{
        f"{function.__name__}{name}": functools.partial(function, policy=policy)
        for function in (kill, pause, mixing, corruption, leak)
        for name, policy in POLICIES.items()
    },
    **{function.__name__: function for function in (stragglers, overhead, ray)},
    **promises.SCENARIOS,
}


@torch.no_grad()
def run(name: str, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)  # the cores are the workers'
    found = SCENARIOS[name](quick)
    for bar, (value, most) in found["bars"].items():
        print(f"  {'met   ' if value <= most else 'MISSED'} {bar}: {value} (at most {most})")
    return found


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in SCENARIOS:
        yield (name,), functools.partial(run, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "N, K, S": [N, K, S], "delay": DELAY}
