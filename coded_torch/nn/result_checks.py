r"""Judges replies by their form, and puts the good results side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import dense
from .._torch import broadcast_dims, check_batch, differentiated, flatten, leaf_name, unflatten
from ..workers.base import CONSTANTS, Reply, WorkerError
from .division import Division, finite

_ROUNDING = 0.01  # the most that a sum of probabilities differs from 1; half precision needs it


def show(leaf: Any) -> str:
    """Return a leaf for messages: the dtype and shape of a tensor, a constant, else the type."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, CONSTANTS) else type(leaf).__name__


class Result:
    """The value of one reply, and its form: all that results of one module have in common.

    Tensors of any dtype can be answers unless the division mixes rows. A TypeError or a ValueError
    says why a value cannot be decoded.
    """

    def __init__(self, reply: Reply, division: Division) -> None:
        task, odd = division.task, division.not_finite
        self.reply, self.part, self.worker = reply, reply.part, reply.worker
        self._value = reply.value  # the reply need not keep it
        #: The rows whose inputs are finite, bool; None if all are.
        self._judged = None if odd is None else ~odd[list(reply.part.units)].flatten()
        self.leaves, self.spec = flatten(reply.value)
        self.dims: list[Any] = broadcast_dims("out_dims", task.out_dims, self.spec)
        self.divided: list[int] = []  # the places of the leaves that have the part's rows
        #: The leaves but for how many rows they have, which is alike in all good results.
        self.form: list[Any] = [self.spec]
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if dim is None or isinstance(leaf, CONSTANTS):
                constant = leaf if isinstance(leaf, CONSTANTS) else None
                is_tensor = isinstance(leaf, Tensor)
                self.form.append((leaf.dtype, leaf.shape) if is_tensor else (type(leaf), constant))
                continue
            if isinstance(leaf, Tensor):
                name = functools.partial(self.name, i)
                dense("CodedWrapper", name, leaf, leaf.is_floating_point())
            if not (isinstance(leaf, Tensor) and (leaf.is_floating_point() or not division.mixes)):
                got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"CodedWrapper: {self.name(i)} must be a floating-point tensor to be decoded, "
                    f"got {got}; return a tensor of logits or scores instead, register containers "
                    "with torch.utils._pytree, or say None in out_dims"
                )
            check_batch(self._value, i, leaf, dim, len(self.part.units) * task.unit_rows)
            self.form.append((leaf.dtype, self.rows(i).shape[1:]))
            self.divided.append(i)
            if division.link is not None:
                self._check_probabilities(i)

    def _check_probabilities(self, i: int) -> None:
        rows = self.judged(i).detach()
        if rows.numel() == 0 or not rows.is_floating_point():
            return
        sums = rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        if rows.dim() < 2 or max((sums - 1).abs().max(), -rows.min()) > _ROUNDING:
            raise ValueError(
                f"CodedWrapper: {self.name(i)} must be probabilities over its last dimension "
                f"to be decoded with link='softmax', got values of {rows.min():.3g} and more, "
                f"of shape {[*rows.shape]}, with sums of {sums.min():.3g} to {sums.max():.3g}"
            )

    def name(self, i: int) -> str:
        return leaf_name("output", self._value, i)

    def rows(self, i: int) -> Tensor:
        """Return a leaf, batch first."""
        leaf: Tensor = self.leaves[i]
        return leaf.movedim(self.dims[i], 0) if self.dims[i] else leaf

    def judged(self, i: int) -> Tensor:
        """Return a leaf, batch first, without the rows of inputs that are not finite."""
        rows = self.rows(i)
        if self._judged is None:
            return rows
        if self.dims[i] is None:  # a row with NaN may be in it
            return rows.flatten()[:0]
        return rows[self._judged.to(rows.device)]

    def __str__(self) -> str:
        return str(pytree.tree_unflatten(map(show, self.leaves), self.spec))


