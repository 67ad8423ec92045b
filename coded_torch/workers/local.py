r"""Workers in this process, whose lateness is simulated on a virtual clock."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn

from .._arguments import count, instance
from ..stragglers import Stragglers
from .base import Reply, Task, WorkerError, Workers

__all__ = ["LocalWorkers"]


class LocalWorkers(Workers):
    r"""Workers that are simulated in this process, all in one batch.

    Latencies are drawn first; then only the workers whose results are wanted are computed. Nobody
    waits: latencies and the deadline are times on a virtual clock, on which the module itself takes
    no time. All workers run the same code, so an exception of the module is the caller's.

    Args:
        stragglers: the law of the latencies; None: everybody answers at once.
        max_batch_size: the most rows in one call of the module, to bound memory; None: one call.
        generator: where latencies are drawn from; None: the law's own generator.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: ``max_batch_size`` is less than 1.

    Note:
        The workers that make up the quorum are computed in one batch, in the order of the coded
        inputs, and yielded in that of their latencies: which bits they give does not depend on who
        of them was first. Who is wanted beyond them (for a tolerance, or in place of a result that
        does not count) is computed alone, and modules may round otherwise in smaller batches.

    Example:
        >>> from coded_torch.workers import LocalWorkers
        >>> LocalWorkers(max_batch_size=256)
        LocalWorkers(stragglers=None, max_batch_size=256)
    """

    def __init__(
        self,
        stragglers: Stragglers | None = None,
        *,
        max_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        instance(self, "stragglers", stragglers, Stragglers, optional=True)
        instance(self, "generator", generator, torch.Generator, optional=True)
        if max_batch_size is not None:
            max_batch_size = count(self, "max_batch_size", max_batch_size)
        self.stragglers = stragglers
        self.max_batch_size = max_batch_size
        self.generator = generator

    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        """Run ``module`` for the first ``quorum`` workers, then for one more at a time."""
        faults = [task.fault(worker) for worker in range(task.num_workers)]
        latencies = [
            latency + fault.delay
            for latency, fault in zip(self._latencies(task.num_workers), faults, strict=True)
        ]
        bound = math.inf if deadline is None else deadline
        arriving = sorted(
            (n for n, latency in enumerate(latencies) if latency <= bound and latency < math.inf),
            key=latencies.__getitem__,
        )
        wanted = max(quorum, 1)
        while arriving:
            batch, arriving, wanted = arriving[:wanted], arriving[wanted:], 1
            alive = [worker for worker in batch if faults[worker].kind != "crash"]
            # In the order of the coded inputs, which are not copied if all of them are wanted.
            values = self._compute(module, task, sorted(alive, key=task.position))
            for worker in batch:
                if worker in values:
                    value, fault = values.pop(worker), faults[worker]
                    yield Reply(worker, latencies[worker], fault.spoil(value) if fault else value)
                else:
                    error = WorkerError(worker, "died of an injected crash")
                    yield Reply(worker, latencies[worker], error=error)

    def _latencies(self, num_workers: int) -> list[float]:
        if self.stragglers is None:
            return [0.0] * num_workers
        return self.stragglers.sample(num_workers, self.generator).tolist()

    def _compute(self, module: nn.Module, task: Task, workers: Sequence[int]) -> dict[int, Any]:
        outputs: list[Any] = []
        if not workers:
            return {}
        for args, kwargs in task.stack(workers, self.max_batch_size):
            try:
                outputs.append(module(*args, **kwargs))
            except Exception as error:
                if sys.version_info >= (3, 11):
                    error.add_note(
                        f"LocalWorkers: raised by the module on the coded inputs of workers "
                        f"{sorted(workers)}, {task.num_groups} rows each"
                    )
                raise
        return dict(zip(workers, task.unstack(outputs, len(workers)), strict=True))

    def __repr__(self) -> str:
        return (
            f"LocalWorkers(stragglers={self.stragglers!r}, max_batch_size={self.max_batch_size!r})"
        )
