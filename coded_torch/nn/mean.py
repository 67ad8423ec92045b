"""The mean of a data set from few computed rows: which rows, and the intervals of each look."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import count, instance, real, real_array
from .._torch import arguments, as_called, device_of, exactly, on_host
from ..input_space.finite_mean import KernelRegression, Rows, boundary, intervals
from ..input_space.metrics import METRICS, Leaf, leaves_of
from ..input_space.space import Spaces, joined
from ..scheduling.waiting import Waiting
from ..surrogates import Memory
from .division import Inputs
from .estimate_missing import CHANCE, least_squares, weighted

if TYPE_CHECKING:
    from .coded_wrapper import CodedWrapper

# Rows of the first look, of which intervals held as often as they say, and growth of the looks.
_FIRST, _GROWTH = 60, 1.25
# Rows that are looked at, without computing them, per computed row: so a look costs the same per
# computed row in any data set. Their number adds to the variance at most 1/128 of sampling's.
_SEEN = 128
_PILOT, _RANK = 512, 96  # rows that determine the coordinates, and their number, as in a memory
_FAR = 1e6  # the coordinates of rows that are not finite, which resemble no others
_BATCH, _BLOCK = 256, 1024  # rows of a call, and rows whose features are in memory together


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval for the means over all rows of a data set, from some of them.

    Attributes:
        value: float64 ``[C]``, the centre.
        half_width: float64 ``[C]``, half the width; 0 if all rows are computed.
        rows: the number of rows computed so far.
        total: the number of rows of the data set.
    """

    value: Tensor
    half_width: Tensor
    rows: int
    total: int


