r"""The arguments of one call of a wrapper, leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._arguments import dense
from .._transforms import outside, plain
from ..codes.base import Code
from ..workers.pytrees import broadcast_dims, leaf_name, positional

__all__ = ["Inputs", "finite"]


class Inputs:
    """The arguments of one call: their leaves, where each has its batch, and its size.

    Args:
        args, kwargs: the arguments.
        in_dims: of the positional ones, see :class:`~coded_torch.CodedWrapper`.
        mixing: the code if it mixes inputs; then all divided leaves must be floating-point and
            finite. Defaults to None.

    Attributes:
        leaves: of the arguments, positional ones first.
        dims: the batch dimension of each leaf; None if all of it is for every part.
        spec: the structure of ``(args, kwargs)``.
        batch_size: B
        device: of the first leaf that is divided.
        not_finite: bool ``[B]``, on the host: the rows that hold NaN or infinity, which say nothing
            of other rows. None if there is no such row, or inputs are mixed.

    Raises:
        TypeError: a tensor cannot be divided, or ``in_dims`` holds anything else.
        ValueError: there is no tensor to divide, batch sizes differ, a tensor has not the dimension
            or cannot be mixed as it is not finite, or one that is given as None has the batch size.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_dims: Any,
        mixing: Code | None = None,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        # The common case, at a tenth of the cost.
        self._plain = not kwargs and all(isinstance(arg, Tensor) for arg in args)
        if self._plain:
            self.leaves, (self.spec, spec) = list(args), positional(len(args))
        else:
            self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
            spec = pytree.tree_structure(args)
        dims = broadcast_dims("in_dims", in_dims, spec, "shared")
        self.num_positional = len(dims)
        dims += [0] * (len(self.leaves) - self.num_positional)
        self.dims = [
            dim if isinstance(leaf, Tensor) and dim != "shared" else None
            for leaf, dim in zip(self.leaves, dims, strict=True)
        ]
        divided = {i: dim for i, dim in enumerate(self.dims) if dim is not None}
        if not divided:
            others = {type(leaf).__name__ for leaf in self.leaves if not isinstance(leaf, Tensor)}
            got = ", ".join(sorted(others)) or "none"
            raise ValueError(f"CodedWrapper: inputs must hold a tensor to be coded, got {got}")
        for i, dim in divided.items():
            self._check(i, dim, mixing)
        sizes = {i: self.leaves[i].shape[dim] for i, dim in divided.items()}
        if len(set(sizes.values())) > 1:
            got = ", ".join(f"{size} in {self.name(i)}" for i, size in sizes.items())
            raise ValueError(
                f"CodedWrapper: coded inputs must have one batch size, got {got}; what is meant "
                'for the whole batch is passed by position with "shared" in in_dims'
            )
        first = next(iter(divided))
        self.batch_size: int = sizes[first]
        self.device: torch.device = self.leaves[first].device
        self.not_finite = _not_finite(self.floating()) if mixing is None else None
        for i, dim in enumerate(dims):
            if dim is None or not (dim == "shared" or isinstance(self.leaves[i], Tensor)):
                self._check_shared(i)
        if not self._plain:
            self._check_lists("args", args, dims)
            self._check_lists("kwargs", kwargs, dims[self.num_positional :])

    def name(self, i: int) -> str:
        if self._plain:
            return f"args[{i}]"
        if i < self.num_positional:
            return leaf_name("args", self.args, i)
        return leaf_name("kwargs", self.kwargs, i - self.num_positional)

    def batches(self) -> list[Tensor]:
        """Return the divided inputs, ``[B, ...]`` each."""
        return [
            leaf.movedim(dim, 0) if dim else leaf
            for leaf, dim in zip(self.leaves, self.dims, strict=True)
            if dim is not None
        ]

    def floating(self) -> list[Tensor]:
        """Return the floating-point :meth:`batches`: distances are measured on them."""
        return [leaf for leaf in self.batches() if leaf.is_floating_point()]

    def _check(self, i: int, dim: int, mixing: Code | None) -> None:
        leaf = self.leaves[i]
        if torch._C._functorch.is_batchedtensor(leaf):
            raise TypeError(
                f"CodedWrapper: {self.name(i)} must not be mapped by torch.vmap, which hides the "
                "batch that is to be divided; call the wrapper with the whole batch"
            )
        whole = not (leaf.is_floating_point() or leaf.is_complex())
        dense("CodedWrapper", self.name(i), leaf, floating=not whole)
        if whole and mixing is not None:
            raise TypeError(
                f"CodedWrapper: {self.name(i)} must be floating-point, as {mixing} mixes inputs, "
                f"got {leaf.dtype}; leave the code out, or take one that repeats inputs, or code "
                "what it is turned into instead (the embeddings of tokens), or, if it is meant for "
                'the whole batch, pass it by position with "shared" in in_dims'
            )
        if not -leaf.dim() <= dim < leaf.dim():
            said = "that in_dims says" if i < self.num_positional else "as tensors by keyword have"
            raise ValueError(
                f"CodedWrapper: {self.name(i)} must have the batch dimension {dim} {said}, "
                f"got shape {tuple(leaf.shape)}"
            )
        if mixing is not None and not finite(leaf):  # it would spoil its whole group
            place = (~leaf.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"CodedWrapper: {self.name(i)} must be finite, as {mixing} mixes inputs, got "
                f"{leaf[tuple(place)].item()} in row {place[dim]}, at {place}; leave the "
                "code out, or take one that repeats inputs, or leave the row out"
            )

    def _check_shared(self, i: int) -> None:
        """Raise a ValueError if an input given as None looks as if each row had its own."""
        leaf = self.leaves[i]
        shape = tuple(leaf.shape) if isinstance(leaf, (Tensor, np.ndarray)) else ()
        # With one row, what belongs to it and what is shared are the same.
        if shape[:1] != (self.batch_size,) or self.batch_size == 1:
            return
        if isinstance(leaf, np.ndarray):
            raise _own_rows(self.name(i), "an array", shape)
        raise ValueError(
            f"CodedWrapper: {self.name(i)} must not have the batch size {self.batch_size} "
            "along its first dimension where in_dims says None: say 0 if each input has its "
            f'own row of it, "shared" if all of it is meant for every input, got shape {shape}'
        )

    def _check_lists(self, name: str, tree: Any, dims: list[Any]) -> None:
        """Raise a ValueError for a list of numbers, one an input, which would be shared."""
        spec = pytree.tree_structure(tree)
        stack = [(name, tree, pytree.tree_unflatten(dims[: spec.num_leaves], spec))]
        while stack:
            name, node, said = stack.pop()
            if isinstance(node, dict):
                stack += [(f"{name}[{key!r}]", node[key], said[key]) for key in node]
            elif type(node) in (list, tuple):
                leaves = pytree.tree_leaves(node)
                plain = bool(leaves) and all(isinstance(x, (bool, int, float)) for x in leaves)
                shared = all(dim == "shared" for dim in pytree.tree_leaves(said))
                # Tuples are sizes and the like.
                if type(node) is list and plain and len(node) == self.batch_size > 1 and not shared:
                    raise _own_rows(name, "a list", (len(node),))
                parts = zip(node, said, strict=True)
                stack += [(f"{name}[{k}]", part, dim) for k, (part, dim) in enumerate(parts)]


def finite(leaf: Tensor) -> bool:
    """Return whether all of a tensor is finite; integers are."""
    if not leaf.is_floating_point():
        return True
    leaf = leaf.detach() if leaf.requires_grad else leaf
    # A value that is not finite stays so in every sum; a sum may overflow without one.
    return math.isfinite(leaf.sum().item()) or all(
        map(math.isfinite, torch.stack(torch.aminmax(leaf)).tolist())
    )


def _not_finite(batches: Sequence[Tensor]) -> Tensor | None:
    """Return the rows of ``[B, ...]`` that are not finite: bool, ``[B]``; None if all are."""
    with outside():
        rows = [
            (~plain("CodedWrapper", "inputs", x).isfinite()).reshape(len(x), -1).any(1).cpu()
            for x in batches
            if not finite(x)
        ]
        return torch.stack(rows).any(0) if rows else None


def _own_rows(name: str, kind: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"CodedWrapper: {name} must be a tensor if each input has its own row of it, as {kind} is "
        f'shared by all of them; say "shared" in in_dims if that is meant, got shape {shape}'
    )
