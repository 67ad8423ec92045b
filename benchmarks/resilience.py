"""Do requests still answer, right and in time, while workers die?

``python -m benchmarks resilience``. Every scenario runs real processes, the
disturbed and the undisturbed requests in turns or one after the other in one process, and checks
every answer against what the received results decode to.
Times are milliseconds. What is measured, and the bars that it is to reach:

- kill: up to S of N processes are killed at random moments;
- pause: S are stopped, then S + 1, then all go on;
- stragglers: a share of the calls takes 50 ms longer, against waiting for all and two-fold
  replication;
- mixing: threads share a wrapper whose workers answer later than its deadline;
- corruption: results that are wrong in every way that a check can see;
- leak: what a pool leaves behind;
- overhead: of the pool, and of the wrapper with encoding and decoding;
- ray: actors are killed every three seconds.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import NotEnoughResults, ReplicationCode, SplineCode
from coded_torch.nn import CodedWrapper, RunReport
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import (
    FaultyWorkers,
    LocalWorkers,
    ProcessWorkers,
    RayWorkers,
    Task,
    Workers,
)

from .runs import Measurement

SEED = 0
K, N, S = 4, 6, 2
DELAY = 0.05  # seconds
FEATURES = 64
START = 120.0  # seconds that a pool may take to come up

Bars = dict[str, list[float]]  # what was measured, and its bar


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    layers = nn.Sequential(nn.Linear(FEATURES, 256), nn.Tanh(), nn.Linear(256, 10)).eval()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=FEATURES**-0.5, generator=generator)
    return layers.requires_grad_(False)


class Client:
    """Sends requests through a wrapper, and checks each answer."""

    def __init__(self, pool: Workers, **options: Any) -> None:
        self.model, self.code = model(), SplineCode(K, N)
        self.coded = CodedWrapper(
            self.model,
            self.code,
            workers=pool,
            num_stragglers=S,
            ordering="arrival",
            shuffle=False,
            on_run=self._keep,
            **options,
        )
        self.run: RunReport | None = None
        self.generator = torch.Generator().manual_seed(SEED)
        self.worst = 0.0

    def _keep(self, run: RunReport) -> None:
        self.run = run

    def request(self) -> float:
        """Milliseconds that one request took."""
        x = torch.randn(K, FEATURES, generator=self.generator)
        start = time.perf_counter()
        answer = self.coded(x)
        spent = time.perf_counter() - start
        results = self.model(self.code.encode(x))
        received = list(self.run.received)
        wanted = self.code.decode(results[received], received)
        error = float((answer - wanted).abs().max() / wanted.abs().max())
        if not error <= 1e-4:
            raise AssertionError(f"an answer differs by {error} from what {received} decode to")
        self.worst = max(self.worst, error)
        return spent * 1e3

    def requests(self, count: int) -> tuple[list[float], int]:
        """The times of those that were answered, and how many failed."""
        times, failed = [], 0
        for _ in range(count):
            try:
                times.append(self.request())
            except NotEnoughResults:
                failed += 1
        return times, failed


def percentiles(times: Sequence[float]) -> dict[str, float]:
    names = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
    return {name: round(float(np.percentile(times, at)), 3) for name, at in names.items()}


class Killer(threading.Thread):
    """Kills some workers of a pool, waits until it is whole again and some time more, repeats."""

    def __init__(self, pool: Any, pause: Callable[[], float], most: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.pool, self.pause, self.most = pool, pause, most
        self.random = random.Random(seed)
        self.done = threading.Event()
        self.kills = 0
        self.recoveries: list[float] = []

    def run(self) -> None:
        while not self.done.wait(self.pause()):
            victims = self.random.sample(self.pool.pids, self.random.randint(1, self.most))
            start = time.monotonic()
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            self.kills += len(victims)
            while set(victims) & set(self.pool.pids) or self.pool.num_ready < N:
                time.sleep(0.002)
            self.recoveries.append(time.monotonic() - start)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.done.set()
            self.join(START)


def _killed(pool: Any, count: int, pause: Callable[[float], float], bars: Bars) -> dict[str, Any]:
    client, draw = Client(pool), random.Random(SEED)
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
        "bars": bars_of(times, failed, calm, killer) | bars,
    }


def bars_of(times: Sequence[float], failed: int, calm: Sequence[float], killer: Killer) -> Bars:
    p99, undisturbed = np.percentile(times, 99), np.percentile(calm, 99)
    return {
        "failed": [failed, 0],
        "p99": [round(p99, 3), round(max(3 * undisturbed, undisturbed + 5), 3)],
        "longest recovery, seconds": [round(max(killer.recoveries), 3), 1.0],
    }


def kill(quick: bool) -> dict[str, Any]:
    with ProcessWorkers(N).start(START) as pool:
        count = 300 if quick else 10_000
        return _killed(pool, count, lambda u: (0.05 if quick else 0.4) + 0.4 * u, {})


def ray(quick: bool) -> dict[str, Any]:
    with RayWorkers(N).start(START) as pool:
        found = _killed(pool, 100 if quick else 2_000, lambda u: 0.3 if quick else 3.0, {})
    undisturbed = found["undisturbed"]["p99"]
    found["bars"] = {
        "failed": [found["failed"], 0],
        "p99": [found["disturbed"]["p99"], round(3 * undisturbed, 3)],
    }
    return found


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def pause(quick: bool) -> dict[str, Any]:
    count, deadline = 200 if quick else 3_000, 0.1
    with ProcessWorkers(N, grace=600).start(START) as pool:
        client = Client(pool)
        client.requests(100)
        calm, _ = client.requests(count)
        with stopped(pool.pids[:S]):
            times, failed = client.requests(count)
        limited, late = Client(pool, deadline=deadline), []
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
    """Every input to two workers, answered when each has a reply: no code, no approximation."""

    def __init__(self, pool: Workers, copies: int) -> None:
        self.pool, self.model, self.copies = pool, model(), copies
        self.coded = CodedWrapper(
            self.model,
            ReplicationCode(K, K * copies),
            workers=pool,
            ordering="arrival",
            shuffle=False,
        )

    def request(self, x: Tensor) -> None:
        inputs = self.coded.code.encoder(x)
        task = task_of(inputs[:, None])
        answered: set[bytes] = set()
        replies = self.pool.run(self.model, task, quorum=K)
        for reply in replies:
            if reply.error is None:
                answered.add(inputs[reply.worker].numpy().tobytes())
            if len(answered) == K:
                break
        replies.close()


def task_of(values: Tensor) -> Task:
    leaves, spec = pytree.tree_flatten(((values,), {}))
    return Task(leaves, [0], spec, values.shape[0], values.shape[1], values.device)


def stragglers(quick: bool) -> dict[str, Any]:
    count, interval = 60 if quick else 1500, 0.02
    found: dict[str, Any] = {"requests": count, "delay": DELAY * 1e3, "bars": {}}
    with contextlib.ExitStack() as stack:
        sizes = {"waiting for all": K, "coded": N, "replication": 2 * K}
        pools = {
            name: stack.enter_context(ProcessWorkers(n).start(START)) for name, n in sizes.items()
        }
        for share, quarter in ((0.01, 0.25), (0.03, 0.5)):
            faulty = {name: _delayed(pool, share) for name, pool in pools.items()}
            client = Client(faulty["coded"])
            others = {
                "waiting for all": Replicated(faulty["waiting for all"], 1),
                "replication": Replicated(faulty["replication"], 2),
            }
            times: dict[str, list[float]] = {name: [] for name in sizes}
            x = torch.randn(K, FEATURES, generator=client.generator)
            for _ in range(count):
                for name in sizes:
                    start = time.perf_counter()
                    if name == "coded":
                        client.request()
                    else:
                        others[name].request(x)
                    times[name].append((time.perf_counter() - start) * 1e3)
                time.sleep(interval)
            p99 = {name: percentiles(values)["p99"] for name, values in times.items()}
            found[f"{share:.0%} delayed"] = {n: percentiles(v) for n, v in times.items()}
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


def _delayed(pool: Workers, share: float) -> FaultyWorkers:
    return FaultyWorkers(pool, delays=Bernoulli(share, latency=DELAY), seed=SEED)


def mixing(quick: bool) -> dict[str, Any]:
    count, threads = 400 if quick else 10_000, 8
    law = Bernoulli(0.05, latency=0.04)
    with FaultyWorkers(ProcessWorkers(N).start(START), delays=law, seed=SEED) as pool:
        coded = CodedWrapper(
            nn.Identity(),
            SplineCode(K, N),
            workers=pool,
            num_stragglers=S,
            deadline=0.03,
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


def corruption(quick: bool) -> dict[str, Any]:
    count = 100 if quick else 1_000
    rates = dict.fromkeys(("nan", "infinity", "shape", "dtype", "structure", "crash"), 0.01)
    with FaultyWorkers(ProcessWorkers(N).start(START), rates=rates, seed=SEED) as pool:
        client, reasons = Client(pool), []
        failed = 0
        for _ in range(count):
            try:
                client.request()
            except NotEnoughResults:
                failed += 1
            reasons += client.run.rejected.values()
    return {
        "requests": count,
        "rates": rates,
        "rejected": len(reasons),
        "not finite": sum("not finite" in reason for reason in reasons),
        "unlike most": sum("where most returned" in reason for reason in reasons),
        "killed": sum("was killed by SIGKILL" in reason for reason in reasons),
        "bars": {"failed": [failed, 0]},
    }


def leak(quick: bool) -> dict[str, Any]:
    def session() -> None:
        with ProcessWorkers(N).start(START) as pool:
            client = Client(pool)
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
    with torch.no_grad(), ProcessWorkers(4).start(START) as pool:
        for name, columns in (("4 x 40 B", 10), ("4 x 1 MiB", 1 << 18)):
            task = task_of(torch.randn(4, 1, columns))

            def call(task: Any = task) -> None:
                for reply in pool.run(nn.Identity(), task, quorum=4):
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


SCENARIOS: dict[str, Callable[[bool], dict[str, Any]]] = {
    function.__name__: function
    for function in (kill, pause, stragglers, mixing, corruption, leak, overhead, ray)
}


def run(name: str, quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)  # the cores are the workers'
    with torch.no_grad():
        found = SCENARIOS[name](quick)
    for bar, (value, most) in found["bars"].items():
        print(f"  {'met   ' if value <= most else 'MISSED'} {bar}: {value} (at most {most})")
    return found


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for name in SCENARIOS:
        yield (name,), functools.partial(run, name, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "N, K, S": [N, K, S], "delay": DELAY}
