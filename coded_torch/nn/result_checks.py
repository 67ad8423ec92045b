r"""Which replies are good results, judged by their form, and the good ones side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from .inputs import finite

__all__ = ["Result", "Results", "Stacked", "decodable"]

_ROUNDING = 0.01  # that the sum of probabilities may be off; half precision needs as much


def decodable(leaf: Any, dim: int | None) -> bool:
    """Return whether a leaf of the results is divided, and can be predicted."""
    return dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()


class Result:
    """The value of one reply, and its form: all that results of one module have in common.

    Args:
        reply: with the value.
        out_dims: of the task.
        last: another result; if the form is the same, it need not be worked out again.
        judged: bool, the rows of the part that must be finite, as their inputs are; None: all.

    Attributes:
        part: the part that was asked for.
        worker: the place of the worker that answered.
        leaves: of the value.
        spec: the structure of the value.
        dims: the dimension of each leaf that has the part's rows; None if it has none.
        repeats: whether the form is the same as that of ``last``, the number of rows included.
    """

    def __init__(
        self, reply: Reply, out_dims: Any, last: Result | None, judged: Tensor | None
    ) -> None:
        self._judged = judged
        self.part, self.worker, self._value = reply.part, reply.worker, reply.value
        self.leaves, self.spec = flatten(reply.value)
        self.dims: list[Any]
        self._form: list[tuple[Any, ...]]
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
        return all(
            isinstance(mine, Tensor)
            and isinstance(its, Tensor)
            and mine.shape == its.shape
            and mine.dtype == its.dtype
            for mine, its in zip(self.leaves, last.leaves, strict=True)
        )

    def name(self, i: int) -> str:
        """Return the name of a leaf."""
        return leaf_name("output", self._value, i)

    def judged(self, i: int) -> Tensor:
        """Return a leaf without the rows of inputs that are not finite; the batch is dim 0 then."""
        leaf: Tensor = self.leaves[i]
        dim = self.dims[i]
        if self._judged is None:
            return leaf if dim in (0, None) else leaf.movedim(dim, 0)
        if dim is None:  # such a row may be in it
            return leaf.flatten()[:0]
        return leaf.movedim(dim, 0)[self._judged.to(leaf.device)]

    def check(self, task: Task, carries: bool) -> None:
        """Raise a TypeError or a ValueError if the result cannot be decoded.

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

    def check_probabilities(self) -> None:
        """Raise a ValueError if an output is no probability distribution."""
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            problem = _improbable(self.judged(i)) if decodable(leaf, dim) else None
            if problem is not None:
                raise ValueError(
                    f"CodedWrapper: {self.name(i)} must be probabilities over its last dimension "
                    f"to be decoded with link='softmax', got {problem}"
                )

    def resembles(self, other: Result) -> bool:
        if self._form is other._form:
            return True
        return self._form == other._form and (self.spec is other.spec or self.spec == other.spec)

    def __str__(self) -> str:
        return str(pytree.tree_unflatten(map(_Text, map(show, self.leaves)), self.spec))


class Stacked(NamedTuple):
    """The good results side by side.

    Attributes:
        units: that have a result, increasing.
        leaves: ``[F, R, ...]`` each; a leaf without a batch, of the part that was asked first.
        dims: the batch dimension of each leaf of the module's output.
        spec: the structure of the module's output.
        formats: the memory format of each leaf of the module's output.
    """

    units: tuple[int, ...]
    leaves: list[Any]
    dims: list[int | None]
    spec: pytree.TreeSpec
    formats: list[torch.memory_format]

    def form(self) -> Stacked:
        """Return the same without any result."""
        leaves = [x[:0].detach().clone() if isinstance(x, Tensor) else x for x in self.leaves]
        return self._replace(units=(), leaves=leaves)  # views would keep the results, in copies too


