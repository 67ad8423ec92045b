"""The order of a batch, and its groups of K rows that are coded together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import on_host, placed, to_device


class Grouping:
    """A permutation of a batch, ``order [B]``, cut into groups of K consecutive rows. Immutable.

    Data point k of group g is row ``rows[k, g]`` of the batch. The last group is filled up with
    copies of its last row, whose answers are dropped: ``targets`` are the rows, and -1 there.
    """

    @on_host()
    def __init__(self, order: Tensor | Sequence[int], num_data: int) -> None:
        order = torch.as_tensor(order).to("cpu", torch.int64)
        self.order = order
        self.num_data = num_data
        self.batch_size = len(order)
        self.num_groups = -(-self.batch_size // num_data)
        self._padding = self.num_groups * num_data - self.batch_size
        self.rows = self._grouped(order[-1:])
        self._copies: dict[tuple[Any, ...], Grouping] = {}

    def _grouped(self, last: Tensor) -> Tensor:
        """Return the order, filled up, group after group: ``[G, K]`` seen as ``[K, G]``."""
        whole = self.order
        if self._padding:
            whole = torch.cat([self.order, last.expand(self._padding)])
        return whole.view(self.num_groups, self.num_data).T

    @functools.cached_property
    def targets(self) -> Tensor:
        return self._grouped(self.order.new_full((1,), -1))

    @functools.cached_property
    def _inverse(self) -> Tensor:
        return self.order.argsort()

    @classmethod
    @functools.lru_cache(32)
    def arrival(cls, batch_size: int, num_data: int) -> Grouping:
        """Return the batch in the order in which it came."""
        with torch.inference_mode(False):  # later calls may need derivatives
            grouping = cls(range(batch_size), num_data)
            assert not any(map(Tensor.is_inference, (grouping.targets, grouping._inverse)))
            return grouping

    def to(self, device: torch.device) -> Grouping:
        """Return the same grouping with its indices on ``device``; each stream's is kept."""
        if device == self.rows.device:
            return self

        def make() -> Grouping:
            grouping = object.__new__(type(self))
            with torch.inference_mode(False):  # later calls may need derivatives
                indices = to_device([self.rows, self.targets, self._inverse], device)
            grouping.__dict__.update(self.__dict__)
            grouping.rows, grouping.targets, grouping._inverse = indices
            return grouping

        return placed(self, self._copies, device, make)

    def gather(self, batch: Tensor) -> Tensor:
        """Return rows of a batch in groups: ``[B, ...] -> [K, G, ...]``, differentiable."""
        _check("batch", batch, (self.batch_size,))
        return batch[self.to(batch.device).rows]

    def scatter(self, groups: Tensor) -> Tensor:
        """Return answers in the batch's order: ``[K, G, ...] -> [B, ...]``, differentiable."""
        _check("groups", groups, self.rows.shape)
        return groups.transpose(0, 1).flatten(0, 1)[self.to(groups.device)._inverse]


def _check(argument: str, tensor: Tensor, sizes: tuple[int, ...]) -> None:
    if tensor.shape[: len(sizes)] != sizes:
        requirement = f"must have shape {[*sizes]} and more, got {[*tensor.shape]}"
        raise ValueError(f"Grouping: {argument} {requirement}")
