"""Do requests still answer, and rightly, while workers die? ``python -m benchmarks resilience``.

Every scenario runs real processes and checks every answer: the module is affine, so the code gives
back its outputs exactly. Times are milliseconds. Each number stands beside its bar.

With ``Waiting()``, and with all N asked at once:

- kill: up to S of N processes are killed at random moments;
- pause: S are stopped, then S + 1, then all go on;
- mixing: threads share a wrapper whose workers answer later than its deadline;
- corruption: results that are wrong in every way that a check can see;
- leak: resources that a pool leaves behind.

Once: overhead of the pool and of the wrapper; ray, whose actors are killed every three seconds; and
the promises of a call by rows (``promises.py``): exact, poison, deadline.
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

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import NotEnoughResults, SplineCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import FaultyWorkers, LocalWorkers, ProcessWorkers, RayWorkers, Task

from . import promises
from .clients import SEED, START, Client, K, Killer, N, S, stopped
from .runs import Measurement
from .traffic import percentiles

Policy = Callable[[float | None], Waiting]  # a policy by its deadline
BROKEN = ("nan", "infinity", "shape", "dtype", "structure")


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
    killer = Killer(pool, lambda: pause(draw.random()), S)
    with killer.at_work():
        times, failed = client.requests(count)
    undisturbed, disturbed = percentiles(calm), percentiles(times)
    bar = round(max(3 * undisturbed["p99"], undisturbed["p99"] + 5), 3)
    return {
        "requests": count,
        "kills": killer.kills,
        "failed": failed,
        "largest difference": client.worst,
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "bars": {
            "failed": [failed, 0],
            "p99": [disturbed["p99"], bar],
            "longest recovery, seconds": [round(max(killer.recoveries), 3), 1.0],
        },
    }


def kill(quick: bool, policy: Policy) -> dict[str, Any]:
    with ProcessWorkers(N).start(timeout=START) as pool:
        # The short run takes half a second, in which a process must die.
        count, least, most = (300, 0.02, 0.12) if quick else (10_000, 0.4, 0.8)
        return _killed(pool, count, lambda u: least + (most - least) * u, policy)


def ray(quick: bool) -> dict[str, Any]:
    with RayWorkers(N).start(timeout=START) as pool:
        count, between = (100, 0.3) if quick else (2_000, 3.0)
        found = _killed(pool, count, lambda u: between, at_once)
    del found["bars"]["longest recovery, seconds"]
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
        for _ in range(5 if quick else 30):
            failed += client.requests(20)[1]  # until the stopped processes are free again
            with stopped(pool.pids[: S + 1]):
                start = time.perf_counter()
                with contextlib.suppress(NotEnoughResults):
                    limited.request()
                late.append(time.perf_counter() - start - deadline)
        failed += client.requests(count // 3)[1]
    undisturbed, paused = percentiles(calm), percentiles(times)
    return {
        "requests": count,
        "undisturbed": undisturbed,
        "S stopped": paused,
        "bars": {
            "failed": [failed, 0],
            "p99": [paused["p99"], round(1.5 * undisturbed["p99"], 3)],
            "ms after the deadline": [round(max(late) * 1e3, 3), 50.0],
        },
    }


def mixing(quick: bool, policy: Policy) -> dict[str, Any]:
    count, threads = 400 if quick else 10_000, 8
    law = Bernoulli(0.05, latency=0.04)
    with FaultyWorkers(ProcessWorkers(N).start(timeout=START), delays=law, seed=SEED) as pool:
        code = SplineCode(K, N, ordering="arrival")
        coded = CodedWrapper(nn.Identity(), code, workers=pool, waiting=policy(0.03))

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
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        "bars": {"mixed": [outcomes.count("mixed"), 0]},
    }


def corruption(quick: bool, policy: Policy) -> dict[str, Any]:
    count, rates = 100 if quick else 1_000, dict.fromkeys((*BROKEN, "crash"), 0.01)
    with FaultyWorkers(ProcessWorkers(N).start(timeout=START), rates=rates, seed=SEED) as pool:
        client = Client(pool, policy(None))
        _, failed = client.requests(count)
    rejected = sum(len(report.rejected) for report in client.reports)
    return {
        "requests": count,
        "rates": rates,
        "rejected": rejected,
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
    memory = round(after.pop("resident MiB") / before.pop("resident MiB"), 3)
    bars = {name: [after[name], before[name]] for name in before}
    return {"bars": {"resident memory": [memory, 1.05], **bars}}


def overhead(quick: bool) -> dict[str, Any]:
    runs, module = 30 if quick else 300, nn.Identity()
    found: dict[str, Any] = {}
    with ProcessWorkers(4).start(timeout=START) as pool:
        for name, columns in (("4 x 40 B", 10), ("4 x 1 MiB", 1 << 18)):
            leaves, spec = pytree.tree_flatten(((torch.randn(4, 1, columns),), {}))
            task = Task(leaves, [0], spec, 4, 1, torch.device("cpu"))
            found[f"pool, {name}"] = _times(lambda task=task: [*pool.run(module, task)], runs)
        x = torch.randn(8, (1 << 20) // 32)
        for ordering in ("arrival", "similarity"):
            code = SplineCode(8, 12, ordering=ordering)
            coded = CodedWrapper(_Head(), code, workers=LocalWorkers())
            name = f"wrapper, K = 8, N = 12, 1 MiB, {ordering}"
            found[name] = _times(functools.partial(coded, x), runs)
    pool_p50 = found["pool, 4 x 1 MiB"]["p50"]
    wrapper_p50 = found["wrapper, K = 8, N = 12, 1 MiB, arrival"]["p50"]
    ratio = round(pool_p50 / found["pool, 4 x 40 B"]["p50"], 3)
    bars = {
        "pool, 4 x 1 MiB": [pool_p50, 1.5],
        "pool, 4 x 1 MiB against 4 x 40 B": [ratio, 1.15],
        "wrapper, K = 8, N = 12, 1 MiB": [wrapper_p50, 0.3],
    }
    return {**found, "bars": bars}


class _Head(nn.Module):
    """Takes no time."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :10]


def _times(call: Callable[[], object], runs: int) -> dict[str, float]:
    times = []
    for _ in range(10 + runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return percentiles(times[10:])


SCENARIOS: dict[str, Callable[[bool], dict[str, Any]]] = {
    **{
        f"{function.__name__}{name}": functools.partial(function, policy=policy)
        for function in (kill, pause, mixing, corruption, leak)
        for name, policy in (("", as_needed), (", all at once", at_once))
    },
    **{function.__name__: function for function in (overhead, ray)},
    **promises.SCENARIOS,
}


@torch.no_grad()
def run(name: str, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)  # the cores are the workers'
    found = SCENARIOS[name](quick)
    for bar, (value, most) in found["bars"].items():
        print(f"  {'met   ' if value <= most else 'MISSED'} {bar}: {value} (at most {most})")
    return found


def measurements(quick: bool) -> Iterable[Measurement]:
    for name in SCENARIOS:
        yield (name,), functools.partial(run, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "N, K, S": [N, K, S]}
