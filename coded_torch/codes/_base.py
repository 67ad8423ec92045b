r"""The contract of every code: linear encoders and decoders, plans of batches, and errors."""

from __future__ import annotations

import abc
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arguments import MOST_WORKERS, count, instance, shown
from .._torch import on_host, outside
from ..input_space._error_bounds import ErrorBounds
from ..input_space._gaussian_process import off_mean
from ..input_space._gradients import GradientMetric
from ..input_space._ordering import Grouping
from ..input_space._regression import check_batch, check_link
from ..input_space._regressor import MOST_ROWS
from ..input_space.metrics import Choice, Distances, Sources
from ..linear import LinearMap, MatrixMap
from ._suspects import (
    DOUBTED_WAVELENGTH,
    WAVELENGTH,
    Copies,
    Residuals,
    Trust,
    are_scaled_alike,
    is_doubtful,
    mean_curves,
    numbers_of,
    outliers,
)
from ._untuned import CACHED_DECODERS, ROW_SUM

if TYPE_CHECKING:
    from typing_extensions import Self

#: The result of ``_make_encoder`` and ``_make_decoder``.
Map = LinearMap | NDArray[np.float64]
_SHOWN = 16  # missing results that a message lists


class NotEnoughResults(RuntimeError):  # noqa: N818 - the name says what happened
    """Fewer results arrived than can be decoded.

    A code numbers results by its workers, the call of a wrapper by rows of the batch or by columns.

    Attributes:
        received, missing: the results that arrived, and the others, in increasing order.
        required, num_workers: the number of results that are needed, and of all: N, or the rows.
        reason: why the others did not arrive, in a few words, if that is known.
        report: the report of a wrapper's call. Defaults to None.
        answers: the answers that a wrapper's call has computed by rows, in the structure of the
            answer. The other rows are NaN, or 0 in integers. Defaults to None.
    """

    def __init__(
        self, received: Sequence[int], required: int, num_workers: int, reason: str = ""
    ) -> None:
        self.received = tuple(sorted(received))
        self.required = required
        self.num_workers = num_workers
        self.reason = reason
        self.missing = tuple(sorted(set(range(num_workers)) - set(received)))
        self.report: Any = None
        self.answers: Any = None
        more = len(self.missing) - _SHOWN
        super().__init__(
            (f"{reason}; " if reason else "")  # first, as the cause
            + f"at least {required} of {num_workers} results are needed, got {len(self.received)}; "
            f"missing: {list(self.missing[:_SHOWN])}" + (f" and {more} more" if more > 0 else "")
        )

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"report": self.report, "answers": self.answers}
        return type(self), (self.received, self.required, self.num_workers, self.reason), state


class DeadlineExceeded(NotEnoughResults, TimeoutError):  # noqa: N818 - as above
    """The deadline of a call has passed before enough results arrived to estimate the others."""


