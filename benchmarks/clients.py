"""Clients that check every answer, and a thread that kills workers beside them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from coded_torch.codes import LagrangeCode, NotEnoughResults
from coded_torch.nn import CodedWrapper
from coded_torch.workers import Workers

__all__ = ["FEATURES", "SEED", "START", "Client", "K", "Killer", "N", "S", "affine"]

SEED = 0  # the seed of inputs and kills
K, N, S = 4, 6, 2
FEATURES = 64  # columns of an input
START = 120.0  # seconds that a pool may take to come up
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

    def request(self) -> float:
        """Send a request; returns its seconds."""
        x = torch.randn(K, FEATURES, generator=self.generator, dtype=torch.float64)
        start = time.perf_counter()
        answer = self.coded(x)
        spent = time.perf_counter() - start
        exact = self.model(x)
        error = float((answer - exact).abs().max() / exact.abs().max())
        if not error <= TOLERANCE:
            raise AssertionError(f"an answer differs by {error} from what the module computes")
        self.worst = max(self.worst, error)
        return spent

    def requests(self, count: int) -> tuple[list[float], int]:
        """Send requests; return the seconds of the answered ones, and how many failed."""
        times, failed = [], 0
        for _ in range(count):
            try:
                times.append(self.request())
            except NotEnoughResults:
                failed += 1
        return times, failed


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
