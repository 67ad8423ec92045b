r"""Telling good results from bad ones, without knowing what the module should return."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..codes.base import Code, NotEnoughResults
from ..workers.base import Reply, Task, WorkerError
from ..workers.pytrees import (
    CONSTANTS,
    broadcast_dims,
    check_batch,
    flatten,
    kind,
    leaf_name,
    show,
)

__all__ = ["Ballot", "Result", "finite"]

_ROUNDING = 0.01  # that the sum of probabilities may be off; half precision needs as much


class Result:
    """The value of one reply, and what it looks like.

    Attributes:
        worker: whose reply it is.
        leaves: of its value.
        spec: the structure of its value.
    """

    def __init__(self, worker: int, value: Any) -> None:
        self.worker = worker
        self._value = value
        self.leaves, self.spec = flatten(value)
        self._looks = [
            (*kind(leaf), leaf.shape) if isinstance(leaf, Tensor) else kind(leaf)
            for leaf in self.leaves
        ]

    def infinite(self) -> str | None:
        """The name of a leaf that is not finite."""
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and not finite(leaf):
                return leaf_name("output", self._value, i)
        return None

    def check(self, task: Task, link: str | None) -> None:
        """Raise a TypeError or a ValueError if this cannot be decoded."""
        dims = broadcast_dims("out_dims", task.out_dims, self.spec)
        for i, (leaf, dim) in enumerate(zip(self.leaves, dims, strict=True)):
            if dim is None or isinstance(leaf, CONSTANTS):
                continue
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"CodedWrapper: {leaf_name('output', self._value, i)} must be a floating-point "
                    f"tensor to be decoded, got {got}; return a tensor of logits or scores "
                    "instead, register containers with torch.utils._pytree, or say None in out_dims"
                )
            check_batch(self._value, i, leaf, dim, task.num_groups)
            problem = _improbable(leaf.movedim(dim, 0)) if link == "softmax" else None
            if problem is not None:
                raise ValueError(
                    f"CodedWrapper: {leaf_name('output', self._value, i)} must be probabilities "
                    f"over its last dimension to be decoded with link='softmax', got {problem}"
                )

    def __str__(self) -> str:
        return str(pytree.tree_unflatten(map(_Text, map(show, self.leaves)), self.spec))

    def resembles(self, other: Result) -> bool:
        return self._looks == other._looks and self.spec == other.spec


class Ballot:
    """The replies to one task; a result is taken for good if more resemble it than any other.

    Args:
        task: what was asked. Results that cannot be answers to it have no vote.
        link: "softmax" if the results must be probabilities.
    """

    def __init__(self, task: Task, link: str | None = None) -> None:
        self.latencies: dict[int, float] = {}
        self._task, self._link = task, link
        self._errors: list[WorkerError] = []
        self._misfits: list[WorkerError] = []
        self._camps: list[list[Result]] = []

    def add(self, reply: Reply) -> None:
        self.latencies[reply.worker] = reply.latency
        if reply.error is not None:
            self._errors.append(reply.error)
            return
        result = Result(reply.worker, reply.value)
        infinite = result.infinite()
        if infinite is not None:
            what = f"returned values that are not finite in {infinite}"
            self._errors.append(WorkerError(reply.worker, what))
            return
        for camp in self._camps:
            if result.resembles(camp[0]):
                break
        else:
            camp = []
        try:
            if not camp or self._link:  # without a link, who resembles what fits does so too
                result.check(self._task, self._link)
        except (TypeError, ValueError) as cause:
            why = str(cause).removeprefix("CodedWrapper: ")
            error = WorkerError(reply.worker, f"returned what cannot be decoded: {why}")
            error.__cause__ = cause
            self._misfits.append(error)
            return
        if not camp:
            self._camps.append(camp)
        camp.append(result)

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
            WorkerError(
                result.worker,
                f"returned {result}, where {'as many' if len(camp) == len(good) else 'most'} "
                f"returned {good[0]}",
            )
            for camp in self._camps
            if camp is not good
            for result in camp
        ]
        rejected = self._errors + self._misfits + outvoted
        return good, sorted(rejected, key=lambda error: error.worker)

    def failure(self, code: Code) -> Exception:
        """What to raise where the good results are too few for the code."""
        good, rejected = self.count()
        if self._misfits and len(self._misfits) == len(self.latencies):  # the module is to blame
            cause = rejected[0].__cause__
            assert isinstance(cause, Exception)
            return cause
        received = [result.worker for result in good]
        error = NotEnoughResults(received, code.min_received, code.num_workers)
        if rejected:
            error.args = (f"{error}; {str(rejected[0]).splitlines()[0]}",)
            error.__cause__ = rejected[0]
        return error


class _Text(str):
    """What a container prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def finite(leaf: Tensor) -> bool:
    """Whether all of a tensor is finite; of what is not floating-point, it is."""
    if not leaf.is_floating_point():
        return True
    leaf = leaf.detach()
    # What is not finite stays so in every sum; a sum may overflow where nothing else is wrong.
    return math.isfinite(leaf.sum().item()) or all(
        map(math.isfinite, torch.stack(torch.aminmax(leaf)).tolist())
    )


def _improbable(rows: Tensor) -> str | None:
    """What rows ``[G, ..., C]`` hold, if not probabilities of C classes."""
    if rows.dim() < 2:
        return "one number a row"
    if rows.numel() == 0:
        return None
    rows = rows.detach()
    sums = rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    least, low, high = torch.stack([rows.min().to(sums.dtype), *torch.aminmax(sums)]).tolist()
    if least >= -_ROUNDING and max(abs(low - 1), abs(high - 1)) <= _ROUNDING:
        return None
    return f"values of {least:.3g} and more, with sums of {low:.3g} to {high:.3g}"
