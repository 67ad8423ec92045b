r"""Tasks: the inputs of a module call, cut into units; inputs and outputs are pytrees of leaves."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["CONSTANTS", "Arguments", "Task", "broadcast_dims", "check_batch", "flatten", "kind"]
__all__ += ["leaf_name", "positional", "show", "unflatten"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_LEAF = pytree.tree_structure(0)

#: The types of outputs that pass through, if all workers return the same. A float does not: it is a
#: loss or a score, which depends on the inputs.
CONSTANTS = (type(None), bool, int, str, bytes, enum.Enum, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A module call, cut into units. A worker is asked for some of them, a part.

    A unit is a row of a batch (then R = 1), or one of N columns of coded inputs, with one row per
    group.
    """

    #: The leaves of ``(args, kwargs)``. A divided leaf is a tensor ``[U, R, ...]`` of any dtype.
    #: Any other leaf is the same for every part.
    leaves: Sequence[Any]
    dims: Sequence[int | None]  #: the batch dimension of each leaf; None if not divided
    spec: pytree.TreeSpec  #: the structure of ``(args, kwargs)``
    num_units: int  #: U
    unit_rows: int  #: R
    device: torch.device  #: the device of the divided leaves and the results
    out_dims: Any = 0  #: the batch dimensions of the module's outputs, a pytree prefix of them

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
            yield (tuple(batch), {}) if self._is_positional else unflatten(batch, self.spec)

    @functools.cached_property
    def _is_positional(self) -> bool:
        """True if the arguments are the leaves by position, which takes a tenth of the time."""
        return bool(self.spec == positional(len(self.leaves))[0])

    def cut(self, outputs: Sequence[Any], counts: Sequence[int]) -> list[Any]:
        """Cut the outputs for the batches of :meth:`payloads` into parts of ``counts`` units.

        Raises a ValueError if they differ in structure, kind or a constant, or lack rows.
        """
        flat, specs = zip(*map(flatten, outputs), strict=True)
        if any(spec != specs[0] for spec in specs):
            got = " and ".join(sorted(set(map(str, specs))))
            must = "the module must return the same structure for every batch"
            raise ValueError(f"Task: {must}, got {got}")
        sizes = [count * self.unit_rows for count in counts]
        columns: list[Sequence[Any]] = []
        for i, dim in enumerate(broadcast_dims("out_dims", self.out_dims, specs[0])):
            pieces = [leaves[i] for leaves in flat]
            if dim is not None and any(kind(piece) != kind(pieces[0]) for piece in pieces):
                name = leaf_name("output", outputs[0], i)
                got = " and ".join(sorted({show(piece) for piece in pieces}))
                must = "must be the same for every batch, or a tensor of one dtype"
                raise ValueError(f"CodedWrapper: {name} {must}, got {got}")
            if dim is None or not isinstance(pieces[0], Tensor):
                columns.append(pieces[:1] * len(counts))
                continue
            check_batch(outputs[0], i, pieces[0], dim)
            leaf = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
            check_batch(outputs[0], i, leaf, dim, sum(sizes))
            columns.append(leaf.split(sizes, dim))
        return [unflatten([column[n] for column in columns], specs[0]) for n in range(len(counts))]


def flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves and structure of a tree. A single tensor takes no microseconds."""
    return ([tree], _LEAF) if isinstance(tree, Tensor) else pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """Return the tree of these leaves and this structure."""
    return leaves[0] if spec is _LEAF else pytree.tree_unflatten(leaves, spec)


@functools.cache
def positional(count: int) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    """Return the structures of ``(args, kwargs)`` and of args, for ``count`` positional tensors."""
    args = (0,) * count
    return pytree.tree_structure((args, {})), pytree.tree_structure(args)


def broadcast_dims(argument: str, dims: Any, spec: pytree.TreeSpec, *names: str) -> list[Any]:
    """Return the batch dimension of each leaf of ``spec``, from ``dims``, a pytree prefix of it.

    It is a tree of integers, None, or elements of ``names``. Errors name ``argument``.
    """
    if dims is None or type(dims) is int:  # the same for all leaves
        return [dims] * spec.num_leaves
    flat: list[int | None] = []
    tree = pytree.tree_unflatten([0] * spec.num_leaves, spec)

    def repeat(dim: Any, subtree: Any) -> None:
        if not (dim is None or dim in names or type(dim) is int):
            known = ", ".join(("integers", "None", *map(repr, names)))
            known = " or ".join(known.rsplit(", ", 1))
            raise TypeError(f"CodedWrapper: {argument} must hold {known}, got {dim!r}")
        flat.extend([dim] * pytree.tree_structure(subtree).num_leaves)

    try:
        pytree.tree_map_(repeat, dims, tree)
    except ValueError:
        must = f"{argument} must be a pytree prefix of the values"
        got = f"{dims!r} for {pytree.tree_map(lambda _: '*', tree)}"
        raise ValueError(f"CodedWrapper: {must}, got {got}") from None
    return flat


def kind(leaf: Any) -> tuple[Any, ...]:
    """Return the key that all workers must agree on: a constant itself, else the type."""
    if isinstance(leaf, Tensor):
        return Tensor, leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, CONSTANTS) else (type(leaf),)


def show(leaf: Any) -> str:
    """Return a leaf for messages: the dtype and shape of a tensor, a constant, else the type."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf) if isinstance(leaf, CONSTANTS) else type(leaf).__name__


def leaf_name(root: str, tree: Any, index: int) -> str:
    """Return the Python expression of a leaf of ``tree``."""
    path, _ = pytree.tree_flatten_with_path(tree)[0][index]
    return root + pytree.keystr(path)


def check_batch(output: Any, index: int, leaf: Tensor, dim: int, size: int | None = None) -> None:
    """Raise a ValueError unless leaf ``index`` of ``output`` has ``size`` rows at ``dim``."""
    if not -leaf.dim() <= dim < leaf.dim() or (size is not None and leaf.shape[dim] != size):
        rows = "a batch dimension" if size is None else f"size {size}, the batch size,"
        must = f"{leaf_name('output', output, index)} must have {rows} at dim {dim}"
        raise ValueError(f"CodedWrapper: {must}, got shape {tuple(leaf.shape)}")
