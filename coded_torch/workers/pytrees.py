r"""The inputs and outputs of a module, leaf by leaf."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["CONSTANTS", "broadcast_dims", "check_batch", "flatten", "kind", "leaf_name"]
__all__ += ["positional", "show", "unflatten"]

_LEAF = pytree.tree_structure(0)

#: The types of outputs that pass through, if all workers return the same. A float does not: it is a
#: loss or a score, which depends on the inputs.
CONSTANTS = (type(None), bool, int, str, bytes, enum.Enum, torch.dtype, torch.device)


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

    Args:
        argument: the name of the argument ``dims``, for errors.
        dims: a tree of integers, None, or elements of ``names``.
        spec: the structure of the values.
        names: words that may stand for a dimension.
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
        raise ValueError(
            f"CodedWrapper: {argument} must be a pytree prefix of the values, "
            f"got {dims!r} for {pytree.tree_map(lambda _: '*', tree)}"
        ) from None
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
        raise ValueError(
            f"CodedWrapper: {leaf_name('output', output, index)} must have {rows} at dim {dim}, "
            f"got shape {tuple(leaf.shape)}"
        )
