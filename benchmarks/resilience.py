"""Do requests still answer, and rightly, while workers die? ``python -m benchmarks resilience``.

Every scenario runs real processes and checks every answer. Times are milliseconds, and each number
stands beside its bar.

- kill: with a code, up to S of N processes are killed at random moments;
- ray: the same on Ray, whose actors are killed every three seconds;
- overhead: of the pool and of the wrapper;
- computed: ``Waiting()`` where a third of the parts end their process, others return
  wrong results, and processes are killed from outside as well;
- poison: one row that ends its process, beside calls of others on the same pool;
- deadline: calls of 0.3 s while all processes hang, load, are slow, or die.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import LagrangeCode, NotEnoughResults, SplineCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Bernoulli
from coded_torch.workers import (
    FaultyWorkers,
    LocalWorkers,
    Part,
    ProcessWorkers,
    RayWorkers,
    Task,
    Workers,
)

from .runs import Measurement
from .traffic import percentiles, timed

SEED = 0  # the seed of inputs and kills
K, N, S = 4, 6, 2
START = 120.0  # seconds that a pool may take to come up
DEADLINE = 0.3  # seconds
ROWS = 64
PAUSE = 0.25  # seconds between two calls with a row that ends its process
BAD = -1.0  # an input on which the module ends its process
RATES = {"crash": 0.3} | dict.fromkeys(("nan", "infinity", "shape", "dtype", "structure"), 0.02)
FEATURES = 64  # columns of an input
TOLERANCE = 1e-6  # float64 rounding, relative to the largest output


class Killer(threading.Thread):
    """Kills some workers of a pool, waits until it is whole again and some time more, repeats."""

    def __init__(self, pool: Any, pause: Callable[[], float], most: int) -> None:
        super().__init__(daemon=True)
        self.pool, self.pause, self.most = pool, pause, most
        self.random = random.Random(SEED)
        self.done = threading.Event()
        self.kills = 0
        self.recoveries: list[float] = []

    def run(self) -> None:
        while not self.done.wait(self.pause()):
            if not (pids := self.pool.pids):  # all are being replaced
                continue
            victims = self.random.sample(pids, min(len(pids), self.random.randint(1, self.most)))
            start = time.monotonic()
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):  # the process has just ended
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


def affine() -> nn.Module:
    """Return a module whose results Lagrange's code gives back exactly, from any K of them."""
    generator = torch.Generator().manual_seed(SEED)
    layer = nn.Linear(FEATURES, 10, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=FEATURES**-0.5, generator=generator)
    return layer.requires_grad_(False)


def _killed(pool: Any, count: int, pause: Callable[[float], float]) -> dict[str, Any]:
    """Send requests, first undisturbed, and then while workers are killed; check each answer."""
    model, draw, worst = affine(), random.Random(SEED), [0.0]
    code = LagrangeCode(K, N, degree=1, ordering="arrival")
    coded = CodedWrapper(model, code, workers=pool)
    generator = torch.Generator().manual_seed(SEED)

    def seconds(count: int) -> list[float]:  # of the requests that are answered
        times = []
        for _ in range(count):
            x = torch.randn(K, FEATURES, generator=generator, dtype=torch.float64)
            answer, spent = timed(coded, x)
            if isinstance(answer, NotEnoughResults):
                continue
            exact = model(x)
            error = float((answer - exact).abs().max() / exact.abs().max())
            if not error <= TOLERANCE:
                raise AssertionError(f"an answer differs by {error} from what the module computes")
            worst.append(error)
            times.append(spent)
        return times

    seconds(max(20, count // 20))
    undisturbed = percentiles(seconds(count))
    killer = Killer(pool, lambda: pause(draw.random()), S)
    with killer.at_work():
        times = seconds(count)
    disturbed, failed = percentiles(times), count - len(times)
    bar = round(max(3 * undisturbed["p99"], undisturbed["p99"] + 5), 3)
    return {
        "requests": count,
        "kills": killer.kills,
        "failed": failed,
        "largest difference": max(worst),
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "bars": {
            "failed": [failed, 0],
            "p99": [disturbed["p99"], bar],
            "longest recovery, seconds": [round(max(killer.recoveries), 3), 1.0],
        },
    }


def kill(quick: bool) -> dict[str, Any]:
    with ProcessWorkers(N).start(timeout=START) as pool:
        # The short run takes half a second, in which a process must die.
        count, least, most = (300, 0.02, 0.12) if quick else (10_000, 0.4, 0.8)
        return _killed(pool, count, lambda u: least + (most - least) * u)


def ray(quick: bool) -> dict[str, Any]:
    with RayWorkers(N).start(timeout=START) as pool:
        count, between = (100, 0.3) if quick else (2_000, 3.0)
        found = _killed(pool, count, lambda u: between)
    del found["bars"]["longest recovery, seconds"]
    return found


def overhead(quick: bool) -> dict[str, Any]:
    runs, module = 30 if quick else 300, nn.Identity()
    found: dict[str, Any] = {}
    with ProcessWorkers(4).start(timeout=START) as pool:
        for name, columns in (("4 x 40 B", 10), ("4 x 1 MiB", 1 << 18)):
            leaves, spec = pytree.tree_flatten(((torch.randn(4, columns),), {}))
            task = Task(leaves, [0], spec, 4, 1, torch.device("cpu"))
            found[f"pool, {name}"] = _times(functools.partial(_each, pool, module, task), runs)
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


def _each(pool: Workers, module: nn.Module, task: Task) -> None:
    """Have a pool compute each unit of a task as its own part."""
    with pool.open(module, task) as request:
        request.ask([Part(n, (n,)) for n in range(task.num_units)])
        assert len(list(request.replies())) == task.num_units


def _times(call: Callable[[], object], runs: int) -> dict[str, float]:
    times = [timed(call)[1] for _ in range(10 + runs)]
    return percentiles(times[10:])


class Model(nn.Module):
    """A small network that ends its process at one input, or fails in a way that its input names.

    Args:
        how: "hang" when it runs, or "load" for ever, or "die" where it is loaded; else it works.
    """

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 256), nn.Tanh(), nn.Linear(256, 10))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[:, 0] == BAD).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(3600)
        return self.layers(x)  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.how == "load":
            time.sleep(3600)
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)


