"""How much do waiting policies cost and gain, simulated? ``python -m benchmarks waiting``.

Workers serve one part at a time from one queue, and requests arrive on their own, see
:mod:`coded_torch.experiments.simulation`. For each regime, each number of parts of a request and
each policy: percentiles of latency in medians of a part, the share of rows that is estimated, calls
and rows beyond asking for each row once. "One hedge" is the best in hindsight of five times.

3 %, 10 %: so many parts take 5 to 50 times as long. Slow: every worker is slow for 5 % of the time,
in spells, by 3 to 10. Dead: 1 % of the parts fail after 100 medians. Bursts: every 300 medians a
fifth of the workers pause for 10. Mix: 1 % stragglers, slow, .1 % dead, bursts. The load is .3
where not said.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from coded_torch.experiments.simulation import Conditions, simulate
from coded_torch.nn import Waiting

from .hedging import WAIT_FOR_ALL, HedgeOnce, Unsplit
from .runs import Measurement

SEED = 0  # the seed of arrivals and of times
CALM = Conditions()
STRAGGLING = Conditions(straggling=0.03)
MIX = Conditions(straggling=0.01, slow=0.05, dead=0.001, bursts=300.0)
Regime = tuple[int, int, float, Conditions]  # workers, parts, load
REGIMES: dict[str, Regime] = {
    "6 / 4, calm": (6, 4, 0.3, CALM),
    "6 / 4, 3 %": (6, 4, 0.3, STRAGGLING),
    "6 / 4, 10 %": (6, 4, 0.3, Conditions(straggling=0.1)),
    "6 / 4, slow": (6, 4, 0.3, Conditions(slow=0.05)),
    "6 / 4, dead": (6, 4, 0.3, Conditions(dead=0.01)),
    "6 / 4, bursts": (6, 4, 0.3, Conditions(bursts=300.0)),
    "6 / 4, mix": (6, 4, 0.3, MIX),
    "6 / 4, calm, load 0.7": (6, 4, 0.7, CALM),
    "6 / 4, calm, load 0.9": (6, 4, 0.9, CALM),
    "24 / 20, mix": (24, 20, 0.3, MIX),
    "24 / 4, load 0.7, 3 %": (24, 4, 0.7, STRAGGLING),
    "24 / 4, load 0.7, mix": (24, 4, 0.7, MIX),
    "144 / 128, mix": (144, 128, 0.3, MIX),
}
FAN_OUTS = (1, 2, 4, 8, 16, 32, 64, 128)  # the numbers of parts of a request
POLICIES: dict[str, Any] = {
    "wait for all": WAIT_FOR_ALL,
    "three re-asks, whole": Unsplit(),
    "three re-asks, split": Waiting(),
    "estimate at 3 medians of a part": Waiting(deadline=3.0),
    "estimate at 3 medians of whole calls": Waiting(estimate_after=3.0),
}
HEDGES: dict[str, Any] = {
    "1.2 medians": HedgeOnce(medians=1.2),
    "1.5 medians": HedgeOnce(medians=1.5),
    "2 medians": HedgeOnce(medians=2.0),
    "fence": HedgeOnce(),
    "p95": HedgeOnce(quantile=0.95),
}


def outcome(policy: Any, regime: Regime, requests: int) -> dict[str, Any]:
    workers, parts, load, conditions = regime
    found = simulate(
        policy,
        conditions,
        num_workers=workers,
        num_parts=parts,
        load=load,
        num_requests=requests,
        seed=SEED,
    )
    return {
        **{f"p{at:g}": round(found.percentile(at), 3) for at in (50, 99, 99.9)},
        "estimated": round(float(found.estimated.mean()), 6),
        "extra calls": round(found.calls - 1, 4),
        "extra work": round(found.work - 1, 4),
        "ended": dict(found.ended),
    }


def compare(regime: Regime, requests: int, policies: Mapping[str, Any]) -> dict[str, Any]:
    outcomes = {name: outcome(policy, regime, requests) for name, policy in policies.items()}
    hedges = {name: outcome(policy, regime, requests) for name, policy in HEDGES.items()}
    best = min(hedges, key=lambda name: hedges[name]["p99.9"])
    return {"policies": {**outcomes, "one hedge": {**hedges[best], "after": best}}}


def measurements(quick: bool) -> Iterable[Measurement]:
    sizes = settings(quick)
    for name in ["6 / 4, 3 %", "6 / 4, mix"] if quick else REGIMES:
        requests = sizes["requests"] // (4 if REGIMES[name][1] > 100 else 1)
        yield ("regimes", name), functools.partial(compare, REGIMES[name], requests, POLICIES)
    for parts in (1, 16) if quick else FAN_OUTS:
        spare = max(2, parts // 8)
        every = POLICIES | {"coded at once": Waiting.first(spare)}
        regime = parts + spare, parts, 0.3, MIX
        requests = sizes["parts"] // parts
        yield ("fan-out", str(parts)), functools.partial(compare, regime, requests, every)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "requests": 100 if quick else 120_000,
        "parts": 400 if quick else 1_600_000,
    }