class Results:
    """The replies to one task, of which the largest group of one form counts.

    Args:
        task: what was asked. Results that cannot be answers to it have no vote.
        link: "softmax" if the results must be probabilities, or None.
        not_finite: bool ``[units, R]``, rows whose results may be anything; None: there is none.
        carries: whether tensors of any dtype can be answers, if every row has one.
    """

    def __init__(
        self, task: Task, link: str | None, not_finite: Tensor | None, *, carries: bool
    ) -> None:
        self._task, self._link, self._carries = task, link, carries
        self._not_finite = not_finite
        self._errors: list[WorkerError] = []
        self._misfits: list[WorkerError] = []
        self._groups: list[list[Result]] = []  # by form, each in order of arrival
        self._num_replies = 0
        self._last: Result | None = None  # that can be decoded, in any group
        self.units: set[int] = set()  # with a good result
        self._chosen: Mapping[int, int] | None = None

    def add(self, replies: Sequence[Reply]) -> list[list[tuple[Part, bool]]]:
        """Judge replies that arrived together.

        Returns:
            For each reply the parts whose results have become good, or bad, by it.
        """
        self._num_replies += len(replies)
        formed = [self._form(reply) for reply in replies]
        names = iter(_not_finite([result for result in formed if result is not None]))
        return [
            self._count(reply, result, next(names) if result is not None else None)
            for reply, result in zip(replies, formed, strict=True)
        ]

    def _form(self, reply: Reply) -> Result | None:
        """Return the result of a reply, if it can be decoded."""
        if reply.error is not None:
            self._errors.append(reply.error)
            return None
        judged = self._not_finite
        if judged is not None:
            judged = ~judged[list(reply.part.units)].flatten()
        try:
            result = Result(reply, self._task.out_dims, self._last, judged)
            if not result.repeats:
                result.check(self._task, self._carries)
        except (TypeError, ValueError) as cause:
            self._misfits.append(_misfit(reply, cause))
            return None
        self._last = result
        return result

    def _count(
        self, reply: Reply, result: Result | None, not_finite: str | None
    ) -> list[tuple[Part, bool]]:
        if result is not None and not_finite is not None:
            what = f"returned values that are not finite in {not_finite}"
            self._errors.append(_error(reply, what))
            result = None
        if result is not None and self._link is not None:
            try:
                result.check_probabilities()
            except ValueError as cause:
                self._misfits.append(_misfit(reply, cause))
                result = None
        if result is None:
            return [(reply.part, False)]
        before = self.good
        group = next((g for g in self._groups if result.resembles(g[0])), None)
        if group is None:
            self._groups.append(group := [])
        group.append(result)
        lead = self.good
        if lead is before or not before:
            if group is lead:
                self.units.update(result.part.units)
            return [(reply.part, group is lead)]
        # Others have the majority now.
        self.units = {unit for result in lead for unit in result.part.units}
        return [(other.part, False) for other in before] + [(other.part, True) for other in lead]

    @property
    def good(self) -> list[Result]:
        """The largest group of results of one form; of equal ones, that of the part asked first."""
        if len(self._groups) == 1:
            return self._groups[0]
        return max(self._groups, key=_weight, default=[])

    @property
    def rejected(self) -> list[WorkerError]:
        """What is wrong with all other replies, in the order in which their parts were asked."""
        lead, errors = self.good, self._errors + self._misfits
        for group in self._groups:
            if group is lead:
                continue
            many = "as many" if _weight(group)[0] == _weight(lead)[0] else "most"
            for result in group:
                why = f"returned {result}, where {many} returned {lead[0]}"
                errors.append(_error(result, why))
        return sorted(errors, key=lambda error: error.part)

    def choose(self, parts: Mapping[int, int]) -> None:
        """Let the results of these parts, by unit, be the answers, and no others."""
        self._chosen, self.units = parts, set(parts)

    @property
    def misfit(self) -> Exception | None:
        """The error of the first reply if no reply at all is an answer to the task."""
        if not self._misfits or len(self._misfits) < self._num_replies:
            return None
        cause = self.rejected[0].__cause__
        assert isinstance(cause, Exception)
        return cause

    def stack(self) -> Stacked:
        """Stack the good results, of each unit the first that arrived, or the one that was chosen.

        There must be one.
        """
        first = min(self.good, key=lambda result: result.part.number)  # not the first to arrive
        answers: dict[int, Result] = {}
        for result in self.good:
            for unit in result.part.units:
                if self._chosen is None or self._chosen.get(unit) == result.part.number:
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
        for i, (own, dim) in enumerate(zip(first.leaves, first.dims, strict=True)):
            if dim is None or not isinstance(own, Tensor):
                leaves.append(own)
                continue
            column = [result.leaves[i] for result in good]
            if dim != 0:
                column = [leaf.movedim(dim, 0) for leaf in column]
            stacked = column[0] if len(column) == 1 else torch.cat(column)
            stacked = stacked.unflatten(0, (-1, self._task.unit_rows))  # [places, R, ...]
            if not in_place:
                stacked = stacked.index_select(0, torch.tensor(places, device=stacked.device))
            leaves.append(stacked)
        formats = [_memory_format(leaf) for leaf in first.leaves]
        return Stacked(units, leaves, first.dims, first.spec, formats)