class BatchPlan:
    """A code fitted to one batch; this class is the plan of a :class:`FixedCode`.

    Attributes:
        code: the code.
        batch_size, num_groups: B and G.
        choices: the choices by which missing answers of the output decoded last were estimated.
    """

    choices: tuple[Choice, ...] = ()

    def __init__(self, code: Any, grouping: Grouping) -> None:
        self.code = code
        self._grouping = grouping
        self.batch_size = grouping.batch_size
        self.num_groups = grouping.num_groups

    @property
    def note(self) -> str:
        """A warning about the plan, in one line, or an empty text."""
        return ""

    def encode(self, values: Tensor) -> Tensor:
        """Return every worker's coded inputs, ``[N, G, ...]``, of the batch, ``[B, ...]``."""
        coded: Tensor = self.code.encoder.gathered(values, self._grouping)
        return coded

    def decode(self, results: Tensor, received: Any, search: bool = True) -> Tensor:
        """Return the answers of the batch, ``[B, ...]``.

        ``received`` are the workers of the results, ``[|F|, G, ...]``: strictly increasing, and at
        least :attr:`~coded_torch.codes.Code.min_received`.
        """
        answered: Tensor = self.code.decoder(received).scattered(results, self._grouping)
        return answered

    def source(self, received: Sequence[int]) -> Tensor:
        """Return the result that is each input's own, ``[B]``: a flat index ``[|F|, G]``, or -1."""
        with outside():
            of_group = self.code.source(received)[:, None]  # [K, 1]
            if (of_group < 0).all():
                return torch.full((self.batch_size,), -1)
            flat = of_group * self.num_groups + torch.arange(self.num_groups)
            return self._grouping.scatter(torch.where(of_group >= 0, flat, -1))

    def trusted(self, results: Sequence[Tensor], received: Sequence[int]) -> Trust:
        """Return which results ``[|F|, G, ...]``, of each output, are decoded.

        At most :attr:`Code.adversaries` of the received workers are dropped.
        """
        with outside():
            return self._trusted(results, received)

    def _trusted(self, results: Sequence[Tensor], received: Sequence[int]) -> Trust:
        """Return what :meth:`trusted` does, by the residuals of a smoother of the results."""
        code = self.code
        spare = (len(received) - code.min_received - code.num_unknowns) // 2
        most = max(0, min(code.adversaries, spare))
        found = set[int]()
        is_told = code.is_exact
        if most:
            values = numbers_of(results)
            coded = code.encoder.matrix().numpy()[[*received], None]

            def smoothed(wavelength: float) -> tuple[Residuals, list[Residuals]]:
                """Return the residuals of the encoder's rows, and of the results."""
                operator = code.residual_operator(received, wavelength)
                curves = [Residuals(operator, curve) for curve in (values, mean_curves(values))]
                return Residuals(operator, [coded]), curves

            encoder, curves = smoothed(WAVELENGTH)
            for residuals in curves:
                found.update(outliers(residuals, encoder, most))
            hides_others = 0 < len(found) < most  # or may, as more were allowed
            if curves[0].tell and not hides_others and not code.is_exact:
                if not found:
                    encoder, curves = smoothed(DOUBTED_WAVELENGTH)
                is_told = not any(is_doubtful(x, encoder, found, most) for x in curves)
                if not found and are_scaled_alike(curves[0], most):
                    is_told = False
        is_borne = len(found) <= most
        dropped = found if is_borne else set()
        is_defended = is_borne and most == code.adversaries and is_told
        undefended = torch.full((self.batch_size,), not is_defended)
        return Trust([i for i in range(len(received)) if i not in dropped], undefended)

    def _compared(self, rows: Tensor, results: Sequence[Tensor], received: Sequence[int]) -> Trust:
        """Return which results are decoded, if each is the module's output for one row.

        ``rows``, ``[|F|, G]``, are the rows of the batch that the received workers computed.
        """

        def doubt(places: list[int]) -> list[float]:
            """Return the squared errors of some results, if the others' answers are right."""
            others = [i for i in range(len(received)) if i not in places]
            errors = torch.zeros(len(places), dtype=torch.float64)
            for leaf in filter(torch.is_floating_point, results):
                if not others:
                    break
                answers = self.decode(leaf[others], [received[i] for i in others])
                off = (leaf[places] - answers[rows[places]]).double().flatten(1)
                errors += off.square().sum(1).cpu()
            return errors.nan_to_num(nan=math.inf).tolist()

        most = self.code.adversaries
        copies = Copies(rows, results)
        wrong = copies.wrong(most, doubt)
        if wrong is None:
            return Trust([*range(len(rows))], torch.full((self.batch_size,), True))
        places = [i for i in range(len(rows)) if i not in wrong]
        return Trust(places, copies.undefended(wrong, most, self.batch_size))

    def left_out_squares(self, received: Sequence[int], *values: Tensor) -> list[float]:
        """Return the sums of squared errors of estimating values ``[|F| G, C]`` by their mean."""
        with outside():
            return [float(off_mean(x).square().sum()) for x in values]

    def error_bounds(self, *_: Any, **__: Any) -> ErrorBounds | None:
        """Return the error bounds of estimated answers, as a ``RowPlan``; None without any."""
        return None


