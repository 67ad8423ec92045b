r"""What every code is: a linear encoder, and a linear decoder for every received set."""

from __future__ import annotations

import abc
import functools
import inspect
import operator
import random
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from .._arguments import MOST_WORKERS, count, instance
from .._transforms import on_host, outside
from ..input_space.ordering import Grouping, check_ordering
from ..input_space.regression import check_batch, check_link
from ..linear import LinearMap
from ..linear.maps import unit_rows
from .plans import BatchPlan, GroupwisePlan, NotEnoughResults, order_of

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Code", "FixedCode", "Options"]

_CACHED_DECODERS = 256  # of 20 of 24 workers each holds some 10 KB; it was not tuned


class Options(TypedDict, total=False):
    """The keyword arguments that every code takes."""

    ordering: str | Tensor | Sequence[int]
    shuffle: bool | random.Random
    link: str | None


class Code(abc.ABC):
    r"""How a batch becomes coded inputs for N workers, and their results become its answers.

    The contract. A code is immutable once made, and may be shared between threads, pickled and
    copied. :meth:`replace` and ``repr`` use the arguments of its constructor as given. :meth:`plan`
    makes a :class:`~coded_torch.codes.plans.BatchPlan`, which is linear in values and in results,
    decodes every received set of at least :attr:`min_received` workers, and gives the same bits for
    the same results. Constants are reproduced: the rows of every matrix sum to 1. An answer that is
    called exact is some worker's result of that very input, bit for bit.

    To add a code:

    1. Derive from :class:`FixedCode` if encoder and decoders depend on the arguments alone, from
       :class:`~coded_torch.codes.nodes.CurveCode` if inputs and workers sit at points of a curve
       besides, else from this class.
    2. Write the constructor: keyword arguments after K and N, each checked (``_arguments``), each
       kept under its name; pass the other ones on to ``super().__init__``, which comes first.
    3. Write ``_make_encoder()``, which returns a :class:`~coded_torch.linear.LinearMap` from K
       inputs to N, and ``_make_decoder(received)``, which returns one from the results of the
       workers in a tuple to K answers (of a curve ``_curve``; here :meth:`plan`). For a dense
       matrix that is ``MatrixMap(matrix)``. Write :attr:`min_received` if one result is not enough.
    4. Give :meth:`candidates` for the numbers that are worth tuning.
    5. Test it: inherit :class:`coded_torch.testing.codes.CodeTests`, and implement ``make``.
       ``tests/codes/test_b_spline.py`` is an example from end to end.
    6. Compare it: ``coded_torch.compare(model, batches, more=lambda k, n: {"mine": Mine(k, n)})``.

    Args:
        num_data: K, the number of inputs coded together, at least 1.
        num_workers: N, the number of workers, from K to 65,536.
        ordering: the order in which a batch is cut into groups of K: "similarity", so that
            neighbours resemble each other; "arrival"; or a permutation of the batch, a sequence or
            an integer tensor. Defaults to "similarity".
        shuffle: whether the columns are asked for in an order drawn anew for every call, so that
            neighbouring workers that are late together do not lose neighbours on the curve. A
            ``random.Random`` makes the orders repeatable. Defaults to True.
        link: "softmax" if all outputs are probabilities over their last dimension: they are
            decoded on the scale of logits. Defaults to None.

    Attributes:
        num_data: K
        num_workers: N
        ordering, shuffle, link: as given.
        mixes: whether coded inputs are mixtures of inputs. Codes that do not mix carry values of
            any dtype.
        uses_geometry: whether planning measures distances between the inputs, which takes time.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: an argument is out of range.
    """

    mixes: bool = True
    uses_geometry: bool = False

    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        code = super().__new__(cls)
        code._given = args, kwargs
        return code

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        ordering: str | Tensor | Sequence[int] = "similarity",
        shuffle: bool | random.Random = True,
        link: str | None = None,
    ) -> None:
        self.num_data = count(self, "num_data", num_data, most=MOST_WORKERS)
        self.num_workers = count(self, "num_workers", num_workers, most=MOST_WORKERS)
        if self.num_workers < self.num_data:
            raise ValueError(
                f"{type(self).__name__}: num_workers must be at least num_data, {self.num_data}, "
                f"got {self.num_workers}"
            )
        check_ordering(self, ordering)
        if not isinstance(shuffle, random.Random):
            instance(self, "shuffle", shuffle, bool)
        check_link(self, link)
        self.ordering, self.shuffle, self.link = ordering, shuffle, link

    @property
    def min_received(self) -> int:
        """The least number of results that can be decoded."""
        return 1

    @abc.abstractmethod
    def plan(
        self,
        inputs: Sequence[Tensor],
        num_stragglers: int = 0,
        *,
        batch_size: int | None = None,
        others: Sequence[Tensor] = (),
    ) -> BatchPlan:
        """Order a batch, cut it into groups of K, and fit the code to it.

        Planning looks at numbers only: it passes no gradients, and works inside
        :func:`torch.func.grad`, ``jacrev`` and ``jvp``.

        Args:
            inputs: the floating-point inputs that are coded, ``[B, ...]`` each, B at least 1. There
                may be none if the code mixes nothing: then there are no distances, and the plan's
                note says what that means.
            num_stragglers: S, how many workers are expected to be late, from 0 to N.
            batch_size: B, which must be given if there is no input.
            others: the inputs of other dtypes, of which a callable metric may make features.

        Raises:
            TypeError: an argument is of another kind than said.
            ValueError: the ordering is of another batch size; inputs differ in batch size, or there
                is none; :func:`torch.func.vmap` hides a dimension of an input.
        """

    def candidates(self) -> dict[str, Sequence[Any]]:
        """Values that are worth trying, by the name of the argument that :meth:`replace` takes."""
        return {}

    def replace(self, **values: Any) -> Self:
        """Return the code made anew with other values for some of its arguments.

        Raises:
            TypeError, ValueError: as making one; the code has no such argument.
        """
        given, names = self._arguments()
        for name in values:
            if name not in names:
                raise TypeError(
                    f"{type(self).__name__}: replace takes {', '.join(names)}, got {name}"
                )
        return type(self)(**(given | values))

    def _arguments(self, defaults: bool = False) -> tuple[dict[str, Any], list[str]]:
        """What the code was made of, by name, and the names of all that its constructor takes."""
        args, kwargs = self._given
        # Of the method: for a class, Python 3.10 has the signature of ``__new__``.
        signature = inspect.signature(self.__init__)  # type: ignore[misc]
        bound = signature.bind(*args, **kwargs)
        if defaults:
            bound.apply_defaults()
        given, names = dict(bound.arguments), list(signature.parameters)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:  # the options
                given |= given.pop(name, {})
                names[names.index(name) :] = Options.__annotations__
        return given, names

    def check_stragglers(self, num_stragglers: int) -> None:
        """Raise an error unless ``num_stragglers`` workers can be late."""
        count(self, "num_stragglers", num_stragglers, 0, self.num_workers)

    def check_values(self, values: Tensor) -> None:
        """Raise a TypeError for values that cannot be mixed, if the code mixes."""
        if self.mixes and isinstance(values, Tensor) and not values.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: values must be floating-point to be mixed, got "
                f"{values.dtype}; codes that mix nothing, such as ReplicationCode and "
                "RegressionCode, carry any"
            )

    def __repr__(self) -> str:
        """The arguments, without those that are None or arrays."""
        given, _ = self._arguments(defaults=True)
        values = {k: getattr(self, k, v) for k, v in given.items() if v is not None}
        shown = (
            f"{name}={value!r}"
            for name, value in values.items()
            if isinstance(value, (int, float, str, Code))
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class FixedCode(Code):
    """A pair of linear maps: an encoder ``K -> N`` and, per received set, a decoder ``|F| -> K``.

    Subclasses implement ``_make_encoder``, ``_make_decoder`` and, if one result is not enough,
    :attr:`min_received`. Both maps depend on the arguments alone, so they are made once and kept.
    Arguments are those of every :class:`Code`.
    """

    def __init__(self, num_data: int, num_workers: int, **options: Unpack[Options]) -> None:
        super().__init__(num_data, num_workers, **options)
        self._decoders: OrderedDict[tuple[int, ...], LinearMap] = OrderedDict()
        self._lock = threading.Lock()

    @functools.cached_property
    @on_host()
    def encoder(self) -> LinearMap:
        """The map from K inputs to N coded inputs."""
        return self._checked("encoder", self._make_encoder(), self.num_data, self.num_workers)

    def decoder(self, received: Sequence[int] | Tensor) -> LinearMap:
        """Return the map from the results of the ``received`` workers to the K answers.

        Args:
            received: the indices of the workers that answered, strictly increasing.

        Raises:
            ValueError: ``received`` is not strictly increasing within ``0 .. num_workers - 1``.
            NotEnoughResults: fewer than :attr:`min_received` results.

        Note:
            The code keeps the last 256 decoders. Keep what a CUDA graph replays.
        """
        return self._decoder(self._received(received))

    def _decoder(self, workers: tuple[int, ...]) -> LinearMap:
        decoder = self._cached(workers)
        if decoder is not None:
            return decoder
        if not _is_increasing(workers):
            raise ValueError(
                f"{type(self).__name__}: received must be strictly increasing, got {list(workers)}"
            )
        return self._new_decoder(workers)

    @on_host()
    def _new_decoder(self, key: tuple[int, ...]) -> LinearMap:
        if len(key) < self.min_received:
            raise NotEnoughResults(key, self.min_received, self.num_workers)
        decoder = self._checked("decoder", self._make_decoder(key), len(key), self.num_data)
        with self._lock:
            self._decoders[key] = decoder
            if len(self._decoders) > _CACHED_DECODERS:
                self._decoders.popitem(last=False)
        return decoder

    def _checked(self, what: str, made: Any, *sizes: int) -> LinearMap:
        if not isinstance(made, LinearMap) or (made.num_inputs, made.num_outputs) != sizes:
            must = f"_make_{what} must return a LinearMap from {sizes[0]} to {sizes[1]}"
            raise TypeError(f"{type(self).__name__}: {must}, got {made!r:.80}")
        return made

    def _cached(self, key: tuple[int, ...]) -> LinearMap | None:
        with self._lock:
            decoder = self._decoders.get(key)
            if decoder is not None:
                self._decoders.move_to_end(key)
            return decoder

    def encode(self, values: Tensor, dim: int = 0) -> Tensor:
        """Code inputs ``[..., K, ...]`` into ``[..., N, ...]``, along ``dim``."""
        self.check_values(values)
        return self.encoder(values, dim)

    def exact(self, received: Sequence[int] | Tensor) -> Tensor:
        """Return which inputs are answered by a result of that very input: bool, ``[K]``."""
        return self.source(received) >= 0

    @on_host()
    def source(self, received: Sequence[int] | Tensor) -> Tensor:
        """Return which result answers which input as it is, bit for bit.

        Args:
            received: the indices of the workers that answered, strictly increasing.

        Returns:
            ``[K]``, places among the received, -1 for inputs that have none; all -1 for fewer than
            :attr:`min_received`.
        """
        workers = self._received(received)
        own = self._own[list(workers)]
        if len(workers) < self.min_received or not bool((own >= 0).any()):
            return torch.full((self.num_data,), -1)
        picked = unit_rows(self._decoder(workers).matrix())
        is_own = (picked >= 0) & (own[picked] == torch.arange(self.num_data))
        return torch.where(is_own, picked, -1)

    @functools.cached_property
    def _own(self) -> Tensor:
        """The input that each worker computes as it is, ``[N]``, or -1 for a mixture."""
        return unit_rows(self.encoder.matrix())

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
        if decoder is None and _is_increasing(workers):
            decoder = self._new_decoder(workers)
        elif decoder is None:
            order = sorted(range(len(workers)), key=workers.__getitem__)
            decoder = self._decoder(tuple(map(workers.__getitem__, order)))
            decoder.check(results, dim)
            results = results.index_select(dim, torch.tensor(order, device=results.device))
        return decoder(results, dim)

    def plan(
        self,
        inputs: Sequence[Tensor],
        num_stragglers: int = 0,
        *,
        batch_size: int | None = None,
        others: Sequence[Tensor] = (),
    ) -> GroupwisePlan:
        self.check_stragglers(num_stragglers)
        inputs, size = check_batch(type(self).__name__, inputs, batch_size)
        if not inputs and self.mixes:
            raise ValueError(
                f"{type(self).__name__}: inputs must hold a floating-point tensor to be mixed, got "
                "none"
            )
        with outside():
            if isinstance(self.ordering, str) and (self.ordering == "arrival" or not inputs):
                return GroupwisePlan(self, Grouping.arrival(size, self.num_data))
            order = order_of(self.ordering, inputs, size, self.num_data)
            return GroupwisePlan(self, Grouping(order, self.num_data))

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
        dropped = ("_decoders", "_lock", "encoder", "_own")
        return {k: v for k, v in self.__dict__.items() if k not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._decoders, self._lock = OrderedDict(), threading.Lock()


def _is_increasing(workers: tuple[int, ...]) -> bool:
    return all(map(operator.lt, workers, workers[1:]))