def _coded(pool: Workers, model: nn.Module, **waiting: Any) -> CodedWrapper:
    return CodedWrapper(model, workers=pool, waiting=Waiting(**waiting))


def _batch(generator: torch.Generator, rows: int = ROWS) -> Tensor:
    return torch.rand(rows, FEATURES, generator=generator)


def computed(quick: bool) -> dict[str, Any]:
    count, rows = 15 if quick else 2_000, 24
    generator, model = torch.Generator().manual_seed(SEED), Model()
    wrong, estimated, times = 0, 0, []
    with ProcessWorkers(N).start(timeout=START) as pool:
        coded = _coded(FaultyWorkers(pool, rates=RATES, seed=SEED), model)
        killer = Killer(pool, lambda: 0.1 if quick else 0.5, 1)
        with killer.at_work():
            for _ in range(count):
                x = _batch(generator, rows)
                found, spent = timed(coded.run, x)
                if isinstance(found, NotEnoughResults):
                    continue
                answers, report = found
                times.append(spent)
                wrong += not torch.allclose(answers, model(x), atol=1e-5)
                estimated += int(report.estimated.sum())
    return {
        "calls": count,
        "rates": RATES,
        "kills": killer.kills,
        "times": percentiles(times),
        "bars": {
            "wrong": [wrong, 0],
            "estimated": [estimated, 0],
            "share that raise": [round(1 - len(times) / count, 4), 0.01],
        },
    }


def poison(quick: bool) -> dict[str, Any]:
    count = 3 if quick else 100
    generator, model = torch.Generator().manual_seed(SEED), Model()
    lost, computed = [], []
    with ProcessWorkers(N).start(timeout=START) as pool:
        mine, others = _coded(pool, model), _coded(pool, model, estimate_after=3.0)

        @torch.no_grad()
        def call(value: float) -> None:
            for _ in range(count):
                x, before = _batch(generator), pool.num_restarts
                x[17, 0] = value
                found, _ = timed(mine, x)
                if isinstance(found, NotEnoughResults):
                    computed.append(len(found.received))
                time.sleep(PAUSE)
                lost.append(pool.num_restarts - before)

        calm = _times_beside(others, lambda: call(0.0))
        disturbed = _times_beside(others, lambda: call(BAD))
    p99 = float(np.percentile(disturbed, 99) / np.percentile(calm, 99))
    return {
        "calls": count,
        "others, calm": percentiles(calm),
        "others, disturbed": percentiles(disturbed),
        "bars": {
            "calls that did not compute 63 rows": [count - computed.count(ROWS - 1), 0],
            "processes lost by a call": [max(lost), 5],
            "others: p99 by that of calm": [round(p99, 3), 2.0],
        },
    }


def _times_beside(coded: CodedWrapper, work: Callable[[], object]) -> list[float]:
    """Return the seconds of a wrapper's calls while something else is done."""
    generator, times = torch.Generator().manual_seed(SEED), []
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        times.append(timed(coded, _batch(generator))[1])
        time.sleep(0.005)
    return times


def deadline(quick: bool) -> dict[str, Any]:
    count = 3 if quick else 125
    found: dict[str, Any] = {"calls of each": count, "bars": {}}
    every = []
    for how in ("hang", "load", "slow", "die"):
        delays = Bernoulli(0.4, latency=2 * DEADLINE) if how == "slow" else None
        with ProcessWorkers(N, hang_timeout=600).start(timeout=START) as pool:
            coded = _coded(FaultyWorkers(pool, delays=delays), Model(how), deadline=DEADLINE)
            late, outcomes = _lateness(coded, count)
        found[how] = {"outcomes": outcomes, "ms after the deadline": percentiles(late)}
        every += late
    found["bars"]["p99, ms after the deadline"] = [round(percentiles(every)["p99"], 2), 10.0]
    found["bars"]["latest, ms after the deadline"] = [round(1e3 * max(every), 2), 30.0]
    return found


def _lateness(coded: CodedWrapper, count: int) -> tuple[list[float], dict[str, int]]:
    """Return the seconds after the deadline, and how often calls ended in each way."""
    generator, late, outcomes = torch.Generator().manual_seed(SEED), [], Counter[str]()
    for _ in range(count):
        found, spent = timed(coded.run, _batch(generator))
        late.append(spent - DEADLINE)
        raised = isinstance(found, NotEnoughResults)
        outcomes[type(found).__name__ if raised else found[1].ended] += 1
    return late, dict(outcomes)


SCENARIOS: dict[str, Callable[[bool], dict[str, Any]]] = {
    function.__name__: function for function in (kill, overhead, ray, computed, poison, deadline)
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
