r"""Plans: a code fitted to one batch, of any size and for any kind of code."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._transforms import outside, plain
from ..geometry import Geometry
from ..grouping import Grouping, Ordering, check_ordering, order_of
from ..linear import SelectMap

if TYPE_CHECKING:
    from .base import Code, FixedCode

__all__ = [
    "BatchPlan",
    "ChunkedPlan",
    "GroupwisePlan",
    "MeanPlan",
    "SelectionPlan",
    "plan_batch",
    "plan_rows",
]

_COLUMNS = 64
_ROWS = 4096  # of results, to judge predictions by
_BLIND = (
    "no floating-point input to measure distances on: order of arrival, equal copies, "
    "lost answers are the mean"
)


def plan_batch(
    code: Code,
    ordering: Ordering,
    inputs: Sequence[Tensor],
    num_stragglers: int,
    *,
    batch_size: int | None = None,
) -> BatchPlan:
    """Order a batch, cut it into groups of K, and fit a code to it.

    A batch of more than ``code.max_chunk`` inputs whose distances are wanted is cut evenly into
    chunks, each of which is planned for itself. Planning looks at numbers only: it passes no
    gradients, and works inside :func:`torch.func.grad`, ``jacrev`` and ``jvp``.

    Args:
        code: the code.
        ordering: "similarity", "arrival", a permutation, or a callable that gives one.
        inputs: the floating-point inputs that are coded, each ``[B, ...]``, B at least 1. There may
            be none, where the code mixes nothing: then there are no distances, and
            :attr:`BatchPlan.note` says what that means.
        num_stragglers: S, how many workers are expected to be late.
        batch_size: B, where there are no inputs.

    Raises:
        TypeError, ValueError: ``ordering`` orders no batch, or not this one; there are no inputs
            but a code that mixes them, or no ``batch_size``; :func:`torch.func.vmap` hides a
            dimension of an input.

    Example:
        >>> import torch
        >>> from coded_torch.codes import KernelCode, plan_batch
        >>> x = torch.linspace(0, 1, 6)[:, None]
        >>> plan = plan_batch(KernelCode(3, 4), "similarity", [x], num_stragglers=1)
        >>> plan.encode(x).shape
        torch.Size([4, 2, 1])
        >>> plan.decode(plan.encode(x)[1:], received=[1, 2, 3]).shape
        torch.Size([6, 1])
    """

    def fit(order: Tensor | Sequence[int], geometry: Geometry | None) -> BatchPlan:
        return code.fit(Grouping(order, code.num_data), geometry, num_stragglers)

    inputs, batch_size = _numbers("plan_batch", code, inputs, batch_size)
    check_ordering("plan_batch", ordering)
    looks = code.uses_geometry or (isinstance(ordering, str) and ordering == "similarity")
    with outside():
        if not (looks and inputs):
            if isinstance(ordering, str):
                plan = code.fit(Grouping.arrival(batch_size, code.num_data), None, num_stragglers)
            else:
                plan = fit(order_of(ordering, inputs, None, batch_size), None)
            plan.note = _BLIND if looks else ""
            return plan
        sizes = [batch_size]
        if batch_size > code.max_chunk:  # into whole groups, but for the last one
            groups = -(-batch_size // code.num_data)
            most = max(1, code.max_chunk // code.num_data)
            sizes = [code.num_data * size for size in _evenly(groups, most)]
        return _in_chunks(code, ordering, inputs, sizes, fit, ChunkedPlan)


def plan_rows(
    code: Code,
    ordering: Ordering,
    inputs: Sequence[Tensor],
    *,
    batch_size: int | None = None,
) -> BatchPlan:
    """Fit a code that mixes nothing to a batch whose rows are asked for one by one.

    The plan has a unit for each input, in the caller's order: N = K = B and G = 1, so results are
    ``[F, 1, ...]`` and ``received`` are the rows that were answered, increasing. Lost rows are
    found as in :func:`plan_batch`: by the same regression, or as the same mean.

    Args:
        code: a code whose :attr:`~coded_torch.codes.Code.mixes` is False.
        ordering, inputs, batch_size: as in :func:`plan_batch`.

    Raises:
        TypeError, ValueError: as :func:`plan_batch`; the code mixes inputs.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode, plan_rows
        >>> plan = plan_rows(ReplicationCode(2, 3), "arrival", [torch.zeros(4)])
        >>> plan.decode(torch.tensor([[1.0], [5.0]]), received=[0, 2])
        tensor([1., 3., 5., 3.])
    """
    if code.mixes:
        raise ValueError(f"plan_rows: code must not mix inputs, got {code}")

    def fit(order: Tensor | Sequence[int], geometry: Geometry | None) -> BatchPlan:
        return code.fit_rows(Grouping(order, len(order)), geometry)

    inputs, batch_size = _numbers("plan_rows", code, inputs, batch_size)
    check_ordering("plan_rows", ordering)
    with outside():
        if not (code.uses_geometry and inputs):
            plan = fit(torch.arange(batch_size), None)
            plan.note = _BLIND if code.uses_geometry else ""
            return plan
        sizes = _evenly(batch_size, code.max_chunk)
        return _in_chunks(code, ordering, inputs, sizes, fit, _RowChunks)


def _numbers(
    owner: str, code: Code, inputs: Sequence[Tensor], batch_size: int | None
) -> tuple[list[Tensor], int]:
    """The plain inputs, and the size of the batch."""
    inputs = [plain(owner, f"inputs[{i}]", leaf) for i, leaf in enumerate(inputs)]
    if not inputs and code.mixes:
        raise ValueError(
            f"{owner}: inputs must hold a floating-point tensor, as {code} mixes inputs, got none"
        )
    if batch_size is None:
        if not inputs:
            raise ValueError(f"{owner}: batch_size must be given where there are no inputs")
        batch_size = len(inputs[0])
    return inputs, batch_size


def _evenly(count: int, most: int) -> list[int]:
    """The sizes of as few parts of ``count`` as can be, none larger than ``most``."""
    parts = max(1, -(-count // most))
    return [count * (i + 1) // parts - count * i // parts for i in range(parts)]


def _in_chunks(
    code: Code,
    ordering: Ordering,
    inputs: list[Tensor],
    sizes: Sequence[int],
    fit: Callable[[Tensor | Sequence[int], Geometry], BatchPlan],
    chunked: type[ChunkedPlan],
) -> BatchPlan:
    def fit_chunk(inputs: list[Tensor], ordering: Ordering) -> BatchPlan:
        geometry = Geometry(inputs, shrinkage=code.shrinkage)
        return fit(order_of(ordering, inputs, geometry.distances), geometry)

    if len(sizes) == 1:
        return fit_chunk(inputs, ordering)
    order = torch.arange(len(inputs[0]))
    if not isinstance(ordering, str):  # of the whole batch, from which chunks are cut
        order, ordering = Grouping(order_of(ordering, inputs, None), 1).order, "arrival"
    ends = torch.tensor(sizes).cumsum(0).clamp(max=len(order))[:-1]
    chunks = order.tensor_split(ends)
    plans = [fit_chunk([x[rows.to(x.device)] for x in inputs], ordering) for rows in chunks]
    return chunked(code, chunks, plans)


class BatchPlan(abc.ABC):
    """A code fitted to one batch: how its inputs are mixed, and its answers found.

    Attributes:
        code: the code.
        batch_size: B.
        num_groups: G.
        note: what the caller should know of the plan, one line; mostly empty.
    """

    code: Code
    batch_size: int
    num_groups: int
    note: str = ""

    @abc.abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """From the batch ``[B, ...]`` to every worker's coded inputs, ``[N, G, ...]``."""

    @abc.abstractmethod
    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        """From results ``[|F|, G, ...]`` to the answers of the batch, ``[B, ...]``.

        Args:
            results: in the order of ``received``.
            received: the workers whose results these are, strictly increasing, at least
                :attr:`~coded_torch.codes.Code.min_received`.
        """

    def exact(self, received: Sequence[int]) -> Tensor:
        """Which answers are a result of that very input, bit for bit: bool, ``[B]``, on the host.

        Args:
            received: as in :meth:`decode`, or fewer: then none is.
        """
        return self.source(received) >= 0

    def source(self, received: Sequence[int]) -> Tensor:
        """The result that is each input's own: ``[B]``, flat indices ``[|F|, G]``, -1: none is.

        Args:
            received: as in :meth:`exact`.
        """
        return torch.full((self.batch_size,), -1)

    def used(self, received: Sequence[int]) -> Tensor:
        """The distinct results that others are predicted from: flat indices ``[|F|, G]``."""
        return torch.arange(len(received) * self.num_groups)

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        """The sum of squares of what is missed if results are predicted from each other.

        Each, or some of them, by the others, as lost answers are; unless overridden, by their mean.
        For comparing results under one plan: outputs, and what is left of them beside an
        approximation.

        Args:
            results, received: as in :meth:`decode`.
        """
        with outside():
            return _of_mean_square(few_columns(results))

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        """The root mean squared error to expect of each answer; 0 for those that are exact.

        Args:
            received: as in :meth:`decode`; it may be tried out before any result is there.
            results: as in :meth:`decode`; without, errors are in units of the outputs' standard
                deviation (of an output vector's, root of the sum of the variances); with, they are
                comparable to :func:`coded_torch.metrics.rmse`.

        Returns:
            ``[B]``, float64, on the host; None where the code cannot say.
        """
        return None

    def expected_rmse(self, received: Sequence[int], results: Tensor | None = None) -> float | None:
        """The root mean square of :meth:`expected_errors` over the batch, or None."""
        errors = self.expected_errors(received, results)
        return None if errors is None else math.sqrt(float(errors.square().mean()))


