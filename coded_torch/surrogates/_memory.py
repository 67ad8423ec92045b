r"""A surrogate that trains itself: regression on computed answers of the wrapper."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import count, instance, sparing_logger
from .._changes import fingerprint
from .._torch import exactly
from ..input_space import metrics
from ..input_space._coordinates import RANK, Coordinates
from ..input_space._gaussian_process import LENGTH, RowProcess, evenly
from ..input_space._gradients import GradientMetric
from ..input_space._regressor import Regressor
from ..input_space.metrics import EUCLIDEAN, METRICS, Leaf, name_of, typical_rows
from ._untuned import FRESH, SHARE

logger = sparing_logger("coded_torch.surrogates")

# Rows from which the coordinates are found for the last time: all of 1,000 rows lower the error by
# 1 % against 512. (measured once; no benchmark keeps it)
_FROZEN_AT = 1024
_LANDMARKS = 512  # rows that determine the directions
_MOST_NUMBERS = 2**25  # numbers that are kept, 128 MB


class Memory:
    r"""Kernel regression on a wrapper's last results, a surrogate that needs no training.

    It estimates other inputs by a Matern 5/2 regression in 96 coordinates of its first inputs. When
    256 results are new, a thread makes the regression again; answers never wait for it. Only
    floating-point inputs that have a batch dimension are looked at. Inputs and outputs of other
    shapes than the first are ignored.

    The memory is forgotten as soon as the module's weights change, or another module's wrapper uses
    it: calls that are open then learn nothing more from it. It is not part of the wrapper's state
    dict, and is empty in pickles and copies.

    Warning:
        It keeps projections of the inputs, and the outputs, of all users of the module, and
        estimates answers for one user from rows of another. Do not give one to a wrapper whose
        users must not learn of each other. :meth:`clear` forgets.
        A process forked while the thread works may wait for ever for MKL's lock: spawn it instead.

    Args:
        capacity: the most results that are remembered, at least 1; the oldest calls go first. If
            outputs have many numbers, fewer are: outputs and coordinates take at most 128 MB.
        metric: one of :func:`~coded_torch.input_space.metrics.from_gradients`, or None.

    Example:
        >>> import torch
        >>> from coded_torch.surrogates import Memory
        >>> memory, x = Memory(), torch.linspace(-2, 2, 600)[:, None]
        >>> memory.observe([x], [x.tanh()])
        >>> memory.rebuild()
        >>> bool((memory.estimate([x])[0] - x.tanh()).abs().max() < 0.01)
        True
    """

    def __init__(self, capacity: int = 2048, metric: GradientMetric | None = None) -> None:
        self.capacity = count(self, "capacity", capacity)
        instance(self, "metric", metric, GradientMetric, optional=True)
        self.metric = metric
        self._gradients = () if metric is None else metric.competing
        self._lock = threading.Lock()
        self._generation = 0
        self._looks: tuple[Any, Any] = None, None  # the first keeps the second valid
        self._making: threading.Thread | None = None  # the thread of the last regression
        self._ended = self._seconds = 0.0  # the end of the last regression, and its duration
        self._forget()

    def _forget(self) -> None:
        """Forget all rows, and begin another generation."""
        self._generation += 1
        self._form: Any = None
        self._space: Coordinates | None = None  # once it is frozen
        self._rows: deque[tuple[Any, Tensor]] = deque()  # leaves or coordinates; outputs
        self._num_rows = self._num_fresh = 0
        #: The form of inputs and outputs, and their regression; never changed, but replaced.
        self._learnt: tuple[Any, Coordinates, RowProcess] | None = None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._forget()

    def __len__(self) -> int:
        """Return how many results are remembered."""
        return self._num_rows

    def follow(self, module: nn.Module) -> int:
        """Return a number that changes when the module or its weights do, for :meth:`observe`.

        When it changes, all rows are forgotten.
        """
        tensors, key = fingerprint(module)
        key = id(module), *key
        with self._lock:
            if self._looks[1] not in (None, key):
                self._forget()
            self._looks = (module, tensors), key
            return self._generation

    def observe(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], generation: int | None = None
    ) -> None:
        """Remember outputs of inputs, ``[n, ...]`` each, floating-point, finite.

        They are dropped unless ``generation``, which :meth:`follow` returned before the module ran,
        is the present one. Defaults to None, the present one.
        """
        if not (inputs and outputs and len(outputs[0])):
            return
        if len({len(x) for x in (*inputs, *outputs)}) > 1:
            raise ValueError("Memory: inputs and outputs must have the same number of rows")
        form = _form(inputs), _form(outputs)
        if generation is None:
            generation = self._generation
        numbers = sum(shape.numel() for shape in form[1]) + RANK
        most = max(1, min(self.capacity, _MOST_NUMBERS // numbers))
        inputs, outputs = ([x[-most:] for x in each] for each in (inputs, outputs))
        with torch.no_grad():
            seen: Any = []
            for leaf in self._features(inputs):  # copies, as the caller may change the inputs
                pooled = None
                if leaf.pooled is not None:
                    pooled = leaf.pooled.float()
                seen.append(Leaf(leaf.rows.to(torch.float32, copy=True), pooled))
            flat = torch.cat([x.reshape(len(x), -1).cpu().float() for x in outputs], 1)
        with self._lock:
            if generation != self._generation or self._form not in (None, form):
                return
            self._form = form
            self._rows.append((self._space(seen) if self._space else seen, flat))
            self._num_rows += len(flat)
            self._num_fresh += len(flat)
            while self._num_rows > most:
                self._num_rows -= len(self._rows.popleft()[1])
            self._rebuild()

    def estimate(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Return estimates for inputs, ``[n, ...]`` each, as :meth:`observe` takes them.

        Estimates, ``[n, ...]``, float32, of every output, are on the inputs' device. They are
        None if nothing has been learnt for inputs of these shapes.
        """
        found = self.error_bounds(inputs)
        if found is not None:
            return found[0]
        return None

    def error_bounds(
        self, inputs: Sequence[Tensor], generation: int | None = None
    ) -> tuple[list[Tensor], Tensor] | None:
        """Return estimates, and thresholds ``[n, m]`` of the errors of the first output, float64.

        Return None if ``generation``, as of :meth:`observe`, is not the present one.

        If m remembered rows and a new row are exchangeable, its error exceeds the k-th largest
        threshold with probability k / (m + 1). With 20 rows it is up to 4 points more, as they
        choose the metric, too.
        """
        with self._lock:
            learnt = None
            if generation in (None, self._generation):
                learnt = self._learnt
        if learnt is None or _form(inputs) != learnt[0][0]:
            return None
        (_, shapes), space, process = learnt
        with torch.no_grad(), exactly():
            outputs, thresholds = process.estimate_at(space(self._features(inputs)))
            parts = outputs.to(inputs[0].device).split([shape.numel() for shape in shapes], 1)
            found = [x.reshape(len(x), *shape) for x, shape in zip(parts, shapes, strict=True)]
            return found, thresholds

    def rebuild(self) -> None:
        """Learn all remembered results, and wait for that. Use it before the first call."""
        for _ in range(2):  # one that is under way may have begun before the last results
            with self._lock:
                self._rebuild(at_once=True)
            if self._making is not None:
                self._making.join()

    def _rebuild(self, at_once: bool = False) -> None:
        """Have a thread make the regression again: ``at_once``, or if enough results are new."""
        enough = self._num_fresh >= min(FRESH, self.capacity)
        in_turn = enough and self._seconds <= SHARE * (time.monotonic() - self._ended)
        is_idle = self._making is None or not self._making.is_alive()  # a fork leaves it dead
        if is_idle and self._num_fresh and (at_once or in_turn):
            args = self._generation, self._form, self._space, list(self._rows)
            with contextlib.suppress(RuntimeError):  # Python ends: there is nothing to learn for
                making = threading.Thread(target=self._make, args=args, name="coded_torch memory")
                making.start()
                self._making = making
                self._num_fresh = 0

    def _make(
        self, generation: int, form: Any, space: Coordinates | None, rows: list[tuple[Any, Tensor]]
    ) -> None:
        """Make the regression of remembered rows, in a thread, and replace the one before."""
        try:
            start = time.thread_time()  # other threads' time does not count
            outputs = torch.cat([y for _, y in rows])
            found = space or _space([x for x, _ in rows], outputs, self._gradients, len(form[0]))
            known = torch.cat([x if space else found(x) for x, _ in rows])
            typical = typical_rows([known])
            results = outputs[typical].double()
            process = RowProcess(known[typical], results, LENGTH, form[1][0].numel())
            with self._lock:
                self._seconds = time.thread_time() - start
                self._ended = time.monotonic()
                if generation == self._generation:
                    self._learnt = form, found, process
                    if space is None and len(outputs) >= min(_FROZEN_AT, self.capacity // 2):
                        self._space = found
                        self._rows = deque((found(x), y) for x, y in self._rows)
        except Exception:
            logger.warning("Memory: could not be rebuilt, and stays as it was", exc_info=True)

    def _features(self, inputs: Sequence[Tensor]) -> list[Leaf]:
        """Return the features of inputs, and then of gradients, unless these do not fit."""
        sources = metrics.Sources(inputs)
        by_gradients = [sources.of(metric) for metric in self._gradients]
        more = [leaf for leaves in by_gradients for leaf in leaves]
        return [*sources.leaves, *more]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity, self.metric)

    def __repr__(self) -> str:
        more = ""
        if self.metric is not None:
            more = f", metric={self.metric!r}"
        return f"Memory(capacity={self.capacity}{more})"


