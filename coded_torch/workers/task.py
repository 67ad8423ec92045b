r"""Tasks: the inputs of a module call, cut into units."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import pytrees

__all__ = ["Arguments", "Task"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A module call, cut into units. A worker is asked for some of them, a part.

    A unit is a row of a batch (then R = 1), or one of N columns of coded inputs, with one row per
    group.

    Attributes:
        leaves: the leaves of ``(args, kwargs)``. A divided leaf is a tensor ``[U, R, ...]`` of any
            dtype; any other leaf is the same for every part.
        dims: for each leaf, the dimension where the module expects the batch; None if not divided.
        spec: the structure of ``(args, kwargs)``.
        num_units: U.
        unit_rows: R.
        device: the device of the divided leaves and of the results.
        out_dims: the batch dimensions of the module's outputs, a pytree prefix of them.
    """

    leaves: Sequence[Any]
    dims: Sequence[int | None]
    spec: pytree.TreeSpec
    num_units: int
    unit_rows: int
    device: torch.device
    out_dims: Any = 0

    def payload(self, units: Sequence[int]) -> Arguments:
        """Return the ``(args, kwargs)`` of units, a batch of ``len(units) * R`` rows.

        The batch of consecutive units is a view, of others a copy.
        """
        (payload,) = self.payloads(units)
        return payload

    def payloads(self, units: Sequence[int], max_rows: int | None = None) -> Iterator[Arguments]:
        """Yield the :meth:`payload` in batches of at most ``max_rows`` rows."""
        run = range(units[0], units[0] + len(units))

        def chosen(leaf: Tensor) -> Tensor:  # [U, R, ...] -> [len(units) R, ...]
            if all(map(operator.eq, units, run)):
                leaf = leaf[run.start : run.stop]
            else:
                leaf = leaf.index_select(0, torch.tensor(units, device=leaf.device))
            return leaf.flatten(0, 1)

        rows = [
            leaf if dim is None else chosen(leaf)
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        size = len(units) * self.unit_rows
        step = max_rows or size
        for start in range(0, size, step):
            batch = [
                leaf if dim is None else leaf[start : start + step].movedim(0, dim)
                for leaf, dim in zip(rows, self.dims, strict=True)
            ]
            yield (tuple(batch), {}) if self._is_positional else pytrees.unflatten(batch, self.spec)

    @functools.cached_property
    def _is_positional(self) -> bool:
        """Whether the arguments are the leaves by position: made in a tenth of the time."""
        return bool(self.spec == pytrees.positional(len(self.leaves))[0])

    def cut(self, outputs: Sequence[Any], counts: Sequence[int]) -> list[Any]:
        """Cut the outputs for the batches of :meth:`payloads` into parts of ``counts`` units.

        Raises:
            ValueError: the outputs of the batches differ in structure, kind or a constant, or a
                tensor does not have one row per row of its batch.
        """
        flat, specs = zip(*map(pytrees.flatten, outputs), strict=True)
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                "Task: the module must return the same structure for every batch, got "
                f"{' and '.join(sorted(set(map(str, specs))))}"
            )
        sizes = [count * self.unit_rows for count in counts]
        columns: list[Sequence[Any]] = []
        for i, dim in enumerate(pytrees.broadcast_dims("out_dims", self.out_dims, specs[0])):
            pieces = [leaves[i] for leaves in flat]
            if dim is not None and any(
                pytrees.kind(piece) != pytrees.kind(pieces[0]) for piece in pieces
            ):
                name = pytrees.leaf_name("output", outputs[0], i)
                got = " and ".join(sorted({pytrees.show(piece) for piece in pieces}))
                raise ValueError(
                    f"CodedWrapper: {name} must be the same for every batch, or a tensor of one "
                    f"dtype, got {got}"
                )
            if dim is None or not isinstance(pieces[0], Tensor):
                columns.append(pieces[:1] * len(counts))
                continue
            pytrees.check_batch(outputs[0], i, pieces[0], dim)
            leaf = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            pytrees.check_batch(outputs[0], i, leaf, dim, sum(sizes))
            columns.append(leaf.split(sizes, dim))
        return [
            pytrees.unflatten([column[n] for column in columns], specs[0])
            for n in range(len(counts))
        ]