def cut(rows: Tensor, multiple: int) -> list[Tensor]:
    """Cut rows into as few parts of at most 4,096 as whole groups of ``multiple`` allow."""
    if len(rows) <= MOST_ROWS:
        return [rows]
    groups = -(-len(rows) // multiple)
    parts = -(-groups // max(1, MOST_ROWS // multiple))
    ends = [multiple * (groups * i // parts) for i in range(1, parts)]
    return [*rows.tensor_split(ends)]


class Code(abc.ABC):
    r"""A rule that makes coded inputs for N workers of a batch, and answers of their results.

    A code is immutable; threads may share it. Its plans are linear in values and in results, decode
    every received set of at least :attr:`min_received` workers, and repeat their bits. The rows of
    every matrix sum to 1. A computed answer is a worker's result of that very input, bit for bit.

    To add a code, derive from :class:`FixedCode` if encoder and decoders depend on the arguments
    alone, from :class:`CurveCode` if inputs and workers also have points, or from this class. The
    constructor calls ``super().__init__`` first, and keeps each argument of its own under its name.
    Write ``_make_encoder()`` and ``_make_decoder(received)``, ``_curve`` with points, or ``_plan``
    here; :attr:`min_received` if one result is not enough; and :meth:`candidates` if values are
    worth tuning. Inherit the tests of :class:`coded_torch.testing.codes.CodeTests`, as
    ``tests/codes/test_b_spline.py`` does, and compare by ``coded_torch.compare(extra=...)``. One of
    the package is exported by ``codes/__init__.py``, and named in ``peers`` of
    ``experiments/compare.py``.

    Args:
        num_data: K, the number of inputs coded together, at least 1.
        num_workers: N, the number of workers, from K to 65,536.
        ordering: the order in which a batch is cut into groups of K: "similarity", in which
            neighbours resemble each other, "arrival", or a metric of
            :func:`~coded_torch.input_space.metrics.from_gradients`, in which neighbours are near
            each other and have similar predicted outputs. Defaults to "similarity".
        shuffle: whether every call asks for the columns in a new random order, so that workers late
            together hold columns far apart. Defaults to True.
        link: "softmax" if all outputs are probabilities over their last dimension. They are decoded
            on the scale of logits. Defaults to None.
        adversaries: A, the number of received workers whose results may be wrong, also by
            agreement. Results that do not fit the others are dropped before decoding, at most A.
            Small changes may pass. Defaults to 0, which trusts every result.
    """

    #: True if wrong results can be told from others, so that there may be ``adversaries``.
    defends: bool = False
    #: The results beyond ``min_received`` by which a fit shows no wrong one yet.
    num_unknowns: int = 0
    #: True if right results lie exactly on a curve of the code, so that no small change is hidden.
    is_exact: bool = False
    #: True if coded inputs are mixtures of inputs. Other codes carry values of any dtype.
    mixes: bool = True
    #: True if planning measures distances between the inputs, which takes time.
    uses_geometry: bool = False
    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        code = super().__new__(cls)
        # The signature of a class is the one of ``__new__`` in Python 3.10.
        names = [*inspect.signature(cls.__init__).parameters][1:]
        code._given = dict(zip(names, args, strict=False)) | kwargs
        return code

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        ordering: str | GradientMetric = "similarity",
        shuffle: bool = True,
        link: str | None = None,
        adversaries: int = 0,
    ) -> None:
        self.num_data = count(self, "num_data", num_data, most=MOST_WORKERS)
        self.num_workers = count(self, "num_workers", num_workers, most=MOST_WORKERS)
        if self.num_workers < self.num_data:
            raise ValueError(
                f"{type(self).__name__}: num_workers must be at least num_data, {self.num_data}, "
                f"got {shown(self.num_workers)}"
            )
        if not isinstance(ordering, GradientMetric):
            instance(self, "ordering", ordering, str)
            if ordering not in ("similarity", "arrival"):
                raise ValueError(
                    f"{type(self).__name__}: ordering must be 'similarity', 'arrival' or a metric "
                    f"of from_gradients, got {shown(ordering)}"
                )
        instance(self, "shuffle", shuffle, bool)
        check_link(self, link)
        self.adversaries = count(self, "adversaries", adversaries, 0, self.num_workers - 1)
        if self.adversaries and not self.defends:
            raise ValueError(
                f"{type(self).__name__}: adversaries must be 0 with a code that cannot tell wrong "
                f"results from others, got {self.adversaries}"
            )
        self.ordering = ordering
        self.shuffle = shuffle
        self.link = link

    @property
    def min_received(self) -> int:
        """The least number of results that can be decoded."""
        return 1

    def plan(
        self,
        inputs: Sequence[Tensor],
        num_stragglers: int = 0,
        *,
        batch_size: int | None = None,
        others: Sequence[Tensor] = (),
    ) -> BatchPlan:
        """Order a batch, cut it into groups of K, and fit the code to it, without gradients.

        Args:
            inputs: the floating-point inputs, ``[B, ...]`` each, B at least 1. The list may be
                empty if the code does not mix.
            num_stragglers: S, the number of workers expected to be late, from 0 to N.
            batch_size: B, required if there are no inputs.
            others: the inputs of other dtypes, from which a callable metric may make features.

        Raises TypeError or ValueError if the inputs do not fit, or if :func:`torch.func.vmap` hides
        a dimension of an input.
        """
        count(self, "num_stragglers", num_stragglers, 0, self.num_workers)
        inputs, size = check_batch(type(self).__name__, inputs, batch_size)
        if self.mixes and not inputs:
            raise ValueError(
                f"{type(self).__name__}: inputs must hold a floating-point tensor to be mixed, got "
                f"{shown(inputs)}"
            )
        with outside():
            return self._plan(inputs, size, num_stragglers, others)

    @abc.abstractmethod
    def _plan(
        self, inputs: list[Tensor], size: int, num_stragglers: int, others: Sequence[Tensor]
    ) -> BatchPlan:
        """Return the plan of ``size`` rows, from valid arguments and plain inputs."""

    def _grouping(self, inputs: list[Tensor], size: int) -> Grouping:
        """Order ``size`` rows, by "similarity" as they arrive if there are no inputs."""
        if self.ordering == "arrival" or not inputs:
            return Grouping.arrival(size, self.num_data)
        # A short path through the rows, in parts of whole groups.
        sources = Sources(inputs)
        parts = cut(torch.arange(size), self.num_data)
        metric = None if isinstance(self.ordering, str) else self.ordering.for_orders
        by = [Distances(sources, [metric or "shrunk"], rows) for rows in parts]
        paths = [x.order if metric is None else x.path(metric) for x in by]
        order = torch.cat([rows[path] for rows, path in zip(parts, paths, strict=True)])
        return Grouping(order, self.num_data)

    def candidates(self) -> dict[str, Sequence[Any]]:
        """Return, by argument, the values that :func:`~coded_torch.tune` tries; mostly numbers."""
        return {}

    def replace(self, **values: Any) -> Self:
        """Return a new code with other values for some of its arguments, which are checked."""
        return type(self)(**(self._given | values))

    def __repr__(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        own_options = names.keys() - inspect.signature(Code.__init__).parameters
        defaults = {k: v.default for k, v in names.items() if k in own_options or k in self._given}
        defaults |= self._given
        values = {k: getattr(self, k, v) for k, v in defaults.items() if v is not None}
        shown = (f"{k}={v!r}" for k, v in values.items() if isinstance(v, (int, float, str)))
        return f"{type(self).__name__}({', '.join(shown)})"


class FixedCode(Code):
    """A pair of linear maps: an encoder ``K -> N`` and, per received set, a decoder ``|F| -> K``.

    Both depend on the arguments alone, which are a :class:`Code`'s. They are made once and kept.
    """

    @functools.cached_property
    @on_host()
    def encoder(self) -> LinearMap:
        """The map from K inputs to N coded inputs."""
        return self._checked("encoder", self._make_encoder(), self.num_data, self.num_workers)

    def decoder(self, received: Sequence[int] | Tensor) -> LinearMap:
        """Return the map from the results of the ``received`` workers to the K answers.

        The code keeps the last 256 decoders. Keep the decoders that a CUDA graph replays. Raises a
        ValueError unless ``received`` is strictly increasing within ``0 .. num_workers - 1``, and
        NotEnoughResults if there are fewer than :attr:`min_received`.
        """
        return self._decoder(self._received(received))

    @functools.cached_property
    def _decoder(self) -> Callable[[tuple[int, ...]], LinearMap]:
        return functools.lru_cache(CACHED_DECODERS)(self._new_decoder)

    @on_host()
    def _new_decoder(self, workers: tuple[int, ...]) -> LinearMap:
        """Make the decoder of a received set, or raise what :meth:`decoder` does."""
        if not all(map(operator.lt, workers, workers[1:])):
            raise ValueError(
                f"{type(self).__name__}: received must be strictly increasing, got {shown(workers)}"
            )
        if len(workers) < self.min_received:
            raise NotEnoughResults(workers, self.min_received, self.num_workers)
        return self._checked("decoder", self._make_decoder(workers), len(workers), self.num_data)

    def _checked(self, what: str, made: Any, *sizes: int) -> LinearMap:
        """Return a map of these sizes as a LinearMap; raise an error if it is another."""
        if isinstance(made, np.ndarray) and made.ndim == 2:
            matrix = made
            made = MatrixMap(matrix)  # refuses other objects than numbers
            sums = matrix.sum(1)
            magnitudes = np.abs(matrix).sum(1)
            if not (np.abs(sums - 1) <= ROW_SUM * np.maximum(magnitudes, 1)).all():
                raise ValueError(
                    f"{type(self).__name__}: the rows of _make_{what}'s matrix must sum to 1, got "
                    f"{shown(sums.tolist())}"
                )
        if not isinstance(made, LinearMap) or (made.num_inputs, made.num_outputs) != sizes:
            got = made if isinstance(made, LinearMap) else type(made).__name__
            of = f"a NumPy array {[*sizes[::-1]]} or a LinearMap from {sizes[0]} to {sizes[1]}"
            raise TypeError(f"{type(self).__name__}: _make_{what} must return {of}, got {got}")
        return made

    def encode(self, values: Tensor, dim: int = 0) -> Tensor:
        """Encode inputs ``[..., K, ...]`` into coded inputs ``[..., N, ...]``, along ``dim``."""
        return self.encoder(values, dim)

    @on_host()
    def source(self, received: Sequence[int] | Tensor) -> Tensor:
        """Return the result that answers each input bit for bit, ``[K]``, or -1.

        Results are places among ``received``, which is strictly increasing. All are -1 if fewer
        than :attr:`min_received` are received.
        """
        workers = self._received(received)
        own = self.encoder.passed
        if len(workers) < self.min_received or (own < 0).all():
            return torch.full((self.num_data,), -1)
        picked = self._decoder(workers).passed
        is_own = own[list(workers)][picked] == torch.arange(self.num_data)
        return torch.where(is_own, picked, -1)  # a result that is not picked has -1 too

    def decode(self, results: Tensor, received: Sequence[int] | Tensor, dim: int = 0) -> Tensor:
        """Decode the ``received`` workers' results, ``[..., |F|, ...]``, into ``[..., K, ...]``.

        ``received`` and the errors are as for :meth:`decoder`.
        """
        return self.decoder(received)(results, dim)

    def _plan(self, inputs: list[Tensor], size: int, *_: Any) -> BatchPlan:
        return BatchPlan(self, self._grouping(inputs, size))

    @abc.abstractmethod
    def _make_encoder(self) -> Map: ...

    @abc.abstractmethod
    def _make_decoder(self, received: tuple[int, ...]) -> Map:
        """Return the decoder of a valid, strictly increasing received set of enough workers."""

    def _received(self, received: Any) -> tuple[int, ...]:
        """Return received workers as integers, each of which is in range."""
        items = received
        if isinstance(received, Tensor | np.ndarray):
            items = received.tolist()
        instance(self, "received", items, Iterable)
        items = [*items]
        most = self.num_workers - 1
        try:
            workers = tuple(map(operator.index, items))
            if bool not in map(type, items) and min(workers) >= 0 and max(workers) <= most:
                return workers
        except (TypeError, ValueError):  # no integers, or none at all
            pass
        return tuple(count(self, "each worker of received", item, 0, most) for item in items)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_decoder", "encoder")  # planning the maps again is cheap
        return {k: v for k, v in self.__dict__.items() if k not in dropped}
