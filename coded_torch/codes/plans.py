r"""Planning a batch: any size, any ordering, any kind of code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import count, instance, shown
from .._transforms import outside, plain
from ..input_space.geometry import Geometry, check_inputs
from ..input_space.ordering import Grouping, Ordering, check_ordering, order_of
from ..linear.base import target
from .base import Code
from .batch_plan import BatchPlan, Sites, few_columns, of_mean

__all__ = ["ChunkedPlan", "MeanPlan", "evenly", "plan_batch", "plan_rows"]

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
    others: Sequence[Tensor] = (),
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
        num_stragglers: S, how many workers are expected to be late, from 0 to N.
        batch_size: B, where there are no inputs.
        others: the inputs of other dtypes, where there are no floating-point ones: a code may have
            a callable that makes features of them, :class:`~coded_torch.codes.KernelCode`.

    Raises:
        TypeError: an argument is of another kind than said.
        ValueError: ``ordering`` orders no batch, or not this one; inputs differ in batch size, or
            there are none, but a code that mixes them, or no ``batch_size``;
            :func:`torch.func.vmap` hides a dimension of an input.

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
    code, inputs, blind = _measured("plan_batch", code, inputs, others)
    check_ordering("plan_batch", ordering)
    count("plan_batch", "num_stragglers", num_stragglers, 0, code.num_workers)
    looks = code.uses_geometry or (isinstance(ordering, str) and ordering == "similarity")
    with outside():
        if not (looks and inputs):
            if isinstance(ordering, str):
                plan = code.fit(Grouping.arrival(batch_size, code.num_data), None, num_stragglers)
            else:
                plan = fit(order_of(ordering, inputs, None, batch_size), None)
            plan.note = blind if looks else ""
            return plan
        sizes = [batch_size]
        if batch_size > code.max_chunk:  # into whole groups, but for the last one
            groups = -(-batch_size // code.num_data)
            most = max(1, code.max_chunk // code.num_data)
            sizes = [code.num_data * size for size in evenly(groups, most)]
        return _in_chunks(code, ordering, inputs, sizes, fit, ChunkedPlan)


def plan_rows(
    code: Code,
    ordering: Ordering,
    inputs: Sequence[Tensor],
    *,
    batch_size: int | None = None,
    others: Sequence[Tensor] = (),
) -> BatchPlan:
    """Fit a code that mixes nothing to a batch whose rows are asked for one by one.

    The plan has a unit for each input, in the caller's order: N = K = B and G = 1, so results are
    ``[F, 1, ...]`` and ``received`` are the rows that were answered, increasing. Lost rows are
    found as in :func:`plan_batch`: by the same regression, or as the same mean.

    Args:
        code: a code whose :attr:`~coded_torch.codes.Code.mixes` is False.
        ordering, inputs, batch_size, others: as in :func:`plan_batch`.

    Raises:
        TypeError, ValueError: as :func:`plan_batch`; the code mixes inputs.

    Example:
        >>> import torch
        >>> from coded_torch.codes import ReplicationCode, plan_rows
        >>> plan = plan_rows(ReplicationCode(2, 3), "arrival", [torch.zeros(4)])
        >>> plan.decode(torch.tensor([[1.0], [5.0]]), received=[0, 2])
        tensor([1., 3., 5., 3.])
    """

    def fit(order: Tensor | Sequence[int], geometry: Geometry | None) -> BatchPlan:
        return code.fit_rows(Grouping(order, len(order)), geometry)

    inputs, batch_size = _numbers("plan_rows", code, inputs, batch_size)
    if code.mixes:
        raise ValueError(f"plan_rows: code must not mix inputs, got {code}")
    code, inputs, blind = _measured("plan_rows", code, inputs, others)
    check_ordering("plan_rows", ordering)
    with outside():
        if not (code.uses_geometry and inputs):
            plan = fit(torch.arange(batch_size), None)
            plan.note = blind if code.uses_geometry else ""
            return plan
        sizes = evenly(batch_size, code.max_chunk)
        return _in_chunks(code, ordering, inputs, sizes, fit, _RowChunks)


def _numbers(
    owner: str, code: Code, inputs: Sequence[Tensor], batch_size: int | None
) -> tuple[list[Tensor], int]:
    """The plain inputs, and the size of the batch."""
    instance(owner, "code", code, Code)
    check_inputs(owner, inputs)
    inputs = [plain(owner, f"inputs[{i}]", leaf) for i, leaf in enumerate(inputs)]
    if not inputs and code.mixes:
        raise ValueError(
            f"{owner}: inputs must hold a floating-point tensor, as {code} mixes inputs, got none"
        )
    if batch_size is None and not inputs:
        raise ValueError(f"{owner}: batch_size must be given where there are no inputs, got None")
    size = len(inputs[0]) if inputs else count(owner, "batch_size", batch_size)
    if batch_size not in (None, size) or size == 0:
        raise ValueError(
            f"{owner}: batch_size must be that of the inputs, at least 1, got {shown(batch_size)} "
            f"for inputs of {size} rows"
        )
    return inputs, size


def _measured(
    owner: str, code: Code, inputs: list[Tensor], others: Sequence[Tensor]
) -> tuple[Code, list[Tensor], str]:
    """The code, what distances are measured on, and what to note where there is nothing."""
    if inputs or not others:
        return code, inputs, _BLIND
    with outside():
        code, inputs, note = code.measured([plain(owner, "others", leaf) for leaf in others])
    return code, inputs, "; ".join([_BLIND, *([note] if note else [])])


def evenly(count: int, most: int) -> list[int]:
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
        geometry = Geometry(inputs)
        return fit(order_by(code, ordering, inputs, geometry), geometry)

    if len(sizes) == 1:
        return fit_chunk(inputs, ordering)
    order = torch.arange(len(inputs[0]))
    if not isinstance(ordering, str):  # of the whole batch, from which chunks are cut
        order, ordering = Grouping(order_of(ordering, inputs, None), 1).order, "arrival"
    ends = torch.tensor(sizes).cumsum(0).clamp(max=len(order))[:-1]
    chunks = order.tensor_split(ends)
    plans = [fit_chunk([x[rows.to(x.device)] for x in inputs], ordering) for rows in chunks]
    return chunked(code, chunks, plans)


def order_by(
    code: Code, ordering: Ordering, inputs: Sequence[Tensor], geometry: Geometry
) -> Tensor | Sequence[int]:
    """The order of a batch: by the distances that the code measures anyway, or by cheaper ones."""

    def distances() -> Tensor:
        if code.uses_geometry:
            return geometry.squared_distances(torch.float32).sqrt()
        return geometry.distances()

    return order_of(ordering, inputs, distances)


class ChunkedPlan(BatchPlan):
    """Several plans side by side, each for its own rows of the batch."""

    def __init__(self, code: Code, chunks: Sequence[Tensor], plans: Sequence[BatchPlan]) -> None:
        self.code = code
        self.num_groups = sum(plan.num_groups for plan in plans)
        self._chunks, self._plans = chunks, plans
        rows = torch.cat(list(chunks))
        self.batch_size, self._back = len(rows), rows.argsort()
        orders = [
            own[plan.order]
            for own, plan in zip(chunks, plans, strict=True)
            if plan.order is not None
        ]
        self.order = torch.cat(orders) if orders else None

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        places: list[Tensor | None] = [None] * len(self._plans)
        if out is not None:
            shape = (self.code.num_workers, self.num_groups, *values.shape[1:])
            target(self.code, out, shape, shape, values)
            places = list(out.split([plan.num_groups for plan in self._plans], dim=1))
        coded = [
            plan.encode(values[rows.to(values.device)], out=place)
            for plan, rows, place in zip(self._plans, self._chunks, places, strict=True)
        ]
        return torch.cat(coded, dim=1) if out is None else out

    def decode(
        self, results: Tensor, received: Sequence[int], *, out: Tensor | None = None
    ) -> Tensor:
        shares = list(self._shares(received, results))
        answers = self._together([plan.decode(part, own) for plan, own, part in shares], out)
        plans = [plan for plan, _, _ in shares]
        self.choices = tuple(choice for plan in plans for choice in plan.choices)
        self.note = "; ".join(dict.fromkeys(plan.note for plan in plans if plan.note))
        return answers

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

    def sites(self, received: Sequence[int]) -> list[Sites]:
        found, start = [], 0
        for plan in self._plans:
            for sites in plan.sites(received):
                after = self.num_groups - start - sites.point.shape[1]
                point, at = (
                    torch.nn.functional.pad(x, (start, after), value=-1) for x in sites[:2]
                )
                found.append(Sites(point, at, sites.regression))
            start += plan.num_groups
        return found

    def _flat(self, method: str, received: Sequence[int]) -> list[Tensor]:
        """What each plan answers with flat indices of its own results, as those of all results."""
        whole = torch.arange(len(received) * self.num_groups).view(len(received), self.num_groups)
        flat = []
        for plan, own, part in self._shares(received, whole):
            with outside():
                index = getattr(plan, method)(own)
                flat.append(torch.where(index >= 0, part.flatten()[index], -1))
        return flat

    def _together(self, parts: list[Tensor], out: Tensor | None = None) -> Tensor:
        whole = torch.cat(parts)
        back = self._back.to(whole.device)
        if out is None:
            return whole[back]
        if target(self.code, out, whole.shape, whole.shape, whole) is None:
            return out.copy_(whole[back])
        torch.index_select(whole, 0, back, out=out)
        return out

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

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        return values[:, None] if out is None else _copied(self.code, values[:, None], out)

    def sites(self, received: Sequence[int]) -> list[Sites]:
        found = []
        asked = torch.tensor(received, dtype=torch.int64)
        for plan, rows in zip(self._plans, self._chunks, strict=True):
            place = torch.full((self.batch_size,), -1)
            place[rows] = torch.arange(len(rows))
            mine = (place[asked] >= 0).nonzero().squeeze(1)
            order = place[asked[mine]].argsort()  # chunks are in any order, plans want increasing
            for sites in plan.sites(place[asked[mine[order]]].tolist()) if len(mine) else ():
                point, at = (asked.new_full((len(asked), 1), -1) for _ in range(2))
                point[mine[order]], at[mine[order]] = sites[:2]
                found.append(Sites(point, at, sites.regression))
        return found

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

    def encode(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        return self._plan.encode(values, out=out)

    def decode(
        self, results: Tensor, received: Sequence[int], *, out: Tensor | None = None
    ) -> Tensor:
        mean = results.mean((0, 1)).expand(self.batch_size, *results.shape[2:])
        return mean.clone() if out is None else _copied(self.code, mean, out)

    def expected_errors(
        self, received: Sequence[int], results: Tensor | None = None
    ) -> Tensor | None:
        if self.code.mixes:  # mixtures vary less than inputs
            return None
        with outside():
            sample = None if results is None else few_columns(results)
            variance = of_mean(len(received) * self.num_groups, sample)
            if results is not None:
                variance *= results.shape[2:].numel()
            return torch.full((self.batch_size,), math.sqrt(variance), dtype=torch.float64)


def _copied(code: Code, values: Tensor, out: Tensor) -> Tensor:
    target(code, out, values.shape, values.shape, values)
    return out.copy_(values)
