r"""The arguments of a call, and the two ways to divide them into parts: rows and columns."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_structure,
)

from .._arguments import dense
from .._extension import deal
from .._layout import Layout
from .._table import Units
from .._torch import broadcast_dims, is_texts, on_host, outside, plain, positional
from ..codes._base import Code
from ..input_space._regression import Regression, RowPlan
from ..input_space._regressor import MOST_ROWS
from ..scheduling._latency_history import EstimationTimes
from ..workers._base import Task
from ._finite import all_finite, finite, has_numbers, sums_of

# Seconds that an estimate may end after the deadline before a worse one is made. A busy machine
# wakes a thread about as late (benchmarks/resilience.py, "deadline").
_SLACK = 5e-3


class Inputs:
    """The checked arguments of one call, which must be finite if a code mixes them (``mixing``).

    ``leaves`` are the leaves of ``(args, kwargs)``, ``spec`` is their structure, and ``dims`` their
    batch dimensions; None if every part gets the whole leaf. ``device`` is the device of the first
    divided leaf. ``texts`` holds the strings of leaves that have one string per row. Such a leaf is
    replaced by the numbers of its rows.
    """

    layout: Layout | None = None  #: the proved layout of the outputs
    unproved = ""  #: why it is not proved, if it is not

    def __init__(
        self, args: tuple[Any, ...], kwargs: Any, in_dims: Any, mixing: Code | None = None
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        # The common case, at a tenth of the cost.
        self._plain = not kwargs and {*map(type, args)} == {Tensor}
        if self._plain:
            self.leaves = list(args)
            (self.spec, spec) = positional(len(args))
        else:
            self.leaves, self.spec = tree_flatten((args, kwargs), is_texts)
            spec = tree_structure(args, is_texts)
        dims = broadcast_dims("in_dims", in_dims, spec, "shared")
        num_named = 0
        if type(in_dims) is not int:
            num_named = len(dims)
        dims += [0] * (len(self.leaves) - len(dims))
        self.dims = list[Any]()
        self._mixing = mixing
        self._not_finite: Tensor | None = None
        self.texts = {}
        if not self._plain:
            self.texts = self._take_texts(dims, num_named)
        sizes = dict[int, int]()
        for i, (leaf, dim) in enumerate(zip(self.leaves, dims, strict=True)):
            self.dims.append(dim if isinstance(leaf, Tensor) and dim != "shared" else None)
            if self.dims[i] is not None:
                sizes[i] = self._checked_size(i, dim)
        if not sizes:
            got = ", ".join(sorted({type(leaf).__name__ for leaf in self.leaves})) or "none"
            requirement = "must hold a tensor or strings to divide"
            raise ValueError(f"CodedWrapper: inputs {requirement}, got {got}")
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{size} in {self._name(i)}" for i, size in sizes.items())
            raise ValueError(
                f"CodedWrapper: coded inputs must have one batch size, got {got}; what is meant "
                'for the whole batch is passed by position with "shared" in in_dims'
            )
        (first, self.batch_size), *_ = sizes.items()
        self.device: torch.device = self.leaves[first].device
        numbers = [i for i in sizes if has_numbers(self.leaves[i])]
        self._on_device = [i for i in numbers if not self.leaves[i].is_cpu]
        # A pool may tell that they are finite, at less cost. Where units mix rows, they must be.
        self._unlooked = [i for i in numbers if self.leaves[i].is_cpu]
        if mixing is not None:
            self._look_at_host()
        #: Sums of the inputs on devices, which are finite only if these inputs are. Whoever has to
        #: wait for a device reads them, too. None are left once that has happened.
        self.unread = list[Tensor]()
        if self._on_device:
            with outside():
                leaves = [self.leaves[i] for i in self._on_device]
                self.unread = sums_of([plain("CodedWrapper", "inputs", leaf) for leaf in leaves])
        if self.batch_size > 1 and None in self.dims:
            self._check_shared(dims)

    def _take_texts(self, dims: Sequence[Any], num_named: int) -> dict[int, list[str]]:
        """Return the strings of leaves that have one per row, and put the rows' numbers there.

        A list of strings that is the only input has one per row. Beside other inputs, its length
        may equal the batch size by chance. There it has one per row only if it is among the first
        ``num_named`` leaves, whose batch dimensions the caller names.
        """
        pairs = list(zip(self.leaves, dims, strict=True))
        places = [i for i, (x, dim) in enumerate(pairs) if type(dim) is int and is_texts(x)]
        is_alone = not any(isinstance(x, Tensor) and type(dim) is int for x, dim in pairs)
        if is_alone and len(places) > 1 and num_named <= max(places):
            got = " and ".join(map(self._name, places))
            requirement = 'strings must be the only input, or have 0 or "shared" in in_dims'
            raise ValueError(f"CodedWrapper: {requirement}, got {got}; give them by position")
        texts = dict[int, list[str]]()
        for i in places:
            if i >= num_named and not is_alone:
                continue
            if dims[i] != 0:
                requirement = 'must have the batch dimension 0, or "shared" in in_dims'
                raise ValueError(f"CodedWrapper: {self._name(i)} {requirement}, got {dims[i]}")
            texts[i] = list(self.leaves[i])
            self.leaves[i] = torch.arange(len(texts[i]), device="cpu")
        return texts

    @property
    def not_finite(self) -> Tensor | None:
        """The rows that hold NaN or infinity, bool ``[B]``, on the host; None without any.

        Raises what :meth:`read` does.
        """
        self.read()
        return self._not_finite

    def read(self) -> None:
        """Wait for the device of the inputs, once, to know whether they are finite.

        Raises a ValueError if one is not, and the code mixes inputs.
        """
        self._look_at_host()
        if self.unread:
            is_finite = all_finite(self.unread)
            self.unread = []
            self._look_at([] if is_finite else self._on_device)

    def found_finite(self) -> None:
        """Note that a pool has found the inputs on the host to be finite."""
        self._unlooked = []

    def _look_at_host(self) -> None:
        places = self._unlooked
        self._unlooked = []
        if places:
            self._look_at(places)

    def _look_at(self, numbers: Sequence[int]) -> None:
        """Note which rows of some leaves are not finite; raise a ValueError if rows are mixed."""
        for i in numbers:
            leaf: Tensor = self.leaves[i]
            dim: int = self.dims[i]
            if finite(leaf):
                continue
            if self._mixing is not None:  # one such number would spoil its group
                place = (~leaf.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"CodedWrapper: {self._name(i)} must be finite, as {self._mixing} mixes "
                    f"inputs, got {leaf[tuple(place)].item()} in row {place[dim]}, at {place}; "
                    "leave the code out, or take one that repeats inputs, or leave the row out"
                )
            with outside():
                rows = plain("CodedWrapper", "inputs", leaf.movedim(dim, 0))
                rows = rows.reshape(len(rows), -1)
                bad = ~rows.isfinite().all(1).cpu()
                self._not_finite = bad if self._not_finite is None else bad | self._not_finite

    def batches(self) -> list[Tensor]:
        """Return the divided inputs that are not strings, ``[B, ...]`` each."""
        divided = list[Tensor]()
        for i, (leaf, dim) in enumerate(zip(self.leaves, self.dims, strict=True)):
            if dim is not None and i not in self.texts:
                divided.append(leaf.movedim(dim, 0) if dim else leaf)
        return divided

    def task(self, out_dims: Any, division: Any = None) -> Task:
        """Return the task of the batch. Its units are rows, or columns if the division has some."""
        num_units = self.batch_size
        unit_rows = 1
        leaves = list[Any]()
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            leaves.append(leaf.movedim(dim, 0) if dim else leaf)
            if division is not None and not division.by_rows and dim is not None:
                units = division.spread(leaves[-1])
                num_units, unit_rows = units.shape[:2]
                leaves[-1] = units.flatten(0, 1)
        return Task(
            leaves,
            self.dims,
            self.spec,
            num_units,
            unit_rows,
            self.device,
            out_dims,
            self.layout,
            self.texts,
        )

    def floating(self) -> list[Tensor]:
        """Return the floating-point :meth:`batches`: distances are measured on them."""
        return [*filter(torch.is_floating_point, self.batches())]

    @property
    def features(self) -> int:
        """The number of floating-point features of a row."""
        return sum(leaf[:1].numel() for leaf in self.floating())

    def _name(self, i: int) -> str:
        if self._plain:
            return f"args[{i}]"
        return _name(self._paths[i][0])

    @functools.cached_property
    def _paths(self) -> list[Any]:
        return tree_flatten_with_path((self.args, self.kwargs), is_texts)[0]

    def _checked_size(self, i: int, dim: int) -> int:
        """Return the batch size of leaf i, or raise an error if it cannot be divided."""
        leaf: Tensor = self.leaves[i]
        mixing = self._mixing
        whole = not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
        dense(
            "CodedWrapper",
            lambda: self._name(i),
            leaf,
            not whole,
            "" if mixing else ", or integers",
        )
        if torch._C._are_functorch_transforms_active():
            plain("CodedWrapper", self._name(i), leaf)  # raises under vmap, which hides the batch
        if whole and mixing is not None:
            got = "strings" if i in self.texts else leaf.dtype
            raise TypeError(
                f"CodedWrapper: {self._name(i)} must be floating-point, as {mixing} mixes inputs, "
                f"got {got}; leave the code out, or take one that repeats inputs, or code what it "
                "is turned into instead (the embeddings of tokens), or, if it is meant for the "
                'whole batch, pass it by position with "shared" in in_dims'
            )
        if not -leaf.dim() <= dim < leaf.dim():
            requirement = f'have the batch dimension {dim}, or "shared" in in_dims'
            name = f"CodedWrapper: {self._name(i)}"
            raise ValueError(f"{name} must {requirement}, got shape {(*leaf.shape,)}")
        return leaf.shape[dim]

    def _check_shared(self, dims: Sequence[Any]) -> None:
        """Raise a ValueError if a shared input looks as if each row had its own entry."""

        def is_whole(node: Any) -> bool:
            is_long = isinstance(node, list) and len(node) == self.batch_size
            has_tensors = is_long and any(map(torch.is_tensor, tree_leaves(node)))
            return is_texts(node) or (is_long and not has_tensors)

        at = 0  # the first leaf of a node
        for path, node in tree_flatten_with_path((self.args, self.kwargs), is_whole)[0]:
            own = 0
            if isinstance(node, range | list):
                own = len(node)
            if is_texts(node) or (isinstance(node, Tensor | np.ndarray) and node.ndim):
                own = len(node)
            if own == self.batch_size and dims[at] != "shared" and self.dims[at] is None:
                raise ValueError(
                    f"CodedWrapper: {_name(path)} must be a tensor with a batch dimension in "
                    'in_dims if each row has its own entry, or "shared" in in_dims if all rows '
                    f"share it, got a {type(node).__name__} of the batch size {own}"
                )
            is_leaf = is_texts(node) or not isinstance(node, list)
            at += 1 if is_leaf else len(tree_leaves(node))


def _name(path: Any) -> str:
    return ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])


class Division:
    """A batch as units that can be asked for one by one. A part is some of the units."""

    task: Task  #: the call of the module that computes units
    first: Sequence[Sequence[int]]  #: the units of each part that is asked for first
    #: The columns that are not in ``first`` and can stand in for any other; None by rows.
    spare: Sequence[int] | None = None
    needed: int  #: the number of units with a result that complete the call
    least: int  #: the number of units that can be decoded at all
    num_groups = 0  #: G; 0 by rows
    reserve = 0.0  #: seconds before the deadline that estimates take
    plan: Any  #: the BatchPlan or RowPlan of the batch, by which results become answers
    link: str | None  #: the link of the estimator or the code
    coverage = 0.95  #: the level of error bounds
    mixes = False  #: true if units hold mixtures of rows
    by_rows = False  #: true if units are rows
    spread: Callable[[Tensor], Tensor]  #: from ``[B, ...]`` to all units, ``[units, R, ...]``
    infinite = frozenset[int]()  #: the rows that are infinite, alike on two workers

    def __init__(self, inputs: Inputs, out_dims: Any) -> None:
        self.inputs = inputs
        self.batch_size = inputs.batch_size
        self.task = inputs.task(out_dims, self)

    @functools.cached_property
    @on_host()
    def not_finite(self) -> Tensor | None:
        """The rows of units whose inputs are not finite, bool ``[units, R]``; None without any."""
        rows = self.inputs.not_finite
        if rows is not None:
            return self.spread(rows)
        return None

    @property
    def left_out(self) -> Tensor | None:
        """The rows that estimate no others, as their inputs or results are not finite, ``[B]``.

        They are bool, on the host; None without any.
        """
        rows = self.inputs.not_finite
        if self.infinite:
            rows = torch.zeros(self.batch_size, dtype=torch.bool) if rows is None else rows.clone()
            rows[sorted(self.infinite)] = True
        return rows

    def rows_of(self, units: Sequence[int]) -> list[int]:
        """Return, for each row of some units, its number in the batch. Units must not mix rows."""
        rows: list[int] = self._rows[list(units)].flatten().tolist()
        return rows

    @functools.cached_property
    @on_host()
    def _rows(self) -> Tensor:
        return self.spread(torch.arange(self.batch_size))

    def is_whole(self, num_received: int) -> bool:
        """Return whether results of so many units are the answers as they are."""
        return self.by_rows and num_received == self.batch_size


class Columns(Division):
    """The N coded inputs of every group: each column has a row for each of the G groups.

    S columns may be ``lost``. The ``dealer``, if there is one, draws the order in which columns are
    asked for.
    """

    def __init__(
        self, inputs: Inputs, code: Code, lost: int, at_once: bool, dealer: Any, out_dims: Any
    ) -> None:
        n = code.num_workers
        floating = inputs.floating()
        self.link = code.link
        self.mixes = code.mixes
        self.coverage = getattr(code, "regression", self).coverage
        others = []
        if not floating:
            others = inputs.batches()
        self.plan = code.plan(floating, lost, batch_size=inputs.batch_size, others=others)
        self.num_groups = self.plan.num_groups
        super().__init__(inputs, out_dims)
        self.needed = n - lost
        self.least = code.min_received
        # The columns asked for first are spread evenly over the curve.
        asked = n if at_once else self.needed
        chosen = [i * n // asked for i in range(asked)]
        spare = sorted(set(range(n)).difference(chosen))
        if dealer is not None:
            dealer.shuffle(chosen)
            dealer.shuffle(spare)
        self.first = [*map(_column, chosen)]
        self.spare = spare

    def spread(self, values: Tensor) -> Tensor:
        encoded: Tensor = self.plan.encode(values)
        return encoded


@functools.lru_cache(1024)
def _column(number: int) -> Units:
    return Units([number])


# The state of Python's generator that deals rows, which keeps their order the same everywhere.
_DEALER = np.array(random.Random(0).getstate()[1], np.uint32)


@functools.lru_cache(8)  # some megabytes each for 200,000 rows
def dealt(size: int, parts: int) -> list[Units]:
    """Return the rows of each part: one of every ``parts`` consecutive rows, drawn at random.

    If a part is missing, so are rows from all over the batch. Equal sizes are always dealt alike.
    """
    hands = list[Units]()
    for rows in deal(_DEALER, size, parts):
        hands.append(Units(rows.tolist()))
        hands[-1].array = rows
    return hands


class Rows(Division):
    """The rows of the batch, each of which is asked for once, in at most ``parts`` parts.

    If a row is missing, the estimator estimates it or, if time is short, the mean of the results.
    The ``dealer`` draws the order of asking, so that a worker that is always late does not lose the
    same rows in every call.
    """

    def __init__(
        self,
        inputs: Inputs,
        estimator: Regression,
        *,
        by_mean: bool,
        parts: int,
        dealer: random.Random,
        out_dims: Any = 0,
    ) -> None:
        self._estimator = estimator
        self.by_mean = by_mean
        self.by_rows = True
        size = inputs.batch_size
        super().__init__(inputs, out_dims)
        self.link = estimator.link
        self.coverage = estimator.coverage
        self.needed = size
        self.least = 1
        hands = dealt(size, min(parts, size))
        self.first = dealer.sample(hands, len(hands))

    @functools.cached_property
    def plan(self) -> RowPlan:
        size = self.batch_size
        floating = self.inputs.floating()
        others = []
        if not floating:
            others = self.inputs.batches()
        block = 0 if self.by_mean else MOST_ROWS
        plan = self._estimator.plan(floating, size, others=others, block=block)
        if self.by_mean and self.inputs.not_finite is not None:
            plan.leave_out(self.inputs.not_finite)
        return plan

    def spread(self, values: Tensor) -> Tensor:
        return values.unsqueeze(1)

    def keep_deadline(self, seconds: float, times: EstimationTimes) -> tuple[str, ...]:
        """Estimate by the mean if time is short, and return the notes that say so."""
        if "plan" not in vars(self):
            usual = times.seconds(self.batch_size, self.inputs.features)
            self.by_mean |= usual > seconds + _SLACK
        if self.by_mean:
            return ("estimated by the mean of the results, to keep the deadline",)
        return ()


def training_part(module: nn.Module, dropout: bool = False) -> str | None:
    """Return the first submodule whose training mode changes answers, in words, or None."""
    kinds = (_BatchNorm, _DropoutNd) if dropout else (_BatchNorm,)
    for name, part in module.named_modules():
        if isinstance(part, kinds) and part.training and getattr(part, "p", 1.0) > 0:
            kind = type(part).__name__
            return f"submodule {name!r} ({kind})" if name else f"the module ({kind})"
    return None
