"""Do requests still answer, and rightly, while workers die? ``python -m benchmarks resilience``.

Every scenario runs real processes and checks every answer. Times are milliseconds, and each number
stands beside its bar.

- kill: with a code, up to S of N processes are killed at random moments;
- ray: the same on Ray, whose actors are killed every three seconds;
- overhead: of the pool and of the wrapper;
- by rows (``promises.py``): exact, poison, deadline.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coded_torch.codes import LagrangeCode, NotEnoughResults, SplineCode
from coded_torch.nn import CodedWrapper
from coded_torch.workers import LocalWorkers, ProcessWorkers, RayWorkers, Task, Workers

from . import promises
from .promises import SEED, START, K, Killer, N, S
from .runs import Measurement
from .traffic import percentiles, timed

FEATURES = 64  # columns of an input
TOLERANCE = 1e-6  # float64 rounding, relative to the largest output


def affine() -> nn.Module:
    """Return a module whose results Lagrange's code gives back exactly, from any K of them."""
    generator = torch.Generator().manual_seed(SEED)
    layer = nn.Linear(FEATURES, 10, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=FEATURES**-0.5, generator=generator)
    return layer.requires_grad_(False)


class Client:
    """Sends requests through a wrapper, and checks each answer."""

    def __init__(self, pool: Workers) -> None:
        self.model = affine()
        code = LagrangeCode(K, N, degree=1, ordering="arrival")
        self.coded = CodedWrapper(self.model, code, workers=pool)
        self.generator = torch.Generator().manual_seed(SEED)
        self.worst = 0.0

    def requests(self, count: int) -> tuple[list[float], int]:
        """Send requests; return the seconds of the answered ones, and how many failed."""
        times = []
        for _ in range(count):
            x = torch.randn(K, FEATURES, generator=self.generator, dtype=torch.float64)
            answer, spent = timed(self.coded, x)
            if isinstance(answer, NotEnoughResults):
                continue
            exact = self.model(x)
            error = float((answer - exact).abs().max() / exact.abs().max())
            if not error <= TOLERANCE:
                raise AssertionError(f"an answer differs by {error} from what the module computes")
            self.worst = max(self.worst, error)
            times.append(spent)
        return times, count - len(times)


def _killed(pool: Any, count: int, pause: Callable[[float], float]) -> dict[str, Any]:
    client, draw = Client(pool), random.Random(SEED)
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
    times = [timed(call)[1] for _ in range(10 + runs)]
    return percentiles(times[10:])


SCENARIOS: dict[str, Callable[[bool], dict[str, Any]]] = {
    **{function.__name__: function for function in (kill, overhead, ray)},
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