class GroupwisePlan(BatchPlan):
    """The plan of a fixed code: every group for itself, all alike."""

    def __init__(self, code: FixedCode, grouping: Grouping) -> None:
        self.code: FixedCode = code
        self.batch_size, self.num_groups = grouping.batch_size, grouping.num_groups
        self._grouping = grouping

    def encode(self, values: Tensor) -> Tensor:
        self.code.check_values(values)
        return self.code.encoder.gathered(values, self._grouping)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        return self.code.decoder(received).scattered(results, self._grouping)

    def source(self, received: Sequence[int]) -> Tensor:
        with outside():
            of_group = self.code.source(received)[:, None]  # [K, 1]
            flat = of_group * self.num_groups + torch.arange(self.num_groups)
            return self._grouping.scatter(torch.where(of_group >= 0, flat, -1))

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        with outside():
            groups = plain("decode", "results", results)
            groups = groups[:, :: max(1, self.num_groups * len(received) // _ROWS)]
            sample = few_columns(groups).view(len(received), -1)  # [|F|, G C]
            return float((self.code.left_out(received) @ sample).square().sum())


class Arrived:
    """What arrived: which result answers which input, and which ones to predict the others from.

    Args:
        point: ``[N, G]``, the point that each worker computes for each group: an input of the
            batch, ``0 .. batch_size - 1``, or a mixture.
        received: the workers whose results arrived, increasing.
        batch_size: B.
        usable: ``[P]``, bool: from the results of which points others may be predicted; all by
            default, and where none of those that arrived is usable.

    Attributes:
        source: ``[B]``, the flat index ``[|F|, G]`` of the result that is an input's own, or -1.
        answered: ``[B]``, bool.
        lost: ``[L]``, the inputs without one.
        used: ``[M]``, flat indices ``[|F|, G]`` of the distinct results to predict the others from.
        points: ``[M]``, the points that these are results of.
    """

    def __init__(
        self,
        point: Tensor,
        received: Sequence[int],
        batch_size: int,
        usable: Tensor | None = None,
    ) -> None:
        arrived = point[torch.tensor(received, dtype=torch.int64)].flatten()  # [F G]
        index = torch.arange(len(arrived))
        # The first result of each input, whichever worker repeats it.
        own = arrived < batch_size
        first = torch.full((batch_size,), len(arrived), dtype=torch.int64)
        first.scatter_reduce_(0, arrived[own], index[own], "amin")
        self.answered = first < len(arrived)
        self.source = torch.where(self.answered, first, -1)
        self.lost = (~self.answered).nonzero().flatten()
        self.used = torch.cat([first[self.answered], index[~own]])
        if usable is not None and bool((good := usable[arrived[self.used]]).any()):
            self.used = self.used[good]
        self.points = arrived[self.used]

    def sample(self, results: Tensor) -> Tensor:
        """Some columns of the distinct results, ``[M, C]``, see :func:`few_columns`."""
        return few_columns(results)[self.used]


class SelectionPlan(BatchPlan):
    """Workers compute inputs as they are; lost answers are the mean of those that arrived.

    Subclasses predict lost answers in a better way: they override :meth:`_weights`,
    :meth:`_variances` and :meth:`_left_out_square`.

    Args:
        code: the code.
        point: ``[N, G]``, the row of the batch that each worker computes for each group; in
            subclasses maybe a mixture, see :class:`Arrived`.
        batch_size: B.
        usable: as in :class:`Arrived`.
    """

    def __init__(
        self, code: Code, point: Tensor, batch_size: int, usable: Tensor | None = None
    ) -> None:
        self.code = code
        self.batch_size, self.num_groups = batch_size, point.shape[1]
        self._point, self._usable = point, usable
        self._last: tuple[tuple[int, ...], Arrived] | None = None

    def encode(self, values: Tensor) -> Tensor:
        if values.shape[:1] != (self.batch_size,):
            raise ValueError(
                f"{type(self.code).__name__}: values must have size {self.batch_size} along dim 0, "
                f"got shape {tuple(values.shape)}"
            )
        rows = self._point.to(values.device)
        return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        with outside():
            arrived = self._arrived(received)
            weights = torch.zeros(0, len(arrived.used), dtype=torch.float64)
            if len(arrived.lost):
                weights = self._weights(arrived, results)
            num_results = len(received) * self.num_groups
            map = SelectMap(num_results, arrived.source, arrived.used, weights)
        return map(results.flatten(0, 1))

    def source(self, received: Sequence[int]) -> Tensor:
        with outside():
            return self._arrived(received).source

    def used(self, received: Sequence[int]) -> Tensor:
        with outside():
            return self._arrived(received).used

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        with outside():
            arrived = self._arrived(received)
            return self._left_out_square(arrived, arrived.sample(results))

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        with outside():
            arrived = self._arrived(received)
            if not len(arrived.used):
                return None
            variances = torch.zeros(self.batch_size, dtype=torch.float64)
            if len(arrived.lost):
                variances[arrived.lost] = self._variances(arrived, results)
                variances *= 1 if results is None else results.shape[2:].numel()
            return variances.sqrt_()

    def _arrived(self, received: Sequence[int]) -> Arrived:
        # Kept for outputs of several leaves, and the errors to expect of them; not a history.
        key = tuple(received)
        last = self._last
        if last is None or last[0] != key:
            last = key, Arrived(self._point, key, self.batch_size, self._usable)
            self._last = last
        return last[1]

    def _weights(self, arrived: Arrived, results: Tensor) -> Tensor:
        """Those of the used results in the lost answers, ``[L, M]``, or ``[1, M]`` for all."""
        return torch.full((1, len(arrived.used)), 1 / len(arrived.used), dtype=torch.float64)

    def _left_out_square(self, arrived: Arrived, sample: Tensor) -> float:
        """What is missed if each of the used results is predicted from the others."""
        return _of_mean_square(sample)

    def _variances(self, arrived: Arrived, results: Tensor | None) -> Tensor | float:
        """Of the lost answers, ``[L]``, about what is expected; in units as expected errors are."""
        sample = None if results is None else arrived.sample(results)
        return _of_mean(len(arrived.used), sample)


class ChunkedPlan(BatchPlan):
    """Several plans side by side, each for its own rows of the batch."""

    def __init__(self, code: Code, chunks: Sequence[Tensor], plans: Sequence[BatchPlan]) -> None:
        self.code = code
        self.num_groups = sum(plan.num_groups for plan in plans)
        self._chunks, self._plans = chunks, plans
        rows = torch.cat(list(chunks))
        self.batch_size, self._back = len(rows), rows.argsort()

    def encode(self, values: Tensor) -> Tensor:
        parts = zip(self._plans, self._chunks, strict=True)
        coded = [plan.encode(values[rows.to(values.device)]) for plan, rows in parts]
        return torch.cat(coded, dim=1)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        shares = self._shares(received, results)
        return self._together([plan.decode(part, own) for plan, own, part in shares])

    def source(self, received: Sequence[int]) -> Tensor:
        return self._together(self._flat("source", received))

    def used(self, received: Sequence[int]) -> Tensor:
        used: Tensor = torch.cat(self._flat("used", received)).unique()
        return used

    def left_out_square(self, results: Tensor, received: Sequence[int]) -> float:
        shares = self._shares(received, results)
        return sum(plan.left_out_square(part, own) for plan, own, part in shares)

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        errors = []
        for plan, own, part in self._shares(received, results):
            error = plan.expected_errors(own, part)
            if error is None:
                return None
            errors.append(error)
        return self._together(errors)

    def _flat(self, method: str, received: Sequence[int]) -> list[Tensor]:
        """What each plan answers with flat indices of its own results, as those of all results."""
        whole = torch.arange(len(received) * self.num_groups).view(len(received), self.num_groups)
        flat = []
        for plan, own, part in self._shares(received, whole):
            with outside():
                index = getattr(plan, method)(own)
                flat.append(torch.where(index >= 0, part.flatten()[index], -1))
        return flat

    def _together(self, parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return whole[self._back.to(whole.device)]

    def _shares(
        self, received: Sequence[int], results: Tensor | None
    ) -> Iterator[tuple[BatchPlan, Sequence[int], Any]]:
        """The plan of each chunk, the workers that answered it, and their results of it, if any."""
        parts: Sequence[Any] = [None] * len(self._plans)
        if results is not None:
            parts = results.split([plan.num_groups for plan in self._plans], dim=1)
        for plan, part in zip(self._plans, parts, strict=True):
            yield plan, received, part


class _RowChunks(ChunkedPlan):
    """The same where units are rows: a chunk gets the results of its own rows, if there are any."""

    def __init__(self, code: Code, chunks: Sequence[Tensor], plans: Sequence[BatchPlan]) -> None:
        super().__init__(code, chunks, plans)
        self.num_groups = 1

    def encode(self, values: Tensor) -> Tensor:
        return values[:, None]

    def _shares(
        self, received: Sequence[int], results: Tensor | None
    ) -> Iterator[tuple[BatchPlan, Sequence[int], Any]]:
        place = torch.full((self.batch_size,), -1)  # of each row among the results
        place[torch.tensor(received, dtype=torch.int64)] = torch.arange(len(received))
        for plan, rows in zip(self._plans, self._chunks, strict=True):
            own = (place[rows] >= 0).nonzero().flatten()  # within the chunk, increasing
            if not len(own):  # of this chunk nothing is known but what the others answered
                yield MeanPlan(plan), received, results
                continue
            at = place[rows[own]]
            part = None if results is None else results[at.to(results.device)]
            yield plan, own.tolist(), part


class MeanPlan(BatchPlan):
    """Answers everything with the mean of the results: what can be done with too few of them."""

    def __init__(self, plan: BatchPlan) -> None:
        self.code, self._plan = plan.code, plan
        self.batch_size, self.num_groups = plan.batch_size, plan.num_groups

    def encode(self, values: Tensor) -> Tensor:
        return self._plan.encode(values)

    def decode(self, results: Tensor, received: Sequence[int]) -> Tensor:
        return results.mean((0, 1)).expand(self.batch_size, *results.shape[2:]).clone()

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        if self.code.mixes:  # mixtures vary less than inputs
            return None
        with outside():
            sample = None if results is None else few_columns(results)
            variance = _of_mean(len(received) * self.num_groups, sample)
            if results is not None:
                variance *= results.shape[2:].numel()
            return torch.full((self.batch_size,), math.sqrt(variance), dtype=torch.float64)


def few_columns(results: Tensor) -> Tensor:
    """Some columns of results ``[F, G, ...]``: ``[F G, C]``, float64 on the host.

    Evenly spaced: the outputs' variance and trust are as exact from some 64 outputs as from all,
    and cheaper.
    """
    columns = plain("decode", "results", results).flatten(0, 1).flatten(1)
    return columns[:, :: max(1, columns.shape[1] // _COLUMNS)].to("cpu", torch.float64)


def _of_mean_square(sample: Tensor) -> float:
    """The sum of squares of what is missed if each result is predicted as the others' mean."""
    if len(sample) < 2:
        return 0.0
    return float(sample.var(0).sum()) * len(sample) ** 2 / (len(sample) - 1)


def _of_mean(count: int, sample: Tensor | None) -> float:
    """The variance of an answer about the mean of ``count`` others: 1 + 1/count of the outputs'.

    That of the outputs is 1 without a ``sample [M, C]``, and unknown, 0, of a single one.
    """
    variance = 1.0
    if sample is not None:
        variance = float(sample.var(0).mean()) if len(sample) > 1 else 0.0
    return variance * (1 + 1 / count)
