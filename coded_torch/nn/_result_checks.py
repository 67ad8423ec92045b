r"""Judges results by their form, and puts the good ones side by side."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from .._arguments import dense
from .._layout import CONSTANTS, Layout, bits, not_joined
from .._table import DISPUTED, FAILED, GOOD, Part, Table, WorkerError
from .._torch import (
    WrongRows,
    as_real,
    broadcast_dims,
    check_batch,
    differentiated,
    outside,
    to_device,
    unflatten,
)
from ._division import Division
from ._finite import all_finite, finite, has_numbers, runs, sums_of

# The signs of numbers, to be compared.
_FINITE, _NAN = b"\0", b"\2"
_ROUNDING = 0.01  # the most that a sum of probabilities differs from 1; half precision needs it


def show(leaf: Any) -> str:
    """Return a leaf for messages: the dtype and shape of a tensor, a constant, else the type."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    if isinstance(leaf, CONSTANTS):
        return repr(leaf)
    return type(leaf).__name__


_NO_LAYOUT = Layout()


class Result:
    """The module's output for a part, and its form: all that results of one module have in common.

    A TypeError or a ValueError says why a value cannot be decoded. A
    tensor that differs from the good result ``like`` only in its rows takes over its form.
    """

    spec: TreeSpec
    leaves: list[Any]
    lists: list[int]  #: the places of the lists that have an item per row
    dims: list[Any]
    divided: list[int]  #: the places of the leaves that have the part's rows
    proved: bool  #: whether it has the structure whose rows were proved
    #: The leaves but for how many rows they have, which is alike in all good results.
    form: list[Any]
    _constants: Collection[int]

    def __init__(
        self, value: Any, units: Sequence[int], division: Division, like: Result | None = None
    ) -> None:
        self.value = value
        self._units = units
        self._division = division
        self._layout = division.task.layout or _NO_LAYOUT
        if like is None or not self._is_like(like):
            self._find_form()
            return
        self.leaves = [value]
        self.spec = like.spec
        self.proved = like.proved
        self._constants = like._constants
        self.lists = like.lists
        self.dims = like.dims
        self.divided = like.divided
        self.form = like.form

    def _find_form(self) -> None:
        """Find the leaves, the form, and which leaves have rows."""
        task = self._division.task
        self.leaves, self.spec = self._layout.flatten(self.value)
        self.proved = task.layout is not None and self.spec == task.layout.spec
        self._constants = self._layout.constants if self.proved else ()
        self.lists = []
        self.dims = broadcast_dims("out_dims", task.out_dims, self.spec)
        self.divided = []
        self.form = [self.spec]
        self.form += map(self._form_of, range(len(self.leaves)))

    def _is_like(self, other: Result) -> bool:
        """Return whether it is a tensor that differs from another result only in its rows."""
        value = self.value
        if not (type(value) is Tensor is type(other.value) and other.divided == [0]):
            return False
        is_dense = value.layout is torch.strided and not value.is_nested
        if self._division.link is not None or not is_dense:
            return False
        dim = other.dims[0]
        shape = list(other.value.shape)
        shape[dim] = len(self._units) * self._division.task.unit_rows
        is_same = value.dtype is other.value.dtype and value.device == other.value.device
        return is_same and list(value.shape) == shape

    def _form_of(self, i: int) -> Any:
        """Return what leaf i has in common with other results, and note its rows if it has some."""
        leaf = self.leaves[i]
        if isinstance(leaf, list | tuple):
            self._note_items(i)
            return type(leaf)
        if i in self._constants:
            return bits(leaf) if isinstance(leaf, Tensor) else type(leaf)
        if isinstance(leaf, CONSTANTS):
            return type(leaf), leaf
        if self.dims[i] is not None:
            return self._form_of_rows(i)
        if isinstance(leaf, Tensor):
            return leaf.dtype, leaf.shape
        return type(leaf)

    def _form_of_rows(self, i: int) -> Any:
        """Note a tensor that has the part's rows, and return its form; refuse any other leaf."""
        leaf = self.leaves[i]
        division = self._division
        got = type(leaf).__name__
        is_decodable = isinstance(leaf, Tensor)
        if is_decodable:
            is_floating = leaf.dtype.is_floating_point
            dense("CodedWrapper", lambda: self.name(i), leaf, is_floating)
            got = str(leaf.dtype)
            is_decodable = is_floating or not division.mixes
        elif division.by_rows:
            raise TypeError(not_joined(self.name(i), leaf))
        if not is_decodable:
            raise TypeError(
                f"CodedWrapper: {self.name(i)} must be a floating-point tensor to be decoded, "
                f"got {got}; return a tensor of logits or scores instead, register containers "
                "with torch.utils._pytree, or say None in out_dims"
            )
        num_rows = len(self._units) * division.task.unit_rows
        check_batch(self.value, i, leaf, self.dims[i], num_rows)
        self.divided.append(i)
        if division.link is not None:
            self._check_probabilities(i)
        return leaf.dtype, self.rows(i).shape[1:]

    def _note_items(self, i: int) -> None:
        """Note a list that has an item for each of the part's rows."""
        items: Sequence[Any] = self.leaves[i]
        if self.dims[i] is None:
            return
        if not self._division.by_rows:
            requirement = (
                "must be a tensor with a code, as only calls without one join lists by rows"
            )
            raise TypeError(
                f"CodedWrapper: {self.name(i)} {requirement}, got a {type(items).__name__}"
            )
        if len(items) != len(self._units):
            requirement = f"must have an item for each of the {len(self._units)} rows"
            raise WrongRows(f"CodedWrapper: {self.name(i)} {requirement}, got {len(items)}")
        self.lists.append(i)

    def _check_probabilities(self, i: int) -> None:
        """Raise a ValueError unless the rows of leaf i are probabilities."""
        rows = self.judged(i).detach()
        if rows.numel() == 0 or not rows.dtype.is_floating_point:
            return
        sums = rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        if rows.dim() < 2 or max((sums - 1).abs().max(), -rows.min()) > _ROUNDING:
            raise ValueError(
                f"CodedWrapper: {self.name(i)} must be probabilities over its last dimension "
                f"to be decoded with link='softmax', got values of {rows.min():.3g} and more, "
                f"of shape {[*rows.shape]}, with sums of {sums.min():.3g} to {sums.max():.3g}"
            )

    @functools.cached_property
    def kept(self) -> Tensor | None:
        """The rows whose inputs are finite, bool; None if all are."""
        odd = self._division.not_finite
        if odd is not None:
            return ~odd[list(self._units)].flatten()
        return None

    @functools.cached_property
    @outside()
    def infinities(self) -> dict[int, bytes] | None:
        """Return the signs of the infinities of each row of the batch that has some.

        Leaves without rows count as row -1. Returns None if units are mixtures of rows, or if a
        row whose inputs are finite has NaN.
        """
        if self._division.mixes:
            return None
        rows = [*self._division.rows_of(self._units), -1]
        kept = [True] * len(rows) if self.kept is None else [*self.kept.tolist(), True]
        found = defaultdict[int, bytes](bytes)
        for i, item, leaf in self.numbers():
            if i in self.divided:
                by_place = [*enumerate(_signs(self.rows(i)))]
            else:
                by_place = [(item, _signs(leaf[None])[0])]
            for place, signs in by_place:
                if kept[place]:
                    found[rows[place]] += signs
        if any(_NAN in signs for signs in found.values()):
            return None
        return {row: signs for row, signs in found.items() if signs.strip(_FINITE)}

    def numbers(self) -> list[tuple[int, int, Tensor]]:
        """Return each tensor that may hold NaN or infinity, after the place of its leaf.

        The second number is the place of the item, if the leaf is a list with one per row, else -1.
        """
        found = list[tuple[int, int, Tensor]]()
        for i, leaf in enumerate(self.leaves):
            if has_numbers(leaf):
                found.append((i, -1, leaf))
            if i in self.lists:
                for place, item in enumerate(leaf):
                    found += [(i, place, x) for x in filter(has_numbers, tree_leaves(item))]
        return found

    def name(self, i: int) -> str:
        return self._layout.name(self.value, i)

    def rows(self, i: int) -> Tensor:
        """Return a leaf, batch first."""
        leaf: Tensor = self.leaves[i]
        if self.dims[i]:
            return leaf.movedim(self.dims[i], 0)
        return leaf

    def judged(self, i: int) -> Tensor:
        """Return a leaf, batch first, without the rows of inputs that are not finite."""
        rows = self.rows(i)
        if self.kept is None:
            return rows
        if self.dims[i] is None:  # a row with NaN may be in it
            return rows.flatten()[:0]
        return rows[self.kept.to(rows.device)]

    def __str__(self) -> str:
        return str(tree_unflatten(map(show, self.leaves), self.spec))


