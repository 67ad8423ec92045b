"""The mean of a data set from few computed rows: which rows, and the intervals of each look."""

import contextlib
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from .._arguments import arguments, between_0_and_1, bound, count, instance, real_array, shown
from .._torch import as_called, device_of, exactly, on_host
from ..input_space._betting import bounded
from ..input_space._coordinates import Coordinates
from ..input_space._finite_mean import Kernel, LowRankRegression, intervals
from ..input_space._gradients import GradientMetric
from ..input_space.metrics import EUCLIDEAN, METRICS, Leaf, fitted, leaves_of, typical_rows
from ..scheduling.policy import Waiting
from ..surrogates import Memory
from ._division import Inputs
from ._estimate_missing import CHANCE, least_squares

# Rows of the first look, of which intervals held as often as they say, and growth of the looks.
_FIRST = 60
_GROWTH = 1.25
# Rows that are looked at, without computing them, per computed row: so a look costs the same per
# computed row in any data set. Their number adds to the variance at most 1/128 of sampling's.
_SEEN = 128
# The rows that determine the coordinates, in which they lie farther out than others. That must not
# tell computed rows from others, so they are drawn on their own. With 512, all metrics, or five
# lengths, intervals were as wide within 2 % on six networks. (measured once; no benchmark keeps it)
_PILOT = 256
_METRICS = [metric for metric in METRICS.values() if metric.shrinkage < math.inf]
# The lengths of kernels. The mean square of coordinates is 1, so a median distance is some 2^(1/2).
_LENGTHS = (0.5**0.5, 2**0.5, 8**0.5)
_Coordinates = Callable[[Sequence[Leaf]], Tensor]
# With more rows, the kernel that the last look chose is the only one: at 888 rows, making all took
# 2 s of one thread, and one 0.3 s. (measured once; no benchmark keeps it)
_COMPARED = 512
_FAR = 1e6  # the coordinates of rows that are not finite, which resemble no others
# rows of a call, and rows whose features are in memory together
_BATCH = 256
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Interval:
    """An interval for the means over all rows of a data set, from some of them.

    Attributes:
        value: float64 ``[C]``, the centre.
        half_width: float64 ``[C]``, half the width; 0 if all rows are computed. Infinite while all
            values of a column are equal, unless it is Boolean or ``bounds`` are given.
        rows: the number of rows computed so far.
        total: the number of rows of the data set.
    """

    value: Tensor
    half_width: Tensor
    rows: int
    total: int


class _Data:
    """The rows of a batch, or of a sequence of batches of one size; the last may have fewer."""

    def __init__(self, inputs: Any, in_dims: Any) -> None:
        is_many = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")
        is_many &= not isinstance(inputs, Tensor | tuple | Mapping)
        self._batches: Sequence[Any] = inputs if is_many else [inputs]
        self._in_dims = in_dims
        self._last = len(self._batches) - 1
        # The last batch is kept, as checking it takes a pass over it.
        self._batch = functools.lru_cache(1)(self._read)
        self._size = self._batch(0).batch_size if self._last >= 0 else 0
        if not self._size:
            raise ValueError("mean: inputs must hold at least one row, got none")
        self.total = self._last * self._size + self._batch(self._last).batch_size

    def _read(self, number: int) -> Inputs:
        """Return a batch by its number, or raise an error if it has strings or another size."""
        found = Inputs(*arguments(self._batches[number]), self._in_dims)
        if found.texts:
            raise TypeError("mean: inputs must be tensors, got strings; turn them into tensors")
        rows = found.batch_size
        first = getattr(self, "_size", found.batch_size)
        if rows > first or (rows < first and number < self._last):
            requirement = f"{first} rows in each batch but the last, which may have fewer"
            raise ValueError(f"mean: inputs must have {requirement}, got {rows} in batch {number}")
        return found

    def take(self, rows: Tensor) -> Inputs:
        """Return some rows, by increasing numbers."""
        numbers = rows // self._size
        parts = []
        for number in numbers.unique().tolist():
            batch = self._batch(number)
            own = rows[numbers == number] - number * self._size
            pairs = list(zip(batch.leaves, batch.dims, strict=True))
            parts.append(
                [x if d is None else x.index_select(d, own.to(x.device)) for x, d in pairs]
            )
        columns = zip(zip(*parts, strict=True), batch.dims, strict=True)
        leaves = [x[0] if dim is None else torch.cat(x, dim) for x, dim in columns]
        args, kwargs = tree_unflatten(leaves, batch.spec)
        return Inputs(args, kwargs, self._in_dims)


