"""What waiting policies cost and bring, simulated: ``python -m benchmarks waiting``.

Machines that serve one part at a time from one queue, requests that arrive by themselves: see
:mod:`coded_torch.scheduling.simulation`. Written to ``results/waiting.json``, for each regime and
each fan-out
(the number of parts of a request) and each policy: percentiles of latency in medians of a part, the
share of all inputs that is predicted, calls and inputs beyond those of asking for each input once.
"One hedge" is the best in hindsight of five times to ask again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from coded_torch.demo.hedging import HedgeOnce, Unsplit
from coded_torch.nn import Waiting
from coded_torch.scheduling.simulation import Conditions, Policy, simulate

from .runs import Measurement

SEED = 0
CALM = Conditions()
STRAGGLING = Conditions(straggling=0.03)
MIX = Conditions(straggling=0.01, slow=0.05, dead=0.001, bursts=300.0)
#: Machines, parts, load, conditions.
REGIMES: dict[str, tuple[int, int, float, Conditions]] = {
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
FAN_OUTS = (1, 2, 4, 8, 16, 32, 64, 128)
NEVER = math.inf
POLICIES: dict[str, Policy] = {
    "wait for all": Unsplit(patience=NEVER, extra=0),
    "three re-asks, whole": Unsplit(patience=NEVER),
    "three re-asks, split": Waiting(predict=False),
    "predict at 3 medians of a part": Waiting(deadline=3.0),
    "predict at 3 medians of whole calls": Waiting(),
}
HEDGES: dict[str, Policy] = {
    "1.2 medians": HedgeOnce(medians=1.2),
    "1.5 medians": HedgeOnce(medians=1.5),
    "2 medians": HedgeOnce(medians=2.0),
    "fence": HedgeOnce(),
    "p95": HedgeOnce(quantile=0.95),
}


def outcome(
    policy: Policy, regime: tuple[int, int, float, Conditions], requests: int
) -> dict[str, Any]:
    machines, parts, load, conditions = regime
    found = simulate(
        policy,
        conditions,
        num_machines=machines,
        num_parts=parts,
        load=load,
        num_requests=requests,
        seed=SEED,
    )
    return {
        **{f"p{at:g}": round(found.percentile(at), 3) for at in (50, 99, 99.9)},
        "predicted": round(float(found.predicted.mean()), 6),
        "extra calls": round(found.calls - 1, 4),
        "extra work": round(found.work - 1, 4),
        "ended": dict(found.ended),
    }


def compare(
    regime: tuple[int, int, float, Conditions], requests: int, policies: Mapping[str, Policy]
) -> dict[str, Any]:
    outcomes = {name: outcome(policy, regime, requests) for name, policy in policies.items()}
    hedges = {name: outcome(policy, regime, requests) for name, policy in HEDGES.items()}
    best = min(hedges, key=lambda name: hedges[name]["p99.9"])
    return {"policies": {**outcomes, "one hedge": {**hedges[best], "after": best}}}


def spread_out(parts: int) -> tuple[int, int, float, Conditions]:
    """The regime of a fan-out: an eighth more machines than parts, at least two."""
    return parts + max(2, parts // 8), parts, 0.3, MIX


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    sizes = settings(quick)
    for name in ["6 / 4, 3 %", "6 / 4, mix"] if quick else REGIMES:
        regime = REGIMES[name]
        requests = sizes["requests"] // (4 if regime[1] > 100 else 1)
        yield ("regimes", name), functools.partial(compare, regime, requests, POLICIES)
    for parts in (1, 16) if quick else FAN_OUTS:
        regime = spread_out(parts)
        at_once = {"coded at once": Waiting.first(regime[0] - parts)}
        yield (
            ("fan-out", str(parts)),
            functools.partial(compare, regime, sizes["parts"] // parts, POLICIES | at_once),
        )


def settings(quick: bool) -> dict[str, Any]:
    return {
        "seed": SEED,
        "requests": 2000 if quick else 120_000,
        "parts": 16_000 if quick else 1_600_000,
    }