def _space(
    seen: Sequence[list[Leaf]], outputs: Tensor, gradients: Sequence[GradientMetric], own: int
) -> Coordinates:
    """Return coordinates in the metric in which outputs ``[M, C]`` estimate each other best.

    Among the few rows of a batch another metric wins: the more rows there are, the finer it is.
    """
    leaves = [_joined(column) for column in zip(*seen, strict=True)]
    some = typical_rows([leaf.rows for leaf in leaves[:own]]).nonzero().flatten()
    some = evenly(some, _LANDMARKS)
    leaves = [leaf.at(some) for leaf in leaves]
    places = {name_of(x): slice(own + i, own + i + 1) for i, x in enumerate(gradients)}
    made: dict[metrics.Features, list[Leaf]] = {x: leaves[places[name_of(x)]] for x in gradients}
    sources = metrics.Sources((), leaves[:own], made)
    distances = metrics.Distances(sources, (*METRICS, *gradients))
    regressor = Regressor(distances, LENGTH, compared=_LANDMARKS)
    choice = regressor.fit(outputs[some[regressor.known]].double()).choice
    name = choice.metric if choice else metrics.DEFAULT
    for metric in gradients:
        if name == name_of(metric):
            return Coordinates(leaves, EUCLIDEAN, distances.fits[metric], places[name])
    return Coordinates(leaves, METRICS[name], distances.fits[name], slice(own))


def _joined(leaves: Sequence[Leaf]) -> Leaf:
    """Return the rows of leaves of one form as one."""
    pooled = [leaf.pooled for leaf in leaves if leaf.pooled is not None]
    return Leaf(torch.cat([leaf.rows for leaf in leaves]), torch.cat(pooled) if pooled else None)


def _form(tensors: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(x.shape[1:] for x in tensors)
