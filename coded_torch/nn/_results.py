r"""Which replies are good results, judged by their form alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..workers.base import Part, Reply, Task, WorkerError
from ..workers.pytrees import (
    CONSTANTS,
    broadcast_dims,
    check_batch,
    flatten,
    kind,
    leaf_name,
    show,
)
from ._leaves import decodable, finite, improbable

__all__ = ["Result", "Results", "Stacked"]


class Result:
    """The value of one reply, and its form: all that results of one module have in common.

    Attributes:
        part: what was asked.
        machine: what answered.
        leaves: of the value.
        spec: the structure of the value.
        dims: per leaf, where it has the part's rows; None: it has none.
        repeats: whether the form is that of ``last``, the number of rows included.

    Args:
        reply: with the value.
        out_dims: of the task.
        last: another result.
        judged: bool, the rows of the part that must be finite, as their inputs are; None: all.
    """

    dims: list[Any]
    _form: list[tuple[Any, ...]]

    def __init__(
        self,
        reply: Reply,
        out_dims: Any,
        last: Result | None = None,
        judged: Tensor | None = None,
    ) -> None:
        self._judged = judged
        self.part, self.machine, self._value = reply.part, reply.machine, reply.value
        self.leaves, self.spec = flatten(reply.value)
        self.repeats = last is not None and self._repeats(last)
        if last is not None and self.repeats:
            self.dims, self._form = last.dims, last._form
            return
        self.dims = broadcast_dims("out_dims", out_dims, self.spec)
        self._form = [_form(leaf, dim) for leaf, dim in zip(self.leaves, self.dims, strict=True)]

    def _repeats(self, last: Result) -> bool:
        if len(self.part.units) != len(last.part.units):
            return False
        if self.spec is not last.spec and self.spec != last.spec:  # to compare takes microseconds
            return False
        for mine, its in zip(self.leaves, last.leaves, strict=True):
            if not (isinstance(mine, Tensor) and isinstance(its, Tensor)):
                return False
            if mine.shape != its.shape or mine.dtype != its.dtype:
                return False
        return True

    def name(self, i: int) -> str:
        """The name of a leaf."""
        return leaf_name("output", self._value, i)

    def judged(self, i: int) -> Tensor:
        """A leaf, without its rows of inputs that are not finite; the batch is dimension 0 then."""
        leaf: Tensor = self.leaves[i]
        dim: Any = self.dims[i]
        if self._judged is None:
            return leaf if dim in (0, None) else leaf.movedim(dim, 0)
        if dim is None:  # such a row may be in it
            return leaf.flatten()[:0]
        return leaf.movedim(dim, 0)[self._judged.to(leaf.device)]

    def check(self, task: Task, carries: bool) -> None:
        """Raise a TypeError or a ValueError if this cannot be decoded.

        Args:
            task: that it is a result of.
            carries: whether tensors of any dtype can be answers, if every row has one.
        """
        size = len(self.part.units) * task.unit_rows
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if dim is None or isinstance(leaf, CONSTANTS):
                continue
            if not (isinstance(leaf, Tensor) and (carries or leaf.is_floating_point())):
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"CodedWrapper: {self.name(i)} must be a floating-point tensor to be decoded, "
                    f"got {got}; return a tensor of logits or scores instead, register containers "
                    "with torch.utils._pytree, or say None in out_dims"
                )
            check_batch(self._value, i, leaf, dim, size)

    def not_finite(self, is_finite: Callable[[Tensor], bool]) -> str | None:
        """The name of a leaf that is not finite."""
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and not is_finite(self.judged(i)):
                return self.name(i)
        return None

    def check_probabilities(self) -> None:
        """Raise a ValueError if an output is no probability distribution."""
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            problem = improbable(self.judged(i)) if decodable(leaf, dim) else None
            if problem is not None:
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must be probabilities over its last dimension "
                    f"to be decoded with link='softmax', got {problem}"
                )

    def resembles(self, other: Result) -> bool:
        return self._form == other._form and (self.spec is other.spec or self.spec == other.spec)

    def __str__(self) -> str:
        return str(pytree.tree_unflatten(map(_Text, map(show, self.leaves)), self.spec))


class Stacked(NamedTuple):
    """The good results side by side.

    Attributes:
        units: that have one, increasing.
        leaves: ``[F, R, ...]`` each; where there is no batch, of the part that was asked first.
        dims: per leaf, where the module has its batch.
        spec: the structure of the module's output.
        formats: per leaf, the memory format of the module's output.
    """

    units: tuple[int, ...]
    leaves: list[Any]
    dims: list[int | None]
    spec: pytree.TreeSpec
    formats: list[torch.memory_format]

    def form(self) -> Stacked:
        """The same without any result."""
        leaves = [x[:0].detach() if isinstance(x, Tensor) else x for x in self.leaves]
        return self._replace(units=(), leaves=leaves)


class Results:
    """The replies to one task, of which the largest group of one form counts.

    Args:
        task: what was asked. Results that cannot be answers to it have no vote.
        link: "softmax" if the results must be probabilities.
        not_finite: the rows of every unit whose results may be anything, see :class:`Units`.
        carries: whether tensors of any dtype can be answers, if every row has one.
    """

    def __init__(
        self,
        task: Task,
        link: str | None = None,
        not_finite: Tensor | None = None,
        *,
        carries: bool = False,
    ) -> None:
        self._task, self._link, self._carries = task, link, carries
        self._not_finite = not_finite
        self._errors: list[WorkerError] = []
        self._misfits: list[WorkerError] = []
        self._camps: list[_Camp] = []
        self._num_replies = 0
        self._last: Result | None = None  # that can be decoded, in any camp
        self._base: tuple[Tensor | None, bool] = None, False  # looked at last: whether it is finite

    def add(self, reply: Reply) -> list[tuple[Part, bool]]:
        """Judge a reply; returns the parts whose results have become good, or bad, by it."""
        self._num_replies += 1
        before = self._lead
        mine = self._judge(reply)
        lead = self._lead
        if lead is before or before is None:
            return [(reply.part, mine is not None and mine is lead)]
        # Others have the majority now.
        lost = [(result.part, False) for result in before.results]
        return lost + [(result.part, True) for result in lead.results] if lead else lost

    def _judge(self, reply: Reply) -> _Camp | None:
        """The camp of a reply; None: it has no vote."""
        if reply.error is not None:
            self._errors.append(reply.error)
            return None
        try:
            judged = self._not_finite
            if judged is not None:
                judged = ~judged[list(reply.part.units)].flatten()
            result = Result(reply, self._task.out_dims, self._last, judged)
            if not result.repeats:
                result.check(self._task, self._carries)
            not_finite = result.not_finite(self._is_finite)
            if not_finite is not None:
                what = f"returned values that are not finite in {not_finite}"
                self._errors.append(_error(reply, what))
                return None
            if self._link is not None:
                result.check_probabilities()
        except (TypeError, ValueError) as cause:
            why = str(cause).removeprefix("CodedWrapper: ")
            error = _error(reply, f"returned what cannot be decoded: {why}")
            error.__cause__ = cause
            self._misfits.append(error)
            return None
        self._last = result
        camp = next((c for c in self._camps if result.resembles(c.results[0])), None)
        if camp is None:
            self._camps.append(camp := _Camp())
        camp.add(result)
        return camp

    def _is_finite(self, leaf: Tensor) -> bool:
        """Return whether a leaf is finite: the host waits once for results that are views of one.

        Workers in this process compute all parts at once, and each reply is a part of that.
        """
        base = None if leaf.device.type == "cpu" else leaf._base
        if base is None or base.numel() > self._task.num_units * leaf.numel():
            return finite(leaf)
        if base is not self._base[0]:
            self._base = base, finite(base)
        return self._base[1] or finite(leaf)

    @property
    def _lead(self) -> _Camp | None:
        if len(self._camps) == 1:
            return self._camps[0]
        return max(self._camps, key=_Camp.weight, default=None)

    @property
    def good(self) -> list[Result]:
        """The largest group of results of one form; of equal ones, that of the part asked first."""
        return self._lead.results if self._lead else []

    @property
    def units(self) -> set[int]:
        """The units with a good result."""
        return {unit for result in self.good for unit in result.part.units}

    @property
    def rejected(self) -> list[WorkerError]:
        """What is wrong with all other replies, in the order in which their parts were asked."""
        lead, errors = self._lead, self._errors + self._misfits
        for camp in self._camps:
            if lead is None or camp is lead:
                continue
            many = "as many" if camp.size == lead.size else "most"
            for result in camp.results:
                why = f"returned {result}, where {many} returned {lead.results[0]}"
                errors.append(_error(result, why))
        return sorted(errors, key=lambda error: error.part)

    def stack(self) -> Stacked:
        """The good results, of each unit the first that arrived; there must be one at least."""
        rows = self._task.unit_rows
        first = min(self.good, key=lambda result: result.part.number)  # not the first to arrive
        answers: dict[int, Result] = {}
        for result in self.good:
            for unit in result.part.units:
                answers.setdefault(unit, result)
        units = tuple(sorted(answers))
        # Side by side in the order of their units, which leaves little or nothing to put in place.
        good = list(dict.fromkeys(answers[unit] for unit in units))
        place = {}  # of a unit, among the units of all these results
        at = 0
        for result in good:
            for unit in result.part.units:
                if answers[unit] is result:
                    place[unit] = at
                at += 1
        places = [place[unit] for unit in units]
        in_place = places == list(range(at))
        leaves: list[Any] = []
        formats = []
        for i, (own, dim) in enumerate(zip(first.leaves, first.dims, strict=True)):
            formats.append(_memory_format(own))
            if dim is None or not isinstance(own, Tensor):
                leaves.append(own)
                continue
            column = [result.leaves[i] for result in good]
            if dim != 0:
                column = [leaf.movedim(dim, 0) for leaf in column]
            stacked = column[0] if len(column) == 1 else torch.cat(column)
            stacked = stacked.unflatten(0, (-1, rows))  # [places, R, ...]
            if not in_place:
                stacked = stacked.index_select(0, torch.tensor(places, device=stacked.device))
            leaves.append(stacked)
        return Stacked(units, leaves, first.dims, first.spec, formats)

    def of_first(self, num_parts: int) -> list[int]:
        """The numbers of the parts with a good result, of those asked for first."""
        return [r.part.number for r in self.good if r.part.number < num_parts]

    @property
    def misfit(self) -> Exception | None:
        """What the module is to blame for: that no reply at all is an answer to the task."""
        if not self._misfits or len(self._misfits) < self._num_replies:
            return None
        cause = self.rejected[0].__cause__
        assert isinstance(cause, Exception)
        return cause


class _Camp:
    """Results that resemble each other, in order of arrival."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.size = 0  # in units
        self._first = math.inf  # the lowest number of a part

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.size += len(result.part.units)
        self._first = min(self._first, result.part.number)

    def weight(self) -> tuple[int, float]:
        return self.size, -self._first


class _Text(str):
    """What a container prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _error(of: Reply | Result, reason: str) -> WorkerError:
    return WorkerError(of.part.number, of.machine, reason)


def _form(leaf: Any, dim: int | None) -> tuple[Any, ...]:
    """The kind of a leaf; of a tensor the shape too, but for how many rows there are."""
    if not isinstance(leaf, Tensor):
        return kind(leaf)
    shape: Sequence[int] = leaf.shape
    if dim is not None and -leaf.dim() <= dim < leaf.dim():
        at = dim % leaf.dim()
        shape = (*shape[:at], *shape[at + 1 :])
    return (*kind(leaf), *shape)


def _memory_format(leaf: Any) -> torch.memory_format:
    """That of a tensor, if its strides leave no doubt."""
    if isinstance(leaf, Tensor) and not leaf.is_contiguous():
        for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if leaf.dim() == dims and leaf.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format