class Data:
    """The rows of a batch, or of a sequence of batches, in any order; ``total`` is their number."""

    def __init__(self, inputs: Any, in_dims: Any) -> None:
        is_one = isinstance(inputs, Tensor | tuple | Mapping)
        is_one |= not (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"))
        batches: Sequence[Any] = [inputs] if is_one else inputs
        # The last batch is kept, as checking it takes a pass over it.
        self._batch = functools.lru_cache(1)(lambda i: Inputs(*arguments(batches[i]), in_dims))
        sizes = [self._batch(number).batch_size for number in range(len(batches))]
        self._starts = torch.tensor([0, *itertools.accumulate(sizes)])
        self.total = int(self._starts[-1])

    def take(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of some rows."""
        ordered, places = rows.sort()
        numbers = torch.bucketize(ordered, self._starts, right=True) - 1
        parts = list[list[Any]]()
        for number in numbers.unique().tolist():
            batch, own = self._batch(number), ordered[numbers == number] - self._starts[number]
            pairs = list(zip(batch.leaves, batch.dims, strict=True))
            some = [x if d is None else x.index_select(d, own.to(x.device)) for x, d in pairs]
            parts.append(some)
        back, leaves = places.argsort(), parts[0]
        for i, dim in enumerate(batch.dims):
            if dim is not None:
                whole = torch.cat([part[i] for part in parts], dim)
                leaves[i] = whole.index_select(dim, back.to(whole.device))
        args, kwargs = pytree.tree_unflatten(leaves, batch.spec)
        return args, kwargs


def intervals_of(
    coded: CodedWrapper, inputs: Any, of: Any, half_width: Any, max_rows: Any, seed: Any, **how: Any
) -> Iterator[Interval]:
    """Do as :meth:`CodedWrapper.mean`."""
    target = real_array("mean", "half_width", math.inf if half_width is None else half_width)
    if not (target.ndim < 2 and (target > 0).all()):
        raise ValueError(f"mean: half_width must be positive, one or per column, got {half_width}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(count("mean", "seed", seed, 0, 2**63 - 1))
    with on_host():
        data = Data(inputs, coded.in_dims)
        if not data.total:
            raise ValueError("mean: inputs must hold at least one row, got none")
        most = data.total if max_rows is None else count("mean", "max_rows", max_rows, 2)
        sizes = [min(_FIRST, most := min(most, data.total))]
        while sizes[-1] < most:
            sizes.append(min(math.ceil(_GROWTH * sizes[-1]), most))
        parts = torch.randperm(data.total, generator=generator).tensor_split(sizes)
        # Rows of a look are in order, as batches may be read from a disk.
        order = torch.cat([*(part.sort().values for part in parts[:-1]), parts[-1]])
    looks = _Looks(coded, data, of, order, len(sizes), **how)

    def until() -> Iterator[Interval]:
        for size in sizes:
            found = looks.look(size)
            widths = found.half_width.numpy()
            if target.ndim and target.shape != widths.shape:
                must = f"half_width must be one number, or one for each of {len(widths)} columns"
                raise ValueError(f"mean: {must}, got {len(target)}")
            yield found
            if half_width is not None and bool((widths <= target).all()):
                return

    return until()


class _Looks:
    """The rows that are computed so far, in the order in which they were drawn."""

    def __init__(
        self, coded: Any, data: Data, of: Any, order: Tensor, most: int, level: Any, anytime: Any
    ) -> None:
        if coded.code is not None:
            raise ValueError(f"mean: code must be None, as rows are computed, got {coded.code}")
        if of is not None and not callable(of):
            raise TypeError(f"mean: of must be a function of outputs, got {type(of).__name__}")
        level = real("mean", "level", level, "between 0 and 1", lambda x: 0 < x < 1)
        instance("mean", "anytime", anytime, bool)
        self._level, self._factor = level, boundary(most, level) if anytime else 1.0
        self._coded, self._data, self._order, self._of = coded, data, order, of
        self._of_rows = False
        with contextlib.suppress(TypeError, ValueError):  # a function in C may have no signature
            self._of_rows = of is not None and "rows" in inspect.signature(of).parameters
        budget = (coded.waiting or Waiting()).hedge_budget
        self._waiting = Waiting(hedge_budget=budget, estimate=False)
        # A memory has learnt the computed rows, and would make too small errors of them.
        self._surrogates = [x for x in coded.surrogate if not isinstance(x, Memory)]
        metrics = () if coded.estimator is None else coded.estimator.metrics
        self._features = next((x for x in metrics if not isinstance(x, str)), None)
        self._metrics = [x for x in metrics if isinstance(x, str)] or [*METRICS]
        self._y, self._cheap, self._leaves = list[Tensor](), list[Any](), list[list[Leaf]]()
        self._spaces: Spaces | None = None

    @torch.no_grad()
    @on_host()
    def look(self, size: int) -> Interval:
        """Compute further rows, as many as make ``size``, and return the interval."""
        self._compute(self._order[sum(map(len, self._y)) : size])
        y, total = torch.cat(self._y), self._data.total
        if size == total:
            return Interval(y.mean(0), torch.zeros_like(y[0]), size, total)
        cheap, offsets, weights = [*map(torch.cat, zip(*self._cheap, strict=True))], 0 * y, []
        if cheap:
            fitted, explained, by_chance = least_squares(y, cheap)
            if explained > CHANCE * by_chance:
                weights, offsets = fitted, weighted(fitted, cheap)
        others = self._order[size : size + _SEEN * size].sort().values
        with exactly():
            space, length = self._space(y - offsets)
            z = space([joined(each) for each in zip(*self._leaves, strict=True)])
            # Of mean square 1, coordinates have a median distance of some 2^(1/2).
            regression = KernelRegression(z, y - offsets, (length, math.sqrt(2)))
            sums, offset = regression.sums(z[:0]), torch.zeros_like(y[0])
            for rows in others.split(_BLOCK):
                inputs = Inputs(*self._data.take(rows), self._coded.in_dims)
                sums += regression.sums(space(self._leaves_of(inputs)))
                if weights:
                    offset += weighted(weights, self._cheap_of(inputs, rows)).sum(0)
            given = y, self._shares, total, len(others), offsets, offset / len(others)
            found = intervals(Rows(*given), regression, sums, self._level, self._factor)
        return Interval(found[0], found[1], size, total)

    def _compute(self, rows: Tensor) -> None:
        bind, chunks = inspect.signature(lambda *args, **kwargs: None).bind, rows.split(_BATCH)
        taken = [self._data.take(chunk) for chunk in chunks]
        calls = (bind(*args, **kwargs) for args, kwargs in taken)
        try:
            with as_called():
                answers = [x for x, _ in self._coded.map(calls, waiting=self._waiting)]
        except Exception as error:
            with contextlib.suppress(Exception):  # a class may have slots
                facts: Any = error
                facts.rows = tuple(chunks[facts.batch][list(facts.rows)].tolist())
                facts.__notes__[-1] = f"CodedWrapper.mean: of the data set: rows {facts.rows[:16]}"
            raise
        for chunk, (args, kwargs), outputs in zip(chunks, taken, answers, strict=True):
            inputs = Inputs(args, kwargs, self._coded.in_dims)
            numbers, self._shares = self._numbers(outputs, chunk)
            self._y.append(numbers)
            self._cheap.append(self._cheap_of(inputs, chunk))
            self._leaves.append(self._leaves_of(inputs))

    def _numbers(self, outputs: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers of outputs, ``[rows, C]``, float64, and which columns are Boolean."""
        with as_called():
            if self._of is not None:
                outputs = self._of(outputs, **({"rows": rows} if self._of_rows else {}))
        found = [x.detach().cpu() for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        if not found or any(x.is_complex() or x.shape[:1] != rows.shape for x in found):
            got = ", ".join(f"{x.dtype} {[*x.shape]}" for x in found) or type(outputs).__name__
            must = f"must be real, one row for each of {len(rows)}, got {got}"
            raise ValueError(f"mean: outputs, or what of returns, {must}")
        flat = [x.reshape(len(rows), -1) for x in found]
        kinds = [torch.full((x.shape[1],), x.dtype is torch.bool) for x in flat]
        numbers = torch.cat([x.double() for x in flat], 1)
        if not bool(numbers.isfinite().all()):
            row = int(rows[~numbers.isfinite().all(1)][0])
            raise ValueError(f"mean: what of returns must be finite, got others in row {row}")
        return numbers, torch.cat(kinds)

    def _cheap_of(self, inputs: Inputs, rows: Tensor) -> list[Tensor]:
        """Return the numbers of each surrogate, ``[rows, C]``."""
        found = []
        for surrogate in self._surrogates:
            move = functools.partial(Tensor.to, device=device_of(surrogate) or inputs.device)
            args, kwargs = pytree.tree_map_only(Tensor, move, (inputs.args, inputs.kwargs))
            with as_called():
                outputs = surrogate(*args, **kwargs)
            found.append(self._numbers(outputs, rows)[0])
            if found[-1].shape[1:] != self._y[0].shape[1:]:
                must = f"outputs of surrogates must give {self._y[0].shape[1]} numbers per row"
                raise ValueError(f"mean: {must}, as the module's do, got {found[-1].shape[1]}")
        return found

    def _leaves_of(self, inputs: Inputs) -> list[Leaf]:
        """Return the features of rows; one without columns if there are none."""
        given = inputs.floating()
        if self._features is not None:
            with as_called():
                given = pytree.tree_leaves(self._features(*(given or inputs.batches())))
        return leaves_of(given) or [Leaf(torch.zeros(inputs.batch_size, 0))]

    def _space(self, results: Tensor) -> tuple[Callable[[list[Leaf]], Tensor], float]:
        """Return a function that gives coordinates, and the length that suits results best."""
        if self._spaces is None:
            pilot = Inputs(*self._data.take(self._order[:_PILOT]), self._coded.in_dims)
            leaves = self._leaves_of(pilot)
            if not leaves[0].rows.shape[1]:
                return lambda leaves: leaves[0].rows, 1.0
            self._spaces = Spaces(leaves, _RANK, self._metrics)
        metric, length = self._spaces.choose(results)
        space = self._spaces.of(metric)
        return lambda leaves: space(leaves).nan_to_num(_FAR).clamp(-_FAR, _FAR), length * space.step
