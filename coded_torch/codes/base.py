r"""What every code is: a linear encoder, and a linear decoder for every received set."""

from __future__ import annotations

import abc
import functools
import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import count
from ..linear import LinearMap, real_array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ..geometry import Geometry
    from ..grouping import Grouping

__all__ = ["BatchPlan", "Code", "CurveCode", "FixedCode", "NotEnoughResults"]

_CACHED_DECODERS = 256
_COLUMNS = 64


def _increasing(workers: tuple[int, ...]) -> bool:
    return all(map(operator.lt, workers, workers[1:]))


class NotEnoughResults(RuntimeError):  # noqa: N818 - the name says what happened
    """Fewer results arrived than the code can decode from.

    Attributes:
        received: the workers whose results arrived, in increasing order.
        required: how many the code needs.
        missing: the workers whose results did not arrive, in increasing order.
    """

    def __init__(self, received: Sequence[int], required: int, num_workers: int) -> None:
        self.received = tuple(sorted(received))
        self.required = required
        self.num_workers = num_workers
        self.missing = tuple(sorted(set(range(num_workers)) - set(received)))
        super().__init__(
            f"decoding needs at least {required} of {num_workers} results, "
            f"got {len(self.received)}; missing workers: {list(self.missing)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.received, self.required, self.num_workers)


class Code(abc.ABC):
    """How a batch becomes coded inputs for N workers, and their results become its answers.

    Subclasses implement :meth:`fit` and, where one result is not enough, :attr:`min_received`.
    Codes may be shared between threads, pickled and copied.

    Args:
        num_data: K, the number of inputs coded together, at least 1.
        num_workers: N, the number of workers, at least 1.
    """

    #: Whether :meth:`fit` looks at the distances between the inputs.
    uses_geometry: bool = False
    #: How the distances are measured, see :class:`~coded_torch.geometry.Geometry`.
    shrinkage: float = 0.01
    #: The most inputs to order and to fit at once; memory and time grow with its square.
    max_run: int = 4096

    def __init__(self, num_data: int, num_workers: int) -> None:
        self.num_data = count(self, "num_data", num_data)
        self.num_workers = count(self, "num_workers", num_workers)

    @property
    def min_received(self) -> int:
        """The least number of results that can be decoded."""
        return 1

    @abc.abstractmethod
    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Plan the coding of one batch, before any of its values is touched.

        Args:
            grouping: how the batch is cut into groups of K.
            geometry: the distances between its inputs; needed if :attr:`uses_geometry`.
            num_stragglers: how many workers are expected to be late, at least 0.
        """

    def __repr__(self) -> str:
        """The arguments that are kept under their names, without those that are arrays."""
        values = (
            (name, getattr(self, name, None)) for name in inspect.signature(type(self)).parameters
        )
        shown = (f"{n}={v!r}" for n, v in values if isinstance(v, (int, float, str, Code)))
        return f"{type(self).__name__}({', '.join(shown)})"


class FixedCode(Code):
    """A pair of linear maps: an encoder ``K -> N`` and, per received set, a decoder ``|F| -> K``.

    Subclasses implement :meth:`_make_encoder`, :meth:`_make_decoder` and, where one result is not
    enough, :attr:`min_received`. Both maps depend on the arguments alone, so they are made once and
    kept; decoders in a bounded cache. Codes may be shared between threads, pickled and copied.

    Args:
        num_data: K, the number of inputs coded together, at least 1.
        num_workers: N, the number of workers, at least 1.
    """

    def __init__(self, num_data: int, num_workers: int) -> None:
        super().__init__(num_data, num_workers)
        self._decoders: OrderedDict[tuple[int, ...], LinearMap] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    def encoder(self) -> LinearMap:
        """The map from K inputs to N coded inputs."""
        return self._make_encoder()

    def decoder(self, received: Sequence[int] | Tensor) -> LinearMap:
        """The map from the results of the ``received`` workers to the K answers.

        Args:
            received: the indices of the workers that answered, strictly increasing.

        Raises:
            ValueError: ``received`` is not strictly increasing within ``0 .. num_workers - 1``.
            NotEnoughResults: fewer than :attr:`min_received` results.

        Note:
            The code keeps the last 256 decoders used. A CUDA graph that decodes needs its own for
            as long as it is replayed: keep what this returns.
        """
        return self._decoder(self._received(received))

    def _decoder(self, workers: tuple[int, ...]) -> LinearMap:
        decoder = self._cached(workers)
        if decoder is not None:
            return decoder
        if not _increasing(workers):
            raise ValueError(
                f"{type(self).__name__}: received must be strictly increasing, got {list(workers)}"
            )
        return self._new_decoder(workers)

    def _new_decoder(self, key: tuple[int, ...]) -> LinearMap:
        if len(key) < self.min_received:
            raise NotEnoughResults(key, self.min_received, self.num_workers)
        decoder = self._make_decoder(key)
        with self._lock:
            self._decoders[key] = decoder
            if len(self._decoders) > _CACHED_DECODERS:
                self._decoders.popitem(last=False)
        return decoder

    def _cached(self, key: tuple[int, ...]) -> LinearMap | None:
        with self._lock:
            decoder = self._decoders.get(key)
            if decoder is not None:
                self._decoders.move_to_end(key)
            return decoder

    def encode(self, values: Tensor, dim: int = 0) -> Tensor:
        """Code inputs ``[..., K, ...]`` into ``[..., N, ...]``, along ``dim``."""
        return self.encoder(values, dim)

    def decode(self, results: Tensor, received: Sequence[int] | Tensor, dim: int = 0) -> Tensor:
        """Decode results ``[..., |F|, ...]`` into answers ``[..., K, ...]``, along ``dim``.

        Args:
            results: the results that arrived, stacked along ``dim``.
            received: the worker of each result, in any order, no worker twice. The answers do not
                depend on the order, bit for bit.
            dim: the dimension of the results that counts workers.

        Raises:
            TypeError, ValueError: as :class:`~coded_torch.linear.LinearMap`; a worker twice.
            NotEnoughResults: fewer than :attr:`min_received` results.
        """
        workers = self._received(received)
        decoder = self._cached(workers)  # whose keys are in increasing order
        if decoder is None and _increasing(workers):
            decoder = self._new_decoder(workers)
        elif decoder is None:
            order = sorted(range(len(workers)), key=workers.__getitem__)
            decoder = self._decoder(tuple(map(workers.__getitem__, order)))
            decoder.check(results, dim)
            results = results.index_select(dim, torch.tensor(order, device=results.device))
        return decoder(results, dim)

    def fit(
        self, grouping: Grouping, geometry: Geometry | None = None, num_stragglers: int = 0
    ) -> BatchPlan:
        """Every group for itself, all alike; the geometry is not looked at."""
        return _GroupwisePlan(self, grouping)

    @abc.abstractmethod
    def _make_encoder(self) -> LinearMap: ...

    @abc.abstractmethod
    def _make_decoder(self, received: tuple[int, ...]) -> LinearMap:
        """The decoder for a valid, strictly increasing received set of enough workers."""

    def _received(self, received: Sequence[int] | Tensor) -> tuple[int, ...]:
        name = type(self).__name__
        items = received.tolist() if isinstance(received, (Tensor, np.ndarray)) else received
        try:
            kinds = set(map(type, items))
            workers = tuple(items if kinds == {int} else map(operator.index, items))
        except TypeError:
            workers = None
        if workers is None or bool in kinds:
            raise TypeError(
                f"{name}: received must be a sequence of worker indices, got {received!r}"
            )
        if workers and not 0 <= min(workers) <= max(workers) < self.num_workers:
            worker = next(worker for worker in workers if not 0 <= worker < self.num_workers)
            raise ValueError(
                f"{name}: received must lie in 0..{self.num_workers - 1}, got {worker}"
            )
        return workers

    def __getstate__(self) -> dict[str, Any]:
        # The maps are cheap to plan again, and a lock cannot travel.
        dropped = ("_decoders", "_lock", "encoder")
        return {k: v for k, v in self.__dict__.items() if k not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._decoders = OrderedDict()
        self._lock = threading.Lock()


def few_columns(results: Tensor) -> Tensor:
    """Evenly spaced columns of results ``[F, G, ...]``, ``[F, G, C]``, as telling as all of them.

    The outputs' variance and trust are as exact from some 64 outputs, and cheaper.
    """
    columns = results.detach().reshape(*results.shape[:2], results.shape[2:].numel())
    return columns[..., :: max(1, columns.shape[2] // _COLUMNS)]


class BatchPlan(abc.ABC):
    """A code fitted to one batch: how its inputs are mixed, and its answers found.

    Attributes:
        code: the code.
        num_groups: G.
    """

    code: Code
    num_groups: int

    @abc.abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """From the batch ``[B, ...]`` to every worker's coded inputs, ``[N, G, ...]``."""

    @abc.abstractmethod
    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        """From results ``[|F|, G, ...]`` to the answers of the batch, ``[B, ...]``.

        Args:
            results: in the order of ``received``.
            received: the workers whose results these are, strictly increasing.
        """

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        """The root mean squared error to expect of the answers, if the code can tell, else None.

        Args:
            received: as in :meth:`decode`; it may be tried out before any result is there.
            results: as in :meth:`decode`; without, the error is in units of the outputs' standard
                deviation (of an output vector's, root of the sum of the variances); with, it is
                comparable to :func:`coded_torch.metrics.rmse`.
        """
        return None


class _GroupwisePlan(BatchPlan):
    """The plan of a fixed code: every group for itself, all alike."""

    def __init__(self, code: FixedCode, grouping: Grouping) -> None:
        self.code: FixedCode = code
        self.num_groups = grouping.num_groups
        self._grouping = grouping

    def encode(self, values: Tensor) -> Tensor:
        return self.code.encoder.gathered(values, self._grouping)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        return self.code.decoder(received).scattered(results, self._grouping)


class CurveCode(FixedCode):
    r"""A code that lays a curve through the inputs and reads coded inputs off it.

    Input :math:`k` sits at data point :math:`\alpha_k`, worker :math:`n` receives the curve's value
    at worker point :math:`\beta_n`; decoding lays a curve through the results at the received
    :math:`\beta_n` and reads the answers off at the :math:`\alpha_k`.

    Args:
        num_data: K, at least 1.
        num_workers: N, at least 1.
        data_points: ``[K]``, finite, strictly increasing.
        worker_points: ``[N]``, finite, strictly increasing.
    """

    def __init__(
        self, num_data: int, num_workers: int, data_points: ArrayLike, worker_points: ArrayLike
    ) -> None:
        super().__init__(num_data, num_workers)
        self.data_points = self._points("data_points", data_points, self.num_data)
        self.worker_points = self._points("worker_points", worker_points, self.num_workers)

    def _points(self, argument: str, points: ArrayLike, size: int) -> NDArray[np.float64]:
        array = real_array(f"{type(self).__name__}: {argument}", points)
        if array.shape != (size,):
            raise ValueError(
                f"{type(self).__name__}: {argument} must have shape ({size},), got {array.shape}"
            )
        # Negated, so that NaN fails.
        if not (np.isfinite(array).all() and (np.diff(array) > 0).all()):
            raise ValueError(
                f"{type(self).__name__}: {argument} must be finite and strictly increasing, "
                f"got {array.tolist()}"
            )
        array.flags.writeable = False
        return array

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for points in (self.data_points, self.worker_points):
            points.flags.writeable = False