def _weight(group: Sequence[Result]) -> tuple[int, int]:
    """Return the units of a group, and the number of its first part, negative."""
    parts = [result.part for result in group]
    return sum(len(part.units) for part in parts), -min(part.number for part in parts)


class _Text(str):
    """A text that a container prints without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _error(of: Reply | Result, reason: str) -> WorkerError:
    return WorkerError(of.part.number, of.worker, reason)


def _misfit(reply: Reply, cause: Exception) -> WorkerError:
    why = str(cause).removeprefix("CodedWrapper: ")
    error = _error(reply, f"returned what cannot be decoded: {why}")
    error.__cause__ = cause
    return error


def _not_finite(results: Sequence[Result]) -> list[str | None]:
    """Return, for each result, the name of a leaf that is not finite, None if all are.

    The host waits for a device once, unless there is something wrong.
    """
    names: list[str | None] = [None] * len(results)
    rows = [
        (n, i, result.judged(i))
        for n, result in enumerate(results)
        for i, leaf in enumerate(result.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(rows) > 1 and _together_finite([leaf for _, _, leaf in rows]):
        return names
    for n, i, leaf in rows:
        if names[n] is None and not finite(leaf):
            names[n] = results[n].name(i)
    return names


def _together_finite(leaves: Sequence[Tensor]) -> bool:
    """Return whether all are finite; False also where a sum overflows."""
    base = leaves[0]._base
    # Workers in this process compute all parts at once, and each reply is a part of that.
    if base is not None and all(leaf._base is base for leaf in leaves):
        return finite(base)
    device = leaves[0].device
    sums = [leaf.detach().sum().to(device, torch.float32) for leaf in leaves]
    return math.isfinite(torch.stack(sums).sum().item())


def _improbable(rows: Tensor) -> str | None:
    """Return what rows ``[G, ..., C]`` hold, if not probabilities of C classes."""
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


def _form(leaf: Any, dim: int | None) -> tuple[Any, ...]:
    """Return the kind of a leaf; of a tensor the shape too, but for how many rows there are."""
    if not isinstance(leaf, Tensor):
        return kind(leaf)
    shape: Sequence[int] = leaf.shape
    if dim is not None and -leaf.dim() <= dim < leaf.dim():
        at = dim % leaf.dim()
        shape = (*shape[:at], *shape[at + 1 :])
    return (*kind(leaf), *shape)


def _memory_format(leaf: Any) -> torch.memory_format:
    """Return the memory format of a tensor, if its strides leave no doubt."""
    if isinstance(leaf, Tensor) and not leaf.is_contiguous():
        for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if leaf.dim() == dims and leaf.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format
