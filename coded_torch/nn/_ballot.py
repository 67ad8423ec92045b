r"""Telling good results from bad ones, without knowing what the module should return."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..workers.base import Reply, WorkerError, flatten, kind, leaf_name, show

__all__ = ["Ballot", "Result"]


class Result:
    """The value of one reply, and what it looks like."""

    def __init__(self, worker: int, value: Any) -> None:
        self.worker = worker
        self.leaves, self.spec = flatten(value)
        self.looks = [
            (*kind(leaf), leaf.shape) if isinstance(leaf, Tensor) else kind(leaf)
            for leaf in self.leaves
        ]

    def problem(self) -> str | None:
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and not _finite(leaf):
                value = pytree.tree_unflatten(self.leaves, self.spec)
                return f"returned values that are not finite in {leaf_name('output', value, i)}"
        return None

    def __str__(self) -> str:
        return str(pytree.tree_unflatten(map(_Text, map(show, self.leaves)), self.spec))

    def resembles(self, other: Result) -> bool:
        return self.looks == other.looks and self.spec == other.spec


class Ballot:
    """The replies to one task; a result is taken for good if more resemble it than any other."""

    def __init__(self) -> None:
        self.latencies: dict[int, float] = {}
        self._errors: list[WorkerError] = []
        self._camps: list[list[Result]] = []

    def add(self, reply: Reply) -> None:
        self.latencies[reply.worker] = reply.latency
        if reply.error is not None:
            self._errors.append(reply.error)
            return
        result = Result(reply.worker, reply.value)
        problem = result.problem()
        if problem is not None:
            self._errors.append(WorkerError(reply.worker, problem))
            return
        for camp in self._camps:
            if result.resembles(camp[0]):
                camp.append(result)
                return
        self._camps.append([result])

    @property
    def agreed(self) -> list[Result]:
        """The most results that resemble each other."""
        return max(self._camps, key=len, default=[])

    def count(self) -> tuple[list[Result], list[WorkerError]]:
        """The good results, and the errors of the other replies, in the order of the workers."""
        for camp in self._camps:
            camp.sort(key=lambda result: result.worker)
        # Of camps of one size, that of the first worker: not of whoever replied first.
        good = max(self._camps, key=lambda camp: (len(camp), -camp[0].worker), default=[])
        outvoted = [
            WorkerError(result.worker, f"returned {result}, where most returned {good[0]}")
            for camp in self._camps
            if camp is not good
            for result in camp
        ]
        return good, sorted(self._errors + outvoted, key=lambda error: error.worker)


class _Text(str):
    """What a container prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _finite(leaf: Tensor) -> bool:
    if leaf.numel() == 0 or not leaf.is_floating_point():
        return True
    leaf = leaf.detach()
    # What is not finite stays so in every sum; a sum may overflow where nothing else is wrong.
    return math.isfinite(leaf.sum().item()) or all(
        map(math.isfinite, torch.stack(torch.aminmax(leaf)).tolist())
    )