def _signs(rows: Tensor) -> list[bytes]:
    """Return the signs of the infinities of each row, 1 or -1, with 0 of others and 2 of NaN."""
    numbers = as_real(torch.func.debug_unwrap(rows).detach())
    signs = numbers.sign().where(numbers.isinf(), 0).masked_fill(numbers.isnan(), _NAN[0])
    return [row.tobytes() for row in signs.to("cpu", torch.int8).unsqueeze(1).flatten(1).numpy()]


class Stacked(NamedTuple):
    """The good results side by side."""

    units: Sequence[int]  #: the units that have a result, increasing
    #: ``[F, R, ...]`` each; of leaves without a batch, the one of the part asked first.
    leaves: list[Any]
    dims: list[int | None]  #: the batch dimension of each leaf of the module's output
    divided: list[int]  #: the places of the leaves that have a row for each of the batch
    lists: list[int]  #: the places of the lists that have an item for each of the units
    spec: TreeSpec
    later: np.ndarray[Any, np.dtype[np.bool_]]  #: whether each unit's part was asked for later

    @property
    def decoded(self) -> list[int]:
        """The places of the divided leaves that can be estimated."""
        return [i for i in self.divided if self.leaves[i].dtype.is_floating_point]

    def take(self, places: Sequence[int]) -> Stacked:
        """Return the same with the results of some units, by their places."""
        leaves = list(self.leaves)
        for i in self.divided:
            leaf: Tensor = leaves[i]
            (at,) = to_device([torch.tensor(places)], leaf.device)
            leaves[i] = leaf.index_select(0, at)
        units = tuple(self.units[place] for place in places)
        return self._replace(units=units, later=self.later[list(places)], leaves=leaves)

    def over(self, i: int, rows: Tensor) -> Tensor:
        """Return a copy of rows ``[B, ...]`` with the results of leaf i in their places."""
        leaf: Tensor = self.leaves[i]
        whole = rows.to(leaf.device, leaf.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.units:
            whole[list(self.units)] = leaf.squeeze(1)
        return whole

    def tree(self, answers: Mapping[int, Tensor], size: int = 0) -> Any:
        """Return answers ``[B, ...]``, by leaf, in the structure of the module's output.

        Lists hold None in rows without a result, of ``size`` rows.
        """
        leaves = list(self.leaves)
        if len(self.units) < size:
            for i in self.lists:
                items = dict(zip(self.units, leaves[i], strict=True))
                leaves[i] = type(leaves[i])(map(items.get, range(size)))
        for i, rows in answers.items():
            dim = self.dims[i]
            leaves[i] = (rows.movedim(0, dim) if dim else rows).contiguous()
        return unflatten(leaves, self.spec)

    def whole(self, size: int) -> Any:
        """Return the results of ``size`` rows, NaN, 0 or None where there is none."""
        answers = dict[int, Tensor]()
        for i in self.divided:
            leaf: Tensor = self.leaves[i]
            has_nan = leaf.dtype.is_floating_point or leaf.dtype.is_complex
            shape = (size, *leaf.shape[2:])
            answers[i] = self.over(i, leaf.new_full(shape, math.nan if has_nan else 0))
        return self.tree(answers, size)

    def form(self) -> Stacked:
        """Return the same without any result: views would keep the results."""
        leaves = list(self.leaves)
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                leaves[i] = torch.atleast_1d(x)[:0].detach().clone()
            elif i in self.lists:
                leaves[i] = x[:0]
        return self._replace(units=(), later=self.later[:0], leaves=leaves)


class Checks:
    """Judges the results in a table: those of the largest group of one form are good.

    Of equal groups, the group of the part that was asked first counts.
    """

    table: Table

    def __init__(self, division: Division) -> None:
        self._division = division
        self._groups: list[list[Part]] = []  # one for each form, the largest first
        # The parts with infinite results that no other worker has confirmed, and the leaf; and by
        # row and signs of its infinities, the workers that returned them.
        self._unconfirmed = dict[Part, str]()
        self._infinite = defaultdict[tuple[int, bytes], set[int]](set)
        self._misfits: list[tuple[int, Part, Exception]] = []  # parts that cannot be decoded
        self.whole: Any = None  #: the output for all units, if one pass joined it

    def judge(self, ended: Sequence[Part]) -> None:
        """Judge parts that ended together.

        Raises a ValueError if inputs are not finite and the code mixes them: nobody's results are
        to blame then.
        """
        inputs = self._division.inputs
        if self._division.link is not None or any(map(attrgetter("error"), ended)):
            inputs.read()
        formed = list[Part]()
        for part in ended:
            if part.error is not None:
                self.table.mark(part, FAILED)
                continue
            try:
                like = None
                if self._groups:
                    like = self._groups[0][0].result
                part.result = Result(part.result, part.units, self._division, like)
                formed.append(part)
            except (TypeError, ValueError) as cause:
                inputs.read()
                self._misfits.append((part.number, part, cause))
                text = str(cause).removeprefix("CodedWrapper: ")
                self._reject(part, f"returned what cannot be decoded: {text}", cause)
        names = self._not_finite(formed)
        for part in formed:
            name = names.get(part.number)
            if name is None:
                self._count(part)
            elif part.result.infinities is None:
                self._reject(part, f"returned values that are not finite in {name}")
            else:
                self._unconfirmed[part] = name
                self.table.mark(part, DISPUTED)
                self._confirm(part)
        layout = self._division.task.layout
        if layout is not None and self._contradicts():
            layout.is_doubted = True

    @property
    def may_join(self) -> bool:
        """Whether the pool may copy the results of all units to one tensor for each leaf.

        The pool looks whether inputs and results are finite.
        """
        division = self._division
        layout = division.task.layout
        if layout is None:  # the result of a part that is the batch needs none
            is_plain = len(division.first) == 1
        else:
            is_plain = not (layout.constants or layout.lists)
        return is_plain and division.link is None and division.task.device.type == "cpu"

    def join(self, value: Any) -> bool:
        """Return whether the output for all units is good. It and the inputs are finite."""
        division = self._division
        layout = division.task.layout
        dims = division.task.out_dims
        is_tensor = type(value) is Tensor and layout is not None and layout.is_tensor
        self.whole = value
        if not (division.by_rows and is_tensor and type(dims) is int and dims == 0):
            try:
                result = self.joined
            except (TypeError, ValueError):  # it says which part is to blame once each is read
                result = None
            is_good = result is not None and (result.proved or len(division.first) == 1)
            if not is_good or len(result.divided) < len(result.leaves) or any(result.dims):
                self.whole = None
                return False
        if division.by_rows:  # else rows may be in no column that was asked for
            division.inputs.found_finite()
        return True

    @functools.cached_property
    def joined(self) -> Any:
        """The result of all units that were asked for."""
        return Result(self.whole, self._units, self._division)

    @functools.cached_property
    def _units(self) -> Sequence[int]:
        """The units that :attr:`whole` has, increasing."""
        size = sum(map(len, self._division.first))
        if size == self._division.task.num_units:
            return range(size)
        return sorted(unit for units in self._division.first for unit in units)

    def _confirm(self, part: Part) -> None:
        """Count the results whose infinities two workers returned alike. A new part has some.

        Such infinities are the module's own, for example scores that it masks.
        """
        for key in part.result.infinities.items():
            self._infinite[key].add(part.worker)
        for other in list(self._unconfirmed):
            infinities = other.result.infinities
            if all(len(self._infinite[key]) > 1 for key in infinities.items()):
                del self._unconfirmed[other]
                self._division.infinite |= infinities.keys() - {-1}
                self._count(other)

    def _contradicts(self) -> bool:
        """Return whether results do not fit the proved layout, or each other."""
        lead = None
        if self._groups:
            lead = self._groups[0][0]
        is_proved = lead is None or lead.result.proved
        return bool(self._misfits) or len(self._groups) > 1 or not is_proved

    def _not_finite(self, parts: Sequence[Part]) -> dict[int, str]:
        """Return, by part, the name of a leaf that is not finite; wait for a device once, if none.

        The wait tells whether the inputs are finite, too, unless that is known.
        """
        inputs = self._division.inputs
        found = [(part, i, x) for part in parts for i, _, x in part.result.numbers()]
        if inputs.unread and all_finite([*inputs.unread, *sums_of([x for *_, x in found])]):
            inputs.unread = []
            return {}
        if found and self._division.not_finite is not None:
            for place, (part, i, _) in enumerate(found):
                if i not in part.result.lists:
                    found[place] = part, i, part.result.judged(i)
        is_on_host = len(found) < 2 or found[0][2].is_cpu
        if not is_on_host and all_finite(sums_of([x for *_, x in found])):
            return {}
        return {part.number: part.result.name(i) for part, i, x in found[::-1] if not finite(x)}

    def _reject(self, part: Part, why: str, cause: Exception | None = None) -> None:
        part.result = None
        error = WorkerError(part.number, part.worker, why, cause=cause)
        self.table.mark(part, DISPUTED, error)

    def _count(self, part: Part) -> None:
        """Add a result to the group of its form. Results of the largest group become good."""
        before = []
        if self._groups:
            before = self._groups[0]
        for group in self._groups:
            if group[0].result.form == part.result.form:
                break
        else:
            group = []
            self._groups.append(group)
        group.append(part)
        if len(self._groups) > 1:
            self._groups.sort(key=_weight, reverse=True)
        lead = self._groups[0]
        if lead is before or not before:
            self.table.mark(part, GOOD if group is lead else DISPUTED)
            return
        for other in before:  # others have the majority now
            self.table.mark(other, DISPUTED)
        for other in lead:
            self.table.mark(other, GOOD)

    @property
    def rejected(self) -> list[WorkerError]:
        """The errors of all parts whose results do not count, in the order of asking."""
        if self.whole is not None:
            return []
        errors = list[Any](filter(None, map(attrgetter("error"), self.table.ended)))
        for part, name in self._unconfirmed.items():
            why = f"returned values that are not finite in {name}, and no other worker the same"
            errors.append(WorkerError(part.number, part.worker, why))
        for group in self._groups[1:]:
            lead = self._groups[0]
            many = "as many" if _weight(group)[0] == _weight(lead)[0] else "most"
            for part in group:
                why = f"returned {part.result}, where {many} returned {lead[0].result}"
                errors.append(WorkerError(part.number, part.worker, why))
        return sorted(errors, key=attrgetter("part"))

    @property
    def misfit(self) -> Exception | None:
        """The error of the first part if no result is good, or only single rows are.

        A single row looks right if the output has no batch dimension, but a dimension of size 1.
        """
        misfits = self._misfits
        if self._division.task.layout is not None:  # the module has been seen to return rows
            misfits = [each for each in misfits if not isinstance(each[2], WrongRows)]
        if not misfits:
            return None
        good = [part for group in self._groups for part in group]
        cut = all(len(part.units) == 1 == self._division.task.unit_rows for part in good)
        # A single broken worker shows nothing, unless single rows of its own are good.
        workers = {part.worker for _, part, _ in misfits if len(part.units) > 1}
        cut &= len(workers) > 1 or not workers.isdisjoint(part.worker for part in good)
        none = not good and len(misfits) == len(self.table.ended)
        if none or (good and cut):
            return min(misfits)[2]
        return None

    def stack(self) -> Stacked:
        """Join the good results in the order of their units: rows, or a code's columns."""
        if self.whole is not None:
            whole = self.joined
            size = len(self._units)
            rows = self._division.task.unit_rows
            return Stacked(
                self._units,
                [leaf.unflatten(0, (size, rows)) for leaf in whole.leaves],
                whole.dims,
                whole.divided,
                whole.lists,
                whole.spec,
                np.zeros(size, np.bool_),
            )
        good = self.table.good
        first = min(good, key=attrgetter("number")).result  # not the first to arrive
        # Side by side in the order of their units, which leaves little or nothing to put in place.
        good = sorted(good, key=attrgetter("units"))
        flat = np.concatenate([part.units.array for part in good])
        places = flat.argsort(kind="stable")
        if len(flat) > self.table.num_answered:  # some units have several results
            answered = self.table.answered
            by = [part for part in good for _ in part.units]
            places = places[[answered.get(flat[i]) is by[i] for i in places]]
        in_place = np.array_equal(places, np.arange(len(flat)))
        leaves = list(first.leaves)
        for i in first.divided:
            own = _joined([part.result.rows(i) for part in good])
            own = own.view(len(flat), self._division.task.unit_rows, *own.shape[1:])
            if not in_place:
                (order,) = to_device([torch.tensor(places)], own.device)
                own = own.index_select(0, order)
            leaves[i] = own
        for i in first.lists:
            items = [item for part in good for item in part.result.leaves[i]]
            leaves[i] = type(leaves[i])(map(items.__getitem__, places))
        units: Sequence[int] = range(len(places))
        if flat[places[-1]] != units[-1]:  # others are missing
            units = tuple(flat[places].tolist())
        later = np.repeat([part.why != "first" for part in good], [len(p.units) for p in good])
        return Stacked(
            units, leaves, first.dims, first.divided, first.lists, first.spec, later[places]
        )


def _joined(leaves: Sequence[Tensor]) -> Tensor:
    """Return tensors ``[n, ...]`` joined: a view if they lie end to end, as simulated ones do."""
    first = leaves[0]
    if type(first) is not Tensor or differentiated(first) or not first.is_contiguous():
        return torch.cat([*leaves])
    if len(next(runs(leaves))) < len(leaves):
        return torch.cat([*leaves])
    rows = 0
    for leaf in leaves:
        rows += leaf.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _weight(group: Sequence[Part]) -> tuple[int, int]:
    """Return the units of a group, and the number of its first part, negative."""
    return sum(len(part.units) for part in group), -min(part.number for part in group)
