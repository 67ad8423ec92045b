r"""Workers that fail on purpose: for tests, and to see what redundancy is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping

import torch
from torch import nn

from .._arguments import count, instance, probability
from ..stragglers import Stragglers
from .base import Reply, Task, Workers
from .faults import Fault

__all__ = ["FaultyWorkers"]


class FaultyWorkers(Workers):
    r"""Any pool, some of whose calls are delayed, hang, crash or return rubbish, from one seed.

    Faults happen where the module runs: a delayed call keeps its worker busy, a crash ends its
    process (a thread of :class:`~coded_torch.workers.DeviceWorkers` raises instead), a hung one
    stays until the pool kills it. On :class:`~coded_torch.workers.LocalWorkers` delays pass on the
    virtual clock.

    Args:
        pool: who computes; closing this pool closes it.
        delays: the law of the seconds that the calls of a request take longer; infinite: they hang.
        rates: how often a call meets each of :attr:`Fault.KINDS`: "crash", "nan", "infinity",
            "shape", "dtype", "structure" (probabilities, at most 1 in sum).
        seed: of all of it. The faults of the first, second, ... request are always the same, as
            long as requests do not overlap.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: a rate is no probability or has another name, or their sum exceeds 1.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.workers import FaultyWorkers, LocalWorkers
        >>> pool = FaultyWorkers(LocalWorkers(), rates={"nan": 0.3}, seed=5)
        >>> coded = CodedWrapper(torch.nn.ReLU(), ReplicationCode(2, 6), workers=pool)
        >>> coded(torch.tensor([[-1.0], [2.0]])).flatten().tolist()
        [0.0, 2.0]
        >>> len(coded.last_run.rejected)
        2
    """

    def __init__(
        self,
        pool: Workers,
        *,
        delays: Stragglers | None = None,
        rates: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        instance(self, "pool", pool, Workers)
        instance(self, "delays", delays, Stragglers, optional=True)
        self.rates = {
            kind: probability(self, f"rates[{kind!r}]", rate)
            for kind, rate in (rates or {}).items()
        }
        for kind in self.rates:
            if kind not in Fault.KINDS:
                raise ValueError(
                    f"FaultyWorkers: rates must be of {', '.join(Fault.KINDS)}, got {kind!r}"
                )
        if not sum(self.rates.values()) <= 1:
            raise ValueError(f"FaultyWorkers: rates must be at most 1 in sum, got {self.rates}")
        self.pool = pool
        self.delays = delays
        self.stragglers = pool.stragglers if delays is None else delays
        self.seed = count(self, "seed", seed, least=None)
        self._generator = torch.Generator().manual_seed(self.seed)

    def run(
        self, module: nn.Module, task: Task, *, quorum: int, deadline: float | None = None
    ) -> Generator[Reply, None, None]:
        """Run ``module`` on the pool, with the faults of this request."""
        task = dataclasses.replace(task, faults=self._draw(task.num_workers))
        yield from self.pool.run(module, task, quorum=quorum, deadline=deadline)

    def _draw(self, num_workers: int) -> list[Fault]:
        delays = [0.0] * num_workers
        if self.delays is not None:
            delays = self.delays.sample(num_workers, self._generator).tolist()
        uniform = torch.rand(num_workers, dtype=torch.float64, generator=self._generator)
        return [
            Fault(*pair) for pair in zip(delays, map(self._kind, uniform.tolist()), strict=True)
        ]

    def _kind(self, uniform: float) -> str | None:
        for kind, rate in self.rates.items():
            if uniform < rate:
                return kind
            uniform -= rate
        return None

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()

    def __repr__(self) -> str:
        return (
            f"FaultyWorkers({self.pool!r}, delays={self.delays!r}, rates={self.rates!r}, "
            f"seed={self.seed})"
        )