class Stacked(NamedTuple):
    """The good results side by side."""

    units: tuple[int, ...]  #: the units that have a result, increasing
    #: ``[F, R, ...]`` each; of leaves without a batch, the one of the part asked first.
    leaves: list[Any]
    dims: list[int | None]  #: the batch dimension of each leaf of the module's output
    divided: list[int]  #: the places of the leaves that have a row for each of the batch
    spec: pytree.TreeSpec
    parts: tuple[int, ...]  #: the number of the part that each unit's result is from

    @property
    def decoded(self) -> list[int]:
        """The places of the divided leaves that can be estimated."""
        return [i for i in self.divided if self.leaves[i].is_floating_point()]

    def over(self, i: int, rows: Tensor) -> Tensor:
        """Return a copy of rows ``[B, ...]`` with the results of leaf i in their places."""
        leaf: Tensor = self.leaves[i]
        whole = rows.to(leaf.device, leaf.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.units:
            whole[list(self.units)] = leaf.squeeze(1)
        return whole

    def tree(self, answers: Mapping[int, Tensor]) -> Any:
        """Return answers ``[B, ...]``, by leaf, in the structure of the module's output."""
        leaves = list(self.leaves)
        for i, rows in answers.items():
            dim = self.dims[i]
            leaves[i] = (rows.movedim(0, dim) if dim else rows).contiguous()
        return unflatten(leaves, self.spec)

    def form(self) -> Stacked:
        """Return the same without any result: views would keep the results."""
        leaves = list(self.leaves)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                leaves[i] = torch.atleast_1d(x)[:0].detach().clone()
        return self._replace(units=(), parts=(), leaves=leaves)


class Results:
    """The replies to one task, of which the largest group of one form counts.

    Rows whose inputs are not finite may have any result.

    Attributes:
        good: the largest group, in the order of arrival; of equal ones, the group of the part that
            was asked first.
        units: the units with a good result.
    """

    def __init__(self, division: Division) -> None:
        self._division = division
        self._errors: list[WorkerError] = []
        self._groups: list[list[Result]] = []  # one for each form, in order of arrival
        # Replies that cannot be decoded: the number and the units of the part, worker and error.
        self._misfits: list[tuple[int, int, int, Exception]] = []
        self._chosen: Mapping[int, int] | None = None
        self.good: list[Result] = []
        self.units: set[int] = set()

    def add(self, replies: Sequence[Reply]) -> list[list[tuple[Reply, Result | None]]]:
        """Judge replies that arrived together.

        Return, for each reply, the replies that it makes good, with their results, or bad.
        """
        formed: dict[int, Result] = {}
        for i, reply in enumerate(replies):
            if reply.error is not None:
                self._errors.append(reply.error)
                continue
            try:
                formed[i] = Result(reply, self._division)
            except (TypeError, ValueError) as cause:
                text = str(cause).removeprefix("CodedWrapper: ")
                why = f"returned what cannot be decoded: {text}"
                self._errors.append(WorkerError(reply.part.number, reply.worker, why, cause=cause))
                number, units = reply.part.number, len(reply.part.units)
                self._misfits.append((number, units, reply.worker, cause))
        names = _not_finite(list(formed.values()))
        return [
            self._count(formed[i], names.get(formed[i])) if i in formed else [(reply, None)]
            for i, reply in enumerate(replies)
        ]

    def _count(self, result: Result, not_finite: str | None) -> list[tuple[Reply, Result | None]]:
        """Let a result vote, and return whose results are good, or bad, by it."""
        if not_finite is not None:
            why = f"returned values that are not finite in {not_finite}"
            self._errors.append(WorkerError(result.part.number, result.worker, why))
            return [(result.reply, None)]
        group = next((g for g in self._groups if result.form == g[0].form), None)
        if group is None:
            self._groups.append(group := [])
        group.append(result)
        lead = group if len(self._groups) == 1 else max(self._groups, key=_weight)
        before, self.good = self.good, lead
        if lead is before or not before:
            self.units.update(result.part.units if group is lead else ())
            return [(result.reply, result if group is lead else None)]
        # Others have the majority now.
        self.units = {unit for other in lead for unit in other.part.units}
        return [(other.reply, None) for other in before] + [(other.reply, other) for other in lead]

    @property
    def rejected(self) -> list[WorkerError]:
        """The errors of all other replies, in the order in which their parts were asked."""
        lead, errors = self.good, list(self._errors)
        for group in self._groups if len(self._groups) > 1 else ():
            many = "as many" if _weight(group)[0] == _weight(lead)[0] else "most"
            for result in group if group is not lead else ():
                why = f"returned {result}, where {many} returned {lead[0]}"
                errors.append(WorkerError(result.part.number, result.worker, why))
        return sorted(errors, key=lambda error: error.part)

    def choose(self, parts: Mapping[int, int]) -> None:
        """Let the results of these parts, by unit, be the answers, and no others."""
        self._chosen, self.units = parts, set(parts)

    @property
    def misfit(self) -> Exception | None:
        """The error of the first reply if no reply is good, or only single rows are.

        A single row looks right if the output has no batch dimension, but a dimension of size 1.
        """
        good = [result for group in self._groups for result in group]
        cut = all(len(result.part.units) == 1 == self._division.task.unit_rows for result in good)
        # A single broken worker shows nothing, unless single rows of its own are good.
        workers = {worker for _, units, worker, _ in self._misfits if units > 1}
        cut &= len(workers) > 1 or not workers.isdisjoint(result.worker for result in good)
        none = not good and 0 < len(self._misfits) == len(self._errors)
        return min(self._misfits)[3] if none or (good and cut) else None

    def stack(self) -> Stacked:
        """Stack the good results, of each unit the first that arrived, or the chosen one."""
        first = min(self.good, key=lambda result: result.part.number)  # not the first to arrive
        # Side by side in the order of their units, which leaves little or nothing to put in place.
        good = sorted(self.good, key=lambda result: result.part.units)
        flat = [(unit, result) for result in good for unit in result.part.units]
        everywhere = places = list(range(len(flat)))
        if len(flat) > len(self.units):  # some units have several results
            arrived = [result.part for result in self.good[::-1]]
            chosen = self._chosen or {unit: part.number for part in arrived for unit in part.units}
            places = [i for i, (unit, r) in enumerate(flat) if chosen.get(unit) == r.part.number]
        places = sorted(places, key=lambda place: flat[place][0])
        leaves = list(first.leaves)
        for i in first.divided:
            own = _joined([result.rows(i) for result in good])
            own = own.unflatten(0, (-1, self._division.task.unit_rows))  # [places, R, ...]
            if places != everywhere:
                own = own.index_select(0, torch.tensor(places, device=own.device))
            leaves[i] = own
        units, parts = zip(*[(flat[i][0], flat[i][1].part.number) for i in places], strict=True)
        return Stacked(units, leaves, first.dims, first.divided, first.spec, parts)


def _joined(leaves: Sequence[Tensor]) -> Tensor:
    """Return tensors ``[n, ...]`` joined: as a view if they lie end to end in memory.

    Simulated workers compute all parts at once, and each leaf is a slice of the whole.
    """
    first = leaves[0]
    if type(first) is not Tensor or differentiated(first):
        return torch.cat([*leaves])
    at, memory = first.data_ptr(), first.untyped_storage()
    for leaf in leaves:
        if leaf.data_ptr() != at or not leaf.is_contiguous():
            return torch.cat([*leaves])
        at += leaf.numel() * first.element_size()
    if at > memory.data_ptr() + memory.nbytes():  # the next allocation adjoins by chance
        return torch.cat([*leaves])
    rows = sum(len(leaf) for leaf in leaves)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _weight(group: Sequence[Result]) -> tuple[int, int]:
    """Return the units of a group, and the number of its first part, negative."""
    parts = [result.part for result in group]
    return sum(len(part.units) for part in parts), -min(part.number for part in parts)


def _not_finite(results: Sequence[Result]) -> dict[Result, str]:
    """Return, by result, the name of a leaf that is not finite.

    The host waits for a device once, unless there is something wrong.
    """
    rows = [
        (result, i, result.judged(i).detach())
        for result in results
        for i, leaf in enumerate(result.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(rows) > 1:  # a value that is not finite stays so in sums
        device = rows[0][2].device
        sums = [leaf.sum().to(device, torch.float32) for *_, leaf in rows]
        if finite(torch.stack(sums)):
            return {}
    return {result: result.name(i) for result, i, leaf in reversed(rows) if not finite(leaf)}
