"""How often honest machines are accused: ``python -m benchmarks false_alarms``.

Requests in which nobody lies, of held-out batches drawn anew: in how many a machine is dropped, and
in how many there are suspects; also where a third of the machines computes in half precision. The
scores of these machines, in the order of requests, go into
:class:`~coded_torch.workers.Reputation`, as do those of a machine that lies a little.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from coded_torch.adversaries import Verdict, locate
from coded_torch.codes import KernelCode, plan_batch
from coded_torch.workers import Reputation

from .adversaries import BATCH_SIZE, CASES
from .locators import Case, Trial, evidence
from .runs import Measurement, progress
from .schemes import FIXED
from .subjects import SEED, run, subject

PRECISIONS = {"float32": None, "a third in float16": torch.float16, "in bfloat16": torch.bfloat16}
REQUESTS = {"float32": 5000, "a third in float16": 200, "in bfloat16": 200}
LIES = (0.3, 0.1)  # noise, in standard deviations of the outputs
STREAMS = 20
_MOST = 500  # requests of a stream


class Requests:
    """Requests to a network whose outputs are known."""

    def __init__(self, name: str, case: Case, dtype: torch.dtype | None, quick: bool) -> None:
        of = subject(name, quick)
        self.case, self.images = case, of.held_out.images
        self.exact = run(of.model, self.images)
        self.rough = self.exact
        if dtype is not None:
            self.rough = run(copy.deepcopy(of.model).to(dtype), self.images.to(dtype)).float()
        self.generator = torch.Generator().manual_seed(SEED)

    def judge(self, rough: bool = False, noise: float = 0.0) -> tuple[Verdict, int]:
        """One request, and a machine of it, which adds noise; a third may compute roughly."""
        n, k, s, most = self.case
        rows = torch.randperm(len(self.images), generator=self.generator)[:BATCH_SIZE]
        plan = plan_batch(KernelCode(k, n, **FIXED), "similarity", [self.images[rows]], s + most)
        order = torch.randperm(n, generator=self.generator).tolist()
        received = sorted(order[: n - s])
        results = plan.encode(self.exact[rows])[received]
        if rough:
            results[::3] = plan.encode(self.rough[rows])[received][::3]
        liar = received.index(order[0])
        if noise:
            lie = torch.randn(results[liar].shape, generator=self.generator)
            results[liar] += noise * results[liar].std() * lie
        trial = Trial(plan, results, received, (), most, {})
        return locate(evidence(trial), received, most), order[0]


@torch.no_grad()
def honest(name: str, case: Case, precision: str, quick: bool) -> dict[str, Any]:
    requests = Requests(name, case, PRECISIONS[precision], quick)
    count = 20 if quick else REQUESTS[precision]
    accused = suspicious = left = 0
    scores: list[float] = []
    for _ in progress(range(count), "requests", count):
        verdict, _ = requests.judge(rough=PRECISIONS[precision] is not None)
        accused += bool(verdict.liars)
        suspicious += bool(verdict.suspects)
        left += bool(verdict.left)
        scores += verdict.scores.values()
    z = np.array(scores)
    return {
        "requests": count,
        "with a machine dropped": accused,
        "with suspects": suspicious,
        "z: mean, deviation, largest": [float(f"{x:.3f}") for x in (z.mean(), z.std(), z.max())],
        "of z, above 2, 3, 4": [float(f"{(z > x).mean():.3g}") for x in (2, 3, 4)],
        **_alarms(z),
    }


def _alarms(z: np.ndarray) -> dict[str, Any]:
    """False alarms of a reputation, over 300,000 scores: these in random order, and normal ones."""
    generator = np.random.default_rng(SEED)
    shape = 3000, 100  # requests, machines
    streams = {
        "of honest scores": generator.choice(z, shape),
        "of normal ones": generator.standard_normal(shape),
    }
    found = {}
    for what, stream in streams.items():
        reputation, alarms = Reputation(), 0
        for scores in stream.tolist():
            for machine in reputation.update(dict(enumerate(scores))):
                alarms += 1
                reputation.forget(machine)
        found[f"CUSUM alarms in 300,000 {what}"] = alarms
    return found


@torch.no_grad()
def liars(name: str, case: Case, quick: bool) -> dict[str, Any]:
    """Requests until a liar is named; in these it is asked in every one and always answers."""
    found: dict[str, Any] = {}
    requests = Requests(name, case, None, quick)
    for noise in LIES:
        needed, caught, total = [], 0, 0
        for _ in range(2 if quick else STREAMS):
            reputation = Reputation()
            for request in itertools.count(1):
                verdict, liar = requests.judge(noise=noise)
                caught += liar in verdict.liars
                total += 1
                # Every request draws another liar; scores are what one machine would have got.
                if reputation.update({0: verdict.scores[liar]}) or request == _MOST:
                    needed.append(request)
                    break
        found[f"noise x {noise}"] = {
            "requests until named: median, most": [float(np.median(needed)), max(needed)],
            "dropped in a request": float(f"{caught / total:.3g}"),
        }
    return found


def measurements(quick: bool, device: str) -> Iterable[Measurement]:
    for case in CASES[:1] if quick else CASES:
        for precision in PRECISIONS:
            key = ("lenet5", str(case), precision)
            yield key, functools.partial(honest, "lenet5", case, precision, quick)
        key = ("lenet5", str(case), "small lies")
        yield key, functools.partial(liars, "lenet5", case, quick)


def settings(quick: bool) -> dict[str, Any]:
    return {"seed": SEED, "batch size": BATCH_SIZE, "requests": REQUESTS, "streams": STREAMS}
