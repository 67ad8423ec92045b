"""What stragglers cost in latency, and what ends it: ``python benchmarks/latency.py``.

Uncoded, hedged and coded requests arrive at LeNet-5 at their own pace, on the same worker
processes and the same actors of a local Ray cluster, see :mod:`coded_torch.demo.latency`. Written
to ``results/latency.json``: percentiles in milliseconds, and accuracy, for each share of delayed
calls. A case that is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, read_results, write_results
from tqdm import tqdm

from coded_torch.demo.latency import ROUNDS, Load, Outcome, draw, format_outcomes, measure
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.workers import ProcessWorkers, RayWorkers

CASES = {
    "processes, none delayed": (ProcessWorkers, Load(share=0.0)),
    "processes, 1 % delayed": (ProcessWorkers, Load(share=0.01)),
    "processes, 3 % delayed": (ProcessWorkers, Load(share=0.03)),
    "Ray, 3 % delayed": (RayWorkers, Load(share=0.03, rate=5.0, num_requests=500)),
}


def summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "p50": round(outcome.percentile(50), 2),
        "p99": round(outcome.percentile(99), 2),
        "p99.9": round(outcome.percentile(99.9), 2),
        "answered per second": round(outcome.throughput, 2),
        "failed": outcome.failed,
        "calls per request": round(outcome.calls, 3),
        "accuracy": round(outcome.accuracy, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 requests each, no file")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, (images, labels) = lenet5(), digits()
    for name, (kind, load) in CASES.items():
        results = {} if args.quick else read_results(args.output)
        if name in results.get("cases", {}):
            continue
        if args.quick:
            load = dataclasses.replace(load, num_requests=100, rate=2 * load.rate)
        with kind(load.num_workers).start() as pool:
            rounds = measure(pool, model, images, labels, load)
            *_, outcomes = tqdm(rounds, total=ROUNDS, desc=name, disable=None)
        print(f"\n{name}, seed {load.seed}\n{format_outcomes(outcomes)}", flush=True)
        if args.quick:
            continue
        found = {scheme: summary(outcome) for scheme, outcome in outcomes.items()}
        found["load"] = dataclasses.asdict(load)
        results.setdefault("cases", {})[name] = found
        head = {"command": "python benchmarks/latency.py", "environment": environment()}
        write_results(args.output, head | results)
        if load.share == 0.03 and kind is ProcessWorkers:
            draw(load, outcomes).savefig(args.output.with_suffix(".png"), dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
