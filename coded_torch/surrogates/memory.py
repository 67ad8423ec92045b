r"""A surrogate that trains itself: regression on what the wrapper has answered."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import count
from .._logging import sparing_logger
from .._streams import read_here
from .._transforms import exactly
from .._weights import fingerprint
from ..input_space.gaussian_process import KernelRegression, matern52
from ..input_space.geometry import distances_among
from ..input_space.ordering import similarity_order
from ..input_space.points import path_step
from ._space import RANK, Space, evenly, side_by_side, winner

__all__ = ["Memory"]

logger = sparing_logger("coded_torch.surrogates")

_FROZEN_AT = 1024  # rows, from which the coordinates are found for the last time
_LENGTH, _PATH = 2.0, 240  # of the regression, in steps of a path through so many rows
_FRESH = 256  # new rows, after which the regression is made again
_SHARE = 0.02  # of the time, that may go into that
_MOST_NUMBERS = 2**25  # that are kept, 128 MB


class Memory:
    r"""Kernel regression on the last results that the wrapper has seen, a surrogate for nothing.

    It remembers the inputs and the exact results of the calls, those of inputs that were computed
    unmixed, and predicts from them what the module gives for other inputs: a Matern 5/2 regression
    in 96 coordinates of the inputs, the principal ones of its first 1,024 rows, in the metric of
    :data:`~coded_torch.input_space.distances.METRICS` in which these predict each other best. When
    256 results
    are new the regression is made again, by a thread of its own, and no more often than costs 2 %
    of the time; answers never wait for it.

    The memory is forgotten as soon as the module's weights change, is no part of the wrapper's
    state dict, and is empty in pickles and copies. Where it knows nothing of what is asked, as
    after the data have changed, the wrapper does not use it.

    Warning:
        It keeps projections of inputs, and outputs, of all users of the module: of one request, to
        answer another. Do not give one to a wrapper whose users must not learn of each other.
        :meth:`clear` forgets.

    Args:
        capacity: the most results that are remembered, at least 1; the oldest go first. Outputs of
            many numbers make it fewer, so that no more than 128 MB are kept.

    Raises:
        TypeError, ValueError: ``capacity`` is no integer of at least 1.

    Note:
        Only floating-point inputs that have a batch dimension are looked at. All inputs and outputs
        must have the shapes of the first that it saw, but for the batch; others are ignored. Making
        the regression of 2,048 rows takes some .1 s of one thread; predicting 240 rows some ms.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode
        >>> from coded_torch.nn import CodedWrapper
        >>> from coded_torch.stragglers import Uniform
        >>> from coded_torch.surrogates import Memory
        >>> memory = Memory()
        >>> tanh = torch.nn.Tanh()
        >>> coded = CodedWrapper(tanh, KernelCode(4, 6), stragglers=Uniform(2), surrogate=memory)
        >>> _ = coded(torch.linspace(-2, 2, 600)[:, None])
        >>> len(memory) > 400
        True
    """

    def __init__(self, capacity: int = 2048) -> None:
        self.capacity = count(self, "capacity", capacity)
        self._lock = threading.Lock()
        self._generation = 0
        self._looks: tuple[Any, Any] = None, None  # what is kept for the second to be true
        self._making: Future[None] | None = None
        self._process = 0  # whose thread makes regressions
        # When the last regression ended, and how long it and finding its space took.
        self._ended, self._seconds, self._size, self._choosing = 0.0, 0.0, 1, 0.0
        self._forget()

    def _forget(self) -> None:
        self._generation += 1
        self._form: Any = None
        self._space: Space | None = None  # once it is frozen
        self._rows: deque[tuple[Tensor, Tensor]] = deque()  # inputs or coordinates; outputs
        self._num_rows = self._num_fresh = 0
        self._snapshot: _Snapshot | None = None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._forget()

    def __len__(self) -> int:
        """The results that are remembered."""
        return self._num_rows

    def follow(self, module: nn.Module) -> int:
        """Forget everything if this is another module than last time, or its weights have changed.

        Returns:
            A number for :meth:`observe`, which does not count results of other weights.
        """
        tensors, how = fingerprint(module)
        how = id(module), *how
        with self._lock:
            if self._looks[1] != how:
                if self._looks[1] is not None:
                    self._forget()
                self._looks = (module, tensors), how
            return self._generation

    def observe(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], generation: int | None = None
    ) -> None:
        """Remember results.

        Args:
            inputs: ``[n, ...]`` each, floating-point, finite.
            outputs: ``[n, ...]`` each, of these inputs, floating-point, finite.
            generation: what :meth:`follow` returned before they were computed; None: just then.
        """
        if not (inputs and outputs and len(outputs[0])):
            return
        form = _form(inputs), _form(outputs)
        space = self._space
        with torch.no_grad():
            row = side_by_side(inputs).cpu(), _flat(outputs).cpu()
            if space is not None and form == self._form:
                row = space(row[0]), row[1]
        with self._lock:
            if generation is not None and generation != self._generation:
                return
            self._form = self._form or form
            if form != self._form:
                return
            if space is not self._space:  # frozen meanwhile
                if self._space is None or space is not None:
                    return
                row = self._space(row[0]), row[1]
            self._rows.append(row)
            self._num_rows += len(row[0])
            self._num_fresh += len(row[0])
            self._trim(row[1].shape[1])
            self._rebuild()

    def predict(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """What the module gives for these inputs, as far as is remembered.

        Args:
            inputs: ``[n, ...]`` each, as :meth:`observe` takes them.

        Returns:
            ``[n, ...]``, float32, for every output; None as long as nothing has been learnt, and of
            inputs of other shapes.
        """
        snapshot = self._snapshot
        if snapshot is None or _form(inputs) != snapshot.form[0]:
            return None
        with torch.no_grad():
            return snapshot.on(inputs[0].device).predict(inputs)

    def rebuild(self) -> None:
        """Learn all that is remembered now, and wait for it.

        Nobody has to call this. It is for a memory that was given results by :meth:`observe`, and
        is to know them before the first request.
        """
        for _ in range(2):  # one that is under way may have begun before the last results
            with self._lock:
                self._settle_in()
                if self._making is None and self._num_fresh:
                    self._start()
                making = self._making
            if making is not None:
                making.result()

    def _trim(self, num_outputs: int) -> None:
        most = max(1, min(self.capacity, _MOST_NUMBERS // (num_outputs + RANK)))
        while self._num_rows > most:
            seen, outputs = self._rows.popleft()
            surplus = self._num_rows - most
            if len(seen) > surplus:
                # A copy, or what is dropped would stay in memory.
                self._rows.appendleft((seen[surplus:].clone(), outputs[surplus:].clone()))
            self._num_rows -= min(surplus, len(seen))

    def _rebuild(self) -> None:
        """Make the regression again, if it is worth while and its turn; never waits."""
        self._settle_in()
        if self._making is not None or self._num_fresh < min(_FRESH, self.capacity):
            return
        expected = self._seconds * (self._num_rows / self._size) ** 2
        if self._space is None:
            expected += self._choosing
        if expected <= _SHARE * (time.monotonic() - self._ended):
            self._start()

    def _settle_in(self) -> None:
        """Have a thread in this process: it has none at first, and a fork leaves it behind."""
        if self._process != os.getpid():
            # One for all regressions: the allocator keeps some of what each thread has freed.
            self._maker = ThreadPoolExecutor(1, "coded_torch memory")
            self._process, self._making = os.getpid(), None

    def _start(self) -> None:
        args = self._generation, self._form, self._space, list(self._rows)
        with contextlib.suppress(RuntimeError):  # Python ends: there is nothing to learn for
            self._making = self._maker.submit(self._make, *args)
            self._num_fresh = 0

    def _make(
        self, generation: int, form: Any, space: Space | None, rows: list[tuple[Tensor, Tensor]]
    ) -> None:
        try:
            start = time.thread_time()  # not what others did meanwhile
            seen, outputs = (torch.cat(column) for column in zip(*rows, strict=True))
            found = space or Space(seen, form[0], winner(seen, outputs, form[0]))
            if space is None:
                seen = found(seen)
            chosen = time.thread_time()
            snapshot = _Snapshot(form, found, *_regression(seen, outputs))
            seconds = time.thread_time() - chosen
            with self._lock:
                self._seconds, self._size, self._choosing = seconds, len(seen), chosen - start
                if generation != self._generation:
                    return
                self._snapshot = snapshot
                if space is None and len(seen) >= min(_FROZEN_AT, self.capacity):
                    self._space = found
                    parts = seen.split([len(x) for x, _ in rows])
                    known = {id(x): z for (x, _), z in zip(rows, parts, strict=True)}
                    self._rows = deque(
                        (known[id(x)] if id(x) in known else found(x), y) for x, y in self._rows
                    )
        except Exception:
            logger.warning("a memory could not be rebuilt; it goes on as it was", exc_info=True)
        finally:
            with self._lock:
                self._ended, self._making = time.monotonic(), None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.capacity,)

    def __repr__(self) -> str:
        return f"Memory(capacity={self.capacity})"


class _Snapshot:
    """A regression that is never changed.

    Args:
        form: the shapes of inputs and outputs.
        space: of the coordinates.
        rows: ``[M, r]``, coordinates.
        length: of the kernel.
        weights: ``[M, C]``.
        mean: ``[C]``.
    """

    def __init__(
        self, form: Any, space: Space, rows: Tensor, length: float, weights: Tensor, mean: Tensor
    ) -> None:
        self.form, self._space, self._length = form, space, length
        self._mean = mean
        self._weights = weights.T.contiguous().T  # so that the product takes half the time
        # |a|^2 + |b|^2 - 2 a.b is one product of [-2 a, |a|^2, 1] and [b, 1, |b|^2].
        squares = rows.square().sum(1, keepdim=True)
        self._to_rows = torch.cat([rows, torch.ones_like(squares), squares], 1).T
        self._placed: dict[torch.device, _Snapshot] = {}

    def on(self, device: torch.device) -> _Snapshot:
        """The same on a device; each device's is kept."""
        if device == self._mean.device:
            return self
        placed = self._placed.get(device)
        if placed is None:
            # All is copied, which waits; what another stream computes might not be there yet.
            placed = copy.copy(self)
            for name in ("_to_rows", "_weights", "_mean"):
                setattr(placed, name, getattr(self, name).to(device))
            placed._space = self._space.to(device)
            self._placed[device] = placed
        for tensor in (placed._to_rows, placed._weights, placed._mean, *placed._space.tensors):
            read_here(tensor)  # a newer snapshot may take its place at any time
        return placed

    def predict(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with exactly(self._mean.device.type):
            z = self._space(side_by_side(inputs))
            squares = z.square().sum(1, keepdim=True)
            squared = torch.cat([z * -2, squares, torch.ones_like(squares)], 1) @ self._to_rows
            covariances = matern52(squared.clamp_(min=0), self._length, out=squared)
            outputs = torch.addmm(self._mean, covariances, self._weights)
        shapes = self.form[1]
        parts = outputs.split([shape.numel() for shape in shapes], 1)
        return [x.reshape(len(x), *shape) for x, shape in zip(parts, shapes, strict=True)]


def _regression(rows: Tensor, outputs: Tensor) -> tuple[Tensor, float, Tensor, Tensor]:
    """The rows, the length, the weights ``[M, C]`` and the mean ``[C]``, in float32."""
    squared = distances_among(rows)
    some = evenly(len(rows), _PATH)
    among = squared[some][:, some]
    length = _LENGTH * path_step(among, similarity_order(among.sqrt()))
    weights, mean = KernelRegression(squared, length).coefficients(outputs)
    return rows, length, weights.float(), mean.float()


def _flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(len(x), -1).float() for x in outputs], 1)


def _form(tensors: Sequence[Tensor]) -> tuple[torch.Size, ...]:
    return tuple(x.shape[1:] for x in tensors)