class Looks:
    """Does the work of :meth:`CodedWrapper.mean`, which has these arguments.

    ``numbers`` are of the computed rows, ``[rows, C]`` each. ``sizes`` are the numbers of rows that
    are computed at each look. ``drawn``, ``[N]``, has the rows in the order of drawing. ``order``
    has the same rows, but those that are new at a look are increasing.
    """

    shares: Tensor  #: bool ``[C]``, the columns that are shares
    #: Called with the number of rows that have been computed since the last time.
    on_rows: Callable[[int], object] = staticmethod(lambda rows: None)
    _best: tuple[_Coordinates, float] | None = None

    def __init__(
        self,
        coded: Any,
        inputs: Any,
        of: Any = None,
        *,
        max_rows: Any = None,
        bounds: Any = None,
        level: Any = 0.95,
        anytime: Any = False,
        seed: Any = None,
    ) -> None:
        if coded.code is not None:
            raise ValueError(
                f"mean: code must be None, as rows are computed, got {shown(coded.code)}"
            )
        instance("mean", "of", of, Callable, optional=True)
        level = between_0_and_1("mean", "level", level)
        instance("mean", "anytime", anytime, bool)
        self._bounds = None
        if bounds is not None:
            self._bounds = _checked_bounds(bounds)
        if seed is None:
            seed = random.SystemRandom().getrandbits(63)
        self.seed = count("mean", "seed", seed, 0, 2**63 - 1)
        with on_host():
            self._data = data = _Data(inputs, coded.in_dims)
            most = data.total
            if max_rows is not None:
                most = min(most, count("mean", "max_rows", max_rows, 2))
            self.sizes = [min(_FIRST, most)]
            while self.sizes[-1] < most:
                self.sizes.append(min(math.ceil(_GROWTH * self.sizes[-1]), most))
            generator = torch.Generator().manual_seed(self.seed)
            self.drawn = torch.randperm(data.total, generator=generator)
            # Rows of a look are in order, as batches may be read from a disk.
            parts = self.drawn.tensor_split(self.sizes)
            self.order = torch.cat([part.sort().values for part in parts])
            self._pilot = torch.randperm(data.total, generator=generator)[:_PILOT].sort().values
        self._level = level
        self._anytime = anytime
        # All looks hold together by Bonferroni's inequality, whatever their dependence.
        self._at_looks = 1 - (1 - level) / (len(self.sizes) if anytime else 1)
        self._coded = coded
        self._of = of
        self._averaged = "outputs" if of is None else "results of `of`"  # for messages
        self.numbers = list[Tensor]()
        budget = (coded.waiting or Waiting()).hedge_budget
        self._waiting = Waiting(hedge_budget=budget, estimate=False)
        # A memory has learnt the computed rows, and would make too small errors of them.
        self._surrogates = [x for x in coded.surrogate if not isinstance(x, Memory)]
        metrics = () if coded.estimator is None else coded.estimator.metrics
        self._gradients = [x for x in metrics if isinstance(x, GradientMetric)]
        features = (x for x in metrics if not isinstance(x, str | GradientMetric))
        self._features = next(features, None)
        self._seen = list[tuple[list[Tensor], Tensor]]()  # of blocks of computed rows
        self._kernels = dict[Kernel, tuple[_Coordinates, float]]()  # of these rows

    def until(self, half_width: Any) -> Iterator[Interval]:
        """Return an iterator that ends as soon as no half width is larger than this."""
        target = real_array("mean", "half_width", math.inf if half_width is None else half_width)
        if not (target.ndim < 2 and (target > 0).all()):
            raise ValueError(
                f"mean: half_width must be positive, one or per column, got {shown(half_width)}"
            )

        def looks() -> Iterator[Interval]:
            for size in self.sizes:
                value, half = self.look(size)[0]
                if not (target.ndim == 0 or target.shape == half.shape):
                    raise ValueError(
                        f"mean: half_width must be one number, or one for each of {len(half)} "
                        f"columns, got {shown(half_width)}"
                    )
                yield Interval(value, half, size, self._data.total)
                if half_width is not None and bool((half.numpy() <= target).all()):
                    return

        return looks()

    def expected_rows(self, found: Interval, half_width: Any) -> int:
        """Return how many rows are expected to reach a half width, by the interval of a look.

        Widths shrink as without regression, which mostly needs fewer rows.
        """
        if half_width is None:
            return self.sizes[-1]
        shares = (torch.as_tensor(half_width).double() / found.half_width) ** 2
        of_all = 1 / found.total
        needed = 1 / (of_all + (1 / found.rows - of_all) * float(shares.min()))
        later = (size for size in self.sizes if size >= max(needed, found.rows))
        return next(later, self.sizes[-1])

    def look(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the interval from the first ``size`` rows, and the interval of plain sampling.

        Each is ``[2, C]``: centres and half widths.
        """
        y = self._computed(size)
        if size == self._data.total:
            exact = torch.stack([y.mean(0), torch.zeros_like(y[0])])
            return exact, exact
        found, sampled = intervals(*self.estimated(size), level=self._at_looks)
        if self._bounds is not None or self._anytime:
            # `y` is in the order in which rows are computed, and bets need the order of drawing.
            place_of_row = torch.empty_like(self.order)
            place_of_row[self.order[:size]] = torch.arange(size)
            found = bounded(
                found,
                y[place_of_row[self.drawn[:size]]],
                self.shares,
                self._limits(y),
                self._data.total,
                level=self._level,
                at_looks=self._at_looks,
            )
        return found, sampled

    def _limits(self, y: Tensor) -> Tensor:
        """Return the bounds of each column, ``[2, C]``, infinite where they are not known."""
        columns = len(self.shares)
        bounds = self._bounds
        if bounds is None:
            bounds = torch.tensor([[-math.inf], [math.inf]])
        if bounds.shape[1] not in (1, columns):
            requirement = f"two numbers, or two for each of {columns} columns"
            pair = bounds.squeeze(1).tolist()
            raise ValueError(f"mean: bounds must be {requirement}, got {pair}")
        bounds = bounds.double().repeat(1, columns // bounds.shape[1])
        bounds[0, self.shares] = 0.0
        bounds[1, self.shares] = 1.0
        outside = ((y < bounds[0]) | (y > bounds[1])).nonzero()
        if len(outside):
            row, column = outside[0].tolist()
            low, high = bounds[:, column].tolist()
            got = f"{y[row, column]:.6g} in row {self.order[row]}, column {column}"
            raise ValueError(
                f"mean: {self._averaged} must be between {low:g} and {high:g}, got {got}"
            )
        return bounds

    @torch.no_grad()
    @on_host()
    @exactly()
    def estimated(self, size: int) -> tuple[Any, ...]:
        """Return what :func:`~..input_space._finite_mean.intervals` takes, from computed rows."""
        y = self._computed(size)
        self._grow(size)
        cheap = torch.cat([each for _, each in self._seen], 1)
        weights = torch.zeros(len(cheap), dtype=y.dtype)
        if len(cheap):
            found, explained, by_chance = least_squares(y, cheap.unbind())
            if explained > CHANCE * by_chance:  # surrogates of noise have no weight
                weights += torch.tensor(found)
        regression = LowRankRegression([*self._kernels], y - torch.tensordot(weights, cheap, 1))
        kernel = regression.kernel
        self._best = self._kernels[kernel]
        space, _ = self._best
        others = self.drawn[size : size + _SEEN * size]
        sums = torch.zeros(size)
        offset = torch.zeros(y.shape[1])
        seen = len(others)
        for leaves, cheap in self._looked_at(others.sort().values):
            sums = sums + kernel.sums(_coordinates(space, leaves))
            offset = offset + torch.tensordot(weights, cheap.sum(1), 1)
        k = sums / seen
        estimate = offset / seen + k @ regression.weights
        b = regression.second_order(k)
        return y, self.shares, regression.errors, estimate, b, seen, self._data.total

    @torch.no_grad()
    @on_host()
    def _computed(self, size: int) -> Tensor:
        """Return the numbers of ``size`` rows, ``[size, C]``; they are computed if they are not."""
        rows = self.order[sum(map(len, self.numbers)) : size]
        chunks = rows.split(_BATCH) if len(rows) else ()
        calls = (bound(x.args, x.kwargs) for x in map(self._data.take, chunks))
        try:
            with as_called():
                found = self._coded.map(calls, waiting=self._waiting)
                for chunk, (outputs, _) in zip(chunks, found, strict=True):
                    numbers, self.shares = self._numbers_of(outputs, chunk)
                    self.numbers.append(numbers)
                    self.on_rows(len(chunk))
        except Exception as error:  # its rows are numbered within a batch until here
            with contextlib.suppress(Exception):  # a class may have slots
                facts: Any = error
                facts.rows = tuple(chunks[facts.batch][list(facts.rows)].tolist())
                facts.__notes__[-1] = f"CodedWrapper.mean: of the data set: rows {facts.rows[:16]}"
            raise
        return torch.cat(self.numbers)[:size]

    def _grow(self, size: int) -> None:
        """Add the features of further rows, as many as make ``size``, to the kernels."""
        done = sum(len(z[0]) for z, _ in self._seen)
        if done == size:
            return
        for leaves, cheap in self._looked_at(self.order[done:size]):
            self._seen.append(([_coordinates(space, leaves) for space in self._spaces], cheap))
        each = zip(self._spaces, zip(*(z for z, _ in self._seen), strict=True), strict=True)
        pairs = [(space, torch.cat(z)) for space, z in each]
        every = [(space, z, length) for space, z in pairs for length in _LENGTHS]
        if self._best and size > _COMPARED:
            every = [x for x in every if x[::2] == self._best]
        self._kernels = {Kernel(z, length): (space, length) for space, z, length in every}

    def _looked_at(self, rows: Tensor) -> Iterator[tuple[list[Leaf], Tensor]]:
        """Yield features of rows, and numbers of surrogates ``[J, rows, C]``, by block."""
        for block in rows.split(_BLOCK):
            inputs = self._data.take(block)
            columns = len(self.shares)
            cheap = [torch.zeros(0, len(block), columns, dtype=torch.float64)]
            for surrogate in self._surrogates:
                move = functools.partial(Tensor.to, device=device_of(surrogate) or inputs.device)
                args, kwargs = tree_map_only(Tensor, move, (inputs.args, inputs.kwargs))
                with as_called():
                    outputs = surrogate(*args, **kwargs)
                cheap.append(self._numbers_of(outputs, block)[0][None])
                if cheap[-1].shape[2] != columns:
                    raise ValueError(
                        f"mean: outputs of surrogates must be {columns} numbers per row, as the "
                        f"module's, got {shown(cheap[-1].shape[2])}"
                    )
            yield self._leaves_of(inputs), torch.cat(cheap)

    @functools.cached_property
    def _spaces(self) -> Sequence[_Coordinates]:
        """The coordinates that compete, one for each metric that applies to the pilot rows."""
        leaves = self._leaves_of(self._data.take(self._pilot))
        typical = typical_rows([x.rows.contiguous() for x in leaves])
        leaves = [x.at(typical) for x in leaves]
        own = slice(len(leaves) - len(self._gradients))
        of_gradients = [slice(i, i + 1) for i in range(own.stop, len(leaves))]
        kinds = [(own, _METRICS), *((place, [EUCLIDEAN]) for place in of_gradients)]
        spaces = [
            Coordinates(leaves, metric, fit, place)
            for place, metrics in kinds
            for metric, fit in zip(metrics, fitted(leaves[place], metrics), strict=True)
            if fit is not None
        ]
        return spaces or [lambda leaves: leaves[0].rows[:, :0]]  # no pilot is finite

    def _leaves_of(self, inputs: Inputs) -> list[Leaf]:
        """Return the features of rows; a constant if there are none."""
        given = floating = inputs.floating()
        if self._features is not None:
            with as_called():
                given = tree_leaves(self._features(*(given or inputs.batches())))
        by_gradients = [metric(*floating) for metric in self._gradients]
        return leaves_of([*(given or [torch.zeros(inputs.batch_size)]), *by_gradients])

    def _numbers_of(self, outputs: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers of outputs, ``[rows, C]``, float64, and which columns are Boolean."""
        with as_called():
            if self._of is not None:
                outputs = self._of(outputs, rows)
        found = [x.detach().cpu() for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        if not found or any(x.dtype.is_complex or x.shape[:1] != rows.shape for x in found):
            got = ", ".join(f"{x.dtype} {[*x.shape]}" for x in found) or type(outputs).__name__
            requirement = f"must be real, one row for each of {len(rows)}, got {got}"
            raise ValueError(f"mean: {self._averaged} {requirement}")
        flat = [x.reshape(len(rows), -1) for x in found]
        numbers = torch.cat([x.double() for x in flat], 1)
        finite = numbers.isfinite().all(1)
        if not bool(finite.all()):
            row = int(rows[~finite][0])
            raise ValueError(f"mean: {self._averaged} must be finite, got others in row {row}")
        return numbers, torch.cat([torch.full(x.shape[1:], x.dtype is torch.bool) for x in flat])


def _checked_bounds(bounds: Any) -> Tensor:
    """Return bounds as ``[2, 1]`` or ``[2, C]``."""
    ends = real_array("mean", "bounds", bounds)
    is_right = ends.ndim in (1, 2) and len(ends) == 2
    is_right = is_right and bool(np.isfinite(ends).all() and (ends[0] < ends[1]).all())
    if not is_right:
        requirement = "(low, high), finite and low < high, for all columns or [C] each"
        raise ValueError(f"mean: bounds must be {requirement}, got {bounds}")
    return torch.from_numpy(ends).view(2, -1)


def _coordinates(space: _Coordinates, leaves: Sequence[Leaf]) -> Tensor:
    return space(leaves).nan_to_num(_FAR).clamp(-_FAR, _FAR)
